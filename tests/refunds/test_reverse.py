"""Taking an accepted refund out of the open batch."""

from __future__ import annotations

import pytest

from include.refunds.case import DecisionRefused
from include.refunds.reverse import Reversed, reverse
from tests.refunds.conftest import World
from tests.refunds.test_follow_up import paid, set_at_payroc
from tests.refunds.test_resolve import ledger_of


def undo(world: World, refund_id: int) -> Reversed:
    return world.run(
        reverse(refund_id, "wrong customer", ledger=ledger_of(world, "ann"), gateway=world.gateway)
    )


def reversals(world: World, refund_id: int) -> list[str]:
    """Return the keys under which Payroc was asked to reverse a refund."""
    wanted = world.row(refund_id)["payroc_refund_id"]
    requests = world.sandbox.get("/_sandbox/requests?operation=reverse")["requests"]
    return [entry["idempotencyKey"] for entry in requests if entry["refundId"] == wanted]


def intents(world: World, refund_id: int) -> list[tuple[str, str]]:
    query = (
        "SELECT actor, reason FROM refund_ledger.refund_events WHERE event = 'reverse' AND refund_id = :id"
    )
    return [(row["actor"], row["reason"]) for row in world.rows(query, id=refund_id)]


def test_a_refund_in_the_open_batch_is_reversed_under_a_key_of_its_own_also_while_the_sending_is_paused(
    world: World,
) -> None:
    refund_id = paid(world)
    world.run(world.ledger.pauses.pause("*", "the bank called"))
    assert undo(world, refund_id).done
    row = world.row(refund_id)
    assert (row["status"], row["payroc_status"], row["reason"]) == (
        "reversed",
        "reversal",
        "Reversed in the open batch.",
    )
    assert intents(world, refund_id) == [("ann", "wrong customer")]
    (key,) = reversals(world, refund_id)
    assert key != str(row["idempotency_key"])
    assert undo(world, refund_id).done
    assert len(reversals(world, refund_id)) == 1


@pytest.mark.parametrize("kind", ["close", "garbage", "empty"])
def test_a_reversal_whose_answer_is_lost_is_found(world: World, kind: str) -> None:
    refund_id = paid(world)
    world.fault(refund_id, kind, "reverse", when="after")
    assert undo(world, refund_id).done
    assert world.row(refund_id)["status"] == "reversed"


def test_what_can_not_be_known_is_said_and_running_it_again_uses_the_same_key(world: World) -> None:
    refund_id = paid(world)
    world.fault(refund_id, "close", "reverse", when="after")
    world.fault(refund_id, "status", "get", status=503)
    result = undo(world, refund_id)
    assert not result.done
    assert "Not known whether" in result.sentence
    assert "its state there can't be read now. Run it again" in result.sentence
    assert world.row(refund_id)["status"] == "accepted"
    assert undo(world, refund_id).done
    assert len(set(reversals(world, refund_id))) == 1


def test_a_reversal_that_payroc_did_not_process_leaves_the_refund_accepted(world: World) -> None:
    refund_id = paid(world)
    world.fault(refund_id, "problem", "reverse")
    assert "Payroc says it is 'ready'. Run it again" in undo(world, refund_id).sentence
    assert world.row(refund_id)["status"] == "accepted"


def test_a_refund_whose_batch_has_closed_is_refused_with_what_payroc_says_and_the_ledger_learns_it(
    world: World,
) -> None:
    refund_id = paid(world)
    set_at_payroc(world, refund_id, "complete")
    with pytest.raises(
        DecisionRefused, match=r"was not reversed: .*bad-request.*; Payroc says it is 'complete'\."
    ):
        undo(world, refund_id)
    assert world.row(refund_id)["status"] == "settled"


@pytest.mark.parametrize("ending", ["9005", "9001", "9013"])
def test_only_an_accepted_refund_is_reversed(world: World, ending: str) -> None:
    refund_id = world.released(ending)
    world.send(refund_id)
    with pytest.raises(DecisionRefused, match="only an accepted one, in the open batch, can be reversed"):
        undo(world, refund_id)
    assert intents(world, refund_id) == []


def test_the_intent_is_committed_before_payroc_is_asked(world: World) -> None:
    refund_id = paid(world)

    class Dying:
        def __getattr__(self, name):
            return getattr(gateway, name)

        async def reverse_refund(self, *_):
            raise KeyboardInterrupt

    gateway = world.gateway
    world.gateway = Dying()
    with pytest.raises(KeyboardInterrupt):
        undo(world, refund_id)
    assert intents(world, refund_id) == [("ann", "wrong customer")]
