"""Payroc's lists in reports: those that could not be read, and refunds on them that were made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from include.refunds.ledger.connection import Connection
from include.refunds.money import money, sums
from include.refunds.printable import printable

# A report names so many terminals, and so many refunds of each kind, and counts the rest.
_MOST_NAMED = 10


@dataclass(slots=True)
class ListSentences:
    """
    Sentences about the lists.

    :param unfinished: lists that were due and could not be read, so that refunds wait or may be unknown.
    :param notes: everything else.
    """

    unfinished: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


async def list_sentences(connection: Connection, source: str, since: datetime | None) -> ListSentences:
    """
    Return what reports say about Payroc's lists.

    :param since: refunds that were made elsewhere are named when they were first seen from then on.
    """
    found = ListSentences()
    await _unread(connection, source, found)
    await _elsewhere(connection, since, found)
    return found


async def _unread(connection: Connection, source: str, found: ListSentences) -> None:
    query = """
        SELECT terminal, failure, failed_at, refused, read_to IS NULL AS never_read,
               (SELECT count(*) FROM refund_ledger.refunds
                WHERE source = :source AND status IN ('approved', 'held', 'released')
                  AND processing_terminal_id = terminal) AS pending
        FROM refund_ledger.terminals WHERE failed_at IS NOT NULL ORDER BY terminal"""
    rows = [
        row
        for row in await connection.execute(query, {"source": source})
        # Nothing was ever sent through a terminal that Payroc has always refused, and nothing is to be.
        if row.pending or not (row.refused and row.never_read)
    ]
    for row in rows[:_MOST_NAMED]:
        sentence = (
            f"Payroc's list of terminal {printable(row.terminal)} could not be read since "
            f"{row.failed_at:%-d %b %Y %H:%M %Z}: {printable(row.failure)}."
        )
        if row.pending:
            refunds = "1 refund waits" if row.pending == 1 else f"{row.pending:,} refunds wait"
            sentence += f" {refunds} for it: nothing is sent for the first time before the list is known."
        # A terminal that was closed at Payroc must not keep every run red.
        kind = found.notes if row.refused and not row.pending else found.unfinished
        kind.append(sentence)
    if len(rows) > _MOST_NAMED:
        found.unfinished.append(f"{len(rows) - _MOST_NAMED} more lists could not be read.")


async def _elsewhere(connection: Connection, since: datetime | None, found: ListSentences) -> None:
    condition = """seen_at >= COALESCE(CAST(:since AS timestamptz), '-infinity')
        AND NOT EXISTS (
            SELECT FROM refund_ledger.refunds AS r WHERE r.payroc_refund_id = f.payroc_refund_id)"""
    totals = f"""
        SELECT idempotency_key IS NOT NULL AS with_key, currency, count(*) AS count, sum(amount) AS amount
        FROM refund_ledger.foreign_refunds AS f WHERE {condition} GROUP BY 1, 2"""
    named = f"""
        SELECT * FROM refund_ledger.foreign_refunds AS f
        WHERE {condition} AND (idempotency_key IS NOT NULL) = :with_key
        ORDER BY seen_at DESC, payroc_refund_id LIMIT :most"""
    kinds: dict[bool, dict[str, dict[str, int]]] = {}
    for row in await connection.execute(totals, {"since": since}):
        kinds.setdefault(row.with_key, {})[row.currency] = {"count": row.count, "amount": int(row.amount)}
    for with_key, amounts in sorted(kinds.items()):
        values = {"since": since, "with_key": with_key, "most": _MOST_NAMED}
        names = [_name(row) for row in await connection.execute(named, values)]
        count = sum(entry["count"] for entry in amounts.values())
        if count > len(names):
            names.append(f"{count - len(names):,} more")
        named_here = f"{sums(amounts)} ({'; '.join(names)})"
        found.notes.append(
            f"Payroc lists refunds that carry a key of this project that no refund here has: {named_here}; another "
            "ledger pays through these terminals, or this one has forgotten them."
            if with_key
            else f"Payroc lists refunds that were made elsewhere on the terminals of this ledger: {named_here}."
        )


def _name(row: Any) -> str:
    return (
        f"{printable(row.payroc_refund_id)} of terminal {printable(row.terminal)}, "
        f"order {printable(row.order_id)}, {money(row.amount, row.currency)}"
    )
