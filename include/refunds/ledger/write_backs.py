"""What the source does not know yet."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime

from include.refunds.ledger.base import LedgerBase
from include.refunds.ledger.connection import DATABASE_ERRORS
from include.refunds.ledger.intake import NAMELESS


@dataclass(frozen=True, slots=True)
class WriteBack:
    """One line for the source: what became of a refund, or why its row is invalid."""

    source_ref: str
    status: str
    payroc_refund_id: str | None
    payroc_status: str | None
    reason: str | None
    updated_at: datetime


# True of a row r of refunds that the source's row shows: of a refund and its reissues the newest that was not cancelled.
NEWEST = """(r.replaces IS NULL OR r.status <> 'cancelled') AND NOT EXISTS (
    SELECT FROM refund_ledger.refunds_masked AS newer WHERE newer.replaces = r.id AND newer.status <> 'cancelled')"""

# Longer than a write-back of thousands of refunds takes.
_LOCK_SECONDS = 60

# Where a line for the source came from: a refund, the newest reissue of one, or an invalid row.
_WRITTEN = (
    ("refunds", "target.source_ref = row.source_ref"),
    ("refunds", "target.replaces IS NOT NULL AND refund_ledger.first_source_ref(target.id) = row.source_ref"),
    ("invalid_rows", "target.source_ref = row.source_ref"),
)


class WriteBacks(LedgerBase):
    """What the write-back reads and notes."""

    @asynccontextmanager
    async def write_back_lock(self) -> AsyncIterator[None]:
        """
        Hold the lock that lets write-backs run one at a time, so that an older one never overtakes a newer one.

        :raises LedgerUnavailable: when another one works, or stands still, with it for more than a minute.
        """
        async with AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(self.engine.connect())
                # The lock is the session's and outlives this transaction, the patience does not.
                async with connection.transaction():
                    await connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
                    await connection.execute("SELECT pg_advisory_lock(hashtext('refund_ledger.write_back'))")
            except DATABASE_ERRORS as error:
                raise self._explained(error) from None
            try:
                yield
            finally:
                # A session that has ended has let go of it.
                with suppress(*DATABASE_ERRORS):
                    await connection.execute(
                        "SELECT pg_advisory_unlock(hashtext('refund_ledger.write_back'))"
                    )

    async def due_write_backs(self, limit: int, after: str = "") -> list[WriteBack]:
        """
        Return changes that the source does not have yet, ordered by source_ref.

        Of a refund and its reissues the source has one row, which shows the newest that was not cancelled; the others are not written
        back any more.

        :param limit: at most so many.
        :param after: only those with a greater source_ref.
        """
        query = f"""
            (SELECT source_ref, status, payroc_refund_id, payroc_status, reason, updated_at FROM refund_ledger.refunds AS r
             WHERE source = :source AND (written_back_at = updated_at) IS NOT TRUE AND source_ref > :after
               AND replaces IS NULL AND {NEWEST}
             ORDER BY source_ref LIMIT :limit)
            UNION ALL
            (SELECT first.source_ref, status, payroc_refund_id, payroc_status, reason, updated_at FROM refund_ledger.refunds AS r
             CROSS JOIN LATERAL (SELECT refund_ledger.first_source_ref(r.id) AS source_ref) AS first
             WHERE source = :source AND (written_back_at = updated_at) IS NOT TRUE AND first.source_ref > :after
               AND replaces IS NOT NULL AND {NEWEST}
             ORDER BY first.source_ref LIMIT :limit)
            UNION ALL
            (SELECT source_ref, 'invalid', NULL, NULL,
                    (SELECT string_agg(key || ': ' || value, '; ' ORDER BY key) FROM jsonb_each_text(errors)), updated_at
             FROM refund_ledger.invalid_rows AS invalid
             WHERE source = :source AND written_back_at IS DISTINCT FROM updated_at AND source_ref > :after
               AND NOT starts_with(source_ref, :nameless)
               AND NOT EXISTS (SELECT FROM refund_ledger.refunds AS r
                               WHERE r.source = invalid.source AND r.source_ref = invalid.source_ref)
             ORDER BY source_ref LIMIT :limit)
            ORDER BY source_ref LIMIT :limit"""
        values = {"source": self._settings.source, "after": after, "limit": limit, "nameless": NAMELESS}
        async with self._transaction() as (connection, _):
            result = await connection.execute(query, values)
            return [WriteBack(**row) for row in result]

    async def mark_written_back(self, written: Sequence[WriteBack]) -> None:
        """Note what the source has now: the very ``updated_at`` that was read, so a later change stays due."""
        rows = json.dumps(
            [{"source_ref": item.source_ref, "updated_at": item.updated_at.isoformat()} for item in written]
        )
        async with self._transaction() as (connection, _):
            for table, condition in _WRITTEN:
                update = f"""
                    UPDATE refund_ledger.{table} AS target SET written_back_at = row.updated_at
                    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS row (source_ref text, updated_at timestamptz)
                    WHERE target.source = :source AND {condition} AND target.updated_at = row.updated_at"""
                await connection.execute(update, {"rows": rows, "source": self._settings.source})
