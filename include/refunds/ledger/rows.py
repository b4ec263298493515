"""Rows of the ledger as the protocol knows them: a refund, and what its attempts left behind."""

from __future__ import annotations

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from include.refunds.ledger.base import NoSuchRefund
from include.refunds.refund import History, Refund
from include.refunds.states import Status

COLUMNS = ", ".join(f"r.{name}" for name in Refund.__slots__)


def as_refund(row: RowMapping) -> Refund:
    """Return the refund of a row of :data:`COLUMNS`."""
    return Refund(**{**row, "status": Status(row["status"])})


async def select_refund(connection: AsyncConnection, refund_id: int, *, for_update: bool = False) -> Refund:
    """
    Return a refund.

    :param for_update: lock its row until the end of the transaction.
    :raises NoSuchRefund: when there is none.
    """
    query = text(f"SELECT {COLUMNS} FROM refund_ledger.refunds AS r WHERE id = :id" + (" FOR UPDATE" if for_update else ""))
    row = (await connection.execute(query, {"id": refund_id})).mappings().one_or_none()
    if row is None:
        raise NoSuchRefund(f"The ledger holds no refund {refund_id}.")
    return as_refund(row)


async def select_history(connection: AsyncConnection, refund_id: int, *, before: int) -> History:
    """Return what the attempts before this one left behind."""
    query = text("""
        SELECT COALESCE(bool_or(outcome IS NULL OR outcome = 'unknown'), false) AS unresolved,
               COALESCE(bool_or(problem_type = 'idempotency-key-in-use'), false) AS key_in_use,
               max(finished_at) FILTER (WHERE http_status = 401 OR problem_type = 'not-authorized') AS unauthorized_at
        FROM refund_ledger.refund_attempts WHERE refund_id = :id AND attempt < :before""")
    return History(**(await connection.execute(query, {"id": refund_id, "before": before})).mappings().one())


async def stands_elsewhere(connection: AsyncConnection, refund_id: int, payroc_refund_id: str) -> bool:
    """Tell whether a refund id of Payroc's stands at another refund of the ledger."""
    query = text("SELECT EXISTS (SELECT FROM refund_ledger.refunds WHERE payroc_refund_id = :payroc_refund_id AND id <> :id)")
    return bool((await connection.execute(query, {"payroc_refund_id": payroc_refund_id, "id": refund_id})).scalar_one())
