"""
### Follows refunds to their end

Asks Payroc what became of refunds whose outcome is unknown, and follows accepted ones to settled or returned, then writes the
news back to the source. It only reads Payroc, it never sends a refund. `report` fails when something needs people: a refund in
review, a pause, or a refund that takes longer than it should.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, TriggerRule, get_current_context, result, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException

# What only one task needs is imported in it: this file is parsed over and over.
from include.refunds.settings import get_settings
from payroc_airflow.assets import FOLLOWUP_RUN, has_finished
from payroc_airflow.databases import open_ledger, source_of
from payroc_airflow.notify import RunEnded, leave_for_notifier, mistakes
from payroc_airflow.retry_policy import PayrocRetryPolicy
from payroc_airflow.schedule import timetable

log = logging.getLogger(__name__)
settings = get_settings()

# Not backfills: they would run for days that have passed, and refunds know no such days. Airflow converts the words.
RUN_TYPES: Any = ["scheduled", "manual"]

with DAG(
    "payroc_refunds_followup",
    description="Asks Payroc what became of refunds; never sends one",
    doc_md=__doc__,
    schedule=timetable(settings, "followup_schedule"),
    catchup=False,
    max_active_runs=1,
    allowed_run_types=RUN_TYPES,
    default_args={
        "retries": settings.retries,
        "retry_delay": timedelta(seconds=settings.retry_delay_seconds),
        "retry_policy": PayrocRetryPolicy(),
        "execution_timeout": timedelta(hours=1),
    },
    tags=["payroc", "refunds"],
) as dag:

    @task
    async def follow_up() -> dict[str, Any]:
        """Look up the refunds in doubt, and compare Payroc's lists with the ledger."""
        from include.refunds.follow_up import follow_up
        from payroc_airflow.gateway import HookGateway
        from payroc_airflow.hooks.payroc import PayrocHook
        from payroc_airflow.refund_metrics import report_oldest

        async with (
            open_ledger(get_current_context(), settings) as ledger,
            HookGateway(PayrocHook()) as gateway,
        ):
            found = await follow_up(ledger, gateway, settings)
            await report_oldest(ledger.engine, settings.source)
        counts = found.counts
        log.info("%s", ", ".join(f"{count} {what}" for what, count in counts.items()))
        for name in found.not_understood:
            log.warning("At Payroc, not understood: %s", name)
        if failed := counts["failed"] + counts["refused"]:
            raise AirflowException(
                f"{failed} look-ups or lists failed at Payroc; these come again, the others are done."
            )
        return {**counts, "objects": found.not_understood, "lists": found.notes}

    @task(trigger_rule=TriggerRule.ALL_DONE)
    async def write_back() -> dict[str, int]:
        """
        Write the outcomes of refunds back to the source, and hand on how many rows were written.

        Refused rows are noted, and `report` names them and fails: trying them again here changes nothing.
        """
        from include.refunds.write_back import write_back

        source = source_of()
        async with open_ledger(get_current_context(), settings) as ledger:
            done = await write_back(source, ledger.write_backs)
        log.info("%s", "\n".join(done.sentences()))
        done.raise_trouble()
        return done.as_dict()

    @result
    @task(
        trigger_rule=TriggerRule.ALL_DONE,
        outlets=[FOLLOWUP_RUN],
        on_failure_callback=RunEnded(failed=True, following=True),
        show_return_value_in_logs=False,
    )
    async def report() -> dict[str, Any]:
        """Show the whole ledger; fail when a refund is in review or late, sending is paused, or the follow-up itself failed."""
        from include.payroc.errors import objects_named
        from include.refunds.report import follow_up_report

        context = get_current_context()
        async with open_ledger(context, settings) as ledger:
            unsealed = await ledger.seals.seal_or_say()
            found = await follow_up_report(ledger.engine, settings.source)
            found.notes += unsealed
        # The run's state is this task's, so what failed before it has to be told here.
        followed = context["ti"].xcom_pull(task_ids="follow_up")
        if followed is None:
            found.unfinished.append(
                "follow_up failed, its log says why: what became of refunds at Payroc was not asked, or not of all."
            )
        else:
            found.notes += followed["lists"]
            if followed["objects"]:
                objects = objects_named(followed["not understood"], followed["objects"])
                found.notes.append(
                    f"Payroc lists {objects} that can't be understood; look at them in Payroc's portal."
                )
        written_back = context["ti"].xcom_pull(task_ids="write_back")
        if written_back is None:
            found.unfinished.append("write_back did not finish, its log says why.")
        elif doubled := written_back["doubled"]:
            found.notes.append(
                f"The UPDATE of write_back.sql touched several rows for each of {doubled} refunds; "
                "the log of write_back names them."
            )
        found.notes += mistakes()
        leave_for_notifier(found, context)
        log.info("%s", found)
        if found.unfinished:
            raise AirflowFailException(" ".join(found.unfinished))
        has_finished(FOLLOWUP_RUN, context, found)
        return found.as_dict()

    follow_up() >> write_back() >> report()
