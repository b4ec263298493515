"""Payroc's list of a terminal, in batches that are compared with the ledger."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Protocol
from uuid import UUID

from include.payroc import models
from include.payroc.errors import PayrocError, PayrocIncompleteList
from include.refunds.classify import is_ours
from include.refunds.refund import Refund

BATCH = 200


async def in_batches(listed: AsyncIterator[models.Refund]) -> AsyncIterator[list[models.Refund]]:
    """
    Yield the objects of a list, some hundreds at a time, each once in its batch.

    :raises PayrocError: when the list ends with an error, after everything that came before it was yielded.
    """
    batch: dict[str, models.Refund] = {}
    failure = None
    try:
        async for item in listed:
            batch[item.refund_id] = item
            if len(batch) == BATCH:
                yield list(batch.values())
                batch = {}
    except PayrocError as error:
        failure = error
    if batch:
        yield list(batch.values())
    if failure is not None:
        raise failure


def of_terminal(error: PayrocIncompleteList, terminal: str) -> list[str]:
    """Return the names of a list's objects that can't be understood, each with the terminal."""
    return [f"{name} of terminal {terminal}" for name in error.objects]


class Known(Protocol):
    """The refunds that objects of Payroc's may belong to."""

    async def known(
        self, keys: Sequence[str], payroc_refund_ids: Sequence[str], order_ids: Sequence[str] = ()
    ) -> list[Refund]:
        """See :meth:`~include.refunds.ledger.refunds.Refunds.known`."""


async def known(found: Sequence[models.Refund], refunds: Known) -> list[Refund]:
    """Return the refunds of the ledger that objects of Payroc's may belong to."""
    keys = [key for item in found if (key := key_of(item)) is not None]
    return await refunds.known(
        keys, [item.refund_id for item in found], [item.order.order_id for item in found]
    )


def pairs(
    found: Sequence[models.Refund], rows: Sequence[Refund]
) -> list[tuple[models.Refund, Refund | None]]:
    """
    Return each object with the refund that it belongs to: by the key that it carries, else by its refund id,
    else by all the rest.
    """
    by_key = {str(row.idempotency_key): row for row in rows}
    by_id = {row.payroc_refund_id: row for row in rows}
    by_order = {(row.processing_terminal_id, row.order_id): row for row in rows}

    def row_of(item: models.Refund) -> Refund | None:
        row = by_key.get(key_of(item) or "") or by_id.get(item.refund_id)
        if row is None:
            row = by_order.get((item.processing_terminal_id, item.order.order_id))
            return row if row is not None and is_ours(item, row) else None
        return row

    return [(item, row_of(item)) for item in found]


def key_of(found: models.Refund) -> str | None:
    """Return the idempotency key that an object carries; ``None`` without one, and for what is none."""
    # Anybody may write a custom field of this name.
    try:
        return str(UUID(found.refund_key)) if found.refund_key else None
    except ValueError:
        return None


def currency_of(found: models.Refund) -> str:
    """Return an object's currency, ``?`` when it is none: what was made elsewhere may name anything."""
    currency = found.order.currency
    return currency if re.fullmatch("[A-Z]{3}", currency) else "?"
