"""What the daily summary needs of Airflow: since when it tells, how runs ended, and where it is kept."""

from __future__ import annotations

import os
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from airflow.sdk import ObjectStoragePath
from airflow.sdk.exceptions import AirflowException, AirflowRuntimeError

from payroc_airflow.schedule import next_due

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow.sdk import Context

    from include.refunds.settings import Settings
    from include.refunds.summary import Run

# Without one before, a summary never tells more than that; nor does one that comes seldomer.
_LONGEST = timedelta(days=7)


class SummaryNotWritten(AirflowException):
    """The file of a summary can't be written; the message says what to do."""


def tells_since(settings: Settings, now: datetime, before: dict[str, Any] | None) -> datetime:
    """
    Return since when a summary tells: since the last one of an earlier day, so that one made again tells the same.

    :param now: the moment at which it is made.
    :param before: what the summary before this one returned, with ``since`` and ``until``; ``None`` when there is none. Then it is since
        the last one that was due on an earlier day.
    """
    if before is None or "until" not in before:
        return _was_due(settings, now)
    since, until = (datetime.fromisoformat(before[name]) for name in ("since", "until"))
    zone = ZoneInfo(settings.timezone)
    return since if until.astimezone(zone).date() == now.astimezone(zone).date() else until


def made_before(context: Context) -> dict[str, Any] | None:
    """Return what the successful summary before this one returned. A run without a logical date knows of none."""
    ti: Any = context["ti"]
    before = ti.get_previous_dagrun(state="success")
    found = ti.xcom_pull(run_id=before.run_id, task_ids=ti.task_id) if before is not None else None
    return found if isinstance(found, dict) else None


def _was_due(settings: Settings, now: datetime) -> datetime:
    today = datetime.combine(
        now.astimezone(ZoneInfo(settings.timezone)).date(), time(), ZoneInfo(settings.timezone)
    )
    if not settings.summary_schedule:
        return now - timedelta(days=1)
    last = following = today - _LONGEST
    while True:
        due = next_due(settings.summary_schedule, settings.timezone, following)
        if due is None or due >= today:
            return last
        last, following = due, due + timedelta(seconds=1)


def ended_as(run: Run, state_of: Callable[[str, str], str], dag_id: str) -> str:
    """
    Return Airflow's word for how a run ended, empty when Airflow does not have the run any more.

    :param state_of: the method ``get_dagrun_state`` of a task instance.
    """
    try:
        state = state_of(dag_id, run.run_id)
    except AirflowRuntimeError:
        return ""
    # `airflow dags test` gives an enum.
    return str(getattr(state, "value", state))


def write(settings: Settings, name: str, html: str) -> ObjectStoragePath:
    """
    Keep a summary, in a folder that exists afterwards.

    :param name: of the file.
    :returns: where it is kept.
    :raises SummaryNotWritten: when it can't be written.
    """
    home = Path(os.environ.get("AIRFLOW_HOME") or Path.home() / "airflow")
    try:
        folder = ObjectStoragePath(settings.summary_folder or f"file://{home / 'summaries'}")
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / name
        kept.write_text(html, encoding="utf-8")
    except Exception as error:  # an object storage may raise anything
        raise SummaryNotWritten(
            f"The file {name} can't be written ({type(error).__name__}): see that PAYROC_REFUNDS_SUMMARY_FOLDER is right and lets the "
            "workers write, then clear the task."
        ) from error
    return kept
