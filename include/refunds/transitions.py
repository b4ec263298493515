"""What a verdict does to a refund. Pure: the ledger reads the row under a lock, asks here, and writes the answer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from include.refunds.classify import EVERYTHING, Outcome, Sighting, Verdict
from include.refunds.refund import History, Refund
from include.refunds.states import EDGES, IN_DOUBT, PAID, REPLACEABLE, Status

_ENDED_UNPAID = REPLACEABLE | {Status.CANCELLED}

# What was not sent, as far as the ledger knows.
_WAITING = frozenset({Status.APPROVED, Status.HELD, Status.RELEASED})

# A Retry-After is honoured up to this; a longer one must not take a refund out of sight.
LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Change:
    """
    What to write into the refund's row.

    :param steps: the statuses to go through, the last one is where it stays; empty leaves the status as it is.
    :param reason: the row's new reason, ``None`` leaves it.
    :param sighting: Payroc's object whose id and word the row takes over.
    :param wait_until: end of the wait before the next attempt, for ``unknown``.
    :param never_sent: take back ``first_sent_at`` and ``sent_with``: no attempt reached Payroc's processing.
    :param contradiction: what contradicts the ledger; it is stored as an event.
    :param contradicting_id: refund id of the Payroc object that does not belong to the row.
    :param recovered: the ledger had forgotten that it sent the refund, and takes over what Payroc holds;
        it is stored as an event.
    :param pause: scope to pause the sending for.
    :param pause_reason: why; ``None`` when ``reason`` says it.
    """

    steps: tuple[Status, ...] = ()
    reason: str | None = None
    sighting: Sighting | None = None
    wait_until: datetime | None = None
    never_sent: bool = False
    contradiction: str | None = None
    contradicting_id: str | None = None
    recovered: bool = False
    pause: str | None = None
    pause_reason: str | None = None


def is_known(refund: Refund, sighting: Sighting) -> bool:
    """
    Tell whether the row holds this very object with this very word already, so that seeing it again is no news.

    Its status does not count: people may have resolved a refund whose object differs, or whose word is none that we know.
    """
    return (refund.payroc_refund_id, refund.payroc_status) == (
        sighting.payroc_refund_id,
        sighting.payroc_status,
    )


def is_forgotten(refund: Refund, sighting: Sighting, *, restored: bool) -> bool:
    """
    Tell whether Payroc's object of a refund means that the ledger has forgotten that it was sent.

    :param restored: `restored` is at work; then a refund that was found forgotten when it was pulled counts,
        too.
    """
    if refund.payroc_refund_id not in (None, sighting.payroc_refund_id):
        return False
    found_at_the_pull = refund.status is Status.REVIEW and refund.attempts == 0
    claimed_only = refund.status is Status.SENDING and refund.first_sent_at is None
    return (
        refund.status in _WAITING
        or claimed_only
        or (restored and found_at_the_pull and sighting.status is not Status.REVIEW)
    )


def forgotten(what: str) -> str:
    """
    Return the reason of the pause that follows a payment which the ledger had forgotten.

    :param what: what Payroc holds, as the subject and verb of the sentence.
    """
    return (
        f"{what}, and this ledger never sent it: it was restored from a backup, lost or copied, and has forgotten "
        "decisions as well. Run `python -m include.refunds restored` before you resume."
    )


def decide(
    refund: Refund,
    verdict: Verdict,
    history: History,
    *,
    current: bool,
    foreign_id: bool,
    now: datetime,
    unknown_wait: timedelta,
    told: bool = False,
    restored: bool = False,
) -> Change | None:
    """
    Return what a verdict changes, or ``None`` when it changes nothing.

    :param refund: the row, read under its lock.
    :param verdict: what an attempt, a look-up or the follow-up found.
    :param history: what the attempts before this one left behind.
    :param current: the verdict comes from the attempt that holds the refund now. A worker that woke up late may
        only add proof of a payment, never anything weaker.
    :param foreign_id: the object's refund id already stands at another refund of the ledger.
    :param now: the ledger's time.
    :param unknown_wait: shortest wait before an unknown refund is sent again.
    :param told: that the object does not belong to this row was recorded before. People know of it, and a list shows it every time.
    :param restored: `restored` is at work: the sending is paused already, and a refund that went to review
        because the ledger had forgotten it is taken over.
    """
    if verdict.sighting is not None:
        if is_forgotten(refund, verdict.sighting, restored=restored) and not foreign_id:
            return _recover(refund, verdict, verdict.sighting, restored)
        return _decide_sighting(refund, verdict, verdict.sighting, foreign_id, told)
    if verdict.contradiction:
        return _contradiction(refund, verdict.reason)
    if not current:
        return None
    reached = history.unresolved or history.processed
    match verdict.outcome:
        case Outcome.UNKNOWN:
            wait = min(max(unknown_wait, timedelta(seconds=verdict.retry_after)), LONGEST_WAIT)
            return Change((Status.UNKNOWN,), verdict.reason, wait_until=now + wait)
        case Outcome.CONFIGURATION | Outcome.NOT_SENT if verdict.proves_no_processing and not reached:
            return Change((Status.RELEASED,), verdict.reason, never_sent=True, pause=verdict.pause)
        case Outcome.CONFIGURATION | Outcome.NOT_SENT:
            return Change(
                (Status.UNKNOWN,), verdict.reason, wait_until=now + unknown_wait, pause=verdict.pause
            )
        case Outcome.REJECTED:
            return Change((Status.REJECTED,), verdict.reason)
        case _:
            return Change((Status.REVIEW,), verdict.reason)


def _recover(refund: Refund, verdict: Verdict, sighting: Sighting, restored: bool) -> Change:
    pause = None if restored else EVERYTHING
    found = f"Payroc holds refund {sighting.payroc_refund_id} of refund {refund.id}"
    if sighting.status is Status.REVIEW:
        return Change(
            _way_to_review(refund.status),
            f"{verdict.reason} This ledger never sent it.",
            sighting=sighting,
            contradiction=verdict.reason,
            pause=pause,
            pause_reason=forgotten(found),
        )
    # A release is taken back first: from there only an attempt leads on.
    before = (Status.APPROVED,) if refund.status is Status.RELEASED else ()
    return Change(
        (*before, *_way(before[0] if before else refund.status, sighting.status)),
        f"{verdict.reason} This ledger had forgotten that it was sent.",
        sighting=sighting,
        recovered=True,
        pause=pause,
        pause_reason=forgotten(found),
    )


def _decide_sighting(
    refund: Refund, verdict: Verdict, sighting: Sighting, foreign_id: bool, told: bool
) -> Change | None:
    if foreign_id or refund.payroc_refund_id not in (None, sighting.payroc_refund_id):
        what = f"Payroc's refund {sighting.payroc_refund_id} does not belong to this row."
        if told and refund.status not in IN_DOUBT:
            return None
        return _contradiction(refund, what, contradicting_id=sighting.payroc_refund_id)
    if refund.status is sighting.status or is_known(refund, sighting):
        return Change(sighting=sighting)
    if refund.status is Status.REVIEW:
        # People decide what leaves review; what Payroc says is kept for them to see.
        return Change(sighting=sighting)
    if refund.status in _ENDED_UNPAID and sighting.status is Status.REVIEW:
        # Whatever else is odd about it: there is an object that may pay, of a refund that is called unpaid and may have been reissued.
        return _contradiction(
            refund, f"{verdict.reason} The refund is {refund.status} here.", sighting=sighting
        )
    steps = _way(refund.status, sighting.status)
    if steps:
        return Change(steps, verdict.reason, sighting=sighting)
    older = refund.status in PAID and sighting.status in PAID and (sighting.status, refund.status) in EDGES
    if older and refund.payroc_refund_id == sighting.payroc_refund_id:
        # A list may lag behind what an earlier answer already told; an older word is no news.
        return None
    return _contradiction(
        refund, f"Payroc says {sighting.status} of a refund that is {refund.status} here.", sighting=sighting
    )


def _way(start: Status, end: Status) -> tuple[Status, ...]:
    if (start, end) in EDGES:
        return (end,)
    if (start, Status.ACCEPTED) in EDGES and (Status.ACCEPTED, end) in EDGES:
        return (Status.ACCEPTED, end)
    return ()


def _contradiction(
    refund: Refund, what: str, *, sighting: Sighting | None = None, contradicting_id: str | None = None
) -> Change:
    return Change(
        _way_to_review(refund.status),
        what,
        sighting=sighting,
        contradiction=what,
        contradicting_id=contradicting_id,
        pause=EVERYTHING,
    )


def _way_to_review(start: Status) -> tuple[Status, ...]:
    if (start, Status.REVIEW) in EDGES:
        return (Status.REVIEW,)
    if (start, Status.APPROVED) in EDGES:
        return (Status.APPROVED, Status.REVIEW)
    return ()
