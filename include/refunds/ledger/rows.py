"""Rows of the ledger as the protocol knows them: a refund, and what its attempts left behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from include.refunds.ledger.connection import Connection, as_array
from include.refunds.ledger.database import NoSuchRefund
from include.refunds.refund import History, Refund
from include.refunds.states import Status

# What changes of a refund, and what its frozen request says; all else is the instruction's.
_OF_STATE = frozenset(
    {
        "sent_with",
        "status",
        "reason",
        "released_at",
        "attempts",
        "first_sent_at",
        "lease_until",
        "next_attempt_at",
        "payroc_refund_id",
        "payroc_status",
        "updated_at",
    }
)
_OF_REQUEST = frozenset({"request", "request_key"})


def _column(name: str) -> str:
    return f"{'s' if name in _OF_STATE else 'q' if name in _OF_REQUEST else 'i'}.{name}"


COLUMNS = ", ".join(map(_column, Refund.__slots__))
"""The columns of a refund, of its state ``s``, its instruction ``i`` and its request ``q``."""

REFUNDS = """refund_ledger.refund_states AS s JOIN refund_ledger.refund_instructions AS i ON i.id = s.refund_id
    LEFT JOIN refund_ledger.frozen_requests AS q ON q.refund_id = s.refund_id"""
"""The tables of :data:`COLUMNS`."""

_STATE = [name for name in Refund.__slots__ if name in _OF_STATE]
STATE = ", ".join(("s.refund_id", *map(_column, _STATE)))
"""The columns that :func:`changed` takes, of a state ``s``."""

_STATUS = Refund.__slots__.index("status")

# Ids as a statement's value, given by as_array(). Those of a group are compared with each row; those of many
# refunds are joined, because the time of a comparison with each grows with both.
IDS = "CAST(CAST(:ids AS text) AS bigint[])"
OF_MANY = f"IN (SELECT unnest({IDS}))"

NEVER_POSTED = "a.finished_at IS NULL AND a.posting_at IS NULL"
"""True of an attempt ``a`` whose worker is at it, or was stopped before its last check."""


def as_refund(row: Sequence[Any]) -> Refund:
    """Return the refund of a row of :data:`COLUMNS`."""
    values = list(row)
    values[_STATUS] = Status(values[_STATUS])
    return Refund(*values)


def by_id(rows: Iterable[Sequence[Any]]) -> dict[int, Refund]:
    """Return the refunds of rows of :data:`COLUMNS`, by their ids."""
    return {refund.id: refund for refund in map(as_refund, rows)}


def changed(refunds: Mapping[int, Refund], rows: Iterable[Mapping[str, Any]]) -> dict[int, Refund]:
    """Return refunds with the states of rows of :data:`STATE`, by their ids."""
    return {
        row["refund_id"]: replace(
            refunds[row["refund_id"]],
            **{name: row[name] for name in _STATE if name != "status"},
            status=Status(row["status"]),
        )
        for row in rows
    }


async def lock(
    connection: Connection, refund_ids: Iterable[int], condition: str = "true", **values: object
) -> dict[int, datetime]:
    """
    Lock the states of refunds until the end of the transaction, in the order of their ids, so that two
    transactions with the same refunds wait for each other and are not deadlocked.

    A statement that has waited for a row goes on with the snapshot that it had before. So this is a statement
    of its own, and the next one sees everything as the last transaction left it.

    :param condition: of a state; others are left alone.
    :param values: of the condition.
    :returns: the ids of those that are locked, each with the ledger's time once it was.
    """
    query = f"""
        SELECT refund_id, refund_ledger.now() AS now FROM (
            SELECT refund_id FROM refund_ledger.refund_states WHERE refund_id {OF_MANY} AND {condition}
            ORDER BY refund_id FOR NO KEY UPDATE OF refund_states) AS locked"""
    rows = await connection.execute(query, {"ids": as_array(refund_ids), **values})
    return {row.refund_id: row.now for row in rows}


async def select_refunds(connection: Connection, refund_ids: Iterable[int]) -> dict[int, Refund]:
    """Return refunds by their id; those that do not exist are left out."""
    query = f"SELECT {COLUMNS} FROM {REFUNDS} WHERE s.refund_id = ANY({IDS})"
    return by_id(await connection.execute(query, {"ids": as_array(refund_ids)}))


async def lock_refund(connection: Connection, refund_id: int) -> Refund:
    """
    Lock a refund's state until the end of the transaction, and return the refund.

    :raises NoSuchRefund: when there is none.
    """
    await lock(connection, [refund_id])
    return await select_refund(connection, refund_id)


async def select_refund(connection: Connection, refund_id: int) -> Refund:
    """
    Return a refund.

    :raises NoSuchRefund: when there is none.
    """
    refund = (await select_refunds(connection, [refund_id])).get(refund_id)
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
            SELECT asked.id, COALESCE(bool_or(posting_at IS NOT NULL), false) AS posted,
                   COALESCE(bool_or(posting_at IS NOT NULL AND (outcome IS NULL OR outcome = 'unknown')), false)
                       AS unresolved,
                   COALESCE(bool_or(outcome IN ('accepted', 'rejected', 'review')), false) AS processed,
                   COALESCE(bool_or(problem_type = 'idempotency-key-in-use'), false) AS key_in_use,
                   max(finished_at) FILTER (WHERE http_status = 401 OR problem_type = 'not-authorized') AS unauthorized_at
            FROM unnest({IDS}, CAST(CAST(:before AS text) AS integer[])) AS asked (id, before)
            JOIN refund_ledger.refund_attempts ON refund_id = asked.id AND attempt < asked.before
            GROUP BY asked.id"""
        found = await connection.execute(query, {"ids": as_array(asked), "before": as_array(asked.values())})
        histories |= {
            row.id: History(
                row.unresolved, row.processed, row.key_in_use, row.unauthorized_at, posted=row.posted
            )
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
        SELECT refund_id, payroc_refund_id FROM refund_ledger.refund_states
        WHERE payroc_refund_id = ANY(ARRAY(SELECT json_array_elements_text(CAST(:payroc_refund_ids AS json))))"""
    found = await connection.execute(
        query, {"payroc_refund_ids": json.dumps(list(payroc_refund_ids.values()))}
    )
    owner = {row.payroc_refund_id: row.refund_id for row in found}
    return {
        refund_id
        for refund_id, named in payroc_refund_ids.items()
        if owner.get(named, refund_id) != refund_id
    }
