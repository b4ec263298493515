"""What a task can tell about the run that it belongs to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow.sdk import Context

    from include.refunds.params import RunParams


def run_params(context: Context) -> RunParams:
    """
    Return the run's params, checked.

    :raises ParamsError: when a name is unknown or a value unusable.
    """
    from include.refunds.params import (
        RunParams,
    )  # what only asks where it runs, such as our plugin, need not load the ledger

    return RunParams.check(dict(context["params"]), context["dag_run"].conf)


def in_dag_test() -> bool:
    """Return whether the task runs under ``airflow dags test``, where there is no scheduler and perhaps no API server."""
    from airflow.sdk.execution_time import task_runner

    return type(getattr(task_runner, "SUPERVISOR_COMMS", None)).__name__ == "InProcessSupervisorComms"


def outside_of_tasks() -> None:
    """Let a command read connections from Airflow's own database, which Airflow allows only what it takes for a process of its own."""
    os.environ.setdefault("_AIRFLOW_PROCESS_CONTEXT", "server")
