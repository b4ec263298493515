"""What the database itself refuses, whoever asks."""

from __future__ import annotations

from itertools import product

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from include.refunds.classify import Outcome, Sighting, Verdict
from include.refunds.ledger import Ledger, LedgerError, LedgerUnavailable, Task
from include.refunds.revision import REVISION, VERSION_TABLE
from include.refunds.settings import get_settings
from include.refunds.states import EDGES, Status
from tests.refunds.conftest import World


def force(world: World, refund_id: int, assignments: str) -> None:
    """Change a row past the triggers, to bring it where a test starts."""
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql(update(connection, refund_id, assignments))


def change(world: World, refund_id: int, assignments: str) -> None:
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql(update(connection, refund_id, assignments))


def update(connection: Connection, refund_id: int, assignments: str) -> str:
    """Return the UPDATE of a refund, of the table that has the first of the columns."""
    query = """
        SELECT relname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        WHERE attname = %s AND attrelid IN ('refund_ledger.refund_instructions'::regclass,
            'refund_ledger.refund_states'::regclass, 'refund_ledger.frozen_requests'::regclass)"""
    table = connection.exec_driver_sql(query, (assignments.partition(" =")[0],)).scalar_one()
    key = "id" if table == "refund_instructions" else "refund_id"
    return f"UPDATE refund_ledger.{table} SET {assignments} WHERE {key} = {refund_id}"


ANY_STATE = (
    "attempts = 1, first_sent_at = now(), sent_with = 'x', lease_until = now(), fence_until = now(), "
    "next_attempt_at = now(), "
    "payroc_refund_id = 'ABCDEFGHIJ', released_by = 'x', released_at = now(), holds = '{largest_refund}'"
)


def test_the_database_allows_exactly_the_edges_of_the_state_graph(world: World) -> None:
    refund_id = world.released()
    allowed, refusals = set(), set()
    for start, end in product(Status, Status):
        if start is end:
            continue
        force(world, refund_id, f"{ANY_STATE}, status = '{start.value}'")
        try:
            change(world, refund_id, f"status = '{end.value}'")
        except DBAPIError as error:
            refusals.add(str(error.orig).split(" from ")[0])
        else:
            allowed.add((start, end))
    # Sending to sending is a takeover: the same status with one more attempt.
    assert allowed == EDGES - {(Status.SENDING, Status.SENDING)}
    assert refusals == {f"refund {refund_id} can't go"}


@pytest.mark.parametrize(
    "assignment",
    [
        "amount = amount + 1",
        "currency = 'CAD'",
        "order_id = 'other'",
        "source_ref = 'other'",
        "processing_terminal_id = 'other'",
        "payee_last4 = '0000'",
        "payee_fingerprint = repeat('0', 64)",
        "request_sha256 = repeat('0', 64)",
        "requested_by = 'x@example.com'",
        "approved_by = 'x@example.com'",
        "approved_at = now()",
        "idempotency_key = gen_random_uuid()",
        "created_at = now()",
        "request = NULL",
        "attempts = attempts + 2",
        "status = 'accepted'",
    ],
)
def test_what_identifies_a_payment_never_changes(world: World, assignment: str) -> None:
    refund_id = world.released()
    with pytest.raises(DBAPIError):
        change(world, refund_id, assignment)


@pytest.mark.parametrize(
    "assignment",
    ["payroc_refund_id = 'ZZZZZZZZZZ'", "first_sent_at = now()", "sent_with = 'other'", "attempts = 0"],
)
def test_what_the_first_attempt_and_payroc_fixed_never_changes(world: World, assignment: str) -> None:
    refund_id = world.released()
    world.send(refund_id)
    with pytest.raises(DBAPIError):
        change(world, refund_id, assignment)


def test_a_refund_that_payroc_has_refused_keeps_the_beginning_of_its_keys_window(world: World) -> None:
    refund_id = world.released()
    claim = {
        "environment": world.gateway.environment,
        "sent_with": world.gateway.sent_with,
        "token_seconds": 60,
    }
    first = world.run(world.ledger.claims.claim(refund_id, Task("run-1", 0, 1), **claim))
    assert first is not None
    assert world.run(world.ledger.claims.may_post(first, 1.0))
    began = world.row(refund_id)["first_sent_at"]
    world.hours_ahead = 2
    assert world.run(world.ledger.claims.claim(refund_id, Task("run-1", 0, 2), **claim)) is not None
    # The first worker wakes up with Payroc's refusal when the second one has the refund, which then may not send it.
    world.run(world.ledger.records.record(refund_id, Verdict(Outcome.REJECTED, "Payroc refused it.", 400), 1))
    world.run(world.ledger.records.record(refund_id, Verdict(Outcome.NOT_SENT, "The sending was paused."), 2))
    row = world.row(refund_id)
    assert (row["status"], row["first_sent_at"]) == ("unknown", began)
    force(world, refund_id, "status = 'sending'")
    with pytest.raises(DBAPIError, match="an attempt may have reached Payroc"):
        change(world, refund_id, "status = 'released', first_sent_at = NULL, sent_with = NULL")


def test_the_request_of_a_final_refund_may_be_emptied_and_a_contradiction_still_takes_it_to_review(
    world: World,
) -> None:
    refund_id = world.released("9002")
    world.send(refund_id)
    change(world, refund_id, "request = NULL")
    paid = Verdict(
        Outcome.ACCEPTED, "Accepted by Payroc.", sighting=Sighting("ABCDEFGHIJ", "ready", Status.ACCEPTED)
    )
    world.run(world.ledger.records.record(refund_id, paid))
    row = world.row(refund_id)
    assert (row["status"], row["payroc_refund_id"], list(world.paused())) == ("review", "ABCDEFGHIJ", ["*"])


def test_a_payment_of_a_refund_that_was_never_sent_is_taken_over_with_an_event_and_a_pause(
    world: World,
) -> None:
    refund_id = world.released()
    paid = Verdict(
        Outcome.ACCEPTED, "Accepted by Payroc.", sighting=Sighting("ABCDEFGHIJ", "ready", Status.ACCEPTED)
    )
    world.run(world.ledger.records.record(refund_id, paid))
    assert (world.row(refund_id)["status"], list(world.paused())) == ("accepted", ["*"])
    events = world.rows("SELECT refund_id, detail FROM refund_ledger.refund_events WHERE event = 'recovered'")
    assert events == [{"refund_id": refund_id, "detail": {"payroc_refund_id": "ABCDEFGHIJ"}}]


def test_a_refund_that_was_never_sent_is_not_rejected_without_an_object_of_payroc(world: World) -> None:
    source_ref = world.approve()
    world.pull()
    with pytest.raises(DBAPIError, match="was never sent, so nothing has rejected it"):
        change(world, int(world.row(source_ref)["id"]), "status = 'rejected'")


def test_what_the_driver_can_not_send_is_refused_and_not_tried_again(world: World) -> None:
    with pytest.raises(LedgerError, match="refused a statement") as caught:
        world.run(world.ledger.refunds.replaced(2**70))
    assert not isinstance(caught.value, LedgerUnavailable)


def test_an_error_of_the_ledger_quotes_no_row(world: World) -> None:
    refund_id = world.released()
    unknown = Verdict(
        Outcome.ACCEPTED, "Accepted.", sighting=Sighting("too long for the ledger", "ready", Status.ACCEPTED)
    )
    with pytest.raises(
        LedgerError,
        match=r"a constraint refuses the row: \w+ \(CheckViolationError, SQLSTATE 23514\)",
    ) as caught:
        world.run(world.ledger.records.record(refund_id, unknown))
    assert world.row(refund_id)["order_id"] not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_ledger_belongs_to_one_source_because_another_name_would_pay_the_same_refunds_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.approve()
    world.pull()
    monkeypatch.setenv("PAYROC_REFUNDS_SOURCE", "renamed")
    get_settings.cache_clear()
    world.settings = get_settings()
    world.ledger = Ledger(world.ledger.engine, world.settings, actor="test")
    with pytest.raises(LedgerError, match="This ledger belongs to the source 'refund_requests'"):
        world.pull()
    assert len(world.rows("SELECT * FROM refund_ledger.refunds")) == 1


def test_every_change_of_status_has_its_event_with_actor_and_reason(world: World) -> None:
    refund_id = world.released()
    world.send(refund_id)
    events = world.rows(
        "SELECT from_status, to_status, actor, reason FROM refund_ledger.refund_events "
        "WHERE refund_id = :id AND event = 'status' ORDER BY id",
        id=refund_id,
    )
    assert [(event["from_status"], event["to_status"]) for event in events] == [
        (None, "approved"),
        ("approved", "released"),
        ("released", "sending"),
        ("sending", "accepted"),
    ]
    assert {event["actor"] for event in events} == {"test"}
    assert events[-1]["reason"] == "Accepted by Payroc."


def test_a_change_by_hand_has_its_event_too(world: World) -> None:
    refund_id = world.released()
    change(world, refund_id, "status = 'approved', reason = 'by hand'")
    event = world.rows("SELECT * FROM refund_ledger.refund_events ORDER BY id DESC LIMIT 1")[0]
    assert (event["to_status"], event["reason"], event["actor"]) == ("approved", "by hand", "postgres")


def test_a_new_refund_is_approved_and_unsent(world: World) -> None:
    ref = world.approve()
    world.pull()
    row = world.row(ref)
    assert (row["status"], row["attempts"], row["first_sent_at"], row["payroc_refund_id"]) == (
        "approved",
        0,
        None,
        None,
    )


@pytest.mark.parametrize("column", ["payee_fingerprint", "request_sha256"])
@pytest.mark.parametrize("value", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 63 + "\n"])
def test_a_hash_is_64_lower_case_hexadecimal_digits(world: World, column: str, value: str) -> None:
    refund_id = world.released()
    with pytest.raises(DBAPIError, match=f"refund_instructions_{column}_check"):
        # Past the guard, which lets nobody change them at all.
        force(world, refund_id, f"{column} = '{value}'")


def test_one_refund_of_payrocs_stands_at_one_of_ours(world: World) -> None:
    first, second = world.released(), world.released()
    world.send(first)
    taken = world.row(first)["payroc_refund_id"]
    with pytest.raises(DBAPIError, match="one_refund_per_payroc_refund"):
        force(world, second, f"payroc_refund_id = '{taken}'")


def test_the_ledger_holds_no_readable_account_number(world: World) -> None:
    account, routing = "556677889911", "053200983"
    world.released(account_number=account, routing_number=routing)
    everything = ""
    for table in ("refund_instructions", "refund_states", "refund_events", "refund_runs", "refund_attempts"):
        everything += str(
            world.rows(
                f"SELECT to_jsonb(t)::text AS row, encode(convert_to(t::text, 'UTF8'), 'escape') AS raw FROM refund_ledger.{table} AS t"
            )
        )
    requests = world.rows("SELECT request FROM refund_ledger.frozen_requests")
    assert account not in everything
    assert routing not in everything
    assert account.encode() not in bytes(requests[0]["request"])
    assert "9911" in everything


def test_the_revision_that_this_version_needs_is_the_newest_migration(world: World) -> None:
    found = world.rows(f"SELECT version_num FROM refund_ledger.{VERSION_TABLE}")
    assert [row["version_num"] for row in found] == [REVISION]


def test_a_ledger_whose_clock_was_replaced_is_not_used(world: World) -> None:
    world.hours_ahead = 1
    with pytest.raises(
        LedgerError, match=r"The ledger's clock, the function refund_ledger\.now\(\), was replaced"
    ):
        world.run(world.ledger.check())
    world.hours_ahead = 0
    world.run(world.ledger.check())
