"""
The limits of the sending: which refunds pass the gate, which are held, which wait. Pure functions.

The ledger reads everything under its lock, asks here, and writes the answer. Velocity caps and duplicate checks are what Nacha's rule
on fraud monitoring asks of originators that are no consumers (https://www.nacha.org/rules/risk-management-topics-fraud-monitoring-phase-1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from include.refunds.money import money
from include.refunds.states import REPLACEABLE, Status

Totals = Mapping[str, Mapping[str, int]]

_MOST_NAMED = 3

_UNPAID = REPLACEABLE | {Status.CANCELLED}


@dataclass(frozen=True, slots=True)
class Limits:
    """
    What people set; ``None`` lets pass. Amounts are in minor units, and each currency is held against them by itself.

    :param largest_refund: amount of one refund; a larger one is held.
    :param run_total: sum of what one run releases; the rest waits.
    :param run_count: number of refunds that one run releases; the rest waits.
    :param day_total: sum of what a day releases, in the setting ``TIMEZONE``; the rest waits.
    :param day_count: number of refunds that a day releases; the rest waits.
    :param payee_total: sum for one payee within ``payee_days``; what goes over it is held.
    :param payee_count: number of refunds for one payee within ``payee_days``; what goes over it is held.
    :param payee_days: days of those two.
    :param duplicate_days: days within which a refund of the same payee and amount as another one is held.
    :param approval_total: sum released in a day without a person, this run included; above it a person is asked.
    :param approval_count: number of refunds released in a day without a person, this run included; above it a person is asked.
    """

    largest_refund: int | None = None
    run_total: int | None = None
    run_count: int | None = None
    day_total: int | None = None
    day_count: int | None = None
    payee_total: int | None = None
    payee_count: int | None = None
    payee_days: int | None = None
    duplicate_days: int | None = None
    approval_total: int | None = None
    approval_count: int | None = None

    @property
    def looks_back(self) -> timedelta:
        """How far back the gate has to know what it let through to the same payees."""
        return timedelta(days=max(self.payee_days or 0, self.duplicate_days or 0))


LIMITS = tuple(item.name for item in fields(Limits))


@dataclass(frozen=True, slots=True)
class AtTheGate:
    """
    A refund that asks to be let through, or one that was.

    :param payee: the payee's fingerprint.
    :param released_holds: holds that a person has released.
    :param first_released_at: when it first passed the gate.
    """

    id: int
    order_id: str
    amount: int
    currency: str
    payee: str
    status: Status
    released_holds: tuple[str, ...]
    first_released_at: datetime | None


@dataclass(frozen=True, slots=True)
class Hold:
    """
    Why a refund is held.

    :param names: what a person releases; the same hold is not put on again.
    :param reason: the sentence for people.
    """

    names: tuple[str, ...]
    reason: str


@dataclass(slots=True)
class GateDecision:
    """
    What the gate decides.

    :param released: ids that pass, oldest approval first.
    :param held: holds by id.
    :param waiting: the cap that leaves no room, by id.
    :param counted: sums of those that pass for the first time, per currency.
    """

    released: list[int] = field(default_factory=list)
    held: dict[int, Hold] = field(default_factory=dict)
    waiting: dict[int, str] = field(default_factory=dict)
    counted: dict[str, dict[str, int]] = field(default_factory=dict)


def totals(amounts: Iterable[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Return count and sum per currency, of (currency, amount in minor units) pairs."""
    result: dict[str, dict[str, int]] = {}
    for currency, amount in amounts:
        _add(result, currency, 1, amount)
    return result


def added(one: Totals, other: Totals) -> dict[str, dict[str, int]]:
    """Return the sums of both, per currency."""
    result: dict[str, dict[str, int]] = {}
    for currency, entry in (*one.items(), *other.items()):
        _add(result, currency, entry["count"], entry["amount"])
    return result


def day_start(now: datetime, timezone: str) -> datetime:
    """Return when the day of an instant began."""
    # Where a day has two midnights, it began with the first.
    return now.astimezone(ZoneInfo(timezone)).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)


def decide_at_gate(
    asking: Sequence[AtTheGate],
    limits: Limits,
    *,
    run: Totals,
    day: Totals,
    earlier: Sequence[AtTheGate],
    now: datetime,
) -> GateDecision:
    """
    Decide who passes.

    What breaks a rule by itself (its amount, its payee, a possible duplicate) is held for a person. What only finds no room under a
    cap of the run or the day waits, and a smaller one behind it may still fit. A refund is counted once, when it first passes.

    :param asking: refunds that nothing else stops, oldest approval first.
    :param run: what the run has released before, per currency.
    :param day: what the day has released before, per currency.
    :param earlier: what was let through to the same payees, as far back as the limits look.
    """
    decision = GateDecision()
    of_payee: dict[str, list[AtTheGate]] = {}
    for item in earlier:
        of_payee.setdefault(item.payee, []).append(item)
    run_so_far, day_so_far = added(run, {}), added(day, {})
    for item in asking:
        others = of_payee.setdefault(item.payee, [])
        hold = _hold(item, limits, [other for other in others if _passed_before(other, item)], now)
        if hold is not None:
            decision.held[item.id] = hold
            continue
        if item.first_released_at is None:
            cap = _full(item, limits, run=run_so_far, day=day_so_far)
            if cap is not None:
                decision.waiting[item.id] = cap
                continue
            for so_far in (run_so_far, day_so_far, decision.counted):
                _add(so_far, item.currency, 1, item.amount)
            others.append(replace(item, status=Status.RELEASED, first_released_at=now))
        decision.released.append(item.id)
    return decision


def who_to_ask(limits: Limits, *, today: Totals, run: Totals, rejected: int = 0) -> str | None:
    """
    Return why a person has to approve a run, or ``None`` when nobody has to.

    What a person rejected once takes a person, whatever the thresholds say by then.

    :param today: what the day has released without a person before, per currency.
    :param run: what this run would release for the first time, per currency.
    :param rejected: how many of the run's refunds were in a run that a person rejected.
    """
    if rejected:
        return f"{rejected} of these refunds were in a run that was rejected."
    if not run:
        return None
    both = added(today, run)
    count = sum(entry["count"] for entry in both.values())
    if limits.approval_count is not None and count > limits.approval_count:
        return f"With this run {count} refunds are released today without a person; more than {limits.approval_count} take one."
    for currency in sorted(run):
        amount = both[currency]["amount"]
        if limits.approval_total is not None and amount > limits.approval_total:
            return (
                f"With this run {money(amount, currency)} are released today without a person; "
                f"more than {money(limits.approval_total, currency)} take one."
            )
    return None


def _hold(item: AtTheGate, limits: Limits, others: Sequence[AtTheGate], now: datetime) -> Hold | None:
    found = {
        **_too_large(item, limits),
        **_payee_has_enough(item, limits, others, now),
        **_duplicates(item, limits, others, now),
    }
    left = {name: reason for name, reason in found.items() if name not in item.released_holds}
    if not left:
        return None
    return Hold(tuple(left), " ".join(dict.fromkeys(left.values())))


def _too_large(item: AtTheGate, limits: Limits) -> dict[str, str]:
    if limits.largest_refund is None or item.amount <= limits.largest_refund:
        return {}
    most = money(limits.largest_refund, item.currency)
    return {
        "largest_refund": f"Held: {money(item.amount, item.currency)} is more than the largest refund that passes by itself, {most}."
    }


def _payee_has_enough(
    item: AtTheGate, limits: Limits, others: Sequence[AtTheGate], now: datetime
) -> dict[str, str]:
    if limits.payee_days is None:
        return {}
    within = [other for other in others if _is_within(other, limits.payee_days, now)]
    amount = item.amount + sum(other.amount for other in within if other.currency == item.currency)
    found = {}
    if limits.payee_total is not None and amount > limits.payee_total:
        most = money(limits.payee_total, item.currency)
        found["payee_total"] = (
            f"Held: its payee would get {money(amount, item.currency)} within {limits.payee_days} days, more than {most}."
        )
    if limits.payee_count is not None and len(within) + 1 > limits.payee_count:
        found["payee_count"] = (
            f"Held: it would be refund number {len(within) + 1} to its payee within {limits.payee_days} days; {limits.payee_count} pass."
        )
    return found


def _duplicates(
    item: AtTheGate, limits: Limits, others: Sequence[AtTheGate], now: datetime
) -> dict[str, str]:
    if limits.duplicate_days is None:
        return {}
    same = [
        other
        for other in others
        if (other.amount, other.currency) == (item.amount, item.currency)
        and _is_within(other, limits.duplicate_days, now)
    ]
    named = ", ".join(f"refund {other.id} (order {other.order_id})" for other in same[:_MOST_NAMED])
    more = f" and {len(same) - _MOST_NAMED} more" if len(same) > _MOST_NAMED else ""
    reason = f"Held: possible duplicate of {named}{more}: the same payee and amount within {limits.duplicate_days} days."
    return {f"duplicate of {other.id}": reason for other in same}


def _passed_before(other: AtTheGate, item: AtTheGate) -> bool:
    """Tell whether a refund to the same payee counts against this one: what ended without money at the payee does not."""
    if other.id == item.id or other.first_released_at is None or other.status in _UNPAID:
        return False
    # Of two that passed, the later one answers for the earlier one, and never both for each other.
    return item.first_released_at is None or (other.first_released_at, other.id) < (
        item.first_released_at,
        item.id,
    )


def _is_within(other: AtTheGate, days: int, now: datetime) -> bool:
    return other.first_released_at is not None and other.first_released_at > now - timedelta(days=days)


def _full(item: AtTheGate, limits: Limits, *, run: Totals, day: Totals) -> str | None:
    """Return the name of the cap that leaves no room for one more refund."""
    for prefix, used in (("run", run), ("day", day)):
        most_refunds: int | None = getattr(limits, f"{prefix}_count")
        if most_refunds is not None and sum(entry["count"] for entry in used.values()) + 1 > most_refunds:
            return f"{prefix}_count"
        most: int | None = getattr(limits, f"{prefix}_total")
        amount = used.get(item.currency, {"amount": 0})["amount"] + item.amount
        if most is not None and amount > most:
            return f"{prefix}_total"
    return None


def _add(sums: dict[str, dict[str, int]], currency: str, count: int, amount: int) -> None:
    entry = sums.setdefault(currency, {"count": 0, "amount": 0})
    entry["count"] += count
    entry["amount"] += amount
