"""
Restored: what comes first after the ledger was restored from a backup.

Such a ledger has forgotten what was sent since the backup, and what was decided. It finds the payments by
itself, because it reads Payroc's lists on from where it had read them; then the sending pauses. This stops
the sending at once, reads every list, takes over what Payroc holds, and compares both sides before anybody
may resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from include.payroc.errors import PayrocError, objects_named
from include.refunds.cipher import Cipher
from include.refunds.classify import Outcome, Verdict, refuses_terminal
from include.refunds.continuity import (
    ListRead,
    NotedLists,
    TakenOver,
    lists_due,
    note_failed,
    note_known,
    read_on,
)
from include.refunds.follow_up import FollowedRefunds, FollowUpLedger, follow_up
from include.refunds.gateway import Reader
from include.refunds.keys import idempotency_key
from include.refunds.ledger import LedgerError, TerminalList
from include.refunds.ledger.pauses import BegunRestore
from include.refunds.ledger_parts import ChecksEnvironment
from include.refunds.listing import BATCH
from include.refunds.pull import PullBindings, Pulled, PullLedger, PullLists, pull
from include.refunds.reader import FreshTokenReader
from include.refunds.refund import Refund
from include.refunds.settings import Settings
from include.refunds.source import Source
from include.refunds.verify import (
    ComparedRefunds,
    Comparison,
    KnownTerminals,
    RangeError,
    VerifyLedger,
    verify,
)

# Payroc's clock and the ledger's may differ, its dates may be cut off at the second, and whether dateFrom is
# inclusive is not documented.
_MARGIN = timedelta(days=1)

# A chain of reissues that is longer than this has worried people for a long time.
_NUMBERS_OF_REISSUES = range(2, 10)


@dataclass(frozen=True, slots=True)
class Restored:
    """
    What was found after a restore.

    :param since: since when the ledger may have forgotten anything.
    :param pulled: what the source has; new ones are those that the ledger had lost.
    :param comparison: the ledger and Payroc since then, after everything was taken over.
    :param notes: sentences about the lists.
    """

    since: datetime
    pulled: Pulled
    taken_over: list[TakenOver]
    comparison: Comparison
    notes: list[str]


class _Bindings(ChecksEnvironment, PullBindings, Protocol): ...


class _Lists(PullLists, NotedLists, KnownTerminals, Protocol):
    async def foreign_keys(self, keys: Sequence[str]) -> dict[str, str]: ...


class _Refunds(FollowedRefunds, ComparedRefunds, Protocol):
    async def not_sent(self) -> list[Refund]: ...


class _Pauses(Protocol):
    async def begin_restore(self, backup_at: datetime, reason: str) -> BegunRestore: ...

    async def end_restore(
        self, number: int, reason: str, hidden: int = 0, names: Sequence[str] = ()
    ) -> None: ...


class RestoreLedger(PullLedger, FollowUpLedger, VerifyLedger, Protocol):
    """What the first command after a restore needs of the ledger."""

    @property
    def bindings(self) -> _Bindings: ...

    @property
    def lists(self) -> _Lists: ...

    @property
    def pauses(self) -> _Pauses: ...

    @property
    def refunds(self) -> _Refunds: ...


async def restored(
    backup_at: datetime,
    reason: str,
    *,
    terminals: Sequence[str] = (),
    source: Source,
    ledger: RestoreLedger,
    gateway: Reader,
    cipher: Cipher,
    settings: Settings,
    accept_not_understood: bool = False,
) -> Restored:
    """
    Pause the sending, take over what Payroc has and the restored ledger does not know, and compare both.

    From its begin on, nobody can resume until it has come to its end; cut off, it is run again. It sends
    nothing.

    :param backup_at: when the backup was made.
    :param terminals: processing terminals beside those that ledger and source know.
    :param accept_not_understood: end it though Payroc lists objects that can't be understood, or refuses the
        list of a terminal; the audit trail then holds who decided so, why, and about what.
    :raises RangeError: when the backup is of the future.
    :raises PayrocError: when Payroc did not tell everything.
    :raises SourceError: when the source can't be read.
    :raises LedgerError: when the ledger belongs to another Payroc or source, this login lacks a right, or
        another one was begun after this one; or when Payroc lists objects that can't be understood or refuses
        a list, and nobody has accepted that.
    """
    now = await ledger.now()
    if backup_at > now:
        raise RangeError(
            f"The backup can't be of {backup_at:%Y-%m-%d %H:%M %Z}, which is in the future: give the instant when it was made."
        )
    begun = await ledger.pauses.begin_restore(backup_at, reason)
    since = begun.since
    await ledger.bindings.check_environment(gateway.environment)
    reader = FreshTokenReader(gateway)
    pulled = await pull(source, ledger, cipher, settings)
    lists = await lists_due(
        ledger,
        settings,
        sent_with=gateway.sent_with,
        known_for=timedelta(0),
        needed=terminals,
    )
    read: list[tuple[TerminalList, ListRead]] = []
    for item in lists:
        try:
            found = await read_on(
                item,
                ledger=ledger,
                reader=reader,
                settings=settings,
                since=since - _MARGIN,
                restored=True,
            )
        except PayrocError as error:
            # The comparison names the terminal.
            if not refuses_terminal(error):
                raise
            await note_failed(item, error, ledger)
        else:
            read.append((item, found))
    # A ledger that was lost altogether belongs to this Payroc now: it holds what Payroc does.
    await ledger.bindings.check_environment(gateway.environment, bind=True)
    await _set_aside_reissued(ledger, settings)
    if failed := (await follow_up(ledger, gateway, settings)).counts["failed"]:
        raise LedgerError(
            f"{failed} look-ups or lists failed at Payroc, so not everything is known: run it again."
        )
    comparison = await verify(
        since - _MARGIN,
        now + _MARGIN,
        terminals=[item.terminal for item in lists],
        ledger=ledger,
        gateway=gateway,
    )
    unread = _unread(comparison)
    if unread and not accept_not_understood:
        raise LedgerError(
            f"{' and '.join(unread)}, and a refund that the ledger forgot may be among them: look at them in "
            "Payroc's portal, then run `restored` again with --accept-not-understood; until then sending stays paused."
        )
    for item, found in read:
        if found.incomplete is not None:
            await note_known(item, found, ledger, reader)
    names = [
        *(f"the list of terminal {terminal}" for terminal in comparison.refused),
        *comparison.hidden_names,
    ]
    await ledger.pauses.end_restore(begun.number, reason, comparison.hidden + len(comparison.refused), names)
    return Restored(
        since,
        pulled,
        [taken for _, found in read for taken in found.changed],
        comparison,
        [note for item, found in read for note in found.notes(item.terminal)],
    )


def _unread(comparison: Comparison) -> list[str]:
    """Return clauses about what Payroc holds and nobody could compare."""
    clauses = []
    if comparison.refused:
        clauses.append(f"Payroc refuses the list of terminal {', '.join(comparison.refused)}")
    if comparison.hidden:
        objects = objects_named(comparison.hidden, comparison.hidden_names)
        clauses.append(f"Payroc lists {objects} that can't be understood")
    return clauses


async def _set_aside_reissued(ledger: RestoreLedger, settings: Settings) -> None:
    """
    Send pending refunds to review of which Payroc holds a reissue that the ledger has forgotten: sent too, it
    would be paid twice.
    """
    pending = await ledger.refunds.not_sent()
    for start in range(0, len(pending), BATCH):
        reissues = {
            str(idempotency_key(settings.source, f"{refund.source_ref}/{number}")): refund
            for refund in pending[start : start + BATCH]
            for number in _NUMBERS_OF_REISSUES
        }
        for key, found in (await ledger.lists.foreign_keys(list(reissues))).items():
            what = f"Payroc's refund {found} is a reissue of this one, which the ledger has forgotten since its backup."
            await ledger.records.record(reissues[key].id, Verdict(Outcome.REVIEW, what, contradiction=True))
