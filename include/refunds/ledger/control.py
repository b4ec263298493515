"""Stopping and resuming the sending, its limits, what the ledger is bound to, and the events that the database does not write itself."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

from include.payroc.hosts import PRODUCTION
from include.refunds.classify import EVERYTHING
from include.refunds.ledger.base import LedgerBase, LedgerError
from include.refunds.ledger.connection import Connection
from include.refunds.limits import LIMITS, Limits
from include.refunds.settings import DEFAULT_SOURCE

# True of a row of refunds whose sending is not paused, neither for all nor for its terminal.
NOT_PAUSED = """NOT EXISTS (
    SELECT FROM refund_ledger.refund_control WHERE paused_at IS NOT NULL AND scope IN ('*', processing_terminal_id))"""


class Control(LedgerBase):
    """The rows of ``refund_control``."""

    async def check_environment(self, environment: str, *, bind: bool = False) -> None:
        """
        Make sure that the ledger belongs to this Payroc, or to none yet.

        :param environment: Payroc's API base URL.
        :param bind: a ledger that belongs to none yet now belongs to this one. Only done when this one has answered, so that a
            typing error binds nothing.
        :raises LedgerError: when the ledger belongs to another one, or when this is production and the source has
            the name that everybody begins with.
        """
        nameless = environment == PRODUCTION and self._settings.source == DEFAULT_SOURCE
        found = await self._bond("environment", environment, bind=bind and not nameless)
        if found not in (None, environment):
            raise LedgerError(
                f"This ledger belongs to Payroc at {found}, the connection points to {environment}: "
                "use the connection it belongs to, or a ledger of its own."
            )
        if nameless:
            raise LedgerError(
                f"PAYROC_REFUNDS_SOURCE is {DEFAULT_SOURCE}, its default, and the connection is Payroc's "
                "production: set a name of your own, such as acme_refunds, and never change it, because two shops "
                "with one name and one Payroc account would send their refunds under the same keys."
            )

    async def check_source(self) -> None:
        """
        Make sure that the ledger belongs to this source, or bind it when it belongs to none yet.

        Keys are derived from the source's name, so the same refund under another name would be another payment.

        :raises LedgerError: when the ledger belongs to another source.
        """
        source = self._settings.source
        found = await self._bond("source", source, bind=True)
        if found not in (None, source):
            raise LedgerError(
                f"This ledger belongs to the source {found!r}, but PAYROC_REFUNDS_SOURCE says {source!r}: set it back, because under "
                "another name the same refunds would be paid again; another source needs a ledger of its own."
            )

    async def check_fingerprint_key(self, check: str) -> None:
        """
        Make sure that the ledger's fingerprints were made with this key, or bind it when it has none yet.

        :param check: hash that only the same key gives (see :attr:`Cipher.fingerprint_check`).
        :raises LedgerError: when they were made with another one.
        """
        if await self._bond("fingerprint_check", check, bind=True) not in (None, check):
            raise LedgerError(
                "PAYROC_REFUNDS_FINGERPRINT_KEY is not the key with which this ledger's fingerprints were made: set the old one again; "
                "with another key no refund would be recognised, and no duplicate found."
            )

    async def _bond(self, column: str, value: str, *, bind: bool) -> str | None:
        """Return what the ledger was bound to before; one that was bound to nothing is bound to ``value`` if told so."""
        # Bound once, for ever: only the first time takes the row's lock, on which a pause would wait.
        query = f"SELECT {column} FROM refund_ledger.refund_control WHERE scope = '*'"
        update = f"UPDATE refund_ledger.refund_control SET {column} = :value WHERE scope = '*' AND {column} IS NULL"
        async with self._transaction() as (connection, _):
            found: str | None = (await connection.execute(query)).scalar_one()
            if found is None and bind:
                await self._because(connection, value)
                if await connection.change(update, {"value": value}) == 0:
                    # Another one has bound it a moment ago.
                    found = (await connection.execute(query)).scalar_one()
        return found

    async def pause(self, scope: str, reason: str) -> None:
        """
        Pause the sending. What is paused already keeps its first reason.

        :param scope: a processing terminal id, or ``*`` for everything.
        """
        async with self._transaction() as (connection, now):
            await self._pause(connection, scope, reason, now)

    async def resume(self, scope: str, reason: str) -> bool:
        """
        Let the sending go on; ``False`` when it was not paused for this scope.

        :raises LedgerError: when the ledger was restored from a backup, and not compared with Payroc since.
        """
        update = """
            UPDATE refund_ledger.refund_control SET paused_at = NULL, paused_by = NULL, pause_reason = NULL
            WHERE scope = :scope AND paused_at IS NOT NULL"""
        async with self._transaction() as (connection, _):
            restored_to = await self._restored_to(connection)
            if scope == EVERYTHING and restored_to is not None:
                raise LedgerError(
                    f"The ledger was restored from a backup of {restored_to:%Y-%m-%d %H:%M %Z} and not compared with Payroc since: run "
                    "`python -m include.refunds restored` to its end first."
                )
            await self._because(connection, reason)
            return await connection.change(update, {"scope": scope}) > 0

    async def begin_restore(self, backup_at: datetime, reason: str) -> datetime:
        """
        Pause the sending, and note that the ledger was restored and is not compared with Payroc yet.

        :param backup_at: when the backup was made.
        :returns: since when anything may be forgotten: ``backup_at``, or the ledger's newest change of a refund when that is older.
        :raises LedgerError: when this login lacks a right that the take-over needs.
        """
        rights = "SELECT pg_has_role('refunds_payer', 'USAGE') AND pg_has_role('refunds_operator', 'USAGE')"
        newest_change = "SELECT max(updated_at) FROM refund_ledger.refund_states"
        # What was paused when the backup was made is paused for another reason now.
        update = """
            UPDATE refund_ledger.refund_control SET restored_to = :restored_to, paused_at = :now, paused_by = :actor,
                pause_reason = :reason || COALESCE(' Before that: ' || pause_reason, '')
            WHERE scope = '*' AND restored_to IS NULL"""
        async with self._transaction() as (connection, now):
            if not (await connection.execute(rights)).scalar_one():
                raise LedgerError(
                    "What follows a restore takes the rights of refunds_payer and refunds_operator together: give --ledger-url a login "
                    "that is granted both, or the database's superuser."
                )
            begun = await self._restored_to(connection)
            if begun is not None:
                # It was cut off. The newest change is its own by now.
                return min(backup_at, begun)
            known_until = (await connection.execute(newest_change)).scalar_one()
            restored_to = min(backup_at, known_until or backup_at)
            await self._because(connection, reason)
            why = f"The ledger was restored from a backup of {restored_to:%Y-%m-%d %H:%M %Z}."
            await connection.execute(
                update, {"restored_to": restored_to, "now": now, "actor": self._actor, "reason": why}
            )
            return restored_to

    @asynccontextmanager
    async def restore_lock(self) -> AsyncIterator[None]:
        """
        Hold the lock of what follows a restore. Of two at a time the first to end would let people resume before the other one has.

        :raises LedgerError: when another one is at work.
        """
        take = "SELECT pg_try_advisory_lock(hashtext('refund_ledger.restored'))"
        async with self.engine.connect() as connection:
            taken = (await connection.execute(take)).scalar_one()
            if not taken:
                raise LedgerError("Another `restored` is at work on this ledger: wait for its end.")
            try:
                yield
            finally:
                await connection.execute("SELECT pg_advisory_unlock(hashtext('refund_ledger.restored'))")

    async def end_restore(self, reason: str, hidden: int = 0, names: Sequence[str] = ()) -> None:
        """
        Note that the restored ledger was compared with Payroc; whether sending resumes is an operator's
        decision.

        :param hidden: number of objects that Payroc lists and that can't be understood. More than none is an
            event of its own.
        :param names: names of these objects, of very many the first.
        """
        update = "UPDATE refund_ledger.refund_control SET restored_to = NULL WHERE scope = '*'"
        async with self._transaction() as (connection, _):
            if hidden:
                detail = {"count": hidden, "objects": list(names)}
                await self._event(connection, "not_understood", reason=reason, detail=detail)
            await self._because(connection, reason)
            await connection.execute(update)

    async def _restored_to(self, connection: Connection) -> datetime | None:
        query = "SELECT restored_to FROM refund_ledger.refund_control WHERE scope = '*'"
        found: datetime | None = (await connection.execute(query)).scalar_one()
        return found

    async def pauses(self) -> dict[str, str]:
        """Return the reason of each pause, by scope."""
        query = "SELECT scope, pause_reason FROM refund_ledger.refund_control WHERE paused_at IS NOT NULL ORDER BY scope"
        async with self._transaction() as (connection, _):
            return {row.scope: row.pause_reason for row in await connection.execute(query)}

    async def limits(self) -> Limits:
        """Return the limits of the sending."""
        async with self._transaction() as (connection, _):
            return await self._limits(connection)

    async def set_limit(self, name: str, value: int | None, reason: str) -> None:
        """
        Set a limit; ``None`` takes it away. A run that is just passing the gate is waited for.

        :param name: one of :data:`~include.refunds.limits.LIMITS`.
        :param value: minor units, a number of refunds, or days; at least 1, for thresholds of approval at least 0.
        :raises LedgerError: when there is no such limit, or the value can't be.
        """
        if name not in LIMITS:
            raise LedgerError(f"There is no limit {name!r}; there are {', '.join(LIMITS)}.")
        smallest = 0 if name.startswith("approval_") else 1
        largest = 366 if name.endswith("_days") else 10**15
        if value is not None and not smallest <= value <= largest:
            raise LedgerError(f"The limit {name} must lie between {smallest} and {largest}.")
        update = f"UPDATE refund_ledger.refund_control SET {name} = :value WHERE scope = '*'"
        async with self._transaction() as (connection, _):
            await self._lock_gate(connection)
            before = await self._limits(connection)
            after = replace(before, **{name: value})
            if after.payee_days is None and (after.payee_total, after.payee_count) != (None, None):
                raise LedgerError(
                    "A cap per payee needs its days: set payee_days first, and take it away last."
                )
            await self._because(connection, reason)
            await connection.execute(update, {"value": value})

    async def _lock_gate(self, connection: Connection) -> None:
        """Let nobody else pass the gate or change its limits until the commit. A pause waits for nobody: each claim asks for it."""
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext('refund_ledger.door'))")

    async def _limits(self, connection: Connection) -> Limits:
        query = f"SELECT {', '.join(LIMITS)} FROM refund_ledger.refund_control WHERE scope = '*'"
        return Limits(**(await connection.execute(query)).one())

    async def _pause(self, connection: Connection, scope: str, reason: str, now: datetime) -> None:
        upsert = """
            INSERT INTO refund_ledger.refund_control AS control (scope, paused_at, paused_by, pause_reason)
            VALUES (:scope, :now, :actor, :reason)
            ON CONFLICT (scope) DO UPDATE SET paused_at = :now, paused_by = :actor, pause_reason = :reason
            WHERE control.paused_at IS NULL"""
        await connection.execute(upsert, {"scope": scope, "now": now, "actor": self._actor, "reason": reason})

    async def _because(self, connection: Connection, reason: str) -> None:
        """Give the database the reason: it writes the events of ``refund_control`` itself, so that no change can forget its event."""
        setting = "SELECT set_config('refund_ledger.reason', :reason, true)"
        await connection.execute(setting, {"reason": reason})

    async def _event(
        self,
        connection: Connection,
        event: str,
        *,
        reason: str,
        refund_id: int | None = None,
        detail: dict[str, Any] | None = None,
        actor: str | None = None,
    ) -> None:
        insert = """
            INSERT INTO refund_ledger.refund_events (event, refund_id, actor, reason, detail)
            VALUES (:event, :refund_id, :actor, :reason, CAST(:detail AS jsonb))"""
        values = {
            "event": event,
            "refund_id": refund_id,
            "actor": actor or self._actor,
            "reason": reason,
        }
        await connection.execute(insert, {**values, "detail": json.dumps(detail) if detail else None})
