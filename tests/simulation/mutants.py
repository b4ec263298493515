"""
The protocol with one thing broken at a time, to prove that the simulation would notice.

Most mutants change a function of ``include/refunds``. Those of a rule that stands in the ledger's SQL change the ledger in memory;
``test_agreement`` proves that the two ledgers follow the same rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import UUID

from include.payroc.errors import PayrocError, PayrocNoAnswer
from include.refunds import (
    classify,
    continuity,
    follow_up,
    limits,
    look_up,
    pull,
    release,
    resolve,
    send,
    transitions,
)
from include.refunds import rows as source_rows
from include.refunds.classify import Outcome, Sighting, Verdict
from include.refunds.keys import idempotency_key
from include.refunds.ledger import (
    KNOWN_FOR,
    Claim,
    LedgerError,
    LedgerUnavailable,
    Task,
    TerminalList,
)
from include.refunds.ledger.approvals import hash_of_ids
from include.refunds.refund import History, Refund
from include.refunds.states import IN_DOUBT, Status
from tests.simulation import history as simulated
from tests.simulation import ledger, merchant
from tests.simulation.engine import Mistake, Violation
from tests.simulation.history import PlainCipher
from tests.simulation.ledger import MemoryLedger, Row
from tests.simulation.merchant import ALL_TERMINALS
from tests.simulation.payroc import Host, SimulatedGateway
from tests.simulation.worker import SteppedLedger


@dataclass(frozen=True)
class Mutant:
    """
    One broken protocol.

    :param name: as docs/safety.md calls it.
    :param patches: what is put in the place of what: object, name, replacement.
    :param harmless: why no history can show it, for a mutant that is not expected to be caught.
    """

    name: str
    patches: tuple[tuple[Any, str, Any], ...]
    harmless: str = ""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Break the protocol for a while."""
        with ExitStack() as stack:
            for target, name, replacement in self.patches:
                stack.enter_context(patch.object(target, name, replacement))
            yield


# What the rarest of them takes, several times over; what is harmless shows nothing in a part of it either.
ENOUGH, HARMLESS = 3_000, 1_000


def noticed(mutant: Mutant) -> tuple[int, str | None]:
    """
    Return how many histories it takes until one breaks an invariant, and what it breaks.

    It is ``None`` when none of 3,000 does; of a harmless one, 1,000.
    """
    with mutant.applied():
        enough = HARMLESS if mutant.harmless else ENOUGH
        for seed in range(enough):
            try:
                simulated.History(seed).run()
            except Mistake:
                # A mutant that cannot even run proves nothing.
                raise
            except Violation as violation:
                return seed + 1, str(violation)
    return enough, None


# -- the key and the body ------------------------------------------------------------------------------------------------


async def _post_under_a_key_per_attempt(token: Any, claim: Claim, body: bytes, gateway: Any) -> Verdict:
    key = UUID(int=claim.refund.idempotency_key.int ^ (claim.attempt - 1))
    return await _post(
        token,
        dataclasses.replace(claim, refund=dataclasses.replace(claim.refund, idempotency_key=key)),
        body,
        gateway,
    )


_post = send._post


def _drawn_key(source: str, source_ref: str) -> UUID:
    """Another key after the ledger that held the first one was restored; until then, the one that the invariants know."""
    return _derived_key(source, f"{source_ref} again" if _RESTORED else source_ref)


_derived_key = idempotency_key
_RESTORED: list[bool] = []


def _new_ledger(self: MemoryLedger, *arguments: Any) -> None:
    _RESTORED.clear()
    _init(self, *arguments)


def _restore_and_draw(self: MemoryLedger, backup: dict[str, Any]) -> None:
    _RESTORED.append(True)
    _restore(self, backup)


_init, _restore = MemoryLedger.__init__, MemoryLedger.restore


def _build_anew(row: Any, cipher: Any, settings: Any, now: Any) -> Any:
    # What the simulation remembers of a row would hide that its key is drawn anew.
    return _build(row, cipher, settings, now)


_build = pull.build


async def _store_again(self: MemoryLedger, rows: Any) -> set[str]:
    """Each pull stores what it reads as new refunds, with keys of their own."""
    self.by_ref = {}
    twins = []
    for refund, request in rows:
        key = idempotency_key("simulated", f"{refund.source_ref} {self.next_id}")
        twins.append(
            (
                dataclasses.replace(
                    refund, order_id=f"{refund.order_id} {self.next_id}", idempotency_key=str(key)
                ),
                request,
            )
        )
    return await _store(self, twins)


_store = MemoryLedger.store


async def _nothing_stored(self: MemoryLedger, source_refs: Any) -> dict[str, Any]:
    return {}


def _open_rebuilt(
    self: PlainCipher, sealed: bytes, expected_sha256: str, refund_id: int, sealed_with: str | None = None
) -> bytes:
    """The body is made anew for each attempt, with the time in its description."""
    _COUNTER[0] += 1
    return sealed.replace(b'"description":"', b'"description":"%d ' % _COUNTER[0], 1)


_COUNTER = [0]


# -- the claim -----------------------------------------------------------------------------------------------------------


async def _claim_without_commit(self: MemoryLedger, refund_id: int, task: Any, **values: Any) -> Claim | None:
    """The claim is computed and not committed before the POST; the record commits both."""
    backup = self.backup()
    claim = await _claim(self, refund_id, task, **values)
    if claim is not None:
        _restore(self, backup)
        _UNCOMMITTED[refund_id] = (task, values)
    return claim


async def _record_with_claim(
    self: MemoryLedger, refund_id: int, verdict: Verdict, attempt: int | None = None
) -> Any:
    if attempt is not None and refund_id in _UNCOMMITTED:
        task, values = _UNCOMMITTED.pop(refund_id)
        await _claim(self, refund_id, task, **values)
    return await _record(self, refund_id, verdict, attempt)


_claim, _record = MemoryLedger.claim, MemoryLedger.record
_UNCOMMITTED: dict[int, Any] = {}


def _fence(make: Callable[[datetime], datetime]) -> Any:
    def claim(self: MemoryLedger, row: Row, now: datetime, fence_until: datetime) -> None:
        _write_claim(self, row, now, make(now))

    return claim


_write_claim = MemoryLedger._claim


async def _claim_by_the_hosts_clock(
    self: MemoryLedger, refund_id: int, task: Any, *, token_seconds: int, **values: Any
) -> Claim | None:
    engine = self.clock.__self__  # type: ignore[attr-defined]
    return await _claim(self, refund_id, task, token_seconds=token_seconds + int(engine.host_skew), **values)


def _may_claim_with_any_key(self: MemoryLedger, row: Row, now: datetime, sent_with: str) -> bool:
    return row.first_sent_at is None or row.first_sent_at > now - timedelta(
        days=self.settings.key_window_days
    )


# -- the last check ------------------------------------------------------------------------------------------------------


def _first_sent_anew(self: MemoryLedger, row: Row, claim: Claim, now: datetime) -> None:
    row.first_sent_at = None
    _permit(self, row, claim, now)


def _permit_without_lease(self: MemoryLedger, row: Row, claim: Claim, now: datetime) -> None:
    lease_until = row.lease_until
    _permit(self, row, claim, now)
    row.lease_until = lease_until


_permit = MemoryLedger._permit


async def _record_and_extend(
    self: MemoryLedger, refund_id: int, verdict: Verdict, attempt: int | None = None, **more: Any
) -> Any:
    """The lease is extended when the POST has returned."""
    row = self.rows[refund_id]
    if row.status is Status.SENDING and row.attempts == attempt:
        row.lease_until, row.as_refund = row.fence_until, None
    return await _record(self, refund_id, verdict, attempt, **more)


async def _may_post_whatever(self: MemoryLedger, claim: Claim, seconds: float) -> bool:
    if len(self.attempts.get(claim.refund.id, ())) >= claim.attempt:
        self.attempts[claim.refund.id][claim.attempt - 1].posting_at = self.clock()
    return True


async def _may_post_of_any_attempt(self: MemoryLedger, claim: Claim, seconds: float) -> bool:
    newest = self.rows[claim.refund.id].attempts
    of_newest = dataclasses.replace(claim, refund=dataclasses.replace(claim.refund, attempts=newest))
    may = await _may_post(self, of_newest, seconds)
    if may:
        self.attempts[claim.refund.id][claim.attempt - 1].posting_at = self.clock()
    return may


async def _may_post_in_any_status(self: MemoryLedger, claim: Claim, seconds: float) -> bool:
    """A run that began has taken back what this worker claimed and did not send in time."""
    row = self.rows[claim.refund.id]
    status, row.status = row.status, Status.SENDING
    try:
        return await _may_post(self, claim, seconds)
    finally:
        row.status = status


async def _may_post_without_commit(self: MemoryLedger, claim: Claim, seconds: float) -> bool:
    """What the last check writes is committed with the record, and not before the POST."""
    row, attempt = self.rows[claim.refund.id], self.attempts[claim.refund.id][claim.attempt - 1]
    before = row.lease_until, row.first_sent_at, row.sent_with
    may = await _may_post(self, claim, seconds)
    if may:
        row.lease_until, row.first_sent_at, row.sent_with = before
        # The invariants would notice at once that posting_at is missing; what it costs is to be seen.
        _UNPERMITTED[attempt.refund_id, attempt.attempt] = claim
    return may


async def _record_with_permission(
    self: MemoryLedger, refund_id: int, verdict: Verdict, attempt: int | None = None, **more: Any
) -> Any:
    claim = _UNPERMITTED.pop((refund_id, attempt or 0), None)
    row = self.rows[refund_id]
    if claim is not None and row.status is Status.SENDING and row.attempts == attempt:
        _permit(self, row, claim, self.clock())
    return await _record(self, refund_id, verdict, attempt, **more)


_UNPERMITTED: dict[tuple[int, int], Claim] = {}


def _permit_not_durable(self: MemoryLedger, row: Row, claim: Claim, now: datetime) -> None:
    """One commit of twenty is lost after it was acknowledged."""
    before = row.lease_until, row.first_sent_at, row.sent_with
    _permit(self, row, claim, now)
    engine = self.clock.__self__  # type: ignore[attr-defined]
    if engine.chance() < 0.05:
        row.lease_until, row.first_sent_at, row.sent_with = before


def _end_also_what_was_posted(self: MemoryLedger, row: Row, now: datetime) -> None:
    """An attempt of which nothing was recorded counts as never sent, though it has passed its last check."""
    for item in self.attempts[row.id]:
        if item.finished_at is None:
            item.finished_at, item.outcome, row.first_sent_at = now, Outcome.NOT_SENT, None


_may_post = MemoryLedger.may_post


def _may_claim_what_has_ended(
    self: MemoryLedger, row: Row, now: datetime, environment: str, sent_with: str
) -> bool:
    if row.status in (Status.ACCEPTED, Status.REJECTED):
        row.status, row.payroc_refund_id, row.as_refund = Status.RELEASED, None, None
    return _may_claim(self, row, now, environment, sent_with)


_may_claim = MemoryLedger._may_claim


def _may_claim_while_paused(
    self: MemoryLedger, row: Row, now: datetime, environment: str, sent_with: str
) -> bool:
    paused, self.paused = self.paused, {}
    try:
        return _may_claim(self, row, now, environment, sent_with)
    finally:
        self.paused = paused


# -- the token -----------------------------------------------------------------------------------------------------------


async def _post_with_a_fresh_token(token: Any, claim: Claim, body: bytes, gateway: Any) -> Verdict:
    return await _post(await gateway.token(younger_than=60.0), claim, body, gateway)


def _evict_all(self: Host, token: Any) -> None:
    self.tokens.clear()


# -- what an answer proves -----------------------------------------------------------------------------------------------


def _judging(
    condition: Callable[[PayrocError, Refund, History], bool],
    outcome: Outcome,
    sighting: Sighting | None = None,
) -> Any:
    def judge(error: PayrocError, refund: Refund, history: History) -> Verdict:
        if condition(error, refund, history):
            return Verdict(outcome, "mutant", error.http_status, error.problem_type, sighting=sighting)
        return _judge_error(error, refund, history)

    return judge


_judge_error = classify.judge_error


def _judge_as_if_first(error: PayrocError, refund: Refund, history: History) -> Verdict:
    return _judge_error(error, refund, History())


def _conflict_is_accepted(error: PayrocError, refund: Refund, history: History) -> Verdict:
    if error.http_status == 409:
        return Verdict(
            Outcome.ACCEPTED, "mutant", 409, sighting=Sighting(f"X{refund.id:09d}", "ready", Status.ACCEPTED)
        )
    return _judge_error(error, refund, history)


async def _miss_is_proof(token: Any, refund: Refund, gateway: Any, *rest: Any) -> Verdict | None:
    return await _look_up_in_doubt(token, refund, gateway, *rest) or Verdict(
        Outcome.REJECTED, "Payroc does not list it."
    )


_look_up_in_doubt = send.look_up_in_doubt


async def _look_up_first_and_believe(token: Any, claim: Claim, *rest: Any) -> Verdict | None:
    verdict = await _look_up_first(token, claim, *rest)
    return verdict or (Verdict(Outcome.REJECTED, "Payroc does not list it.") if claim.attempt > 1 else None)


_look_up_first = send._look_up_first


async def _no_look_up_before_a_later_attempt(
    token: Any, claim: Claim, refund: Refund, *rest: Any
) -> Verdict | None:
    return await _look_up_first(token, claim, refund, *rest) if refund.replaces is not None else None


def _decide_as_current(refund: Refund, verdict: Verdict, history: History, **values: Any) -> Any:
    if refund.status not in IN_DOUBT:
        return _decide(refund, verdict, history, **values)
    return _decide(refund, verdict, history, **(values | {"current": True}))


def _decide_without_history(refund: Refund, verdict: Verdict, history: History, **values: Any) -> Any:
    return _decide(refund, verdict, History(), **values)


_decide = transitions.decide


def _decide_without_wait(refund: Refund, verdict: Verdict, history: History, **values: Any) -> Any:
    return _decide(
        refund,
        dataclasses.replace(verdict, retry_after=0.0),
        history,
        **(values | {"unknown_wait": timedelta(0)}),
    )


# -- a list, sent side by side -------------------------------------------------------------------------------------------

# A gateway is that of one try of one task: what it is given here, the refunds of a list share.


async def _post_what_was_opened_last(token: Any, claim: Claim, body: bytes, gateway: Any) -> Verdict:
    return await _post(token, claim, gateway.opened, gateway)


async def _look_up_and_keep_the_body(
    token: Any, claim: Claim, refund: Refund, ledger: Any, gateway: Any
) -> Any:
    gateway.opened = refund.request
    return await _look_up_first(token, claim, refund, ledger, gateway)


async def _post_under_the_key_of_the_list(token: Any, claim: Claim, body: bytes, gateway: Any) -> Verdict:
    gateway.__dict__.setdefault("key", claim.refund.idempotency_key)
    refund = dataclasses.replace(claim.refund, idempotency_key=gateway.key)
    return await _post(token, dataclasses.replace(claim, refund=refund), body, gateway)


async def _answer_of_the_neighbour(self: SimulatedGateway, token: Any, key: str, body: bytes) -> Any:
    answer = await _create_refund(self, token, key, body)
    before, self.__dict__["answer"] = self.__dict__.get("answer", answer), answer
    return before


_create_refund = SimulatedGateway.create_refund


async def _send_with_the_verdict_of_the_list(
    refund_id: int, task: Task, stepped: Any, gateway: Any, *rest: Any
) -> Any:
    sent = await _send(refund_id, task, stepped, gateway, *rest)
    if isinstance(sent, send.Result):
        return sent
    gateway.verdict = sent[1]
    await stepped.read(refund_id)
    return sent[0], gateway.verdict


async def _send_with_the_attempt_of_the_list(
    refund_id: int, task: Task, stepped: Any, gateway: Any, *rest: Any
) -> Any:
    sent = await _send(refund_id, task, stepped, gateway, *rest)
    if isinstance(sent, send.Result):
        return sent
    gateway.attempt = sent[0].attempt
    await stepped.read(refund_id)
    return dataclasses.replace(
        sent[0], refund=dataclasses.replace(sent[0].refund, attempts=gateway.attempt)
    ), sent[1]


_send = send._send


async def _send_and_stop_the_list(refund_id: int, task: Task, stepped: Any, gateway: Any, *rest: Any) -> Any:
    try:
        return await _send(refund_id, task, stepped, gateway, *rest)
    except LedgerError:
        gateway.stopped = True
        raise


async def _post_unless_the_list_is_stopped(token: Any, claim: Claim, body: bytes, gateway: Any) -> Verdict:
    verdict = await _post(token, claim, body, gateway)
    return Verdict(Outcome.NOT_SENT, "The list was stopped.") if hasattr(gateway, "stopped") else verdict


async def _send_and_forget_the_list(
    refund_id: int, task: Task, stepped: Any, gateway: Any, *rest: Any
) -> Any:
    sent = await _send_and_stop_the_list(refund_id, task, stepped, gateway, *rest)
    if hasattr(gateway, "stopped"):
        raise LedgerUnavailable("The list was stopped.")
    return sent


async def _send_whatever_stops_all(*arguments: Any) -> Any:
    sent = await _send(*arguments)
    return dataclasses.replace(sent, stops_all=False) if isinstance(sent, send.Result) else sent


async def _recorded_whatever_stops_all(*arguments: Any) -> Any:
    return dataclasses.replace(await _recorded(*arguments), stops_all=False)


_recorded = send._recorded


@asynccontextmanager
async def _turn_given_back_at_once(self: SimulatedGateway) -> AsyncIterator[None]:
    async with _turn(self):
        pass
    yield


@asynccontextmanager
async def _place_given_back_at_once(self: SimulatedGateway) -> AsyncIterator[None]:
    async with _queue(self):
        pass
    yield


@asynccontextmanager
async def _place_given_back_for_the_turn(self: SimulatedGateway) -> AsyncIterator[None]:
    """The place goes to the next one when its refund is claimed, and not when Payroc has answered."""
    queue = self._queue
    queue.give_back()
    try:
        async with _turn(self):
            yield
    finally:
        queue.taken += 1


_queue, _turn = SimulatedGateway.queue, SimulatedGateway.turn


async def _may_post_once_for_a_list(self: SteppedLedger, claim: Claim, seconds: float) -> bool:
    assert self.engine.current is not None
    looked = self.__dict__.setdefault("looked", {})
    actor = self.engine.current.actor
    if actor not in looked:
        looked[actor] = await _stepped_may_post(self, claim, seconds)
    return bool(looked[actor])


async def _claim_with_the_lease_of_the_list(
    self: SteppedLedger, refund_id: int, task: Task, **values: Any
) -> Claim | None:
    claim: Claim | None = await _stepped_claim(self, refund_id, task, **values)
    row = self.ledger.rows[refund_id]
    if claim is not None and row.attempts == claim.attempt:
        row.fence_until = self.__dict__.setdefault("fences", {}).setdefault(task, row.fence_until)
    return claim


async def _claim_without_its_commit(
    self: SteppedLedger, refund_id: int, task: Task, **values: Any
) -> Claim | None:
    """The transaction of a group fails, and its calls get their answers all the same."""
    try:
        claim: Claim | None = await _stepped_claim(self, refund_id, task, **values)
    except LedgerUnavailable:
        backup = self.ledger.backup()
        claim = await self.ledger.claim(refund_id, task, **values)
        self.watch("claim", (refund_id, task), values, claim)
        self.ledger.restore(backup)
    return claim


_stepped_claim, _stepped_may_post = SteppedLedger.claim, SteppedLedger.may_post  # type: ignore[attr-defined]


async def _token_of_the_list(self: SimulatedGateway, *, younger_than: float | None = None) -> Any:
    if "token_of_all" not in self.__dict__:
        self.__dict__["token_of_all"] = await _token(self, younger_than=younger_than)
    return self.__dict__["token_of_all"]


_token = SimulatedGateway.token


# -- continuity
# ----------------------------------------------------------------------------------------------------------


def _goes_on_lately(item: Any, start: datetime, settings: Any) -> datetime:
    """A list is read back a few days, wherever the ledger had stopped."""
    return start - continuity.READ_BY_RELEASE_AFTER - continuity.LIST_LAG


def _list_of_any_key(self: MemoryLedger, row: Row, sent_with: str | None) -> bool:
    known = self.terminal_rows.get(row.processing_terminal_id)
    return known is not None and known.read_to is not None and known.read_to > self.clock() - KNOWN_FOR


def _is_known_with_any_key(self: TerminalList, since: datetime, sent_with: str) -> bool:
    return self.read_to is not None and self.read_to > since


async def _no_lists_due(*anything: Any, **more: Any) -> list[Any]:
    return []


async def _lists_needed(*arguments: Any, needed: Any = (), **more: Any) -> list[Any]:
    return [item for item in await _lists_due(*arguments, needed=needed, **more) if item.terminal in needed]


_lists_due = continuity.lists_due


async def _compare_and_overlook(*arguments: Any, **more: Any) -> Any:
    return dataclasses.replace(await _compare_list(*arguments, **more), incomplete=None)


_compare_list = continuity.compare_list


async def _every_terminal(ledger: Any, gateway: Any) -> set[str]:
    return set(ALL_TERMINALS)


async def _keep_nothing_plain(self: SteppedLedger, found: Any) -> None:
    await _stepped_keep_foreign(self, [item for item in found if not item.plain])


_stepped_keep_foreign = SteppedLedger.keep_foreign  # type: ignore[attr-defined]


async def _keep_nothing(self: SteppedLedger, found: Any) -> None:
    return None


async def _store_without_a_look(self: MemoryLedger, rows: Any) -> set[str]:
    foreign, self.foreign = self.foreign, {}
    try:
        return await _store(self, rows)
    finally:
        self.foreign = foreign


async def _release_without_a_look(self: MemoryLedger, *arguments: Any) -> list[int]:
    foreign, self.foreign = self.foreign, {}
    try:
        return await _release(self, *arguments)
    finally:
        self.foreign = foreign


def _recovered_without_a_pause(refund: Refund, verdict: Verdict, sighting: Sighting, restored: bool) -> Any:
    return dataclasses.replace(_recover(refund, verdict, sighting, restored), pause=None)


_recover = transitions._recover


# -- around the sending --------------------------------------------------------------------------------------------------


async def _take_any_turn(self: MemoryLedger, holder: str) -> bool:
    self.turn = None
    return await _take_turn(self, holder)


_take_turn = MemoryLedger.take_turn


async def _mark_after_the_turn(self: MemoryLedger, holder: str, *rest: Any) -> None:
    self.turn = holder, self.clock()
    await _mark_written_back(self, holder, *rest)


_mark_written_back = MemoryLedger.mark_written_back


async def _mark_whatever_is_there(self: MemoryLedger, holder: str, written: Any, *not_written: Any) -> None:
    await _mark_written_back(self, holder, written, *not_written)
    for row in self.rows.values():
        row.written_back_at = row.updated_at


async def _nothing_again(self: MemoryLedger, offered: Any) -> tuple[int, int]:
    return 0, 0


def _no_changes(*anything: Any) -> dict[str, str]:
    return {}


async def _release_what_was_not_looked_up(
    self: MemoryLedger, run_id: str, candidate_ids: Any, standing_ids: Any, withdrawn: Any
) -> list[int]:
    return await _release(
        self, run_id, candidate_ids, [item for item in candidate_ids if item not in withdrawn], withdrawn
    )


_release = MemoryLedger.release


def _status_is(*statuses: int) -> Callable[[PayrocError, Refund, History], bool]:
    return lambda error, refund, history: error.http_status in statuses


# -- the limits ----------------------------------------------------------------------------------------------------------


async def _candidates_and_caps(
    self: MemoryLedger, selection: Any, *, standing: Any = None, ids: Any = None
) -> Any:
    if ids is not None:
        self.run_totals = _counted_today(self)
    return await _candidates(self, selection, standing=standing, ids=ids)


_candidates, _counted_today = MemoryLedger.candidates, MemoryLedger._counted_today


def _counted_before(self: MemoryLedger) -> Any:
    return getattr(self, "run_totals", {})


async def _candidates_and_decision(
    self: MemoryLedger, selection: Any, *, standing: Any = None, ids: Any = None
) -> Any:
    if ids is not None:
        self.__dict__.setdefault("early_decisions", {})[tuple(sorted(ids))] = _decide_at_gate(self, ids, {})
    return await _candidates(self, selection, standing=standing, ids=ids)


_decide_at_gate = MemoryLedger._decide_at_gate


def _decision_of_before(self: MemoryLedger, ids: Any, counted: Any) -> Any:
    decision = self.__dict__.get("early_decisions", {}).get(tuple(sorted(ids)))
    return _decide_at_gate(self, ids, counted) if decision is None else decision


def _hold_nothing_more(item: Any, *rest: Any) -> Any:
    return None if item.released_holds else _hold(item, *rest)


_hold = limits._hold


def _check_hash_only(self: MemoryLedger, run_id: str, candidate_ids: Any) -> None:
    if self._run(run_id).approved_hash != hash_of_ids(candidate_ids):
        raise LedgerError("no approval")


async def _begin_and_forget_the_question(self: MemoryLedger, run_id: str, *rest: Any) -> None:
    await _begin_run(self, run_id, *rest)
    self.run_rows[run_id].question = None


_begin_run = MemoryLedger.begin_run


def _passed_at_all(other: Any, item: Any) -> bool:
    return other.id != item.id and other.first_released_at is not None


async def _reject_is_approve(self: MemoryLedger, run_id: str, *, by: str) -> None:
    run = self._asked(run_id)
    run.approved_hash, run.approved_by = run.candidates_hash, by


async def _may_post_while_paused(self: MemoryLedger, claim: Claim, seconds: float) -> bool:
    paused, self.paused = self.paused, {}
    try:
        return await _may_post(self, claim, seconds)
    finally:
        self.paused = paused


# -- people --------------------------------------------------------------------------------------------------------------


async def _case_without_money(self: MemoryLedger, refund_id: int) -> Any:
    return dataclasses.replace(await _case(self, refund_id), may_have_moved=False)


_case = MemoryLedger.case


def _confirmed_by_anybody(case: Any, decision: Any, by: str) -> bool:
    return case.proposal is not None and dict(case.proposal.decision) == dict(decision)


async def _nobody_is_paid(*anything: Any) -> None:
    return None


def _rejected_whatever(listed: Any, known: Any) -> resolve.Resolution:
    return resolve.Resolution(Status.REJECTED)


async def _begin_restore_without_a_pause(self: MemoryLedger, backup_at: datetime, reason: str) -> Any:
    paused = dict(self.paused)
    begun = await _begin_restore(self, backup_at, reason)
    self.paused = paused
    return begun


_begin_restore = MemoryLedger.begin_restore


MUTANTS = (
    Mutant("a key per attempt", ((send, "_post", _post_under_a_key_per_attempt),)),
    Mutant(
        "the key is drawn, and the ledger restored",
        (
            (source_rows, "idempotency_key", _drawn_key),
            (merchant, "build_once", _build_anew),
            (MemoryLedger, "__init__", _new_ledger),
            (MemoryLedger, "restore", _restore_and_draw),
        ),
    ),
    Mutant(
        "a cleared pull mints a new row",
        ((MemoryLedger, "stored", _nothing_stored), (MemoryLedger, "store", _store_again)),
    ),
    Mutant(
        "the intent is committed after the POST",
        (
            (MemoryLedger, "claim", _claim_without_commit),
            (MemoryLedger, "record", _record_with_claim),
            (MemoryLedger, "may_post", _may_post_whatever),
        ),
    ),
    Mutant("the body is rebuilt for each attempt", ((PlainCipher, "open", _open_rebuilt),)),
    Mutant(
        "no answer is a rejection",
        ((send, "judge_error", _judging(lambda e, r, h: isinstance(e, PayrocNoAnswer), Outcome.REJECTED)),),
    ),
    Mutant(
        "a 5xx is a rejection", ((send, "judge_error", _judging(_status_is(500, 502), Outcome.REJECTED)),)
    ),
    Mutant(
        "a 408 or 429 is a rejection",
        ((send, "judge_error", _judging(_status_is(408, 429), Outcome.REJECTED)),),
    ),
    Mutant("a refusal after an unknown is a rejection", ((send, "judge_error", _judge_as_if_first),)),
    Mutant("a 401 is a rejection", ((send, "judge_error", _judging(_status_is(401), Outcome.REJECTED)),)),
    Mutant(
        "an unreadable 201 is a rejection",
        ((send, "judge_error", _judging(_status_is(201), Outcome.REJECTED)),),
    ),
    Mutant("a 409 is an acceptance", ((send, "judge_error", _conflict_is_accepted),)),
    Mutant(
        "an answer is not held against the request", ((classify, "differences", lambda found, refund: []),)
    ),
    Mutant(
        "the look-up adopts any refund with our order id",
        ((classify, "is_ours", lambda found, refund: True),),
    ),
    Mutant("a look-up's miss is proof", ((send, "_look_up_first", _look_up_first_and_believe),)),
    Mutant("a miss is proof when another holds the refund", ((send, "look_up_in_doubt", _miss_is_proof),)),
    Mutant("the token is renewed right before the POST", ((send, "_post", _post_with_a_fresh_token),)),
    Mutant(
        "no lease",
        (
            (MemoryLedger, "_claim", _fence(lambda now: now + timedelta(days=1))),
            (ledger, "CLAIM_LEASE", timedelta(0)),
            (MemoryLedger, "_permit", _permit_without_lease),
        ),
    ),
    Mutant(
        "a fence shorter than the token",
        ((MemoryLedger, "_claim", _fence(lambda now: now + timedelta(minutes=20))),),
    ),
    Mutant("the last check extends nothing", ((MemoryLedger, "_permit", _permit_without_lease),)),
    Mutant(
        "the lease is extended after the POST",
        ((MemoryLedger, "_permit", _permit_without_lease), (MemoryLedger, "record", _record_and_extend)),
    ),
    Mutant(
        "the POST leaves before the last check is committed",
        (
            (MemoryLedger, "may_post", _may_post_without_commit),
            (MemoryLedger, "record", _record_with_permission),
        ),
    ),
    Mutant(
        "the last check does not compare the attempt", ((MemoryLedger, "may_post", _may_post_of_any_attempt),)
    ),
    Mutant(
        "the last check does not ask for the status", ((MemoryLedger, "may_post", _may_post_in_any_status),)
    ),
    Mutant(
        "one last check of twenty is acknowledged and lost",
        ((MemoryLedger, "_permit", _permit_not_durable),),
    ),
    Mutant(
        "an attempt that may have been sent counts as never sent",
        ((MemoryLedger, "_end_unsent", _end_also_what_was_posted),),
    ),
    Mutant("the fence is counted by the host's clock", ((MemoryLedger, "claim", _claim_by_the_hosts_clock),)),
    Mutant("no wait after an unknown", ((ledger, "decide", _decide_without_wait),)),
    Mutant(
        "no key window",
        (
            (MemoryLedger, "_inside_window", lambda *anything: True),
            (look_up, "past_window", lambda *anything: False),
        ),
    ),
    Mutant("the key window counts from the last attempt", ((MemoryLedger, "_permit", _first_sent_anew),)),
    Mutant("another API key may send again", ((MemoryLedger, "_inside_window", _may_claim_with_any_key),)),
    Mutant(
        "what has ended is sent again",
        ((MemoryLedger, "_may_claim", _may_claim_what_has_ended), (send, "IN_DOUBT", frozenset(Status))),
    ),
    Mutant("no last check before the POST", ((MemoryLedger, "may_post", _may_post_whatever),)),
    Mutant("a pause stops no claim", ((MemoryLedger, "_may_claim", _may_claim_while_paused),)),
    Mutant("a worker that woke up late records", ((ledger, "decide", _decide_as_current),)),
    Mutant(
        "a refusal of the configuration forgets what went before",
        ((ledger, "decide", _decide_without_history),),
    ),
    Mutant(
        "a pause is looked at only at the gate",
        (
            (MemoryLedger, "_may_claim", _may_claim_while_paused),
            (MemoryLedger, "may_post", _may_post_while_paused),
        ),
    ),
    Mutant(
        "a list sends the body that was opened last",
        ((send, "_look_up_first", _look_up_and_keep_the_body), (send, "_post", _post_what_was_opened_last)),
    ),
    Mutant("a list sends under one key", ((send, "_post", _post_under_the_key_of_the_list),)),
    Mutant(
        "a list takes a neighbour's answer", ((SimulatedGateway, "create_refund", _answer_of_the_neighbour),)
    ),
    Mutant("a list records a neighbour's verdict", ((send, "_send", _send_with_the_verdict_of_the_list),)),
    Mutant("a list holds no place in the queue", ((SimulatedGateway, "queue", _place_given_back_at_once),)),
    Mutant(
        "a list leaves the queue before its turn",
        ((SimulatedGateway, "turn", _place_given_back_for_the_turn),),
    ),
    Mutant("a list holds no turn", ((SimulatedGateway, "turn", _turn_given_back_at_once),)),
    Mutant(
        "a list has one last look before its POSTs", ((SteppedLedger, "may_post", _may_post_once_for_a_list),)
    ),
    Mutant("a list has one lease", ((SteppedLedger, "claim", _claim_with_the_lease_of_the_list),)),
    Mutant(
        "a failed commit of claims counts as one, with no last look",
        ((SteppedLedger, "claim", _claim_without_its_commit), (MemoryLedger, "may_post", _may_post_whatever)),
    ),
    Mutant(
        "a list's first error takes what is under way for not sent",
        ((send, "_send", _send_and_stop_the_list), (send, "_post", _post_unless_the_list_is_stopped)),
    ),
    Mutant(
        "the approval is taken from what Airflow hands on",
        ((MemoryLedger, "_check_approval", lambda self, run_id, ids: None),),
    ),
    Mutant(
        "an approval counts for whatever the run is about by now",
        ((MemoryLedger, "_asked", MemoryLedger._run),),
    ),
    Mutant(
        "the threshold is looked at only when the run asks",
        ((MemoryLedger, "_check_approval", _check_hash_only),),
    ),
    Mutant(
        "a run that is pulled anew forgets what it released",
        ((MemoryLedger, "_released_before", lambda self, run_id: []),),
    ),
    Mutant(
        "what Airflow still shows is not looked at",
        ((MemoryLedger, "begin_run", _begin_and_forget_the_question),),
    ),
    Mutant(
        "what was rejected passes by itself the next time",
        ((MemoryLedger, "_rejected_before", lambda self, run: 0),),
    ),
    Mutant("of two that are alike each is held for the other", ((limits, "_passed_before", _passed_at_all),)),
    Mutant("a rejection counts as an approval", ((MemoryLedger, "record_rejection", _reject_is_approve),)),
    Mutant("whoever triggered a run approves it", ((ledger, "same_person", lambda one, other: False),)),
    Mutant(
        "the caps are read before the lock",
        (
            (MemoryLedger, "candidates", _candidates_and_caps),
            (MemoryLedger, "_counted_today", _counted_before),
        ),
    ),
    Mutant(
        "the gate decides without the lock",
        (
            (MemoryLedger, "candidates", _candidates_and_decision),
            (MemoryLedger, "_decide_at_gate", _decision_of_before),
        ),
    ),
    Mutant("a day's cap counts one run only", ((MemoryLedger, "_counted_today", lambda self: {}),)),
    Mutant(
        "the gate forgets whom it let through before",
        ((MemoryLedger, "_let_through_before", lambda self, asking: []),),
    ),
    Mutant("the largest refund is not looked at", ((limits, "_too_large", lambda item, limited: {}),)),
    Mutant("a lifted hold lets everything pass", ((limits, "_hold", _hold_nothing_more),)),
    Mutant(
        "the requester lifts the hold of a refund",
        ((ledger, "check_hold", lambda refund, requested_by, by: None),),
    ),
    Mutant(
        "what was paused when the source was read is released",
        ((MemoryLedger, "release", _release_what_was_not_looked_up),),
    ),
    Mutant("the source is not read again before the release", ((release, "source_changes", _no_changes),)),
    Mutant("two write-backs have the turn", ((MemoryLedger, "take_turn", _take_any_turn),)),
    Mutant(
        "a write-back that lost its turn notes what it wrote",
        ((MemoryLedger, "mark_written_back", _mark_after_the_turn),),
    ),
    Mutant(
        "a write-back notes more than it wrote",
        ((MemoryLedger, "mark_written_back", _mark_whatever_is_there),),
    ),
    Mutant(
        "a row that is offered again after its refund has ended is not written again",
        ((MemoryLedger, "write_again", _nothing_again),),
    ),
    Mutant(
        "a review is called rejected before the list can be complete",
        ((resolve, "LIST_MAY_LAG", timedelta(0)),),
    ),
    Mutant(
        "a review is called rejected whatever Payroc lists", ((resolve, "as_rejected", _rejected_whatever),)
    ),
    Mutant("what may have moved is taken for unmoved", ((MemoryLedger, "case", _case_without_money),)),
    Mutant("one person approves a reissue", ((ledger, "is_confirmed", _confirmed_by_anybody),)),
    Mutant(
        "a reissue looks nowhere at what it replaces",
        (
            (MemoryLedger, "_replaced_stands", lambda self, row: True),
            (send, "paid_after_all", _nobody_is_paid),
        ),
    ),
    Mutant(
        "keys that no refund has are not kept",
        ((SteppedLedger, "keep_foreign", _keep_nothing),),
    ),
    Mutant(
        "objects without custom fields are not kept",
        ((SteppedLedger, "keep_foreign", _keep_nothing_plain),),
    ),
    Mutant(
        "a pulled refund is not compared with what the lists showed",
        (
            (MemoryLedger, "store", _store_without_a_look),
            (MemoryLedger, "release", _release_without_a_look),
        ),
    ),
    Mutant("a list is not read on from where it was read", ((continuity, "goes_on_at", _goes_on_lately),)),
    Mutant(
        "a list with objects that nobody understands counts as read",
        ((continuity, "compare_list", _compare_and_overlook),),
    ),
    Mutant("a list is taken for known up to now", ((continuity, "LIST_LAG", timedelta(0)),)),
    Mutant(
        "no list is read before the gate, and the claim does not ask for it",
        (
            (release, "lists_due", _no_lists_due),
            (release, "_known_terminals", _every_terminal),
            (MemoryLedger, "_list_is_known", lambda self, row, sent_with: True),
        ),
    ),
    Mutant(
        "only the lists of the refunds' own terminals are read",
        ((release, "lists_due", _lists_needed), (follow_up, "lists_due", _no_lists_due)),
    ),
    Mutant(
        "the claim does not ask for the list",
        (
            (release, "_known_terminals", _every_terminal),
            (MemoryLedger, "_list_is_known", lambda self, row, sent_with: True),
        ),
    ),
    Mutant(
        "a list that another API key read counts",
        (
            (TerminalList, "is_known", _is_known_with_any_key),
            (MemoryLedger, "_list_is_known", _list_of_any_key),
        ),
    ),
    Mutant("what was forgotten pauses nothing", ((transitions, "_recover", _recovered_without_a_pause),)),
    Mutant(
        "after a restore nothing is paused",
        ((MemoryLedger, "begin_restore", _begin_restore_without_a_pause),),
    ),
    Mutant(
        "a failed commit of claims counts as one",
        ((SteppedLedger, "claim", _claim_without_its_commit),),
        harmless="The last look before the POST finds no claim of this attempt in the ledger, so nothing is sent.",
    ),
    Mutant(
        "no look-up before a later attempt",
        ((send, "_look_up_first", _no_look_up_before_a_later_attempt),),
        harmless="Payroc answers a key that it knows with the refund that exists; the look-up only spares the POST.",
    ),
    Mutant(
        "a list records under a neighbour's attempt",
        ((send, "_send", _send_with_the_attempt_of_the_list),),
    ),
    Mutant(
        "a list's first error forgets what is under way",
        ((send, "_send", _send_and_forget_the_list),),
        harmless="To the ledger it is a worker that died: what was under way is looked up, or sent again under its key, when the lease "
        "ends.",
    ),
    Mutant(
        "what stops all stops no list",
        ((send, "_send", _send_whatever_stops_all), (send, "_recorded", _recorded_whatever_stops_all)),
        harmless="The pause that it left in the ledger refuses each further claim, and without a token nothing can be claimed.",
    ),
    Mutant(
        "a list has one token",
        ((SimulatedGateway, "token", _token_of_the_list),),
        harmless="The token ends earlier than its lease allows for; what is sent with it afterwards Payroc refuses.",
    ),
    Mutant(
        "a 401 evicts whatever token is there",
        ((Host, "evict", _evict_all),),
        harmless="It costs a request for another token and nothing else: an attempt holds its token in its hands, and the cache is only "
        "read before a claim.",
    ),
)
