"""
The ledger in Postgres, in parts. Each method is one transaction; together they are the only code that writes
to it.

The database's clock is the clock: every transaction reads it once, by ``refund_ledger.now()``, and uses that
time throughout.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from copy import copy
from datetime import datetime

from include.refunds.ledger.approvals import Approvals
from include.refunds.ledger.bindings import Bindings
from include.refunds.ledger.claims import Claim, Claims, Task
from include.refunds.ledger.conditions import KNOWN_FOR, RELEASE_VALID
from include.refunds.ledger.connection import LedgerEngine
from include.refunds.ledger.database import LedgerDatabase, LedgerError, LedgerUnavailable, NoSuchRefund
from include.refunds.ledger.decisions import Decisions
from include.refunds.ledger.foreign import Foreign
from include.refunds.ledger.gate import Gate
from include.refunds.ledger.intake import NAMELESS, Intake, NewRefund, differences
from include.refunds.ledger.limits import RefundLimits
from include.refunds.ledger.lists import Lists, TerminalList
from include.refunds.ledger.pauses import Pauses
from include.refunds.ledger.records import OnRecord, Records
from include.refunds.ledger.refunds import Refunds
from include.refunds.ledger.requests import KeptRequest, Requests
from include.refunds.ledger.runs import Candidate, Runs, Selection
from include.refunds.ledger.seals import Seals
from include.refunds.ledger.write_backs import NotWritten, WriteBack, WriteBacks
from include.refunds.revision import (
    ENCODING,
    FSYNC_IS_OFF,
    REVISION,
    VERSION_TABLE,
    other_encoding,
    other_revision,
)
from include.refunds.settings import Settings

__all__ = [
    "CLOCK",
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


CLOCK = "SELECT pg_catalog.clock_timestamp()"
"""The body of ``refund_ledger.now()``, as ``schema.sql`` has it."""


class Ledger:
    """
    The refund ledger, in parts.

    :param engine: its database, see :class:`LedgerEngine`.
    :param settings: source, waits, key window.
    :param actor: who changes something, as the events name it.
    :param monotonic: the worker's clock that never goes back, in seconds.
    :param on_record: called with a refund before and after each record that was committed.
    """

    def __init__(
        self,
        engine: LedgerEngine,
        settings: Settings,
        *,
        actor: str,
        monotonic: Callable[[], float] = time.monotonic,
        on_record: OnRecord | None = None,
    ) -> None:
        database = LedgerDatabase(engine, settings, actor=actor, monotonic=monotonic)
        self.engine = engine
        self._consist_of(database, on_record)

    def _consist_of(self, database: LedgerDatabase, on_record: OnRecord | None = None) -> None:
        self._database = database
        self.bindings = Bindings(database)
        self.intake = Intake(database)
        self.runs = Runs(database)
        self.approvals = Approvals(database)
        self.gate = Gate(database)
        self.limits = RefundLimits(database)
        self.refunds = Refunds(database)
        self.claims = Claims(database)
        self.records = Records(database, on_record)
        self.lists = Lists(database)
        self.decisions = Decisions(database)
        self.requests = Requests(database)
        self.write_backs = WriteBacks(database)
        self.pauses = Pauses(database)
        self.seals = Seals(database)

    @asynccontextmanager
    async def rehearsal(self) -> AsyncIterator[Ledger]:
        """Yield a ledger whose every change is rolled back at the end."""
        async with self._database.rehearsal() as database:
            ledger = copy(self)
            ledger._consist_of(database)
            yield ledger

    async def now(self) -> datetime:
        """Return the ledger's time."""
        async with self._database.transaction() as (_, now):
            return now

    async def check(self) -> None:
        """
        Make sure that the ledger can be reached and has this version's schema.

        :raises LedgerUnavailable: when it can't be reached.
        :raises LedgerError: when it was never migrated, is at another revision, is not in UTF8, or its server
            does not write to the disk.
        """
        query = (
            "SELECT version_num, current_setting('server_encoding') AS encoding, "
            "current_setting('fsync') AS fsync, "
            "(SELECT prosrc FROM pg_catalog.pg_proc WHERE oid = to_regprocedure('refund_ledger.now()')) AS clock "
            f"FROM refund_ledger.{VERSION_TABLE}"
        )
        async with self._database.statement() as connection:
            found = (await connection.execute(query)).one_or_none()
        if found is None or found.version_num != REVISION:
            raise LedgerError(other_revision(found.version_num if found else None))
        if found.encoding != ENCODING:
            raise LedgerError(other_encoding(found.encoding))
        if found.fsync == "off":
            raise LedgerError(FSYNC_IS_OFF)
        if found.clock != CLOCK:
            raise LedgerError(
                "The ledger's clock, the function refund_ledger.now(), was replaced, so leases and limits follow "
                "another time than the database's: make it again as include/refunds/ledger/schema.sql does."
            )
