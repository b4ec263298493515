"""The frame of the ledger: a connection, a transaction, an instant that counts as now, and who acts."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Self

from include.refunds.database_errors import describe
from include.refunds.ledger.connection import DATABASE_ERRORS, Connection, LedgerEngine
from include.refunds.revision import (
    ENCODING,
    FSYNC_IS_OFF,
    REVISION,
    VERSION_TABLE,
    other_encoding,
    other_revision,
)
from include.refunds.settings import Settings

# SQLSTATE of a missing table, function and schema.
_NO_SUCH_TABLE = ("42P01", "42883", "3F000")

CLOCK = "SELECT pg_catalog.clock_timestamp()"
"""The body of ``refund_ledger.now()``, as ``schema.sql`` has it."""


class LedgerError(Exception):
    """The ledger can't be used; the message says what is wrong and what to run."""


class LedgerUnavailable(LedgerError):
    """The ledger's database does not answer; it may a little later."""


class NoSuchRefund(LedgerError):
    """The ledger holds no refund with this id."""


class LedgerBase:
    """What all parts of :class:`~include.refunds.ledger.Ledger` stand on; its parameters are described there."""

    lock_seconds = 60
    """How long a transaction waits for another one's lock, unless it says otherwise."""

    def __init__(
        self,
        engine: LedgerEngine,
        settings: Settings,
        *,
        actor: str,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self._settings = settings
        self._actor = actor
        self._monotonic = monotonic
        self._rehearsal: Connection | None = None

    @asynccontextmanager
    async def _transaction(
        self, purpose: str = "", *, lock_seconds: int | None = None
    ) -> AsyncIterator[tuple[Connection, datetime]]:
        """
        Yield a connection in a transaction, and the ledger's time at its start.

        :param purpose: see :meth:`LedgerEngine.connect`.
        :param lock_seconds: how long it waits for another transaction's lock; by default :attr:`lock_seconds`.
        """
        try:
            if self._rehearsal is not None:
                async with self._rehearsal.transaction():
                    yield self._rehearsal, await self._begin(self._rehearsal, lock_seconds)
            else:
                async with self.engine.begin(purpose=purpose) as connection:
                    yield connection, await self._begin(connection, lock_seconds)
        except DATABASE_ERRORS as error:
            raise self._explained(error) from None

    @asynccontextmanager
    async def _statement(self, purpose: str = "") -> AsyncIterator[Connection]:
        """
        Yield a connection for what only reads and is no snapshot: it needs no transaction, and none of its round trips.

        :param purpose: see :meth:`LedgerEngine.connect`.
        """
        try:
            if self._rehearsal is not None:
                yield self._rehearsal
            else:
                async with self.engine.connect(purpose) as connection:
                    yield connection
        except DATABASE_ERRORS as error:
            raise self._explained(error) from None

    async def _begin(self, connection: Connection, lock_seconds: int | None) -> datetime:
        # Local to the transaction: the connection is used for others after it. A worker that stands still in the
        # middle of one must not keep its rows locked until it wakes up. A commit that is not on the disk may be
        # lost after it was acknowledged, and with it a claim whose POST has left.
        statement = """
            SELECT set_config('refund_ledger.actor', :actor, true), set_config('lock_timeout', :lock_timeout, true),
                   set_config('statement_timeout', '300s', true),
                   set_config('idle_in_transaction_session_timeout', '300s', true),
                   CASE WHEN current_setting('synchronous_commit') IN ('off', 'local')
                        THEN set_config('synchronous_commit', 'on', true) END,
                   refund_ledger.now() AS now"""
        values = {"actor": self._actor, "lock_timeout": f"{lock_seconds or self.lock_seconds}s"}
        now: datetime = (await connection.execute(statement, values)).one().now
        return now

    def _explained(self, error: Exception) -> LedgerError:
        """Return the ledger's own error for one of :data:`DATABASE_ERRORS`."""
        if getattr(error, "sqlstate", None) in _NO_SUCH_TABLE:
            return LedgerError(other_revision(None))
        failure = describe(error)
        place = f"The ledger database at {self.engine.place}"
        if failure.kind.is_transient:
            return LedgerUnavailable(
                f"{place} can't be used: {failure}; {failure.remedy}. Its connection is refunds_ledger."
            )
        return LedgerError(f"{place} refused a statement: {failure}; its log has the error.")

    @asynccontextmanager
    async def rehearsal(self) -> AsyncIterator[Self]:
        """Yield a ledger whose every change is rolled back at the end."""
        async with self.engine.connect() as connection:
            ledger = type(self)(self.engine, self._settings, actor=self._actor, monotonic=self._monotonic)
            ledger._rehearsal = connection
            async with connection.rolled_back():
                yield ledger

    async def now(self) -> datetime:
        """Return the ledger's time."""
        async with self._transaction() as (_, now):
            return now

    async def check(self) -> None:
        """
        Make sure that the ledger can be reached and has this version's schema.

        :raises LedgerUnavailable: when it can't be reached.
        :raises LedgerError: when it was never migrated, is at another revision, is not in UTF8, or its server does not write to
            the disk.
        """
        query = (
            "SELECT version_num, current_setting('server_encoding') AS encoding, "
            "current_setting('fsync') AS fsync, "
            "(SELECT prosrc FROM pg_catalog.pg_proc WHERE oid = to_regprocedure('refund_ledger.now()')) AS clock "
            f"FROM refund_ledger.{VERSION_TABLE}"
        )
        async with self._statement() as connection:
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
