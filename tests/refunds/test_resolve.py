"""People end a review: what is refused, what takes two of them, and what the row is afterwards."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest

from include.refunds.case import DecisionRefused
from include.refunds.classify import Outcome, Sighting, Verdict
from include.refunds.ledger import Ledger, Task
from include.refunds.resolve import Resolution, resolve
from include.refunds.states import Status
from tests.refunds.conftest import World
from tests.refunds.test_follow_up import Listing, object_of, set_at_payroc

DAY = 24
OTHER_KEY = [{"name": "refundKey", "value": "8e03978e-40d5-43e8-bc93-6894a57f9324"}]


def ledger_of(world: World, person: str) -> Ledger:
    return Ledger(world.ledger.engine, world.settings, actor=person)


def decide(
    world: World,
    refund_id: int,
    outcome: str,
    by: str = "ann",
    payroc_refund_id: str | None = None,
    reason: str = "seen",
) -> bool:
    work = resolve(
        refund_id,
        Status(outcome),
        reason,
        payroc_refund_id=payroc_refund_id,
        ledger=ledger_of(world, by),
        gateway=world.gateway,
    )
    return world.run(work)[1]


def refusal(world: World, refund_id: int, outcome: str, by: str = "ann", **more: Any) -> str:
    before = world.row(refund_id)
    with pytest.raises(DecisionRefused) as caught:
        decide(world, refund_id, outcome, by, **more)
    assert world.row(refund_id) == before
    return str(caught.value)


def proposals(world: World, refund_id: int) -> list[tuple[str, dict[str, str]]]:
    query = "SELECT actor, detail FROM refund_ledger.refund_events WHERE event = 'proposal' AND refund_id = :id ORDER BY id"
    return [(row["actor"], row["detail"]) for row in world.rows(query, id=refund_id)]


def lost(world: World) -> int:
    """Return a refund in review that may have been paid, and that Payroc does not list."""
    refund_id = world.released("9005")
    world.send(refund_id)
    world.hours_ahead += 7 * DAY
    world.follow_up()
    assert world.row(refund_id)["status"] == "review"
    return refund_id


def odd(world: World) -> int:
    """Return a refund in review whose object at Payroc is under review there."""
    refund_id = world.released("9013")
    world.send(refund_id)
    assert world.row(refund_id)["status"] == "review"
    return refund_id


def harmless(world: World) -> int:
    """Return a refund in review of which nothing was ever sent."""
    refund_id = world.released()
    with world.ledger_engine.begin() as connection:
        for status in ("approved", "review"):
            connection.exec_driver_sql(
                f"UPDATE refund_ledger.refund_states SET status = '{status}' WHERE refund_id = {refund_id}"
            )
    return refund_id


def direct(
    world: World, refund_id: int, fields: list[dict[str, str]] | None = OTHER_KEY, **changes: Any
) -> str:
    """
    Make a refund at Payroc past the ledger, and return its id.

    :param fields: its custom fields.
    :param changes: of its order.
    """
    row = world.row(refund_id)
    body = {
        "processingTerminalId": row["processing_terminal_id"],
        "order": {
            "orderId": row["order_id"],
            "description": "by hand",
            "amount": row["amount"],
            "currency": "USD",
        },
        "refundMethod": {
            "type": "ach",
            "secCode": "ppd",
            "accountType": "checking",
            "nameOnAccount": "Somebody",
            "accountNumber": "5566770001",
            "routingNumber": "053200983",
        },
    }
    body["order"] |= changes
    if fields is not None:
        body["customFields"] = fields

    async def create() -> str:
        token = await world.gateway.token()
        found = await world.gateway.create_refund(token, str(uuid.uuid4()), json.dumps(body).encode())
        return found.refund_id

    return world.run(create())


# --- one person, two people -----------------------------------------------------------------------------------------------


def test_when_nothing_can_have_moved_one_person_rejects(world: World) -> None:
    refund_id = harmless(world)
    assert decide(world, refund_id, "rejected", reason="withdrawn") is True
    row = world.row(refund_id)
    assert (row["status"], row["reason"], proposals(world, refund_id)) == (
        "rejected",
        "Resolved by ann: withdrawn",
        [],
    )


def test_when_money_may_have_moved_it_takes_two_different_people(world: World) -> None:
    refund_id = lost(world)
    assert decide(world, refund_id, "rejected", "ann") is False
    assert world.row(refund_id)["status"] == "review"
    assert proposals(world, refund_id) == [("ann", {"resolve": "rejected"})]
    for same in ("ann", "  ANN "):
        assert "a different person has to run the same command" in refusal(world, refund_id, "rejected", same)
    assert decide(world, refund_id, "rejected", "bob", reason="the bank knows nothing") is True
    row = world.row(refund_id)
    assert (row["status"], row["reason"]) == ("rejected", "Resolved by ann and bob: the bank knows nothing")


def test_the_opposite_decision_replaces_a_proposal(world: World) -> None:
    refund_id = lost(world)
    assert decide(world, refund_id, "rejected", "ann") is False
    opposite = Resolution(Status.ACCEPTED)
    case = world.run(world.ledger.decisions.case(refund_id))
    assert world.run(ledger_of(world, "bob").decisions.resolve(case, opposite, "paid by hand")) is False
    assert decide(world, refund_id, "rejected", "carl") is False
    assert [who for who, _ in proposals(world, refund_id)] == ["ann", "bob", "carl"]


def test_a_proposal_counts_for_seven_days(world: World) -> None:
    refund_id = lost(world)
    decide(world, refund_id, "rejected", "ann")
    world.hours_ahead += 7 * DAY + 1
    assert decide(world, refund_id, "rejected", "bob") is False
    assert decide(world, refund_id, "rejected", "ann") is True


def test_a_proposal_counts_in_the_review_that_it_was_made_in_only(world: World) -> None:
    refund_id = odd(world)
    decide(world, refund_id, "accepted", "ann")
    with world.ledger_engine.begin() as connection:
        for status in ("accepted", "review"):
            connection.exec_driver_sql(
                f"UPDATE refund_ledger.refund_states SET status = '{status}' WHERE refund_id = {refund_id}"
            )
    assert decide(world, refund_id, "accepted", "bob") is False


# --- rejected ----------------------------------------------------------------------------------------------------------------


def test_rejected_is_refused_when_payroc_holds_the_refund(world: World) -> None:
    refund_id = odd(world)
    world.hours_ahead += 2 * DAY
    assert "so it is not rejected" in refusal(world, refund_id, "rejected")


def test_rejected_is_refused_when_payroc_lists_a_refund_that_the_row_does_not_know_yet(world: World) -> None:
    refund_id = lost(world)
    found = object_of(world, refund_id, "FOUND00001")
    world.gateway = Listing(world, lambda listed: [*listed, found])
    assert "Payroc holds a refund of ours, so it is not rejected" in refusal(world, refund_id, "rejected")


def test_rejected_is_refused_when_a_lagging_list_lacks_the_refund_that_the_row_knows(world: World) -> None:
    refund_id = odd(world)
    world.hours_ahead += 2 * DAY
    world.gateway = Listing(world, lambda listed: [])
    known = world.row(refund_id)["payroc_refund_id"]
    assert f"Payroc holds refund {known} of it ('admin'), so it is not rejected" in refusal(
        world, refund_id, "rejected"
    )


def test_rejected_is_allowed_when_payrocs_object_is_declined(world: World) -> None:
    refund_id = odd(world)
    set_at_payroc(world, refund_id, "declined")
    world.hours_ahead += 2 * DAY
    assert [decide(world, refund_id, "rejected", who) for who in ("ann", "bob")] == [False, True]
    row = world.row(refund_id)
    assert (row["status"], row["payroc_status"]) == ("rejected", "declined")


def test_rejected_is_refused_for_a_day_after_an_attempt_that_may_have_moved_money(world: World) -> None:
    refund_id = world.released("9014")
    world.send(refund_id)
    assert world.row(refund_id)["status"] == "review"
    assert "may have been sent less than 24 hours ago, and Payroc's list may lag" in refusal(
        world, refund_id, "rejected"
    )
    world.hours_ahead += 24
    assert decide(world, refund_id, "rejected") is False


def test_rejected_is_refused_when_payroc_does_not_answer(world: World) -> None:
    refund_id = lost(world)
    world.fault(None, "status", "list", status=503)
    assert "is not known; nothing was changed" in refusal(world, refund_id, "rejected")


def test_a_foreign_object_with_our_order_id_is_no_hit_and_is_named(world: World) -> None:
    refund_id = lost(world)
    found = direct(world, refund_id)
    for who in ("ann", "bob"):
        decide(world, refund_id, "rejected", who)
    row = world.row(refund_id)
    assert row["status"] == "rejected"
    assert row["reason"].endswith(f"Payroc holds another refund with our order id: {found}.")
    assert row["payroc_refund_id"] is None


# --- accepted ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("admin", "accepted"),
        ("ready", "accepted"),
        ("somethingNew", "accepted"),
        ("complete", "settled"),
        ("returned", "returned"),
        ("reversal", "reversed"),
    ],
)
def test_accepted_takes_payrocs_present_status(world: World, word: str, status: str) -> None:
    refund_id = odd(world)
    set_at_payroc(world, refund_id, word)
    assert [decide(world, refund_id, "accepted", who) for who in ("ann", "bob")] == [False, True]
    row = world.row(refund_id)
    assert (row["status"], row["payroc_status"]) == (status, word)
    assert world.follow_up().get("changed", 0) == 0


def test_accepted_is_refused_when_payroc_says_declined(world: World) -> None:
    refund_id = odd(world)
    set_at_payroc(world, refund_id, "declined")
    assert "is declined, so it is not accepted" in refusal(world, refund_id, "accepted")


def test_accepted_without_an_object_is_refused(world: World) -> None:
    assert "give it with --payroc-refund-id" in refusal(world, lost(world), "accepted")


def test_accepted_with_an_id_that_payroc_does_not_know_is_refused(world: World) -> None:
    assert "nothing was changed" in refusal(world, lost(world), "accepted", payroc_refund_id="NOSUCH0001")


def test_accepted_with_the_refund_of_another_order_is_refused(world: World) -> None:
    refund_id = lost(world)
    other = direct(world, refund_id, orderId="another order")
    assert "has another order id or terminal" in refusal(world, refund_id, "accepted", payroc_refund_id=other)


def test_accepted_with_a_refund_that_carries_another_key_is_refused(world: World) -> None:
    refund_id = lost(world)
    found = direct(world, refund_id)
    assert "carries the key of another refund" in refusal(
        world, refund_id, "accepted", payroc_refund_id=found
    )


def test_accepted_with_a_refund_that_people_found_adopts_it(world: World) -> None:
    refund_id = lost(world)
    found = direct(world, refund_id, fields=None)
    assert [decide(world, refund_id, "accepted", who, payroc_refund_id=found) for who in ("ann", "bob")] == [
        False,
        True,
    ]
    row = world.row(refund_id)
    assert (row["status"], row["payroc_refund_id"], row["payroc_status"]) == ("accepted", found, "ready")


def test_accepted_with_another_id_than_the_known_one_is_refused(world: World) -> None:
    refund_id = odd(world)
    other = direct(world, refund_id)
    known = world.row(refund_id)["payroc_refund_id"]
    assert f"is Payroc's refund {known}, not {other}" in refusal(
        world, refund_id, "accepted", payroc_refund_id=other
    )


def test_a_refund_id_that_stands_at_another_refund_is_refused(world: World) -> None:
    refund_id, other = odd(world), odd(world)
    row = world.row(other)
    case = world.run(world.ledger.decisions.case(refund_id))
    stolen = Resolution(Status.ACCEPTED, Sighting(row["payroc_refund_id"], "ready", Status.ACCEPTED))
    with pytest.raises(DecisionRefused, match="stands at another refund of the ledger"):
        world.run(world.ledger.decisions.resolve(case, stolen, "mine"))


# --- when people may not decide ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["accepted", "rejected"])
def test_only_a_review_is_resolved(world: World, outcome: str) -> None:
    refund_id = world.released()
    assert "is released, not in review" in refusal(world, refund_id, outcome)


async def claim(world: World, refund_id: int) -> int:
    gateway = world.gateway
    found = await world.ledger.claims.claim(
        refund_id,
        Task("run-1"),
        environment=gateway.environment,
        sent_with=gateway.sent_with,
        token_seconds=3600,
    )
    assert found is not None
    assert await world.ledger.claims.may_post(found, 60.0)
    return found.attempt


def test_nobody_decides_while_a_lease_lives_and_the_attempts_own_record_ends_it(world: World) -> None:
    refund_id = world.released()
    attempt = world.run(claim(world, refund_id))
    two = Verdict(Outcome.REVIEW, "Payroc holds more than one refund of ours.", contradiction=True)
    world.run(world.ledger.records.record(refund_id, two))
    assert world.row(refund_id)["status"] == "review"
    assert "may still be under way until" in refusal(world, refund_id, "rejected")
    world.run(world.ledger.records.record(refund_id, Verdict(Outcome.UNKNOWN, "No answer."), attempt))
    assert world.row(refund_id)["lease_until"] is None
    assert "Payroc's list may lag" in refusal(world, refund_id, "rejected")


def test_a_lease_that_has_ended_hinders_nobody(world: World) -> None:
    refund_id = world.released()
    world.run(claim(world, refund_id))
    world.run(world.ledger.records.record(refund_id, Verdict(Outcome.REVIEW, "Two.", contradiction=True)))
    # An hour for the token, ten minutes more for the lease, and the day in which a list may lag.
    world.hours_ahead += 25
    assert "may have been sent less than 24 hours ago" in refusal(world, refund_id, "rejected")
    world.hours_ahead += 0.25
    assert decide(world, refund_id, "rejected") is False


def test_a_refund_that_changed_while_payroc_was_asked_is_not_resolved(world: World) -> None:
    refund_id = lost(world)

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(gateway, name)

        async def list_refunds(self, token, **filters):
            with world.ledger_engine.begin() as connection:
                connection.exec_driver_sql(
                    f"UPDATE refund_ledger.refund_states SET payroc_status = 'ready' WHERE refund_id = {refund_id}"
                )
            async for item in gateway.list_refunds(token, **filters):
                yield item

    gateway = world.gateway
    world.gateway = Slow()
    with pytest.raises(DecisionRefused, match="has changed while Payroc was asked"):
        decide(world, refund_id, "rejected")
    assert world.row(refund_id)["status"] == "review"


def test_two_people_at_the_same_moment_carry_it_out_once(world: World) -> None:
    refund_id = lost(world)
    decide(world, refund_id, "rejected", "ann")

    async def both() -> list[Any]:
        works = (
            resolve(
                refund_id,
                Status.REJECTED,
                "seen",
                payroc_refund_id=None,
                ledger=ledger_of(world, who),
                gateway=world.gateway,
            )
            for who in ("bob", "carl")
        )
        return await asyncio.gather(*works, return_exceptions=True)

    results = world.run(both())
    assert sum(isinstance(item, DecisionRefused) for item in results) == 1
    assert world.row(refund_id)["status"] == "rejected"
