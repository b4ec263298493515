"""A whole Airflow of the tests' own: API server, scheduler with LocalExecutor and DAG processor as processes, beside a local Payroc."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from sqlalchemy import URL

from demo import processes
from demo.environment import environment
from demo.postgres import HOST, PostgresServer, free_port
from demo.stack import POOL, telling_lines
from demo.state import Keys, State
from tests.conftest import ROOT, Sandbox
from tests.patience import eventually
from tests.scheduler.client import AirflowClient, TaskInstance

# Who may do what: the first one drives Airflow in the tests.
USERS = {"olivia": "op", "frank": "user", "eve": "user"}

DAG = "payroc_refunds"
# The same DAG, but with runs that may overlap.
OVERLAPPING_DAG = "payroc_refunds_overlapping"
# The same DAG, but approvers are named, and Eve is none.
NAMED_DAG = "payroc_refunds_named"
# The same DAG, but approval is waited for as short as that.
IMPATIENT_DAG = "payroc_refunds_impatient"
ANSWER_SECONDS = 4
# What is replaced in the DAG's code to make them.
_COPIES = {
    OVERLAPPING_DAG: ("max_active_runs=1", "max_active_runs=4"),
    NAMED_DAG: ("approvers=settings.approvers", 'approvers=("olivia", "frank")'),
    IMPATIENT_DAG: ("hours=settings.approval_timeout_hours", f"seconds={ANSWER_SECONDS}"),
}

# A token's life and the margin make the lease: the time for which a refund waits whose worker was killed.
TOKEN_SECONDS = 30
# Shorter than the lease, so that the test of an orphan loses no time by it. On a busy machine a supervisor
# that lives may be late.
HEARTBEAT_TIMEOUT_SECONDS = 20
UNKNOWN_WAIT_SECONDS = 4
# What the local Payroc asks for with a 429: longer than the wait for an unknown outcome, so that the two can be told apart, and so much
# shorter than a token's life that a task which waits for its turn so long still has one that Payroc takes.
RETRY_AFTER_SECONDS = 8

# As many as there are slots: a task that hangs must not keep another from starting.
_SLOTS = 8

_SETTINGS = {
    "PAYROC_REFUNDS_UNKNOWN_WAIT_SECONDS": str(UNKNOWN_WAIT_SECONDS),
    # Long enough to find and kill a process while its POST is on the way, and for an answer of the local Payroc, on a busy machine.
    "PAYROC_REFUNDS_HTTP_TIMEOUT_SECONDS": "5",
    "PAYROC_REFUNDS_LEASE_MARGIN_SECONDS": "15",
    # A shared token of so short a life may end between a task's look at it and its POST, which Payroc would answer with 401.
    "PAYROC_REFUNDS_TOKEN_CACHE": "false",
    # Shorter than every wait that is measured, so that nothing but the retry policy can have made that wait.
    "PAYROC_REFUNDS_RETRY_DELAY_SECONDS": "2",
    "PAYROC_REFUNDS_RETRIES": "6",
    # No test lives to see it, but tasks reckon with it.
    "PAYROC_REFUNDS_SCHEDULE": "0 0 29 2 *",
    "AIRFLOW__CORE__PARALLELISM": str(_SLOTS),
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{name}:{role}" for name, role in USERS.items()),
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
    # A supervisor that was killed is noticed while its orphaned task is still at work.
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": str(HEARTBEAT_TIMEOUT_SECONDS),
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "1",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
    # How often it looks for questions that nobody answered in time.
    "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "1",
    "AIRFLOW__API__HOST": HOST,
    "AIRFLOW__API__WORKERS": "1",
}
# The scheduler imports what its tasks need before it forks them, which spares each task half a second.
_IMPORTED_ONCE = """
import airflow.providers.postgres.hooks.postgres
import asyncpg
import psycopg
"""
_COMPONENTS = {
    "api-server": ["api-server"],
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
}


class Deployment:
    """
    A running Airflow.

    :param folder: where its home and its logs are.
    :param ledger: the ledger's database, migrated.
    :param source: the database in which refunds are approved.
    :param sandbox: the local Payroc that it pays through.
    :param client: its REST API.
    """

    def __init__(
        self, folder: Path, postgres: PostgresServer, ledger: URL, source: URL, sandbox: Sandbox
    ) -> None:
        self.folder = folder
        self.postgres = postgres
        self.ledger = ledger
        self.source = source
        self.sandbox = sandbox
        port = free_port()
        address = f"http://{HOST}:{port}"
        passwords = {user: secrets.token_urlsafe(9) for user in USERS}
        self.client = AirflowClient(address, passwords, next(iter(USERS)))
        self.metadata_database = f"airflow_of_{folder.name}"
        postgres.create_database(self.metadata_database)
        state = State(folder)
        for private in (state.airflow, state.logs):
            private.mkdir(parents=True)
        (state.airflow / "passwords.json").write_text(json.dumps(passwords))
        (state.airflow / "config").mkdir()
        (state.airflow / "config" / "airflow_local_settings.py").write_text(_IMPORTED_ONCE)
        self._logs = state.logs
        self._env = environment(
            state,
            Keys.draw(),
            airflow=postgres.url(self.metadata_database),
            ledger=ledger,
            source=source,
            sandbox=sandbox.url,
        ) | {
            **_SETTINGS,
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(state.airflow / "passwords.json"),
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__API__BASE_URL": address,
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
            "AIRFLOW__CORE__DAGS_FOLDER": str(_dags_folder(folder)),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start everything and wait until it is ready."""
        migration = self._start("db", "db", "migrate")
        eventually(lambda: processes.has_ended(migration), "`airflow db migrate` has ended")
        assert migration.returncode == 0, telling_lines(self._logs / "db.log")
        for name in _COMPONENTS:
            self._processes[name] = self._start(name, *_COMPONENTS[name])
        self._wait_for(lambda: self.client.is_ready(DAG, *_COPIES))
        self.client.create_pool(POOL, _SLOTS)

    def stop(self) -> None:
        """End everything, orphaned tasks included."""
        self.client.close()
        for name in ("scheduler", "dag-processor", "api-server"):
            if name in self._processes:
                # Nothing of it is needed any more, and its polite end takes seconds.
                processes.stop(self._processes[name], first=signal.SIGKILL)
        processes.end_all(processes.orphans(str(self.folder)), first=signal.SIGKILL)

    def stop_api_server(self, number: signal.Signals) -> None:
        """End the API server by a signal."""
        processes.stop(self._processes["api-server"], first=number)

    def start_api_server(self) -> None:
        """Start the API server again, and wait until it answers."""
        self._processes["api-server"] = self._start("api-server", *_COMPONENTS["api-server"])
        self._wait_for(self.client.answers)

    def task_instance(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> TaskInstance:
        """Return a task instance as Airflow's database has it; the API of a busy machine takes longer."""
        query = """
            SELECT id::text, task_id, map_index, state, try_number, pid FROM task_instance
            WHERE (dag_id, run_id, task_id, map_index) = (%s, %s, %s, %s)"""
        with self.postgres.connect(self.metadata_database) as metadata:
            row = metadata.execute(query, [dag_id, run_id, task_id, map_index]).fetchone()
        assert row is not None, f"{dag_id} {run_id} has no {task_id} {map_index}"
        return TaskInstance(*row)

    def retry_delays(self, dag_id: str, run_id: str, task_id: str, map_index: int) -> list[float | None]:
        """Return the seconds that the retry policy asked Airflow to wait after each failed try."""
        query = """
            SELECT retry_delay_override FROM task_instance_history
            WHERE (dag_id, run_id, task_id, map_index) = (%s, %s, %s, %s) ORDER BY try_number"""
        with self.postgres.connect(self.metadata_database) as metadata:
            rows = metadata.execute(query, [dag_id, run_id, task_id, map_index]).fetchall()
        return [delay for (delay,) in rows]

    def task_process(self, ti: TaskInstance) -> psutil.Process:
        """Return the process that runs a task."""
        process = psutil.Process(ti.pid)
        assert _works_for(process, ti), f"process {ti.pid} is not the one of {ti}: {process.cmdline()}"
        return process

    def supervisor(self, ti: TaskInstance) -> psutil.Process:
        """Return the process that supervises a task: a worker of the executor, forked from the scheduler."""
        supervisor = self.task_process(ti).parent()
        assert supervisor is not None
        assert supervisor.ppid() == self._processes["scheduler"].pid, (
            f"{supervisor} is no worker of the executor"
        )
        assert _works_for(supervisor, ti), f"{supervisor.cmdline()} does not supervise {ti}"
        return supervisor

    def knows_the_end_of(self, ti: TaskInstance) -> bool:
        """
        Tell whether the scheduler knows that the process of a task has ended.

        Airflow loses an answer that comes sooner: https://github.com/apache/airflow/issues/67287.
        """
        log = (self._logs / "scheduler.log").read_text(errors="replace")
        return re.search(rf"TaskInstance Finished: .*\bti_id={ti.id}\b", log) is not None

    def task_processes(self) -> list[psutil.Process]:
        """Return all processes that run a task, orphans included: they stay in the scheduler's session."""
        scheduler = self._processes["scheduler"].pid
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                title = " ".join(process.cmdline())
                if (
                    os.getsid(process.pid) == scheduler
                    and title.startswith("airflow worker -- ")
                    and "LocalExecutor" not in title
                ):
                    found.append(process)
        return found

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        return processes.start(
            [sys.executable, "-m", "airflow", *command],
            env=self._env,
            log=self._logs / f"{name}.log",
            cwd=self.folder,
        )

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        def ended() -> list[str]:
            return [name for name, process in self._processes.items() if processes.has_ended(process)]

        eventually(lambda: condition() or bool(ended()), "Airflow is ready", pause=0.2)
        assert not ended(), f"{ended()} ended by itself: {telling_lines(self._logs / f'{ended()[0]}.log')}"


def _works_for(process: psutil.Process, ti: TaskInstance) -> bool:
    try:
        title = (process.cmdline() or [""])[0]
    except psutil.NoSuchProcess:
        # It has ended a moment ago.
        return False
    # The end of the title is missing when the space for it is too short.
    shown = title.split(" ")[-1]
    return len(shown) > 24 and ti.id.startswith(shown)


def _dags_folder(folder: Path) -> Path:
    """Make a DAG folder with the DAG as it is, and its copies."""
    dags = folder / "dags"
    dags.mkdir(parents=True)
    original = (ROOT / "dags" / f"{DAG}.py").read_text()
    (dags / f"{DAG}.py").write_text(original)
    for dag_id, replaced in _COPIES.items():
        code = original
        for old, new in ((f'    "{DAG}",\n', f'    "{dag_id}",\n'), replaced):
            assert code.count(old) == 1, f"the DAG has no single {old!r} to replace any more"
            code = code.replace(old, new)
        (dags / f"{dag_id}.py").write_text(code)
    return dags
