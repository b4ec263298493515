"""What the daily summary needs of Airflow: since when it tells, how runs ended, and where it is kept."""

from __future__ import annotations

import os
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from airflow.sdk import ObjectStoragePath
from airflow.sdk.exceptions import AirflowRuntimeError
from airflow.sdk.timezone import coerce_datetime

if TYPE_CHECKING:
    from collections.abc import Callable

    from include.refunds.settings import Settings
    from include.refunds.summary import Run

# A summary never tells more than that; nor does one that comes seldomer.
_LONGEST = timedelta(days=7)


def tells_since(settings: Settings, now: datetime) -> datetime:
    """
    Return since when a summary tells: since the last one that was due on an earlier day, so that one made again tells the same.

    :param now: the moment at which it is made.
    """
    today = datetime.combine(now.astimezone(ZoneInfo(settings.timezone)).date(), time(), ZoneInfo(settings.timezone))
    if not settings.summary_schedule:
        return now - timedelta(days=1)
    # The scheduler's own reckoning, of daylight saving and @daily too.
    from airflow.timetables.base import TimeRestriction
    from airflow.timetables.trigger import CronTriggerTimetable

    timetable = CronTriggerTimetable(settings.summary_schedule, timezone=settings.timezone)
    last, following = today - _LONGEST, today - _LONGEST
    while True:
        restriction = TimeRestriction(earliest=coerce_datetime(following), latest=None, catchup=True)
        due = timetable.next_dagrun_info(last_automated_data_interval=None, restriction=restriction)
        if due is None or due.run_after >= today:
            return last
        last, following = due.run_after, due.run_after + timedelta(seconds=1)


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


def kept_as(settings: Settings, name: str) -> ObjectStoragePath:
    """
    Return where a summary is kept; its folder exists afterwards.

    :param name: of the file.
    """
    home = Path(os.environ.get("AIRFLOW_HOME") or Path.home() / "airflow")
    folder = ObjectStoragePath(settings.summary_folder or f"file://{home / 'summaries'}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
