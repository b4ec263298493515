"""The ledger against Payroc for a range of dates."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from include.payroc.errors import PayrocError, PayrocIncompleteList
from include.payroc.models import Refund
from include.refunds.verify import Comparison, RangeError, read_range, verify
from tests.refunds.conftest import World
from tests.refunds.test_follow_up import Listing, object_of, paid, set_at_payroc
from tests.refunds.test_ledger_rules import force
from tests.refunds.test_resolve import direct

A_DAY = timedelta(days=1)
TERMINALS = iter(range(10_000))


@pytest.fixture(autouse=True)
def terminal(world: World, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give each test a terminal of its own: Payroc remembers what other tests paid."""
    name = f"88{next(TERMINALS):06}"
    approve = world.approve
    monkeypatch.setattr(
        world,
        "approve",
        lambda ending="4321", **columns: approve(ending, processing_terminal_id=name, **columns),
    )
    return name


def compare(world: World, start: datetime | None = None, end: datetime | None = None) -> Comparison:
    now = datetime.now(UTC)
    return world.run(
        verify(start or now - A_DAY, end or now + A_DAY, ledger=world.ledger, gateway=world.gateway)
    )


def sentences(world: World) -> list[str]:
    return [item.sentence for item in compare(world).differences]


def test_equal_sides_have_equal_sums_per_currency_and_status_and_no_difference(world: World) -> None:
    for ending, columns in (
        ("4321", {}),
        ("9003", {}),
        ("4321", {"currency": "CAD", "amount": 700}),
        ("9001", {}),
        ("9002", {}),
    ):
        world.send(world.released(ending, **columns))
    world.hours_ahead += 0.1
    world.follow_up()
    found = compare(world)
    assert found.differences == []
    sums = {
        key: (item.ledger_count, item.ledger_amount, item.payroc_count, item.payroc_amount)
        for key, item in found.sums.items()
    }
    assert sums == {
        ("USD", "accepted"): (2, 9998, 2, 9998),
        ("CAD", "accepted"): (1, 700, 1, 700),
        # Of the two that were rejected only the one that the bank declined is an object.
        ("USD", "rejected"): (2, 9998, 1, 4999),
    }


def test_a_refund_at_payroc_that_the_ledger_does_not_have_is_named(world: World) -> None:
    refund_id = paid(world)
    found = direct(world, refund_id, orderId="lost")
    assert sentences(world) == [
        f"Payroc's refund {found} (order lost) carries a key of ours that the ledger does not have."
    ]


def test_a_ledger_that_was_lost_is_told_which_terminals_to_ask_for(world: World, terminal: str) -> None:
    found = paid(world)
    payroc_refund_id = world.row(found)["payroc_refund_id"]
    world.lose_the_ledger()
    now = datetime.now(UTC)

    def differences(*terminals: str) -> list[str | None]:
        work = verify(
            now - A_DAY, now + A_DAY, terminals=terminals, ledger=world.ledger, gateway=world.gateway
        )
        return [item.payroc_refund_id for item in world.run(work).differences]

    assert differences() == []
    assert differences(terminal) == [payroc_refund_id]


def test_a_refund_that_was_made_elsewhere_is_counted_and_no_difference(world: World) -> None:
    refund_id = paid(world)
    direct(world, refund_id, fields=None, orderId="portal", amount=123)
    found = compare(world)
    assert found.differences == []
    assert (found.elsewhere["USD"].payroc_count, found.elsewhere["USD"].payroc_amount) == (1, 123)


def test_a_paid_refund_that_payroc_does_not_have_is_named(world: World) -> None:
    refund_id = world.released()
    sent = "attempts = 1, first_sent_at = now(), sent_with = 'x'"
    force(
        world,
        refund_id,
        f"status = 'accepted', {sent}, payroc_refund_id = 'NOSUCH0001', payroc_status = 'ready'",
    )
    (sentence,) = sentences(world)
    assert sentence.endswith("is accepted here, and Payroc does not have it.")


def test_another_status_is_named(world: World) -> None:
    refund_id = paid(world)
    set_at_payroc(world, refund_id, "complete")
    (sentence,) = sentences(world)
    assert f"Refund {refund_id} " in sentence
    assert "is accepted here and 'complete' at Payroc" in sentence


def test_another_amount_is_named(world: World) -> None:
    refund_id = paid(world)
    force(world, refund_id, "amount = amount + 1")
    (sentence,) = sentences(world)
    assert "in amount, authorized amount" in sentence


def test_two_objects_under_one_key_are_named_once(world: World) -> None:
    refund_id = paid(world)
    second = object_of(world, refund_id, "SECOND0001")
    world.gateway = Listing(world, lambda listed: [second, *listed, second])
    (sentence,) = sentences(world)
    assert f"has two objects at Payroc: {world.row(refund_id)['payroc_refund_id']} and SECOND0001" in sentence


@pytest.mark.parametrize("status", ["unknown", "rejected", "review"])
def test_a_refund_that_payroc_has_and_that_is_not_paid_here_is_named(world: World, status: str) -> None:
    refund_id = paid(world)
    force(
        world,
        refund_id,
        f"status = '{status}', payroc_refund_id = NULL, payroc_status = NULL, lease_until = now(), next_attempt_at = now()",
    )
    (sentence,) = sentences(world)
    assert f"is {status} here and 'ready' at Payroc" in sentence


def test_an_object_without_custom_fields_is_matched_by_all_else(world: World) -> None:
    refund_id = world.released("9005")
    world.send(refund_id)
    bare = json.loads(object_of(world, refund_id, "BARE000001").model_dump_json(by_alias=True))
    bare["customFields"] = None
    item = Refund.model_validate_json(json.dumps(bare))
    world.gateway = Listing(world, lambda listed: [*listed, item])
    (sentence,) = sentences(world)
    assert "is unknown here and 'ready' at Payroc (refund BARE000001)" in sentence


@pytest.mark.parametrize("hours", [-20, 20])
def test_a_refund_and_its_object_may_lie_on_different_sides_of_midnight(world: World, hours: int) -> None:
    refund_id = paid(world)
    first_sent_at = world.row(refund_id)["first_sent_at"] + timedelta(hours=hours)
    force(world, refund_id, f"first_sent_at = '{first_sent_at.isoformat()}'")
    start = first_sent_at - timedelta(hours=1)
    found = compare(world, start, start + timedelta(hours=2))
    assert found.differences == []
    assert found.sums[("USD", "accepted")].payroc_count == found.sums[("USD", "accepted")].ledger_count == 1
    now = datetime.now(UTC)
    elsewhere = compare(world, now - timedelta(minutes=5), now + timedelta(minutes=5))
    assert (elsewhere.sums, elsewhere.differences) == ({}, [])


def test_a_refund_that_was_made_days_after_its_first_post_is_asked_for_by_itself(world: World) -> None:
    refund_id = paid(world)
    force(world, refund_id, "first_sent_at = now() - interval '5 days'")
    start = datetime.now(UTC) - 6 * A_DAY
    assert compare(world, start, start + 2 * A_DAY).differences == []


def test_an_object_that_can_not_be_understood_is_a_difference(world: World, terminal: str) -> None:
    paid(world)

    class Odd(Listing):
        async def list_refunds(self, token, **filters):
            async for item in self._gateway.list_refunds(token, **filters):
                yield item
            raise PayrocIncompleteList("list refunds", 2, ["order SO-1"])

    world.gateway = Odd(world, None)
    assert sentences(world) == [
        f"Payroc lists 2 objects (order SO-1, 1 more) of terminal {terminal} that can't be understood."
    ]


def test_without_payrocs_list_nothing_is_compared(world: World) -> None:
    paid(world)
    world.fault(None, "status", "list", status=503)
    with pytest.raises(PayrocError):
        compare(world)


def test_it_only_reads(world: World) -> None:
    refund_id = paid(world)
    set_at_payroc(world, refund_id, "complete")
    before = world.row(refund_id)
    requests = len(world.sandbox.get("/_sandbox/requests?operation=create")["requests"])
    compare(world)
    assert world.row(refund_id) == before
    assert len(world.sandbox.get("/_sandbox/requests?operation=create")["requests"]) == requests


def test_dates_are_days_in_utc_and_instants_have_a_zone() -> None:
    assert read_range("2026-11-01", "2026-11-30") == (
        datetime(2026, 11, 1, tzinfo=UTC),
        datetime(2026, 12, 1, tzinfo=UTC),
    )
    start, end = read_range("2026-11-01T00:00-05:00", "2026-11-02T00:00Z")
    assert (start, end) == (datetime(2026, 11, 1, 5, tzinfo=UTC), datetime(2026, 11, 2, tzinfo=UTC))


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("2026-11-02", "2026-11-01"),
        ("yesterday", "2026-11-01"),
        ("2026-11-01T00:00", "2026-11-02"),
        ("2026-11-01", "9999-12-31"),
    ],
)
def test_a_range_that_can_not_be_used_is_refused(first: str, last: str) -> None:
    with pytest.raises(RangeError):
        read_range(first, last)
