"""The life of a refund: its states and the only ways between them. The database enforces the same graph."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """Status of a refund in the ledger."""

    APPROVED = "approved"
    HELD = "held"
    RELEASED = "released"
    SENDING = "sending"
    UNKNOWN = "unknown"
    ACCEPTED = "accepted"
    SETTLED = "settled"
    RETURNED = "returned"
    REVERSED = "reversed"
    REJECTED = "rejected"
    REVIEW = "review"
    CANCELLED = "cancelled"


# What Payroc's object makes of a refund that the ledger has never sent: a restored or lost ledger has
# forgotten that it did.
_RECOVERED = (Status.ACCEPTED, Status.SETTLED, Status.RETURNED, Status.REVERSED, Status.REJECTED)

_NEXT: dict[Status, tuple[Status, ...]] = {
    Status.APPROVED: (Status.HELD, Status.RELEASED, Status.CANCELLED, Status.REVIEW, *_RECOVERED),
    Status.HELD: (Status.APPROVED, Status.CANCELLED, Status.REVIEW, *_RECOVERED),
    Status.RELEASED: (Status.SENDING, Status.APPROVED, Status.HELD),
    Status.SENDING: (
        Status.ACCEPTED,
        Status.SETTLED,
        Status.REJECTED,
        Status.UNKNOWN,
        Status.REVIEW,
        Status.SENDING,
        Status.RELEASED,
    ),
    Status.UNKNOWN: (
        Status.SENDING,
        Status.ACCEPTED,
        Status.SETTLED,
        Status.RETURNED,
        Status.REVERSED,
        Status.REJECTED,
        Status.REVIEW,
    ),
    Status.ACCEPTED: (Status.SETTLED, Status.RETURNED, Status.REVERSED, Status.REJECTED, Status.REVIEW),
    Status.SETTLED: (Status.RETURNED, Status.REVIEW),
    Status.REVIEW: (Status.ACCEPTED, Status.REJECTED, Status.SETTLED, Status.RETURNED, Status.REVERSED),
    Status.REVERSED: (Status.REVIEW,),
    Status.RETURNED: (Status.REVIEW,),
    Status.REJECTED: (Status.REVIEW,),
    Status.CANCELLED: (Status.REVIEW,),
}

EDGES = frozenset((source, target) for source, targets in _NEXT.items() for target in targets)

# A Payroc object proved that the money was accepted at some time.
PAID = frozenset({Status.ACCEPTED, Status.SETTLED, Status.RETURNED, Status.REVERSED})

# Sent, and no proof yet of what became of it.
IN_DOUBT = frozenset({Status.SENDING, Status.UNKNOWN})

# Ended without money at the payee: the only refunds that a reissue may replace.
REPLACEABLE = frozenset({Status.REJECTED, Status.RETURNED, Status.REVERSED})
