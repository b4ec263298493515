"""
Rotation of the encryption key: every request that is kept is encrypted anew with the first key, while the
service goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from include.refunds.cipher import Cipher, Sealed, UnreadableRequest
from include.refunds.ledger import KeptRequest

_BATCH = 200


@dataclass(slots=True)
class Rotated:
    """
    What a rotation did.

    :param done: requests that were encrypted anew.
    :param unreadable: a sentence for each request that could not be opened.
    """

    done: int = 0
    unreadable: list[str] = field(default_factory=list)


class Requests(Protocol):
    """What a rotation needs of the ledger."""

    async def requests_to_rotate(self, key_id: str, *, after: int, limit: int) -> list[KeptRequest]:
        """See :meth:`~include.refunds.ledger.requests.Requests.requests_to_rotate`."""

    async def store_rotated(self, rows: Sequence[tuple[KeptRequest, Sealed]]) -> int:
        """See :meth:`~include.refunds.ledger.requests.Requests.store_rotated`."""

    async def note_rotation(self, key_id: str, requests: int) -> None:
        """See :meth:`~include.refunds.ledger.requests.Requests.note_rotation`."""


async def rotate_keys(requests: Requests, cipher: Cipher, *, advance: Callable[[int], None]) -> Rotated:
    """
    Encrypt every request anew that another key than the first one encrypted.

    Each batch is a transaction of its own, so a rotation that was cut off goes on where it stopped, and no
    refund waits for it.

    :param advance: called with the number of requests of each batch.
    """
    key_id = cipher.key_ids[0]
    rotated = Rotated()
    after = 0
    while kept := await requests.requests_to_rotate(key_id, after=after, limit=_BATCH):
        anew = []
        for row in kept:
            try:
                anew.append(
                    (row, cipher.seal(cipher.open(row.request, row.request_sha256, row.id, row.request_key)))
                )
            except UnreadableRequest as error:
                rotated.unreadable.append(str(error))
        rotated.done += await requests.store_rotated(anew)
        advance(len(kept))
        after = kept[-1].id
    if rotated.done:
        await requests.note_rotation(key_id, rotated.done)
    return rotated
