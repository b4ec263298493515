"""
What several steps need of the ledger's parts.

Each step declares the methods that it calls, in its own module or here:
:class:`~include.refunds.ledger.Ledger` has them, and so has the ledger in memory with which the steps are
simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from include.refunds.case import Case
from include.refunds.classify import Verdict
from include.refunds.refund import History, Refund

if TYPE_CHECKING:
    from include.refunds.ledger import Candidate, Selection, TerminalList


class Clock(Protocol):
    """The ledger's clock."""

    async def now(self) -> datetime:
        """Return the ledger's time."""


class ChecksEnvironment(Protocol):
    """What the ledger is bound to."""

    async def check_environment(self, environment: str, *, bind: bool = False) -> bool:
        """See :meth:`~include.refunds.ledger.bindings.Bindings.check_environment`."""


class Stored(Protocol):
    """The source rows that were pulled."""

    async def stored(self, source_refs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """See :meth:`~include.refunds.ledger.intake.Intake.stored`."""


class Candidates(Protocol):
    """The refunds that a run may release."""

    async def candidates(
        self, selection: Selection, *, standing: Sequence[str] | None = None, ids: Sequence[int] | None = None
    ) -> list[Candidate]:
        """See :meth:`~include.refunds.ledger.runs.Runs.candidates`."""


class Recorder(Protocol):
    """What is found of a refund, recorded."""

    async def record(
        self, refund_id: int, verdict: Verdict, attempt: int | None = None, *, restored: bool = False
    ) -> tuple[Refund, datetime]:
        """See :meth:`~include.refunds.ledger.records.Records.record`."""


class TerminalLists(Protocol):
    """How far the lists of the terminals are known."""

    async def terminal_lists(self) -> list[TerminalList]:
        """See :meth:`~include.refunds.ledger.lists.Lists.terminal_lists`."""


class ReadsRefund(Protocol):
    """One refund and its history."""

    async def read(self, refund_id: int) -> tuple[Refund, History, datetime]:
        """See :meth:`~include.refunds.ledger.refunds.Refunds.read`."""


class Replaced(Protocol):
    """The refunds that one replaces."""

    async def replaced(self, refund_id: int) -> list[Refund]:
        """See :meth:`~include.refunds.ledger.refunds.Refunds.replaced`."""


class PauseReasons(Protocol):
    """Why sending is paused."""

    async def reasons(self) -> dict[str, str]:
        """See :meth:`~include.refunds.ledger.pauses.Pauses.reasons`."""


class Cases(Protocol):
    """What a decision about a refund rests on."""

    async def case(self, refund_id: int) -> Case:
        """See :meth:`~include.refunds.ledger.decisions.Decisions.case`."""
