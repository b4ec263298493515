"""What an answer of Payroc proves about a refund. Pure functions; the only place where answers are judged."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from include.payroc import models, problems
from include.payroc.errors import PayrocError, PayrocNoAnswer, PayrocProblem
from include.refunds.refund import History, Refund
from include.refunds.states import Status

EVERYTHING = "*"


class Outcome(StrEnum):
    """Outcome of one attempt, as ``refund_attempts.outcome`` holds it."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    UNKNOWN = "unknown"
    REVIEW = "review"
    CONFIGURATION = "configuration"
    NOT_SENT = "not_sent"


@dataclass(frozen=True, slots=True)
class Sighting:
    """A refund object of Payroc's that is ours: its id, Payroc's word for its state, and ours."""

    payroc_refund_id: str
    payroc_status: str
    status: Status


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What is to be recorded about a refund.

    :param reason: one sentence for people, without bank data.
    :param sighting: the Payroc object behind it, if there is one.
    :param retry_after: seconds that Payroc asked us to wait.
    :param pause: scope to pause the sending for: a terminal id or ``*``.
    :param not_processed: Payroc proved that it did not process this attempt.
    :param look_up_first: ask Payroc for the object before this verdict is recorded; a hit replaces it.
    :param unclear: Payroc holds an object under our order id that may be ours: it came without custom fields, which would tell.
    :param contradiction: what Payroc holds can't be true together with the ledger; recorded whoever found it.
    """

    outcome: Outcome
    reason: str
    http_status: int | None = None
    problem_type: str | None = None
    sighting: Sighting | None = None
    retry_after: float = 0.0
    pause: str | None = None
    not_processed: bool = False
    look_up_first: bool = False
    unclear: bool = False
    contradiction: bool = False

    @property
    def proves_no_processing(self) -> bool:
        """Whether this attempt is proven to have moved nothing, without being a refusal of the refund itself."""
        return self.not_processed or self.outcome is Outcome.NOT_SENT

    @property
    def is_hit(self) -> bool:
        """Whether Payroc holds an object that is or may be ours and is not declined: money moved, or may still move."""
        return (
            self.contradiction
            or self.unclear
            or (self.sighting is not None and self.outcome is not Outcome.REJECTED)
        )


# Payroc's words (API reference, transactionResult.status). Any other word is for people: see judge_object.
_STATUS_OF_WORD = {
    "ready": Status.ACCEPTED,
    "pending": Status.ACCEPTED,
    "complete": Status.SETTLED,
    "returned": Status.RETURNED,
    "reversal": Status.REVERSED,
    "declined": Status.REJECTED,
}

_SHARED_KEY = "Another shop with the same PAYROC_REFUNDS_SOURCE at this Payroc account may have sent it."

# What a body is refused for as a whole: too large, or not to be processed.
_ABOUT_THIS_REQUEST = frozenset({413, 422})

NO_SUCH_ADDRESS = "Payroc has no refunds at this address: check host and extra environment of the connection"

# Answers that say nothing about whether the request was acted on, whatever their body says.
_TRANSIENT = frozenset({408, 429})


def status_of(found: models.Refund) -> Status:
    """Return what Payroc's word for the state of an object is called here; ``review`` for a word that people must look at."""
    return _STATUS_OF_WORD.get(word_of(found), Status.REVIEW)


def word_of(found: models.Refund) -> str:
    """Return Payroc's word for the state of an object, as the ledger stores it: a response code of decline counts as that word."""
    word = found.transaction_result.status
    if found.transaction_result.response_code == "D":
        return "declined"
    # Taken over only when it can't be anything but a word.
    return word if word.isascii() and word.isalpha() and len(word) <= 30 else "?"


def judge_object(found: models.Refund, refund: Refund, http_status: int | None = None) -> Verdict:
    """
    Judge a refund object that answers our request or carries our key.

    :param found: the object, from a create, a look-up or a list.
    :param refund: the refund that it is held against.
    :param http_status: HTTP status of the answer when it answers our own POST.
    """
    word, status = word_of(found), status_of(found)
    differing = differences(found, refund)
    if differing:
        return Verdict(
            Outcome.REVIEW,
            f"Payroc's refund {found.refund_id} differs from the request in {', '.join(differing)}."
            + (f" {_SHARED_KEY}" if found.refund_key == str(refund.idempotency_key) else ""),
            http_status,
            sighting=Sighting(found.refund_id, word, Status.REVIEW),
        )
    sighting = Sighting(found.refund_id, word, status)
    if status is Status.REJECTED:
        return Verdict(Outcome.REJECTED, "Declined by the bank.", http_status, sighting=sighting)
    if status is Status.REVIEW:
        return Verdict(
            Outcome.REVIEW,
            f"Payroc's status is '{word}', which people must look at.",
            http_status,
            sighting=sighting,
        )
    return Verdict(Outcome.ACCEPTED, _REASON_OF_STATUS[status], http_status, sighting=sighting)


def judge_error(error: PayrocError, refund: Refund, history: History) -> Verdict:
    """
    Judge the failure of a POST.

    The problem's type decides, then the status: Payroc's OpenAPI files ``idempotency-key-in-use`` under 400 though
    its body says 409. A 408, 429 or 5xx decides nothing whatever its type says.

    :param error: what the gateway raised.
    :param refund: the refund that was sent.
    :param history: what its earlier attempts left behind.
    """
    status = error.http_status
    if (
        isinstance(error, PayrocNoAnswer)
        or status is None
        or status < 300
        or status >= 500
        or status in _TRANSIENT
    ):
        return _verdict(Outcome.UNKNOWN, str(error), error)
    if status == 401 or error.problem_type == problems.NOT_AUTHORIZED:
        return _judge_unauthorized(error, history)
    if not isinstance(error, PayrocProblem) or error.problem_type is None:
        return _verdict(
            Outcome.CONFIGURATION,
            f"{error}; something between us and Payroc answered.",
            error,
            pause=EVERYTHING,
        )
    match error.problem_type:
        case problems.IDEMPOTENCY_KEY_IN_USE:
            if history.unresolved and not history.key_in_use:
                return _verdict(
                    Outcome.UNKNOWN, f"{error}; an earlier attempt may still be running there.", error
                )
            return _verdict(
                Outcome.REVIEW,
                f"{error}; our key was used for another request. {_SHARED_KEY}",
                error,
                look_up_first=True,
            )
        case problems.RESOURCE_ALREADY_EXISTS:
            return _verdict(
                Outcome.REVIEW, f"{error}; no refund with our key was found there.", error, look_up_first=True
            )
        case problems.CAPABILITIES_MISSING:
            return _configuration(error, refund.processing_terminal_id)
        case problems.IDEMPOTENCY_KEY_MISSING:
            return _configuration(error, EVERYTHING)
    if status == 400 and not any(name.endswith("processingTerminalId") for name in error.parameters):
        return _judge_refusal(error, history)
    if status in _ABOUT_THIS_REQUEST:
        # Payroc does not document these for refunds, so they refuse nothing definitively; but no other refund
        # has this body.
        return _verdict(
            Outcome.REVIEW,
            f"{error}; Payroc does not document this answer for refunds.",
            error,
            look_up_first=True,
        )
    if status == 404 and not is_about_terminal(error):
        return _configuration(error, EVERYTHING, NO_SUCH_ADDRESS)
    return _configuration(error, refund.processing_terminal_id if is_about_terminal(error) else EVERYTHING)


def is_about_terminal(error: PayrocError) -> bool:
    """Return whether a problem document concerns the processing terminal of a request, and no other one."""
    return (
        error.problem_type == problems.CAPABILITIES_MISSING
        or any(name.endswith("processingTerminalId") for name in error.parameters)
        # The resource of a 403 is what may not be used; that of a 404 is what was not found.
        or (error.http_status == 403 and error.resource is not None)
        or (error.http_status == 404 and "terminal" in (error.resource or "").lower())
    )


def refuses_terminal(error: PayrocError) -> bool:
    """Return whether Payroc refused to list the refunds of a terminal, and may list those of another one."""
    return bool(error.problem_type) and (error.http_status == 400 or is_about_terminal(error))


def judge_look_up(found: list[models.Refund], refund: Refund) -> Verdict | None:
    """
    Judge what Payroc lists under our order id.

    :param found: objects of the list, duplicates allowed (a list may repeat an object across its pages).
    :param refund: the refund that was looked for.
    :returns: ``None`` when nothing there carries our order id: that proves nothing.
    """
    same_order = {item.refund_id: item for item in found if item.order.order_id == refund.order_id}
    ours = [item for item in same_order.values() if is_ours(item, refund)]
    if len(ours) > 1:
        ids = ", ".join(sorted(item.refund_id for item in ours))
        return Verdict(
            Outcome.REVIEW,
            f"Payroc holds more than one refund of ours for this order: {ids}.",
            contradiction=True,
        )
    if ours:
        return judge_object(ours[0], refund)
    if same_order:
        ids = ", ".join(sorted(same_order))
        unclear = any(not item.custom_fields for item in same_order.values())
        return Verdict(
            Outcome.REVIEW, f"Payroc holds another refund with our order id: {ids}.", unclear=unclear
        )
    return None


def _judge_refusal(error: PayrocError, history: History) -> Verdict:
    if not history.unresolved:
        return _verdict(Outcome.REJECTED, f"Refused by Payroc: {_about(error)}.", error)
    reason = f"Refused by Payroc ({_about(error)}) after an attempt whose outcome is not known."
    return _verdict(Outcome.REVIEW, reason, error, look_up_first=True)


def _judge_unauthorized(error: PayrocError, history: History) -> Verdict:
    if history.unauthorized_at is None:
        return _verdict(Outcome.UNKNOWN, f"{error}; the next attempt takes a new token.", error)
    reason = f"{error}; a new token was refused as well, so the API key lacks the right to refund."
    return _verdict(
        Outcome.CONFIGURATION, reason, error, pause=EVERYTHING, not_processed=isinstance(error, PayrocProblem)
    )


def _configuration(error: PayrocError, scope: str, advice: str | None = None) -> Verdict:
    about = ", ".join(error.parameters)
    return _verdict(
        Outcome.CONFIGURATION,
        f"{error}{f', about {about}' if about else ''}{f'; {advice}' if advice else ''}.",
        error,
        pause=scope,
        not_processed=True,
    )


def _verdict(
    outcome: Outcome,
    reason: str,
    error: PayrocError,
    *,
    pause: str | None = None,
    not_processed: bool = False,
    look_up_first: bool = False,
) -> Verdict:
    return Verdict(
        outcome,
        reason,
        error.http_status,
        error.problem_type,
        retry_after=error.retry_after or 0.0,
        pause=pause,
        not_processed=not_processed,
        look_up_first=look_up_first,
    )


def _about(error: PayrocError) -> str:
    return ", ".join(part for part in (error.problem_type, *error.parameters) if part) or "no type given"


def is_ours(found: models.Refund, refund: Refund) -> bool:
    """Tell whether an object was made by our request: it carries our key, or, when it came without custom fields, is all the same."""
    if found.refund_key is not None:
        return found.refund_key == str(refund.idempotency_key)
    return not found.custom_fields and not differences(found, refund)


def differences(found: models.Refund, refund: Refund) -> list[str]:
    """Return the names of what an object and the request that we sent differ in."""
    result = found.transaction_result
    pairs = [
        ("order id", found.order.order_id, refund.order_id),
        ("amount", found.order.amount, refund.amount),
        ("currency", found.order.currency, refund.currency),
        ("terminal", found.processing_terminal_id, refund.processing_terminal_id),
    ]
    if refund.payee_last4 is not None and found.last4 is not None:
        pairs.append(("last four digits", found.last4, refund.payee_last4))
    if result.authorized_amount is not None and result.response_code != "D":
        pairs.append(("authorized amount", result.authorized_amount, -refund.amount))
    return [name for name, theirs, ours in pairs if theirs != ours]


_REASON_OF_STATUS = {
    Status.ACCEPTED: "Accepted by Payroc.",
    Status.SETTLED: "Settled by Payroc.",
    Status.RETURNED: "Returned by the bank.",
    Status.REVERSED: "Reversed in the open batch.",
}
