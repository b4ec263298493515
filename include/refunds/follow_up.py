"""
Follow-up: ask Payroc what became of unknown refunds, compare its lists with the ledger, and read them on.

It only reads Payroc, it never POSTs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from include.payroc.errors import OBJECTS_NAMED, PayrocError, PayrocIncompleteList
from include.refunds.business_days import business_days_before
from include.refunds.classify import refuses_terminal
from include.refunds.continuity import (
    READ_BY_FOLLOW_UP_AFTER,
    ListLedger,
    ListRead,
    compare_list,
    goes_on_at,
    lists_due,
    note_failed,
    read_on,
)
from include.refunds.gateway import Reader
from include.refunds.ledger import TerminalList
from include.refunds.ledger_parts import ChecksEnvironment
from include.refunds.listing import Known, of_terminal
from include.refunds.look_up import look_up_in_doubt
from include.refunds.reader import FreshTokenReader
from include.refunds.refund import Refund
from include.refunds.settings import Settings

# An ACH return for an account that is closed or unknown has to be sent within two banking days of settlement,
# but banks are late, and Payroc does not document how long a refund may come back. Two weeks cover that, with
# two bank holidays, which are not known here.
FOLLOWED_FOR_BUSINESS_DAYS = 12

# One refund that stays in review for a year must not have a year listed every two hours.
_LISTED_BACK = timedelta(days=60)

_EMPTIED_AT_ONCE = 1000

# Payroc's clock and the ledger's may differ, and whether dateFrom is inclusive is not documented.
_DATE_MARGIN = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class FollowedUp:
    """
    What a follow-up did.

    :param counts: how many refunds each of ``looked up``, ``found``, ``followed``, ``changed``, ``returned to
        approved`` and ``emptied`` (their requests, some days after they ended) counts. A look-up or a list
        that failed (``failed``) is left for the next time; the list of a terminal with followed refunds that
        Payroc refuses (``refused``) too.
    :param notes: sentences about the lists, for the report.
    :param not_understood: names of the objects at Payroc that can't be understood, each with its terminal, up
        to :data:`~include.payroc.errors.OBJECTS_NAMED`. They are skipped, because they would fail forever,
        and counted (``not understood``). A refund that hides behind one is reported when it was not looked at
        for too long.
    """

    counts: Counter[str]
    not_understood: list[str]
    notes: list[str]


class FollowedRefunds(Known, Protocol):
    """The refunds whose further way Payroc still has to say."""

    async def in_doubt(self) -> list[Refund]:
        """See :meth:`~include.refunds.ledger.refunds.Refunds.in_doubt`."""

    async def followed(self, changed_within: timedelta, taken_over_within: timedelta) -> dict[str, datetime]:
        """See :meth:`~include.refunds.ledger.refunds.Refunds.followed`."""


class _Requests(Protocol):
    async def empty_requests(self, kept_for: timedelta, limit: int) -> int: ...


class _Runs(Protocol):
    async def return_stale_releases(self) -> int: ...


class FollowUpLedger(ListLedger, Protocol):
    """What the follow-up needs of the ledger."""

    @property
    def bindings(self) -> ChecksEnvironment: ...

    @property
    def refunds(self) -> FollowedRefunds: ...

    @property
    def requests(self) -> _Requests: ...

    @property
    def runs(self) -> _Runs: ...


async def follow_up(ledger: FollowUpLedger, gateway: Reader, settings: Settings) -> FollowedUp:
    """
    Look up the unknown refunds, compare the list of each terminal with the ledger, and read on the lists
    that are due.

    :raises PayrocError: when Payroc gives no token.
    """
    counts: Counter[str] = Counter()
    names: dict[str, None] = {}
    notes: list[str] = []
    reader = FreshTokenReader(gateway)
    counts["returned to approved"] = await ledger.runs.return_stale_releases()
    counts["emptied"] = await _empty_requests(ledger.requests, settings)
    now = await ledger.now()
    in_doubt = await ledger.refunds.in_doubt()
    followed = await ledger.refunds.followed(
        now - business_days_before(now, FOLLOWED_FOR_BUSINESS_DAYS), _LISTED_BACK
    )
    due = {
        item.terminal: item
        for item in await lists_due(
            ledger, settings, sent_with=gateway.sent_with, known_for=READ_BY_FOLLOW_UP_AFTER
        )
    }
    if not in_doubt and not followed and not due:
        return FollowedUp(counts, [], [])
    if not await ledger.bindings.check_environment(gateway.environment):
        # It has never sent anything, and its first run may be with another connection.
        return FollowedUp(counts, [], [])
    for refund in in_doubt:
        counts["looked up"] += 1
        try:
            counts["found"] += await _look_up(refund, ledger, reader, settings)
        except PayrocIncompleteList as error:
            names |= dict.fromkeys(of_terminal(error, refund.processing_terminal_id))
        except PayrocError:
            counts["failed"] += 1
    lists = {item.terminal: item for item in await ledger.lists.terminal_lists()}
    for terminal in sorted({*followed, *due}):
        item = lists.get(terminal, TerminalList(terminal))
        since = followed.get(terminal)
        begin = max(since, now - _LISTED_BACK) - _DATE_MARGIN if since is not None else None
        try:
            found = await _read(item, begin, ledger, reader, settings, is_due=terminal in due)
        except PayrocError as error:
            if not refuses_terminal(error):
                counts["failed"] += 1
            elif terminal in followed:
                counts["refused"] += 1
            if terminal in due:
                await note_failed(item, error, ledger)
            continue
        if found.incomplete is not None:
            names |= dict.fromkeys(of_terminal(found.incomplete, terminal))
            if terminal in due:
                await note_failed(item, found.incomplete, ledger)
        counts["followed"] += found.known
        counts["changed"] += len(found.changed)
        notes += found.notes(terminal)
    # An object may be on a terminal's list and on that of a look-up.
    if names:
        counts["not understood"] = len(names)
    return FollowedUp(counts, list(names)[:OBJECTS_NAMED], notes)


async def _read(
    item: TerminalList,
    begin: datetime | None,
    ledger: FollowUpLedger,
    reader: Reader,
    settings: Settings,
    *,
    is_due: bool,
) -> ListRead:
    """
    Compare a terminal's list with the ledger; where that leaves no gap, the list is known further after it.

    :param begin: since when the refunds of the terminal are followed, ``None`` when none is.
    """
    start = await ledger.now()
    if is_due or begin is None or begin <= goes_on_at(item, start, settings):
        return await read_on(item, ledger=ledger, reader=reader, settings=settings, since=begin)
    return await compare_list(item.terminal, begin, start, ledger, reader)


async def _empty_requests(requests: _Requests, settings: Settings) -> int:
    emptied = 0
    while count := await requests.empty_requests(timedelta(days=settings.request_days), _EMPTIED_AT_ONCE):
        emptied += count
    return emptied


async def _look_up(refund: Refund, ledger: FollowUpLedger, reader: Reader, settings: Settings) -> bool:
    verdict = await look_up_in_doubt(await reader.token(), refund, reader, settings, await ledger.now())
    if verdict is None:
        return False
    await ledger.records.record(refund.id, verdict)
    return verdict.sighting is not None
