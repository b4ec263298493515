"""A refund that people or an answer called unpaid, and that turns up at Payroc after all: found, and not paid a second time."""

from __future__ import annotations

import json
from uuid import uuid4

import pytest

from include.payroc.errors import PayrocError
from include.refunds.case import DecisionRefused
from include.refunds.report import follow_up_report, status_report
from include.refunds.send import Sent
from tests.refunds.conftest import World
from tests.refunds.test_reissue import again, reissued, returned
from tests.refunds.test_resolve import decide, direct, lost, refusal


@pytest.fixture(autouse=True)
def terminal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a terminal of its own: Payroc remembers what other tests paid."""
    name, approve = f"66{uuid4().int % 1_000_000:06}", world.approve
    monkeypatch.setattr(
        world,
        "approve",
        lambda ending="4321", **columns: approve(ending, **({"processing_terminal_id": name} | columns)),
    )


def called_rejected(world: World) -> int:
    """Two people call a refund rejected whose attempt got no answer."""
    refund_id = lost(world)
    world.hours_ahead += 26
    assert decide(world, refund_id, "rejected", "ann") is False
    assert decide(world, refund_id, "rejected", "bob") is True
    return refund_id


def turns_up(world: World, refund_id: int, *, custom_fields: bool = True) -> None:
    """Payroc makes the refund from a request that was on its way for very long."""
    row, key = world.row(refund_id), str(uuid4())
    body = json.loads(world.cipher.open(bytes(row["request"]), row["request_sha256"], refund_id))
    if not custom_fields:
        del body["customFields"]

    async def create() -> None:
        token = await world.gateway.token()
        for _ in range(2):
            try:
                await world.gateway.create_refund(token, key, json.dumps(body).encode())
            except PayrocError:
                continue

    world.run(create())


def refused_reissue_of(world: World, refund_id: int) -> int:
    """The refund is reissued, and Payroc refuses the reissue."""
    second = reissued(world, refund_id)
    world.release("run-2")
    world.fault(second, "problem", problem="bad-request")
    assert world.send(second).sent is Sent.REJECTED
    return second


def resolved_as_accepted(world: World, refund_id: int) -> None:
    decide(world, refund_id, "accepted", "ann")
    decide(world, refund_id, "accepted", "bob")
    world.run(world.ledger.pauses.resume("*", "It is paid, and known."))


def test_a_reissue_of_a_reissue_is_refused_when_the_first_of_the_chain_is_paid(world: World) -> None:
    first = called_rejected(world)
    second = refused_reissue_of(world, first)
    turns_up(world, first)
    world.follow_up()
    resolved_as_accepted(world, first)
    with pytest.raises(DecisionRefused, match="replaces one that may be paid after all"):
        again(world, second, "ann")


def test_a_waiting_reissue_of_a_reissue_is_not_sent_when_the_first_of_the_chain_is_paid(world: World) -> None:
    first = called_rejected(world)
    third = reissued(world, refused_reissue_of(world, first))
    turns_up(world, first)
    world.follow_up()
    resolved_as_accepted(world, first)
    assert world.release("run-3") == []
    assert world.posts(third) == 0


@pytest.mark.parametrize("custom_fields", [True, False])
def test_the_follow_up_finds_a_refund_that_was_called_rejected_even_without_custom_fields(
    world: World, custom_fields: bool
) -> None:
    refund_id = called_rejected(world)
    turns_up(world, refund_id, custom_fields=custom_fields)
    world.follow_up()
    assert world.row(refund_id)["status"] == "review"
    assert list(world.paused()) == ["*"]


def test_nobody_reissues_what_payroc_holds_although_no_follow_up_has_seen_it(world: World) -> None:
    refund_id = called_rejected(world)
    turns_up(world, refund_id)
    with pytest.raises(DecisionRefused, match="may be paid after all"):
        again(world, refund_id, "ann")
    assert world.row(refund_id)["status"] == "review"


def test_a_released_reissue_asks_payroc_once_more_before_it_is_sent(world: World) -> None:
    refund_id = called_rejected(world)
    new = reissued(world, refund_id)
    world.release("run-2")
    turns_up(world, refund_id)
    world.send(new)
    assert world.posts(new) == 0
    assert world.row(refund_id)["status"] == "review"


def test_a_reissue_that_can_not_ask_is_not_sent(world: World) -> None:
    new = reissued(world, returned(world))
    world.release("run-2")
    world.fault(None, "status", "list", status=503)
    assert world.send(new).sent is Sent.BUSY
    assert world.posts(new) == 0


def test_a_reissue_that_a_restored_ledger_has_forgotten_is_found_and_not_sent_again(world: World) -> None:
    new = reissued(world, returned(world))
    # What the forgotten ledger sent: Payroc knows its refund, and no longer its key.
    turns_up(world, new)
    posts = world.posts(new)
    world.release("run-2")
    assert world.send(new).sent is Sent.ACCEPTED
    assert (world.posts(new), world.paid(new)) == (posts, 1)


def test_an_object_with_our_order_id_that_nothing_tells_from_ours_is_not_called_rejected(
    world: World,
) -> None:
    refund_id = lost(world)
    direct(world, refund_id, None, amount=4998)
    world.hours_ahead += 26
    assert "may be ours" in refusal(world, refund_id, "rejected")


def test_a_refund_that_was_adopted_without_ever_being_sent_is_reported_like_any_other(world: World) -> None:
    refund_id = world.released()
    turns_up(world, refund_id)
    world.follow_up()
    assert (world.row(refund_id)["status"], world.row(refund_id)["first_sent_at"]) == ("accepted", None)
    for report in (status_report, follow_up_report):
        assert str(world.run(report(world.ledger.engine, world.settings.source)))
