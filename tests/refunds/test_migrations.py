"""A ledger of an earlier version becomes one of this version, with all that it holds."""

from __future__ import annotations

from sqlalchemy import create_engine, text

from demo.postgres import PostgresServer
from include.refunds.migrations import migrate
from include.refunds.revision import REVISION

A_REFUND = text("""
    INSERT INTO refund_ledger.refunds (source, source_ref, processing_terminal_id, order_id, description, amount, currency, payee_last4,
        payee_fingerprint, request, request_sha256, requested_by, approved_by, approved_at, idempotency_key, created_at, updated_at)
    VALUES ('shop', :ref, '7701001', :ref, 'Refund', 4999, 'USD', '4321', repeat('a', 64), 'sealed', repeat('b', 64),
        'ann', 'bob', now(), gen_random_uuid(), now(), now())""")
TABLES = ("refunds", "refund_attempts", "refund_events", "refund_runs", "refund_control", "invalid_rows")


def test_a_ledger_of_the_first_revision_is_brought_to_this_one_and_keeps_all_its_rows(postgres: PostgresServer) -> None:
    postgres.create_database("old_ledger")
    url = postgres.url("old_ledger")
    assert migrate(url, "0001") == "0001"
    engine = create_engine(url)

    def everything() -> list[list[tuple[object, ...]]]:
        with engine.connect() as connection:
            return [[tuple(row) for row in connection.execute(text(f"SELECT * FROM refund_ledger.{name}"))] for name in TABLES]

    with engine.begin() as connection:
        for ref in ("one", "two"):
            connection.execute(A_REFUND, {"ref": ref})
        for assignment in (
            "status = 'released', released_by = 'x', released_at = now()",
            "status = 'sending', attempts = 1, first_sent_at = now(), sent_with = 'x', lease_until = now(), next_attempt_at = now()",
            "status = 'accepted', payroc_refund_id = 'ABCDEFGHIJ', payroc_status = 'ready'",
        ):
            connection.execute(text(f"UPDATE refund_ledger.refunds SET {assignment} WHERE source_ref = 'two'"))
        connection.execute(
            text("INSERT INTO refund_ledger.refund_attempts VALUES (2, 1, 'run-1', 0, 1, now(), now(), 201, NULL, 'accepted')")
        )
        connection.execute(text("INSERT INTO refund_ledger.invalid_rows VALUES ('shop', 'three', '{}', now(), now(), now())"))
    before = everything()
    assert migrate(url) == REVISION
    assert everything() == before
    assert migrate(url) == REVISION
    engine.dispose()
