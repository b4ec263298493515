"""A refund as the ledger holds it, and what is known of its earlier attempts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from include.refunds.states import Status


@dataclass(frozen=True, slots=True)
class Refund:
    """A refund of the ledger: instruction, state and request, without the columns that sending does not need."""

    id: int
    source_ref: str
    processing_terminal_id: str
    order_id: str
    amount: int
    currency: str
    payee_last4: str | None
    approved_at: datetime
    idempotency_key: UUID
    request: bytes | None
    request_sha256: str
    request_key: str | None
    sent_with: str | None
    status: Status
    reason: str | None
    released_at: datetime | None
    attempts: int
    first_sent_at: datetime | None
    lease_until: datetime | None
    next_attempt_at: datetime | None
    payroc_refund_id: str | None
    payroc_status: str | None
    replaces: int | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class History:
    """
    What earlier attempts of a refund left behind.

    :param unresolved: an earlier attempt has passed its last check and has no outcome, or ``unknown``: it may have
        reached Payroc.
    :param processed: Payroc has answered an earlier attempt with what ends a refund, so it knows the key.
    :param key_in_use: an earlier attempt was told that the key is in use.
    :param unauthorized_at: when Payroc last answered 401 to an attempt.
    :param posted: an earlier attempt has passed its last check. All others have sent nothing.
    """

    unresolved: bool = False
    processed: bool = False
    key_in_use: bool = False
    unauthorized_at: datetime | None = None
    posted: bool = False
