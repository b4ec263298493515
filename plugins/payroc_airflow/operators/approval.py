"""The operator that asks a person whether a run's refunds may be released."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk.timezone import utcnow

from include.refunds.printable import printable
from payroc_airflow.databases import LEDGER_CONN_ID, open_ledger
from payroc_airflow.exceptions import RunNotApproved
from payroc_airflow.notify import QUESTION, ApprovalNeeded
from payroc_airflow.retry_policy import PayrocRetryPolicy
from payroc_airflow.schedule import next_due
from payroc_airflow.task_context import in_dag_test, run_params

if TYPE_CHECKING:
    from airflow.sdk import Context

    from include.refunds.approval import Question
    from include.refunds.settings import Settings

# A question ends this long before the next run is due, which would otherwise wait until this one has ended.
MARGIN = timedelta(minutes=2)
# A run that is triggered just before the next one is due may be answered for this long all the same; the next one starts a little later.
SHORTEST = timedelta(minutes=5)


class ApproveRunOperator(ApprovalOperator):
    """
    Ask a person to approve the run's refunds when the ledger says that one is needed, and note the answer in the ledger.

    The question waits under Airflow's Required Actions and takes no worker; people are told of it by the notifiers of the setting.
    Only what the ledger noted counts at the release: a task that was merely marked as success releases nothing.

    - **Approve** by anyone but who triggered the run: the run goes on.
    - **Reject**: the direct downstream tasks are skipped, whatever their trigger rule, and the task succeeds.
    - No answer in time, or one that does not count: the task fails, and nothing is sent. Clearing it asks again.

    Give it retries: an answer within seconds of the question may be lost by Airflow, which then takes the task for killed
    (https://github.com/apache/airflow/issues/67287), and a retry asks again.

    :param approvers: ids of the Airflow users who may answer, as Airflow's auth manager knows them. Empty means everybody who may
        answer for the DAG. Who triggered the run is never among them.
    :param response_timeout: for how long it waits. It waits no longer than until shortly before the next scheduled run.
    :param ledger_conn_id: Airflow connection of the ledger, a Postgres database.
    :raises RunNotApproved: nobody answered in time, the answer does not count, or nobody can be asked. Not retried.
    :raises LedgerError: the run's candidates are no longer those that were asked about. Not retried.
    """

    response_timeout: timedelta

    def __init__(
        self,
        *,
        response_timeout: timedelta,
        approvers: Sequence[str] = (),
        ledger_conn_id: str = LEDGER_CONN_ID,
        **kwargs: Any,
    ) -> None:
        # What is asked is known when it is asked.
        kwargs.setdefault("subject", "Release refunds?")
        kwargs.setdefault("retry_policy", PayrocRetryPolicy())
        kwargs.setdefault("notifiers", [ApprovalNeeded()])
        super().__init__(response_timeout=response_timeout, **kwargs)
        self.approvers = approvers
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Context) -> None:
        """Pass, or ask and wait; see the class for what is raised."""
        from include.refunds.settings import get_settings

        if run_params(context).dry_run:
            return
        settings = get_settings()
        question = asyncio.run(self._ask(context, settings))
        if question is None:
            self.log.info("These refunds may be released without asking a person.")
            return
        if in_dag_test():
            raise RunNotApproved(
                f"{question.why} Under `airflow dags test` nobody can be asked: let the scheduler run it, or set the threshold with "
                "`python -m include.refunds limit`."
            )
        context[QUESTION] = question  # type: ignore[literal-required]
        self.subject, self.body = question.subject, question.body(context["run_id"])
        self.assigned_users = [{"id": user, "name": user} for user in self._askable(_triggered_by(context))]
        self.response_timeout = min(self.response_timeout, _until_next_run(settings, utcnow()))
        super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> None:
        """Note the answer in the ledger and go on as :class:`ApprovalOperator` does; see the class for what is raised."""
        if "error" not in event:
            asyncio.run(self._record(context, event))
        # Its result is left: the ledger has the answer, and no task reads it from an XCom.
        super().execute_complete(context, event)

    def process_trigger_event_error(self, event: dict[str, Any]) -> None:
        """Say in one sentence what a time-out means."""
        if event["error_type"] == "timeout":
            raise RunNotApproved(
                f"Nobody answered in time, so nothing is sent; clear {self.task_id} to ask again."
            )
        super().process_trigger_event_error(event)

    async def _ask(self, context: Context, settings: Settings) -> Question | None:
        async with open_ledger(context, settings, self.ledger_conn_id) as ledger:
            return await ledger.approvals.ask_approval(context["run_id"])

    async def _record(self, context: Context, event: dict[str, Any]) -> None:
        from include.refunds.case import DecisionRefused
        from include.refunds.ledger import LedgerUnavailable
        from include.refunds.settings import get_settings

        by = self._who(event.get("responded_by_user"))
        try:
            async with open_ledger(context, get_settings(), self.ledger_conn_id) as ledger:
                match event["chosen_options"]:
                    case [self.APPROVE]:
                        await ledger.approvals.record_approval(
                            context["run_id"], by=by, triggered_by=_triggered_by(context)
                        )
                    case [self.REJECT]:
                        await ledger.approvals.record_rejection(context["run_id"], by=by)
        except DecisionRefused as error:
            raise RunNotApproved(str(error)) from None
        except LedgerUnavailable as error:
            # A retry would ask again, and who has answered would not know.
            raise RunNotApproved(
                f"The answer of {printable(by)} was not noted, so nothing is sent; clear {self.task_id} to ask again. {error}"
            ) from None

    def _who(self, user: dict[str, Any] | None) -> str:
        # The name and not the id: it is what Airflow notes of who triggered a run.
        name = (user or {}).get("name") or (user or {}).get("id")
        if user is None or not name:
            raise RunNotApproved(
                f"The answer names nobody, so nothing is sent; clear {self.task_id} to ask again."
            )
        # Airflow asks this too, but for SimpleAuthManager with all admins.
        if self.approvers and user.get("id") not in self.approvers:
            raise RunNotApproved(
                f"{printable(name)} is none of the approvers, so nothing is sent; clear {self.task_id} to ask again."
            )
        return str(name)

    def _askable(self, triggered_by: str | None) -> list[str]:
        """Return who may answer; empty means everybody."""
        from include.refunds.people import same_person

        # An auth manager may have ids that are no names: then the ledger alone refuses who triggered the run.
        askable = [
            user for user in self.approvers if triggered_by is None or not same_person(user, triggered_by)
        ]
        if self.approvers and not askable:
            raise RunNotApproved(
                f"{printable(triggered_by)} triggered this run and is its only approver: another person has to trigger it."
            )
        return askable


def _triggered_by(context: Context) -> str | None:
    return context["dag_run"].triggering_user_name


def _until_next_run(settings: Settings, now: datetime) -> timedelta:
    """Return how long a run may wait without keeping the next one waiting."""
    if not settings.schedule:
        return timedelta.max
    following = next_due(settings.schedule, settings.timezone, now)
    if following is None:
        return timedelta.max
    return max(timedelta(seconds=following.timestamp() - now.timestamp()) - MARGIN, SHORTEST)
