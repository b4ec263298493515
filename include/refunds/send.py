"""
Sending refunds: those of a list side by side, each from top to bottom: token, claim, look-up, last check, one
POST, verdict, record.

Whatever dies in between leaves the refund where another worker can go on, under the same key and with the
same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from include.payroc import models
from include.payroc.errors import PayrocConfigurationError, PayrocError
from include.refunds.cipher import Cipher, UnreadableRequest
from include.refunds.classify import EVERYTHING, Outcome, Verdict, judge_error, judge_object
from include.refunds.gateway import Gateway
from include.refunds.ledger import KNOWN_FOR, RELEASE_VALID, Claim, LedgerError, NoSuchRefund, Task
from include.refunds.ledger_parts import (
    ChecksEnvironment,
    PauseReasons,
    ReadsRefund,
    Recorder,
    Replaced,
    TerminalLists,
)
from include.refunds.look_up import look_up, look_up_in_doubt
from include.refunds.refund import Refund
from include.refunds.reissue import paid_after_all
from include.refunds.settings import Settings
from include.refunds.states import IN_DOUBT, PAID, REPLACEABLE, Status


class Sent(StrEnum):
    """How the sending of one refund ended, in the order in which a list of them is judged."""

    CONFIGURATION = "configuration"
    UNKNOWN = "unknown"
    BUSY = "busy"
    REJECTED = "rejected"
    REVIEW = "review"
    NOT_RELEASED = "not released"
    ACCEPTED = "accepted"


@dataclass(frozen=True, slots=True)
class Result:
    """
    Result of sending one refund.

    :param reason: one sentence for people.
    :param retry_after: seconds after which a next attempt makes sense, for ``unknown`` and ``busy``.
    :param stops_all: no other refund can be sent now either.
    """

    refund_id: int
    order_id: str
    sent: Sent
    reason: str
    retry_after: float = 0.0
    stops_all: bool = False


Together = Callable[[Sequence[Coroutine[Any, Any, None]]], Awaitable[object]]


async def at_once(sendings: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run the sendings of a list side by side, until the last one has ended."""
    await asyncio.gather(*sendings)


class _Claims(Protocol):
    async def claim(
        self, refund_id: int, task: Task, *, environment: str, sent_with: str, token_seconds: float
    ) -> Claim | None: ...

    async def may_post(self, claim: Claim, seconds: float) -> bool: ...


class _Refunds(ReadsRefund, Replaced, Protocol): ...


class SendLedger(Protocol):
    """What sending needs of the ledger."""

    @property
    def bindings(self) -> ChecksEnvironment: ...

    @property
    def claims(self) -> _Claims: ...

    @property
    def lists(self) -> TerminalLists: ...

    @property
    def pauses(self) -> PauseReasons: ...

    @property
    def records(self) -> Recorder: ...

    @property
    def refunds(self) -> _Refunds: ...


async def send_refunds(
    refund_ids: Sequence[int],
    task: Task,
    *,
    ledger: SendLedger,
    gateway: Gateway,
    cipher: Cipher,
    settings: Settings,
    together: Together = at_once,
) -> list[Result]:
    """
    Send refunds, side by side, as many as the gateway lets go; each has its own claim, POST and record.

    Those that have ended already are skipped. After what stops all sending no further one is begun; those
    under way are brought to their end. What concerns one refund never keeps the others from being sent.

    :param refund_ids: ids in the ledger, those of one task.
    :param task: who sends.
    :param together: runs the sendings, until the last one has ended; none of them raises.
    :returns: how each ended that was begun, in the order of the ids.
    :raises LedgerError: the ledger can't be used.
    :raises PayrocConfigurationError: the connection or the settings can't be used.
    :raises Exception: what was not foreseen of a refund, after the others of the list have been sent.
    """
    results: dict[int, Result] = {}
    stopping: list[Exception] = []
    unforeseen: list[Exception] = []
    stopped = False

    async def send(refund_id: int) -> None:
        nonlocal stopped
        try:
            async with gateway.queue():
                if stopped:
                    return
                sent = await _send(refund_id, task, ledger, gateway, cipher, settings)
            results[refund_id] = await _recorded(sent, ledger, gateway)
            stopped = stopped or results[refund_id].stops_all
        except NoSuchRefund as error:
            results[refund_id] = Result(refund_id, "", Sent.NOT_RELEASED, str(error))
        except (LedgerError, PayrocConfigurationError) as error:
            stopped = True
            stopping.append(error)
        except Exception as error:  # noqa: BLE001 - raised below
            unforeseen.append(error)

    each_once = list(dict.fromkeys(refund_ids))
    await together([send(refund_id) for refund_id in each_once])
    if errors := [*stopping, *unforeseen]:
        raise errors[0]
    return [results[refund_id] for refund_id in each_once if refund_id in results]


async def _send(
    refund_id: int, task: Task, ledger: SendLedger, gateway: Gateway, cipher: Cipher, settings: Settings
) -> Result | tuple[Claim, Verdict]:
    """
    Send one released refund to Payroc, at most one POST.

    :returns: the claim and what its attempt proves, still to be recorded. A refund that has ended already, or
        is held by another worker, is not sent; then how it stands.
    """
    refund, history, now = await ledger.refunds.read(refund_id)
    if refund.status is not Status.RELEASED and refund.status not in IN_DOUBT:
        return _result(refund, now)

    try:
        # After a 401 only a token that was received later proves anything.
        age_of_401 = (now - history.unauthorized_at).total_seconds() if history.unauthorized_at else None
        token = await gateway.token(younger_than=age_of_401)
    except PayrocError as error:
        return _no_token(refund, error, settings)
    try:
        body = cipher.open(refund.request or b"", refund.request_sha256, refund.id, refund.request_key)
    except UnreadableRequest as error:
        return Result(refund.id, refund.order_id, Sent.CONFIGURATION, str(error))

    claim = await ledger.claims.claim(
        refund.id,
        task,
        environment=gateway.environment,
        sent_with=gateway.sent_with,
        token_seconds=token.expires_in,
    )
    async with gateway.turn():
        if claim is None:
            return await _not_claimed(refund.id, token, ledger, gateway, settings)
        verdict = await _look_up_first(token, claim, refund, ledger, gateway)
        if verdict is None:
            if await ledger.claims.may_post(claim, seconds=2 * settings.http_timeout_seconds):
                verdict = await _post(token, claim, body, gateway)
            else:
                verdict = Verdict(
                    Outcome.NOT_SENT,
                    "Not sent: the sending was paused, or this worker was too slow for its token.",
                )
    return claim, verdict


async def _recorded(sent: Result | tuple[Claim, Verdict], ledger: SendLedger, gateway: Gateway) -> Result:
    if isinstance(sent, Result):
        return sent
    claim, verdict = sent
    recorded, now = await ledger.records.record(claim.refund.id, verdict, claim.attempt)
    if verdict.outcome is Outcome.CONFIGURATION:
        return Result(
            recorded.id,
            recorded.order_id,
            Sent.CONFIGURATION,
            verdict.reason,
            stops_all=verdict.pause == EVERYTHING,
        )
    if verdict.outcome is Outcome.NOT_SENT:
        return await _stopped(recorded, now, ledger, gateway)
    return _result(recorded, now)


async def _look_up_first(
    token: models.AccessToken, claim: Claim, refund: Refund, ledger: SendLedger, gateway: Gateway
) -> Verdict | None:
    """
    Look for what an earlier attempt may have left at Payroc, or a refund that this one replaces.

    A first attempt needs none: the claim demands that the terminal's list is known, so Payroc holds nothing
    of it.
    """
    # What a reissue replaces may have been paid after all.
    is_reissue = refund.replaces is not None and refund.first_sent_at is None
    if not claim.history.posted and not is_reissue:
        return None
    try:
        if is_reissue:
            paid = await paid_after_all(
                token, await ledger.refunds.replaced(refund.id), ledger.records, gateway
            )
            if paid is not None:
                return Verdict(Outcome.NOT_SENT, f"Not sent: {paid}")
        return await look_up(token, claim.refund, gateway)
    except PayrocError as error:
        # Of an earlier attempt an error proves nothing and the next one goes on: Payroc knows the key.
        if is_reissue:
            return Verdict(
                Outcome.NOT_SENT, f"Not sent: a reissue is looked up first, and that failed: {error}."
            )
        return None


async def _post(token: models.AccessToken, claim: Claim, body: bytes, gateway: Gateway) -> Verdict:
    refund = claim.refund
    try:
        found = await gateway.create_refund(token, str(refund.idempotency_key), body)
        return judge_object(found, refund, http_status=201)
    except PayrocError as error:
        verdict = judge_error(error, refund, claim.history)
    if not verdict.look_up_first:
        return verdict
    try:
        found_verdict = await look_up(token, refund, gateway)
    except PayrocError as error:
        return Verdict(
            Outcome.UNKNOWN,
            f"{verdict.reason} The look-up failed: {error}.",
            verdict.http_status,
            verdict.problem_type,
        )
    return found_verdict or verdict


async def _not_claimed(
    refund_id: int, token: models.AccessToken, ledger: SendLedger, gateway: Gateway, settings: Settings
) -> Result:
    """
    Find out why a claim was refused, and for a refund in doubt what Payroc holds: a GET is always
    allowed.
    """
    # Before any look-up: another Payroc's refunds say nothing about ours, even under the same key.
    await ledger.bindings.check_environment(gateway.environment)
    refund, _, now = await ledger.refunds.read(refund_id)
    if refund.status in IN_DOUBT:
        try:
            verdict = await look_up_in_doubt(token, refund, gateway, settings, now)
        except PayrocError as error:
            wait = max(_seconds_until(refund, now), float(settings.retry_delay_seconds))
            return Result(
                refund_id, refund.order_id, Sent.BUSY, f"Not known, and the look-up failed: {error}.", wait
            )
        if verdict is not None:
            refund, now = await ledger.records.record(refund_id, verdict)
    if refund.status in IN_DOUBT and _seconds_until(refund, now) > 0:
        return _result(refund, now)
    if refund.status in (Status.RELEASED, *IN_DOUBT):
        return await _stopped(refund, now, ledger, gateway)
    return _result(refund, now)


async def _stopped(refund: Refund, now: datetime, ledger: SendLedger, gateway: Gateway) -> Result:
    """
    Say why a refund that could be sent is not: a pause, an expired release, an unread list, or the refund
    that it replaces.
    """
    pauses = await ledger.pauses.reasons()
    for scope in (EVERYTHING, refund.processing_terminal_id):
        if scope in pauses:
            what = "Sending" if scope == EVERYTHING else f"Sending for terminal {scope}"
            reason = f"{what} is paused: {pauses[scope]}"
            return Result(
                refund.id, refund.order_id, Sent.CONFIGURATION, reason, stops_all=scope == EVERYTHING
            )
    if (
        refund.status is Status.RELEASED
        and refund.released_at is not None
        and now - refund.released_at >= RELEASE_VALID
    ):
        return Result(
            refund.id, refund.order_id, Sent.NOT_RELEASED, "Its release was not used within 24 hours."
        )
    if refund.first_sent_at is None and not await _list_is_known(
        refund, gateway.sent_with, now, ledger.lists
    ):
        reason = (
            f"Not sent: Payroc's list of terminal {refund.processing_terminal_id} is not read up to now with this API key; "
            "the next run reads it first."
        )
        return Result(refund.id, refund.order_id, Sent.NOT_RELEASED, reason)
    for replaced in await ledger.refunds.replaced(refund.id):
        if replaced.status not in REPLACEABLE:
            reason = f"Not sent: refund {replaced.id}, which it replaces, is {replaced.status}."
            return Result(refund.id, refund.order_id, Sent.NOT_RELEASED, reason)
    return Result(
        refund.id,
        refund.order_id,
        Sent.BUSY,
        refund.reason or "It was not sent.",
        max(1.0, _seconds_until(refund, now)),
    )


async def _list_is_known(refund: Refund, sent_with: str, now: datetime, lists: TerminalLists) -> bool:
    by_terminal = {item.terminal: item for item in await lists.terminal_lists()}
    known = by_terminal.get(refund.processing_terminal_id)
    return known is not None and known.is_known(now - KNOWN_FOR, sent_with)


def _no_token(refund: Refund, error: PayrocError, settings: Settings) -> Result:
    if error.http_status in (401, 403):
        reason = f"{error}; check the API key and the environment of the connection."
        return Result(refund.id, refund.order_id, Sent.CONFIGURATION, reason, stops_all=True)
    wait = error.retry_after or float(settings.retry_delay_seconds)
    # Each of a long list would wait for its own time-out.
    return Result(refund.id, refund.order_id, Sent.BUSY, f"{error}; nothing was sent.", wait, stops_all=True)


def _result(refund: Refund, now: datetime) -> Result:
    reason = refund.reason or f"It is {refund.status}."
    if refund.status in PAID:
        return Result(refund.id, refund.order_id, Sent.ACCEPTED, reason)
    if refund.status is Status.UNKNOWN:
        return Result(refund.id, refund.order_id, Sent.UNKNOWN, reason, _seconds_until(refund, now))
    if refund.status is Status.SENDING:
        reason = f"Another attempt may still be under way until {refund.lease_until:%H:%M:%S %Z}."
        return Result(refund.id, refund.order_id, Sent.BUSY, reason, _seconds_until(refund, now))
    if refund.status in (Status.REJECTED, Status.REVIEW):
        return Result(refund.id, refund.order_id, Sent(refund.status.value), reason)
    return Result(refund.id, refund.order_id, Sent.NOT_RELEASED, f"It is {refund.status}, not released.")


def _seconds_until(refund: Refund, now: datetime) -> float:
    ends = [instant for instant in (refund.lease_until, refund.next_attempt_at) if instant is not None]
    return max(0.0, (max(ends) - now).total_seconds()) if ends else 0.0
