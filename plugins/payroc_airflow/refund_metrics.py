"""Metrics about refunds: their outcomes, and how long the oldest approved one has been waiting."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from include.refunds.states import IN_DOUBT, PAID, Status
from include.refunds.waiting import oldest_approved_age
from payroc_airflow import metrics

if TYPE_CHECKING:
    from include.refunds.ledger import LedgerEngine
    from include.refunds.refund import Refund

log = logging.getLogger(__name__)


def count_outcome(before: Refund, after: Refund) -> None:
    """Count an outcome that was recorded. A record that changes no status counts for nothing."""
    if after.status is before.status:
        return
    if after.status in PAID and before.status not in PAID:
        metrics.count("accepted")
        metrics.count(f"amount.{after.currency}", after.amount)
    elif after.status in (Status.REJECTED, Status.UNKNOWN, Status.REVIEW, Status.RETURNED):
        metrics.count(after.status.value)
    if before.status in IN_DOUBT and after.status in {*PAID, Status.REJECTED}:
        metrics.count("attempts", after.attempts)


async def report_oldest(engine: LedgerEngine, source: str) -> None:
    """Set the gauge of how long the refund that was approved first has been waiting."""
    if metrics.are_on():
        try:
            metrics.gauge("oldest_approved_age", await oldest_approved_age(engine, source))
        except Exception as error:  # noqa: BLE001 - no figure may undo what was recorded
            log.warning("The age of the oldest approved refund was not told (%s).", type(error).__name__)
