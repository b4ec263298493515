"""Payroc's list of a terminal, in batches that are compared with the ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from uuid import UUID

from include.payroc import models
from include.payroc.errors import PayrocError
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


def keys_of(found: Sequence[models.Refund]) -> list[str]:
    """Return the keys that objects carry, those that can be keys of ours."""
    return [key for item in found if (key := _key(item)) is not None]


def pairs(found: Sequence[models.Refund], rows: Sequence[Refund]) -> list[tuple[models.Refund, Refund | None]]:
    """Return each object with the refund that it belongs to: by the key that it carries, else by its refund id."""
    by_key = {str(row.idempotency_key): row for row in rows}
    by_id = {row.payroc_refund_id: row for row in rows}
    return [(item, by_key.get(_key(item) or "") or by_id.get(item.refund_id)) for item in found]


def _key(found: models.Refund) -> str | None:
    # Anybody may write a custom field of this name.
    try:
        return str(UUID(found.refund_key)) if found.refund_key else None
    except ValueError:
        return None
