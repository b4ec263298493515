"""The table at the end of the demo, and the comparison with Payroc's own record."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from demo.result import Row, compare_with_payroc, money, table_of, totals_of


def row(order_id: str = "SO-1", **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "order_id": order_id,
        "terminal": "2201001",
        "amount": 4999,
        "currency": "USD",
        "last4": "8832",
        "status": "accepted",
        "payroc_refund_id": f"ID-{order_id}",
        "attempts": 1,
        "tries": ["accepted 201"],
        "reason": "Accepted by Payroc.",
    }
    return Row(**{**fields, **changes})


def theirs(order_id: str = "SO-1", **changes: Any) -> dict[str, Any]:
    return {
        "refundId": f"ID-{order_id}",
        "processingTerminalId": "2201001",
        "orderId": order_id,
        "amount": 4999,
        "currency": "USD",
        **changes,
    }


def printed(*tables: Any) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


def test_two_records_that_agree_give_no_complaint() -> None:
    rejected = row("SO-2", status="rejected", payroc_refund_id=None)
    invalid = row(
        "(RF-9)", status="invalid", payroc_refund_id=None, amount=None, currency=None, terminal=None
    )
    assert compare_with_payroc([row(), rejected, invalid], [theirs()]) == []


def test_an_order_that_was_paid_twice_is_named() -> None:
    complaints = compare_with_payroc([row()], [theirs(), theirs(refundId="ANOTHER-ID")])
    assert "Order SO-1 of terminal 2201001 exists 2 times at Payroc." in complaints
    assert "Payroc has a refund ANOTHER-ID that the ledger does not know." in complaints


def test_the_same_order_of_two_terminals_is_no_duplicate() -> None:
    rows = [row(), row(terminal="2201002", payroc_refund_id="OTHER")]
    assert (
        compare_with_payroc(rows, [theirs(), theirs(refundId="OTHER", processingTerminalId="2201002")]) == []
    )


def test_a_payment_that_payroc_does_not_know_is_named() -> None:
    assert compare_with_payroc([row()], []) == [
        "Order SO-1 is accepted in the ledger as ID-SO-1, which Payroc does not know."
    ]


@pytest.mark.parametrize("changes", [{"amount": 5000}, {"currency": "CAD"}, {"orderId": "SO-7"}])
def test_another_amount_currency_or_order_is_named(changes: dict[str, Any]) -> None:
    assert compare_with_payroc([row()], [theirs(**changes)]) == [
        "Order SO-1 is another order or amount at Payroc, as ID-SO-1."
    ]


def test_amounts_are_written_as_people_write_them() -> None:
    assert money(712805, "USD") == "USD 7,128.05"
    assert money(None, None) == ""


@pytest.mark.parametrize(
    ("tries", "story"),
    [
        (["unknown", "accepted"], "no answer, found at Payroc, not sent again"),
        (["unknown 500", "accepted 201"], "Payroc failed (500), then accepted under the same key"),
        (["unknown 429", "accepted 201"], "Payroc is busy (429), then accepted under the same key"),
        (["unknown 201", "accepted"], "unreadable answer, found at Payroc, not sent again"),
        (["", "accepted"], "cut off, found at Payroc, not sent again"),
        (["unknown 408", "accepted 201"], "unknown (408), then accepted under the same key"),
    ],
)
def test_the_table_tells_how_a_refund_came_through(tries: list[str], story: str) -> None:
    assert story in printed(table_of([row(tries=tries, attempts=2)]))


def test_the_table_tells_why_a_refund_was_not_paid() -> None:
    text = printed(table_of([row(status="rejected", tries=["rejected 201"], reason="Declined by the bank.")]))
    assert "rejected" in text
    assert "Declined by the bank." in text


def test_a_refund_to_a_token_has_no_account_to_show() -> None:
    assert "token" in printed(table_of([row(last4=None)]))


def test_totals_are_per_status_and_currency() -> None:
    rows = [row(), row("SO-2"), row("SO-3", currency="CAD"), row("SO-4", status="rejected")]
    lines = [line.split() for line in printed(totals_of(rows)).splitlines()]
    assert ["accepted", "2", "USD", "99.98"] in lines
    assert ["accepted", "1", "CAD", "49.99"] in lines
    assert ["rejected", "1", "USD", "49.99"] in lines
