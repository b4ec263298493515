"""The ledger as the DAGs use it: it counts what becomes of refunds."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import text

from include.refunds.ledger import Ledger
from include.refunds.states import IN_DOUBT, PAID, Status
from include.refunds.waiting import oldest_approved_age
from payroc_airflow import metrics

if TYPE_CHECKING:
    from include.refunds.classify import Verdict
    from include.refunds.refund import Refund

log = logging.getLogger(__name__)


class MeteredLedger(Ledger):
    """The ledger, which counts an outcome once it is recorded, and as its events tell it: what is no change counts for nothing."""

    async def record(
        self, refund_id: int, verdict: Verdict, attempt: int | None = None, *, restored: bool = False
    ) -> tuple[Refund, datetime]:
        """Record as :meth:`Ledger.record` does, and count what the refund has become."""
        refund, now = await super().record(refund_id, verdict, attempt, restored=restored)
        if metrics.are_on():
            try:
                await self._count(refund, now)
            except Exception as error:  # noqa: BLE001 - the outcome is recorded, and no figure may undo that
                log.warning("An outcome was not counted (%s).", type(error).__name__)
        return refund, now

    async def tell_oldest(self) -> None:
        """Tell for how long the refund that was approved first has been waiting."""
        if metrics.are_on():
            try:
                metrics.gauge("oldest_approved_age", await oldest_approved_age(self.engine, self._settings.source))
            except Exception as error:  # noqa: BLE001 - as above
                log.warning("The age of the oldest approved refund was not told (%s).", type(error).__name__)

    async def _count(self, refund: Refund, now: datetime) -> None:
        query = text("""
            SELECT from_status, to_status FROM refund_ledger.refund_events
            WHERE refund_id = :id AND event = 'status' AND at = :now AND from_status <> to_status ORDER BY id""")
        async with self._transaction() as (connection, _):
            steps = (await connection.execute(query, {"id": refund.id, "now": now})).all()
        if not steps:
            return
        before, after = Status(steps[0].from_status), Status(steps[-1].to_status)
        if after in PAID and before not in PAID:
            metrics.count("accepted")
            metrics.count(f"amount.{refund.currency}", refund.amount)
        elif after in (Status.REJECTED, Status.UNKNOWN, Status.REVIEW, Status.RETURNED):
            metrics.count(after.value)
        if before in IN_DOUBT and after in {*PAID, Status.REJECTED}:
            metrics.count("attempts", refund.attempts)
