"""Source rows on their way into the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from include.refunds.cipher import Sealed
from include.refunds.ledger.connection import as_array
from include.refunds.ledger.database import Part
from include.refunds.ledger.foreign import set_aside_paid
from include.refunds.ledger.rows import OF_MANY, lock
from include.refunds.text import fold

# How the source_ref of a row that has none begins in invalid_rows.
NAMELESS = "(row "


@dataclass(frozen=True, slots=True)
class NewRefund:
    """
    A validated source row, ready to be stored: the columns of ``refund_ledger.refund_instructions``.

    :param source_ref_folded: the form in which two spellings of it are the same, as of the names of people.
    """

    source_ref: str
    source_ref_folded: str
    processing_terminal_id: str
    order_id: str
    description: str
    amount: int
    currency: str
    payee_last4: str | None
    payee_fingerprint: str
    request_sha256: str
    requested_by: str
    requested_by_folded: str
    approved_by: str
    approved_by_folded: str
    approved_at: datetime
    idempotency_key: str


# The columns of NewRefund that a changed source row may differ in, with the words that people know them by.
_COMPARED = {
    "processing_terminal_id": "processing_terminal_id",
    "order_id": "order_id",
    "description": "description",
    "amount": "amount",
    "currency": "currency",
    "payee_fingerprint": "payee's account",
    "requested_by": "requested_by",
    "approved_by": "approved_by",
}


def differences(row: NewRefund, stored: Mapping[str, Any]) -> list[str]:
    """Return the names of what differs between a source row and the refund it once became."""
    found = [word for column, word in _COMPARED.items() if getattr(row, column) != stored[column]]
    if not found and row.request_sha256 != stored["request_sha256"]:
        found = ["payee's details"]
    return found


class Intake(Part):
    """What a pull reads and writes."""

    async def stored(self, source_refs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return what the ledger already holds of these source rows, by source_ref."""
        # The folded form has the index.
        query = f"""
            SELECT source_ref, id, status, request_sha256, {", ".join(_COMPARED)}
            FROM refund_ledger.refund_instructions JOIN refund_ledger.refund_states ON refund_id = id
            WHERE source = :source AND source_ref_folded = ANY(:folded) AND source_ref = ANY(:refs)"""
        rows = await self._execute(query, refs=list(source_refs), folded=[*map(fold, source_refs)])
        return {row.source_ref: dict(row) for row in rows}

    async def store(self, rows: Sequence[tuple[NewRefund, Sealed]]) -> set[str]:
        """
        Store new refunds. A row that exists already is left as it is.

        One that Payroc's list shows to be paid, as far as the list is known, goes to review in the same
        transaction.

        :param rows: validated rows, each with its encrypted request.
        :returns: the source_refs that were stored; one that is missing was there before, or collides with
            another refund.
        """
        insert = """
            WITH row AS (
                SELECT * FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS row (
                    source_ref text, source_ref_folded text, processing_terminal_id text,
                    order_id text, description text, amount bigint, currency text, payee_last4 text,
                    payee_fingerprint text, request text, request_key text, request_sha256 text,
                    requested_by text, requested_by_folded text, approved_by text, approved_by_folded text,
                    approved_at timestamptz, idempotency_key uuid)
            ), stored AS (
                INSERT INTO refund_ledger.refund_instructions (source, source_ref, source_ref_folded,
                    processing_terminal_id, order_id, description, amount, currency, payee_last4,
                    payee_fingerprint, request_sha256, requested_by, requested_by_folded, approved_by,
                    approved_by_folded, approved_at, idempotency_key, created_at)
                SELECT :source, source_ref, source_ref_folded, processing_terminal_id,
                    order_id, description, amount, currency, payee_last4, payee_fingerprint,
                    request_sha256, requested_by, requested_by_folded,
                    approved_by, approved_by_folded, approved_at, idempotency_key, :now
                FROM row
                ON CONFLICT DO NOTHING
                RETURNING id, source_ref
            ), frozen AS (
                INSERT INTO refund_ledger.frozen_requests (refund_id, request, request_key)
                SELECT id, convert_to(request, 'UTF8'), request_key FROM stored JOIN row USING (source_ref)
            )
            SELECT id, source_ref FROM stored"""
        async with self._database.transaction() as (connection, now):
            values = {"source": self._database.settings.source, "now": now, "rows": _as_json(rows)}
            stored = await connection.execute(insert, values)
            ids = {"ids": [row.id for row in stored]}
            await set_aside_paid(connection, now, "i.id = ANY(:ids)", ids)
            return {row.source_ref for row in stored}

    async def spelled(self, folded: Sequence[str]) -> set[str]:
        """Return which of these source_refs, in their folded form, the ledger holds in any spelling."""
        query = """
            SELECT source_ref_folded FROM refund_ledger.refund_instructions
            WHERE source = :source AND source_ref_folded = ANY(:folded)"""
        return set((await self._execute(query, folded=list(folded))).scalars())

    async def note_invalid(self, invalid: dict[str, dict[str, str]], valid: Sequence[str]) -> None:
        """
        Note the errors of invalid source rows, and forget those of rows that are valid now.

        A row without a source_ref is known by its place only, so it is forgotten as soon as it is not found
        there.

        :param invalid: errors by source_ref and field.
        :param valid: source_refs of all rows that validate.
        """
        note = """
            INSERT INTO refund_ledger.invalid_rows AS known (source, source_ref, errors, first_seen_at, last_seen_at, updated_at)
            SELECT :source, key, value, :now, :now, :now FROM jsonb_each(CAST(:invalid AS jsonb))
            ON CONFLICT (source, source_ref) DO UPDATE SET last_seen_at = :now, errors = EXCLUDED.errors,
                updated_at = CASE WHEN known.errors = EXCLUDED.errors THEN known.updated_at ELSE :now END"""
        forget = "SELECT refund_ledger.forget_invalid_rows(:source, :valid, :nameless, :now)"
        async with self._database.transaction() as (connection, now):
            common = {"source": self._database.settings.source, "now": now}
            await connection.execute(note, {**common, "invalid": json.dumps(invalid)})
            await connection.execute(forget, {**common, "valid": list(valid), "nameless": NAMELESS})

    async def set_aside(self, standing: Sequence[str]) -> dict[int, str]:
        """
        Take back the releases of refunds that the source no longer stands by.

        :param standing: source_refs of all rows that the source returns, valid and unchanged.
        :returns: ids and source_refs of all refunds that wait to be sent and that the source does not stand
            by. Reissues are none of them: two people approved them in the ledger, the source has no row of
            theirs.
        """
        aside = """
            SELECT id, source_ref, status FROM refund_ledger.refunds
            WHERE source = :source AND status IN ('approved', 'held', 'released') AND replaces IS NULL
              AND source_ref <> ALL(:standing)
            ORDER BY id"""
        take_back = f"""
            UPDATE refund_ledger.refund_states
            SET status = 'approved', reason = 'Its source row is no longer approved.', updated_at = :now
            WHERE refund_id {OF_MANY} AND status = 'released'"""
        async with self._database.transaction() as (connection, now):
            values = {"source": self._database.settings.source, "standing": list(standing)}
            released = [row.id for row in await connection.execute(aside, values) if row.status == "released"]
            await lock(connection, released)
            await connection.execute(take_back, {"ids": as_array(released), "now": now})
            return {
                row.id: row.source_ref
                for row in await connection.execute(aside, values)
                if row.status != "released"
            }


def _as_json(rows: Sequence[tuple[NewRefund, Sealed]]) -> str:
    return json.dumps(
        [
            {
                **{name: getattr(row, name) for name in NewRefund.__slots__},
                "approved_at": row.approved_at.isoformat(),
                "request": sealed.token.decode("ascii"),
                "request_key": sealed.key_id,
            }
            for row, sealed in rows
        ]
    )
