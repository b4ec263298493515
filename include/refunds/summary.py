"""The daily summary: what became of refunds, what waits, and the last two weeks; read from the ledger, counts and sums only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from include.refunds.ledger.connection import Connection, LedgerEngine
from include.refunds.message import Message, environment
from include.refunds.money import money, sums
from include.refunds.report import Total, pause_sentences, total_of
from include.refunds.unwritten import Unwritten, unwritten_refunds

CHART_DAYS = 14

# What a refund may become that ends it, or nearly, and what it waits as.
_OUTCOMES = ("accepted", "settled", "rejected", "returned", "reversed", "cancelled")
_WAITING = ("approved", "held", "released", "sending", "unknown", "review")

# What the words mean, for whoever reads a mail and not the documentation.
MEANINGS: Mapping[str, str] = {
    "approved": "wait for the next run, or for room under a limit",
    "held": "a limit holds them until a person decides",
    "released": "let through and not sent: the next run takes them up",
    "sending": "a worker is at it, or died at it",
    "unknown": "Payroc has not told what became of them",
    "review": "people have to look at them",
}


@dataclass(frozen=True, slots=True)
class Day:
    """
    What became of refunds on one day.

    :param paid: refunds that Payroc accepted.
    :param unpaid: refunds that were rejected, returned or reversed.
    :param amounts: what was accepted, in minor units by currency.
    """

    date: date
    paid: int
    unpaid: int
    amounts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Run:
    """A run that began in the time of the summary; ``state`` is Airflow's word for it, which the ledger does not know."""

    run_id: str
    started_at: datetime
    released: str
    state: str = ""


@dataclass(slots=True)
class Summary:
    """
    What a summary tells.

    :param since: begin of its time.
    :param until: its end, and the moment at which it was made.
    :param outcomes: what refunds became in that time.
    :param waiting: what waits at its end.
    :param totals: all refunds of the ledger at its end.
    :param pauses: what is paused, a sentence each.
    :param oldest: since when the refund that was approved first has been waiting.
    :param days: the last days, the oldest first.
    :param runs: the runs that began in that time, the oldest first.
    :param unwritten: rows of refunds in the source that could not be written.
    """

    since: datetime
    until: datetime
    outcomes: list[Total] = field(default_factory=list)
    waiting: list[Total] = field(default_factory=list)
    totals: list[Total] = field(default_factory=list)
    pauses: list[str] = field(default_factory=list)
    oldest: datetime | None = None
    days: list[Day] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    unwritten: Unwritten = field(default_factory=Unwritten)

    @property
    def day(self) -> date:
        """The day that it is about."""
        return self.until.date()

    @property
    def failed_runs(self) -> list[Run]:
        """The runs that Airflow calls failed."""
        return [run for run in self.runs if run.state == "failed"]


async def read_summary(
    engine: LedgerEngine, source: str, *, since: datetime, until: datetime, timezone: str
) -> Summary:
    """
    Read what a summary tells. The rights of the payer or the auditor are enough.

    :param source: the source's fixed name.
    :param since: from this instant, exclusive.
    :param until: up to this instant; what waits is read as it is now.
    :param timezone: whose days the chart has, and whose time the summary tells.
    """
    zone = ZoneInfo(timezone)
    summary = Summary(since.astimezone(zone), until.astimezone(zone))
    async with engine.begin("repeatable_read", readonly=True) as connection:
        summary.outcomes = await _outcomes(connection, source, since, until)
        summary.totals = await _totals(connection, source)
        summary.waiting = sorted(
            (t for t in summary.totals if t.status in _WAITING), key=lambda t: _WAITING.index(t.status)
        )
        summary.pauses = await pause_sentences(connection)
        oldest = "SELECT min(approved_at) FROM refund_ledger.refunds WHERE source = :source AND status IN ('approved', 'held')"
        found = (await connection.execute(oldest, {"source": source})).scalar_one()
        summary.oldest = found.astimezone(zone) if found else None
        summary.unwritten = (await unwritten_refunds(connection, source)).at_zone(zone)
        summary.days = await _days(connection, source, summary.until)
        runs = """
            SELECT run_id, started_at, released_totals FROM refund_ledger.refund_runs
            WHERE started_at > :since AND started_at <= :until ORDER BY started_at"""
        for row in await connection.execute(runs, {"since": since, "until": until}):
            released = sums(row.released_totals) if row.released_totals is not None else "nothing"
            summary.runs.append(Run(row.run_id, row.started_at.astimezone(zone), released))
    return summary


def as_message(summary: Summary, *, url: str) -> Message:
    """
    Return the summary as people read it: HTML for a mail and for a file, and a short text.

    :param url: the DAG's run in Airflow, for the link.
    """
    most = max((day.paid + day.unpaid for day in summary.days), default=0)
    accepted = _by_currency(summary.outcomes, "accepted")
    needs = [
        f"{total.count:,} {total.status}"
        for total in summary.waiting
        if total.status in ("held", "review", "unknown")
    ]
    if summary.unwritten.count:
        needs.append(f"{summary.unwritten.count:,} not written back")
    headline = [f"{sums(accepted)} accepted", *needs, *(["sending paused"] if summary.pauses else [])]
    values: dict[str, Any] = {
        "summary": summary,
        "accepted": accepted,
        "url": url,
        "meanings": MEANINGS,
        "most": most,
        "waits": _age(summary.until - summary.oldest) if summary.oldest else None,
        "alert": bool(
            summary.pauses
            or summary.failed_runs
            or summary.unwritten.count
            or any(total.status == "review" for total in summary.waiting)
        ),
    }
    html = environment().get_template("summary.html").render(values)
    return Message(
        f"Payroc refunds: {summary.day:%a %d %b}, {', '.join(headline)}",
        _text(summary, headline, url),
        html,
        url,
    )


async def _outcomes(connection: Connection, source: str, since: datetime, until: datetime) -> list[Total]:
    query = """
        SELECT status, currency, count(*) AS count, sum(amount) AS amount FROM (
            SELECT DISTINCT r.id, e.to_status AS status, r.currency, r.amount
            FROM refund_ledger.refunds AS r JOIN refund_ledger.refund_events AS e ON e.refund_id = r.id
            WHERE r.source = :source AND e.event = 'status' AND e.at > :since AND e.at <= :until
              AND e.to_status = ANY(:outcomes) AND e.from_status IS DISTINCT FROM e.to_status) AS became
        GROUP BY status, currency"""
    values = {"source": source, "since": since, "until": until, "outcomes": list(_OUTCOMES)}
    found = [total_of(row) for row in (await connection.execute(query, values))]
    return sorted(found, key=lambda total: (_OUTCOMES.index(total.status), total.currency))


async def _totals(connection: Connection, source: str) -> list[Total]:
    query = """
        SELECT status, currency, count(*) AS count, sum(amount) AS amount FROM refund_ledger.refunds
        WHERE source = :source GROUP BY status, currency ORDER BY status, currency"""
    return [total_of(row) for row in (await connection.execute(query, {"source": source}))]


async def _days(connection: Connection, source: str, until: datetime) -> list[Day]:
    """Return the days of the chart, those without a refund too. A refund counts once on a day as paid, and once as not paid."""
    zone = until.tzinfo
    first = until.date() - timedelta(days=CHART_DAYS - 1)
    query = """
        SELECT day, paid, currency, count(*) AS count, sum(amount) AS amount FROM (
            SELECT DISTINCT r.id, (e.at AT TIME ZONE :zone)::date AS day, e.to_status IN ('accepted', 'settled') AS paid,
                   r.currency, r.amount
            FROM refund_ledger.refunds AS r JOIN refund_ledger.refund_events AS e ON e.refund_id = r.id
            WHERE r.source = :source AND e.event = 'status' AND e.at >= :start AND e.at <= :until
              AND (e.to_status IN ('rejected', 'returned', 'reversed') OR e.to_status = 'accepted'
                   OR (e.to_status = 'settled' AND e.from_status IN ('sending', 'unknown')))
              AND e.from_status IS DISTINCT FROM e.to_status) AS became
        GROUP BY day, paid, currency ORDER BY day, currency"""
    start = datetime(first.year, first.month, first.day, tzinfo=zone)
    values = {"source": source, "zone": str(zone), "start": start, "until": until}
    rows = await connection.execute(query, values)
    return [_day(first + timedelta(days=number), rows) for number in range(CHART_DAYS)]


def _day(day: date, rows: Sequence[Any]) -> Day:
    ours = [row for row in rows if row.day == day]
    return Day(
        day,
        paid=sum(row.count for row in ours if row.paid),
        unpaid=sum(row.count for row in ours if not row.paid),
        amounts={row.currency: int(row.amount) for row in ours if row.paid},
    )


def _by_currency(totals: Sequence[Total], status: str) -> dict[str, dict[str, int]]:
    return {
        total.currency: {"count": total.count, "amount": total.amount}
        for total in totals
        if total.status == status
    }


def _age(age: timedelta) -> str:
    hours = age.total_seconds() / 3600
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    return f"{hours:.0f} hours" if hours >= 2 else f"{hours * 60:.0f} minutes"


def _text(summary: Summary, headline: Sequence[str], url: str) -> str:
    lines = [
        f"Refunds from {summary.since:%a %d %b %H:%M} to {summary.until:%a %d %b %H:%M %Z}",
        "",
        ", ".join(headline),
    ]
    for name, totals in (("Became", summary.outcomes), ("Waiting", summary.waiting)):
        if totals:
            lines += [
                "",
                f"{name}:",
                *(f"  {t.status:<10} {t.count:>6,}  {money(t.amount, t.currency):>18}" for t in totals),
            ]
    lines += ["", *summary.pauses] if summary.pauses else []
    lines += ["", "Not written back:", *summary.unwritten.sentences()] if summary.unwritten.count else []
    lines += ["", f"Runs: {len(summary.runs)}, failed: {len(summary.failed_runs)}"]
    return "\n".join([*lines, *(["", url] if url else [])]) + "\n"
