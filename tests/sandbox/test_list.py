from __future__ import annotations

from typing import Any

import pytest

from tests.sandbox.running import Client, RunningSandbox, body, parameters, problem_type

DAY = 24 * 3600


def create_orders(payroc: Client, count: int) -> list[str]:
    """Create so many refunds and return their order ids, newest first."""
    for number in range(count):
        payroc.create(body(order__orderId=f"order-{number}"))
    return [f"order-{number}" for number in reversed(range(count))]


def orders(page: dict[str, Any]) -> list[str]:
    return [refund["order"]["orderId"] for refund in page["data"]]


def link(page: dict[str, Any], rel: str) -> str:
    (href,) = [link["href"] for link in page["links"] if link["rel"] == rel]
    return str(href)


def rels(page: dict[str, Any]) -> list[str]:
    return [link["rel"] for link in page["links"]]


def test_an_empty_list_has_no_links(payroc: Client) -> None:
    assert payroc.list().json() == {"limit": 10, "count": 0, "hasMore": False, "links": [], "data": []}


def test_a_list_shows_the_newest_ten_first(payroc: Client) -> None:
    expected = create_orders(payroc, 11)
    page = payroc.list().json()
    assert (page["limit"], page["count"], page["hasMore"]) == (10, 10, True)
    assert orders(page) == expected[:10]
    assert page["data"][0] == payroc.get(page["data"][0]["refundId"]).json()


def test_the_links_lead_through_all_pages_and_back(payroc: Client) -> None:
    expected = create_orders(payroc, 7)
    page = payroc.list(limit=3).json()
    pages = [page]
    while page["hasMore"]:
        page = payroc.send("GET", link(page, "next")).json()
        pages.append(page)
    assert [orders(page) for page in pages] == [expected[0:3], expected[3:6], expected[6:7]]
    assert [rels(page) for page in pages] == [["next"], ["next", "previous"], ["previous"]]
    back = payroc.send("GET", link(pages[2], "previous")).json()
    assert back == pages[1]
    assert payroc.send("GET", link(back, "previous")).json() == pages[0]


def test_a_refund_created_while_paging_moves_no_page(payroc: Client) -> None:
    expected = create_orders(payroc, 4)
    first = payroc.list(limit=2).json()
    payroc.create(body(order__orderId="late"))
    assert orders(payroc.send("GET", link(first, "next")).json()) == expected[2:]
    assert orders(payroc.send("GET", first["links"][0]["href"].replace("after", "before")).json()) == [
        "late",
        expected[0],
    ]


def test_the_links_repeat_every_filter(sandbox: RunningSandbox, payroc: Client) -> None:
    for _ in range(3):
        payroc.create()
    payroc.create(body(refundMethod__nameOnAccount="Somebody Else"))
    payroc.close_batch()
    today = sandbox.refunds()[0]["settledAt"][:10]
    filters = {
        "processingTerminalId": "1234001",
        "orderId": "OrderRef6543",
        "nameOnAccount": "Sarah Hazel Hopper",
        "last4": "7890",
        "type": ["unreferencedRefund", "refund"],
        "status": ["complete", "ready"],
        "dateFrom": f"{today}T00:00:00Z",
        "dateTo": "2999-01-01T00:00:00+01:00",
        "settlementState": "settled",
        "settlementDate": today,
        "limit": 1,
    }
    seen = []
    page = payroc.list(**filters).json()
    while True:
        seen += page["data"]
        if not page["hasMore"]:
            break
        assert "type=unreferencedRefund&type=refund&status=complete&status=ready" in link(page, "next")
        page = payroc.send("GET", link(page, "next")).json()
    assert len({refund["refundId"] for refund in seen}) == 3


def test_each_filter_selects(sandbox: RunningSandbox, payroc: Client) -> None:
    sample = payroc.create(body(order__orderId="sample")).json()
    sandbox.advance(2 * DAY)
    payroc.token = sandbox.client().token
    payroc.create(
        body(
            order__orderId="other",
            refundMethod__nameOnAccount="Somebody Else",
            refundMethod__accountNumber="55554321",
        )
    )
    payroc.create(body(processingTerminalId="9999001"))
    payroc.reverse(sample["refundId"])
    day = sandbox.refunds()[1]["createdAt"][:10]
    payroc.close_batch()

    def found(**query: Any) -> list[str]:
        return orders(payroc.list(**query).json())

    assert found() == ["other", "sample"]
    assert found(processingTerminalId="9999001") == ["OrderRef6543"]
    assert found(orderId="sample") == ["sample"]
    assert found(nameOnAccount="Somebody Else") == ["other"]
    assert found(last4="7890") == ["sample"]
    assert found(type="unreferencedRefund") == ["other", "sample"]
    assert found(type="refund") == []
    assert found(status="reversal") == ["sample"]
    assert found(status=["reversal", "complete"]) == ["other", "sample"]
    assert found(dateFrom=sample["order"]["dateTime"], dateTo=f"{day}T00:00:00Z") == ["sample"]
    assert found(dateFrom=f"{day}T00:00:00Z") == ["other"]
    assert found(dateTo=sample["order"]["dateTime"]) == []
    assert found(settlementState="settled") == ["other"]
    assert found(settlementState="unsettled") == ["sample"]
    assert found(settlementDate=day) == ["other"]
    assert found(settlementDate="2001-01-01") == []


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ({"processingTerminalId": None}, "processingTerminalId"),
        ({"processingTerminalId": "123"}, "processingTerminalId"),
        ({"orderId": "x" * 25}, "orderId"),
        ({"nameOnAccount": "x" * 51}, "nameOnAccount"),
        ({"last4": "789"}, "last4"),
        ({"type": "payment"}, "type"),
        ({"status": ["ready", "gone"]}, "status"),
        ({"dateFrom": "yesterday"}, "dateFrom"),
        ({"dateFrom": "2024-07-01"}, "dateFrom"),
        ({"dateTo": "2024-07-01T00:00:00"}, "dateTo"),
        ({"settlementState": "maybe"}, "settlementState"),
        ({"settlementDate": "2024-13-01"}, "settlementDate"),
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "ten"}, "limit"),
        ({"after": "AAAAAAAAAA"}, "after"),
        ({"before": "AAAAAAAAAA"}, "before"),
        ({"before": "AAAAAAAAAA", "after": "AAAAAAAAAA"}, "before"),
    ],
)
def test_a_bad_filter_is_a_bad_request_that_names_it(
    payroc: Client, query: dict[str, Any], parameter: str
) -> None:
    answer = payroc.list(**query)
    assert answer.status_code == 400
    assert problem_type(answer) == "bad-request"
    assert parameters(answer) == [parameter]


def test_the_last_days_of_the_calendar_are_no_error(payroc: Client) -> None:
    assert payroc.list(settlementDate="9999-12-31", dateFrom="0001-01-01T00:00:00Z").status_code == 200


def test_with_a_lag_list_and_get_do_not_show_a_refund_at_first(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    sandbox.admin("PATCH", "settings", listLagSeconds=60)
    refund_id = payroc.create().json()["refundId"]
    assert payroc.list().json()["data"] == []
    assert payroc.get(refund_id).status_code == 404
    assert len(sandbox.refunds()) == 1
    sandbox.advance(61)
    assert payroc.list().json()["count"] == 1
    assert payroc.get(refund_id).status_code == 200


def test_with_duplicates_a_list_shows_each_refund_twice(sandbox: RunningSandbox, payroc: Client) -> None:
    create_orders(payroc, 3)
    sandbox.admin("PATCH", "settings", listDuplicates=True)
    page = payroc.list(limit=4).json()
    assert orders(page) == ["order-2", "order-2", "order-1", "order-1"]
    assert orders(payroc.send("GET", link(page, "next")).json()) == ["order-0", "order-0"]
