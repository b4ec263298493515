"""What the source does not know yet."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text

from include.refunds.ledger.base import LedgerBase
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


class WriteBacks(LedgerBase):
    """What the write-back reads and notes."""

    @asynccontextmanager
    async def write_back_lock(self) -> AsyncIterator[None]:
        """Hold the lock that lets write-backs run one at a time, so that an older one never overtakes a newer one."""
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT pg_advisory_lock(hashtext('refund_ledger.write_back'))"))
            await connection.commit()
            try:
                yield
            finally:
                await connection.execute(text("SELECT pg_advisory_unlock(hashtext('refund_ledger.write_back'))"))

    async def due_write_backs(self, limit: int, after: str = "") -> list[WriteBack]:
        """
        Return changes that the source does not have yet, ordered by source_ref.

        :param limit: at most so many.
        :param after: only those with a greater source_ref.
        """
        query = text("""
            (SELECT source_ref, status, payroc_refund_id, payroc_status, reason, updated_at FROM refund_ledger.refunds
             WHERE source = :source AND written_back_at IS DISTINCT FROM updated_at AND source_ref > :after
             ORDER BY source_ref LIMIT :limit)
            UNION ALL
            (SELECT source_ref, 'invalid', NULL, NULL,
                    (SELECT string_agg(key || ': ' || value, '; ' ORDER BY key) FROM jsonb_each_text(errors)), updated_at
             FROM refund_ledger.invalid_rows AS invalid
             WHERE source = :source AND written_back_at IS DISTINCT FROM updated_at AND source_ref > :after
               AND NOT starts_with(source_ref, :nameless)
               AND NOT EXISTS (SELECT FROM refund_ledger.refunds AS r
                               WHERE r.source = invalid.source AND r.source_ref = invalid.source_ref)
             ORDER BY source_ref LIMIT :limit)
            ORDER BY source_ref LIMIT :limit""")
        values = {"source": self._settings.source, "after": after, "limit": limit, "nameless": NAMELESS}
        async with self._transaction() as (connection, _):
            result = await connection.execute(query, values)
            return [WriteBack(**row) for row in result.mappings()]

    async def mark_written_back(self, written: Sequence[WriteBack]) -> None:
        """Note what the source has now: the very ``updated_at`` that was read, so a later change stays due."""
        rows = json.dumps([{"source_ref": item.source_ref, "updated_at": item.updated_at.isoformat()} for item in written])
        async with self._transaction() as (connection, _):
            for table in ("refunds", "invalid_rows"):
                update = text(f"""
                    UPDATE refund_ledger.{table} AS target SET written_back_at = row.updated_at
                    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS row (source_ref text, updated_at timestamptz)
                    WHERE target.source = :source AND target.source_ref = row.source_ref AND target.updated_at = row.updated_at""")
                await connection.execute(update, {"rows": rows, "source": self._settings.source})
