"""Business days: Monday to Friday. Bank holidays are not known here; whoever counts leaves room for them."""

from __future__ import annotations

from datetime import datetime, timedelta

_SATURDAY = 5


def business_days_between(start: datetime, end: datetime) -> int:
    """Return how many business days begin after ``start`` and up to ``end``."""
    days = (end.date() - start.date()).days
    return sum((start.date() + timedelta(days=offset)).weekday() < _SATURDAY for offset in range(1, days + 1))


def business_days_before(end: datetime, days: int) -> datetime:
    """Return the latest instant that lies so many business days before ``end``."""
    start = end
    while business_days_between(start, end) < days:
        start -= timedelta(days=1)
    return start
