"""
How far Payroc's list of each terminal is known, and what stands on it that no refund of the ledger has.

A ledger that was restored, lost, copied or asleep has forgotten payments. It reads on from where it had
read, so it finds them before it sends anything; nothing outside the ledger is needed for that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from include.refunds.ledger.database import Part
from include.refunds.ledger.foreign import Foreign, set_aside_paid


@dataclass(frozen=True, slots=True)
class TerminalList:
    """
    How far Payroc's list of a terminal is known.

    :param read_from: since when; ``None`` when it was never read.
    :param read_to: until when.
    :param read_with: hash of the API host and key of the last reading.
    :param refused: Payroc refused the last reading, for a reason that concerns this terminal.
    :param failed_at: since when it was due and could not be read.
    """

    terminal: str
    read_from: datetime | None = None
    read_to: datetime | None = None
    read_with: str | None = None
    refused: bool = False
    failed_at: datetime | None = None

    def is_known(self, since: datetime, sent_with: str) -> bool:
        """Tell whether it is known up to a moment after ``since``, with this API host and key."""
        return self.read_to is not None and self.read_to > since and self.read_with == sent_with


class Lists(Part):
    """The tables ``terminals`` and ``foreign_refunds``."""

    async def terminal_lists(self) -> list[TerminalList]:
        """Return the lists of all terminals that a row or a refund ever named, by terminal."""
        query = f"SELECT {', '.join(TerminalList.__slots__)} FROM refund_ledger.terminals ORDER BY terminal"
        return [TerminalList(**row) for row in await self._execute(query)]

    async def all_terminals(self) -> list[str]:
        """Return the terminals of all rows and refunds, without those that Payroc has always refused."""
        lists = await self.terminal_lists()
        return [item.terminal for item in lists if item.read_to is not None or not item.refused]

    async def note_terminals(self, terminals: Collection[str]) -> None:
        """Note that these terminals have lists to be read."""
        insert = """
            INSERT INTO refund_ledger.terminals (terminal)
            SELECT jsonb_array_elements_text(CAST(:terminals AS jsonb)) ORDER BY 1 ON CONFLICT DO NOTHING"""
        await self._execute(insert, terminals=json.dumps(sorted(set(terminals))))

    async def list_read(self, terminal: str, read_from: datetime, read_to: datetime, read_with: str) -> None:
        """
        Note that a terminal's list is known from ``read_from`` to ``read_to``.

        Of two readings that end at the same time the one that reached further counts.

        :param read_with: hash of the API host and key that it was read with.
        """
        upsert = """
            INSERT INTO refund_ledger.terminals AS known (terminal, read_from, read_to, read_with)
            VALUES (:terminal, :read_from, :read_to, :read_with)
            ON CONFLICT (terminal) DO UPDATE SET read_from = EXCLUDED.read_from,
                read_to = GREATEST(known.read_to, EXCLUDED.read_to), read_with = EXCLUDED.read_with,
                refused = false, failed_at = NULL, failure = NULL"""
        await self._execute(
            upsert, terminal=terminal, read_from=read_from, read_to=read_to, read_with=read_with
        )

    async def list_failed(self, terminal: str, failure: str, *, refused: bool = False) -> None:
        """
        Note that a list that was due could not be read to its end; the reports say so until it is.

        :param failure: why, as a clause without a full stop.
        :param refused: Payroc refused it, for a reason that concerns this terminal.
        """
        upsert = """
            INSERT INTO refund_ledger.terminals AS known (terminal, refused, failed_at, failure)
            VALUES (:terminal, :refused, :now, :failure)
            ON CONFLICT (terminal) DO UPDATE SET refused = EXCLUDED.refused, failure = EXCLUDED.failure,
                failed_at = COALESCE(known.failed_at, EXCLUDED.failed_at)"""
        await self._execute(upsert, terminal=terminal, refused=refused, failure=failure[:500])

    async def keep_foreign(self, found: Sequence[Foreign]) -> None:
        """
        Keep objects that no refund has, and send to review the pending refunds that they may have paid.

        :param found: objects of one terminal's list.
        """
        insert = """
            INSERT INTO refund_ledger.foreign_refunds (payroc_refund_id, idempotency_key, terminal, order_id,
                amount, currency, last4, payroc_status, plain, seen_at)
            SELECT payroc_refund_id, idempotency_key, terminal, order_id, amount, currency, last4,
                payroc_status, plain, :now
            FROM jsonb_to_recordset(CAST(:found AS jsonb)) AS row (payroc_refund_id text, idempotency_key uuid,
                terminal text, order_id text, amount bigint, currency text, last4 text, payroc_status text,
                plain boolean)
            ON CONFLICT DO NOTHING"""
        async with self._database.transaction() as (connection, now):
            items = json.dumps([asdict(item) for item in found])
            await connection.execute(insert, {"found": items, "now": now})
            ids = [item.payroc_refund_id for item in found]
            await set_aside_paid(connection, now, "f.payroc_refund_id = ANY(:ids)", {"ids": ids})

    async def foreign_keys(self, keys: Sequence[str]) -> dict[str, str]:
        """Return Payroc's refund id by key, for those keys that an object without a refund carries."""
        query = """
            SELECT idempotency_key, min(payroc_refund_id) AS payroc_refund_id
            FROM refund_ledger.foreign_refunds
            WHERE idempotency_key = ANY(CAST(:keys AS uuid[])) GROUP BY idempotency_key"""
        rows = await self._execute(query, keys=list(keys))
        return {str(row.idempotency_key): row.payroc_refund_id for row in rows}
