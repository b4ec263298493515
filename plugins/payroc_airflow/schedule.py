"""When a schedule is due, by the scheduler's own reckoning: of daylight saving and ``@daily`` too."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

from airflow.sdk import CronTriggerTimetable
from airflow.sdk.timezone import coerce_datetime
from croniter import croniter  # type: ignore[import-untyped]  # it comes without types

from include.refunds.settings import ENV_PREFIX, Settings, SettingsError


def timetable(
    settings: Settings, name: Literal["schedule", "followup_schedule", "summary_schedule"]
) -> CronTriggerTimetable | None:
    """
    Return the timetable of a DAG that, unpaused for the first time, waits for the next time; ``None`` for no schedule.

    :param settings: the settings, with the time zone of all schedules.
    :param name: the setting: a cron expression or one of Airflow's presets; empty for none.
    :raises SettingsError: when it is neither, or never due.
    """
    if not (schedule := getattr(settings, name)):
        return None
    # A timedelta of nothing: ``False`` still runs a time that was due within the last tenth of the interval.
    found = CronTriggerTimetable(schedule, timezone=settings.timezone, run_immediately=timedelta())
    try:
        # What Airflow does with it, but in the DAG file, whose import error says it; the scheduler has only a log.
        croniter(found.expression).get_next()
    except Exception:  # noqa: BLE001 - on odd expressions croniter fails in ways of its own
        raise SettingsError(
            f"{ENV_PREFIX}{name.upper()} is not usable; give a cron expression such as 0 7 * * 1-5, or leave it "
            "empty for manual runs only."
        ) from None
    return found


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
