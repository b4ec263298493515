"""
Reverse: take an accepted refund out of the open batch, before any money moves. A pause does not forbid it: it
stops money.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from include.payroc import models
from include.payroc.errors import PayrocError, PayrocProblem
from include.payroc.models import AccessToken
from include.payroc.problems import IDEMPOTENCY_KEY_IN_USE
from include.refunds.case import DecisionRefused
from include.refunds.classify import judge_object, word_of
from include.refunds.gateway import Gateway, Reader
from include.refunds.keys import reverse_key
from include.refunds.ledger_parts import ChecksEnvironment, ReadsRefund, Recorder
from include.refunds.reader import FreshTokenReader
from include.refunds.refund import Refund
from include.refunds.states import Status


@dataclass(frozen=True, slots=True)
class Reversed:
    """
    How a reversal ended.

    :param done: the refund is reversed. Otherwise it is not known, and the command may be run again.
    :param sentence: one sentence for people.
    """

    done: bool
    sentence: str


class _Decisions(Protocol):
    async def intend_reverse(self, refund_id: int, reason: str) -> Refund: ...


class ReverseLedger(Protocol):
    """What a reversal needs of the ledger."""

    @property
    def bindings(self) -> ChecksEnvironment: ...

    @property
    def decisions(self) -> _Decisions: ...

    @property
    def records(self) -> Recorder: ...

    @property
    def refunds(self) -> ReadsRefund: ...


async def reverse(refund_id: int, reason: str, *, ledger: ReverseLedger, gateway: Gateway) -> Reversed:
    """
    Reverse an accepted refund. Who does it is the ledger's actor.

    The intent is committed before the POST. The key is derived from the refund's, so that asking again does
    no harm.

    :raises DecisionRefused: when it can't be reversed: it is not accepted, or Payroc refused.
    :raises LedgerError: when the ledger belongs to another Payroc.
    """
    await ledger.bindings.check_environment(gateway.environment)
    refund, _, _ = await ledger.refunds.read(refund_id)
    if refund.status is Status.REVERSED:
        return Reversed(True, f"Refund {refund_id} is reversed.")
    try:
        token = await gateway.token()
    except PayrocError as error:
        raise DecisionRefused(f"{error}; nothing was asked of Payroc.") from None
    refund = await ledger.decisions.intend_reverse(refund_id, reason)
    payroc_refund_id = refund.payroc_refund_id or ""
    refused = None
    reader = FreshTokenReader(gateway)
    try:
        answer = await _post(token, payroc_refund_id, str(reverse_key(refund.idempotency_key)), gateway)
    except PayrocError as error:
        refused = error if _is_refusal(error) else None
        what, found = str(error), await _ask(token, payroc_refund_id, reader)
    else:
        what, found = "Payroc answered, but did not call it reversed", answer
        if word_of(answer) != "reversal":
            found = await _ask(token, payroc_refund_id, reader) or answer
    recorded = await _record(refund, found, ledger.records) if found is not None else refund
    if recorded.status is Status.REVERSED:
        return Reversed(True, f"Refund {refund_id} is reversed: it left the open batch, and no money moves.")
    state = (
        f"Payroc says it is '{word_of(found)}'" if found is not None else "its state there can't be read now"
    )
    if refused is not None or (found is not None and recorded.status is not Status.ACCEPTED):
        raise DecisionRefused(f"Refund {refund_id} was not reversed: {what}; {state}.")
    return Reversed(
        False,
        f"Not known whether refund {refund_id} is reversed: {what}; {state}. Run it again, the same key does no harm.",
    )


async def _post(
    token: AccessToken, payroc_refund_id: str, idempotency_key: str, gateway: Gateway
) -> models.Refund:
    """Ask for the reversal, and once more with a fresh token when Payroc has taken the shared one back."""
    try:
        return await gateway.reverse_refund(token, payroc_refund_id, idempotency_key)
    except PayrocError as error:
        if error.http_status != 401:
            raise
    return await gateway.reverse_refund(
        await gateway.token(younger_than=0), payroc_refund_id, idempotency_key
    )


def _is_refusal(error: PayrocError) -> bool:
    status = error.http_status
    return (
        isinstance(error, PayrocProblem)
        and status is not None
        and 400 <= status < 500
        and status not in (401, 408, 409, 429)
        and (
            # Payroc's OpenAPI files it under 400 too: an earlier request with this key is still running.
            error.problem_type != IDEMPOTENCY_KEY_IN_USE
        )
    )


async def _ask(token: AccessToken, payroc_refund_id: str, reader: Reader) -> models.Refund | None:
    try:
        return await reader.get_refund(token, payroc_refund_id)
    except PayrocError:
        return None


async def _record(refund: Refund, found: models.Refund, records: Recorder) -> Refund:
    recorded, _ = await records.record(refund.id, judge_object(found, refund))
    return recorded
