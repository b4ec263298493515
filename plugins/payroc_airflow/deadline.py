"""The deadline of a run: people are told of a run that has not ended by then."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

from airflow.sdk import DeadlineAlert, DeadlineReference, SyncCallback  # type: ignore[attr-defined]  # the stub lacks them

from payroc_airflow.notify import DeadlineMissed


def deadline_after(interval: timedelta) -> Any:
    """
    Return the deadline for a DAG, ``None`` for an interval of nothing.

    It counts from the logical date, when a scheduled run is due; a run that is triggered without one has no deadline. The moment of the
    queueing is no choice: no run with a deadline of that kind can be cleared (https://github.com/apache/airflow/issues/70368).

    The callback runs on the executor, as tasks do: so it needs no triggerer, and takes any notifier.

    :param interval: the time in which a run has to end.
    """
    # There a run with a deadline ends in an error (https://github.com/apache/airflow/issues/73428), and nobody has to be told.
    if not interval or sys.argv[1:3] == ["dags", "test"]:
        return None
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_LOGICAL_DATE,
        interval=interval,
        callback=SyncCallback(DeadlineMissed),
    )
