"""
### Tells once a day what became of refunds

`summary` reads the ledger and writes one HTML file a day: what was accepted, rejected and returned since the last summary, what waits,
the last two weeks and the runs. The notifiers of the setting get the same as a mail. It sends no refund and asks Payroc nothing.
"""

from __future__ import annotations

import dataclasses
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import DAG, get_current_context, result, task

from include.refunds.settings import get_settings
from payroc_airflow.notify import SummaryFailed
from payroc_airflow.schedule import timetable

log = logging.getLogger(__name__)
settings = get_settings()

RUN_TYPES: Any = ["scheduled", "manual"]  # Airflow converts the words.

with DAG(
    "payroc_refunds_summary",
    description="Tells once a day what became of refunds",
    doc_md=__doc__,
    schedule=timetable(settings, "summary_schedule"),
    catchup=False,
    max_active_runs=1,
    allowed_run_types=RUN_TYPES,
    default_args={
        "retries": settings.retries,
        "retry_delay": timedelta(seconds=settings.retry_delay_seconds),
        "execution_timeout": timedelta(minutes=30),
    },
    tags=["payroc", "refunds"],
) as dag:

    @result
    @task(on_failure_callback=SummaryFailed())
    async def summary() -> dict[str, Any]:
        """Write the day's summary, and hand it to the notifiers. Where it was written is the result."""
        # Nothing else in this file needs them, and the processor reads it often.
        from include.refunds.summary import as_message, read_summary
        from payroc_airflow.databases import open_ledger
        from payroc_airflow.links import run_url
        from payroc_airflow.notify import mistakes, tell
        from payroc_airflow.summary import SummaryNotWritten, ended_as, made_before, tells_since, write

        context = get_current_context()
        until = datetime.now(UTC)
        since = tells_since(settings, until, made_before(context))
        async with open_ledger(context, settings) as ledger:
            found = await read_summary(
                ledger.engine, settings.source, since=since, until=until, timezone=settings.timezone
            )
        ti: Any = context["ti"]
        state_of = ti.get_dagrun_state
        found.runs = [
            dataclasses.replace(run, state=ended_as(run, state_of, "payroc_refunds")) for run in found.runs
        ]
        message = as_message(found, url=run_url("payroc_refunds_summary", context["run_id"]))
        try:
            kept = write(settings, f"{found.day:%Y-%m-%d}.html", message.html)
        except SummaryNotWritten:
            # On the last try: without a file, people have the mail at least.
            if ti.try_number > ti.max_tries:
                tell(message, context)
            raise
        log.info("%s\nWritten to %s", message.text, kept)
        tell(message, context)
        told = {"written_to": str(kept), "subject": message.subject, "mistakes": mistakes()}
        # From these the next one knows since when it tells.
        return told | {"since": since.isoformat(), "until": until.isoformat()}

    summary()
