"""What both the demo and the local Airflow stand on: the database server, the prepared databases and the local Payroc."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import psycopg

from demo import processes
from demo.console import say, step
from demo.environment import HANG_SECONDS, TOKEN_SECONDS, connections, environment
from demo.errors import DemoError
from demo.postgres import HOST, PostgresServer, free_port, port_is_free
from demo.state import ROOT, State
from demo.unchecked import write_unchecked
from include.refunds.printable import visible

AIRFLOW_DATABASE = "airflow"
LEDGER_DATABASE = "refunds"
SOURCE_DATABASE = "shop"
POOL = "payroc_api"
POOL_SLOTS = "4"
SAMPLE = ROOT / "demo" / "sample_refunds.csv"

_SANDBOX_SECONDS = 30
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Stack:
    """
    The stack of one command. Use it as a context manager: whatever happens inside, everything it started ends.

    :param state: where it keeps what outlives the command.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.keys = state.keys()
        self.postgres = PostgresServer(state.postgres)
        self.sandbox_port = 0
        self._sandbox: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stack:
        """Start the database server and the local Payroc, and prepare the databases."""
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything that was started."""
        self._stop()

    @property
    def sandbox_url(self) -> str:
        """Base URL of the local Payroc, without a path."""
        return f"http://{HOST}:{self.sandbox_port}"

    def environment(self, *, connections_in_environment: bool = True) -> dict[str, str]:
        """Return the whole environment for a process that works with this stack."""
        return environment(
            self.state,
            self.keys,
            airflow=self.postgres.url(AIRFLOW_DATABASE),
            ledger=self.postgres.url(LEDGER_DATABASE),
            source=self.postgres.url(SOURCE_DATABASE),
            sandbox=self.sandbox_url,
            connections_in_environment=connections_in_environment,
        )

    def connections(self) -> dict[str, dict[str, Any]]:
        """Return the Airflow connections to this stack, by id."""
        return connections(
            self.keys,
            self.postgres.url(LEDGER_DATABASE),
            self.postgres.url(SOURCE_DATABASE),
            self.sandbox_url,
        )

    @contextmanager
    def ledger(self) -> Iterator[psycopg.Connection]:
        """Yield a connection to the ledger's database."""
        with self.postgres.connect(LEDGER_DATABASE) as connection:
            yield connection

    def limit(self, name: str) -> int | None:
        """Return a limit of the sending, as the ledger has it."""
        with self.ledger() as ledger:
            query = "SELECT to_jsonb(limits) -> %s FROM refund_ledger.refund_limits AS limits"
            row = ledger.execute(query, [name]).fetchone()
        return row[0] if row else None

    def sandbox_get(self, path: str) -> Any:
        """Return the JSON that the local Payroc answers."""
        with WITHOUT_PROXY.open(self.sandbox_url + path, timeout=10) as answer:
            return json.load(answer)

    def run(self, name: str, *command: str | Path) -> None:
        """
        Run a Python module to its end, its output into a log.

        :param name: name of the log.
        :param command: module and arguments.
        :raises DemoError: when it fails, with its last lines.
        """
        self._finish(name, self.start(name, *command))

    def start(
        self,
        name: str,
        *command: str | Path,
        env: dict[str, str] | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> subprocess.Popen[bytes]:
        """Start a Python module, its output into a log of its own that begins anew."""
        log = self.log(name)
        log.unlink(missing_ok=True)
        return processes.start(
            [sys.executable, "-m", *command],
            env=env or self.environment(),
            log=log,
            cwd=ROOT,
            death_signal=death_signal,
        )

    @staticmethod
    def ignore_signals() -> None:
        """From here on everything is being stopped: a second Ctrl-C would only leave things behind."""
        for number in processes.ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def log(self, name: str) -> Path:
        """Return the log file of this name."""
        return self.state.logs / f"{name}.log"

    def _start(self) -> None:
        left_over = processes.end_all(processes.orphans(str(self.state.folder)))
        if left_over:
            say(
                f"[yellow]•[/] An earlier run was cut off: {left_over} of its processes were still there and have been stopped."
            )
        with step("Starting the database server", "Database server is running"):
            self.postgres.start()
            for database in (AIRFLOW_DATABASE, LEDGER_DATABASE, SOURCE_DATABASE):
                self.postgres.create_database(database)
        self.sandbox_port = self._choose_sandbox_port()
        # The two longest preparations at the same time.
        preparation = self._begin_to_prepare_airflow()
        try:
            with step(
                "Starting the local Payroc",
                "Local Payroc is running: it knows no real bank and moves no money",
            ):
                self._start_sandbox()
            with step(
                "Preparing the ledger and the approved refunds",
                "Ledger is ready, and the sample refunds are in the shop's table",
            ):
                self.run("ledger", "include.refunds", "migrate", "--demo-source")
                self.run("import", "include.refunds", "import", SAMPLE)
                with self.postgres.connect(SOURCE_DATABASE) as source:
                    write_unchecked(source)
            if preparation:
                with step(
                    "Preparing Airflow's own database (only the first time)",
                    "Airflow's own database is ready",
                ):
                    self._finish("airflow-db", preparation)
                    self.run(
                        "airflow-pool",
                        "airflow",
                        "pools",
                        "set",
                        POOL,
                        POOL_SLOTS,
                        "Calls to Payroc at a time",
                    )
                    self.state.set_note("airflow", self._airflow_note())
        finally:
            if preparation:
                processes.stop(preparation)
        self._close_interrupted_runs()
        self._let_runs_pass()

    def _stop(self) -> None:
        self.ignore_signals()
        if self._sandbox is not None:
            processes.stop(self._sandbox)
        processes.end_all(processes.orphans(str(self.state.folder)), first=signal.SIGKILL)
        self.postgres.stop()

    def _airflow_note(self) -> str:
        return f"{version('apache-airflow-core')}, {POOL_SLOTS} slots"

    def _begin_to_prepare_airflow(self) -> subprocess.Popen[bytes] | None:
        if self.state.note("airflow") == self._airflow_note():
            return None
        return self.start("airflow-db", "airflow", "db", "migrate")

    def _finish(self, name: str, process: subprocess.Popen[bytes]) -> None:
        try:
            while not processes.has_ended(process):
                time.sleep(0.05)
        finally:
            processes.stop(process)
        if process.returncode != 0:
            raise DemoError(
                f"This step failed. From its log ({self.log(name)}):\n{telling_lines(self.log(name))}"
            )

    def _choose_sandbox_port(self) -> int:
        # A ledger belongs to one Payroc, known by its address, so the port of the first run stays.
        noted = self.state.note("sandbox_port")
        if noted is None:
            usual = self.state.sandbox_port
            port = usual if port_is_free(usual) else free_port()
            self.state.set_note("sandbox_port", str(port))
            return port
        port = int(noted)
        # A process that was killed a moment ago may not have let go of it yet.
        if not processes.wait_until(lambda: port_is_free(port), seconds=3):
            raise DemoError(
                f"Port {port} is taken by {_listener(port)}. This demo's ledger belongs to the local Payroc at that port: end that "
                "program, or remove the demo's data with `make reset`."
            )
        return port

    def _start_sandbox(self) -> None:
        arguments = ["--port", str(self.sandbox_port), "--state", str(self.state.sandbox)]
        times = ["--token-seconds", str(TOKEN_SECONDS), "--hang-seconds", str(HANG_SECONDS)]
        # It takes no other key: a demo that is led astray to it can't pay there.
        env = self.environment() | {"PAYROC_SANDBOX_API_KEY": self.keys.payroc_api_key}
        self._sandbox = sandbox = self.start(
            "sandbox", "include.sandbox", *arguments, *times, env=env, death_signal=signal.SIGTERM
        )
        processes.wait_until(
            lambda: processes.has_ended(sandbox) or self._sandbox_answers(), seconds=_SANDBOX_SECONDS
        )
        if processes.has_ended(sandbox) or not self._sandbox_answers():
            raise DemoError(
                f"The local Payroc did not start. From its log ({self.log('sandbox')}):\n{telling_lines(self.log('sandbox'))}"
            )

    def _sandbox_answers(self) -> bool:
        """Return whether our own local Payroc answers: another server may have taken its port a moment ago."""
        with suppress(urllib.error.URLError, OSError, ValueError, LookupError, TypeError):
            return (
                self._sandbox is not None and self.sandbox_get("/_sandbox/health")["pid"] == self._sandbox.pid
            )
        return False

    def _close_interrupted_runs(self) -> None:
        """
        Mark what an interrupted command left running as failed: nobody works on it any more.

        The refunds do not need it, the ledger knows them; but an open run would be taken up by the next scheduler, and would keep a
        new one waiting.
        """
        with self.postgres.connect(AIRFLOW_DATABASE) as connection:
            connection.execute(
                "UPDATE task_instance SET state = 'failed', end_date = now() "
                "FROM dag_run WHERE dag_run.dag_id = task_instance.dag_id AND dag_run.run_id = task_instance.run_id "
                "AND dag_run.state IN ('queued', 'running') "
                "AND task_instance.state NOT IN ('success', 'failed', 'skipped', 'upstream_failed', 'removed')"
            )
            connection.execute(
                "UPDATE dag_run SET state = 'failed', end_date = now() WHERE state IN ('queued', 'running')"
            )

    def _let_runs_pass(self) -> None:
        """Take the thresholds of `make up` away: in `make demo` nobody could be asked to approve a run."""
        for limit in ("approval_total", "approval_count"):
            if self.limit(limit) is not None:
                self.run(
                    "limit",
                    "include.refunds",
                    "limit",
                    limit,
                    "none",
                    "--reason",
                    "Only `make up` asks.",
                    "--by",
                    "make up",
                )


def telling_lines(log: Path) -> str:
    """Return what a log says went wrong: the last errors that it reports as such, else its end."""
    with suppress(FileNotFoundError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\[(error|critical) *\]", line)]
        return "\n".join(map(visible, errors[-4:] or lines[-15:]))
    return "(it is empty)"


def _listener(port: int) -> str:
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr[1] == port
                and connection.pid
            ):
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "another program"
