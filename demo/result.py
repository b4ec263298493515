"""What became of the refunds: the table at the end of the demo, read from the ledger and checked against Payroc's side."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import class_row
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from include.refunds.printable import printable

STYLES = {
    "accepted": "green",
    "settled": "green",
    "rejected": "red",
    "invalid": "red",
    "returned": "red",
    "unknown": "yellow",
    "sending": "yellow",
    "review": "bold yellow",
    "held": "yellow",
}
# The sending of these is not over: the next run of the DAG goes on with them.
UNFINISHED = ("released", "sending", "unknown")
_AT_PAYROC = ("accepted", "settled", "returned", "reversed")


@dataclass(frozen=True)
class Row:
    """One refund, or one row of the source that is none because something is wrong with it."""

    order_id: str
    terminal: str | None
    amount: int | None
    currency: str | None
    last4: str | None
    status: str
    payroc_refund_id: str | None
    attempts: int
    tries: list[str]
    reason: str | None


_ROWS = """
SELECT refund.order_id, refund.processing_terminal_id AS terminal, refund.amount, refund.currency, refund.payee_last4 AS last4,
       refund.status, refund.payroc_refund_id, refund.attempts, refund.reason,
       ARRAY(SELECT concat_ws(' ', attempt.outcome, attempt.http_status)
             FROM refund_ledger.refund_attempts AS attempt WHERE attempt.refund_id = refund.id ORDER BY attempt.attempt) AS tries
FROM refund_ledger.refunds AS refund
ORDER BY refund.approved_at, refund.id
"""

_INVALID = "SELECT source_ref, errors FROM refund_ledger.invalid_rows ORDER BY source_ref"


def read_rows(ledger: psycopg.Connection) -> list[Row]:
    """Return every refund of the ledger in the order of approval, then the rows of the source that were refused."""
    with ledger.cursor(row_factory=class_row(Row)) as cursor:
        rows = cursor.execute(_ROWS).fetchall()
    for source_ref, errors in ledger.execute(_INVALID).fetchall():
        rows.append(Row(f"({source_ref})", None, None, None, None, "invalid", None, 0, [], _sentence(errors)))
    return rows


def count_by_status(ledger: psycopg.Connection) -> dict[str, int]:
    """Return how many refunds have each status."""
    return dict(
        ledger.execute("SELECT status, count(*) FROM refund_ledger.refunds GROUP BY status").fetchall()
    )


def sent(counts: dict[str, int]) -> int:
    """Return how many refunds have been sent, or are being sent, of the counts by status."""
    return sum(
        count
        for status, count in counts.items()
        if status not in ("approved", "held", "released", "cancelled")
    )


def table_of(rows: list[Row]) -> Table:
    """Return the table of all refunds, for a terminal of 100 columns or more."""
    table = Table(
        title="Every approved refund",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("Order", no_wrap=True)
    table.add_column("Account", no_wrap=True)
    table.add_column("Amount", justify="right", no_wrap=True)
    table.add_column("Status", no_wrap=True)
    table.add_column("Payroc's id", no_wrap=True)
    table.add_column("Tries", justify="right", no_wrap=True)
    table.add_column("What happened", ratio=1, overflow="fold")
    for row in rows:
        table.add_row(
            _cell(row.order_id),
            _cell(f"••{row.last4}" if row.last4 else "token" if row.amount else ""),
            money(row.amount, row.currency),
            Text(row.status, style=STYLES.get(row.status, "")),
            _cell(row.payroc_refund_id),
            str(row.attempts or ""),
            _cell(_what_happened(row)),
        )
    return table


def _cell(value: str | None) -> Text:
    # What is no Text would be read as rich's markup.
    return Text(printable(value))


def totals_of(rows: list[Row]) -> Table:
    """Return counts and sums by status and currency."""
    table = Table(
        title="Totals", title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 0, 0, 1)
    )
    table.add_column("Status")
    table.add_column("Refunds", justify="right")
    table.add_column("Amount", justify="right")
    counts: Counter[tuple[str, str | None]] = Counter()
    sums: Counter[tuple[str, str | None]] = Counter()
    for row in rows:
        counts[row.status, row.currency] += 1
        sums[row.status, row.currency] += row.amount or 0
    for (status, currency), count in counts.items():
        amount = money(sums[status, currency], currency) if currency else ""
        table.add_row(Text(status, style=STYLES.get(status, "")), str(count), amount)
    return table


def money(amount: int | None, currency: str | None) -> str:
    """Return an amount of minor units as people write it; the sample's currencies have two decimals."""
    if amount is None or currency is None:
        return ""
    return f"{currency} {amount // 100:,}.{amount % 100:02d}"


def compare_with_payroc(rows: list[Row], theirs: list[dict[str, Any]]) -> list[str]:
    """
    Compare the ledger with what exists at Payroc.

    :param theirs: the refunds of the local Payroc's own record.
    :return: what is wrong, one sentence each; empty when the two agree and nothing was paid twice.
    """
    complaints = []
    orders = Counter((refund["processingTerminalId"], refund["orderId"]) for refund in theirs)
    for (terminal, order), count in orders.items():
        if count > 1:
            complaints.append(
                f"Order {printable(order)} of terminal {printable(terminal)} exists {count} times at Payroc."
            )
    known = {refund["refundId"]: refund for refund in theirs}
    for row in rows:
        refund = known.get(row.payroc_refund_id or "")
        if row.payroc_refund_id and refund is None:
            complaints.append(
                f"Order {printable(row.order_id)} is {row.status} in the ledger as {printable(row.payroc_refund_id)}, "
                "which Payroc does not know."
            )
        elif refund and (refund["orderId"], refund["amount"], refund["currency"]) != (
            row.order_id,
            row.amount,
            row.currency,
        ):
            complaints.append(
                f"Order {printable(row.order_id)} is another order or amount at Payroc, as {printable(row.payroc_refund_id)}."
            )
    ours = {row.payroc_refund_id for row in rows}
    complaints += [
        f"Payroc has a refund {printable(refund)} that the ledger does not know."
        for refund in known
        if refund not in ours
    ]
    return complaints


def _what_happened(row: Row) -> str:
    """Return the story of a refund in a few words: how each try ended, or why it is not paid."""
    if row.status not in _AT_PAYROC:
        return row.reason or ""
    if row.tries == ["accepted 201"]:
        return ""
    return ", ".join(_WORDS.get(result) or _words_for(result) for result in row.tries)


# Outcome and HTTP status of a try. Accepted without a status: the look-up before the try found the refund at Payroc.
_WORDS = {
    "accepted": "found at Payroc, not sent again",
    "accepted 201": "then accepted under the same key",
    "unknown": "no answer",
    "unknown 201": "unreadable answer",
    "unknown 429": "Payroc is busy (429)",
    "not_sent": "stopped by the pause",
    "": "cut off",
}


def _words_for(result: str) -> str:
    outcome, _, http_status = result.partition(" ")
    return (
        f"Payroc failed ({http_status})"
        if http_status.startswith("5")
        else f"{outcome} ({http_status})"
        if http_status
        else outcome
    )


def _sentence(errors: Any) -> str:
    if isinstance(errors, dict):
        return "; ".join(f"{field} {_sentence(said)}" for field, said in errors.items())
    if isinstance(errors, list):
        return ", ".join(_sentence(said) for said in errors)
    return str(errors)
