"""Held refunds, and those that are never to be sent: what people may decide about them. Pure functions."""

from __future__ import annotations

from include.refunds.case import DecisionRefused
from include.refunds.people import same_person
from include.refunds.printable import printable
from include.refunds.refund import Refund
from include.refunds.states import Status

_WAYS = {
    Status.APPROVED: (Status.CANCELLED,),
    Status.HELD: (Status.CANCELLED,),
    Status.RELEASED: (Status.APPROVED, Status.CANCELLED),
}


def check_hold(refund: Refund, requested_by: str, by: str, login: str | None = None) -> None:
    """
    Make sure that an operator may lift the hold of a refund.

    :param requested_by: who requested the refund.
    :param by: the operator.
    :param login: the operator's database login, ``None`` when all operators share one.
    :raises DecisionRefused: when it is not held, or the same person requested it.
    """
    if refund.status is not Status.HELD:
        raise DecisionRefused(f"Refund {refund.id} is {refund.status}, not held.")
    # A login is often the first part of an address: ann of ann@example.com.
    names_of_login = (requested_by, requested_by.partition("@")[0])
    for operator, names in ((by, (requested_by,)), (login, names_of_login)):
        if operator is not None and any(same_person(name, operator) for name in names):
            raise DecisionRefused(
                f"{printable(operator.strip())} requested refund {refund.id} and can't unhold it; "
                "another operator has to."
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
            f"Refund {refund.id} exists at Payroc as {printable(refund.payroc_refund_id)}, so it can't be cancelled."
        )
    return _WAYS[refund.status]
