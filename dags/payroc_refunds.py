"""
### Pays approved refunds through Payroc

`pull_approved` reads the approved refunds from the connection **refunds_source** into the ledger, `approve_run` makes sure
that they may go, `release` lets them through the one gate, `send_refund` sends each to Payroc under its own idempotency key,
`write_back` tells the source what became of them, and `report` shows it all and fails when something needs people.

A run that passes a threshold of the ledger waits at `approve_run` until a person who did not trigger it approves it under
**Required Actions**.

Nothing that Airflow does sends a refund twice: retries, clears and overlapping runs are harmless, because the ledger
(connection **refunds_ledger**) decides. A refund that a run did not finish is taken up by the next one.

A manual run takes the params below. Start with **dry_run** to see what would be sent.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Param, TriggerRule, conf, get_current_context, get_parsing_context, result, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

# What only one task needs is imported in it: this file is parsed over and over.
from include.refunds.settings import get_settings
from payroc_airflow.assets import RUN, has_finished
from payroc_airflow.databases import open_ledger, source_of
from payroc_airflow.deadline import deadline_after
from payroc_airflow.keys import cipher_of
from payroc_airflow.notify import REPORT, RunEnded, mistakes
from payroc_airflow.operators.approval import ApproveRunOperator
from payroc_airflow.operators.refund import PayrocRefundOperator
from payroc_airflow.pools import POOL, pool_exists
from payroc_airflow.retry_policy import PayrocRetryPolicy
from payroc_airflow.schedule import timetable
from payroc_airflow.task_context import run_params

log = logging.getLogger(__name__)
settings = get_settings()

# Not backfills: they would run for days that have passed, and refunds know no such days. Airflow converts the words.
RUN_TYPES: Any = ["scheduled", "manual"]

PARAMS = {
    "dry_run": Param(
        False,
        type="boolean",
        title="Dry run",
        description="Show in the report what would be sent. Nothing is stored, sent or written back.",
    ),
    "limit": Param(
        100_000,
        type="integer",
        minimum=1,
        maximum=100_000,
        title="Limit",
        description="Release at most so many refunds, oldest approval first.",
    ),
    "source_refs": Param(
        [],
        type=["array", "null"],
        items={"type": "string"},
        title="Only these source_refs",
        description="One per line, as they stand in the source. Empty means all. What matches nothing is in the report.",
    ),
    "processing_terminal_id": Param(
        None,
        type=["string", "null"],
        minLength=4,
        maxLength=50,
        title="Only this processing terminal",
        description="Payroc's terminal id. Empty means all.",
    ),
    "approved_before": Param(
        None,
        type=["string", "null"],
        format="date-time",
        title="Approved before",
        description="Only refunds that were approved before this date and time, with its time zone.",
    ),
    "batch_size": Param(
        None,
        type=["integer", "null"],
        minimum=1,
        title="Refunds per task",
        description="Empty means one refund per task, so that each has its own row in the grid. Set 100 or more for large runs.",
    ),
}


with DAG(
    "payroc_refunds",
    description="Pays approved refunds through Payroc, each once",
    doc_md=__doc__,
    schedule=timetable(settings, "schedule"),
    # No start_date: with one, a DAG that is unpaused for the first time would at once run the time that was due last.
    catchup=False,
    max_active_runs=1,
    allowed_run_types=RUN_TYPES,
    # Each task's process parses this file and checks the params, which is a tenth of what one refund costs; this task has none.
    params={} if get_parsing_context().task_id == "send_refund" else PARAMS,
    deadline=deadline_after(timedelta(hours=settings.deadline_hours)),
    default_args={
        "retries": settings.retries,
        "retry_delay": timedelta(seconds=settings.retry_delay_seconds),
        "retry_policy": PayrocRetryPolicy(),
        # A database or an API that hangs must not block the next run for ever.
        "execution_timeout": timedelta(hours=1),
    },
    tags=["payroc", "refunds"],
) as dag:

    @task
    async def pull_approved() -> dict[str, list[int]]:
        """Store new refunds from the source, and hand on the ids of what this run is about."""
        from include.refunds.pull import pull
        from include.refunds.unmatched import unmatched
        from payroc_airflow.hooks.payroc import PayrocHook
        from payroc_airflow.refund_metrics import report_oldest

        context = get_current_context()
        params = run_params(context)
        if pool_exists(POOL) is False:
            raise AirflowFailException(
                f'The pool {POOL} does not exist, so send_refund would wait for ever: run `airflow pools set {POOL} 4 "Payroc"`.'
            )
        if params.dry_run:
            return {"candidates": [], "due": []}
        source, cipher = source_of(), cipher_of(settings)
        async with open_ledger(context, settings) as ledger:
            # Before anything is stored: keys derive from the source's name.
            await ledger.bindings.check_environment(PayrocHook().api_url)
            await ledger.runs.return_stale_releases()
            pulled = await pull(source, ledger, cipher, settings)
            candidates = await ledger.runs.candidates(params.selection(), standing=pulled.standing)
            findings = {
                "changed": pulled.changed,
                "withdrawn": pulled.withdrawn,
                "warnings": pulled.warnings,
                "written_again": pulled.written_again,
                "still_offered": pulled.still_offered,
                "unmatched": await unmatched(params, pulled, candidates, ledger.intake),
            }
            await ledger.runs.begin_run(
                context["run_id"], params.model_dump(mode="json"), candidates, findings, pulled.at
            )
            await report_oldest(ledger.engine, settings.source)
            log.info("%s %d refunds may be released.", pulled, len(candidates))
            return {"candidates": [item.id for item in candidates], "due": await ledger.runs.due()}

    @task
    async def release(pulled: dict[str, list[int]]) -> list[list[int]]:
        """Let the refunds through the one gate, and hand on their ids in the lists that the send tasks take."""
        from include.refunds.params import in_lists
        from include.refunds.release import release
        from payroc_airflow.gateway import HookGateway
        from payroc_airflow.hooks.payroc import PayrocHook

        context = get_current_context()
        params = run_params(context)
        if params.dry_run:
            return []
        source, cipher = source_of(), cipher_of(settings)
        async with open_ledger(context, settings) as ledger, HookGateway(PayrocHook()) as gateway:
            ids = await release(
                context["run_id"],
                pulled["candidates"],
                pulled["due"],
                source=source,
                ledger=ledger,
                gateway=gateway,
                cipher=cipher,
                settings=settings,
            )
        return in_lists(ids, params.batch_size, conf.getint("core", "max_map_length"))

    @task(trigger_rule=TriggerRule.ALL_DONE)
    async def write_back() -> dict[str, int]:
        """
        Write the outcomes of refunds back to the source, and hand on how many rows were written.

        Refused rows are noted, and `report` names them and fails: trying them again here changes nothing.
        """
        from include.refunds.write_back import write_back

        context = get_current_context()
        if run_params(context).dry_run:
            raise AirflowSkipException("A dry run writes nothing back.")
        source = source_of()
        async with open_ledger(context, settings) as ledger:
            done = await write_back(source, ledger.write_backs)
            if done.doubled:
                await ledger.runs.note(context["run_id"], {"doubled": done.doubled})
        log.info("%s", "\n".join(done.sentences()))
        done.raise_trouble()
        return done.as_dict()

    @result
    @task(
        trigger_rule=TriggerRule.ALL_DONE,
        outlets=[RUN],
        on_failure_callback=RunEnded(failed=True),
        on_success_callback=RunEnded(failed=False),
        # The table above it says it better.
        show_return_value_in_logs=False,
    )
    async def report() -> dict[str, Any]:
        """Show what the run did; fail when something needs people. The totals are the result of the run."""
        from include.refunds.rehearse import rehearse
        from include.refunds.report import run_report
        from payroc_airflow.hooks.payroc import PayrocHook

        context = get_current_context()
        params = run_params(context)
        async with open_ledger(context, settings) as ledger:
            if params.dry_run:
                await ledger.bindings.check_environment(PayrocHook().api_url)
                found = await rehearse(params, source_of(), ledger, cipher_of(settings), settings)
            else:
                await ledger.runs.finish_run(context["run_id"])
                unsealed = await ledger.seals.seal_or_say()
                found = await run_report(ledger.engine, settings.source, context["run_id"])
                found.notes += unsealed
                # The run's state is this task's. A run that was cleared has left a row behind, whatever failed this time.
                failed = [
                    name
                    for name in ("pull_approved", "release", "write_back")
                    if context["ti"].xcom_pull(task_ids=name) is None
                ]
                # Without a pull there is no release, and a rejection skips it; the write-back always runs.
                if "release" in failed and ("pull_approved" in failed or found.rejected):
                    failed.remove("release")
                found.unfinished += [f"{name} did not finish, its log says why." for name in failed]
        found.notes += mistakes()
        context[REPORT] = found  # type: ignore[literal-required]
        log.info("%s", found)
        if found.unfinished:
            raise AirflowFailException(" ".join(found.unfinished))
        if not params.dry_run:
            has_finished(RUN, context, found)
        return found.as_dict()

    pulled = pull_approved()
    # A rejection skips its direct children, whatever their rule: nothing that has to run may be one.
    approve_run = ApproveRunOperator(
        task_id="approve_run",
        approvers=settings.approvers,
        response_timeout=timedelta(hours=settings.approval_timeout_hours),
    )
    lists = release(pulled)  # type: ignore[arg-type]  # a task takes the promise of another's result
    send_refund = PayrocRefundOperator.partial(
        task_id="send_refund",
        pool=POOL,
        map_index_template="{{ refund_label }}",
        execution_timeout=timedelta(hours=6),
    ).expand(refund_ids=lists)
    pulled >> approve_run >> lists
    send_refund >> write_back() >> report()
