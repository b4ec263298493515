"""When a schedule is due, by the scheduler's own reckoning: of daylight saving and ``@daily`` too."""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.sdk import CronTriggerTimetable
from airflow.sdk.timezone import coerce_datetime


def timetable(schedule: str, timezone: str) -> CronTriggerTimetable | None:
    """
    Return the timetable of a DAG that, unpaused for the first time, waits for the next time; ``None`` for no schedule.

    :param schedule: a cron expression or one of Airflow's presets; empty for none.
    :param timezone: the IANA time zone in which it is meant.
    """
    # A timedelta of nothing: ``False`` still runs a time that was due within the last tenth of the interval.
    return (
        CronTriggerTimetable(schedule, timezone=timezone, run_immediately=timedelta()) if schedule else None
    )


def next_due(schedule: str, timezone: str, instant: datetime) -> datetime | None:
    """
    Return when a schedule is due from an instant on, that instant included; ``None`` for never.

    :param schedule: a cron expression or one of Airflow's presets.
    :param timezone: the IANA time zone in which it is meant.
    """
    # Only who asks pays for the import.
    from airflow.timetables import trigger
    from airflow.timetables.base import TimeRestriction

    restriction = TimeRestriction(earliest=coerce_datetime(instant), latest=None, catchup=True)
    due = trigger.CronTriggerTimetable(schedule, timezone=timezone).next_dagrun_info(
        last_automated_data_interval=None, restriction=restriction
    )
    return due.run_after if due is not None else None
