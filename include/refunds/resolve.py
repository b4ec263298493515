"""
Resolve: people end a review with a reason. Payroc is asked first, both ways, and what it says counts more
than what people believe.

A wrong ``rejected`` is the dangerous one: it lets people pay again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from include.payroc import models
from include.payroc.errors import PayrocError
from include.payroc.models import AccessToken
from include.refunds.case import Case, DecisionRefused
from include.refunds.classify import Sighting, Verdict, status_of, word_of
from include.refunds.gateway import Reader
from include.refunds.ledger_parts import Cases, ChecksEnvironment
from include.refunds.look_up import look_up
from include.refunds.reader import FreshTokenReader
from include.refunds.states import PAID, Status

# How far Payroc's list lags behind a create is not documented, so not being listed soon after an attempt says
# nothing. A day is far more than a list takes, and less than people wait for the bank's word.
LIST_MAY_LAG = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Resolution:
    """
    How a review ends.

    :param status: where the refund goes.
    :param sighting: Payroc's object that the row takes over.
    :param note: what else was found at Payroc, for the event.
    """

    status: Status
    sighting: Sighting | None = None
    note: str | None = None

    @property
    def decision(self) -> dict[str, str]:
        """
        What two people have to agree on. Payroc's status is not theirs to decide, so it may move on in
        between.
        """
        if self.status is Status.REJECTED:
            return {"resolve": "rejected"}
        return {
            "resolve": "accepted",
            "payroc_refund_id": self.sighting.payroc_refund_id if self.sighting else "",
        }


class _Decisions(Cases, Protocol):
    async def resolve(self, read: Case, resolution: Resolution, reason: str) -> bool: ...


class ResolveLedger(Protocol):
    """What the end of a review needs of the ledger."""

    @property
    def bindings(self) -> ChecksEnvironment: ...

    @property
    def decisions(self) -> _Decisions: ...


async def resolve(
    refund_id: int,
    outcome: Status,
    reason: str,
    *,
    payroc_refund_id: str | None,
    ledger: ResolveLedger,
    gateway: Reader,
) -> tuple[Resolution, bool]:
    """
    End a refund's review, or propose to when it takes a second person. Who does it is the ledger's actor.

    :param outcome: ``accepted`` or ``rejected``.
    :param payroc_refund_id: Payroc's refund id, as people found it, for ``accepted``.
    :returns: the resolution, and whether it is carried out (``True``) or waits for a second person.
    :raises DecisionRefused: when it can't be resolved so; nothing was changed.
    :raises LedgerError: when the ledger belongs to another Payroc.
    """
    await ledger.bindings.check_environment(gateway.environment)
    case = await ledger.decisions.case(refund_id)
    check_case(case, outcome)
    reader = FreshTokenReader(gateway)
    try:
        token = await reader.token()
        listed = await look_up(token, case.refund, reader)
        if outcome is Status.REJECTED:
            known = await _known_object(token, case, reader)
            resolution = as_rejected(listed, known)
        else:
            chosen = choose(case, listed, payroc_refund_id)
            resolution = as_accepted(
                case, await reader.get_refund(token, chosen), by_hand=chosen == payroc_refund_id
            )
    except PayrocError as error:
        raise DecisionRefused(
            f"{error}, so what Payroc holds of refund {refund_id} is not known; nothing was changed."
        ) from None
    return resolution, await ledger.decisions.resolve(case, resolution, reason)


def check_case(case: Case, outcome: Status) -> None:
    """
    Make sure that people may decide now.

    :raises DecisionRefused: when they may not.
    """
    refund = case.refund
    if refund.status is not Status.REVIEW:
        raise DecisionRefused(
            f"Refund {refund.id} is {refund.status}, not in review; only a review is resolved."
        )
    if refund.lease_until is not None and refund.lease_until > case.now:
        raise DecisionRefused(
            f"An attempt of refund {refund.id} may still be under way until {refund.lease_until:%Y-%m-%d %H:%M:%S %Z}; resolve it then."
        )
    if outcome is Status.REJECTED and case.may_have_moved and case.last_attempt_at is not None:
        ends = case.last_attempt_at + LIST_MAY_LAG
        if case.now < ends:
            raise DecisionRefused(
                f"An attempt of refund {refund.id} may have been sent less than {LIST_MAY_LAG.total_seconds() / 3600:.0f} hours ago, "
                f"and Payroc's list may lag: resolve it as rejected after {ends:%Y-%m-%d %H:%M:%S %Z}."
            )


def as_rejected(listed: Verdict | None, known: models.Refund | None) -> Resolution:
    """
    Return the resolution ``rejected``.

    :param listed: what the look-up by order id found.
    :param known: the object whose refund id the row holds.
    :raises DecisionRefused: when Payroc holds an object of the refund that is not declined.
    """
    if listed is not None and listed.is_hit:
        whose = "a refund that may be ours" if listed.unclear else "a refund of ours"
        raise DecisionRefused(
            f"Payroc holds {whose}, so it is not rejected: {listed.reason} Resolve it as accepted."
        )
    if known is not None and status_of(known) is not Status.REJECTED:
        raise DecisionRefused(
            f"Payroc holds refund {known.refund_id} of it ('{word_of(known)}'), so it is not rejected."
        )
    declined = (
        Sighting(known.refund_id, word_of(known), Status.REJECTED)
        if known
        else (listed.sighting if listed else None)
    )
    return Resolution(Status.REJECTED, declined, listed.reason if listed and declined is None else None)


def choose(case: Case, listed: Verdict | None, payroc_refund_id: str | None) -> str:
    """
    Return the refund id of the object that the row takes over for ``accepted``.

    :raises DecisionRefused: when there is none, or the one that people gave is not the one that is known.
    """
    own = case.refund.payroc_refund_id
    listed_id = (
        listed.sighting.payroc_refund_id if listed is not None and listed.sighting is not None else None
    )
    known = own or (listed_id if listed is not None and listed.is_hit else None)
    if payroc_refund_id is not None and known not in (None, payroc_refund_id):
        raise DecisionRefused(
            f"Refund {case.refund.id} is Payroc's refund {known}, not {payroc_refund_id}; leave --payroc-refund-id out."
        )
    chosen = payroc_refund_id or own or listed_id
    if chosen is None:
        raise DecisionRefused(
            f"Payroc lists no single refund with the order id {case.refund.order_id} that is ours: "
            "find it in Payroc's portal and give it with --payroc-refund-id, or resolve as rejected."
        )
    return chosen


def as_accepted(case: Case, found: models.Refund, *, by_hand: bool) -> Resolution:
    """
    Return the resolution ``accepted``: the refund takes Payroc's present status when that says that it was
    accepted.

    :param found: the object, fetched by its refund id.
    :param by_hand: people gave its id, so it is checked to be of this refund.
    :raises DecisionRefused: when the object is declined, or another refund's.
    """
    refund = case.refund
    if by_hand and (found.order.order_id, found.processing_terminal_id) != (
        refund.order_id,
        refund.processing_terminal_id,
    ):
        raise DecisionRefused(
            f"Payroc's refund {found.refund_id} has another order id or terminal than refund {refund.id}."
        )
    if by_hand and found.refund_key not in (None, str(refund.idempotency_key)):
        raise DecisionRefused(
            f"Payroc's refund {found.refund_id} carries the key of another refund than {refund.id}."
        )
    status = status_of(found)
    if status is Status.REJECTED:
        raise DecisionRefused(
            f"Payroc's refund {found.refund_id} is declined, so it is not accepted; resolve it as rejected."
        )
    status = status if status in PAID else Status.ACCEPTED
    return Resolution(status, Sighting(found.refund_id, word_of(found), status))


async def _known_object(token: AccessToken, case: Case, reader: Reader) -> models.Refund | None:
    own = case.refund.payroc_refund_id
    return await reader.get_refund(token, own) if own is not None else None
