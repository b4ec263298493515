"""
Verify: compare the ledger with Payroc for a range of dates, in both directions. It only reads.

A refund belongs to the range by its first POST; an object that belongs to no refund, by Payroc's date of it.
The two lie close together but not on the same side of every midnight, so Payroc is asked for a day more on
both sides, and a refund that is not listed then is asked for by itself before it counts as missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Protocol

from include.payroc import models
from include.payroc.errors import (
    OBJECTS_NAMED,
    PayrocError,
    PayrocIncompleteList,
    PayrocProblem,
    PayrocUnexpectedAnswer,
    objects_named,
)
from include.payroc.models import AccessToken
from include.payroc.problems import NOT_FOUND
from include.refunds.classify import differences, is_ours, refuses_terminal, status_of, word_of
from include.refunds.gateway import Reader
from include.refunds.ledger_parts import ChecksEnvironment
from include.refunds.listing import BATCH, Known, in_batches, known, of_terminal, pairs
from include.refunds.reader import FreshTokenReader
from include.refunds.refund import Refund
from include.refunds.states import PAID

_MARGIN = timedelta(days=1)


class RangeError(Exception):
    """A range of dates can't be used; the message says what is wrong and shows a good one."""


@dataclass(frozen=True, slots=True)
class Difference:
    """
    Something that the ledger and Payroc do not agree on.

    :param refund_id: the ledger's id, ``None`` when the ledger does not have it.
    """

    sentence: str
    refund_id: int | None = None
    payroc_refund_id: str | None = None


@dataclass(slots=True)
class Sum:
    """Count and sum in minor units, of the same refunds on both sides."""

    ledger_count: int = 0
    ledger_amount: int = 0
    payroc_count: int = 0
    payroc_amount: int = 0


@dataclass(slots=True)
class Comparison:
    """
    What a comparison found.

    :param sums: by currency and status. A refund that Payroc refused has no object there, so ``rejected`` may
        differ.
    :param elsewhere: refunds at Payroc that were not made by this project, by currency; they are no
        differences.
    :param refused: terminals whose list Payroc refuses, such as one that was closed; nothing of them is
        compared.
    :param hidden: objects on Payroc's lists that can't be understood, and so can't be compared.
    :param hidden_names: their names, each with its terminal, up to
        :data:`~include.payroc.errors.OBJECTS_NAMED`.
    """

    start: datetime
    end: datetime
    sums: dict[tuple[str, str], Sum] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    elsewhere: dict[str, Sum] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    hidden: int = 0
    hidden_names: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            "from": self.start.isoformat(),
            "to": self.end.isoformat(),
            "totals": [
                {"currency": key[0], "status": key[1], **asdict(total)}
                for key, total in sorted(self.sums.items())
            ],
            "made_elsewhere": [
                {"currency": currency, "count": total.payroc_count, "amount": total.payroc_amount}
                for currency, total in sorted(self.elsewhere.items())
            ],
            "refused_terminals": self.refused,
            "not_understood": {"count": self.hidden, "objects": self.hidden_names},
            "differences": [asdict(item) for item in self.differences],
        }


def read_range(first: str, last: str) -> tuple[datetime, datetime]:
    """
    Return the begin and the end of a range that people gave.

    :param first: a date, which begins at midnight UTC, or an instant with its zone.
    :param last: a date, which is included, or an instant with its zone, which is not.
    :raises RangeError: when it is neither, or the range is empty.
    """
    start, end = read_instant(first), read_instant(last, whole_day=timedelta(days=1))
    if start >= end:
        raise RangeError(f"The range from {first} to {last} is empty: --from must lie before --to.")
    return start, end


class KnownTerminals(Protocol):
    """The terminals that are compared."""

    async def all_terminals(self) -> list[str]:
        """See :meth:`~include.refunds.ledger.lists.Lists.all_terminals`."""


class ComparedRefunds(Known, Protocol):
    """The refunds that are compared."""

    async def sent_between(self, start: datetime, end: datetime, *, after: int, limit: int) -> list[Refund]:
        """See :meth:`~include.refunds.ledger.refunds.Refunds.sent_between`."""


class VerifyLedger(Protocol):
    """What a comparison with Payroc needs of the ledger."""

    @property
    def bindings(self) -> ChecksEnvironment: ...

    @property
    def lists(self) -> KnownTerminals: ...

    @property
    def refunds(self) -> ComparedRefunds: ...


async def verify(
    start: datetime, end: datetime, *, terminals: Sequence[str] = (), ledger: VerifyLedger, gateway: Reader
) -> Comparison:
    """
    Compare what was first sent from ``start`` up to ``end`` with what Payroc holds.

    :param terminals: processing terminals beside those of the ledger's refunds. A ledger that was lost knows
        none.
    :raises PayrocError: when Payroc did not tell everything; then nothing is known.
    :raises LedgerError: when the ledger belongs to another Payroc.
    """
    await ledger.bindings.check_environment(gateway.environment)
    comparison = Comparison(start, end)
    compare = _Compare(comparison, ledger.refunds)
    reader = FreshTokenReader(gateway)
    for terminal in sorted({*await ledger.lists.all_terminals(), *terminals}):
        listed = reader.list_refunds(
            await reader.token(),
            processing_terminal_id=terminal,
            date_from=start - _MARGIN,
            date_to=end + _MARGIN,
        )
        try:
            async for batch in in_batches(listed):
                await compare.listed(batch)
        except PayrocIncompleteList as error:
            compare.hidden(error, terminal)
        except PayrocError as error:
            if not refuses_terminal(error):
                raise
            compare.refused(error, terminal)
    after = 0
    while rows := await ledger.refunds.sent_between(start, end, after=after, limit=BATCH):
        for row in rows:
            if row.processing_terminal_id in comparison.refused:
                compare.not_compared(row, "Payroc refuses the list of its terminal")
            elif row.id not in compare.seen:
                try:
                    found = await _look_for(row, await reader.token(), reader)
                except PayrocUnexpectedAnswer as error:
                    if error.http_status != 200:
                        raise
                    compare.not_compared(row, "what Payroc answers about it can't be understood")
                else:
                    await compare.alone(row, found)
        after = rows[-1].id
    return comparison


class _Compare:
    """
    Compares objects and rows as they come.

    :param seen: refund id at Payroc by the ledger's id, of what was compared: some ten megabytes for 100,000
        refunds.
    """

    def __init__(self, comparison: Comparison, refunds: Known) -> None:
        self._into = comparison
        self._refunds = refunds
        self.seen: dict[int, str] = {}
        self._unknown: set[str] = set()

    async def listed(self, batch: Sequence[models.Refund]) -> None:
        for item, row in pairs(batch, await known(batch, self._refunds)):
            if row is not None:
                self._pair(item, row)
            elif item.refund_id not in self._unknown and self._within(self._date_of(item)):
                self._unknown.add(item.refund_id)
                self._without_row(item)

    def hidden(self, error: PayrocIncompleteList, terminal: str) -> None:
        into = self._into
        into.hidden += error.missing
        into.hidden_names = [*into.hidden_names, *of_terminal(error, terminal)][:OBJECTS_NAMED]
        objects = objects_named(error.missing, error.objects)
        sentence = f"Payroc lists {objects} of terminal {terminal} that can't be understood."
        into.differences.append(Difference(sentence))

    def refused(self, error: PayrocError, terminal: str) -> None:
        self._into.refused.append(terminal)
        sentence = f"Payroc refuses the list of terminal {terminal}: {error}."
        self._into.differences.append(Difference(sentence))

    def not_compared(self, row: Refund, why: str) -> None:
        self._count_row(row)
        self._differ(f"can't be compared: {why}", row)

    async def alone(self, row: Refund, found: models.Refund | None) -> None:
        if found is not None:
            self._pair(found, row)
            return
        self._count_row(row)
        if row.status in PAID:
            self._differ(f"is {row.status} here, and Payroc does not have it", row)

    def _pair(self, item: models.Refund, row: Refund) -> None:
        other = self.seen.get(row.id) or row.payroc_refund_id
        if self.seen.get(row.id) == item.refund_id:
            return
        within = self._within(row.first_sent_at or self._date_of(item))
        if other not in (None, item.refund_id):
            if within or self._within(self._date_of(item)):
                self._differ(f"has two objects at Payroc: {other} and {item.refund_id}", row, item)
            return
        self.seen[row.id] = item.refund_id
        if not within:
            return
        self._count_row(row)
        self._count_object(item)
        if differing := differences(item, row):
            self._differ(
                f"differs from Payroc's refund {item.refund_id} in {', '.join(differing)}", row, item
            )
        # What people resolved with this very word before their eyes is what they decided.
        known = row.status in PAID and row.payroc_status == word_of(item)
        if not known and row.status is not status_of(item):
            self._differ(
                f"is {row.status} here and '{word_of(item)}' at Payroc (refund {item.refund_id})", row, item
            )

    def _without_row(self, item: models.Refund) -> None:
        if item.refund_key is None:
            total = self._into.elsewhere.setdefault(item.order.currency, Sum())
            total.payroc_count += 1
            total.payroc_amount += item.order.amount
            return
        self._count_object(item)
        sentence = f"Payroc's refund {item.refund_id} (order {item.order.order_id}) carries a key of ours that the ledger does not have."
        self._into.differences.append(Difference(sentence, payroc_refund_id=item.refund_id))

    def _differ(self, what: str, row: Refund, item: models.Refund | None = None) -> None:
        sentence = f"Refund {row.id} (order {row.order_id}) {what}."
        self._into.differences.append(
            Difference(sentence, row.id, item.refund_id if item else row.payroc_refund_id)
        )

    def _date_of(self, item: models.Refund) -> datetime:
        # An object without a date was listed for this range, so it is taken to lie in it.
        return item.order.date_time or self._into.start

    def _within(self, at: datetime) -> bool:
        return self._into.start <= at < self._into.end

    def _count_row(self, row: Refund) -> None:
        total = self._into.sums.setdefault((row.currency, row.status.value), Sum())
        total.ledger_count += 1
        total.ledger_amount += row.amount

    def _count_object(self, item: models.Refund) -> None:
        total = self._into.sums.setdefault((item.order.currency, status_of(item).value), Sum())
        total.payroc_count += 1
        total.payroc_amount += item.order.amount


async def _look_for(row: Refund, token: AccessToken, reader: Reader) -> models.Refund | None:
    """
    Return the object of a refund that was not listed in the range: it may have been made days after the first
    POST.
    """
    if row.payroc_refund_id is not None:
        try:
            return await reader.get_refund(token, row.payroc_refund_id)
        except PayrocProblem as error:
            # Somebody else's 404, such as a proxy's, says nothing about a refund.
            if error.http_status != 404 or error.problem_type != NOT_FOUND:
                raise
            return None
    listed = reader.list_refunds(
        token, processing_terminal_id=row.processing_terminal_id, order_id=row.order_id
    )
    return next(iter([item async for item in listed if is_ours(item, row)]), None)


def read_instant(text: str, *, whole_day: timedelta = timedelta()) -> datetime:
    """
    Return an instant that people gave.

    :param text: a date, which means midnight UTC, or an instant with its zone.
    :param whole_day: what is added to a date.
    :raises RangeError: when it is neither.
    """
    try:
        if "T" not in text and " " not in text:
            return datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC) + whole_day
        instant = datetime.fromisoformat(text)
        if instant.tzinfo is not None:
            return instant
    except (ValueError, OverflowError):
        pass
    raise RangeError(
        f"{text!r} is neither a date such as 2026-11-23, in UTC, nor an instant with its zone such as 2026-11-23T09:00-05:00."
    )
