"""Held refunds, and those that are never to be sent: what people may decide about them. Pure functions."""

from __future__ import annotations

from include.refunds.case import DecisionRefused, same_person
from include.refunds.refund import Refund
from include.refunds.states import Status

_WAYS = {
    Status.APPROVED: (Status.CANCELLED,),
    Status.HELD: (Status.CANCELLED,),
    Status.RELEASED: (Status.APPROVED, Status.CANCELLED),
}


def check_hold(refund: Refund, requested_by: str, by: str) -> None:
    """
    Make sure that a person may release the holds of a refund.

    :param requested_by: who requested the refund.
    :param by: who would release it.
    :raises DecisionRefused: when it is not held, or the same person requested it.
    """
    if refund.status is not Status.HELD:
        raise DecisionRefused(f"Refund {refund.id} is {refund.status}, not held.")
    if same_person(requested_by, by):
        raise DecisionRefused(
            f"{by.strip()} requested refund {refund.id} and can't release it; another person has to."
        )


def way_to_cancelled(refund: Refund) -> tuple[Status, ...]:
    """
    Return the statuses through which a refund is cancelled.

    :raises DecisionRefused: when it may have been sent, or has ended.
    """
    if refund.status not in _WAYS:
        raise DecisionRefused(
            f"Refund {refund.id} is {refund.status}; only one that was not sent yet is cancelled."
        )
    if refund.payroc_refund_id is not None:
        raise DecisionRefused(
            f"Refund {refund.id} exists at Payroc as {refund.payroc_refund_id}, so it can't be cancelled."
        )
    return _WAYS[refund.status]
