"""Following refunds to their end, by reading Payroc only."""

from __future__ import annotations

from tests.refunds.conftest import World


def paid(world: World, ending: str = "4321") -> int:
    refund_id = world.released(ending)
    world.send(refund_id)
    return refund_id


def posts(world: World) -> int:
    return sum(entry["operation"] in ("create", "reverse") for entry in world.sandbox.get("/_sandbox/requests")["requests"])


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
    assert [world.row(item)["status"] for item in (reversed_id, admin_id, strange_id)] == ["reversed", "review", "review"]
    assert world.row(strange_id)["payroc_refund_id"] is not None


def test_an_unknown_refund_that_payroc_has_is_found_and_one_that_it_has_not_stays_unknown(world: World) -> None:
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
