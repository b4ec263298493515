"""The ledger is what its events say: a row that was changed past its triggers is found, and named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.pool import NullPool

from include.refunds.replay import DERIVED, NOT_COVERED, REPLAYED
from include.refunds.roles import OPERATOR, PAYER
from tests.conftest import Login
from tests.refunds.test_audit import audit, tamper
from tests.refunds.test_roles import IDS, fill

REFUND = {kind: f"WHERE refund_id = {number}" for kind, number in IDS.items()}


@pytest.fixture
def ledger(ledger_url: URL) -> Iterator[Engine]:
    """A ledger with a refund of each kind, an approved run and a rejected one."""
    engine = create_engine(ledger_url, poolclass=NullPool)
    run = """
        INSERT INTO refund_ledger.refund_runs (run_id, params, candidates, candidate_totals, candidates_hash, started_at)
        VALUES ('{}', '{{}}', 1, '{{}}', 'hash', now())"""
    with engine.begin() as connection:
        for name in ("run-a", "run-r"):
            connection.exec_driver_sql(run.format(name))
        connection.exec_driver_sql(
            "UPDATE refund_ledger.refund_runs SET approved_by = 'dora', approved_hash = 'hash' WHERE run_id = 'run-a'"
        )
        connection.exec_driver_sql(
            "UPDATE refund_ledger.refund_runs SET rejected_by = 'dora' WHERE run_id = 'run-r'"
        )
        fill(connection)
        for refund, assignment in (
            ("held", "status = 'approved', released_holds = holds, holds = '{}'"),
            ("large", "run_rejected_by = 'dora'"),
            ("held", "status = 'released', released_run = 'run-a', released_by = 'x', released_at = now()"),
        ):
            connection.exec_driver_sql(
                f"UPDATE refund_ledger.refund_states SET {assignment} {REFUND[refund]}"
            )
    yield engine
    engine.dispose()


def instruction(assignment: str) -> str:
    return f"UPDATE refund_ledger.refund_instructions SET {assignment} WHERE id = {IDS['approved']}"


def state(refund: str, assignment: str) -> str:
    return f"UPDATE refund_ledger.refund_states SET {assignment} {REFUND[refund]}"


def attempt(refund: str, assignment: str) -> str:
    return f"UPDATE refund_ledger.refund_attempts SET {assignment} {REFUND[refund]}"


def first_release(refund: str, assignment: str) -> str:
    return f"UPDATE refund_ledger.first_releases SET {assignment} {REFUND[refund]}"


def run(name: str, assignment: str) -> str:
    return f"UPDATE refund_ledger.refund_runs SET {assignment} WHERE run_id = 'run-{name}'"


def limits(assignment: str) -> str:
    return f"UPDATE refund_ledger.refund_limits SET {assignment}"


def pauses(assignment: str) -> str:
    return f"UPDATE refund_ledger.pauses SET {assignment}"


def changed(refund: str, assignment: str) -> tuple[str, str]:
    """Change a column of a refund's state, whose name is the first word of the assignment; with the finding."""
    column = assignment.partition(" ")[0]
    return state(refund, assignment), f"Refund {IDS[refund]}: `{column}` is not what its events say."


INSTRUCTION = f"Refund {IDS['approved']}: its instruction (what was approved) was changed."
FIRST_RELEASE = "Refund {}: its first release, which the limits count, was {}."

# What the owner of the tables does past all triggers, and the finding.
TAMPERED: dict[str, tuple[str, str]] = {
    "an amount": (instruction("amount = 9999"), INSTRUCTION),
    "a payee": (instruction("payee_fingerprint = repeat('b', 64)"), INSTRUCTION),
    "an order": (instruction("order_id = 'other'"), INSTRUCTION),
    "an approver": (instruction("approved_by = 'eve', approved_by_folded = 'eve'"), INSTRUCTION),
    "a requester": (instruction("requested_by = 'eve'"), INSTRUCTION),
    "the time of an approval": (instruction("approved_at = approved_at - interval '1 day'"), INSTRUCTION),
    "the hash of a body": (instruction("request_sha256 = repeat('b', 64)"), INSTRUCTION),
    "an instruction removed": (
        f"DELETE FROM refund_ledger.refund_instructions WHERE id = {IDS['approved']}",
        f"Refund {IDS['approved']} has events, but its instruction was removed.",
    ),
    "a status": (
        state("approved", "status = 'cancelled'"),
        f"Refund {IDS['approved']} is cancelled, and its last event says approved.",
    ),
    "a status taken back": (
        state("accepted", "status = 'released'"),
        f"Refund {IDS['accepted']} is released, and its last event says accepted.",
    ),
    "a reason": changed("review", "reason = 'x'"),
    "a hold": changed("held", "holds = '{by hand}'"),
    "an unhold": changed("large", "released_holds = '{largest_refund}'"),
    "a rejection forgotten": changed("large", "run_rejected_by = NULL"),
    "a run that released": changed("released", "released_run = 'run-a'"),
    "an actor that released": changed("released", "released_by = 'somebody'"),
    "a release made younger": changed("released", "released_at = released_at + interval '1 day'"),
    "a number of attempts": changed("unknown", "attempts = 2"),
    "a fence taken away": changed("sending", "fence_until = fence_until - interval '1 hour'"),
    "a key window that begins later": changed("unknown", "first_sent_at = first_sent_at + interval '6 days'"),
    "a key window forgotten": changed("accepted", "first_sent_at = NULL"),
    "a key window of what was never sent": changed("released", "first_sent_at = now(), sent_with = 'x'"),
    "an id of Payroc's": changed("accepted", "payroc_refund_id = 'ZZZZZZZZZZ'"),
    "a state removed": (
        f"DELETE FROM refund_ledger.refund_states {REFUND['review']}",
        f"Refund {IDS['review']} has events, but its state was removed.",
    ),
    "an attempt removed": (
        f"DELETE FROM refund_ledger.refund_attempts {REFUND['unknown']}",
        f"Attempt 1 of refund {IDS['unknown']} was removed.",
    ),
    "an attempt inserted": (
        f"INSERT INTO refund_ledger.refund_attempts VALUES ({IDS['released']}, 1, 'run-1', 0, 1, now())",
        f"Attempt 1 of refund {IDS['released']} was inserted without a claim.",
    ),
    "an outcome": (
        attempt("unknown", "outcome = 'not_sent'"),
        f"Attempt 1 of refund {IDS['unknown']}: `outcome` is not what its events say.",
    ),
    "an end made older": (
        attempt("rejected", "finished_at = finished_at - interval '1 day'"),
        f"Attempt 1 of refund {IDS['rejected']}: `finished_at` is not what its events say.",
    ),
    "a post that never left": (
        attempt("unknown", "posting_at = NULL"),
        f"Attempt 1 of refund {IDS['unknown']}: `posting_at` is not what its events say.",
    ),
    "an attempt made older": (
        attempt("unknown", "started_at = started_at - interval '7 days'"),
        f"Attempt 1 of refund {IDS['unknown']}: `started_at` is not what its events say.",
    ),
    "a first release removed": (
        f"DELETE FROM refund_ledger.first_releases {REFUND['released']}",
        FIRST_RELEASE.format(IDS["released"], "removed"),
    ),
    "a first release inserted": (
        "INSERT INTO refund_ledger.first_releases "
        f"VALUES ({IDS['approved']}, repeat('a', 64), 4999, 'USD', NULL, NULL, now())",
        FIRST_RELEASE.format(IDS["approved"], "inserted"),
    ),
    **{
        f"{column} of a first release": (
            first_release("released", f"{column} = {value}"),
            FIRST_RELEASE.format(IDS["released"], "changed"),
        )
        for column, value in {
            "at": "at - interval '1 day'",
            "amount": "1",
            "payee_fingerprint": "repeat('b', 64)",
            "run": "'run-a'",
            "approver": "'dora'",
        }.items()
    },
    "the approver of a first release": (
        first_release("held", "approver = NULL"),
        FIRST_RELEASE.format(IDS["held"], "changed"),
    ),
    "an approval": (
        run("1", "approved_by = 'eve', approved_hash = 'hash'"),
        "Run run-1: its approval is not what its events say.",
    ),
    "an approval of others": (
        run("a", "approved_hash = 'other'"),
        "Run run-a: its approval is not what its events say.",
    ),
    "a rejection": (run("r", "rejected_by = NULL"), "Run run-r: its approval is not what its events say."),
    "a run removed": (
        "DELETE FROM refund_ledger.refund_runs WHERE run_id = 'run-a'",
        "Run run-a has events, but its row was removed.",
    ),
    "a limit raised": (
        limits("largest_refund = 1000000"),
        "The limit largest_refund is 1,000,000, and its events say 100,000.",
    ),
    "a limit taken away": (
        limits("largest_refund = NULL"),
        "The limit largest_refund is unset, and its events say 100,000.",
    ),
    "a limit set": (limits("day_count = 5"), "The limit day_count is 5, and its events say unset."),
    "a pause ended": (
        pauses("ended_at = now(), ended_by = 'eve' WHERE id = 2"),
        "Pause 2 is not what its events say.",
    ),
    "a resume taken back": (
        pauses("ended_at = NULL, ended_by = NULL, end_reason = NULL WHERE id = 1"),
        "Pause 1 is not what its events say.",
    ),
    "a pause of another terminal": (
        pauses("scope = '7701009' WHERE id = 2"),
        "Pause 2 is not what its events say.",
    ),
    "a pause made older": (
        pauses("paused_at = paused_at - interval '1 day' WHERE id = 2"),
        "Pause 2 is not what its events say.",
    ),
    "a restore that was never compared": (
        pauses("compared_at = now() WHERE id = 3"),
        "Pause 3 is not what its events say.",
    ),
    "a pause removed": (
        "DELETE FROM refund_ledger.pauses WHERE id = 2",
        "Pause 2 has events, but its row was removed.",
    ),
    "a binding": (
        "UPDATE refund_ledger.bindings SET value = 'https://elsewhere.example.com' WHERE name = 'environment'",
        "The ledger's environment is not the one that its event says.",
    ),
    "a binding removed": (
        "DELETE FROM refund_ledger.bindings WHERE name = 'fingerprint_check'",
        "The ledger's fingerprint_check is not the one that its event says.",
    ),
    "all events of a refund": (
        f"DELETE FROM refund_ledger.refund_events {REFUND['approved']}",
        f"Refund {IDS['approved']} has no events.",
    ),
    "the last event of a refund": (
        "DELETE FROM refund_ledger.refund_events WHERE id = "
        f"(SELECT max(id) FROM refund_ledger.refund_events {REFUND['review']})",
        f"Refund {IDS['review']} is review, and its last event says sending.",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_the_replay_names_what_the_owner_changed(ledger: Engine, what: str) -> None:
    assert audit(ledger.url).findings == []
    statement, finding = TAMPERED[what]
    tamper(ledger, statement)
    assert audit(ledger.url).findings == [finding]


# A guard or a trigger taken away: its table, its name, who makes which change then, and the finding.
UNGUARDED: dict[str, tuple[str, str, str, str, str]] = {
    "an instruction that can change": (
        "refund_instructions",
        "never_changed",
        "",
        instruction("amount = 9999"),
        INSTRUCTION,
    ),
    "a state change without event": (
        "refund_states",
        "event_of_a_change",
        PAYER,
        state("approved", "status = 'held', holds = '{x}'"),
        f"Refund {IDS['approved']} is held, and its last event says approved.",
    ),
    "a hold added while the status stays": (
        "refund_states",
        "guard",
        PAYER,
        *changed("held", "holds = '{x}'"),
    ),
    "an outcome without event": (
        "refund_attempts",
        "event_of_an_outcome",
        PAYER,
        attempt("sending", "outcome = 'not_sent', finished_at = now()"),
        f"Attempt 1 of refund {IDS['sending']}: `outcome` is not what its events say.",
    ),
    "a limit without event": (
        "refund_limits",
        "events",
        OPERATOR,
        limits("largest_refund = 1000000"),
        "The limit largest_refund is 1,000,000, and its events say 100,000.",
    ),
    "a pause that ends without event": (
        "pauses",
        "events",
        OPERATOR,
        pauses("ended_at = now(), end_reason = 'x' WHERE id = 2"),
        "Pause 2 is not what its events say.",
    ),
    "an approval without event": (
        "refund_runs",
        "event_of_an_answer",
        PAYER,
        run("1", "approved_by = 'eve', approved_hash = candidates_hash"),
        "Run run-1: its approval is not what its events say.",
    ),
    "a first release that is not noted": (
        "refund_states",
        "first_release",
        PAYER,
        state("approved", "status = 'released', released_by = 'x', released_at = now()"),
        FIRST_RELEASE.format(IDS["approved"], "removed"),
    ),
}


@pytest.mark.parametrize("what", UNGUARDED)
def test_the_replay_names_a_change_that_a_missing_trigger_let_pass(
    ledger: Engine, login: Login, what: str
) -> None:
    table, trigger, role, statement, finding = UNGUARDED[what]

    def switch(word: str) -> None:
        with ledger.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE refund_ledger.{table} {word} TRIGGER {trigger}")

    changing = create_engine(login(ledger.url, role), poolclass=NullPool) if role else ledger
    switch("DISABLE")
    try:
        with changing.begin() as connection:
            connection.exec_driver_sql(statement)
    finally:
        switch("ENABLE")
    assert finding in audit(ledger.url).findings


def test_each_column_of_a_state_is_replayed_derived_or_said_to_be_not_covered(ledger: Engine) -> None:
    query = """
        SELECT attname FROM pg_attribute
        WHERE attrelid = 'refund_ledger.refund_states'::regclass AND attnum > 0 AND NOT attisdropped"""
    with ledger.connect() as connection:
        columns = sorted(name for (name,) in connection.exec_driver_sql(query))
    assert sorted([*REPLAYED, *DERIVED, *NOT_COVERED]) == columns


def test_a_large_ledger_is_replayed_in_batches(ledger: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper(ledger, *(statement for statement, _ in TAMPERED.values() if "DELETE" not in statement))
    found = audit(ledger.url).findings
    assert len(found) > 20
    monkeypatch.setattr("include.refunds.replay._AT_ONCE", 1)
    assert audit(ledger.url).findings == found
