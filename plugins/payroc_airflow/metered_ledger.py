"""The ledger as the DAGs use it: it counts what becomes of refunds."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING

from include.refunds.ledger import Ledger
from include.refunds.states import IN_DOUBT, PAID, Status
from include.refunds.waiting import oldest_approved_age
from payroc_airflow import metrics

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from include.refunds.classify import Verdict
    from include.refunds.refund import Refund
    from include.refunds.transitions import Change

log = logging.getLogger(__name__)

# What the refund was before the record that is being made, when that changes its status.
_before: ContextVar[Status | None] = ContextVar("before", default=None)


class MeteredLedger(Ledger):
    """The ledger, which counts an outcome once it is recorded; what is no change counts for nothing."""

    async def record(
        self, refund_id: int, verdict: Verdict, attempt: int | None = None, *, restored: bool = False
    ) -> tuple[Refund, datetime]:
        """Record as :meth:`Ledger.record` does, and count what the refund has become."""
        _before.set(None)
        refund, now = await super().record(refund_id, verdict, attempt, restored=restored)
        before = _before.get()
        if before is not None:
            _count(before, refund)
        return refund, now

    async def tell_oldest(self) -> None:
        """Tell for how long the refund that was approved first has been waiting."""
        if metrics.are_on():
            try:
                metrics.gauge("oldest_approved_age", await oldest_approved_age(self.engine, self._settings.source))
            except Exception as error:  # noqa: BLE001 - no figure may undo what was recorded
                log.warning("The age of the oldest approved refund was not told (%s).", type(error).__name__)

    async def _apply(self, connection: AsyncConnection, refund: Refund, change: Change, now: datetime, *, ends_lease: bool) -> None:
        await super()._apply(connection, refund, change, now, ends_lease=ends_lease)
        # The row is locked, so nobody else's change is counted with this one.
        if change.steps:
            _before.set(refund.status)


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
