"""
Under a real scheduler a run over a threshold is paid only when a person who did not trigger it has approved exactly these refunds.

Olivia triggers the runs, Frank answers. What was approved stands in the ledger, so nothing that people may press or change in Airflow
takes its place.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.scheduler.client import AirflowClient, TaskInstance
from tests.scheduler.conftest import Merchant
from tests.scheduler.deployment import DAG, IMPATIENT_DAG, NAMED_DAG


@pytest.fixture(scope="module", autouse=True)
def every_run_needs_a_person(merchant: Merchant) -> None:
    merchant.run(merchant.ledger.limits.set_limit("approval_count", 0, "test"))


class Run:
    """
    A run about these refunds that waits for its approval.

    :param source_refs: the refunds; one that is not approved yet may be among them.
    :param question: what was asked last.
    """

    def __init__(self, merchant: Merchant, *source_refs: str, dag_id: str = DAG) -> None:
        self.merchant = merchant
        self.source_refs = source_refs
        self.dag_id = dag_id
        self.olivia = merchant.airflow.client
        self.frank = self.olivia.as_user("frank")
        self.id = self.olivia.trigger(dag_id, source_refs=list(source_refs))
        # A question that may pass unseen is not waited for.
        if dag_id != IMPATIENT_DAG:
            self.wait_for_question()

    def wait_for_question(self) -> None:
        self.question = self.olivia.question(self.dag_id, self.id)

    def answer(self, person: AirflowClient, option: str) -> None:
        """Answer the question as soon as Airflow does not lose the answer; wait until it is read."""
        asked = self.approve_run
        self.merchant.wait_until(
            lambda: self.merchant.airflow.knows_the_end_of(asked), "the asking process has ended", pause=0.3
        )
        assert person.answer(self.dag_id, self.id, option) == 200
        self.merchant.wait_until(
            lambda: self.approve_run.state in ("success", "failed"), "the answer is read", pause=0.3
        )

    def ends(self, state: str) -> None:
        self.olivia.wait_for_run(self.dag_id, self.id, state)

    def clear(self, task_id: str, *, downstream: bool = True) -> None:
        self.olivia.clear(self.dag_id, self.id, task_id, downstream=downstream)

    @property
    def approve_run(self) -> TaskInstance:
        return self.olivia.task_instances(self.dag_id, self.id)["approve_run", -1]

    def states(self) -> dict[str, str | None]:
        return {
            task_id: ti.state for (task_id, _), ti in self.olivia.task_instances(self.dag_id, self.id).items()
        }

    def errors(self) -> str:
        return self.olivia.errors(self.dag_id, self.id)

    def row(self) -> dict[str, Any]:
        return self.merchant.rows("SELECT * FROM refund_ledger.refund_runs WHERE run_id = :id", id=self.id)[0]

    def notes(self) -> str:
        """Return the notes of the report of a green run."""
        return "\n".join(self.olivia.xcom(self.dag_id, self.id, "report")["notes"])

    def assert_nothing_was_sent(self) -> None:
        assert [self.merchant.row(ref)["status"] for ref in self.source_refs] == ["approved"] * len(
            self.source_refs
        )
        assert [self.merchant.creates(ref) for ref in self.source_refs] == [[]] * len(self.source_refs)


def expected(approve_run: str, release: str, send_refund: str, report: str) -> dict[str, str]:
    """Return the states of a run's tasks; reading the source and writing back went well."""
    return {
        "pull_approved": "success",
        "approve_run": approve_run,
        "release": release,
        "send_refund": send_refund,
        "write_back": "success",
        "report": report,
    }


def test_an_approval_of_a_named_approver_pays_each_refund_once_and_is_not_asked_for_again(
    merchant: Merchant,
) -> None:
    refs = [merchant.approve("1234"), merchant.approve("1234")]
    run = Run(merchant, *refs, dag_id=NAMED_DAG)
    assert [user["id"] for user in run.question["assigned_users"]] == ["frank"]
    assert "99.98 USD" in run.question["body"]
    # Olivia is an approver, but not of what she triggered herself.
    assert [run.olivia.as_user(user).answer(NAMED_DAG, run.id, "Approve") for user in ("eve", "olivia")] == [
        403,
        403,
    ]
    assert run.row()["approved_by"] is None
    run.answer(run.frank, "Approve")
    run.ends("success")
    merchant.assert_paid_once(*refs)
    assert (run.row()["approval_needed"], run.row()["approved_by"]) == (True, "frank")

    before = [merchant.creates(ref) for ref in refs]
    run.clear("approve_run", downstream=False)
    run.ends("success")
    assert [merchant.creates(ref) for ref in refs] == before


def test_while_a_run_waits_nothing_is_added_and_what_is_withdrawn_or_changed_is_left_out_and_named(
    merchant: Merchant,
) -> None:
    kept, withdrawn, changed, late = (
        merchant.approve(),
        merchant.approve(),
        merchant.approve(),
        "approved-while-it-waits",
    )
    run = Run(merchant, kept, withdrawn, changed, late)
    merchant.approve(source_ref=late)
    merchant.change_source(withdrawn, "withdrawn_at = now()")
    merchant.change_source(changed, "amount = 1")
    run.answer(run.frank, "Approve")
    run.ends("success")
    merchant.assert_paid_once(kept)
    assert [merchant.row(ref)["status"] for ref in (withdrawn, changed)] == ["approved", "approved"]
    assert [merchant.creates(ref) for ref in (withdrawn, changed, late)] == [[], [], []]
    assert merchant.rows("SELECT id FROM refund_ledger.refunds WHERE source_ref = :ref", ref=late) == []
    for ref in (withdrawn, changed):
        assert f"Refund {merchant.row(ref)['id']} was not released." in run.notes()


def test_a_rejected_run_sends_nothing_and_names_who_rejected_it_and_only_a_new_run_asks_about_the_refunds_again(
    merchant: Merchant,
) -> None:
    run = Run(merchant, merchant.approve())
    run.answer(run.frank, "Reject")
    run.ends("success")
    assert run.states() == expected("success", "skipped", "skipped", "success")
    run.assert_nothing_was_sent()
    assert run.row()["rejected_by"] == "frank"
    assert "frank" in run.notes()

    # Airflow would show the first question, which says nothing of the rejection.
    run.clear("approve_run")
    run.ends("success")
    assert run.states() == expected("failed", "upstream_failed", "upstream_failed", "success")
    assert "trigger a new run, which asks about what is approved now" in run.errors()
    run.assert_nothing_was_sent()

    again = Run(merchant, *run.source_refs)
    assert "1 of these refunds were in a run that was rejected." in again.question["body"]
    again.answer(again.frank, "Approve")
    again.ends("success")
    merchant.assert_paid_once(*run.source_refs)


def test_a_question_that_nobody_answers_in_time_is_asked_once_and_the_run_is_red_and_sends_nothing(
    merchant: Merchant,
) -> None:
    run = Run(merchant, merchant.approve(), dag_id=IMPATIENT_DAG)
    run.ends("failed")
    assert "49.99 USD" in run.olivia.asked(IMPATIENT_DAG, run.id)["body"]
    assert run.states() == expected("failed", "upstream_failed", "upstream_failed", "failed")
    assert "Nobody answered in time, so nothing is sent; clear approve_run to ask again." in run.errors()
    assert run.approve_run.try_number == 1
    # An answer that comes too late is taken by Airflow, and changes nothing.
    run.frank.answer(IMPATIENT_DAG, run.id, "Approve")
    assert run.olivia.run_state(IMPATIENT_DAG, run.id) == "failed"
    run.assert_nothing_was_sent()


def test_marking_the_approval_as_success_releases_nothing(merchant: Merchant) -> None:
    run = Run(merchant, merchant.approve())
    run.olivia.set_state(DAG, run.id, "approve_run", "success")
    run.ends("failed")
    assert run.states() == expected("success", "failed", "upstream_failed", "failed")
    assert "holds no approval of exactly these 1 refunds, so none is released" in run.errors()
    run.assert_nothing_was_sent()


def test_who_triggered_a_run_cannot_approve_it_and_clearing_the_task_asks_again(merchant: Merchant) -> None:
    run = Run(merchant, merchant.approve())
    run.answer(run.olivia, "Approve")
    run.ends("failed")
    assert run.states() == expected("failed", "upstream_failed", "upstream_failed", "failed")
    assert f"olivia triggered run {run.id} and can't approve it, so nothing is sent" in run.errors()
    run.assert_nothing_was_sent()
    run.clear("approve_run")
    run.wait_for_question()


def test_an_edited_list_of_refunds_releases_nothing_and_a_cleared_pull_takes_the_approval_back(
    merchant: Merchant,
) -> None:
    unasked = merchant.approve()
    run = Run(merchant, merchant.approve(), merchant.approve())
    handed_on = run.olivia.xcom(DAG, run.id, "pull_approved")
    first, second = handed_on["candidates"]
    other = merchant.row(unasked)["id"]

    def edit(candidates: list[int], due: list[int]) -> None:
        run.olivia.set_xcom(DAG, run.id, "pull_approved", {"candidates": candidates, "due": due})

    edit([first, second, other], [])
    run.answer(run.frank, "Approve")
    run.ends("failed")
    assert "holds no approval of exactly these 3 refunds, so none is released" in run.errors()
    edit([first], [])
    run.clear("release", downstream=False)
    run.ends("failed")
    assert "holds no approval of exactly these 1 refunds, so none is released" in run.errors()
    run.assert_nothing_was_sent()

    assert run.row()["approved_by"] == "frank"
    run.clear("pull_approved")
    run.wait_for_question()
    assert run.row()["approved_by"] is None
    # Refunds in doubt need no approval, but what was never released is refused by its own task, whoever says that it is in doubt.
    edit([first, second], [other])
    run.answer(run.frank, "Approve")
    run.ends("success")
    merchant.assert_paid_once(*run.source_refs)
    assert (merchant.row(unasked)["status"], merchant.creates(unasked)) == ("approved", [])
