"""Reports: what a run did and what needs people, read from the ledger and from nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from include.refunds.audit import Head, head_of
from include.refunds.business_days import business_days_between
from include.refunds.keys import idempotency_key
from include.refunds.ledger.connection import Connection, LedgerEngine, Row
from include.refunds.ledger.write_backs import NEWEST
from include.refunds.money import money, sums
from include.refunds.printable import printable, visible
from include.refunds.states import IN_DOUBT
from include.refunds.terminal_lists import list_sentences
from include.refunds.unwritten import (
    doubled_sentence,
    first_of,
    other_unwritten_rows,
    unwritten_refunds,
)

# A report stays readable: of more refunds than this, only those that did not go as expected are listed.
_MOST_LINES = 500
_EXPECTED = ("accepted", "settled")
_MOST_NOTES = 50

# Characters of a cell of the report's table. An order id has 24; a long text would push the next columns away.
_CELL = 60

# Accepted is normal for this many business days, pending and not looked at for that many; then people are told.
_ACCEPTED_DAYS = 5
_PENDING_DAYS = 2
_UNSEEN_DAYS = 2

# In doubt is normal for minutes, and for an hour when a worker was killed.
_IN_DOUBT_FOR = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Line:
    """One refund, as people see it."""

    id: int
    order_id: str
    amount: int
    currency: str
    payee_last4: str | None
    status: str
    payroc_refund_id: str | None
    attempts: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class Total:
    """Count and sum of the refunds of one status and currency, in minor units."""

    status: str
    currency: str
    count: int
    amount: int


@dataclass(slots=True)
class Report:
    """
    What people need to know.

    :param refunds: the run's refunds, and every other one that needs people.
    :param invalid: errors of source rows, by source_ref and column.
    :param notes: sentences about anything else that asks for attention.
    :param unfinished: sentences for which a run counts as failed.
    :param rejected: a person rejected the run, so that nothing was released.
    :param waiting: refunds wait for room under a limit.
    :param paused: sending is paused, for all or for a terminal.
    :param unwritten: rows of refunds in the source that could not be written.
    :param audit_head: the end of the audit trail, for people to keep.
    """

    title: str
    refunds: list[Line] = field(default_factory=list)
    totals: list[Total] = field(default_factory=list)
    invalid: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    rejected: bool = False
    waiting: bool = False
    paused: bool = False
    unwritten: int = 0
    audit_head: Head | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the totals and sentences as JSON: counts and sums, no refund and no bank data."""
        return {
            "totals": [
                {"status": t.status, "currency": t.currency, "count": t.count, "amount": t.amount}
                for t in self.totals
            ],
            "invalid_rows": len(self.invalid),
            "unwritten_rows": self.unwritten,
            "notes": self.notes,
            "unfinished": self.unfinished,
            "audit_head": str(self.audit_head) if self.audit_head else None,
        }

    def __str__(self) -> str:
        parts = [self.title, ""]
        shown = (
            self.refunds
            if len(self.refunds) <= _MOST_LINES
            else [line for line in self.refunds if line.status not in _EXPECTED]
        )
        shown = shown[:_MOST_LINES]
        if shown:
            parts += [*_table(shown), ""]
        if len(shown) < len(self.refunds):
            parts += [
                f"{len(self.refunds) - len(shown)} more are not listed: `python -m include.refunds show ID` shows each.",
                "",
            ]
        if self.invalid:
            parts += ["Invalid source rows:"]
            parts += [
                f"  {printable(ref)}: "
                + "; ".join(f"{printable(name)} {printable(what)}" for name, what in errors.items())
                for ref, errors in self.invalid.items()
            ]
            parts += [""]
        parts += [
            "Totals:",
            *(f"  {t.status:<10} {t.count:>6}  {money(t.amount, t.currency):>18}" for t in self.totals),
        ]
        if not self.totals:
            parts[-1] = (
                "No refunds: nothing was approved, so nothing was sent."
                if not self.unfinished
                else "No refunds."
            )
        parts += [f"Note: {note}" for note in self.notes]
        parts += [f"Unfinished: {what}" for what in self.unfinished]
        if self.audit_head:
            parts += [f"Audit trail: {self.audit_head.position} events, head {self.audit_head}"]
        return "\n".join(map(visible, parts))


# One branch per index: a single OR over them would read the whole ledger.
_OF_RUN = """id IN (
    SELECT refund_id FROM refund_ledger.first_releases WHERE run = :run_id
    UNION SELECT refund_id FROM refund_ledger.refund_attempts WHERE run_id = :run_id
    UNION SELECT id FROM refund_ledger.refunds
        WHERE status IN ('approved', 'released') AND released_run = :run_id
    UNION SELECT id FROM refund_ledger.refunds WHERE status IN ('held', 'sending', 'unknown', 'review'))"""


async def run_report(engine: LedgerEngine, source: str, run_id: str) -> Report:
    """
    Report a run of ``payroc_refunds``.

    :param source: the source's fixed name.
    :param run_id: Airflow's run id.
    """
    async with engine.connect() as connection:
        run = await connection.execute(
            "SELECT * FROM refund_ledger.refund_runs WHERE run_id = :id", {"id": run_id}
        )
        row = run.one_or_none()
        report = Report(f"Refund run {printable(run_id)}")
        since = row["started_at"] if row else None
        report.refunds = await _lines(connection, _OF_RUN, {"source": source, "run_id": run_id})
        report.totals = totals_of(report.refunds)
        report.invalid = await _invalid(connection, source, since)
        if row is None:
            report.unfinished.append("The run stored no candidates: pull_approved did not finish.")
        else:
            _note_approval(report, row)
            _note_findings(report, row["findings"])
            if unsent := sum(line.status == "released" for line in report.refunds):
                report.unfinished.append(
                    f"{unsent} released and not sent: the log of send_refund says why; the next run takes them up."
                )
        await _note_state(connection, source, report, since)
        return report


async def status_report(engine: LedgerEngine, source: str) -> Report:
    """
    Report the whole ledger: totals of all refunds, and the refunds that need people or are on their way.

    :param source: the source's fixed name.
    """
    return await _ledger_report(engine, source, following=False)


async def follow_up_report(engine: LedgerEngine, source: str) -> Report:
    """
    Report the whole ledger after a follow-up: what time will tell is no failure, until it takes too long.

    :param source: the source's fixed name.
    """
    return await _ledger_report(engine, source, following=True)


async def _ledger_report(engine: LedgerEngine, source: str, *, following: bool) -> Report:
    async with engine.connect() as connection:
        now = (await connection.execute("SELECT refund_ledger.now()")).scalar_one()
        report = Report(f"Refund ledger at {now:%Y-%m-%d %H:%M %Z}")
        report.refunds = await _lines(
            connection,
            "status IN ('approved', 'held', 'released', 'sending', 'unknown', 'review')",
            {"source": source},
        )
        query = """
            SELECT status, currency, count(*) AS count, sum(amount) AS amount
            FROM refund_ledger.refunds WHERE source = :source
            GROUP BY status, currency ORDER BY status, currency"""
        report.totals = [total_of(row) for row in (await connection.execute(query, {"source": source}))]
        since = now - timedelta(days=7)
        report.invalid = await _invalid(connection, source, since)
        await _note_state(connection, source, report, since, following=following)
        return report


@dataclass(frozen=True, slots=True)
class Match:
    """A refund that a text given to ``show`` may mean."""

    id: int
    order_id: str
    source_ref: str
    processing_terminal_id: str
    amount: int
    currency: str
    status: str


async def find(
    engine: LedgerEngine, source: str, which: str, *, by_id: bool = False, limit: int
) -> list[Match]:
    """
    Return the refunds that a text may mean, by their ids.

    :param which: the ledger's id, the order id, the source_ref or Payroc's refund id.
    :param by_id: it is the ledger's id and nothing else.
    :param limit: return at most so many.
    """
    # One branch for each index. A source_ref is found by the key that derives from it.
    conditions = ["id = :id"]
    if not by_id:
        conditions += ["order_id = :which", "payroc_refund_id = :which", "idempotency_key = :key"]
    found = " UNION ".join(f"SELECT id FROM refund_ledger.refunds WHERE {each}" for each in conditions)
    query = f"""
        SELECT {", ".join(Match.__slots__)} FROM refund_ledger.refunds
        WHERE source = :source AND id IN ({found}) ORDER BY id LIMIT :limit"""
    refund_id = int(which) if re.fullmatch("[1-9][0-9]{0,17}", which) else None
    key = idempotency_key(source, which)
    values = {"source": source, "which": which, "id": refund_id, "key": key, "limit": limit}
    async with engine.connect() as connection:
        return [Match(**row) for row in await connection.execute(query, values)]


async def details(engine: LedgerEngine, refund_id: int) -> dict[str, Any]:
    """Return a refund with its attempts and events, without its request. Instants are in UTC."""
    async with engine.begin() as connection:
        await connection.execute("SET LOCAL TIME ZONE 'UTC'")
        query = """
            SELECT to_jsonb(r) - 'payee_fingerprint' - 'has_request' - 'request_key' FROM refund_ledger.refunds AS r
            WHERE id = :id"""
        found: dict[str, Any] = (await connection.execute(query, {"id": refund_id})).scalar_one()
        for name, order in (("refund_attempts", "attempt"), ("refund_events", "id")):
            rows = f"SELECT to_jsonb(t) - 'refund_id' FROM refund_ledger.{name} AS t WHERE refund_id = :id ORDER BY {order}"
            found[name.removeprefix("refund_")] = list(
                (await connection.execute(rows, {"id": refund_id})).scalars()
            )
        return found


async def _lines(connection: Connection, condition: str, values: dict[str, Any]) -> list[Line]:
    columns = ", ".join(Line.__slots__)
    query = f"SELECT {columns} FROM refund_ledger.refunds WHERE source = :source AND ({condition}) ORDER BY approved_at, id"
    return [Line(**row) for row in (await connection.execute(query, values))]


async def _invalid(connection: Connection, source: str, since: datetime | None) -> dict[str, dict[str, str]]:
    query = """
        SELECT source_ref, errors FROM refund_ledger.invalid_rows
        WHERE source = :source AND (CAST(:since AS timestamptz) IS NULL OR last_seen_at >= :since) ORDER BY source_ref"""
    result = await connection.execute(query, {"source": source, "since": since})
    return {row.source_ref: row.errors for row in result}


def total_of(row: Row) -> Total:
    """Return the total in a row. A sum is numeric, so that none overflows."""
    return Total(row.status, row.currency, row.count, int(row.amount))


def totals_of(lines: Iterable[Line]) -> list[Total]:
    """Return count and sum per status and currency."""
    sums: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        entry = sums.setdefault((line.status, line.currency), [0, 0])
        entry[0] += 1
        entry[1] += line.amount
    return [
        Total(status, currency, count, amount) for (status, currency), (count, amount) in sorted(sums.items())
    ]


def _note_approval(report: Report, run: Row) -> None:
    if run["approved_by"]:
        report.notes.append(f"{printable(run['approved_by'])} approved the run.")
    if run["rejected_by"]:
        report.rejected = True
        report.notes.append(
            f"{printable(run['rejected_by'])} rejected the run: nothing was sent, "
            f"{sums(run['candidate_totals'])} stay approved."
        )
    elif run["released"] is None and run["approval_needed"] and not run["approved_by"]:
        report.unfinished.append(
            "Nobody approved the run, so nothing was sent: clear approve_run to ask again."
        )
    elif run["released"] is None:
        report.unfinished.append("Nothing was released.")


def _note_findings(report: Report, findings: dict[str, Any]) -> None:
    report.notes += findings.get("unmatched", [])
    report.notes += findings.get("lists", [])
    for source_ref, names in findings.get("changed", {}).items():
        report.notes.append(
            f"Source row {printable(source_ref)} changed after it was pulled ({printable(', '.join(names))}); "
            "give it a new source_ref."
        )
    for refund_id, what in findings.get("withdrawn", {}).items():
        report.notes.append(f"Refund {printable(refund_id)} was not released. {printable(what)}")
    for cap, waiting in findings.get("waiting", {}).items():
        report.waiting = True
        report.notes.append(
            f"Waiting: {sums(waiting)}. The limit {printable(cap)} leaves no room; the next runs go on, oldest first, "
            "and what is larger than the limit itself waits until it is raised."
        )
    report.notes += warning_notes(findings.get("warnings", {}))
    report.notes += written_again_notes(findings.get("written_again", 0), findings.get("still_offered", 0))
    doubled = [doubled_sentence(ref, touched) for ref, touched in findings.get("doubled", {}).items()]
    report.notes += first_of(doubled, _MOST_NOTES, "more source rows like these")


def written_again_notes(written_again: int, still_offered: int) -> list[str]:
    """Return notes about rows that the source offers although their refunds have ended."""
    notes = []
    if written_again:
        notes.append(
            f"{_rows(written_again)} offered again although the refund has ended; "
            "the outcome is written back again."
        )
    if still_offered:
        notes.append(
            f"{_rows(still_offered)} still offered although the refund has ended and this was written back "
            "twice: let select_approved.sql leave out ended refunds."
        )
    return notes


def _rows(count: int) -> str:
    return "1 source row is" if count == 1 else f"{count} source rows are"


def warning_notes(warnings: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the warnings about source rows as notes, by source_ref; of very many only the first."""
    notes = [
        f"Source row {printable(source_ref)}: {printable(what)}"
        for source_ref, said in warnings.items()
        for what in said
    ]
    return first_of(notes, _MOST_NOTES, "more warnings like these")


async def pause_sentences(connection: Connection) -> list[str]:
    """Return what is paused, by whom and why, a sentence each."""
    # The first of each scope, and beside it the restore that has to be compared with Payroc.
    query = """
        SELECT DISTINCT ON (scope, restored_to IS NULL) scope, reason, paused_by FROM refund_ledger.pauses
        WHERE ended_at IS NULL ORDER BY scope, restored_to IS NULL, id"""
    sentences = []
    for row in await connection.execute(query):
        scope = "Sending" if row.scope == "*" else f"Sending for terminal {printable(row.scope)}"
        sentences.append(f"{scope} is paused by {printable(row.paused_by)}: {printable(row.reason)}")
    return sentences


async def _note_state(
    connection: Connection,
    source: str,
    report: Report,
    since: datetime | None,
    *,
    following: bool = False,
) -> None:
    pauses = await pause_sentences(connection)
    report.paused = bool(pauses)
    report.unfinished += pauses
    counts = (
        "SELECT status, count(*) AS count FROM refund_ledger.refunds WHERE source = :source "
        "AND status IN ('sending', 'unknown', 'review', 'held') GROUP BY status"
    )
    found = {row.status: row.count for row in await connection.execute(counts, {"source": source})}
    for status, sentence in _UNFINISHED.items():
        if status in found:
            # A run leaves a refund in doubt unfinished; to the follow-up it is only what it is there for.
            kind = report.notes if following and status in IN_DOUBT else report.unfinished
            kind.append(f"{found[status]} {sentence}")
    if "held" in found:
        report.notes.append(
            f"{found['held']} held: `python -m include.refunds unhold ID` lifts one hold, "
            "`cancel ID` ends the refund; an operator who did not request it decides."
        )
    open_ = """
        SELECT id, order_id, status, payroc_status, COALESCE(first_sent_at, payroc_seen_at, updated_at) AS first_sent_at,
               payroc_seen_at, refund_ledger.now() AS now FROM refund_ledger.refunds
        WHERE source = :source AND status IN ('accepted', 'sending', 'unknown') ORDER BY id"""
    late = [
        f"Refund {row.id} (order {printable(row.order_id)}) {what}."
        for row in await connection.execute(open_, {"source": source})
        if (what := _late(row))
    ]
    late = first_of(late, _MOST_NOTES, "more refunds are late like these")
    (report.unfinished if following else report.notes).extend(late)
    stuck = """
        SELECT r.id, r.replaces, replaced.status FROM refund_ledger.refunds AS r
        JOIN refund_ledger.refunds AS replaced ON replaced.id = r.replaces
        WHERE r.source = :source AND r.replaces IS NOT NULL
          AND r.status IN ('approved', 'held', 'released', 'sending', 'unknown')
          AND NOT refund_ledger.ended_unpaid(r.replaces)
        ORDER BY r.id"""
    for row in await connection.execute(stuck, {"source": source}):
        report.notes.append(
            f"Refund {row.id} is not sent: refund {row.replaces}, which it replaces, is {row.status}, and one of its chain may be paid."
        )
    lists = await list_sentences(connection, source, since)
    report.unfinished += lists.unfinished
    report.notes += lists.notes
    unwritten = await unwritten_refunds(connection, source)
    report.unwritten = unwritten.count
    report.unfinished += unwritten.sentences()
    report.notes += (await other_unwritten_rows(connection, source)).sentences()
    due = f"""
        SELECT count(*) FROM refund_ledger.refunds AS r
        WHERE source = :source AND (written_back_at = updated_at) IS NOT TRUE AND {NEWEST}
          AND NOT EXISTS (SELECT FROM refund_ledger.write_back_notes AS note
                          WHERE note.source = r.source AND note.source_ref = r.source_ref
                            AND note.problem IS NOT NULL)"""
    if missing := (await connection.execute(due, {"source": source})).scalar_one():
        report.notes.append(
            f"{missing} refunds have news that the source does not have yet; the next write_back tries again."
        )
    report.audit_head = await head_of(connection)


_UNFINISHED = {
    "sending": "sending: a worker may still be at it or died; the next run takes them up when their lease has ended.",
    "unknown": "unknown: Payroc has not told what became of them; the next run and the follow-up ask again.",
    "review": (
        "in review: people have to look at them, `python -m include.refunds show ID` tells why and "
        "`python -m include.refunds resolve ID` records what they decide."
    ),
}


def _late(row: Any) -> str | None:
    if row.status != "accepted":
        if row.now - row.first_sent_at <= _IN_DOUBT_FOR:
            return None
        return f"has been {row.status} for more than a day: Payroc has not told what became of it"
    if business_days_between(row.first_sent_at, row.now) > _ACCEPTED_DAYS:
        return f"has been accepted for more than {_ACCEPTED_DAYS} business days"
    if row.payroc_status == "pending" and business_days_between(row.first_sent_at, row.now) > _PENDING_DAYS:
        return f"has been pending at Payroc for more than {_PENDING_DAYS} business days: it is held back from settlement there"
    if row.payroc_seen_at is None or business_days_between(row.payroc_seen_at, row.now) > _UNSEEN_DAYS:
        return f"has not been looked at for more than {_UNSEEN_DAYS} business days; see that payroc_refunds_followup runs"
    return None


def _table(lines: Sequence[Line]) -> list[str]:
    rows = [("order id", "amount", "last4", "status", "refund id", "attempts", "reason")] + [
        (
            printable(line.order_id, limit=_CELL),
            money(line.amount, line.currency),
            printable(line.payee_last4 or "token", limit=_CELL),
            line.status,
            printable(line.payroc_refund_id, limit=_CELL),
            str(line.attempts),
            printable(line.reason),
        )
        for line in lines
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]
        ).rstrip()
        for row in rows
    ]
