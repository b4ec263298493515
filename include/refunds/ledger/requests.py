"""
The frozen requests at rest: emptied when nobody needs them any more, encrypted anew when the key
changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from include.refunds.cipher import Sealed
from include.refunds.ledger.database import Part
from include.refunds.ledger.events import event


@dataclass(frozen=True, slots=True)
class KeptRequest:
    """An encrypted request as the ledger holds it."""

    id: int
    request: bytes
    request_key: str | None
    request_sha256: str


class Requests(Part):
    """The table ``frozen_requests``."""

    async def empty_requests(self, kept_for: timedelta, limit: int) -> int:
        """
        Empty the requests of refunds that ended long ago, and return how many. What was emptied stays empty.

        :param kept_for: how long a request is kept after the refund has ended.
        :param limit: at most so many, in the order of their ids.
        """
        update = """
            UPDATE refund_ledger.frozen_requests SET request = NULL WHERE refund_id IN (
                SELECT q.refund_id FROM refund_ledger.frozen_requests AS q
                JOIN refund_ledger.refund_states AS s ON s.refund_id = q.refund_id
                JOIN refund_ledger.refund_instructions ON id = q.refund_id
                WHERE source = :source AND request IS NOT NULL AND updated_at <= :before
                  AND status IN ('settled', 'returned', 'reversed', 'rejected', 'cancelled')
                ORDER BY q.refund_id LIMIT :limit)"""
        async with self._database.transaction() as (connection, now):
            values = {"source": self._database.settings.source, "before": now - kept_for, "limit": limit}
            return await connection.change(update, values)

    async def requests_by_key(self) -> dict[str, int]:
        """
        Return how many requests each key encrypted; ``unknown`` counts those from before the ledger
        noted it.
        """
        query = """
            SELECT COALESCE(request_key, 'unknown') AS key, count(*) AS requests
            FROM refund_ledger.frozen_requests JOIN refund_ledger.refund_instructions ON id = refund_id
            WHERE source = :source AND request IS NOT NULL GROUP BY 1 ORDER BY 1"""
        return {row.key: row.requests for row in await self._execute(query)}

    async def requests_to_rotate(self, key_id: str, *, after: int, limit: int) -> list[KeptRequest]:
        """Return requests that another key encrypted, by id."""
        query = """
            SELECT id, request, request_key, request_sha256
            FROM refund_ledger.frozen_requests JOIN refund_ledger.refund_instructions ON id = refund_id
            WHERE source = :source AND request IS NOT NULL AND request_key IS DISTINCT FROM :key_id AND refund_id > :after
            ORDER BY refund_id LIMIT :limit"""
        rows = await self._execute(query, key_id=key_id, after=after, limit=limit)
        return [KeptRequest(**row) for row in rows]

    async def store_rotated(self, rows: Sequence[tuple[KeptRequest, Sealed]]) -> int:
        """
        Put newly encrypted requests in the place of the old ones, and return how many; one that was emptied
        meanwhile stays empty.
        """
        update = """
            UPDATE refund_ledger.frozen_requests SET request = :new, request_key = :key_id
            WHERE refund_id = :id AND request = :old"""
        stored = 0
        async with self._database.transaction() as (connection, _):
            for kept, sealed in rows:
                values = {"id": kept.id, "old": kept.request, "new": sealed.token, "key_id": sealed.key_id}
                stored += await connection.change(update, values)
        return stored

    async def note_rotation(self, key_id: str, requests: int) -> None:
        """Leave an event of a finished rotation."""
        async with self._database.transaction() as (connection, _):
            await event(
                connection,
                "rotation",
                reason=f"{requests} requests are encrypted with the key {key_id} now.",
            )
