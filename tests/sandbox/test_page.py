from __future__ import annotations

import re

from tests.sandbox.running import Client, RunningSandbox, body, new_key


def test_an_empty_page_says_so(sandbox: RunningSandbox) -> None:
    assert "No refunds yet" in sandbox.text("/")


def test_the_page_lists_the_refunds_newest_first_with_totals(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    for _ in range(3):
        first = payroc.create(key=key).json()
    payroc.create(body(order__orderId="second", order__amount=123456))
    payroc.create(body(order__orderId="yen", order__amount=5000, order__currency="JPY"))
    shown = sandbox.text("/")
    rows = [re.sub("<[^>]+>", "|", row) for row in re.findall("<tr>(.*?)</tr>", shown)][1:]
    assert [re.findall("OrderRef6543|second|yen", row)[0] for row in rows] == [
        "yen",
        "second",
        "OrderRef6543",
    ]
    assert "5,000 JPY" in rows[0]
    assert "1,234.56 USD" in rows[1]
    assert "····7890" in rows[2]
    assert first["refundId"] in rows[2]
    assert rows[2].strip("|").endswith("|3")
    assert "<li>ready<b>3</b>5,000 JPY + 1,284.55 USD</li>" in shown


def test_the_page_loads_nothing_from_elsewhere_and_escapes_what_it_shows(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    payroc.create(body(order__orderId="<script>alert(1)"))
    shown = sandbox.text("/")
    assert "<script>alert" not in shown
    assert "&lt;script&gt;alert(1)" in shown
    assert not re.search("https?://", shown)


def test_a_long_page_shows_the_newest_refunds_and_counts_all(sandbox: RunningSandbox, payroc: Client) -> None:
    for _ in range(203):
        payroc.create()
    shown = sandbox.text("/")
    assert "203 refunds" in shown
    assert shown.count("OrderRef6543") == 200
