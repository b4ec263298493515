"""Paying again what was rejected, returned or reversed: as a new refund, by two people, once."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from include.refunds.case import DecisionRefused
from include.refunds.classify import Outcome, Sighting, Verdict
from include.refunds.ledger import Selection
from include.refunds.reissue import reissue
from include.refunds.send import Sent
from include.refunds.states import Status
from tests.refunds.conftest import World
from tests.refunds.test_follow_up import paid, set_at_payroc
from tests.refunds.test_resolve import ledger_of


def again(world: World, refund_id: int, by: str) -> int | None:
    ledger, source = ledger_of(world, by), world.settings.source
    return world.run(
        reissue(
            refund_id,
            "the payee gave us time",
            ledger=ledger,
            gateway=world.gateway,
            cipher=world.cipher,
            source=source,
        )
    )


def reissued(world: World, refund_id: int) -> int:
    assert again(world, refund_id, "ann") is None
    new = again(world, refund_id, "bob")
    assert new is not None
    return new


def returned(world: World) -> int:
    refund_id = paid(world)
    set_at_payroc(world, refund_id, "complete")
    world.follow_up()
    set_at_payroc(world, refund_id, "returned")
    world.follow_up()
    assert world.row(refund_id)["status"] == "returned"
    return refund_id


COPIED = (
    "source",
    "processing_terminal_id",
    "description",
    "amount",
    "currency",
    "payee_last4",
    "payee_fingerprint",
)


def test_a_reissue_pays_the_same_payee_the_same_under_an_order_and_a_key_of_its_own(world: World) -> None:
    old = returned(world)
    new = reissued(world, old)
    before, after = world.row(old), world.row(new)
    assert {name: after[name] for name in COPIED} == {name: before[name] for name in COPIED}
    assert (after["source_ref"], after["replaces"], after["status"]) == (
        f"{before['source_ref']}/2",
        old,
        "approved",
    )
    assert (after["requested_by"], after["approved_by"]) == ("ann", "bob")
    assert after["reason"] == f"Reissue of refund {old}: the payee gave us time"
    assert after["idempotency_key"] != before["idempotency_key"]
    first, second = (
        json.loads(world.cipher.open(bytes(row["request"]), row["request_sha256"], row["id"]))
        for row in (before, after)
    )
    assert second["order"].pop("orderId") == after["order_id"] != first["order"].pop("orderId")
    assert second.pop("customFields") == [{"name": "refundKey", "value": str(after["idempotency_key"])}]
    del first["customFields"]
    assert first == second


def test_the_next_run_sends_a_reissue_although_the_source_has_no_row_of_it(world: World) -> None:
    new = reissued(world, returned(world))
    pulled = world.pull()
    assert pulled.withdrawn == {}
    candidates = world.run(world.ledger.runs.candidates(Selection(), standing=pulled.standing))
    assert [item.id for item in candidates] == [new]
    assert world.release("run-2") == [new]
    world.pull()
    assert world.send(new).sent is Sent.ACCEPTED
    assert world.paid(new) == 1


def test_the_source_shows_the_newest_of_a_chain_and_nothing_older_comes_back(world: World) -> None:
    old = returned(world)
    ref = world.row(old)["source_ref"]
    world.write_back()
    assert world.source_row(ref)["status"] == "returned"
    new = reissued(world, old)
    world.release("run-2")
    world.send(new)
    assert world.write_back() == (1, [])
    row = world.source_row(ref)
    assert (row["status"], row["payroc_refund_id"]) == ("accepted", world.row(new)["payroc_refund_id"])
    assert world.write_back() == (0, [])
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.refund_states SET updated_at = now() WHERE refund_id = {old}"
        )
    assert world.write_back() == (0, [])


def test_the_source_takes_the_news_of_a_reissue_although_the_clock_went_back(world: World) -> None:
    world.hours_ahead = 5
    old = returned(world)
    ref = world.row(old)["source_ref"]
    world.write_back()
    world.hours_ahead = 0
    reissued(world, old)
    assert world.write_back() == (1, [])
    assert world.source_row(ref)["status"] == "approved"


def test_a_reissue_may_be_reissued_and_is_numbered_on(world: World) -> None:
    first = returned(world)
    second = reissued(world, first)
    world.release("run-2")
    world.send(second)
    set_at_payroc(world, second, "reversal")
    world.follow_up()
    third = reissued(world, second)
    assert world.row(third)["source_ref"] == f"{world.row(first)['source_ref']}/3"
    world.write_back()
    assert world.source_row(world.row(first)["source_ref"])["status"] == "approved"


def test_a_reissue_takes_two_different_people(world: World) -> None:
    old = returned(world)
    assert again(world, old, "ann") is None
    with pytest.raises(DecisionRefused, match="a different person"):
        again(world, old, " Ann ")
    world.hours_ahead += 24 * 7 + 1
    assert again(world, old, "bob") is None


def test_a_refund_is_reissued_with_its_sec_code_although_a_new_row_with_it_is_refused_today(
    world: World,
) -> None:
    today, world.settings = world.settings, world.settings.model_copy(update={"allow_sec_web": True})
    old = world.released("9002", sec_code="web")
    world.send(old)
    world.settings = today
    row = world.row(reissued(world, old))
    body = json.loads(world.cipher.open(bytes(row["request"]), row["request_sha256"], row["id"]))
    assert body["refundMethod"]["secCode"] == "web"
    assert world.release("run-2") == [row["id"]]
    assert world.send(row["id"]).sent is Sent.REJECTED


def test_a_refund_is_reissued_once(world: World) -> None:
    old = returned(world)
    new = reissued(world, old)
    with pytest.raises(DecisionRefused, match=f"was reissued already, as refund {new}"):
        again(world, old, "ann")


@pytest.mark.parametrize("ending", ["4321", "9005", "9013"])
def test_only_what_ended_without_money_at_the_payee_is_reissued(world: World, ending: str) -> None:
    refund_id = world.released(ending)
    world.send(refund_id)
    with pytest.raises(DecisionRefused, match="only one that is rejected, returned or reversed is reissued"):
        again(world, refund_id, "ann")


def test_a_refund_whose_request_was_emptied_is_not_reissued(world: World) -> None:
    old = returned(world)
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.frozen_requests SET request = NULL WHERE refund_id = {old}"
        )
    with pytest.raises(DecisionRefused, match="was emptied"):
        again(world, old, "ann")


def test_a_source_ref_without_room_and_one_that_the_source_made_itself_are_refused(world: World) -> None:
    long = world.approve("9002", source_ref="x" * 199)
    short = world.approve("9002", source_ref="short")
    world.approve("9002", source_ref="short/2")
    world.pull()
    for refund_id in world.release():
        world.send(refund_id)
    with pytest.raises(DecisionRefused, match="has no room for /2"):
        again(world, int(world.row(long)["id"]), "ann")
    refund_id = int(world.row(short)["id"])
    again(world, refund_id, "ann")
    with pytest.raises(DecisionRefused, match="that the source made itself"):
        again(world, refund_id, "bob")


def test_a_reissue_is_not_sent_when_the_refund_that_it_replaces_turns_out_paid(world: World) -> None:
    old = world.released("9002")
    world.send(old)
    new = reissued(world, old)
    world.release("run-2")
    found = Verdict(
        Outcome.ACCEPTED, "Accepted by Payroc.", sighting=Sighting("FOUND00001", "ready", Status.ACCEPTED)
    )
    world.run(world.ledger.records.record(old, found))
    world.run(world.ledger.pauses.resume("*", "seen"))
    result = world.send(new)
    assert (result.sent, result.reason) == (
        Sent.NOT_RELEASED,
        f"Not sent: refund {old}, which it replaces, is review.",
    )
    assert (world.posts(new), world.row(new)["attempts"]) == (0, 0)
    assert world.run(world.ledger.runs.candidates(Selection())) == []
    assert world.release("run-3") == []


def test_a_reissue_whose_predecessor_turns_out_paid_after_the_claim_is_not_posted(world: World) -> None:
    old = world.released("9002")
    world.send(old)
    new = reissued(world, old)
    world.release("run-2")
    claim = world.ledger.claims.claim

    async def claim_then_find(*arguments, **more):
        claimed = await claim(*arguments, **more)
        with world.ledger_engine.begin() as connection:
            connection.exec_driver_sql(
                f"UPDATE refund_ledger.refund_states SET status = 'review' WHERE refund_id = {old}"
            )
        return claimed

    world.ledger.claims.claim = claim_then_find
    world.send(new)
    assert world.posts(new) == 0
    assert world.row(new)["status"] == "released"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("amount", "amount + 1"),
        ("currency", "'CAD'"),
        ("payee_fingerprint", "repeat('0', 64)"),
        ("processing_terminal_id", "'7701009'"),
        ("source", "'elsewhere'"),
    ],
)
def test_the_database_refuses_a_reissue_that_pays_something_else(
    world: World, column: str, value: str
) -> None:
    old = world.released("9002")
    world.send(old)
    with pytest.raises(DBAPIError, match="a refund pays what the one that it replaces"):
        insert(world, old, {column: value})


@pytest.mark.parametrize("ending", ["4321", "9005"])
def test_the_database_refuses_a_reissue_of_a_refund_that_may_be_paid(world: World, ending: str) -> None:
    old = world.released(ending)
    world.send(old)
    with pytest.raises(
        DBAPIError,
        match="only one that is rejected, returned or reversed, as all that it replaces, is replaced",
    ):
        insert(world, old, {})


def insert(world: World, old: int, values: dict[str, str]) -> None:
    names = ("source", "processing_terminal_id", "amount", "currency", "payee_fingerprint")
    chosen = ", ".join(values.get(name, name) for name in names)
    statement = text(f"""
        INSERT INTO refund_ledger.refund_instructions ({", ".join(names)}, source_ref, source_ref_folded,
            order_id, description, request_sha256, requested_by, requested_by_folded, approved_by,
            approved_by_folded, approved_at, idempotency_key, replaces, reissue_reason, created_at)
        SELECT {chosen}, 'new', 'new', 'new', '', request_sha256, 'a', 'a', 'b', 'b', now(),
            gen_random_uuid(), id, 'x', now()
        FROM refund_ledger.refund_instructions WHERE id = :id""")
    with world.ledger_engine.begin() as connection:
        connection.execute(statement, {"id": old})
