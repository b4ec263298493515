"""The operator that asks for a run's approval, over the real ledger: whom it asks for how long, and what an answer does."""

from __future__ import annotations

import json
import os
import warnings
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.providers.standard.operators import hitl
from airflow.sdk.exceptions import AirflowFailException, TaskAwaitingInput
from sqlalchemy import URL

from include.refunds.ledger import LedgerError, Selection
from include.refunds.params import ParamsError
from include.refunds.settings import get_settings
from payroc_airflow.exceptions import RunNotApproved
from payroc_airflow.operators import approval
from payroc_airflow.operators.approval import ApproveRunOperator
from tests.dags.conftest import airflow_connection
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world

LONGEST = timedelta(hours=8)


class Approval:
    """
    Runs the operator as a task would.

    :param asked: what was handed to Airflow's Required Actions.
    """

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.asked: dict[str, Any] = {}
        monkeypatch.setattr(hitl, "upsert_hitl_detail", lambda **values: self.asked.update(values))

    def threshold(self, refunds: int | None) -> None:
        self.world.run(self.world.ledger.limits.set_limit("approval_count", refunds, "test"))

    def begin(self, *refs: str) -> list[int]:
        """Pull, and begin the run with these refunds."""
        self.world.pull()

        async def work() -> list[int]:
            found = await self.world.ledger.runs.candidates(Selection(source_refs=refs))
            await self.world.ledger.runs.begin_run("run-1", {}, found, {}, datetime.now(UTC))
            return [item.id for item in found]

        return self.world.run(work())

    def ask(self, *approvers: str, triggered_by: str | None = None, **params: Any) -> timedelta | None:
        """Execute the task and return for how long it waits, or ``None`` when it passes."""
        try:
            self._task(approvers).execute(_context(triggered_by, params))
        except TaskAwaitingInput as waits:
            return waits.timeout
        return None

    def answer(
        self,
        option: str,
        by: str = "frank",
        *,
        user_id: str | None = None,
        approvers: tuple[str, ...] = (),
        triggered_by: str | None = None,
    ) -> None:
        """Resume the task with an answer; by nobody when the name is empty."""
        user = {"id": user_id or by, "name": by} if by else None
        event = {
            "chosen_options": [option],
            "params_input": {},
            "responded_at": datetime.now(UTC),
            "responded_by_user": user,
        }
        self._task(approvers).execute_complete(_context(triggered_by, {}), event)

    def row(self) -> dict[str, Any]:
        return self.world.rows("SELECT * FROM refund_ledger.refund_runs WHERE run_id = 'run-1'")[0]

    def _task(self, approvers: tuple[str, ...]) -> ApproveRunOperator:
        return ApproveRunOperator(task_id="approve_run", response_timeout=LONGEST, approvers=approvers)


def _context(triggered_by: str | None, params: dict[str, Any]) -> Any:
    ti = SimpleNamespace(id="ti", dag_id="payroc_refunds", run_id="run-1", map_index=-1, try_number=1)
    dag_run = SimpleNamespace(conf=params, triggering_user_name=triggered_by)
    return {"ti": ti, "task_instance": ti, "run_id": "run-1", "dag_run": dag_run, "params": params}


@pytest.fixture
def run(world: World, ledger_url: URL, monkeypatch: pytest.MonkeyPatch) -> Approval:
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", airflow_connection(ledger_url))
    monkeypatch.setenv("PAYROC_REFUNDS_SCHEDULE", "")
    get_settings.cache_clear()
    return Approval(world, monkeypatch)


# -- asking ----------------------------------------------------------------------------------------------------------------


def test_without_a_threshold_and_up_to_it_a_run_passes_by_itself(run: Approval) -> None:
    run.begin(run.world.approve())
    for threshold in (None, 1):
        run.threshold(threshold)
        assert run.ask() is None
        assert (run.asked, run.row()["approval_needed"]) == ({}, False)


def test_above_the_threshold_it_asks_without_a_default_and_without_bank_data(run: Approval) -> None:
    refs = [
        run.world.approve("1111", name_on_account="Ottoline Featherstone"),
        run.world.approve("2222", amount=150_001),
    ]
    run.begin(*refs)
    run.threshold(1)
    assert run.ask() == LONGEST
    assert (run.asked["options"], run.asked["defaults"], run.asked["assigned_users"]) == (
        ["Approve", "Reject"],
        None,
        [],
    )
    assert "1,550.00 USD" in run.asked["body"]
    for secret in ("Ottoline", "1111", "2222", "053200983"):
        assert secret not in run.asked["body"]
    assert run.row()["approval_needed"] is True


def test_a_dry_run_asks_nobody_and_needs_no_ledger(run: Approval, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW_CONN_REFUNDS_LEDGER")
    assert run.ask(dry_run=True) is None


def test_an_unknown_param_passes_nothing(run: Approval) -> None:
    with pytest.raises(ParamsError):
        run.ask(dryrun=True)


def test_a_run_without_candidates_in_the_ledger_is_an_error(run: Approval) -> None:
    with pytest.raises(LedgerError, match="clear pull_approved"):
        run.ask()


def test_the_approvers_are_asked_but_not_who_triggered_the_run(run: Approval) -> None:
    run.begin(run.world.approve())
    run.threshold(0)
    run.ask("olivia", "frank", "7", triggered_by=" Olivia ")
    assert [user["id"] for user in run.asked["assigned_users"]] == ["frank", "7"]


def test_a_run_of_its_only_approver_fails_for_nobody_assigned_would_mean_everybody(run: Approval) -> None:
    run.begin(run.world.approve())
    run.threshold(0)
    with pytest.raises(RunNotApproved, match="another person has to trigger it"):
        run.ask("olivia", triggered_by="olivia")
    assert run.asked == {}


def test_a_time_limit_of_the_task_does_not_become_that_of_the_answer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = ApproveRunOperator(
            task_id="approve_run", response_timeout=LONGEST, execution_timeout=timedelta(hours=1)
        )
    assert (task.response_timeout, task.execution_timeout) == (LONGEST, timedelta(hours=1))


@pytest.mark.parametrize(
    ("schedule", "now", "expected"),
    [
        ("", "2026-10-14T12:00:00Z", timedelta.max),
        # 7 o'clock in New York is 11 o'clock UTC in summer, and 12 o'clock after the night to the first of November.
        ("0 7 * * 1-5", "2026-10-14T11:00:10Z", timedelta(hours=23, minutes=57, seconds=50)),
        ("0 7 * * 1-5", "2026-10-14T10:00:00Z", timedelta(minutes=58)),
        ("0 7 * * 1-5", "2026-10-30T11:00:10Z", timedelta(hours=72 + 1, seconds=-10, minutes=-2)),
        ("@daily", "2026-10-14T03:00:00Z", timedelta(minutes=58)),
        # The next run rather waits a little than that nobody could answer this one.
        ("0 7 * * 1-5", "2026-10-14T10:59:00Z", timedelta(minutes=5)),
        ("* * * * *", "2026-10-14T10:59:00Z", timedelta(minutes=5)),
    ],
)
def test_a_run_waits_no_longer_than_until_shortly_before_the_next_scheduled_one(
    monkeypatch: pytest.MonkeyPatch, schedule: str, now: str, expected: timedelta
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_SCHEDULE", schedule)
    assert approval._until_next_run(get_settings(), datetime.fromisoformat(now)) == expected


def test_the_wait_for_an_answer_is_cut_by_the_schedule(
    run: Approval, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.begin(run.world.approve())
    run.threshold(0)
    monkeypatch.setenv("PAYROC_REFUNDS_SCHEDULE", "* * * * *")
    get_settings.cache_clear()
    assert run.ask() == approval.SHORTEST


# -- answers ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(run: Approval) -> Approval:
    """A run that asks."""
    run.begin(run.world.approve())
    run.threshold(0)
    assert run.ask() is not None
    return run


def test_an_approval_is_noted_with_the_persons_name_and_is_not_asked_for_again(asked: Approval) -> None:
    asked.answer("Approve", "frank", triggered_by="olivia")
    row = asked.row()
    assert (row["approved_by"], row["approved_hash"]) == ("frank", row["candidates_hash"])
    assert asked.ask() is None


def test_a_rejection_is_noted_with_the_persons_name_and_approves_nothing(asked: Approval) -> None:
    asked.answer("Reject", "frank")
    assert (asked.row()["rejected_by"], asked.row()["approved_hash"]) == ("frank", None)


@pytest.mark.parametrize("by", ["olivia", "Olivia", " OLIVIA"])
def test_who_triggered_a_run_cannot_approve_it(asked: Approval, by: str) -> None:
    with pytest.raises(
        RunNotApproved, match="triggered run run-1 and can't approve it, so nothing is sent"
    ) as caught:
        asked.answer("Approve", by, triggered_by="olivia")
    assert isinstance(caught.value, AirflowFailException)
    assert asked.row()["approved_hash"] is None


def test_users_whose_ids_are_no_names_are_assigned_by_id_and_noted_by_name(run: Approval) -> None:
    run.begin(run.world.approve())
    run.threshold(0)
    run.ask("7", "8", triggered_by="frank")
    # Airflow tells of who triggered a run nothing but the name, so Frank may answer, and the ledger refuses him.
    assert [user["id"] for user in run.asked["assigned_users"]] == ["7", "8"]
    with pytest.raises(RunNotApproved, match="frank triggered run"):
        run.answer("Approve", "frank", user_id="7", approvers=("7", "8"), triggered_by="frank")
    run.answer("Approve", "fiona", user_id="8", approvers=("7", "8"), triggered_by="frank")
    assert run.row()["approved_by"] == "fiona"


def test_who_triggered_a_run_may_reject_it(asked: Approval) -> None:
    asked.answer("Reject", "olivia", triggered_by="olivia")
    assert asked.row()["rejected_by"] == "olivia"


@pytest.mark.parametrize("option", ["Approve", "Reject"])
def test_an_answer_of_nobody_or_of_no_approver_counts_for_nothing(asked: Approval, option: str) -> None:
    with pytest.raises(RunNotApproved, match="names nobody"):
        asked.answer(option, "")
    with pytest.raises(RunNotApproved, match="eve is none of the approvers"):
        asked.answer(option, "eve", approvers=("frank",))
    assert (asked.row()["approved_hash"], asked.row()["rejected_by"]) == (None, None)


def test_an_approval_of_other_refunds_than_those_asked_about_counts_for_nothing(asked: Approval) -> None:
    asked.begin(asked.world.approve())
    with pytest.raises(LedgerError, match="trigger a new run"):
        asked.answer("Approve")
    assert asked.row()["approved_hash"] is None


def test_an_answer_that_cannot_be_noted_fails_the_task_for_good(
    asked: Approval, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = os.environ["AIRFLOW_CONN_REFUNDS_LEDGER"]
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", json.dumps(json.loads(connection) | {"port": 9}))
    with pytest.raises(
        RunNotApproved,
        match="The answer of frank was not noted, so nothing is sent; clear approve_run to ask again",
    ):
        asked.answer("Approve", "frank")


def test_a_question_that_nobody_answered_in_time_fails_the_task_for_good() -> None:
    task = ApproveRunOperator(task_id="approve_run", response_timeout=LONGEST)
    # No retry would be right here: it would ask again.
    with pytest.raises(
        AirflowFailException,
        match="Nobody answered in time, so nothing is sent; clear approve_run to ask again",
    ):
        task.execute_complete(
            _context(None, {}), {"error": "The response timeout has passed", "error_type": "timeout"}
        )
