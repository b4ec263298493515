"""
A ledger in memory, thousands of times faster than a database.

It honours the constraints of the one in Postgres: each method is one transaction, the state graph and what never
changes are checked on every write, and the decisions come from the same pure functions. Its methods wait for
nothing. ``conformance`` says which protocols it implements; ``test_agreement`` runs both ledgers side by side and
compares them after every call.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any
from uuid import UUID

from include.refunds.approval import Question
from include.refunds.case import Case, DecisionRefused, Proposal, is_confirmed
from include.refunds.cipher import Sealed
from include.refunds.classify import EVERYTHING, Outcome, Verdict
from include.refunds.hold import check_hold, way_to_cancelled
from include.refunds.ledger import (
    KNOWN_FOR,
    NAMELESS,
    RELEASE_VALID,
    Candidate,
    Claim,
    Foreign,
    KeptRequest,
    LedgerError,
    LedgerUnavailable,
    NewRefund,
    NoSuchRefund,
    NotWritten,
    Selection,
    Task,
    TerminalList,
    WriteBack,
)
from include.refunds.ledger.approvals import hash_of_ids
from include.refunds.ledger.claims import CLAIM_LEASE
from include.refunds.ledger.foreign import why_paid
from include.refunds.ledger.pauses import BegunRestore
from include.refunds.ledger.runs import DUE_WITHIN
from include.refunds.ledger.write_backs import ENDED, TURN
from include.refunds.limits import (
    AtTheGate,
    GateDecision,
    Limits,
    Totals,
    day_start,
    decide_at_gate,
    totals,
    who_to_ask,
)
from include.refunds.people import person, same_person
from include.refunds.refund import History, Refund
from include.refunds.reissue import Reissue, check_replaceable
from include.refunds.resolve import Resolution, check_case
from include.refunds.rows import sentences
from include.refunds.settings import Settings
from include.refunds.states import EDGES, IN_DOUBT, PAID, REPLACEABLE, Status
from include.refunds.text import fold
from include.refunds.transitions import decide, forgotten
from tests.simulation.engine import Violation

_MICROSECOND = timedelta(microseconds=1)


@dataclass(slots=True)
class Row:
    """One row of ``refunds``."""

    id: int
    source_ref: str
    source_ref_folded: str
    processing_terminal_id: str
    order_id: str
    description: str
    amount: int
    currency: str
    payee_last4: str | None
    payee_fingerprint: str
    request: bytes | None
    request_key: str | None
    request_sha256: str
    requested_by: str
    requested_by_folded: str
    approved_by: str
    approved_by_folded: str
    approved_at: datetime
    idempotency_key: UUID
    created_at: datetime
    updated_at: datetime
    sent_with: str | None = None
    status: Status = Status.APPROVED
    reason: str | None = None
    released_by: str | None = None
    released_run: str | None = None
    released_at: datetime | None = None
    first_released_at: datetime | None = None
    first_released_run: str | None = None
    first_released_approver: str | None = None
    run_rejected_by: str | None = None
    holds: tuple[str, ...] = ()
    released_holds: tuple[str, ...] = ()
    attempts: int = 0
    first_sent_at: datetime | None = None
    lease_until: datetime | None = None
    fence_until: datetime | None = None
    next_attempt_at: datetime | None = None
    payroc_refund_id: str | None = None
    payroc_status: str | None = None
    payroc_seen_at: datetime | None = None
    replaces: int | None = None
    written_back_at: datetime | None = None
    # Its key as text, and the row as the protocol knows it until it changes: both would else be made thousands of times.
    key: str = ""
    as_refund: Refund | None = None


@dataclass(slots=True)
class Attempt:
    """One row of ``refund_attempts``."""

    refund_id: int
    attempt: int
    run_id: str
    started_at: datetime
    posting_at: datetime | None = None
    finished_at: datetime | None = None
    http_status: int | None = None
    problem_type: str | None = None
    outcome: Outcome | None = None


@dataclass(slots=True)
class Run:
    """One row of ``refund_runs``."""

    candidates_hash: str
    basis: dict[str, Any]
    candidates_at: datetime
    candidate_ids: tuple[int, ...] = ()
    asked_hash: str | None = None
    question: str | None = None
    approved_hash: str | None = None
    approved_by: str | None = None
    rejected_by: str | None = None
    released: int | None = None


@dataclass(slots=True)
class Event:
    """A row of ``refund_events`` that decisions are made from."""

    refund_id: int
    event: str
    actor: str
    at: datetime
    detail: dict[str, str]


@dataclass(slots=True)
class InvalidRow:
    """One row of ``invalid_rows``."""

    errors: dict[str, str]
    last_seen_at: datetime
    updated_at: datetime
    written_back_at: datetime | None = None


@dataclass(slots=True)
class Note:
    """One row of ``write_back_notes``."""

    failed: bool = False
    offered_again_at: datetime | None = None


_FIXED = (
    "id",
    "source_ref",
    "processing_terminal_id",
    "order_id",
    "amount",
    "payee_fingerprint",
    "request_sha256",
    "idempotency_key",
    "replaces",
    "created_at",
)


_NO_NOTE = Note()
_PENDING = frozenset({Status.APPROVED, Status.HELD, Status.RELEASED})
_ENDED = frozenset(map(Status, ENDED))


class MemoryLedger:
    """
    The ledger, in memory.

    :param settings: source, waits, key window.
    :param clock: the ledger's clock.
    """

    def __init__(self, settings: Settings, clock: Callable[[], datetime]) -> None:
        self.settings = settings
        self.clock = clock
        self.rows: dict[int, Row] = {}
        self.by_ref: dict[str, Row] = {}
        self.attempts: dict[int, list[Attempt]] = {}
        self.run_rows: dict[str, Run] = {}
        self.invalid: dict[str, InvalidRow] = {}
        self.notes: dict[str, Note] = {}
        # The first reason of each scope that is paused.
        self.paused: dict[str, str] = {}
        self.next_pause = 1
        # Restores that were not compared with Payroc yet, by number: from when each may have forgotten anything.
        self.restores: dict[int, datetime] = {}
        self.newest_restore = 0
        # Who has the turn of the write-back, and until when.
        self.turn: tuple[str, datetime] | None = None
        self.environment: str | None = None
        self.source: str | None = None
        self.fingerprint_key: str | None = None
        self.limited = Limits()
        self.terminal_rows: dict[str, TerminalList] = {}
        self.foreign: dict[str, Foreign] = {}
        self.events: list[Event] = []
        # Who acts, as the events name it.
        self.actor = "simulation"
        self.next_id = 1
        # It is each of its own parts.
        self.approvals = self.bindings = self.claims = self.decisions = self.gate = self.intake = self
        self.limits = self.lists = self.pauses = self.records = self.refunds = self.requests = self
        self.runs = self.write_backs = self

    # -- copies ----------------------------------------------------------------------------------------------------

    def backup(self) -> dict[str, Any]:
        """Return a copy of everything, as a backup holds it."""
        return {
            "rows": _copied(self.rows),
            "attempts": {key: [copy.copy(item) for item in items] for key, items in self.attempts.items()},
            "run_rows": _copied(self.run_rows),
            "invalid": _copied(self.invalid),
            "notes": _copied(self.notes),
            "paused": dict(self.paused),
            "next_pause": self.next_pause,
            "restores": dict(self.restores),
            "newest_restore": self.newest_restore,
            "turn": self.turn,
            "environment": self.environment,
            "source": self.source,
            "fingerprint_key": self.fingerprint_key,
            "limited": self.limited,
            "terminal_rows": dict(self.terminal_rows),
            "foreign": dict(self.foreign),
            "events": list(self.events),
            "next_id": self.next_id,
        }

    def restore(self, backup: dict[str, Any]) -> None:
        """Go back to a backup."""
        for name, value in backup.items():
            setattr(self, name, value)
        # The backup itself stays as it is.
        for name, value in self.backup().items():
            setattr(self, name, value)
        self.by_ref = {row.source_ref: row for row in self.rows.values()}

    @asynccontextmanager
    async def rehearsal(self) -> AsyncIterator[MemoryLedger]:
        backup = self.backup()
        yield self
        # A sequence of Postgres is not rolled back.
        self.restore({**backup, "next_id": self.next_id, "next_pause": self.next_pause})

    # -- control ---------------------------------------------------------------------------------------------------

    async def now(self) -> datetime:
        return self.clock()

    async def check_environment(self, environment: str, *, bind: bool = False) -> bool:
        found = self.environment
        if found is None:
            if bind:
                self.environment = environment
        elif found != environment:
            raise LedgerError(f"This ledger belongs to Payroc at {found}.")
        return found is not None

    async def check_source(self) -> None:
        if self.source is None:
            self.source = self.settings.source
        elif self.source != self.settings.source:
            raise LedgerError(f"This ledger belongs to the source {self.source}.")

    async def check_fingerprint_key(self, check: str) -> None:
        if self.fingerprint_key is None:
            self.fingerprint_key = check
        elif self.fingerprint_key != check:
            raise LedgerError("The fingerprints of this ledger were made with another key.")

    async def current(self) -> Limits:
        return self.limited

    async def set_limit(self, name: str, value: int | None, reason: str) -> None:
        after = replace(self.limited, **{name: value})
        if after.payee_days is None and (after.payee_total, after.payee_count) != (None, None):
            raise LedgerError("A limit per payee needs its days.")
        self.limited = after

    async def pause(self, scope: str, reason: str) -> None:
        self._pause(scope, reason)

    def _pause(self, scope: str, reason: str) -> None:
        self.next_pause += 1
        self.paused.setdefault(scope, reason)

    async def resume(self, scope: str, reason: str) -> bool:
        if scope == EVERYTHING and self.restored_to is not None:
            raise LedgerError("The ledger was restored from a backup and not compared with Payroc since.")
        return self.paused.pop(scope, None) is not None

    @property
    def restored_to(self) -> datetime | None:
        """From when a ledger that was not compared with Payroc yet may have forgotten anything."""
        return min(self.restores.values(), default=None)

    async def begin_restore(self, backup_at: datetime, reason: str) -> BegunRestore:
        known_until = self.restored_to or max(
            (row.updated_at for row in self.rows.values()), default=backup_at
        )
        begun = BegunRestore(self.next_pause, min(backup_at, known_until))
        self.restores[begun.number], self.newest_restore = begun.since, begun.number
        self._pause(
            EVERYTHING, f"The ledger was restored from a backup of {begun.since:%Y-%m-%d %H:%M %Z}: {reason}"
        )
        return begun

    async def end_restore(self, number: int, reason: str, hidden: int = 0, names: Sequence[str] = ()) -> None:
        if number != self.newest_restore:
            raise LedgerError("Another `restored` was begun after this one.")
        self.restores.clear()

    async def reasons(self) -> dict[str, str]:
        return dict(sorted(self.paused.items()))

    def _is_paused(self, row: Row) -> bool:
        return bool(self.paused) and (EVERYTHING in self.paused or row.processing_terminal_id in self.paused)

    # -- intake ----------------------------------------------------------------------------------------------------

    async def stored(self, source_refs: Sequence[str]) -> dict[str, Any]:
        return {ref: _as_mapping(self.by_ref[ref]) for ref in source_refs if ref in self.by_ref}

    async def store(self, rows: Sequence[tuple[NewRefund, Sealed]]) -> set[str]:
        now = self.clock()
        stored = set()
        for new, sealed in rows:
            key = UUID(new.idempotency_key)
            collides = new.source_ref in self.by_ref or any(
                row.idempotency_key == key
                or row.source_ref_folded == new.source_ref_folded
                or (row.processing_terminal_id, row.order_id) == (new.processing_terminal_id, new.order_id)
                for row in self.rows.values()
            )
            # A sequence of Postgres is not rolled back: a row that collides has used its number up.
            row_id, self.next_id = self.next_id, self.next_id + 1
            if collides:
                continue
            row = Row(
                row_id,
                new.source_ref,
                new.source_ref_folded,
                new.processing_terminal_id,
                new.order_id,
                new.description,
                new.amount,
                new.currency,
                new.payee_last4,
                new.payee_fingerprint,
                sealed.token,
                sealed.key_id,
                new.request_sha256,
                new.requested_by,
                new.requested_by_folded,
                new.approved_by,
                new.approved_by_folded,
                new.approved_at,
                key,
                now,
                now,
                key=new.idempotency_key,
            )
            self.rows[row.id] = self.by_ref[row.source_ref] = row
            self.attempts[row.id] = []
            stored.add(row.source_ref)
        self._set_aside_paid([self.by_ref[ref] for ref in stored], self.foreign.values())
        return stored

    async def spelled(self, folded: Sequence[str]) -> set[str]:
        return {row.source_ref_folded for row in self.rows.values()} & set(folded)

    async def note_invalid(self, invalid: dict[str, dict[str, str]], valid: Sequence[str]) -> None:
        if not invalid and not self.invalid:
            return
        now = self.clock()
        for ref, errors in invalid.items():
            known = self.invalid.get(ref)
            if known is None:
                self.invalid[ref] = InvalidRow(errors, now, now)
            else:
                known.last_seen_at = now
                if known.errors != errors:
                    known.errors, known.updated_at = errors, now
        for ref, row in list(self.invalid.items()):
            if row.last_seen_at < now and (ref in valid or ref.startswith(NAMELESS)):
                del self.invalid[ref]

    async def set_aside(self, standing: Sequence[str]) -> dict[int, str]:
        now = self.clock()
        aside = {}
        for row in self.rows.values():
            if row.source_ref in standing or row.replaces is not None:
                continue
            if row.status is Status.RELEASED:
                self._write(row, now, status=Status.APPROVED, reason="Its source row is no longer approved.")
            if row.status in (Status.APPROVED, Status.HELD):
                aside[row.id] = row.source_ref
        return aside

    # -- runs ------------------------------------------------------------------------------------------------------

    async def return_stale_releases(self) -> int:
        now = self.clock()
        count = 0
        for row in self.rows.values():
            if row.status is Status.SENDING and row.first_sent_at is None and _lapsed(row, now):
                self._write(
                    row,
                    now,
                    status=Status.RELEASED,
                    reason="It was claimed and not sent: its worker was stopped.",
                    lease_until=None,
                    next_attempt_at=None,
                )
                self._end_unsent(row, now)
            if (
                row.status is Status.RELEASED
                and row.released_at is not None
                and row.released_at <= now - RELEASE_VALID
            ):
                self._write(row, now, status=Status.APPROVED, reason="The release was not used in time.")
                count += 1
        return count

    async def candidates(
        self, selection: Selection, *, standing: Sequence[str] | None = None, ids: Sequence[int] | None = None
    ) -> list[Candidate]:
        found = [
            row
            for row in self.rows.values()
            if row.status in (Status.APPROVED, Status.RELEASED)
            and row.payroc_refund_id is None
            and not self._is_paused(row)
            and self._replaced_stands(row)
            and (standing is None or row.source_ref in standing or row.replaces is not None)
            and (ids is None or row.id in ids)
            and (not selection.source_refs or row.source_ref in selection.source_refs)
            and selection.processing_terminal_id in (None, row.processing_terminal_id)
            and (selection.approved_before is None or row.approved_at < selection.approved_before)
        ]
        found.sort(key=_oldest_first)
        return [
            Candidate(
                row.id,
                row.source_ref,
                row.processing_terminal_id,
                row.order_id,
                row.amount,
                row.currency,
                row.payee_last4,
                row.attempts,
                row.replaces,
            )
            for row in found[: selection.limit]
        ]

    async def due(self) -> list[int]:
        soon = self.clock() + DUE_WITHIN
        found = [
            row
            for row in self.rows.values()
            if row.status in IN_DOUBT and row.first_sent_at is not None and _waited(row, soon)
        ]
        return [row.id for row in sorted(found, key=_oldest_first)]

    async def begin_run(
        self,
        run_id: str,
        params: dict[str, Any],
        candidates: Sequence[Candidate],
        findings: dict[str, Any],
        at: datetime,
    ) -> None:
        before = self.run_rows.get(run_id)
        ids = [item.id for item in candidates]
        self.run_rows[run_id] = Run(
            hash_of_ids(ids),
            self._approval_basis(ids),
            self.clock(),
            tuple(ids),
            question=before.question if before else None,
        )

    async def ask_approval(self, run_id: str) -> Question | None:
        run = self._run(run_id)
        if run.approved_by is not None and run.approved_hash == run.candidates_hash:
            return None
        today = self._released_without_a_person(run_id)
        why = self._why_ask(today, run)
        if why is None:
            run.approved_hash = run.candidates_hash
            return None
        question = Question(why, run.candidates_hash, run.basis, today)
        if run.question not in (None, question.body(run_id)):
            raise LedgerError(f"Run {run_id} asked about something else before.")
        run.question = question.body(run_id)
        run.asked_hash, run.approved_hash, run.approved_by, run.rejected_by = (
            run.candidates_hash,
            None,
            None,
            None,
        )
        return question

    def _why_ask(self, today: Totals, run: Run) -> str | None:
        return who_to_ask(
            self.limited, today=today, run=run.basis["totals"], rejected=self._rejected_before(run)
        )

    def _rejected_before(self, run: Run) -> int:
        return sum(self.rows[refund_id].run_rejected_by is not None for refund_id in run.candidate_ids)

    async def record_approval(self, run_id: str, *, by: str, triggered_by: str | None) -> None:
        if triggered_by is not None and same_person(by, triggered_by):
            raise DecisionRefused(f"{by} triggered the run.")
        run = self._asked(run_id)
        run.approved_by, run.approved_hash, run.rejected_by = by, run.candidates_hash, None

    async def record_rejection(self, run_id: str, *, by: str) -> None:
        run = self._asked(run_id)
        run.rejected_by, run.approved_by, run.approved_hash = by, None, None
        for refund_id in run.candidate_ids:
            if self.rows[refund_id].status in (Status.APPROVED, Status.RELEASED):
                self.rows[refund_id].run_rejected_by = by

    def _asked(self, run_id: str) -> Run:
        run = self._run(run_id)
        if run.asked_hash != run.candidates_hash:
            raise LedgerError(f"Run {run_id} has other candidates than those that were asked about.")
        return run

    def _approval_basis(self, ids: Sequence[int]) -> dict[str, Any]:
        found = [self.rows[refund_id] for refund_id in ids]
        rows = [row for row in found if row.first_released_at is None]
        sums: dict[str, dict[str, int]] = totals((row.currency, row.amount) for row in rows)
        for currency, entry in sums.items():
            entry["largest"] = max(row.amount for row in rows if row.currency == currency)
        known = {row.payee_fingerprint for row in self.rows.values() if row.first_released_at is not None}
        return {
            "totals": sums,
            "again": len(found) - len(rows),
            "new_payees": len({row.payee_fingerprint for row in rows} - known),
        }

    def _released_without_a_person(self, but: str) -> dict[str, dict[str, int]]:
        """Return what other runs released today without a person, and this one before it was pulled anew."""
        others = [
            row
            for row in self._released_today()
            if row.first_released_run != but and row.first_released_approver is None
        ]
        return totals((row.currency, row.amount) for row in (*others, *self._released_before(but)))

    def _released_before(self, run_id: str) -> list[Row]:
        candidates_at = self._run(run_id).candidates_at
        return [
            row
            for row in self._released_by(run_id)
            if row.first_released_at is not None and row.first_released_at < candidates_at
        ]

    def _released_by(self, run_id: str) -> list[Row]:
        return [row for row in self.rows.values() if row.first_released_run == run_id]

    def _released_today(self) -> list[Row]:
        start = day_start(self.clock(), self.settings.timezone)
        return [
            row
            for row in self.rows.values()
            if row.first_released_at is not None and row.first_released_at >= start
        ]

    async def release(
        self,
        run_id: str,
        candidate_ids: Sequence[int],
        standing_ids: Sequence[int],
        withdrawn: dict[int, str],
    ) -> list[int]:
        now = self.clock()
        run = self._run(run_id)
        self._set_aside_paid([self.rows[item] for item in candidate_ids], self.foreign.values())
        self._check_approval(run_id, candidate_ids)
        for refund_id, finding in withdrawn.items():
            if self.rows[refund_id].status is Status.RELEASED:
                self._write(self.rows[refund_id], now, status=Status.APPROVED, reason=finding)
        by_this_run = totals((row.currency, row.amount) for row in self._released_by(run_id))
        decision = self._decide_at_gate([item for item in candidate_ids if item in standing_ids], by_this_run)
        for refund_id in decision.released:
            if self.rows[refund_id].status is Status.APPROVED:
                released: dict[str, Any] = {
                    "released_by": "simulation",
                    "released_run": run_id,
                    "released_at": now,
                }
                if self.rows[refund_id].first_released_at is None:
                    released["first_released_approver"] = run.approved_by
                self._write(
                    self.rows[refund_id],
                    now,
                    status=Status.RELEASED,
                    reason=None,
                    holds=(),
                    run_rejected_by=None,
                    **released,
                )
        for refund_id, hold in decision.held.items():
            self._write(self.rows[refund_id], now, status=Status.HELD, holds=hold.names, reason=hold.reason)
        run.released = len(decision.released)
        return decision.released

    async def at_the_gate(self, ids: Sequence[int]) -> GateDecision:
        return self._decide_at_gate(ids, {})

    def _check_approval(self, run_id: str, candidate_ids: Sequence[int]) -> None:
        run = self._run(run_id)
        if run.approved_hash != hash_of_ids(candidate_ids):
            raise LedgerError(f"Run {run_id} holds no approval of exactly these refunds.")
        if run.approved_by is None and self._why_ask(self._released_without_a_person(run_id), run):
            raise LedgerError(f"Run {run_id} takes a person by now.")

    def _decide_at_gate(self, ids: Sequence[int], by_this_run: Totals) -> GateDecision:
        asking = [
            row
            for refund_id in ids
            if (row := self.rows.get(refund_id)) is not None
            and row.status in (Status.APPROVED, Status.RELEASED)
            and not self._is_paused(row)
            and self._replaced_stands(row)
        ]
        asking.sort(key=_oldest_first)
        return decide_at_gate(
            [_at_the_gate(row) for row in asking],
            self.limited,
            run=by_this_run,
            day=self._counted_today(),
            earlier=self._let_through_before(asking),
            now=self.clock(),
        )

    def _counted_today(self) -> dict[str, dict[str, int]]:
        return totals((row.currency, row.amount) for row in self._released_today())

    def _let_through_before(self, asking: Sequence[Row]) -> list[AtTheGate]:
        if not self.limited.looks_back:
            return []
        since, payees = self.clock() - self.limited.looks_back, {row.payee_fingerprint for row in asking}
        return [
            _at_the_gate(row)
            for row in self.rows.values()
            if row.payee_fingerprint in payees
            and row.first_released_at is not None
            and row.first_released_at > since
        ]

    async def terminals(self, refund_ids: Sequence[int]) -> set[str]:
        return {self.rows[item].processing_terminal_id for item in refund_ids if item in self.rows}

    async def note(self, run_id: str, findings: dict[str, Any]) -> None:
        pass

    async def finish_run(self, run_id: str) -> None:
        pass

    def _replaced_stands(self, row: Row) -> bool:
        return row.replaces is None or all(other.status in REPLACEABLE for other in self._chain(row))

    def _chain(self, row: Row) -> list[Row]:
        chain = []
        while row.replaces is not None:
            row = self.rows[row.replaces]
            chain.append(row)
        return chain

    def _run(self, run_id: str) -> Run:
        if run_id not in self.run_rows:
            raise LedgerError(f"The ledger holds no candidates of run {run_id}.")
        return self.run_rows[run_id]

    # -- continuity
    # ------------------------------------------------------------------------------------------------

    async def terminal_lists(self) -> list[TerminalList]:
        return [self.terminal_rows[terminal] for terminal in sorted(self.terminal_rows)]

    async def all_terminals(self) -> list[str]:
        return [
            item.terminal
            for item in await self.terminal_lists()
            if item.read_to is not None or not item.refused
        ]

    async def note_terminals(self, terminals: Collection[str]) -> None:
        for terminal in terminals:
            self.terminal_rows.setdefault(terminal, TerminalList(terminal))

    async def list_read(self, terminal: str, read_from: datetime, read_to: datetime, read_with: str) -> None:
        known = self.terminal_rows.get(terminal)
        if known is not None and known.read_to is not None:
            read_to = max(known.read_to, read_to)
        self.terminal_rows[terminal] = TerminalList(terminal, read_from, read_to, read_with)

    async def list_failed(self, terminal: str, failure: str, *, refused: bool = False) -> None:
        known = self.terminal_rows.get(terminal, TerminalList(terminal))
        failed_at = known.failed_at or self.clock()
        self.terminal_rows[terminal] = replace(known, refused=refused, failed_at=failed_at)

    async def keep_foreign(self, found: Sequence[Foreign]) -> None:
        for item in found:
            self.foreign.setdefault(item.payroc_refund_id, item)
        kept = [self.foreign[item.payroc_refund_id] for item in found]
        self._set_aside_paid(list(self.rows.values()), kept)

    async def foreign_keys(self, keys: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for payroc_refund_id, item in sorted(self.foreign.items()):
            if item.idempotency_key in keys:
                found.setdefault(str(item.idempotency_key), payroc_refund_id)
        return found

    def _set_aside_paid(self, rows: Sequence[Row], objects: Collection[Foreign]) -> None:
        if not objects:
            return
        now = self.clock()
        owned = {row.payroc_refund_id for row in self.rows.values()}
        found = [
            (item.idempotency_key != row.key, row.id, item.payroc_refund_id, item.payroc_status)
            for row in rows
            if row.status in _PENDING
            for item in objects
            if item.idempotency_key == row.key
            or (item.payroc_refund_id not in owned and _may_have_paid(item, row))
        ]
        set_aside = set()
        for by_likeness, refund_id, payroc_refund_id, payroc_status in sorted(found):
            if refund_id in set_aside:
                continue
            set_aside.add(refund_id)
            row = self.rows[refund_id]
            reason = why_paid(payroc_refund_id, by_key=not by_likeness)
            if row.status is Status.RELEASED:
                self._write(row, now, status=Status.APPROVED)
            seen = {}
            if not by_likeness and payroc_refund_id not in {
                other.payroc_refund_id for other in self.rows.values()
            }:
                seen = {
                    "payroc_refund_id": payroc_refund_id,
                    "payroc_status": payroc_status,
                    "payroc_seen_at": now,
                }
            self._write(row, now, status=Status.REVIEW, reason=reason, **seen)
            detail = {"payroc_refund_id": payroc_refund_id}
            self.events.append(Event(row.id, "contradiction", self.actor, now, detail))
            if not by_likeness:
                self._pause(
                    EVERYTHING, forgotten(f"Payroc holds refund {payroc_refund_id} of refund {refund_id}")
                )

    def _list_is_known(self, row: Row, sent_with: str | None) -> bool:
        known = self.terminal_rows.get(row.processing_terminal_id)
        return known is not None and known.is_known(self.clock() - KNOWN_FOR, sent_with or "")

    # -- sending ---------------------------------------------------------------------------------------------------

    async def read(self, refund_id: int) -> tuple[Refund, History, datetime]:
        row = self._row(refund_id)
        return _refund(row), self._history(refund_id, before=row.attempts + 1), self.clock()

    async def claim(
        self, refund_id: int, task: Task, *, environment: str, sent_with: str, token_seconds: float
    ) -> Claim | None:
        now = self.clock()
        row = self.rows.get(refund_id)
        if row is None or row.request is None or not self._may_claim(row, now, environment, sent_with):
            return None
        self._end_unsent(row, now)
        self._claim(row, now, now + timedelta(seconds=token_seconds + self.settings.lease_margin_seconds))
        self.attempts[row.id].append(Attempt(row.id, row.attempts, task.run_id, now))
        return Claim(_refund(row), self._history(refund_id, before=row.attempts), sent_with)

    def _may_claim(self, row: Row, now: datetime, environment: str, sent_with: str) -> bool:
        if (
            row.payroc_refund_id is not None
            or self.environment != environment
            or self._is_paused(row)
            or not self._replaced_stands(row)
            or not self._inside_window(row, now, sent_with)
        ):
            return False
        if row.first_sent_at is None and not self._list_is_known(row, sent_with):
            return False
        fresh = row.released_at is not None and row.released_at > now - RELEASE_VALID
        if row.status is Status.RELEASED:
            return fresh
        return row.status in IN_DOUBT and _waited(row, now) and (row.first_sent_at is not None or fresh)

    def _inside_window(self, row: Row, now: datetime, sent_with: str) -> bool:
        return row.first_sent_at is None or (
            row.first_sent_at > now - timedelta(days=self.settings.key_window_days)
            and row.sent_with == sent_with
        )

    def _claim(self, row: Row, now: datetime, fence_until: datetime) -> None:
        lease_until = min(now + CLAIM_LEASE, fence_until)
        self._write(
            row,
            now,
            status=Status.SENDING,
            attempts=row.attempts + 1,
            reason=None,
            lease_until=lease_until,
            fence_until=fence_until,
            next_attempt_at=lease_until,
        )

    def _end_unsent(self, row: Row, now: datetime) -> None:
        """Record attempts whose worker was stopped before its last check as not sent."""
        for item in self.attempts[row.id]:
            if item.finished_at is None and item.posting_at is None:
                item.finished_at, item.outcome = now, Outcome.NOT_SENT

    async def may_post(self, claim: Claim, seconds: float) -> bool:
        row, now = self._row(claim.refund.id), self.clock()
        ends = now + timedelta(seconds=seconds + self.settings.lease_margin_seconds)
        may = (
            row.attempts == claim.attempt
            and row.status is Status.SENDING
            and row.fence_until is not None
            and row.fence_until > ends
            and not self._is_paused(row)
            and self._replaced_stands(row)
            and self._inside_window(row, now, claim.sent_with)
            and (row.first_sent_at is not None or self._list_is_known(row, claim.sent_with))
        )
        if may:
            self._permit(row, claim, now)
        return may

    def _permit(self, row: Row, claim: Claim, now: datetime) -> None:
        row.lease_until, row.as_refund = row.fence_until, None
        row.first_sent_at, row.sent_with = row.first_sent_at or now, row.sent_with or claim.sent_with
        self.attempts[row.id][claim.attempt - 1].posting_at = now

    async def record(
        self, refund_id: int, verdict: Verdict, attempt: int | None = None, *, restored: bool = False
    ) -> tuple[Refund, datetime]:
        now = self.clock()
        row = self._row(refund_id)
        if attempt is not None:
            self._finish_attempt(refund_id, attempt, verdict, now)
            current = row.status is Status.SENDING and row.attempts == attempt
        else:
            current = row.status in IN_DOUBT and row.lease_until is not None and row.lease_until <= now
        change = decide(
            _refund(row),
            verdict,
            self._history(refund_id, before=attempt or row.attempts + 1),
            current=current,
            foreign_id=self._is_foreign(refund_id, verdict),
            told=self._is_told(refund_id, verdict),
            now=now,
            unknown_wait=timedelta(seconds=self.settings.unknown_wait_seconds),
            restored=restored,
        )
        holds = row.attempts == attempt
        in_review = row.status is Status.REVIEW
        if change is not None:
            self._apply(row, change, now, ends_lease=holds)
        if holds and in_review:
            row.lease_until = row.as_refund = None
        return _refund(row), now

    def _apply(self, row: Row, change: Any, now: datetime, *, ends_lease: bool) -> None:
        sighting = change.sighting
        seen = {}
        if sighting is not None:
            seen = {
                "payroc_refund_id": row.payroc_refund_id or sighting.payroc_refund_id,
                "payroc_status": sighting.payroc_status,
                "payroc_seen_at": now,
            }
        for status in change.steps:
            values = {
                **seen,
                "status": status,
                "lease_until": change.wait_until,
                "next_attempt_at": change.wait_until,
            }
            if status is Status.REVIEW and not ends_lease:
                del values["lease_until"]
            if change.reason is not None:
                values["reason"] = change.reason
            if change.never_sent:
                values |= {"first_sent_at": None, "sent_with": None}
            self._write(row, now, **values)
        if sighting is not None and not change.steps:
            known = (row.payroc_refund_id, row.payroc_status) == (
                sighting.payroc_refund_id,
                sighting.payroc_status,
            )
            self._write(row, row.updated_at if known else now, **seen)
        if change.contradiction:
            detail = {"payroc_refund_id": change.contradicting_id} if change.contradicting_id else {}
            self.events.append(Event(row.id, "contradiction", self.actor, now, detail))
        if change.recovered:
            self.events.append(Event(row.id, "recovered", self.actor, now, {}))
        if change.pause:
            self._pause(change.pause, change.pause_reason or change.reason or "")

    async def mark_seen(self, refund_ids: Sequence[int]) -> None:
        for refund_id in refund_ids:
            self.rows[refund_id].payroc_seen_at = self.clock()

    async def in_doubt(self) -> list[Refund]:
        return [_refund(row) for row in self.rows.values() if row.status in IN_DOUBT]

    async def not_sent(self) -> list[Refund]:
        return [
            _refund(row)
            for row in self.rows.values()
            if row.status in (Status.APPROVED, Status.HELD, Status.RELEASED)
        ]

    async def followed(self, changed_within: timedelta, taken_over_within: timedelta) -> dict[str, datetime]:
        since, longest = self.clock() - changed_within, self.clock() - taken_over_within
        oldest: dict[str, datetime] = {}
        for row in sorted(self.rows.values(), key=lambda row: row.processing_terminal_id):
            if row.status in (Status.ACCEPTED, Status.REVIEW) or row.updated_at > since:
                taken_over = row.payroc_refund_id is not None and row.first_sent_at is None
                began = longest if taken_over else min(row.approved_at, row.created_at)
                oldest[row.processing_terminal_id] = min(began, oldest.get(row.processing_terminal_id, began))
        return oldest

    async def known(
        self, keys: Sequence[str], payroc_refund_ids: Sequence[str], order_ids: Sequence[str] = ()
    ) -> list[Refund]:
        return [
            _refund(row)
            for row in self.rows.values()
            if row.key in keys or row.payroc_refund_id in payroc_refund_ids or row.order_id in order_ids
        ]

    async def sent_between(self, start: datetime, end: datetime, *, after: int, limit: int) -> list[Refund]:
        return [
            _refund(row)
            for row in self.rows.values()
            if row.first_sent_at is not None and start <= row.first_sent_at < end and row.id > after
        ][:limit]

    async def replaced(self, refund_id: int) -> list[Refund]:
        return [_refund(row) for row in self._chain(self._row(refund_id))]

    def _history(self, refund_id: int, before: int) -> History:
        earlier = [item for item in self.attempts[refund_id] if item.attempt < before]
        if not earlier:
            return _NOTHING_BEFORE
        refused = [
            item.finished_at
            for item in earlier
            if item.http_status == 401 or item.problem_type == "not-authorized"
        ]
        return History(
            unresolved=any(
                item.posting_at is not None and item.outcome in (None, Outcome.UNKNOWN) for item in earlier
            ),
            processed=any(
                item.outcome in (Outcome.ACCEPTED, Outcome.REJECTED, Outcome.REVIEW) for item in earlier
            ),
            key_in_use=any(item.problem_type == "idempotency-key-in-use" for item in earlier),
            unauthorized_at=max((instant for instant in refused if instant is not None), default=None),
            posted=any(item.posting_at is not None for item in earlier),
        )

    def _finish_attempt(self, refund_id: int, attempt: int, verdict: Verdict, now: datetime) -> None:
        unproven = verdict.outcome is Outcome.CONFIGURATION and not verdict.not_processed
        for item in self.attempts[refund_id]:
            if item.attempt == attempt:
                item.finished_at, item.http_status, item.problem_type = (
                    now,
                    verdict.http_status,
                    verdict.problem_type,
                )
                item.outcome = Outcome.UNKNOWN if unproven else verdict.outcome

    def _is_foreign(self, refund_id: int, verdict: Verdict) -> bool:
        return verdict.sighting is not None and any(
            row.payroc_refund_id == verdict.sighting.payroc_refund_id and row.id != refund_id
            for row in self.rows.values()
        )

    def _is_told(self, refund_id: int, verdict: Verdict) -> bool:
        return verdict.sighting is not None and any(
            event.refund_id == refund_id
            and event.detail.get("payroc_refund_id") == verdict.sighting.payroc_refund_id
            for event in self.events
            if event.event == "contradiction"
        )

    def _row(self, refund_id: int) -> Row:
        if refund_id not in self.rows:
            raise NoSuchRefund(f"The ledger holds no refund {refund_id}.")
        return self.rows[refund_id]

    # -- decisions -------------------------------------------------------------------------------------------------

    async def case(self, refund_id: int) -> Case:
        row = self._row(refund_id)
        attempts = self.attempts[refund_id]
        times = (at for item in attempts for at in (item.started_at, item.posting_at, item.finished_at))
        instants = [row.lease_until, *times]
        unproven = any(
            (item.posting_at is not None or item.outcome is not None)
            and item.outcome not in (Outcome.REJECTED, Outcome.CONFIGURATION, Outcome.NOT_SENT)
            for item in attempts
        )
        mine = [event for event in self.events if event.refund_id == refund_id]
        contradicted = any(event.event == "contradiction" for event in mine)
        proposal = mine[-1] if mine and mine[-1].event == "proposal" else None
        return Case(
            refund=_refund(row),
            may_have_moved=unproven or contradicted or row.payroc_refund_id is not None,
            last_attempt_at=max((at for at in instants if at is not None), default=None),
            chain_unpaid=row.status in REPLACEABLE and self._replaced_stands(row),
            proposal=Proposal(proposal.detail, proposal.actor, proposal.at) if proposal else None,
            reissue=next((other.id for other in self.rows.values() if other.replaces == refund_id), None),
            first_source_ref=self._first_of_chain(row).source_ref,
            now=self.clock(),
        )

    async def unhold(self, refund_id: int, reason: str) -> None:
        row = self._row(refund_id)
        check_hold(_refund(row), row.requested_by, self.actor)
        released = {"released_holds": row.released_holds + row.holds, "holds": ()}
        self._write(
            row,
            self.clock(),
            status=Status.APPROVED,
            reason=f"Unheld by {self.actor}: {reason}",
            **released,
        )

    async def cancel(self, refund_id: int, reason: str) -> None:
        row, now = self._row(refund_id), self.clock()
        for status in way_to_cancelled(_refund(row)):
            self._write(row, now, status=status, reason=f"Cancelled by {self.actor}: {reason}")
        if row.replaces is not None:
            self._write(self.rows[row.replaces], now)

    async def empty_requests(self, kept_for: timedelta, limit: int) -> int:
        before = self.clock() - kept_for
        ended = [
            row
            for row in self.rows.values()
            if row.request is not None and row.status in _FINAL and row.updated_at <= before
        ]
        ended.sort(key=lambda row: row.id)
        for row in ended[:limit]:
            row.request = row.as_refund = None
        return len(ended[:limit])

    async def requests_to_rotate(self, key_id: str, *, after: int, limit: int) -> list[KeptRequest]:
        return [
            KeptRequest(row.id, row.request, row.request_key, row.request_sha256)
            for _, row in sorted(self.rows.items())
            if row.request is not None and row.request_key != key_id and row.id > after
        ][:limit]

    async def store_rotated(self, rows: Sequence[tuple[KeptRequest, Sealed]]) -> int:
        stored = [(self.rows[kept.id], sealed) for kept, sealed in rows if self._holds(kept)]
        for row, sealed in stored:
            row.request, row.request_key, row.as_refund = sealed.token, sealed.key_id, None
        return len(stored)

    def _holds(self, kept: KeptRequest) -> bool:
        return self.rows[kept.id].request == kept.request

    async def note_rotation(self, key_id: str, requests: int) -> None:
        pass

    async def intend_reverse(self, refund_id: int, reason: str) -> Refund:
        refund = _refund(self._row(refund_id))
        if refund.status is not Status.ACCEPTED:
            raise DecisionRefused(f"Refund {refund_id} is {refund.status}.")
        return refund

    async def resolve(self, read: Case, resolution: Resolution, reason: str) -> bool:
        case = await self._unchanged(read)
        row = self.rows[case.refund.id]
        check_case(case, Status.REJECTED if resolution.status is Status.REJECTED else Status.ACCEPTED)
        found = resolution.sighting
        if found is not None and any(
            other.payroc_refund_id == found.payroc_refund_id and other.id != row.id
            for other in self.rows.values()
        ):
            raise DecisionRefused(
                f"Payroc's refund {found.payroc_refund_id} stands at another refund of the ledger."
            )
        confirmed = is_confirmed(case, resolution.decision, self.actor)
        if case.may_have_moved and not confirmed:
            self.events.append(Event(row.id, "proposal", self.actor, case.now, resolution.decision))
            return False
        who = f"{case.proposal.by} and {self.actor}" if confirmed and case.proposal else self.actor
        values: dict[str, Any] = {
            "status": resolution.status,
            "reason": " ".join(part for part in (f"Resolved by {who}: {reason}", resolution.note) if part),
            "lease_until": None,
            "next_attempt_at": None,
        }
        if found is not None:
            values |= {
                "payroc_refund_id": row.payroc_refund_id or found.payroc_refund_id,
                "payroc_status": found.payroc_status,
                "payroc_seen_at": case.now,
            }
        self._write(row, case.now, **values)
        return True

    async def reissue(self, read: Case, new: Reissue, reason: str) -> int | None:
        case = await self._unchanged(read)
        replaced = self.rows[case.refund.id]
        check_replaceable(case)
        confirmed = is_confirmed(case, new.decision, self.actor)
        if not confirmed or case.proposal is None:
            self.events.append(Event(replaced.id, "proposal", self.actor, case.now, new.decision))
            return None
        row = copy.copy(replaced)
        row.id, self.next_id = self.next_id, self.next_id + 1
        if await self.spelled([fold(new.source_ref)]):
            raise DecisionRefused(
                f"The ledger holds a refund {new.source_ref!r} that the source made itself."
            )
        row.source_ref, row.order_id, row.idempotency_key = (
            new.source_ref,
            new.order_id,
            UUID(new.idempotency_key),
        )
        row.key, row.source_ref_folded = new.idempotency_key, fold(new.source_ref)
        row.request, row.request_key, row.request_sha256 = (
            new.request.token,
            new.request.key_id,
            new.request_sha256,
        )
        row.holds = row.released_holds = ()
        row.requested_by, row.approved_by, row.approved_at = case.proposal.by, self.actor, case.now
        row.requested_by_folded, row.approved_by_folded = person(row.requested_by), person(row.approved_by)
        row.replaces, row.reason = replaced.id, f"Reissue of refund {replaced.id}: {reason}"
        row.created_at, row.updated_at = case.now, max(case.now, replaced.updated_at + _MICROSECOND)
        row.status, row.attempts = Status.APPROVED, 0
        for name in _UNSENT:
            setattr(row, name, None)
        self.rows[row.id] = self.by_ref[row.source_ref] = row
        self.attempts[row.id] = []
        return row.id

    async def _unchanged(self, read: Case) -> Case:
        case = await self.case(read.refund.id)
        if case.refund != read.refund:
            raise DecisionRefused(f"Refund {read.refund.id} has changed while Payroc was asked.")
        return case

    def _first_of_chain(self, row: Row) -> Row:
        return (self._chain(row) or [row])[-1]

    # -- write-backs -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def write_back_turn(self) -> AsyncIterator[str]:
        """Yield a turn that nobody else has; it waits for nobody, unlike that of the ledger as a worker sees it."""
        if not await self.take_turn("write-back"):
            raise LedgerUnavailable("Another write-back has the turn.")
        yield "write-back"
        await self.end_turn("write-back")

    async def take_turn(self, holder: str) -> bool:
        now = self.clock()
        if self.turn is not None and self.turn[1] > now:
            return False
        self.turn = holder, now + TURN
        return True

    async def end_turn(self, holder: str) -> None:
        if self._has_turn(holder):
            self.turn = None

    def _has_turn(self, holder: str) -> bool:
        return self.turn is not None and self.turn[0] == holder

    async def due_write_backs(
        self, limit: int, after: WriteBack | None = None, *, failed_before: bool = False
    ) -> list[WriteBack]:
        replaced = {row.replaces for row in self.rows.values() if row.status is not Status.CANCELLED}
        due = []
        for row in self.rows.values():
            ref = self._first_of_chain(row).source_ref
            cancelled_reissue = row.replaces is not None and row.status is Status.CANCELLED
            if (
                row.written_back_at != row.updated_at
                and (after is None or (after.refund_id is not None and row.id > after.refund_id))
                and row.id not in replaced
                and not cancelled_reissue
            ):
                due.append(
                    WriteBack(
                        ref,
                        row.status.value,
                        row.payroc_refund_id,
                        row.payroc_status,
                        row.reason,
                        row.updated_at,
                        row.id,
                    )
                )
        for ref, bad in self.invalid.items():
            if (
                bad.written_back_at != bad.updated_at
                and (after is None or after.refund_id is not None or ref > after.source_ref)
                and not ref.startswith(NAMELESS)
                and ref not in self.by_ref
            ):
                errors = sentences(dict(sorted(bad.errors.items())))
                due.append(WriteBack(ref, "invalid", None, None, errors, bad.updated_at))
        due = [item for item in due if self.notes.get(item.source_ref, _NO_NOTE).failed is failed_before]
        due.sort(key=lambda item: (item.refund_id is None, item.refund_id or 0, item.source_ref))
        return due[:limit]

    async def mark_written_back(
        self,
        holder: str,
        written: Sequence[WriteBack],
        not_written: Sequence[NotWritten] = (),
    ) -> None:
        has_turn = self._has_turn(holder)
        if has_turn:
            self.turn = holder, self.clock() + TURN
        for item in written:
            if not has_turn:
                self._make_due(item.source_ref)
            else:
                row = (
                    self.invalid.get(item.source_ref)
                    if item.refund_id is None
                    else self.rows.get(item.refund_id)
                )
                if row is not None and row.updated_at == item.updated_at:
                    row.written_back_at = row.updated_at
            if item.source_ref in self.notes:
                self.notes[item.source_ref].failed = False
        for problem in not_written:
            self.notes.setdefault(problem.source_ref, Note()).failed = True
        if not has_turn:
            raise LedgerUnavailable("Another write-back took the turn.")

    def _make_due(self, source_ref: str) -> None:
        for row in self.rows.values():
            if self._first_of_chain(row).source_ref == source_ref:
                row.written_back_at = None
        if source_ref in self.invalid:
            self.invalid[source_ref].written_back_at = None

    async def write_again(self, offered: Collection[str]) -> tuple[int, int]:
        now, due, ended = self.clock(), 0, 0
        written = [
            row
            for row in self.rows.values()
            if row.status in _ENDED and row.written_back_at == row.updated_at
        ]
        for row in written:
            ref = self._first_of_chain(row).source_ref
            if ref not in offered or not self._is_shown(row):
                continue
            ended += 1
            note = self.notes.setdefault(ref, Note())
            if note.offered_again_at is None or now - note.offered_again_at >= timedelta(days=7):
                note.offered_again_at, row.written_back_at = now, None
                due += 1
        return due, ended - due

    def _is_shown(self, row: Row) -> bool:
        """Return whether the source's row shows this refund: the newest of its chain that was not cancelled."""
        return (row.replaces is None or row.status is not Status.CANCELLED) and not any(
            other.replaces == row.id and other.status is not Status.CANCELLED for other in self.rows.values()
        )

    # -- the constraints of the database -----------------------------------------------------------------------------

    def _write(self, row: Row, now: datetime, **values: Any) -> None:
        """Change a row as the trigger of the database lets it be changed."""
        old_status, new_status = row.status, values.get("status", row.status)
        for name in _FIXED:
            if name in values:
                raise _refused(f"what identifies the payment never changes ({name})")
        if new_status is not old_status and (old_status, new_status) not in EDGES:
            raise _refused(f"refund {row.id} can't go from {old_status} to {new_status}")
        moves = new_status is not old_status
        claims = new_status is Status.SENDING and values.get("attempts") == row.attempts + 1
        if values.get("attempts", row.attempts) != row.attempts and not claims:
            raise _refused("attempts count up by one, with a claim")
        for name in ("reason", "holds"):
            if values.get(name, getattr(row, name)) != getattr(row, name) and not (moves or claims):
                raise _refused(f"{name} changes with the status alone")
        releases = (old_status, new_status) == (Status.APPROVED, Status.RELEASED)
        if not releases and {"released_by", "released_run", "released_at"} & set(values):
            raise _refused("who released it changes with a release alone")
        if (
            row.payroc_refund_id is not None
            and values.get("payroc_refund_id", row.payroc_refund_id) != row.payroc_refund_id
        ):
            raise _refused("Payroc's refund id never changes")
        if (
            values.get("payroc_refund_id") is not None
            and row.payroc_refund_id is None
            and not (moves or old_status in (Status.REVIEW, Status.REJECTED))
        ):
            raise _refused("Payroc's refund id comes with a status")
        if row.first_sent_at is not None and "first_sent_at" in values:
            pair = (values["first_sent_at"], values.get("sent_with", row.sent_with))
            taken_back = (
                old_status is Status.SENDING and new_status is Status.RELEASED and pair == (None, None)
            )
            if pair != (row.first_sent_at, row.sent_with) and not taken_back:
                raise _refused("first_sent_at and sent_with never change")
        if new_status is not old_status or "attempts" in values:
            self.events.append(Event(row.id, "status", self.actor, now, {}))
        if new_status is Status.RELEASED and row.first_released_at is None:
            row.first_released_at, row.first_released_run = values["released_at"], values["released_run"]
        previous = row.updated_at
        row.as_refund = None
        for name, value in values.items():
            setattr(row, name, value)
        if new_status is not old_status or now != previous:
            row.updated_at = max(now, previous + _MICROSECOND)
        if new_status in PAID and row.first_released_at is None:
            row.first_released_at = row.updated_at
        if new_status in IN_DOUBT and None in (row.lease_until, row.fence_until, row.next_attempt_at):
            raise _refused("claimed says until when")
        if new_status is Status.UNKNOWN and None in (row.first_sent_at, row.sent_with):
            raise _refused("sent says when and with what")
        if new_status is Status.HELD and not row.holds:
            raise _refused("held says for what")
        if new_status in PAID and row.payroc_refund_id is None:
            raise _refused("paid has Payroc's refund id")
        if (
            values.get("payroc_refund_id")
            and sum(other.payroc_refund_id == row.payroc_refund_id for other in self.rows.values()) > 1
        ):
            raise _refused("Payroc's refund id is unique")


_UNSENT = (
    "sent_with",
    "released_by",
    "released_run",
    "released_at",
    "first_released_at",
    "first_released_run",
    "first_released_approver",
    "run_rejected_by",
    "first_sent_at",
    "lease_until",
    "fence_until",
    "next_attempt_at",
    "payroc_refund_id",
    "payroc_status",
    "payroc_seen_at",
    "written_back_at",
    "as_refund",
)
_FINAL = frozenset({Status.SETTLED, Status.RETURNED, Status.REVERSED, Status.REJECTED, Status.CANCELLED})
_NOTHING_BEFORE = History()
_refund_columns = attrgetter(*(field.name for field in fields(Refund)))


def _refund(row: Row) -> Refund:
    if row.as_refund is None:
        row.as_refund = Refund(*_refund_columns(row))
    return row.as_refund


def _may_have_paid(item: Foreign, row: Row) -> bool:
    return (
        item.plain
        and item.terminal == row.processing_terminal_id
        and (
            item.order_id == row.order_id
            or (
                item.payroc_status != "declined"
                and item.last4 is not None
                and (item.amount, item.currency, item.last4) == (row.amount, row.currency, row.payee_last4)
            )
        )
    )


def _copied(items: dict[Any, Any]) -> dict[Any, Any]:
    return {key: copy.copy(item) for key, item in items.items()}


def _as_mapping(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Row.__slots__}


def _at_the_gate(row: Row) -> AtTheGate:
    return AtTheGate(
        row.id,
        row.order_id,
        row.amount,
        row.currency,
        row.payee_fingerprint,
        row.status,
        row.released_holds,
        row.first_released_at,
    )


def _oldest_first(row: Row) -> tuple[datetime, int]:
    return row.approved_at, row.id


def _lapsed(row: Row, now: datetime) -> bool:
    return row.lease_until is not None and row.lease_until <= now


def _waited(row: Row, now: datetime) -> bool:
    return _lapsed(row, now) and row.next_attempt_at is not None and row.next_attempt_at <= now


def _refused(what: str) -> Violation:
    # In production an error; here a failure, because the protocol never asks for what the database has to refuse.
    return Violation(f"The protocol asked for what the ledger refuses: {what}.")
