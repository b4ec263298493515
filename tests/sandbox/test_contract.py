"""Every kind of response, against Payroc's own OpenAPI file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import requests

from include.sandbox.problems import DOCUMENTED
from include.sandbox.validation import CURRENCIES
from tests.sandbox.openapi import (
    OPERATIONS,
    documented_examples,
    documented_statuses,
    needs_openapi,
    request_schema,
    validate_request,
    validate_response,
)
from tests.sandbox.running import Client, RunningSandbox, body, new_key

pytestmark = needs_openapi

TOKEN_METHOD = {"type": "secureToken", "token": "296753123456", "accountType": "savings", "secCode": "ppd"}
PROBLEM_OF = {
    400: "bad-request",
    401: "not-authorized",
    403: "forbidden",
    404: "not-found",
    406: "not-acceptable",
    409: "resource-already-exists",
    415: "unsupported-media-type",
    500: "api-error",
}


def senders(payroc: Client) -> dict[str, Callable[[], requests.Response]]:
    refund_id = payroc.create().json()["refundId"]
    return {
        "create": payroc.create,
        "list": payroc.list,
        "get": lambda: payroc.get(refund_id),
        "reverse": lambda: payroc.reverse(refund_id),
        "close-batch": payroc.close_batch,
    }


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_documented_status_of_an_operation_is_answered_as_documented(
    sandbox: RunningSandbox, payroc: Client, operation: str
) -> None:
    send = senders(payroc)[operation]
    answered = set()
    for status in sorted(documented_statuses(operation)):
        if status >= 400:
            sandbox.fault(operation, "problem", problem=PROBLEM_OF[status])
        answer = send()
        assert answer.status_code == status
        validate_response(operation, answer)
        answered.add(answer.status_code)
    assert answered == documented_statuses(operation)


@pytest.mark.parametrize(
    "content",
    [
        body(),
        body(customer=..., customFields=...),
        body(refundMethod=TOKEN_METHOD),
        body(
            customer__contactMethods=[
                {"type": kind, "value": "5551234"} for kind in ("phone", "mobile", "fax")
            ]
        ),
        body(order__description="", order__orderId="é" * 24),
    ],
    ids=["sample", "minimum", "secure token", "telephones", "longest order id"],
)
def test_every_kind_of_refund_is_shown_as_documented(payroc: Client, content: dict[str, Any]) -> None:
    validate_request("create", content)
    created = payroc.create(content)
    validate_response("create", created)
    refund_id = created.json()["refundId"]
    validate_response("get", payroc.get(refund_id))
    validate_response("list", payroc.list())
    validate_response("reverse", payroc.reverse(refund_id))
    assert "payment" not in created.json()


@pytest.mark.parametrize("digits", ["9001", "9012", "9013", "9016", "9021"])
def test_every_status_of_a_refund_is_shown_as_documented(payroc: Client, digits: str) -> None:
    created = payroc.create_ending_in(digits)
    validate_response("create", created)
    for _ in range(2):
        validate_response("close-batch", payroc.close_batch())
        validate_response("get", payroc.get(created.json()["refundId"]))


@pytest.mark.parametrize("digits", ["9002", "9005", "9006", "9007", "9014", "9015", "9017", "9018", "9019"])
def test_every_problem_of_a_trigger_is_documented(payroc: Client, digits: str) -> None:
    validate_response("create", payroc.create_ending_in(digits))


def test_natural_problems_are_as_documented(sandbox: RunningSandbox, payroc: Client) -> None:
    refund_id, key = payroc.create().json()["refundId"], new_key()
    payroc.create(key=key)
    path = "/bank-transfer-refunds"
    for operation, answer in (
        ("create", payroc.create(body(order__amount=0))),
        ("create", payroc.create(body(order__amount=1), key=key)),
        ("create", payroc.create(key="malformed")),
        ("create", payroc.send("POST", path, json=body())),
        ("create", payroc.send("POST", path, json=body(), headers={"Authorization": None})),
        ("create", payroc.send("POST", path, json=body(), headers={"Accept": "text/html"})),
        ("create", payroc.send("POST", path, data="x", headers={"Content-Type": "text/plain"})),
        ("list", payroc.list(limit=0)),
        ("get", payroc.get("short")),
        ("get", payroc.get("AAAAAAAAAA")),
        ("reverse", payroc.reverse("AAAAAAAAAA")),
        ("reverse", payroc.reverse(refund_id, key=key)),
    ):
        assert answer.status_code >= 400
        validate_response(operation, answer)
    payroc.close_batch()
    validate_response("reverse", payroc.reverse(refund_id))
    for mode in ("not-enabled", "no-ach"):
        sandbox.admin("PUT", "terminals/1234001", mode=mode)
        validate_response("create", payroc.create())


def test_pages_are_as_documented(payroc: Client) -> None:
    for _ in range(3):
        payroc.create()
    page = payroc.list(limit=1)
    validate_response("list", page)
    following = payroc.send("GET", page.json()["links"][0]["href"])
    validate_response("list", following)
    assert [link["rel"] for link in following.json()["links"]] == ["next", "previous"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_types_titles_and_details_are_the_words_of_the_examples(operation: str) -> None:
    for status, example in documented_examples(operation):
        fragment = example["type"].partition("#")[2]
        assert (status, example["title"], example["detail"]) == DOCUMENTED[fragment]


def test_a_key_in_use_is_409_although_its_example_is_filed_under_400(payroc: Client) -> None:
    key = new_key()
    payroc.create(key=key)
    answer = payroc.create(body(order__amount=1), key=key)
    assert answer.status_code == 409
    validate_response("create", answer)
    assert (409, answer.json()) in documented_examples("create")


def test_the_currencies_are_those_of_the_file() -> None:
    order = request_schema("create")["properties"]["order"]["allOf"][0]
    assert frozenset(order["properties"]["currency"]["enum"]) == CURRENCIES
