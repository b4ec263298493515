"""Rows of the source that could not be written, as reports name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, tzinfo

from include.refunds.ledger.connection import Connection
from include.refunds.printable import printable

# A report names so many, the oldest first, and counts the rest.
MOST_NAMED = 10


@dataclass(frozen=True, slots=True)
class UnwrittenRow:
    """
    A row that could not be written.

    :param since: when it failed first.
    :param why: the reason of the last try, without a value of the row.
    """

    source_ref: str
    since: datetime
    why: str

    def __str__(self) -> str:
        return (
            f"Source row {printable(self.source_ref)} has not been written back since "
            f"{self.since:%-d %b %Y %H:%M %Z}: {printable(self.why)}"
        )


@dataclass(frozen=True, slots=True)
class Unwritten:
    """
    Rows that could not be written.

    :param count: how many there are.
    :param rows: the oldest of them.
    """

    count: int = 0
    rows: Sequence[UnwrittenRow] = field(default=())

    def at_zone(self, zone: tzinfo) -> Unwritten:
        """Return the same with the times of a zone."""
        return replace(self, rows=[replace(row, since=row.since.astimezone(zone)) for row in self.rows])

    def sentences(self) -> list[str]:
        """Return a sentence for each row, and one for those that are not named."""
        rest = self.count - len(self.rows)
        return [
            *map(str, self.rows),
            *([f"{rest} more source rows have not been written back."] if rest else []),
        ]


def doubled_sentence(source_ref: str, touched: int) -> str:
    """Return the sentence about an UPDATE that touched more than one row."""
    return (
        f"Source row {printable(source_ref)}: the UPDATE of write_back.sql touched {touched} rows; "
        "unless all of them are this refund's, make its WHERE unique."
    )


def first_of(sentences: Sequence[str], most: int, more: str) -> list[str]:
    """
    Return the first of many sentences, and one that counts the rest.

    :param more: what the others are, such as ``more warnings like these``.
    """
    rest = len(sentences) - most
    return [*sentences[:most], *([f"{rest} {more}."] if rest > 0 else [])]


# A refund that was not sent: the merchant may have deleted its row, and loses nothing.
_NOT_SENT = "('approved', 'held', 'cancelled')"


async def unwritten_refunds(connection: Connection, source: str) -> Unwritten:
    """Return the rows that could not be written although money may have moved, or was refused to move."""
    return await _unwritten(connection, source, f"r.status NOT IN {_NOT_SENT}")


async def other_unwritten_rows(connection: Connection, source: str) -> Unwritten:
    """Return the other rows that could not be written this week: invalid ones, and of refunds not sent."""
    return await _unwritten(
        connection,
        source,
        f"(r.status IS NULL OR r.status IN {_NOT_SENT}) "
        "AND problem_since >= refund_ledger.now() - interval '7 days'",
    )


async def _unwritten(connection: Connection, source: str, condition: str) -> Unwritten:
    query = f"""
        SELECT note.source_ref, problem_since AS since, problem AS why, count(*) OVER () AS count
        FROM refund_ledger.write_back_notes AS note
        LEFT JOIN refund_ledger.refunds AS r
               ON r.idempotency_key = refund_ledger.refund_key(note.source, note.source_ref)
        WHERE note.source = :source AND problem IS NOT NULL AND {condition}
        ORDER BY problem_since, note.source_ref LIMIT {MOST_NAMED}"""
    rows = await connection.execute(query, {"source": source})
    return Unwritten(
        rows[0].count if rows else 0, [UnwrittenRow(row.source_ref, row.since, row.why) for row in rows]
    )
