"""
Pausing and resuming.

A pause is a row that is only inserted: no unique constraint, no foreign key and no lock stands between the
operator and the kill switch. A restore that was not compared with Payroc yet is a pause as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from include.refunds.classify import EVERYTHING
from include.refunds.ledger.connection import Connection
from include.refunds.ledger.database import LedgerError, Part
from include.refunds.ledger.events import because, event

# Nothing can hold a pause up for long (tests/refunds/test_locks.py). If something does, the operator has to
# know now.
_PAUSE_LOCK_SECONDS = 1


@dataclass(frozen=True, slots=True)
class BegunRestore:
    """
    A restore that was begun.

    :param number: names it at its end.
    :param since: from when the ledger may have forgotten anything.
    """

    number: int
    since: datetime


async def pause(connection: Connection, scope: str, reason: str) -> None:
    """Pause sending in somebody else's transaction, see :meth:`Pauses.pause`."""
    insert = "INSERT INTO refund_ledger.pauses (scope, reason) VALUES (:scope, :reason)"
    await connection.execute(insert, {"scope": scope, "reason": reason})


class Pauses(Part):
    """The rows of ``pauses``."""

    async def pause(self, scope: str, reason: str) -> None:
        """
        Pause sending. A scope that is paused already is paused once more.

        :param scope: a processing terminal id, or ``*`` for everything.
        """
        async with self._database.transaction(lock_seconds=_PAUSE_LOCK_SECONDS) as (connection, _):
            await pause(connection, scope, reason)

    async def reasons(self) -> dict[str, str]:
        """Return the reason of the first open pause of each scope."""
        query = """
            SELECT DISTINCT ON (scope) scope, reason FROM refund_ledger.pauses
            WHERE ended_at IS NULL ORDER BY scope, id"""
        return {row.scope: row.reason for row in await self._execute(query)}

    async def resume(self, scope: str, reason: str) -> bool:
        """
        End all open pauses of a scope; ``False`` when there is none.

        :raises LedgerError: when the ledger was restored from a backup, and not compared with Payroc since.
        """
        update = """
            UPDATE refund_ledger.pauses SET ended_at = refund_ledger.now(), end_reason = :reason
            WHERE scope = :scope AND ended_at IS NULL"""
        async with self._database.transaction() as (connection, _):
            restored_to = await _restored_to(connection)
            if scope == EVERYTHING and restored_to is not None:
                raise LedgerError(
                    f"The ledger was restored from a backup of {restored_to:%Y-%m-%d %H:%M %Z} and not compared "
                    "with Payroc since: run `python -m include.refunds restored` to its end first."
                )
            return await connection.change(update, {"scope": scope, "reason": reason}) > 0

    async def begin_restore(self, backup_at: datetime, reason: str) -> BegunRestore:
        """
        Pause sending until the restored ledger was compared with Payroc.

        It takes no lock: of two at a time only the one that began last can end.

        :param backup_at: when the backup was made.
        :returns: its number, and from when the ledger may have forgotten anything: from ``backup_at``, the
            ledger's newest change of a refund, or the restore that is open already, whichever is oldest.
        :raises LedgerError: when this login lacks a right that the take-over needs.
        """
        rights = "SELECT pg_has_role('refunds_payer', 'USAGE') AND pg_has_role('refunds_operator', 'USAGE')"
        newest_change = "SELECT max(updated_at) FROM refund_ledger.refund_states"
        insert = """
            INSERT INTO refund_ledger.pauses (scope, reason, restored_to) VALUES ('*', :reason, :restored_to)
            RETURNING id"""
        async with self._database.transaction() as (connection, _):
            if not (await connection.execute(rights)).scalar_one():
                raise LedgerError(
                    "What follows a restore takes the rights of refunds_payer and refunds_operator together: "
                    "give --ledger-url a login that is granted both, or the database's superuser."
                )
            # One that was cut off has changed refunds itself.
            known_until = await _restored_to(connection)
            if known_until is None:
                known_until = (await connection.execute(newest_change)).scalar_one()
            since = min(backup_at, known_until or backup_at)
            why = f"The ledger was restored from a backup of {since:%Y-%m-%d %H:%M %Z}: {reason}"
            number = (await connection.execute(insert, {"reason": why, "restored_to": since})).scalar_one()
            return BegunRestore(number, since)

    async def end_restore(self, number: int, reason: str, hidden: int = 0, names: Sequence[str] = ()) -> None:
        """
        Note that the restored ledger was compared with Payroc; an operator may resume from then on.

        :param number: the restore's, from :meth:`begin_restore`.
        :param hidden: number of objects that Payroc lists and that can't be understood. More than none is an
            event of its own.
        :param names: names of these objects, of very many the first.
        :raises LedgerError: when another one was begun after this one.
        """
        newest = "SELECT max(id) FROM refund_ledger.pauses WHERE restored_to IS NOT NULL"
        update = """
            UPDATE refund_ledger.pauses SET compared_at = refund_ledger.now()
            WHERE restored_to IS NOT NULL AND compared_at IS NULL AND id <= :number"""
        async with self._database.transaction() as (connection, _):
            if (await connection.execute(newest)).scalar_one() != number:
                raise LedgerError(
                    "Another `restored` was begun after this one: wait for its end, or run `restored` again."
                )
            if hidden:
                detail = {"count": hidden, "objects": list(names)}
                await event(connection, "not_understood", reason=reason, detail=detail)
            await because(connection, reason)
            await connection.execute(update, {"number": number})


async def _restored_to(connection: Connection) -> datetime | None:
    """Return from when a ledger that was not compared with Payroc yet may have forgotten anything."""
    query = """
        SELECT min(restored_to) FROM refund_ledger.pauses
        WHERE ended_at IS NULL AND restored_to IS NOT NULL AND compared_at IS NULL"""
    found: datetime | None = (await connection.execute(query)).scalar_one()
    return found
