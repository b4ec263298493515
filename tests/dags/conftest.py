"""Airflow's own DAG runner over the merchant's world of the ledger's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL

from include.refunds.settings import get_settings
from tests.conftest import ROOT, SCRATCH
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world


def airflow_connection(url: URL) -> str:
    """Return an Airflow connection of a Postgres database, as JSON."""
    fields = {
        "conn_type": "postgres",
        "host": url.host,
        "port": url.port,
        "login": url.username,
        "password": url.password,
    }
    return json.dumps(fields | {"schema": url.database})


@dataclass(frozen=True)
class Run:
    """
    A finished DAG run.

    :param state: state of the run.
    :param tasks: state by task id, and by task id and label for mapped tasks.
    :param log: what the run printed.
    :param result: what the run's last task returned.
    """

    run_id: str
    state: str
    tasks: dict[str, str]
    log: str
    result: Any


Runner = Callable[..., Run]


@pytest.fixture
def run_dag(
    world: World,
    ledger_url: URL,
    source_url: URL,
    airflow_database: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Runner:
    """Return a function that runs a DAG to its end through Airflow's runner, with its params."""
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", airflow_connection(ledger_url))
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_SOURCE", airflow_connection(source_url))
    for name, value in {"UNKNOWN_WAIT": "1", "RETRY_DELAY": "1"}.items():
        monkeypatch.setenv(f"PAYROC_REFUNDS_{name}_SECONDS", value)
    monkeypatch.setenv("PAYROC_REFUNDS_RETRIES", "2")
    monkeypatch.setenv("PAYROC_REFUNDS_TOKEN_CACHE", "false")
    # Airflow's runner fails at the end of a run with a deadline, see payroc_airflow.deadline.
    monkeypatch.setenv("PAYROC_REFUNDS_DEADLINE_HOURS", "0")

    def run(dag_id: str = "payroc_refunds", last_task: str = "report", **params: Any) -> Run:
        from airflow.dag_processing.dagbag import DagBag

        get_settings.cache_clear()
        dag = DagBag(dag_folder=str(ROOT / "dags" / f"{dag_id}.py")).dags[dag_id]
        capfd.readouterr()
        caplog.clear()
        caplog.set_level("INFO")
        dag_run = dag.test(run_conf=params)
        captured = capfd.readouterr()
        instances = dag_run.get_task_instances()
        tasks = {
            ti.task_id if ti.map_index < 0 else f"{ti.task_id} {ti.rendered_map_index}": str(ti.state)
            for ti in instances
        }
        last = next(ti for ti in instances if ti.task_id == last_task)
        return Run(
            dag_run.run_id,
            str(dag_run.state),
            tasks,
            captured.out + captured.err + caplog.text,
            last.xcom_pull(task_ids=last_task),
        )

    return run


def everything_that_airflow_kept() -> bytes:
    """Return Airflow's whole metadata database and all its logs."""
    files = [SCRATCH / "airflow.db", *SCRATCH.glob("airflow.db-*"), *(SCRATCH / "airflow").rglob("*")]
    return b"\n".join(Path(file).read_bytes() for file in files if file.is_file())
