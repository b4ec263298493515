"""The limits, watched from outside: what passed the gate is counted here once more, by rules written down once more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from include.refunds.states import Status
from tests.simulation.engine import Violation
from tests.simulation.ledger import MemoryLedger, Row

_UNPAID = (Status.REJECTED, Status.RETURNED, Status.REVERSED, Status.CANCELLED)


@dataclass(frozen=True, slots=True)
class Counted:
    """A refund's first way through the gate."""

    id: int
    at: datetime
    run_id: str
    by: str | None


class LimitsKept:
    """
    Keeps the books of the gate.

    :param ledger: whose rows and limits are looked at.
    """

    def __init__(self, ledger: MemoryLedger) -> None:
        self._ledger = ledger
        self._counted: dict[int, Counted] = {}
        self._released_holds: dict[int, set[str]] = {}

    def hold_released(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: None) -> None:
        """Somebody released a hold."""
        row = self._ledger.rows[args[0]]
        if self._ledger.actor == row.requested_by:
            raise Violation(f"{row.requested_by} requested {row.source_ref} and lifts its hold.")
        self._released_holds[row.id] = set(row.released_holds)

    def released(self, run_id: str, refund_ids: Sequence[int], *, by: str | None) -> None:
        """
        A run lets refunds pass.

        :param by: who approved exactly this run; nobody, when it passed by itself.
        """
        now = self._ledger.clock()
        new = [refund_id for refund_id in refund_ids if refund_id not in self._counted]
        for refund_id in refund_ids:
            row = self._ledger.rows[refund_id]
            self._check_own(row, now)
            self._counted.setdefault(refund_id, Counted(refund_id, now, run_id, by))
        if new:
            self._check_sums(run_id, now, by)

    def _check_own(self, row: Row, now: datetime) -> None:
        limits, pardoned = self._ledger.limited, self._released_holds.get(row.id, set())
        if (
            limits.largest_refund is not None
            and row.amount > limits.largest_refund
            and "largest_refund" not in pardoned
        ):
            raise Violation(
                f"{row.source_ref} passes the gate with {row.amount}, and {limits.largest_refund} is the most."
            )
        same_payee = self._counted_before(row)
        if limits.payee_days is not None:
            within = [
                other for item, other in same_payee if item.at > now - timedelta(days=limits.payee_days)
            ]
            self._check_payee(row, within, pardoned)
        if limits.duplicate_days is not None:
            for item, other in same_payee:
                near = item.at > now - timedelta(days=limits.duplicate_days)
                pardon = f"duplicate of {other.id}" in pardoned
                if near and other.amount == row.amount and not pardon:
                    raise Violation(
                        f"{row.source_ref} passes the gate, and nobody looked at its likeness to {other.source_ref}."
                    )

    def _counted_before(self, row: Row) -> list[tuple[Counted, Row]]:
        """Return what passed to the same payee before this one, and did not end without money there."""
        mine = self._counted.get(row.id)
        found = []
        for item in self._counted.values():
            other = self._ledger.rows[item.id]
            before = mine is None or (item.at, item.id) < (mine.at, mine.id)
            if (
                item.id != row.id
                and before
                and other.payee_fingerprint == row.payee_fingerprint
                and other.status not in _UNPAID
            ):
                found.append((item, other))
        return found

    def held(self, row: Row) -> None:
        """A refund is held: something must be wrong with it."""
        pardoned, self._released_holds[row.id] = (
            self._released_holds.get(row.id, set()),
            set(row.released_holds),
        )
        try:
            self._check_own(row, self._ledger.clock())
        except Violation:
            return
        finally:
            self._released_holds[row.id] = pardoned
        raise Violation(f"{row.source_ref} is held, and no limit stands against it: {row.reason}")

    def _check_payee(self, row: Row, within: Sequence[Row], pardoned: set[str]) -> None:
        limits = self._ledger.limited
        amount = row.amount + sum(other.amount for other in within)
        if limits.payee_total is not None and amount > limits.payee_total and "payee_total" not in pardoned:
            raise Violation(
                f"With {row.source_ref} {amount} pass the gate for one payee, and {limits.payee_total} is the most."
            )
        if (
            limits.payee_count is not None
            and len(within) + 1 > limits.payee_count
            and "payee_count" not in pardoned
        ):
            raise Violation(f"With {row.source_ref} {len(within) + 1} refunds pass the gate for one payee.")

    def _check_sums(self, run_id: str, now: datetime, by: str | None) -> None:
        limits = self._ledger.limited
        midnight = now.astimezone(ZoneInfo(self._ledger.settings.timezone)).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
        today = [item for item in self._counted.values() if item.at >= midnight]
        self._check_sum(
            f"{run_id} lets",
            (item for item in self._counted.values() if item.run_id == run_id),
            limits.run_count,
            limits.run_total,
        )
        self._check_sum("A day lets", today, limits.day_count, limits.day_total)
        if by is None:
            alone = [item for item in today if item.by is None]
            self._check_sum(
                f"With {run_id} and without a person, a day lets",
                alone,
                limits.approval_count,
                limits.approval_total,
            )

    def _check_sum(
        self, who: str, items: Iterable[Counted], most_refunds: int | None, most: int | None
    ) -> None:
        amounts = [self._ledger.rows[item.id].amount for item in items]
        if most_refunds is not None and len(amounts) > most_refunds:
            raise Violation(f"{who} {len(amounts)} refunds pass the gate, and {most_refunds} is the most.")
        if most is not None and sum(amounts) > most:
            raise Violation(f"{who} {sum(amounts)} pass the gate, and {most} is the most.")
