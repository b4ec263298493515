"""
Continuity: Payroc's list of each terminal, read on from where the ledger had read it. It only reads Payroc.

A ledger that was restored, lost, copied or asleep so learns what it paid before it sends again. Payroc
documents neither how far back a list goes, nor whether ``dateFrom`` is inclusive, nor an order: none of
that is relied upon.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from include.payroc import models
from include.payroc.errors import PayrocError, PayrocIncompleteList, PayrocProblem
from include.refunds.classify import judge_object, refuses_terminal, word_of
from include.refunds.gateway import Reader
from include.refunds.ledger import Foreign, TerminalList
from include.refunds.ledger_parts import Clock, Recorder, TerminalLists
from include.refunds.listing import Known, currency_of, in_batches, key_of, known, pairs
from include.refunds.refund import Refund
from include.refunds.settings import Settings
from include.refunds.transitions import is_forgotten, is_known

LIST_LAG = timedelta(days=1)
"""An object may take this long to show, so a reading knows the list up to this long before it began."""

READ_BY_FOLLOW_UP_AFTER = timedelta(days=2)
"""The follow-up reads a list that is known up to longer ago than this: about once a day."""

READ_BY_RELEASE_AFTER = timedelta(days=3)
"""So does `release`, which therefore makes no request of its own where the follow-up runs."""

# Whether dateFrom is inclusive is not documented, and it is cut off at the second.
_MARGIN = timedelta(minutes=1)

# A dateFrom that is refused although it is younger is not refused for its age.
_NEVER_TOO_OLD = timedelta(days=3)


@dataclass(frozen=True, slots=True)
class TakenOver:
    """
    A refund of which the list had news.

    :param before: the refund as the ledger had it.
    :param after: the refund now.
    """

    before: Refund
    after: Refund

    def __str__(self) -> str:
        return (
            f"Refund {self.after.id} (order {self.after.order_id}) was {self.before.status} and is "
            f"{self.after.status}: Payroc's refund {self.after.payroc_refund_id}."
        )


@dataclass(slots=True)
class ListRead:
    """
    What a reading of a list found.

    :param known: objects that belong to refunds of the ledger.
    :param changed: refunds whose status changed.
    :param refused_from: since when the list was asked for first, when Payroc refused that as too long ago.
    :param begin: since when it was read.
    :param end: until when it was read.
    :param incomplete: the list holds objects that can't be understood; all others were compared.
    """

    begin: datetime
    end: datetime
    known: int = 0
    changed: list[TakenOver] = field(default_factory=list)
    refused_from: datetime | None = None
    incomplete: PayrocIncompleteList | None = None

    def notes(self, terminal: str) -> list[str]:
        """Return sentences about the reading for a report."""
        if self.refused_from is None:
            return []
        return [
            f"Payroc refuses to list refunds of terminal {terminal} from {self.refused_from:%-d %b %Y} on, so the "
            f"ledger knows only those from {self.begin:%-d %b %Y} on."
        ]


class NotedLists(TerminalLists, Protocol):
    """What is noted of the lists of Payroc."""

    async def list_read(self, terminal: str, read_from: datetime, read_to: datetime, read_with: str) -> None:
        """See :meth:`~include.refunds.ledger.lists.Lists.list_read`."""

    async def list_failed(self, terminal: str, failure: str, *, refused: bool = False) -> None:
        """See :meth:`~include.refunds.ledger.lists.Lists.list_failed`."""

    async def keep_foreign(self, found: Sequence[Foreign]) -> None:
        """See :meth:`~include.refunds.ledger.lists.Lists.keep_foreign`."""


class _Records(Recorder, Protocol):
    async def mark_seen(self, refund_ids: Sequence[int]) -> None: ...


class ListLedger(Clock, Protocol):
    """What reading Payroc's lists on needs of the ledger."""

    @property
    def lists(self) -> NotedLists: ...

    @property
    def records(self) -> _Records: ...

    @property
    def refunds(self) -> Known: ...


async def lists_due(
    ledger: ListLedger,
    settings: Settings,
    *,
    sent_with: str,
    known_for: timedelta,
    needed: Collection[str] = (),
) -> list[TerminalList]:
    """
    Return the lists that are to be read now, of all terminals that the ledger knows or the setting names.

    A terminal that Payroc refused is left out when nothing needs it and nothing it may hold is within
    reach, so that a misspelled terminal, or one that was closed long ago, is not asked for forever.

    :param sent_with: hash of the API host and key of today; a list that was read with another is due.
    :param known_for: a list that is known up to longer ago than this is due.
    :param needed: terminals of the refunds that are to be sent.
    """
    now = await ledger.now()
    lists = {item.terminal: item for item in await ledger.lists.terminal_lists()}
    reach = now - timedelta(days=settings.look_back_days)
    due = []
    for terminal in sorted({*lists, *settings.terminals, *needed}):
        item = lists.get(terminal, TerminalList(terminal))
        dropped = item.refused and (item.read_to is None or item.read_to < reach)
        if dropped and terminal not in needed and terminal not in settings.terminals:
            continue
        if not item.is_known(now - known_for, sent_with):
            due.append(item)
    return due


async def read_on(
    item: TerminalList,
    *,
    ledger: ListLedger,
    reader: Reader,
    settings: Settings,
    since: datetime | None = None,
    restored: bool = False,
) -> ListRead:
    """
    Read a terminal's list on from where the ledger had read it, and note how far it is known now.

    A list that holds objects that can't be understood is known no further than before.

    :param since: read from here when that is earlier.
    :param restored: `restored` is at work.
    :raises PayrocError: when the list did not come, or not as a whole.
    """
    start = await ledger.now()
    asked = goes_on_at(item, start, settings)
    asked = asked if since is None else min(asked, since)
    begin = asked
    while True:
        try:
            found = await compare_list(item.terminal, begin, start, ledger, reader, restored=restored)
            break
        except PayrocError as error:
            if not _is_too_old(error, start - begin):
                raise
            begin = start - (start - begin) / 2
    if begin != asked:
        found.refused_from = asked
    if found.incomplete is None:
        await note_known(item, found, ledger, reader)
    return found


async def note_known(item: TerminalList, found: ListRead, ledger: ListLedger, reader: Reader) -> None:
    """Note how far a list is known after a reading that left no gap."""
    begin = found.begin
    goes_on = item.read_from is not None and item.read_to is not None and begin <= item.read_to
    read_from = min(begin, item.read_from) if goes_on and item.read_from is not None else begin
    await ledger.lists.list_read(item.terminal, read_from, found.end - LIST_LAG, reader.sent_with)


async def note_failed(item: TerminalList, error: PayrocError, ledger: ListLedger) -> None:
    """Note that a list that was due could not be read to its end."""
    failure = str(error)
    if isinstance(error, PayrocIncompleteList):
        failure += (
            "; look at them in Payroc's portal, then run `python -m include.refunds restored` with "
            "--accept-not-understood"
        )
    await ledger.lists.list_failed(item.terminal, failure, refused=refuses_terminal(error))


def goes_on_at(item: TerminalList, start: datetime, settings: Settings) -> datetime:
    """
    Return from when on a list has to be read so that no gap is left.

    :param start: when the reading begins.
    """
    if item.read_to is None:
        return start - timedelta(days=settings.look_back_days)
    return item.read_to - _MARGIN


async def compare_list(
    terminal: str,
    begin: datetime,
    end: datetime,
    ledger: ListLedger,
    reader: Reader,
    *,
    restored: bool = False,
) -> ListRead:
    """
    Compare a part of a terminal's list with the ledger; each object that no refund has is kept.

    Every object that is ours is compared, whatever the refund's status: a second object for one key, or one
    for a refund that is rejected here, is recorded as the contradiction that it is.

    :param begin: only objects made after this.
    :param end: only objects made before this, so that new ones do not shift the pages.
    :param restored: `restored` is at work.
    :raises PayrocError: when the list did not come, or not as a whole; what came was compared.
    """
    found = ListRead(begin, end)
    listed = reader.list_refunds(
        await reader.token(), processing_terminal_id=terminal, date_from=begin, date_to=end
    )
    try:
        async for batch in in_batches(listed):
            await _compare(batch, terminal, found, ledger, restored=restored)
    except PayrocIncompleteList as error:
        found.incomplete = error
    return found


async def _compare(
    batch: Sequence[models.Refund], terminal: str, found: ListRead, ledger: ListLedger, *, restored: bool
) -> None:
    seen: list[int] = []
    foreign: list[Foreign] = []
    for item, refund in pairs(batch, await known(batch, ledger.refunds)):
        if refund is None:
            foreign.append(_foreign(item, terminal))
            continue
        found.known += 1
        verdict = judge_object(item, refund)
        sighting = verdict.sighting
        if (
            sighting is not None
            and is_known(refund, sighting)
            and not is_forgotten(refund, sighting, restored=restored)
        ):
            seen.append(refund.id)
            continue
        after, _ = await ledger.records.record(refund.id, verdict, restored=restored)
        if after.status is not refund.status:
            found.changed.append(TakenOver(refund, after))
    if seen:
        await ledger.records.mark_seen(seen)
    if foreign:
        await ledger.lists.keep_foreign(foreign)


def _foreign(item: models.Refund, terminal: str) -> Foreign:
    return Foreign(
        payroc_refund_id=item.refund_id,
        idempotency_key=key_of(item),
        terminal=terminal,
        order_id=item.order.order_id,
        amount=item.order.amount,
        currency=currency_of(item),
        last4=item.last4,
        payroc_status=word_of(item),
        plain=not item.custom_fields,
    )


def _is_too_old(error: PayrocError, age: timedelta) -> bool:
    """Tell whether Payroc refused a ``dateFrom`` of this age; it need not name it."""
    return (
        isinstance(error, PayrocProblem)
        and error.http_status == 400
        and age > _NEVER_TOO_OLD
        and (not error.parameters or any(name.endswith("dateFrom") for name in error.parameters))
    )
