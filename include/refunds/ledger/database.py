"""What each part of the ledger is given: transactions, the time that counts in them, and who acts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime

from include.refunds.database_errors import describe
from include.refunds.ledger.connection import DATABASE_ERRORS, Connection, LedgerEngine, Rows
from include.refunds.revision import other_revision
from include.refunds.settings import Settings

# SQLSTATE of a missing table, function and schema.
_NO_SUCH_TABLE = ("42P01", "42883", "3F000")


class LedgerError(Exception):
    """The ledger can't be used; the message says what is wrong and what to run."""


class LedgerUnavailable(LedgerError):
    """The ledger's database does not answer; it may a little later."""


class NoSuchRefund(LedgerError):
    """The ledger holds no refund with this id."""


class LedgerDatabase:
    """
    The ledger's database, for one actor.

    :param engine: its connections.
    :param settings: see :class:`~include.refunds.ledger.Ledger`, as of the next two.
    :param rehearsal: a connection on which everything happens that is rolled back at the end.
    """

    lock_seconds = 60
    """How long a transaction waits for another one's lock, unless it says otherwise."""

    def __init__(
        self,
        engine: LedgerEngine,
        settings: Settings,
        *,
        actor: str,
        monotonic: Callable[[], float],
        rehearsal: Connection | None = None,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.actor = actor
        self.monotonic = monotonic
        self._rehearsal = rehearsal

    @asynccontextmanager
    async def transaction(
        self, purpose: str = "", *, lock_seconds: int | None = None
    ) -> AsyncIterator[tuple[Connection, datetime]]:
        """
        Yield a connection in a transaction, and the ledger's time at its start.

        :param purpose: see :meth:`LedgerEngine.connect`.
        :param lock_seconds: how long it waits for another transaction's lock; by default
            :attr:`lock_seconds`.
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
    async def statement(self, purpose: str = "") -> AsyncIterator[Connection]:
        """
        Yield a connection for what only reads and is no snapshot: it needs no transaction, and none of its
        round trips.

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
        # Local to the transaction: the connection is used for others after it. A worker that stands still in
        # the middle of one must not keep its rows locked until it wakes up. A commit that is not on the disk
        # may be lost after it was acknowledged, and with it a claim whose POST has left.
        statement = """
            SELECT set_config('refund_ledger.actor', :actor, true), set_config('lock_timeout', :lock_timeout, true),
                   set_config('statement_timeout', '300s', true),
                   set_config('idle_in_transaction_session_timeout', '300s', true),
                   CASE WHEN current_setting('synchronous_commit') IN ('off', 'local')
                        THEN set_config('synchronous_commit', 'on', true) END,
                   refund_ledger.now() AS now"""
        values = {"actor": self.actor, "lock_timeout": f"{lock_seconds or self.lock_seconds}s"}
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
    async def rehearsal(self) -> AsyncIterator[LedgerDatabase]:
        """Yield the same database on one connection, on which every change is rolled back at the end."""
        async with self.engine.connect() as connection, connection.rolled_back():
            yield LedgerDatabase(
                self.engine,
                self.settings,
                actor=self.actor,
                monotonic=self.monotonic,
                rehearsal=connection,
            )


class Part:
    """
    A part of :class:`~include.refunds.ledger.Ledger`: some tables, and all statements that are
    about them.
    """

    def __init__(self, database: LedgerDatabase) -> None:
        self._database = database

    async def _execute(self, statement: str, **values: object) -> Rows:
        """
        Execute one statement in a transaction of its own, and return its rows.

        :param values: its values, besides ``source`` and ``now``, which every statement may name.
        """
        async with self._database.transaction() as (connection, now):
            values = {"source": self._database.settings.source, "now": now, **values}
            return await connection.execute(statement, values)
