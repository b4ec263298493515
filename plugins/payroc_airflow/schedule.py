"""When a schedule is due, by the scheduler's own reckoning: of daylight saving and ``@daily`` too."""

from __future__ import annotations

from datetime import datetime

from airflow.sdk.timezone import coerce_datetime


def next_due(schedule: str, timezone: str, instant: datetime) -> datetime | None:
    """
    Return when a schedule is due from an instant on, that instant included; ``None`` for never.

    :param schedule: a cron expression or one of Airflow's presets.
    :param timezone: the IANA time zone in which it is meant.
    """
    # Only who asks pays for the import.
    from airflow.timetables.base import TimeRestriction
    from airflow.timetables.trigger import CronTriggerTimetable

    restriction = TimeRestriction(earliest=coerce_datetime(instant), latest=None, catchup=True)
    due = CronTriggerTimetable(schedule, timezone=timezone).next_dagrun_info(last_automated_data_interval=None, restriction=restriction)
    return due.run_after if due is not None else None
