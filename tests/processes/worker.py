"""
What a worker process does: one try of a send task, with the real operator, ledger, hook and retry policy.

The process is forked from one that has imported Airflow already, so nothing here may import the tests' own setting.
"""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Imported here, in the process that workers are forked from, and not in each worker at its first use.
import airflow.sdk.execution_time.supervisor  # noqa: F401
import asyncpg  # noqa: F401
import psycopg  # noqa: F401
from airflow.sdk.definitions.retry_policy import RetryAction
from airflow.sdk.exceptions import AirflowFailException

from payroc_airflow.operators.refund import PayrocRefundOperator


@dataclass(frozen=True)
class Try:
    """
    One try of a send task; ``refund_attempts`` names an attempt by it.

    :param number: Airflow's try number, from 1.
    """

    run_id: str
    map_index: int
    refund_ids: tuple[int, ...]
    number: int = 1


@dataclass(frozen=True)
class Ending:
    """
    How a try ended, as the worker itself told it.

    :param outcome: ``success``, or the name of what was raised.
    :param retried: whether Airflow would try again; its own limit of tries not counted.
    :param delay: seconds that the retry policy asks to wait, ``None`` for the task's own delay.
    :param peak_mb: the most memory that the process ever held.
    """

    outcome: str
    message: str = ""
    retried: bool = False
    delay: float | None = None
    peak_mb: float = 0.0


def work(
    environment: dict[str, str], this: Try, answer: Connection, log: Path, dies_unreported: bool
) -> None:
    """Do one try and report how it ended. A worker that is killed reports nothing."""
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    outcome, message, retried, delay = _send(this)
    if dies_unreported:
        os.kill(os.getpid(), signal.SIGKILL)
    answer.send(
        Ending(outcome, message, retried, delay, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    )


def _send(this: Try) -> tuple[str, str, bool, float | None]:
    ti = SimpleNamespace(
        dag_id="payroc_refunds", run_id=this.run_id, map_index=this.map_index, try_number=this.number
    )
    context: Any = {"ti": ti, "run_id": this.run_id}
    operator = PayrocRefundOperator(task_id="send_refund", refund_ids=list(this.refund_ids))
    try:
        operator.execute(context)
    except AirflowFailException as error:
        # Airflow asks no policy about these.
        return type(error).__name__, str(error), False, None
    except Exception as error:  # noqa: BLE001 - as Airflow does
        policy: Any = operator.retry_policy
        decision = policy.evaluate(error, this.number, 5, context)
        delay: timedelta | None = decision.retry_delay
        return (
            type(error).__name__,
            str(error),
            decision.action is not RetryAction.FAIL,
            delay.total_seconds() if delay else None,
        )
    return "success", "", False, None
