"""The limits of the sending, at the one gate: what is held, what waits, and for whom a person is asked."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from include.refunds.case import DecisionRefused
from include.refunds.ledger import Ledger, LedgerEngine, LedgerError, Selection
from include.refunds.limits import LIMITS, Limits
from include.refunds.params import RunParams
from include.refunds.rehearse import rehearse
from include.refunds.report import run_report
from tests.patience import PATIENCE_SECONDS
from tests.refunds.conftest import World

ACCOUNT = "556670012345"


def status(world: World, *refs: str) -> list[str]:
    return [world.row(ref)["status"] for ref in refs]


def unhold(world: World, ref: str, by: str) -> None:
    world.run(
        Ledger(world.ledger.engine, world.settings, actor=by).decisions.unhold(
            world.row(ref)["id"], "It was looked at."
        )
    )


def report(world: World, run_id: str) -> str:
    return str(world.run(run_report(world.ledger.engine, world.settings.source, run_id)))


# -- holds -----------------------------------------------------------------------------------------------------------------


def test_all_limits_are_unset_at_first_and_let_everything_pass(world: World) -> None:
    refs = [world.approve(amount=10**9, account_number=ACCOUNT) for _ in range(3)]
    world.pull()
    assert world.run(world.ledger.limits.current()) == Limits()
    assert len(world.release()) == 3
    assert status(world, *refs) == ["released"] * 3


def test_a_refund_over_the_largest_is_held_with_the_reason_and_the_others_go(world: World) -> None:
    world.limit(largest_refund=5000)
    large, small = world.approve(amount=5001), world.approve(amount=5000)
    world.pull()
    assert world.release() == [world.row(small)["id"]]
    assert status(world, large) == ["held"]
    assert (
        world.row(large)["reason"]
        == "Held: 50.01 USD is more than the largest refund that passes by itself, 50.00 USD."
    )
    assert "1 held: `python -m include.refunds unhold ID`" in report(world, "run-1")


def test_a_held_refund_passes_when_a_person_who_did_not_request_it_releases_it_and_is_not_held_for_the_same_again(
    world: World,
) -> None:
    world.limit(largest_refund=5000)
    ref = world.approve(amount=6000)
    world.pull()
    world.release()
    with pytest.raises(DecisionRefused, match=r"Ann@Example.com requested refund \d+ and can't unhold it"):
        unhold(world, ref, by="Ann@Example.com ")
    assert status(world, ref) == ["held"]
    unhold(world, ref, by="erin")
    assert world.row(ref)["reason"] == "Unheld by erin: It was looked at."
    assert world.release("run-2") == [world.row(ref)["id"]]
    with pytest.raises(DecisionRefused, match="is released, not held"):
        unhold(world, ref, by="erin")


def test_a_hold_that_was_released_keeps_no_other_hold_away(world: World) -> None:
    world.limit(largest_refund=5000)
    first, ref = (
        world.approve(amount=4000, account_number=ACCOUNT),
        world.approve(amount=6000, account_number=ACCOUNT),
    )
    world.pull()
    world.release()
    unhold(world, ref, by="erin")
    world.limit(payee_days=30, payee_total=9000)
    assert world.release("run-2") == [world.row(first)["id"]]
    assert (
        world.row(ref)["reason"]
        == "Held: its payee would get 100.00 USD within 30 days, more than 90.00 USD."
    )


def test_the_same_payee_and_amount_within_the_days_is_held_and_names_the_other(world: World) -> None:
    world.limit(duplicate_days=7)
    one, two = world.approve(account_number=ACCOUNT), world.approve(account_number=ACCOUNT)
    other_amount, other_payee = world.approve(account_number=ACCOUNT, amount=1), world.approve()
    world.pull()
    world.release()
    assert status(world, one, two, other_amount, other_payee) == ["released", "held", "released", "released"]
    first = world.row(one)
    assert world.row(two)["reason"] == (
        f"Held: possible duplicate of refund {first['id']} (order {first['order_id']}): the same payee and amount within 7 days."
    )


def test_what_was_refused_by_payroc_makes_no_duplicate(world: World) -> None:
    world.limit(duplicate_days=7)
    refused = world.approve("9002", account_number=f"{ACCOUNT}9002")
    world.pull()
    for refund_id in world.release():
        world.send(refund_id)
    again = world.approve("9002", account_number=f"{ACCOUNT}9002")
    world.pull()
    world.release("run-2")
    assert status(world, refused, again) == ["rejected", "released"]


def test_a_payee_gets_no_more_refunds_than_its_cap_and_what_passed_longer_ago_does_not_count(
    world: World,
) -> None:
    world.limit(payee_days=2, payee_count=1)
    one, two = (
        world.approve(account_number=ACCOUNT, amount=1),
        world.approve(account_number=ACCOUNT, amount=2),
    )
    world.pull()
    world.release()
    assert status(world, one, two) == ["released", "held"]
    assert world.row(two)["reason"] == "Held: it would be refund number 2 to its payee within 2 days; 1 pass."
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql("UPDATE refund_ledger.first_releases SET at = at - interval '3 days'")
    three = world.approve(account_number=ACCOUNT, amount=3)
    world.pull()
    world.release("run-2")
    assert status(world, three) == ["released"]


def test_of_two_that_were_let_through_the_later_one_answers_for_the_earlier_one_and_never_both(
    world: World,
) -> None:
    one, two = world.approve(account_number=ACCOUNT), world.approve(account_number=ACCOUNT)
    world.pull()
    world.release("run-1", Selection(source_refs=(one,)))
    world.release("run-2", Selection(source_refs=(two,)))
    world.limit(duplicate_days=7, payee_days=7, payee_count=1)
    world.release("run-3")
    assert status(world, one, two) == ["released", "held"]


def test_a_cancelled_refund_does_not_hold_the_one_that_is_approved_in_its_place(world: World) -> None:
    wrong = world.approve(account_number=ACCOUNT)
    world.pull()
    world.release()
    world.run(world.ledger.decisions.cancel(world.row(wrong)["id"], "A typing error."))
    world.limit(duplicate_days=7, payee_days=7, payee_count=1)
    right = world.approve(account_number=ACCOUNT)
    world.pull()
    world.release("run-2")
    assert status(world, right) == ["released"]


# -- caps of the run and the day -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"run_total": 10_000}, {"run_count": 2}])
def test_a_run_releases_what_fits_oldest_first_and_says_what_waits_for_the_next_one(
    world: World, limit: dict[str, int]
) -> None:
    world.limit(**limit)
    refs = [world.approve(amount=5000) for _ in range(3)]
    world.pull()
    assert world.release("run-1") == [world.row(ref)["id"] for ref in refs[:2]]
    assert status(world, *refs) == ["released", "released", "approved"]
    name = next(iter(limit))
    assert (
        f"Waiting: 1 refund, 50.00 USD. The limit {name} leaves no room; the next runs go on, oldest first"
        in report(world, "run-1")
    )
    assert world.release("run-1")[2:] == [], "the same run, cleared, has no more room than before"
    assert world.row(refs[2])["id"] in world.release("run-2")


def test_a_smaller_refund_behind_one_that_finds_no_room_still_passes(world: World) -> None:
    world.limit(run_total=6000)
    first, large, small = world.approve(amount=3000), world.approve(amount=4000), world.approve(amount=3000)
    world.pull()
    world.release()
    assert status(world, first, large, small) == ["released", "approved", "released"]


@pytest.mark.parametrize("limit", [{"day_total": 10_000}, {"day_count": 2}])
def test_all_runs_of_a_day_together_release_no_more_than_its_cap_and_the_next_day_goes_on(
    world: World, limit: dict[str, int]
) -> None:
    world.limit(**limit)
    refs = [world.approve(amount=5000) for _ in range(3)]
    world.pull()
    world.release("run-1", Selection(source_refs=(refs[0],)))
    world.release("run-2")
    assert status(world, *refs) == ["released", "released", "approved"]
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql("UPDATE refund_ledger.first_releases SET at = at - interval '1 day'")
    world.release("run-3")
    assert status(world, refs[2]) == ["released"]


def test_a_refund_counts_once_however_often_it_is_released(world: World) -> None:
    world.limit(day_count=2)
    first = world.approve()
    world.pull()
    for run in ("run-1", "run-2", "run-3"):
        world.release(run)
    second = world.approve()
    world.pull()
    world.release("run-4")
    assert status(world, first, second) == ["released", "released"]


def test_each_currency_is_held_against_a_cap_by_itself(world: World) -> None:
    world.limit(run_total=5000)
    dollars, euros, more = (
        world.approve(amount=5000),
        world.approve(amount=5000, currency="CAD"),
        world.approve(amount=1),
    )
    world.pull()
    world.release()
    assert status(world, dollars, euros, more) == ["released", "released", "approved"]


def waiting_for_a_lock(world: World) -> int:
    query = """
        SELECT count(*) AS n FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND datname = current_database()"""
    return int(world.rows(query)[0]["n"])


def test_two_runs_at_once_do_not_exceed_a_cap_together(world: World) -> None:
    world.limit(day_count=3)
    refs = [world.approve() for _ in range(6)]
    world.pull()
    ids = [world.row(ref)["id"] for ref in refs]

    async def one_run(run_id: str, candidate_ids: list[int]) -> list[int]:
        engine = LedgerEngine(world.ledger.engine.url)
        ledger = Ledger(engine, world.settings, actor=run_id)
        try:
            candidates = await ledger.runs.candidates(Selection(), ids=candidate_ids)
            await ledger.runs.begin_run(run_id, {}, candidates, {}, datetime.now(UTC))
            await ledger.approvals.ask_approval(run_id)
            return await ledger.gate.release(run_id, candidate_ids, candidate_ids, {})
        finally:
            await engine.dispose()

    async def both() -> list[list[int]]:
        blocker = LedgerEngine(world.ledger.engine.url)
        async with blocker.begin() as connection:
            # Both have begun to release when neither could look at the caps yet.
            await connection.execute("SELECT FROM refund_ledger.refund_runs LIMIT 0")
            await connection.execute("LOCK TABLE refund_ledger.refund_events IN SHARE MODE")
            runs = [
                asyncio.create_task(one_run(name, part))
                for name, part in (("run-1", ids[:3]), ("run-2", ids[3:]))
            ]
            while waiting_for_a_lock(world) < 2:
                assert not any(run.done() for run in runs)
                await asyncio.sleep(0.05)
        await blocker.dispose()
        return await asyncio.gather(*runs)

    released = world.run(both())
    assert sorted(len(ids) for ids in released) == [0, 3]
    assert sorted(status(world, *refs)) == ["approved"] * 3 + ["released"] * 3


def test_a_pause_waits_neither_for_a_run_at_the_gate_nor_for_a_dry_run(world: World) -> None:
    world.approve()
    world.pull()
    ledger = Ledger(world.ledger.engine, world.settings, actor="ann")

    async def pause_beside_a_dry_run_at_the_gate() -> None:
        async with world.ledger.rehearsal() as rehearsal:
            await rehearsal.bindings.check_source()
            candidates = await rehearsal.runs.candidates(Selection())
            await rehearsal.runs.begin_run("run-1", {}, candidates, {}, datetime.now(UTC))
            await rehearsal.approvals.ask_approval("run-1")
            await rehearsal.gate.release(
                "run-1", [item.id for item in candidates], [item.id for item in candidates], {}
            )
            await asyncio.wait_for(ledger.pauses.pause("*", "The bank called."), timeout=PATIENCE_SECONDS)

    world.run(pause_beside_a_dry_run_at_the_gate())
    assert world.paused() == {"*": "The bank called."}


# -- limits and people -----------------------------------------------------------------------------------------------------


def test_a_change_of_a_limit_leaves_an_event_with_who_and_why(world: World) -> None:
    ledger = Ledger(world.ledger.engine, world.settings, actor="erin")
    world.run(ledger.limits.set_limit("day_total", 100_000, "The bank's limit."))
    world.run(ledger.limits.set_limit("day_total", None, "It was lifted."))
    events = world.rows(
        "SELECT actor, reason, detail FROM refund_ledger.refund_events WHERE event = 'limit' ORDER BY id"
    )
    assert [(event["actor"], event["reason"], event["detail"]) for event in events] == [
        ("erin", "The bank's limit.", {"limit": "day_total", "from": None, "to": 100_000}),
        ("erin", "It was lifted.", {"limit": "day_total", "from": 100_000, "to": None}),
    ]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("daily", 1, "There is no limit 'daily'"),
        ("day_total", 0, "must lie between 1 and"),
        ("payee_days", 400, "must lie between 1 and 366"),
        ("payee_total", 100, "set payee_days first"),
    ],
)
def test_a_limit_that_can_not_be_is_refused_with_a_sentence(
    world: World, name: str, value: int, sentence: str
) -> None:
    with pytest.raises(LedgerError, match=sentence):
        world.limit(**{name: value})
    assert world.run(world.ledger.limits.current()) == Limits()


def test_every_limit_can_be_set_and_taken_away(world: World) -> None:
    days_first = sorted(LIMITS, key=lambda name: not name.endswith("_days"))
    world.limit(**dict.fromkeys(days_first, 7))
    assert world.run(world.ledger.limits.current()) == Limits(**dict.fromkeys(LIMITS, 7))
    world.limit(**dict.fromkeys(reversed(days_first), None))
    assert world.run(world.ledger.limits.current()) == Limits()


def test_a_cancelled_refund_is_never_sent_and_the_source_learns_it(world: World) -> None:
    world.limit(largest_refund=1)
    held = world.approve(amount=2)
    world.pull()
    world.release()
    world.limit(largest_refund=None)
    approved = world.approve()
    world.pull()
    for ref in (held, approved):
        world.run(
            Ledger(world.ledger.engine, world.settings, actor="erin").decisions.cancel(
                world.row(ref)["id"], "Paid by hand."
            )
        )
    assert world.release("run-2") == []
    world.write_back()
    assert {world.source_row(ref)["status"] for ref in (held, approved)} == {"cancelled"}
    world.pull()
    assert world.release("run-3") == []


def test_a_refund_that_may_have_been_sent_can_not_be_cancelled(world: World) -> None:
    refund_id = world.released()
    world.send(refund_id)
    with pytest.raises(DecisionRefused, match="is accepted; only one that was not sent yet is cancelled"):
        world.run(world.ledger.decisions.cancel(refund_id, "Too late."))


# -- the approval of a run -------------------------------------------------------------------------------------------------


def begin(world: World, run_id: str, *refs: str) -> tuple[Any, list[int]]:
    """Begin a run with these refunds, and return its question and its candidates."""

    async def work() -> tuple[Any, list[int]]:
        ids = await _pulled(world, run_id, *refs)
        return await world.ledger.approvals.ask_approval(run_id), ids

    return world.run(work())


async def _pulled(world: World, run_id: str, *refs: str) -> list[int]:
    candidates = await world.ledger.runs.candidates(Selection(source_refs=refs))
    await world.ledger.runs.begin_run(run_id, {}, candidates, {}, datetime.now(UTC))
    return [item.id for item in candidates]


def test_a_run_over_a_threshold_is_released_only_with_the_approval_of_another_person_than_who_triggered_it(
    world: World,
) -> None:
    world.limit(approval_total=8000)
    refs = [world.approve(amount=5000) for _ in range(2)]
    world.pull()
    question, ids = begin(world, "run-1", *refs)
    with pytest.raises(LedgerError, match="holds no approval"):
        world.run(world.release_only("run-1", ids))
    with pytest.raises(DecisionRefused, match="Frank triggered run run-1 and can't approve it"):
        world.run(world.ledger.approvals.record_approval("run-1", by="Frank", triggered_by="frank "))
    world.run(world.ledger.approvals.record_approval("run-1", by="frank", triggered_by="olivia"))
    assert world.run(world.ledger.approvals.ask_approval("run-1")) is None, (
        "what a person approved is not asked about again"
    )
    assert world.run(world.release_only("run-1", ids)) == ids
    assert "frank approved the run." in report(world, "run-1")
    event = world.rows("SELECT actor, detail FROM refund_ledger.refund_events WHERE event = 'approval'")[0]
    assert (event["actor"], event["detail"]["totals"]["USD"]["amount"]) == ("frank", 10_000)
    body = question.body("run-1")
    assert "| USD | 2 | 100.00 USD | 50.00 USD |" in body
    assert "Payees to whom nothing was released before: **2**" in body
    assert (
        "With this run 100.00 USD are released today without a person; more than 80.00 USD take one." in body
    )


def test_what_the_day_has_released_without_a_person_counts_for_the_threshold(world: World) -> None:
    world.limit(approval_count=2)
    one, two, three = (world.approve() for _ in range(3))
    world.pull()
    for number, ref in enumerate((one, two), start=1):
        question, ids = begin(world, f"run-{number}", ref)
        assert question is None
        world.run(world.release_only(f"run-{number}", ids))
    question, _ = begin(world, "run-3", three)
    assert (
        question.why == "With this run 3 refunds are released today without a person; more than 2 take one."
    )
    world.run(world.ledger.approvals.record_approval("run-3", by="frank", triggered_by=None))
    four = world.approve()
    world.pull()
    assert begin(world, "run-4", four)[0] is not None


def test_two_runs_that_were_let_pass_side_by_side_are_not_both_released(world: World) -> None:
    world.limit(approval_count=1)
    one, two = world.approve(), world.approve()
    world.pull()
    (_, first), (_, second) = begin(world, "run-1", one), begin(world, "run-2", two)
    world.run(world.release_only("run-1", first))
    with pytest.raises(
        LedgerError,
        match="That was not so when run run-2 was let pass: clear approve_run, and it asks a person",
    ):
        world.run(world.release_only("run-2", second))
    assert status(world, two) == ["approved"]


def test_a_run_that_is_pulled_anew_again_and_again_does_not_slip_below_the_threshold(world: World) -> None:
    world.limit(approval_count=1)
    one = world.approve()
    world.pull()
    _, ids = begin(world, "run-1", one)
    world.run(world.release_only("run-1", ids))
    two = world.approve()
    world.pull()
    assert begin(world, "run-1", two)[0] is not None


def test_an_answer_about_other_candidates_counts_for_nothing(world: World) -> None:
    world.limit(approval_count=0)
    one, two = world.approve(), world.approve()
    world.pull()
    begin(world, "run-1", one)
    world.run(_pulled(world, "run-1", one, two))
    for answer in (
        world.ledger.approvals.record_approval("run-1", by="frank", triggered_by=None),
        world.ledger.approvals.record_rejection("run-1", by="frank"),
    ):
        with pytest.raises(LedgerError, match="has other candidates than those that frank was asked about"):
            world.run(answer)


def test_a_run_that_asked_once_does_not_ask_about_anything_else_because_airflow_would_show_the_first_question(
    world: World,
) -> None:
    world.limit(approval_count=0)
    one, two = world.approve(), world.approve()
    world.pull()
    begin(world, "run-1", one)
    with pytest.raises(LedgerError, match=r"asked a person about something else before.*trigger a new run"):
        begin(world, "run-1", one, two)
    assert begin(world, "run-1", one)[0] is not None, "the same question may be asked again"


def test_what_a_person_rejected_does_not_pass_by_itself_the_next_day_or_under_a_higher_threshold(
    world: World,
) -> None:
    world.limit(approval_count=0)
    ref = world.approve()
    world.pull()
    begin(world, "run-1", ref)
    world.run(world.ledger.approvals.record_rejection("run-1", by="frank"))
    world.limit(approval_count=None)
    question, ids = begin(world, "run-2", ref)
    assert question.why == "1 of these refunds were in a run that was rejected."
    world.run(world.ledger.approvals.record_approval("run-2", by="gina", triggered_by=None))
    assert world.run(world.release_only("run-2", ids)) == ids
    assert world.row(ref)["run_rejected_by"] is None


def test_a_rejected_run_releases_nothing_and_its_refunds_stay_approved(world: World) -> None:
    world.limit(approval_count=0)
    ref = world.approve()
    world.pull()
    _, ids = begin(world, "run-1", ref)
    world.run(world.ledger.approvals.record_rejection("run-1", by="frank"))
    with pytest.raises(LedgerError, match="holds no approval"):
        world.run(world.release_only("run-1", ids))
    assert status(world, ref) == ["approved"]
    found = world.run(run_report(world.ledger.engine, world.settings.source, "run-1"))
    assert "frank rejected the run: nothing was sent, 1 refund, 49.99 USD stay approved." in found.notes
    assert not found.unfinished


def test_a_run_that_nobody_answered_is_unfinished(world: World) -> None:
    world.limit(approval_count=0)
    world.approve()
    world.pull()
    begin(world, "run-1")
    found = world.run(run_report(world.ledger.engine, world.settings.source, "run-1"))
    assert found.unfinished == [
        "Nobody approved the run, so nothing was sent: clear approve_run to ask again."
    ]


def test_a_dry_run_shows_what_would_be_held_what_would_wait_and_that_a_person_would_be_asked(
    world: World,
) -> None:
    world.limit(largest_refund=5000, run_count=1, approval_count=0)
    for amount in (6000, 100, 200):
        world.approve(amount=amount)
    params = RunParams(dry_run=True)
    found = world.run(rehearse(params, world.source, world.ledger, world.cipher, world.settings))
    assert [(line.amount, line.status) for line in found.refunds] == [
        (6000, "would hold"),
        (100, "would send"),
        (200, "would wait"),
    ]
    assert (
        found.notes[0] == "With this run 3 refunds are released today without a person; more than 0 take one."
    )
    assert (
        world.rows("SELECT * FROM refund_ledger.refunds")
        == world.rows("SELECT * FROM refund_ledger.refund_runs")
        == []
    )
    assert world.run(world.ledger.limits.current()).largest_refund == 5000
