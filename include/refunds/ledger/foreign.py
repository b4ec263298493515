"""
Objects on Payroc's list that no refund of the ledger has, and the pending refunds that they may
have paid.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from include.refunds.classify import EVERYTHING
from include.refunds.ledger.connection import Connection, Row
from include.refunds.ledger.events import event
from include.refunds.ledger.pauses import pause
from include.refunds.ledger.rows import lock, standing_elsewhere
from include.refunds.transitions import forgotten

_OWNED_BY_NONE = """NOT EXISTS (
    SELECT FROM refund_ledger.refund_states AS owner WHERE owner.payroc_refund_id = f.payroc_refund_id)"""

_PENDING = """refund_ledger.refund_states AS s JOIN refund_ledger.refund_instructions AS i
    ON i.id = s.refund_id AND s.status IN ('approved', 'held', 'released')"""


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


async def set_aside_paid(
    connection: Connection, now: datetime, condition: str, values: dict[str, Any]
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
        await _set_aside(connection, refund_id, row, now)


async def _set_aside(connection: Connection, refund_id: int, row: Row, now: datetime) -> None:
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
    own = row.by_key and not await standing_elsewhere(connection, {refund_id: row.payroc_refund_id})
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
    await event(connection, "contradiction", refund_id=refund_id, reason=reason, detail=detail)
    if row.by_key:
        what = f"Payroc holds refund {row.payroc_refund_id} of refund {refund_id}"
        await pause(connection, EVERYTHING, forgotten(what))


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
