"""
How far Payroc's list of each terminal is known, and what stands on it that no refund of the ledger has.

A ledger that was restored, lost, copied or asleep has forgotten payments. It reads on from where it had
read, so it finds them before it sends anything; nothing outside the ledger is needed for that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from include.refunds.classify import EVERYTHING
from include.refunds.ledger.connection import Connection, Row
from include.refunds.ledger.pauses import Pauses
from include.refunds.ledger.rows import lock
from include.refunds.transitions import forgotten

KNOWN_FOR = timedelta(days=4)
"""A first attempt leaves only while its terminal's list is known up to less than this ago."""

# True of an instruction i whose terminal's list was read up to a moment after `known_since`, with the API
# host and key whose hash is `with_`. Both are SQL.
_LIST_IS_KNOWN = """EXISTS (
    SELECT FROM refund_ledger.terminals AS list
    WHERE list.terminal = i.processing_terminal_id AND list.read_to > {known_since}
      AND list.read_with = {with_})"""


_OWNED_BY_NONE = """NOT EXISTS (
    SELECT FROM refund_ledger.refund_states AS owner WHERE owner.payroc_refund_id = f.payroc_refund_id)"""

_PENDING = """refund_ledger.refund_states AS s JOIN refund_ledger.refund_instructions AS i
    ON i.id = s.refund_id AND s.status IN ('approved', 'held', 'released')"""


def list_is_known(*, known_since: str, with_: str) -> str:
    """
    Return the condition, as SQL, of a first attempt of an instruction ``i``: its terminal's list is known.

    :param known_since: SQL of the moment after which the list has to be known.
    :param with_: SQL of the hash of API host and key that have to be those of the reading.
    """
    return _LIST_IS_KNOWN.format(known_since=known_since, with_=with_)


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


@dataclass(frozen=True, slots=True)
class Foreign:
    """
    An object on Payroc's list that no refund of the ledger has.

    :param idempotency_key: the key of this project that it carries, ``None`` without one.
    :param plain: it came without custom fields, so nothing tells whether this project made it.
    """

    payroc_refund_id: str
    idempotency_key: str | None
    terminal: str
    order_id: str
    amount: int
    currency: str
    last4: str | None
    payroc_status: str
    plain: bool


class Continuity(Pauses):
    """The tables ``terminals`` and ``foreign_refunds``."""

    async def terminal_lists(self) -> list[TerminalList]:
        """Return the lists of all terminals that a row or a refund ever named, by terminal."""
        query = f"SELECT {', '.join(TerminalList.__slots__)} FROM refund_ledger.terminals ORDER BY terminal"
        async with self._database.transaction() as (connection, _):
            return [TerminalList(**row) for row in await connection.execute(query)]

    async def all_terminals(self) -> list[str]:
        """Return the terminals of all rows and refunds, without those that Payroc has always refused."""
        lists = await self.terminal_lists()
        return [item.terminal for item in lists if item.read_to is not None or not item.refused]

    async def note_terminals(self, terminals: Collection[str]) -> None:
        """Note that these terminals have lists to be read."""
        insert = """
            INSERT INTO refund_ledger.terminals (terminal)
            SELECT jsonb_array_elements_text(CAST(:terminals AS jsonb)) ORDER BY 1 ON CONFLICT DO NOTHING"""
        async with self._database.transaction() as (connection, _):
            await connection.execute(insert, {"terminals": json.dumps(sorted(set(terminals)))})

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
        values = {"terminal": terminal, "read_from": read_from, "read_to": read_to, "read_with": read_with}
        async with self._database.transaction() as (connection, _):
            await connection.execute(upsert, values)

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
        async with self._database.transaction() as (connection, now):
            values = {"terminal": terminal, "refused": refused, "now": now, "failure": failure[:500]}
            await connection.execute(upsert, values)

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
            await self._set_aside_paid(connection, now, "f.payroc_refund_id = ANY(:ids)", {"ids": ids})

    async def foreign_keys(self, keys: Sequence[str]) -> dict[str, str]:
        """Return Payroc's refund id by key, for those keys that an object without a refund carries."""
        query = """
            SELECT idempotency_key, min(payroc_refund_id) AS payroc_refund_id
            FROM refund_ledger.foreign_refunds
            WHERE idempotency_key = ANY(CAST(:keys AS uuid[])) GROUP BY idempotency_key"""
        async with self._database.transaction() as (connection, _):
            rows = await connection.execute(query, {"keys": list(keys)})
            return {str(row.idempotency_key): row.payroc_refund_id for row in rows}

    async def _set_aside_paid(
        self, connection: Connection, now: datetime, condition: str, values: dict[str, Any]
    ) -> None:
        """
        Send pending refunds to review that an object of ``foreign_refunds`` may have paid.

        An object with the refund's key has, so sending pauses as well: the ledger has forgotten it. One
        without custom fields that no other refund owns may have, when terminal and order id, or terminal,
        amount, currency and last four digits, are the same.

        :param condition: which instructions ``i`` and objects ``f`` are looked at, as SQL with ``values``.
        """
        # A branch for each index.
        query = f"""
            SELECT i.id, f.payroc_refund_id, f.payroc_status, true AS by_key
            FROM {_PENDING} JOIN refund_ledger.foreign_refunds AS f ON f.idempotency_key = i.idempotency_key
            WHERE {condition}
            UNION
            SELECT i.id, f.payroc_refund_id, f.payroc_status, false
            FROM {_PENDING} JOIN refund_ledger.foreign_refunds AS f
              ON f.plain AND f.terminal = i.processing_terminal_id AND f.order_id = i.order_id
            WHERE {condition} AND {_OWNED_BY_NONE}
            UNION
            SELECT i.id, f.payroc_refund_id, f.payroc_status, false
            FROM {_PENDING} JOIN refund_ledger.foreign_refunds AS f
              ON f.plain AND f.payroc_status <> 'declined' AND f.terminal = i.processing_terminal_id
              AND (f.amount, f.currency, f.last4) = (i.amount, i.currency, i.payee_last4)
            WHERE {condition} AND {_OWNED_BY_NONE}
            ORDER BY by_key DESC, id, payroc_refund_id"""
        # What carries the key comes first.
        found: dict[int, Row] = {}
        for row in await connection.execute(query, values):
            found.setdefault(row.id, row)
        if not found:
            return
        await lock(connection, found)
        for refund_id, row in found.items():
            await self._set_aside(connection, refund_id, row, now)

    async def _set_aside(self, connection: Connection, refund_id: int, row: Row, now: datetime) -> None:
        """Send a pending refund to review; one that is no longer pending stays where it is."""
        take_back = """
            UPDATE refund_ledger.refund_states SET status = 'approved', updated_at = :now
            WHERE refund_id = :id AND status = 'released'"""
        review = """
            UPDATE refund_ledger.refund_states SET status = 'review', reason = :reason, updated_at = :now,
                payroc_refund_id = CAST(:payroc_refund_id AS text),
                payroc_status = CAST(:payroc_status AS text), payroc_seen_at = CAST(:seen_at AS timestamptz)
            WHERE refund_id = :id AND status IN ('approved', 'held')"""
        reason = why_paid(row.payroc_refund_id, by_key=row.by_key)
        own = row.by_key and not await _is_owned(connection, row.payroc_refund_id)
        values = {
            "id": refund_id,
            "now": now,
            "reason": reason,
            "payroc_refund_id": row.payroc_refund_id if own else None,
            "payroc_status": row.payroc_status if own else None,
            "seen_at": now if own else None,
        }
        await connection.execute(take_back, {"id": refund_id, "now": now})
        if await connection.change(review, values) == 0:
            return
        detail = {"payroc_refund_id": row.payroc_refund_id}
        await self._event(connection, "contradiction", refund_id=refund_id, reason=reason, detail=detail)
        if row.by_key:
            what = f"Payroc holds refund {row.payroc_refund_id} of refund {refund_id}"
            await self._pause(connection, EVERYTHING, forgotten(what))


async def _is_owned(connection: Connection, payroc_refund_id: str) -> bool:
    query = (
        "SELECT EXISTS (SELECT FROM refund_ledger.refund_states WHERE payroc_refund_id = :payroc_refund_id)"
    )
    return bool((await connection.execute(query, {"payroc_refund_id": payroc_refund_id})).scalar_one())


def why_paid(payroc_refund_id: str, *, by_key: bool) -> str:
    """Return why a pending refund goes to review."""
    if by_key:
        return (
            f"Payroc's refund {payroc_refund_id} carries the key of this one, which this ledger never sent."
        )
    return (
        f"Payroc's refund {payroc_refund_id} has the terminal and the order id of this one, or its terminal, amount, "
        "currency and last four digits; no other refund owns it, and nothing tells who made it: look at it in "
        "Payroc's portal."
    )
