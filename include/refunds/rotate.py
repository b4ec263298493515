"""Rotation of the encryption key: every request that is kept is encrypted anew with the first key, while the service goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from include.refunds.cipher import Cipher, UnreadableRequest
from include.refunds.ledger import Ledger

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


async def rotate_keys(ledger: Ledger, cipher: Cipher, *, advance: Callable[[int], None]) -> Rotated:
    """
    Encrypt every request anew that another key than the first one encrypted.

    Each batch is a transaction of its own, so a rotation that was cut off goes on where it stopped, and no refund waits for it.

    :param advance: called with the number of requests of each batch.
    """
    key_id = cipher.key_ids[0]
    rotated = Rotated()
    after = 0
    while kept := await ledger.requests.requests_to_rotate(key_id, after=after, limit=_BATCH):
        anew = []
        for row in kept:
            try:
                anew.append(
                    (row, cipher.seal(cipher.open(row.request, row.request_sha256, row.id, row.request_key)))
                )
            except UnreadableRequest as error:
                rotated.unreadable.append(str(error))
        rotated.done += await ledger.requests.store_rotated(anew)
        advance(len(kept))
        after = kept[-1].id
    if rotated.done:
        await ledger.requests.note_rotation(key_id, rotated.done)
    return rotated
