"""A shop that pays the demo's sample through a real Airflow, and a shell in which people run what the documents tell them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy import URL

from demo.postgres import PostgresServer
from demo.stack import SAMPLE
from demo.unchecked import write_unchecked
from include.refunds.audit import verify_audit
from include.refunds.csv_lines import read_lines
from include.refunds.demo_source import import_lines
from include.refunds.ledger import Selection
from include.refunds.roles import KEY_ROTATOR, OPERATOR
from include.refunds.settings import get_settings
from tests.conftest import ROOT, SCRATCH, Login, Sandbox, running_sandbox
from tests.patience import eventually
from tests.runbook.console import Section, Shell, blocks_of
from tests.scheduler.conftest import Merchant
from tests.scheduler.deployment import USERS, Deployment

FOLLOW_UP_DAG = "payroc_refunds_followup"
DOCUMENTS = (ROOT / "docs" / "running.md", ROOT / "docs" / "operations.md")
# Wide enough for every table; a terminal's width is nothing that documents could promise.
_COLUMNS = "130"


class TwoDags(Deployment):
    """A running Airflow with both DAGs."""

    def __init__(
        self, folder: Path, postgres: PostgresServer, ledger: URL, source: URL, sandbox: Sandbox
    ) -> None:
        super().__init__(folder, postgres, ledger, source, sandbox)
        (folder / "dags" / f"{FOLLOW_UP_DAG}.py").write_text(
            (ROOT / "dags" / f"{FOLLOW_UP_DAG}.py").read_text()
        )

    def start(self) -> None:
        super().start()
        eventually(lambda: self.client.is_ready(FOLLOW_UP_DAG), f"{FOLLOW_UP_DAG} is there")

    def environment(self, programs: Path) -> dict[str, str]:
        """
        Return the environment of a person at this deployment, with what the documents tell to set.

        :param programs: folder of Postgres' programs.
        """
        passwords = json.loads((self.folder / "airflow" / "passwords.json").read_text())
        return self._env | {
            "AIRFLOW": self._env["AIRFLOW__API__BASE_URL"],
            **{f"{user.upper()}_PASSWORD": passwords[user] for user in USERS},
            "COLUMNS": _COLUMNS,
            # A pg_dump that is older than the server refuses it.
            "PATH": os.pathsep.join([str(programs), self._env["PATH"]]),
        }

    @property
    def tokens(self) -> Path:
        """The folder of its tokens."""
        return Path(self._env["PAYROC_REFUNDS_TOKEN_CACHE_DIR"])


class Shop(Merchant):
    """
    A shop on the day on which something is wrong.

    :param env: environment of its people.
    """

    def __init__(self, airflow: Deployment, env: dict[str, str]) -> None:
        super().__init__(airflow)
        self.env = env

    def approve_sample(self, *source_refs: str) -> None:
        """Put these refunds of the demo's sample into the source; all of them when none is named."""
        lines = [
            line
            for line in read_lines(SAMPLE.read_bytes())
            if not source_refs or line.row["source_ref"] in source_refs
        ]
        import_lines(self.airflow.source, lines, get_settings(), advance=lambda: None)
        if not source_refs:
            url = self.airflow.source.set(drivername="postgresql").render_as_string(hide_password=False)
            with psycopg.connect(url) as source:
                write_unchecked(source)

    def pay(self, *source_refs: str) -> None:
        """Release these refunds, or all, and send each once, as the next run would."""
        self.pull()
        for refund_id in self.release(selection=Selection(source_refs=source_refs)):
            self.send(refund_id)
        self.write_back()
        self.run(self.ledger.seals.seal())

    def assert_sent_once(self, *source_refs: str) -> None:
        """Each exists once at Payroc, and the ledger knows that one; whether the source does is not looked at."""
        for source_ref in source_refs:
            theirs = [refund["refundId"] for refund in self.refunds_at_payroc(source_ref)]
            assert theirs == [self.row(source_ref)["payroc_refund_id"]], f"{source_ref}: {theirs}"

    def connection(self, **changed: str) -> str:
        """Return the connection to the local Payroc as JSON, with some of its fields changed."""
        return json.dumps(json.loads(self.env["AIRFLOW_CONN_PAYROC_DEFAULT"]) | changed)

    def sandbox_terminal(self, terminal: str, mode: str) -> None:
        """Give or take a terminal the right to refund."""
        httpx.put(
            f"{self.sandbox.url}/_sandbox/terminals/{terminal}", json={"mode": mode}, trust_env=False
        ).raise_for_status()

    def audit_head(self) -> str:
        """Return the head of the audit trail, as a report shows it."""
        return str(self.run(verify_audit(self.ledger.engine)).head)

    def end_runs(self) -> None:
        """End what a test that failed left at work: it must not reach the next."""
        client = self.airflow.client

        def nothing_is_left() -> bool:
            client.fail_open_runs()
            return not client.has_open_runs() and not self.airflow.task_processes()

        self.wait_until(nothing_is_left, "all runs and task processes have ended", pause=0.2)

    def wait_for_runs(self) -> None:
        """Wait until no run of Airflow's is open, as a person does."""
        self.wait_until(lambda: not self.airflow.client.has_open_runs(), "all runs have ended", pause=0.3)


@pytest.fixture(scope="module")
def airflow(postgres: PostgresServer, shared_ledger: URL, shared_source: URL) -> Iterator[TwoDags]:
    """A running Airflow on the ledger and the source that each test finds empty."""
    folder = SCRATCH / "runbook"
    folder.mkdir(mode=0o711)
    with running_sandbox(folder / "sandbox.log") as sandbox:
        deployment = TwoDags(folder, postgres, shared_ledger, shared_source, sandbox)
        try:
            deployment.start()
            yield deployment
        finally:
            deployment.stop()


@pytest.fixture
def shop(
    airflow: TwoDags,
    postgres: PostgresServer,
    ledger_url: URL,
    source_url: URL,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Shop]:
    """A shop with nothing paid yet: neither the ledger nor Payroc remembers what another test did."""
    airflow.sandbox.post("/_sandbox/reset")
    shutil.rmtree(airflow.tokens, ignore_errors=True)
    env = airflow.environment(postgres.program("pg_dump").parent)
    for name, value in env.items():
        if name.startswith(("PAYROC_REFUNDS_", "AIRFLOW_CONN_")):
            monkeypatch.setenv(name, value)
    # For what the tests themselves do.
    for name, value in {
        "TOKEN_CACHE": "false",
        "UNKNOWN_WAIT_SECONDS": "1",
    }.items():
        monkeypatch.setenv(f"PAYROC_REFUNDS_{name}", value)
    get_settings.cache_clear()
    shop = Shop(airflow, env)
    yield shop
    shop.end_runs()
    shop.ledger_engine.dispose()
    shop.source_engine.dispose()


@pytest.fixture
def shell(shop: Shop, login: Login, tmp_path: Path) -> Iterator[Shell]:
    """A shell in the shop's environment, in an empty folder. Its person may do to the ledger what an operator may."""
    shell = Shell(shop.env, tmp_path)
    # The shop's own connection has all rights.
    shell.run("unset AIRFLOW_CONN_REFUNDS_LEDGER")
    use_ledger(shell, shop.airflow.ledger, login)
    yield shell
    shell.close()


def use_ledger(shell: Shell, ledger: URL, login: Login) -> None:
    """Set the addresses of the ledger that operations.md tells to set, each with the rights that it names."""
    logins = {
        "PAYROC_REFUNDS_LEDGER_URL": login(ledger, OPERATOR),
        "BOBS_URL": login(ledger, OPERATOR, "bob"),
        "ROTATOR_URL": login(ledger, KEY_ROTATOR),
        "OWNER_URL": ledger,
    }
    for name, url in logins.items():
        shell.run(f"export {name}='{url.set(drivername='postgresql').render_as_string(hide_password=False)}'")


@pytest.fixture
def section(request: pytest.FixtureRequest, shell: Shell) -> Iterator[Section]:
    """The section that the test is called after. A test that executes only a part of its blocks fails."""
    section = find_section(request.node.name, shell)
    yield section
    assert section.left == [] or section.failed, f"the test left the block at line {section.left[0].line} out"


def find_section(test: str, shell: Shell) -> Section:
    """Return the section that a test is called after."""
    found = {
        name_of_test(block.section): (document, block.section)
        for document in DOCUMENTS
        for block in blocks_of(document)
    }
    return Section(*found[test], shell)


def name_of_test(heading: str) -> str:
    """Return the name of the test that executes the section under a heading."""
    return "test_" + re.sub(r"\W+", "_", heading.replace("`", "").lower()).strip("_")
