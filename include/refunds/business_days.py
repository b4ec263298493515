"""Business days: Monday to Friday. Bank holidays are not known here; whoever counts leaves room for them."""

from __future__ import annotations

from datetime import datetime, timedelta

_SATURDAY = 5


def business_days_between(start: datetime, end: datetime) -> int:
    """Return how many business days begin after ``start`` and up to ``end``."""
    weeks, rest = divmod(max(0, (end.date() - start.date()).days), 7)
    first = start.weekday() + 1
    return weeks * _SATURDAY + sum((first + offset) % 7 < _SATURDAY for offset in range(rest))


def business_days_before(end: datetime, days: int) -> datetime:
    """Return the latest instant that lies so many business days before ``end``."""
    start = end - timedelta(weeks=days // _SATURDAY)
    while business_days_between(start, end) < days:
        start -= timedelta(days=1)
    return start
