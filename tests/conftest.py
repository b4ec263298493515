"""
What all tests share: an Airflow home of their own, a real Postgres, ledgers made from a migrated template, and the local Payroc.

The tests start nothing that they do not need: each fixture below costs its time at its first use only.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from sqlalchemy.engine import URL

ROOT = Path(__file__).resolve().parent.parent

# A developer's shell may point to a real Airflow, a real ledger or a real Payroc: none of it may reach a test. Airflow reads
# its environment when it is imported, so this happens before anything else is.
for _name in [name for name in os.environ if name.startswith(("AIRFLOW", "_AIRFLOW", "PAYROC", "PG"))]:
    del os.environ[_name]
# Nor may the shell's terminal decide how wide and how coloured an output is that a test reads; rich looks when it is imported.
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "GITHUB_ACTIONS"):
    os.environ.pop(_name, None)

# Below /var/tmp as the demo: root's Postgres runs as another account, which has to pass through this folder.
SCRATCH = Path(tempfile.mkdtemp(prefix="payroc-refunds-tests-", dir="/var/tmp"))
SCRATCH.chmod(0o711)
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)

os.environ |= {
    "AIRFLOW_HOME": str(SCRATCH / "airflow"),
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{SCRATCH}/airflow.db",
    "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
    "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__CORE__FERNET_KEY": "YWlyZmxvdy1mZXJuZXQta2V5LW9mLXRoZS10ZXN0cyE=",
    "AIRFLOW__API_AUTH__JWT_SECRET": "of the tests: 0123456789012345678901234567890123456789",
    "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    "PAYROC_REFUNDS_ENCRYPTION_KEYS": "bGVkZ2VyLWZlcm5ldC1rZXktb2YtdGhlLXRlc3RzISE=",
    "PAYROC_REFUNDS_FINGERPRINT_KEY": "fingerprint key of the tests, never rotated",
    # A token of one test must not be another test's.
    "PAYROC_REFUNDS_TOKEN_CACHE_DIR": str(SCRATCH / "tokens"),
    # A process of the tests has many gateways, and each counts as one that sends: a test that sends within a sending needs two places.
    "PAYROC_REFUNDS_REQUESTS_IN_FLIGHT": "1000",
    # For processes that tests start; the tests' own path is pytest's setting `pythonpath`.
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")]),
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}

from demo import processes  # noqa: E402
from demo.postgres import PostgresServer  # noqa: E402
from include.refunds.demo_source import create_table  # noqa: E402
from include.refunds.migrations import migrate  # noqa: E402
from include.refunds.revision import REVISION  # noqa: E402
from include.refunds.settings import get_settings  # noqa: E402
from tests.patience import PATIENCE_SECONDS, eventually  # noqa: E402
from tests.support.clock import clock  # noqa: E402

pytest_plugins = ["tests.support.mariadb", "tests.support.pgbouncer", "tests.support.tls"]

# A file is one worker's, and the one that starts last decides when all are done: these take minutes, so they start
# first, the longest before the others.
LONGEST_FIRST = (
    "tests/runbook/test_runbook.py",
    "tests/scheduler/test_notifications.py",
    "tests/browser/test_ui.py",
    "tests/cluster/test_cluster.py",
    "tests/canary/test_full_run.py",
    "tests/simulation/test_mutants.py",
    "tests/processes/test_database_trouble.py",
    "tests/deployment/test_parity.py",
    "tests/scheduler/test_scheduler.py",
    "tests/scheduler/test_approval.py",
    "tests/refunds/test_cli.py",
    "tests/processes/test_wire_faults.py",
    "tests/processes/test_lists.py",
    "tests/processes/test_killed_workers.py",
    "tests/demo/test_demo.py",
    "tests/dags/test_payroc_refunds.py",
)

_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="run the tests that have a full size at that size; takes about an hour",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests measured: what they hand to ``record_property``."""
    figures = [
        (name, value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
    ]
    if figures:
        terminalreporter.section("measured")
        for name, value in figures:
            terminalreporter.line(f"{name}: {value}")


def pytest_configure(config: pytest.Config) -> None:
    """Give the property tests a fixed budget, the same examples each time; at full size new ones each time."""
    hypothesis.settings.register_profile("short", max_examples=100, derandomize=True, deadline=None)
    hypothesis.settings.register_profile("long", max_examples=5000, deadline=None)
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "short")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort long files to the front; the Makefile keeps pytest-xdist from sorting by the number of tests."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether tests run at full size; short otherwise."""
    return bool(pytestconfig.getoption("--long"))


@pytest.fixture(autouse=True)
def fresh_settings() -> Iterator[None]:
    """Settings are read once per process; a test that changes the environment must not leave them to the next."""
    get_settings.cache_clear()
    # What Payroc asked for in one test must slow down no other.
    for pace in (SCRATCH / "tokens").glob("*.pace"):
        pace.unlink()
    yield
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A Postgres server for the whole session, fast because it would not survive a crash of the machine."""
    with PostgresServer(SCRATCH / "postgres", fast=True) as server:
        yield server


NewDatabase = Callable[[], URL]


@pytest.fixture(scope="session")
def new_ledger(postgres: PostgresServer) -> NewDatabase:
    """A function that makes one more migrated, empty ledger; copying a template is ten times faster than migrating."""
    postgres.create_database("ledger_template")
    migrate(postgres.url("ledger_template"))
    return _copier(postgres, "ledger")


@pytest.fixture(scope="session")
def new_source(postgres: PostgresServer) -> NewDatabase:
    """A function that makes one more database with an empty table public.refund_requests."""
    postgres.create_database("source_template")
    create_table(postgres.url("source_template"))
    return _copier(postgres, "source")


@pytest.fixture(scope="session")
def shared_ledger(new_ledger: NewDatabase) -> URL:
    """The ledger that tests share, one after the other: emptying one is ten times faster than making one."""
    return new_ledger()


@pytest.fixture(scope="session")
def shared_source(new_source: NewDatabase) -> URL:
    """The source that tests share, one after the other."""
    return new_source()


@pytest.fixture
def ledger_url(shared_ledger: URL, postgres: PostgresServer) -> URL:
    """An empty ledger."""
    with postgres.connect(str(shared_ledger.database)) as connection:
        # The ledger's own triggers refuse to empty it.
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "TRUNCATE refund_ledger.refund_instructions, refund_ledger.frozen_requests, refund_ledger.refund_states, "
            "refund_ledger.first_releases, refund_ledger.refund_attempts, refund_ledger.refund_events, refund_ledger.refund_runs, "
            "refund_ledger.event_seals, refund_ledger.pauses, refund_ledger.refund_limits, "
            "refund_ledger.bindings, refund_ledger.write_back_turn, refund_ledger.invalid_rows, "
            "refund_ledger.write_back_notes, refund_ledger.terminals, refund_ledger.foreign_refunds RESTART IDENTITY"
        )
        for table in ("refund_limits", "write_back_turn"):
            connection.execute(f"INSERT INTO refund_ledger.{table} DEFAULT VALUES")
        # Logins belong to the server: those that another test gave to operators would make this one's people need two.
        connection.execute(
            "DO $$ DECLARE name text; BEGIN FOR name IN SELECT member::regrole::text FROM pg_auth_members AS m JOIN pg_roles AS r "
            "ON r.oid = m.member WHERE m.roleid = 'refunds_operator'::regrole AND r.rolcanlogin AND NOT r.rolsuper "
            "LOOP EXECUTE format('REVOKE refunds_operator FROM %s', name); END LOOP; END $$"
        )
        connection.execute("UPDATE refund_ledger.schema_version SET version_num = %s", [REVISION])
        connection.execute(clock())
    return shared_ledger


@pytest.fixture
def source_url(shared_source: URL, postgres: PostgresServer) -> URL:
    """A source with an empty table public.refund_requests."""
    with postgres.connect(str(shared_source.database)) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    create_table(shared_source)
    return shared_source


Login = Callable[..., URL]


@pytest.fixture(scope="session")
def login(postgres: PostgresServer) -> Login:
    """A function that returns a database's URL for a login that is granted a role and CONNECT, and nothing else; it may be named."""
    made: set[str] = set()

    def url_of(url: URL, role: str, name: str = "") -> URL:
        name = name or f"{role}_login"
        with postgres.connect() as connection:
            if name not in made:
                connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{name}'")
                made.add(name)
            connection.execute(f"GRANT {role} TO {name}")
            connection.execute(f"GRANT CONNECT ON DATABASE {url.database} TO {name}")
        return url.set(username=name, password=name)

    return url_of


@pytest.fixture(scope="session")
def airflow_database() -> None:
    """Airflow's own database, for tests that run a DAG."""
    from airflow.utils.db import initdb

    initdb()


@dataclass(frozen=True)
class Sandbox:
    """
    A running local Payroc.

    :param url: base URL without a path; ``identity_url`` of the connection.
    """

    url: str

    @property
    def api_url(self) -> str:
        """Base URL of the API; ``host`` of the connection."""
        return f"{self.url}/v1"

    def get(self, path: str) -> Any:
        """Return the JSON of an admin endpoint such as ``/_sandbox/refunds``."""
        return self._call(urllib.request.Request(self.url + path))

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Post JSON to an admin endpoint and return what it answers."""
        headers = {"Content-Type": "application/json"}
        return self._call(
            urllib.request.Request(
                self.url + path, data=json.dumps(body or {}).encode(), headers=headers, method="POST"
            )
        )

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        """Change something by an admin endpoint and return what it answers."""
        headers = {"Content-Type": "application/json"}
        return self._call(
            urllib.request.Request(
                self.url + path, data=json.dumps(body).encode(), headers=headers, method="PATCH"
            )
        )

    def delete(self, path: str) -> None:
        """Delete something by an admin endpoint."""
        self._call(urllib.request.Request(self.url + path, method="DELETE"))

    def _call(self, request: urllib.request.Request) -> Any:
        with _WITHOUT_PROXY.open(request, timeout=PATIENCE_SECONDS) as answer:
            text = answer.read()
        return json.loads(text) if text else None


@contextmanager
def running_sandbox(log: Path, *options: str) -> Iterator[Sandbox]:
    """
    Yield a local Payroc in a process of its own.

    :param options: of its command line, beside the port.
    """
    command = [sys.executable, "-m", "include.sandbox", "--port", "0", *options]
    process = processes.start(command, env=os.environ, log=log, cwd=ROOT)
    try:
        found: list[str] = []

        def said_its_address() -> bool:
            found[:] = re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())
            return bool(found) or process.poll() is not None

        eventually(said_its_address, "the sandbox says its address")
        assert found, f"the sandbox did not say its address: {log.read_text()}"
        yield Sandbox(found[0])
    finally:
        processes.stop(process)


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """
    A local Payroc for the whole session. Tests tell their refunds apart by order id.

    It ends by itself what hangs, so that the tests' own time-outs can be longer than a busy machine is slow.
    """
    with running_sandbox(SCRATCH / "sandbox.log", "--hang-seconds", "1") as sandbox:
        yield sandbox


def _copier(postgres: PostgresServer, kind: str) -> NewDatabase:
    numbers = iter(range(1, sys.maxsize))

    def make() -> URL:
        name = f"{kind}_{next(numbers)}"
        postgres.create_database(name, template=f"{kind}_template")
        if kind == "ledger":
            # As `migrate` does; a copy does not keep it.
            with postgres.connect() as connection:
                connection.execute(f"REVOKE CONNECT, TEMPORARY ON DATABASE {name} FROM PUBLIC")
        return postgres.url(name)

    return make
