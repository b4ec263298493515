"""What the measurements stand on: a durable Postgres, ledgers and sources, a Payroc that costs nothing, and the product's own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import psycopg
from psycopg.sql import SQL, Identifier
from sqlalchemy.engine import URL

from demo import processes
from demo.environment import DEMO_SETTINGS, environment
from demo.postgres import PostgresServer
from demo.state import ROOT, State

# As large as the peers' concurrency, so that all have the same number of requests under way.
CONCURRENCY = 64
BATCH_SIZE = 500

_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# One approved refund per number, its payees spread over the numbers. 021000021 passes the checksum of routing numbers.
_REQUESTS = """
    INSERT INTO refund_requests (source_ref, processing_terminal_id, order_id, description, amount, currency, name_on_account,
        account_type, sec_code, routing_number, account_number, requested_by, approved_by, approved_at)
    SELECT 'bench-' || n, (2201001 + n %% 5)::text, 'BN-' || n, 'Refund of order BN-' || n, 100 + n %% 99900, 'USD', 'Payee ' || n,
        'checking', 'ppd', '021000021', lpad((1000000 + n * 7919 %% 90000000)::text, 10, '0'), 'ann', 'bob',
        now() - %s * interval '1 hour' + n * interval '1 millisecond'
    FROM generate_series(%s + 1, %s) AS n"""


@dataclass(frozen=True)
class Books:
    """A ledger and the source that it pays for, two databases."""

    ledger: str
    source: str


class Stage:
    """
    The database server and a folder below /var/tmp; both are gone at the end. Postgres writes durably, as a ledger's has to.

    :param folder: where everything lies; a folder of its own unless told otherwise.
    """

    def __init__(self, folder: Path | None = None) -> None:
        # Root's Postgres runs as another account, which has to pass through.
        self.folder = folder or Path(tempfile.mkdtemp(prefix="payroc-refunds-bench-", dir="/var/tmp"))
        self.folder.chmod(0o711)
        self.postgres = PostgresServer(self.folder / "postgres")
        self._state = State(self.folder)
        self._keys = self._state.keys()

    def __enter__(self) -> Stage:
        """Start the server and make one empty ledger and one empty source, from which the others are copied."""
        self.postgres.start()
        for private in (self._state.airflow, self._state.logs):
            private.mkdir(mode=0o700, exist_ok=True)
        for database in ("ledger_template", "source_template"):
            self.postgres.create_database(database)
        env = self.environment(Books("ledger_template", "source_template"), "http://127.0.0.1:1")
        self.run("include.refunds", "migrate", "--demo-source", env=env)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the server and remove the folder."""
        try:
            self.postgres.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def configure(self, **settings: str) -> None:
        """Restart the server with other settings of Postgres."""
        with self.postgres.connect() as server:
            for name, given in settings.items():
                server.execute(SQL("ALTER SYSTEM SET {} = {}").format(Identifier(name), given))
        self.postgres.stop()
        self.postgres.start()

    def database_cpu(self) -> float:
        """Return the seconds of CPU that the database server has used since its start."""
        return cpu_seconds([self.postgres.pid])

    def new_books(self, name: str) -> Books:
        """Make an empty ledger and an empty source."""
        books = Books(f"ledger_{name}", f"source_{name}")
        self.postgres.create_database(books.ledger, template="ledger_template")
        self.postgres.create_database(books.source, template="source_template")
        return books

    def approve(self, source: str, count: int, *, hours_ago: int = 1) -> None:
        """Put approved refunds into a source, next to those that are there."""
        with self.postgres.connect(source) as connection:
            there = value(connection, "SELECT count(*) FROM refund_requests")
            connection.execute(_REQUESTS, [hours_ago, there, there + count])
            connection.execute("ANALYZE refund_requests")

    def environment(self, books: Books, payroc: str, **settings: str) -> dict[str, str]:
        """
        Return the environment of a process of the product, with the settings' own defaults.

        :param payroc: base URL of Payroc, without a path.
        :param settings: settings other than the defaults, without ``PAYROC_REFUNDS_``.
        """
        url = self.postgres.url
        env = environment(
            self._state,
            self._keys,
            airflow=url("airflow"),
            ledger=url(books.ledger),
            source=url(books.source),
            sandbox=payroc,
        )
        kept = {name: value for name, value in env.items() if name not in DEMO_SETTINGS}
        return {
            **kept,
            "PAYROC_REFUNDS_SCHEDULE": "",
            **{f"PAYROC_REFUNDS_{name}": given for name, given in settings.items()},
        }

    def run(self, *command: str, env: dict[str, str] | None = None) -> str:
        """
        Run a Python module to its end and return what it printed.

        :raises subprocess.CalledProcessError: when it fails; its own words are on the terminal.
        """
        return subprocess.run(
            [sys.executable, "-m", *command],
            env=env or os.environ,
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    def plain_url(self, database: str) -> str:
        """Return a database's URL as drivers other than SQLAlchemy take it."""
        url: URL = self.postgres.url(database)
        return url.set(drivername="postgresql").render_as_string(hide_password=False)

    @contextmanager
    def payroc(self) -> Iterator[Payroc]:
        """Yield a running Payroc that costs nothing."""
        with _child("benchmarks.server", env=dict(os.environ), log=self.folder / "payroc.log") as child:
            assert child.stdout is not None  # noqa: S101 - for the types
            yield Payroc(f"http://127.0.0.1:{int(child.stdout.readline())}")

    @contextmanager
    def product(self, books: Books, payroc: Payroc, **settings: str) -> Iterator[Product]:
        """Yield the product, in a process that forks one for each task as Airflow's executor does."""
        env = self.environment(books, payroc.url, **settings)
        with _child("benchmarks.product", env=env, log=self.folder / f"product-{books.ledger}.log") as child:
            yield Product(child)


class Payroc:
    """
    A running :mod:`benchmarks.server`.

    :param url: its base URL, without a path.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def begin(self, latency_ms: int) -> None:
        """Answer so much later from now on, and count anew."""
        request = urllib.request.Request(f"{self.url}/latency/{latency_ms}", method="PUT")  # noqa: S310 - the loopback interface
        _WITHOUT_PROXY.open(request, timeout=10).close()

    def counts(self) -> dict[str, int]:
        """Return the requests by kind since :meth:`begin`, the most that were under way at a time, and all refunds that exist."""
        with _WITHOUT_PROXY.open(f"{self.url}/counts", timeout=10) as answer:
            return dict(json.load(answer))


class Product:
    """
    A running :mod:`benchmarks.product`.

    :param child: its process.
    """

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def ask(self, task: str, **arguments: Any) -> dict[str, Any]:
        """
        Let it do a task to its end, and return what it tells.

        :raises RuntimeError: when the task failed.
        """
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None and stdout is not None  # noqa: S101, PT018 - for the types
        _write_line(stdin, {"task": task, **arguments})
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"The process of the product ended in the task {task}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"The task {task} failed: {answer['error']}")
        return answer

    def released(self, run_id: str) -> dict[str, Any]:
        """Pull, and let everything through the gate; ``ids`` of the answer are what may be sent."""
        return self.ask("prepare", run_id=run_id)

    def send(self, run_id: str, lists: Sequence[Sequence[int]], *, at_a_time: int = 1) -> dict[str, Any]:
        """
        Send lists, each in a process of its own, as Airflow does.

        :param at_a_time: so many processes at a time, as the pool lets them.
        """
        return self.ask("send", run_id=run_id, lists=lists, at_a_time=at_a_time)


def in_lists(ids: Sequence[int], size: int = BATCH_SIZE) -> list[list[int]]:
    """Return ids in lists of a size; the last one may be shorter."""
    return [list(ids[start : start + size]) for start in range(0, len(ids), size)]


def value(connection: psycopg.Connection, query: str) -> Any:
    """Return the one value of a query."""
    row = connection.execute(query.encode()).fetchone()
    assert row is not None  # noqa: S101 - for the types
    return row[0]


@contextmanager
def _child(module: str, *, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that reads and writes lines, and end it."""
    with ExitStack() as stack:
        output = stack.enter_context(log.open("ab"))
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            env=env,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            processes.stop(child)  # type: ignore[arg-type]  # text or bytes, it only ends it


def _write_line(stream: IO[str], content: dict[str, Any]) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()


def cpu_seconds(roots: Iterable[int]) -> float:
    """
    Return the CPU time of processes and all below them, in seconds.

    A parent counts what its ended children used.
    """
    total = 0.0
    for root in map(psutil.Process, roots):
        for process in (root, *root.children(recursive=True)):
            # What has ended a moment ago counts at its parent.
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total
