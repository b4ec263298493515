"""The limits that hold at the gate, and the gate's lock."""

from __future__ import annotations

from dataclasses import replace

from include.refunds.database_errors import Kind, describe
from include.refunds.ledger.connection import DATABASE_ERRORS, Connection
from include.refunds.ledger.database import LedgerError, LedgerUnavailable, Part
from include.refunds.ledger.events import because
from include.refunds.limits import LIMITS, Limits


class RefundLimits(Part):
    """The row of ``refund_limits``, which changes under the lock of ``gate``."""

    async def current(self) -> Limits:
        """Return the limits."""
        async with self._database.transaction() as (connection, _):
            return await read_limits(connection)

    async def set_limit(self, name: str, value: int | None, reason: str) -> None:
        """
        Set a limit, or unset it with ``None``. It waits for a run that is at the gate.

        :param name: one of :data:`~include.refunds.limits.LIMITS`.
        :param value: minor units, a number of refunds, or days; at least 1, for thresholds of approval at
            least 0.
        :raises LedgerError: when there is no such limit, or the value can't be.
        :raises LedgerUnavailable: when another transaction holds the gate for more than a minute.
        """
        if name not in LIMITS:
            raise LedgerError(f"There is no limit {name!r}; there are {', '.join(LIMITS)}.")
        smallest = 0 if name.startswith("approval_") else 1
        largest = 366 if name.endswith("_days") else 10**15
        if value is not None and not smallest <= value <= largest:
            raise LedgerError(f"The limit {name} must lie between {smallest} and {largest}.")
        update = f"UPDATE refund_ledger.refund_limits SET {name} = :value"
        async with self._database.transaction() as (connection, _):
            await lock_gate(connection, self._database.lock_seconds)
            before = await read_limits(connection)
            after = replace(before, **{name: value})
            if after.payee_days is None and (after.payee_total, after.payee_count) != (None, None):
                raise LedgerError(
                    "A limit per payee needs its days: set payee_days first, and unset it last."
                )
            await because(connection, reason)
            await connection.execute(update, {"value": value})


async def lock_gate(connection: Connection, lock_seconds: int) -> None:
    """
    Let no other transaction release or change a limit until this one ends. It is the first lock of a
    transaction.

    A pause waits for nobody: each claim asks for it.

    :param lock_seconds: how long it waits.
    :raises LedgerUnavailable: when another transaction holds it for longer.
    """
    try:
        # In a savepoint, so that the transaction can still ask who holds it.
        async with connection.transaction():
            rows = await connection.execute("SELECT FROM refund_ledger.gate FOR UPDATE")
    except DATABASE_ERRORS as error:
        if describe(error).kind is not Kind.LOCKED:
            raise
        raise LedgerUnavailable(
            f"The gate was locked for more than {lock_seconds} s{await _holder(connection)}: "
            "end that session if it stands still, and try again."
        ) from None
    if len(rows) != 1:
        raise LedgerError(
            "The ledger's table gate has lost its row, so nothing can be released: restore the ledger."
        )


async def read_limits(connection: Connection) -> Limits:
    """Return the limits, in somebody else's transaction."""
    query = f"SELECT {', '.join(LIMITS)} FROM refund_ledger.refund_limits"
    return Limits(**(await connection.execute(query)).one())


async def _holder(connection: Connection) -> str:
    """Return the process and login that hold the gate, as far as this login may see them."""
    query = """
        SELECT DISTINCT a.pid, a.usename FROM refund_ledger.gate AS gate
        JOIN pg_catalog.pg_locks AS l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = gate.xmax
        JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid"""
    found = [f"process {row.pid} of the login {row.usename}" for row in await connection.execute(query)]
    return f" by {' and '.join(found)}" if found else ""
