"""Refunds as they are read: one by one, and those that a step is about."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from include.refunds.ledger.connection import as_array
from include.refunds.ledger.database import LedgerDatabase, NoSuchRefund, Part
from include.refunds.ledger.grouping import Grouped
from include.refunds.ledger.rows import COLUMNS, IDS, REFUNDS, as_refund, select_histories
from include.refunds.refund import History, Refund


class Refunds(Part):
    """What is only read of refunds."""

    def __init__(self, database: LedgerDatabase) -> None:
        super().__init__(database)
        self._reads = Grouped(self._read)

    async def labels(self, refund_ids: Sequence[int]) -> list[str]:
        """Return the order ids of refunds, in the order given."""
        query = f"SELECT id, order_id FROM refund_ledger.refund_instructions WHERE id = ANY({IDS})"
        async with self._database.statement() as connection:
            found = {
                row.id: row.order_id for row in await connection.execute(query, {"ids": as_array(refund_ids)})
            }
        return [found.get(refund_id, f"no refund {refund_id}") for refund_id in refund_ids]

    async def read(self, refund_id: int) -> tuple[Refund, History, datetime]:
        """
        Return a refund, what its attempts left behind, and the ledger's time.

        :raises NoSuchRefund: when there is none.
        """
        found = await self._reads(refund_id, refund_id)
        if found is None:
            raise NoSuchRefund(f"The ledger holds no refund {refund_id}.")
        return found

    async def _read(self, refund_ids: Sequence[int]) -> list[tuple[Refund, History, datetime] | None]:
        query = f"SELECT {COLUMNS}, refund_ledger.now() AS now FROM {REFUNDS} WHERE s.refund_id = ANY({IDS})"
        async with self._database.statement("read") as connection:
            rows = await connection.execute(query, {"ids": as_array(refund_ids)})
            refunds = {row.id: (as_refund(row[:-1]), row.now) for row in rows}
            histories = await select_histories(
                connection, {refund.id: refund.attempts + 1 for refund, _ in refunds.values()}
            )
            return [
                (refunds[item][0], histories[item], refunds[item][1]) if item in refunds else None
                for item in refund_ids
            ]

    async def terminals(self, refund_ids: Sequence[int]) -> set[str]:
        """Return the processing terminals of refunds."""
        query = f"SELECT DISTINCT processing_terminal_id FROM refund_ledger.refund_instructions WHERE id = ANY({IDS})"
        return set((await self._execute(query, ids=as_array(refund_ids))).scalars())

    async def in_doubt(self) -> list[Refund]:
        """Return all refunds that are sending or unknown."""
        return await self._refunds("s.status IN ('sending', 'unknown')", {})

    async def not_sent(self) -> list[Refund]:
        """Return all refunds that wait to be sent: approved, held or released."""
        return await self._refunds("s.status IN ('approved', 'held', 'released')", {})

    async def followed(self, changed_within: timedelta, taken_over_within: timedelta) -> dict[str, datetime]:
        """
        Return the terminals of the refunds whose further way Payroc still has to say, each with the begin of
        the oldest of them.

        These are the accepted ones, those in review, and those that changed not long ago. A refund begins at
        its approval, because a restored ledger may have forgotten when it first sent it.

        :param changed_within: how long any other refund is followed: a bank may return one that settled, and
            Payroc may list one that ended here without a payment.
        :param taken_over_within: how far back a refund may begin that was taken over from Payroc's list and
            never sent from here: its approval may be younger than the payment, when it was approved again.
        """
        began = """CASE WHEN payroc_refund_id IS NOT NULL AND first_sent_at IS NULL THEN CAST(:longest AS timestamptz)
                        ELSE LEAST(approved_at, created_at) END AS began"""
        query = f"""
            SELECT processing_terminal_id, min(began) AS since FROM (
                SELECT processing_terminal_id, {began} FROM refund_ledger.refunds
                WHERE source = :source AND status IN ('accepted', 'review')
                UNION ALL
                SELECT processing_terminal_id, {began} FROM refund_ledger.refunds
                WHERE source = :source AND updated_at > :since
            ) AS followed
            GROUP BY processing_terminal_id ORDER BY processing_terminal_id"""
        async with self._database.transaction() as (connection, now):
            values = {
                "source": self._database.settings.source,
                "since": now - changed_within,
                "longest": now - taken_over_within,
            }
            return {row.processing_terminal_id: row.since for row in await connection.execute(query, values)}

    async def known(
        self, keys: Sequence[str], payroc_refund_ids: Sequence[str], order_ids: Sequence[str] = ()
    ) -> list[Refund]:
        """
        Return the refunds with one of these idempotency keys, of these refund ids of Payroc's, or of these
        order ids.
        """
        # One branch for each index: a single OR over them would read the whole ledger.
        condition = """s.refund_id IN (
            SELECT id FROM refund_ledger.refund_instructions
            WHERE idempotency_key = ANY(CAST(:keys AS uuid[])) OR order_id = ANY(:order_ids)
            UNION SELECT refund_id FROM refund_ledger.refund_states WHERE payroc_refund_id = ANY(:payroc_refund_ids))"""
        values = {
            "keys": list(keys),
            "payroc_refund_ids": list(payroc_refund_ids),
            "order_ids": list(order_ids),
        }
        return await self._refunds(condition, values)

    async def sent_between(self, start: datetime, end: datetime, *, after: int, limit: int) -> list[Refund]:
        """
        Return refunds that were first sent from ``start`` up to ``end``, ordered by id.

        :param after: only those with a greater id.
        :param limit: at most so many.
        """
        condition = "s.first_sent_at >= :start AND s.first_sent_at < :end AND s.refund_id > :after"
        return await self._refunds(condition, {"start": start, "end": end, "after": after}, limit=limit)

    async def replaced(self, refund_id: int) -> list[Refund]:
        """
        Return what a refund replaces: the one before it, the one before that, to the first of
        the chain.
        """
        query = f"""
            WITH RECURSIVE chain AS (
                SELECT replaces AS id, 1 AS place FROM refund_ledger.refund_instructions WHERE id = :id
                UNION ALL
                SELECT i.replaces, place + 1
                FROM refund_ledger.refund_instructions AS i JOIN chain ON i.id = chain.id
            )
            SELECT {COLUMNS} FROM {REFUNDS} JOIN chain ON chain.id = i.id ORDER BY place"""
        return [as_refund(row) for row in await self._execute(query, id=refund_id)]

    async def _refunds(
        self, condition: str, values: dict[str, Any], limit: int | None = None
    ) -> list[Refund]:
        query = f"""
            SELECT {COLUMNS} FROM {REFUNDS}
            WHERE source = :source AND {condition} ORDER BY s.refund_id LIMIT :limit"""
        return [as_refund(row) for row in await self._execute(query, limit=limit, **values)]
