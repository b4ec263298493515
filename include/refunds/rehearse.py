"""A dry run: everything up to the release, in a transaction that is rolled back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, Protocol

from include.refunds.approval import Question
from include.refunds.cipher import Cipher
from include.refunds.ledger import Candidate
from include.refunds.ledger_parts import Candidates, PauseReasons
from include.refunds.limits import GateDecision
from include.refunds.params import RunParams
from include.refunds.printable import printable
from include.refunds.pull import PullLedger, pull
from include.refunds.report import Line, Report, totals_of, warning_notes
from include.refunds.settings import Settings
from include.refunds.source import ReadableSource, SourceRow
from include.refunds.unmatched import unmatched


class _Read:
    """A source that was read already."""

    def __init__(self, rows: Sequence[SourceRow]) -> None:
        self._rows = rows

    async def select_approved(self) -> Sequence[SourceRow]:
        return self._rows


# A name that no run of Airflow has; its row is rolled back.
_RUN = "dry run"


class _Runs(Candidates, Protocol):
    async def begin_run(
        self,
        run_id: str,
        params: dict[str, Any],
        candidates: Sequence[Candidate],
        findings: dict[str, Any],
        at: datetime,
    ) -> None: ...


class _Approvals(Protocol):
    async def ask_approval(self, run_id: str) -> Question | None: ...


class _Gate(Protocol):
    async def at_the_gate(self, ids: Sequence[int]) -> GateDecision: ...


class Rehearsal(PullLedger, Protocol):
    """What a dry run needs of the ledger whose changes are rolled back."""

    @property
    def approvals(self) -> _Approvals: ...

    @property
    def gate(self) -> _Gate: ...

    @property
    def pauses(self) -> PauseReasons: ...

    @property
    def runs(self) -> _Runs: ...


class RehearsalLedger(Protocol):
    """What a dry run needs of the ledger."""

    def rehearsal(self) -> AbstractAsyncContextManager[Rehearsal]:
        """See :meth:`~include.refunds.ledger.Ledger.rehearsal`."""


async def rehearse(
    params: RunParams, source: ReadableSource, ledger: RehearsalLedger, cipher: Cipher, settings: Settings
) -> Report:
    """
    Report what a run with these params would send. Nothing is stored, asked of a person, sent or written
    back.

    :raises SourceError: when the source can't be read.
    """
    # Before the transaction, which must not stay open while the source takes its time.
    read = _Read(await source.select_approved())
    async with ledger.rehearsal() as rehearsal:
        pulled = await pull(read, rehearsal, cipher, settings)
        candidates = await rehearsal.runs.candidates(params.selection(), standing=pulled.standing)
        await rehearsal.runs.begin_run(_RUN, params.model_dump(mode="json"), candidates, {}, pulled.at)
        missing = await unmatched(params, pulled, candidates, rehearsal.intake)
        question = await rehearsal.approvals.ask_approval(_RUN)
        decision = await rehearsal.gate.at_the_gate([item.id for item in candidates])
        pauses = await rehearsal.pauses.reasons()
    report = Report("Dry run: this is what would be sent. Nothing was stored, sent or written back.")
    report.refunds = [_line(item, decision) for item in candidates]
    report.totals = totals_of(report.refunds)
    report.invalid = pulled.invalid
    report.notes = [question.why] if question else []
    report.notes += missing
    report.notes += [
        f"Source row {printable(source_ref)} changed after it was pulled ({printable(', '.join(names))}); "
        "give it a new source_ref."
        for source_ref, names in pulled.changed.items()
    ]
    report.notes += warning_notes(pulled.warnings)
    report.notes += [
        f"Sending is paused for {'everything' if scope == '*' else printable(scope)}: {printable(why)}"
        for scope, why in pauses.items()
    ]
    return report


def _line(item: Candidate, decision: GateDecision) -> Line:
    would, why = "would send", None
    if item.id in decision.held:
        would, why = "would hold", decision.held[item.id].reason
    elif item.id in decision.waiting:
        would, why = "would wait", f"The limit {decision.waiting[item.id]} leaves no room."
    return Line(
        item.id, item.order_id, item.amount, item.currency, item.payee_last4, would, None, item.attempts, why
    )
