"""Following refunds to their end, by reading Payroc only."""

from __future__ import annotations

import json
from typing import Any

import pytest

from include.payroc.errors import PayrocIncompleteList
from include.payroc.models import Refund
from include.refunds.classify import Outcome, Sighting, Verdict
from include.refunds.ledger import Task
from include.refunds.states import Status
from tests.refunds.conftest import World
from tests.refunds.test_ledger_rules import force


def paid(world: World, ending: str = "4321") -> int:
    refund_id = world.released(ending)
    world.send(refund_id)
    return refund_id


def posts(world: World) -> int:
    return sum(
        entry["operation"] in ("create", "reverse")
        for entry in world.sandbox.get("/_sandbox/requests")["requests"]
    )


def set_at_payroc(world: World, refund_id: int, status: str) -> None:
    world.sandbox.patch(f"/_sandbox/refunds/{world.row(refund_id)['payroc_refund_id']}", {"status": status})


def test_an_accepted_refund_is_followed_to_settled_and_to_returned(world: World) -> None:
    refund_id = paid(world)
    set_at_payroc(world, refund_id, "complete")
    assert world.follow_up()["changed"] == 1
    assert world.row(refund_id)["status"] == "settled"
    set_at_payroc(world, refund_id, "returned")
    world.follow_up()
    row = world.row(refund_id)
    assert (row["status"], row["reason"]) == ("returned", "Returned by the bank.")


def test_a_reversed_refund_and_one_under_review_at_payroc_are_seen(world: World) -> None:
    reversed_id, admin_id, strange_id = paid(world), paid(world), paid(world)
    set_at_payroc(world, reversed_id, "reversal")
    set_at_payroc(world, admin_id, "admin")
    set_at_payroc(world, strange_id, "somethingNew")
    world.follow_up()
    assert [world.row(item)["status"] for item in (reversed_id, admin_id, strange_id)] == [
        "reversed",
        "review",
        "review",
    ]
    assert world.row(strange_id)["payroc_refund_id"] is not None


def test_an_unknown_refund_that_payroc_has_is_found_and_one_that_it_has_not_stays_unknown(
    world: World,
) -> None:
    there, not_there = paid(world, "9006"), paid(world, "9005")
    counts = world.follow_up()
    assert (counts["looked up"], counts["found"]) == (2, 1)
    assert [world.row(item)["status"] for item in (there, not_there)] == ["accepted", "unknown"]


def test_it_never_posts(world: World) -> None:
    paid(world, "9005")
    paid(world)
    before = posts(world)
    world.hours_ahead += 1
    world.follow_up()
    assert posts(world) == before


def test_an_older_word_of_a_lagging_list_changes_nothing(world: World) -> None:
    refund_id = paid(world)
    set_at_payroc(world, refund_id, "complete")
    world.follow_up()
    set_at_payroc(world, refund_id, "ready")
    world.follow_up()
    assert world.row(refund_id)["status"] == "settled"
    assert world.paused() == {}


def test_a_release_that_nobody_used_is_taken_back(world: World) -> None:
    refund_id = world.released()
    world.hours_ahead += 25
    assert world.follow_up()["returned to approved"] == 1
    assert world.row(refund_id)["status"] == "approved"


def test_a_terminal_that_can_not_be_listed_does_not_hinder_the_others(world: World) -> None:
    one = paid(world)
    other = world.released(processing_terminal_id="7701002")
    world.send(other)
    for item in (one, other):
        set_at_payroc(world, item, "complete")
    world.fault(None, "status", "list", status=503)
    counts = world.follow_up()
    assert (counts["failed"], counts["changed"]) == (1, 1)


def test_all_pages_of_the_list_are_read(world: World) -> None:
    ids = [paid(world) for _ in range(4)]
    for item in ids:
        set_at_payroc(world, item, "complete")

    class SmallPages:
        def __getattr__(self, name):
            return getattr(world_gateway, name)

        async def list_refunds(self, token, *, processing_terminal_id, **_):
            hook = world_gateway._hook
            for refund in hook.list_refunds(processing_terminal_id, page_size=1, token=token):
                yield refund

    world_gateway = world.gateway
    world.gateway = SmallPages()
    world.follow_up()
    assert {world.row(item)["status"] for item in ids} == {"settled"}


def test_a_settled_refund_that_payroc_calls_reversed_is_a_contradiction(world: World) -> None:
    refund_id = paid(world)
    set_at_payroc(world, refund_id, "complete")
    world.follow_up()
    set_at_payroc(world, refund_id, "reversal")
    world.follow_up()
    assert (world.row(refund_id)["status"], list(world.paused())) == ("review", ["*"])


def test_a_refund_without_news_is_only_noted_as_seen(world: World) -> None:
    refund_id = paid(world)
    before = world.row(refund_id)
    world.hours_ahead += 1
    assert world.follow_up().get("changed", 0) == 0
    after = world.row(refund_id)
    assert after["payroc_seen_at"] > before["payroc_seen_at"]
    assert after | {"payroc_seen_at": None} == before | {"payroc_seen_at": None}


class Listing:
    """
    The gateway, with objects of our making in what it lists.

    :param objects: changes what a list yields.
    """

    def __init__(self, world: World, objects) -> None:
        self._gateway, self._objects = world.gateway, objects
        self.environment, self.sent_with = world.gateway.environment, world.gateway.sent_with

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gateway, name)

    async def list_refunds(self, token, **filters):
        listed = [item async for item in self._gateway.list_refunds(token, **filters)]
        for item in self._objects(listed):
            yield item


def object_of(world: World, refund_id: int, payroc_refund_id: str, **changes: Any) -> Refund:
    """Return an object with the key of a refund, as Payroc would list it."""
    row = world.row(refund_id)
    result = {
        "type": "unreferencedRefund",
        "status": "ready",
        "responseCode": "A",
        "authorizedAmount": -row["amount"],
    }
    shown = {
        "refundId": payroc_refund_id,
        "processingTerminalId": row["processing_terminal_id"],
        "order": {"orderId": row["order_id"], "amount": row["amount"], "currency": row["currency"]},
        "transactionResult": result | changes,
        "customFields": [{"name": "refundKey", "value": str(row["idempotency_key"])}],
    }
    return Refund.model_validate_json(json.dumps(shown))


def contradictions(world: World) -> int:
    return len(world.rows("SELECT 1 FROM refund_ledger.refund_events WHERE event = 'contradiction'"))


def test_a_second_object_for_one_key_is_a_contradiction_that_is_told_once(world: World) -> None:
    refund_id = paid(world)
    second = object_of(world, refund_id, "SECOND0001")
    world.gateway = Listing(world, lambda listed: [*listed, second])
    world.follow_up()
    row = world.row(refund_id)
    assert (row["status"], row["reason"]) == (
        "review",
        "Payroc's refund SECOND0001 does not belong to this row.",
    )
    assert list(world.paused()) == ["*"]
    world.run(world.ledger.pauses.resume("*", "seen"))
    world.follow_up()
    assert (contradictions(world), world.paused()) == (1, {})


@pytest.mark.parametrize("status", ["rejected", "cancelled"])
def test_an_object_for_a_refund_that_was_not_paid_here_takes_it_to_review_and_pauses(
    world: World, status: str
) -> None:
    refund_id = world.released("9002")
    if status == "rejected":
        world.send(refund_id)
    else:
        with world.ledger_engine.begin() as connection:
            for step in ("approved", status):
                connection.exec_driver_sql(
                    f"UPDATE refund_ledger.refund_states SET status = '{step}' WHERE refund_id = {refund_id}"
                )
    assert world.row(refund_id)["status"] == status
    found = object_of(world, refund_id, "FOUND00001")
    world.gateway = Listing(world, lambda listed: [*listed, found])
    world.follow_up()
    row = world.row(refund_id)
    assert (row["status"], row["payroc_refund_id"], list(world.paused())) == ("review", "FOUND00001", ["*"])


@pytest.mark.parametrize("word", ["ready", "admin", "somethingNew"])
def test_what_people_resolved_is_not_thrown_back_by_an_object_that_says_the_same_as_before(
    world: World, word: str
) -> None:
    refund_id = world.released()
    world.send(refund_id)
    world.run(
        world.ledger.records.record(
            refund_id, Verdict(Outcome.REVIEW, "Admin.", sighting=sighting_of(world, refund_id, word))
        )
    )
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.refund_states SET status = 'accepted' WHERE refund_id = {refund_id}"
        )
    set_at_payroc(world, refund_id, word)
    assert world.follow_up()["followed"] == 1
    assert (world.row(refund_id)["status"], contradictions(world)) == ("accepted", 0)


def sighting_of(world: World, refund_id: int, word: str) -> Sighting:
    return Sighting(world.row(refund_id)["payroc_refund_id"], word, Status.REVIEW)


def test_an_object_that_can_not_be_understood_hides_no_other_and_fails_nothing(world: World) -> None:
    refund_id = paid(world)
    set_at_payroc(world, refund_id, "complete")

    class Odd(Listing):
        async def list_refunds(self, token, **filters):
            async for item in self._gateway.list_refunds(token, **filters):
                yield item
            raise PayrocIncompleteList("list refunds", 1, ["order SO-1"])

    world.gateway = Odd(world, None)
    counts = world.follow_up()
    assert (counts["changed"], counts["not understood"], counts.get("failed", 0)) == (1, 1, 0)
    assert world.row(refund_id)["status"] == "settled"


def test_a_list_with_an_object_that_can_not_be_understood_proves_no_absence(world: World) -> None:
    refund_id = paid(world, "9005")

    class Odd(Listing):
        async def list_refunds(self, token, **filters):
            async for item in self._gateway.list_refunds(token, **filters):
                yield item
            raise PayrocIncompleteList("list refunds", 1, ["order SO-1"])

    world.gateway = Odd(world, None)
    world.hours_ahead += 24 * 7
    world.follow_up()
    assert world.row(refund_id)["status"] == "unknown"


def test_a_refund_whose_key_may_no_longer_be_sent_and_that_payroc_does_not_list_goes_to_people(
    world: World,
) -> None:
    refund_id = paid(world, "9005")
    world.hours_ahead += 24 * 7
    world.follow_up()
    row = world.row(refund_id)
    assert (row["status"], row["reason"]) == (
        "review",
        "Its key may no longer be sent again, and Payroc lists no refund with it.",
    )


def test_nothing_enters_review_by_the_passing_of_time_while_a_lease_lives(world: World) -> None:
    refund_id = world.released()
    world.run(claimed(world, refund_id))
    force(world, refund_id, "lease_until = now() + interval '8 days'")
    world.hours_ahead += 24 * 7
    world.follow_up()
    assert world.row(refund_id)["status"] == "sending"
    world.hours_ahead += 48
    world.follow_up()
    assert world.row(refund_id)["status"] == "review"


async def claimed(world: World, refund_id: int) -> None:
    gateway = world.gateway
    claim = await world.ledger.claims.claim(
        refund_id,
        Task("run-1"),
        environment=gateway.environment,
        sent_with=gateway.sent_with,
        token_seconds=3600,
    )
    assert claim is not None
    assert await world.ledger.claims.may_post(claim, 60.0)


def test_a_settled_refund_is_followed_for_twelve_business_days(world: World) -> None:
    early, late = paid(world), paid(world)
    for item in (early, late):
        set_at_payroc(world, item, "complete")
    world.follow_up()
    world.hours_ahead += 24 * 14
    set_at_payroc(world, early, "returned")
    world.follow_up()
    assert world.row(early)["status"] == "returned"
    world.hours_ahead += 24 * 14 + 24 * 5
    set_at_payroc(world, late, "returned")
    world.follow_up()
    assert world.row(late)["status"] == "settled"
