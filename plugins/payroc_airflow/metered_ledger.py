"""The ledger as the DAGs use it: it counts what becomes of refunds."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from include.refunds.ledger import Ledger
from include.refunds.states import IN_DOUBT, PAID, Status
from include.refunds.waiting import oldest_approved_age
from payroc_airflow import metrics

if TYPE_CHECKING:
    from include.refunds.refund import Refund

log = logging.getLogger(__name__)


class MeteredLedger(Ledger):
    """The ledger, which counts an outcome once it is recorded; what is no change counts for nothing."""

    def _recorded(self, before: Refund, after: Refund) -> None:
        _count(before.status, after)

    async def tell_oldest(self) -> None:
        """Tell for how long the refund that was approved first has been waiting."""
        if metrics.are_on():
            try:
                metrics.gauge(
                    "oldest_approved_age", await oldest_approved_age(self.engine, self._settings.source)
                )
            except Exception as error:  # noqa: BLE001 - no figure may undo what was recorded
                log.warning("The age of the oldest approved refund was not told (%s).", type(error).__name__)


def _count(before: Status, refund: Refund) -> None:
    after = refund.status
    if after is before:
        return
    if after in PAID and before not in PAID:
        metrics.count("accepted")
        metrics.count(f"amount.{refund.currency}", refund.amount)
    elif after in (Status.REJECTED, Status.UNKNOWN, Status.REVIEW, Status.RETURNED):
        metrics.count(after.value)
    if before in IN_DOUBT and after in {*PAID, Status.REJECTED}:
        metrics.count("attempts", refund.attempts)
