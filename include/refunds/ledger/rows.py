"""Rows of the ledger as the protocol knows them: a refund, and what its attempts left behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from include.refunds.ledger.base import NoSuchRefund
from include.refunds.ledger.connection import Connection, as_array
from include.refunds.refund import History, Refund
from include.refunds.states import Status

COLUMNS = ", ".join(f"r.{name}" for name in Refund.__slots__)
_STATUS = Refund.__slots__.index("status")

# Ids as a statement's value, given by as_array().
IDS = "CAST(CAST(:ids AS text) AS bigint[])"


def as_refund(row: Sequence[Any]) -> Refund:
    """Return the refund of a row of :data:`COLUMNS`."""
    values = list(row)
    values[_STATUS] = Status(values[_STATUS])
    return Refund(*values)


def by_id(rows: Iterable[Sequence[Any]]) -> dict[int, Refund]:
    """Return the refunds of rows of :data:`COLUMNS`, by their ids."""
    return {refund.id: refund for refund in map(as_refund, rows)}


async def select_refunds(
    connection: Connection, refund_ids: Sequence[int], *, for_update: bool = False
) -> dict[int, Refund]:
    """
    Return refunds by their id; those that do not exist are left out.

    :param for_update: lock their rows until the end of the transaction, in the order of their ids, so that two workers with the same
        refunds wait for each other and are not deadlocked.
    """
    query = f"SELECT {COLUMNS} FROM refund_ledger.refunds AS r WHERE id = ANY({IDS}) ORDER BY id" + (
        " FOR UPDATE" if for_update else ""
    )
    return by_id(await connection.execute(query, {"ids": as_array(refund_ids)}))


async def select_refund(connection: Connection, refund_id: int, *, for_update: bool = False) -> Refund:
    """
    Return a refund.

    :param for_update: lock its row until the end of the transaction.
    :raises NoSuchRefund: when there is none.
    """
    refund = (await select_refunds(connection, [refund_id], for_update=for_update)).get(refund_id)
    if refund is None:
        raise NoSuchRefund(f"The ledger holds no refund {refund_id}.")
    return refund


async def select_histories(connection: Connection, before: Mapping[int, int]) -> dict[int, History]:
    """
    Return what earlier attempts of refunds left behind.

    :param before: for each refund's id the number of the attempt before which they lie.
    """
    histories = dict.fromkeys(before, History())
    # Most refunds are sent once, and nothing lies before a first attempt.
    asked = {refund_id: attempt for refund_id, attempt in before.items() if attempt > 1}
    if asked:
        query = f"""
            SELECT asked.id, COALESCE(bool_or(outcome IS NULL OR outcome = 'unknown'), false) AS unresolved,
                   COALESCE(bool_or(outcome IN ('accepted', 'rejected', 'review')), false) AS processed,
                   COALESCE(bool_or(problem_type = 'idempotency-key-in-use'), false) AS key_in_use,
                   max(finished_at) FILTER (WHERE http_status = 401 OR problem_type = 'not-authorized') AS unauthorized_at
            FROM unnest({IDS}, CAST(CAST(:before AS text) AS integer[])) AS asked (id, before)
            JOIN refund_ledger.refund_attempts ON refund_id = asked.id AND attempt < asked.before
            GROUP BY asked.id"""
        found = await connection.execute(query, {"ids": as_array(asked), "before": as_array(asked.values())})
        histories |= {
            row.id: History(row.unresolved, row.processed, row.key_in_use, row.unauthorized_at)
            for row in found
        }
    return histories


async def standing_elsewhere(connection: Connection, payroc_refund_ids: Mapping[int, str]) -> set[int]:
    """
    Return which refunds name a refund id of Payroc's that stands at another refund of the ledger.

    :param payroc_refund_ids: Payroc's id by the id of the refund that names it.
    """
    if not payroc_refund_ids:
        return set()
    query = """
        SELECT id, payroc_refund_id FROM refund_ledger.refunds
        WHERE payroc_refund_id = ANY(ARRAY(SELECT json_array_elements_text(CAST(:payroc_refund_ids AS json))))"""
    found = await connection.execute(
        query, {"payroc_refund_ids": json.dumps(list(payroc_refund_ids.values()))}
    )
    owner = {row.payroc_refund_id: row.id for row in found}
    return {
        refund_id
        for refund_id, named in payroc_refund_ids.items()
        if owner.get(named, refund_id) != refund_id
    }
