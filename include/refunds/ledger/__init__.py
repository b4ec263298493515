"""
The ledger in Postgres. Each method is one transaction; together they are the only code that writes to it.

The database's clock is the clock: every transaction reads it once, by ``refund_ledger.now()``, and uses that time
throughout.
"""

from functools import cached_property

from include.refunds.ledger.base import LedgerError, LedgerUnavailable, NoSuchRefund
from include.refunds.ledger.bindings import Bindings
from include.refunds.ledger.connection import LedgerEngine
from include.refunds.ledger.continuity import KNOWN_FOR, Foreign, TerminalList
from include.refunds.ledger.decisions import Decisions
from include.refunds.ledger.intake import NAMELESS, Intake, NewRefund, differences
from include.refunds.ledger.requests import KeptRequest, Requests
from include.refunds.ledger.runs import RELEASE_VALID, Candidate, Runs, Selection
from include.refunds.ledger.seals import Seals
from include.refunds.ledger.sending import Claim, Sending, Task
from include.refunds.ledger.write_backs import NotWritten, WriteBack, WriteBacks

__all__ = [
    "KNOWN_FOR",
    "NAMELESS",
    "RELEASE_VALID",
    "Candidate",
    "Claim",
    "Foreign",
    "KeptRequest",
    "Ledger",
    "LedgerEngine",
    "LedgerError",
    "LedgerUnavailable",
    "NewRefund",
    "NoSuchRefund",
    "NotWritten",
    "Selection",
    "Task",
    "TerminalList",
    "WriteBack",
    "differences",
]


class Ledger(Intake, Runs, Sending, Decisions, Requests, WriteBacks, Bindings):
    """
    The refund ledger.

    :param engine: the ledger's database, see :class:`LedgerEngine`.
    :param settings: source, waits, key window.
    :param actor: who changes something, as the events name it.
    :param monotonic: the worker's clock that never goes back, in seconds.
    """

    @cached_property
    def seals(self) -> Seals:
        """The seals of its events."""
        return Seals(self.engine, self._settings, actor=self._actor)
