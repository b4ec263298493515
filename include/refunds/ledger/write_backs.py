"""Rows of the source that are due to be written, and what is remembered of single ones."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import uuid4

from include.refunds.ledger.connection import Connection, as_array
from include.refunds.ledger.database import LedgerError, LedgerUnavailable, Part
from include.refunds.ledger.intake import NAMELESS
from include.refunds.ledger.rows import IDS, OF_MANY, lock
from include.refunds.text import fold


@dataclass(frozen=True, slots=True)
class WriteBack:
    """
    One line for the source: what became of a refund, or why its row is invalid.

    :param refund_id: the refund that it shows, ``None`` for an invalid row.
    """

    source_ref: str
    status: str
    payroc_refund_id: str | None
    payroc_status: str | None
    reason: str | None
    updated_at: datetime
    refund_id: int | None = None


@dataclass(frozen=True, slots=True)
class NotWritten:
    """
    A row of the source that could not be written.

    :param reason: why, without a value of the row.
    :param is_transient: it may be written a little later.
    """

    source_ref: str
    reason: str
    is_transient: bool = False


# True of a row r of refunds that the source's row shows: of a refund and its reissues the newest that was not
# cancelled.
NEWEST = """(r.replaces IS NULL OR r.status <> 'cancelled') AND NOT EXISTS (
    SELECT FROM refund_ledger.refunds AS newer WHERE newer.replaces = r.id AND newer.status <> 'cancelled')"""

TURN = timedelta(minutes=2)
"""How long a write-back's turn lasts unless it is renewed. A batch takes seconds."""

# Longer than a write-back of thousands of refunds takes.
_WAIT_SECONDS = 60
_LOOK_AGAIN_SECONDS = 1

# True of a source_ref whose row could not be written when it was tried last.
_FAILED_BEFORE = """EXISTS (SELECT FROM refund_ledger.write_back_notes AS note
    WHERE note.source = :source AND note.source_ref = {ref} AND note.problem IS NOT NULL)"""

_LONGEST_REASON = 500

# Behind every refund.
_LAST_ID = 2**63 - 1

# What ends a refund, or nearly: our select_approved.sql does not offer a row that shows one of these.
ENDED = ("accepted", "settled", "returned", "reversed", "rejected", "cancelled")

# A source that offers ended refunds in every run has each of them written so often.
_WRITE_AGAIN_AFTER = timedelta(days=7)

_WRITTEN_AND_ENDED = f"""r.written_back_at = r.updated_at AND {NEWEST}
    AND r.status IN ({", ".join(f"'{name}'" for name in ENDED)})"""


class WriteBacks(Part):
    """What the write-back reads and notes."""

    @asynccontextmanager
    async def write_back_turn(self) -> AsyncIterator[str]:
        """
        Yield the name under which this write-back has the turn: one at a time, so that no older one overtakes
        it.

        :raises LedgerUnavailable: when another one has it for more than a minute.
        """
        holder = str(uuid4())
        give_up = time.monotonic() + _WAIT_SECONDS
        while not await self.take_turn(holder):
            if time.monotonic() >= give_up:
                raise LedgerUnavailable(
                    f"Another write-back is at work and has not ended for {_WAIT_SECONDS} s, so this one "
                    "did not begin: find out what it waits for in the source (connection refunds_source)."
                )
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        try:
            yield holder
        finally:
            # Otherwise it ends by itself.
            with suppress(LedgerError):
                await self.end_turn(holder)

    async def take_turn(self, holder: str) -> bool:
        """
        Take the turn of the write-back for two minutes; ``False`` when another one has it.

        :param holder: a name that no other write-back has.
        """
        update = """
            UPDATE refund_ledger.write_back_turn SET holder = :holder, until = :until
            WHERE holder IS NULL OR until <= :now"""
        async with self._database.transaction() as (connection, now):
            return await connection.change(update, {"holder": holder, "until": now + TURN, "now": now}) > 0

    async def end_turn(self, holder: str) -> None:
        """Let another write-back have the turn; nothing happens when another one has it."""
        update = "UPDATE refund_ledger.write_back_turn SET holder = NULL, until = NULL WHERE holder = :holder"
        await self._execute(update, holder=holder)

    async def due_write_backs(
        self, limit: int, after: WriteBack | None = None, *, failed_before: bool = False
    ) -> list[WriteBack]:
        """
        Return changes that the source does not have yet: those of refunds in the order of their ids, then
        invalid rows by source_ref.

        Of a refund and its reissues the source has one row, which shows the newest that was not cancelled;
        the others are not written back any more.

        :param limit: at most so many.
        :param after: only those behind this one.
        :param failed_before: those whose last attempt failed, instead of all others.
        """
        query = f"""
            (SELECT first.source_ref, status, payroc_refund_id, payroc_status, reason, updated_at, r.id AS refund_id
             FROM refund_ledger.refunds AS r CROSS JOIN LATERAL (
                 SELECT CASE WHEN r.replaces IS NULL THEN r.source_ref
                             ELSE refund_ledger.first_source_ref(r.id) END AS source_ref) AS first
             WHERE source = :source AND (written_back_at = updated_at) IS NOT TRUE AND r.id > :after_id AND {NEWEST}
               AND {_FAILED_BEFORE.format(ref="first.source_ref")} = :failed_before
             ORDER BY r.id LIMIT :limit)
            UNION ALL
            (SELECT source_ref, 'invalid', NULL, NULL,
                    (SELECT string_agg('`' || key || '` ' || value || '.', ' ' ORDER BY key)
                     FROM jsonb_each_text(errors)), updated_at, NULL
             FROM refund_ledger.invalid_rows AS invalid
             WHERE source = :source AND written_back_at IS DISTINCT FROM updated_at AND source_ref > :after_ref
               AND NOT starts_with(source_ref, :nameless)
               AND NOT EXISTS (SELECT FROM refund_ledger.refund_instructions AS i
                               WHERE i.idempotency_key = refund_ledger.refund_key(invalid.source, invalid.source_ref))
               AND {_FAILED_BEFORE.format(ref="invalid.source_ref")} = :failed_before
             ORDER BY source_ref LIMIT :limit)
            ORDER BY refund_id, source_ref LIMIT :limit"""
        after_id, after_ref = 0, ""
        if after is not None:
            after_id, after_ref = (after.refund_id, "") if after.refund_id else (_LAST_ID, after.source_ref)
        rows = await self._execute(
            query,
            after_id=after_id,
            after_ref=after_ref,
            limit=limit,
            nameless=NAMELESS,
            failed_before=failed_before,
        )
        return [WriteBack(**row) for row in rows]

    async def mark_written_back(
        self,
        holder: str,
        written: Sequence[WriteBack],
        not_written: Sequence[NotWritten] = (),
    ) -> None:
        """
        Note what the source has now, and renew the turn.

        The very ``updated_at`` that was read is noted, so a later change stays due. A write-back that lost
        its turn may have overtaken a newer one, so what it wrote is due again.

        :param holder: who has the turn, from :meth:`write_back_turn`.
        :param not_written: rows that could not be written, each with the reason; they stay due.
        :raises LedgerUnavailable: when another write-back has the turn.
        """
        renew = "UPDATE refund_ledger.write_back_turn SET until = :until WHERE holder = :holder"
        rows = json.dumps(
            [
                {
                    "refund_id": item.refund_id,
                    "source_ref": item.source_ref,
                    "updated_at": item.updated_at.isoformat(),
                }
                for item in written
            ]
        )
        of_refunds = """
            UPDATE refund_ledger.refund_states AS s SET written_back_at = row.updated_at
            FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS row (refund_id bigint, updated_at timestamptz)
            WHERE s.refund_id = row.refund_id AND s.updated_at = row.updated_at"""
        of_invalid_rows = """
            UPDATE refund_ledger.invalid_rows AS invalid SET written_back_at = row.updated_at
            FROM jsonb_to_recordset(CAST(:rows AS jsonb))
                AS row (refund_id bigint, source_ref text, updated_at timestamptz)
            WHERE row.refund_id IS NULL AND invalid.source = :source
              AND invalid.source_ref = row.source_ref AND invalid.updated_at = row.updated_at"""
        problems = json.dumps({item.source_ref: item.reason[:_LONGEST_REASON] for item in not_written})
        settle = """
            UPDATE refund_ledger.write_back_notes AS note SET problem = NULL, problem_since = NULL
            FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS row (source_ref text)
            WHERE note.source = :source AND note.source_ref = row.source_ref AND note.problem IS NOT NULL"""
        note = """
            INSERT INTO refund_ledger.write_back_notes AS known (source, source_ref, problem, problem_since)
            SELECT :source, key, value, :now FROM jsonb_each_text(CAST(:problems AS jsonb))
            ON CONFLICT (source, source_ref) DO UPDATE SET problem = EXCLUDED.problem,
                problem_since = COALESCE(known.problem_since, EXCLUDED.problem_since)"""
        async with self._database.transaction() as (connection, now):
            has_turn = await connection.change(renew, {"holder": holder, "until": now + TURN}) > 0
            if not has_turn:
                await self._make_due(connection, [item.source_ref for item in written])
            else:
                await lock(connection, (item.refund_id for item in written if item.refund_id is not None))
                await connection.execute(of_refunds, {"rows": rows})
                await connection.execute(
                    of_invalid_rows, {"rows": rows, "source": self._database.settings.source}
                )
            await connection.execute(settle, {"rows": rows, "source": self._database.settings.source})
            if not_written:
                values = {"source": self._database.settings.source, "problems": problems, "now": now}
                await connection.execute(note, values)
        if not has_turn:
            raise LedgerUnavailable(
                "This write-back stood still for so long that another one took its turn: what it wrote is written "
                "again."
            )

    async def _make_due(self, connection: Connection, source_refs: Sequence[str]) -> None:
        """Make all refunds and invalid rows due that these rows of the source may show."""
        query = """
            SELECT id FROM refund_ledger.refunds AS r WHERE source = :source AND (source_ref = ANY(:refs)
                OR replaces IS NOT NULL AND refund_ledger.first_source_ref(id) = ANY(:refs))"""
        of_refunds = (
            f"UPDATE refund_ledger.refund_states SET written_back_at = NULL WHERE refund_id {OF_MANY}"
        )
        of_invalid_rows = """
            UPDATE refund_ledger.invalid_rows SET written_back_at = NULL
            WHERE source = :source AND source_ref = ANY(:refs)"""
        values = {"source": self._database.settings.source, "refs": list(source_refs)}
        ids = (await connection.execute(query, values)).scalars()
        await lock(connection, ids)
        await connection.execute(of_refunds, {"ids": as_array(ids)})
        await connection.execute(of_invalid_rows, values)

    async def write_again(self, offered: Collection[str]) -> tuple[int, int]:
        """
        Make refunds due again whose row is offered although they have ended and this was written back.

        A source that always offers ended refunds would always be written, so each row is, once a week.

        :param offered: source_refs that the source returns as approved.
        :returns: how many are due again, and how many are offered again too soon after that.
        """
        # The folded form has the index. Found first, or a large ledger would be read from end to end.
        ended = f"""
            WITH offered AS MATERIALIZED (
                SELECT id FROM refund_ledger.refund_instructions
                WHERE source = :source AND source_ref_folded = ANY(:folded) AND source_ref = ANY(:offered)
                  AND replaces IS NULL
            )
            SELECT r.id, r.source_ref FROM offered JOIN refund_ledger.refunds AS r USING (id)
            WHERE {_WRITTEN_AND_ENDED}
            UNION ALL
            SELECT r.id, first.source_ref FROM refund_ledger.refunds AS r
            CROSS JOIN LATERAL (SELECT refund_ledger.first_source_ref(r.id) AS source_ref) AS first
            WHERE r.source = :source AND r.replaces IS NOT NULL AND first.source_ref = ANY(:offered)
              AND {_WRITTEN_AND_ENDED}"""
        again = f"""
            WITH ended AS (
                SELECT * FROM unnest({IDS}, CAST(:refs AS text[])) AS ended (id, source_ref)
            ), noted AS (
                INSERT INTO refund_ledger.write_back_notes AS known (source, source_ref, offered_again_at)
                SELECT :source, source_ref, :now FROM ended
                ON CONFLICT (source, source_ref) DO UPDATE SET offered_again_at = EXCLUDED.offered_again_at
                WHERE known.offered_again_at IS NULL OR known.offered_again_at <= :before
                RETURNING source_ref
            )
            UPDATE refund_ledger.refund_states AS s SET written_back_at = NULL
            FROM ended JOIN noted USING (source_ref) WHERE s.refund_id = ended.id"""
        async with self._database.transaction() as (connection, now):
            values = {
                "source": self._database.settings.source,
                "offered": list(offered),
                "folded": [*map(fold, offered)],
            }
            found = await connection.execute(ended, values)
            ids = [row.id for row in found]
            await lock(connection, ids)
            noted = {
                "source": self._database.settings.source,
                "ids": as_array(ids),
                "refs": [row.source_ref for row in found],
                "now": now,
                "before": now - _WRITE_AGAIN_AFTER,
            }
            due = await connection.change(again, noted)
            return due, len(ids) - due
