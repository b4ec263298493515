from __future__ import annotations

import re
from typing import Any

import pytest

from tests.sandbox.running import Client, RunningSandbox, body, new_key, parameters, problem_type

TOKEN_METHOD = {"type": "secureToken", "token": "296753123456", "accountType": "checking", "secCode": "web"}


def test_a_create_answers_201_with_the_refund_as_payroc_shows_it(payroc: Client) -> None:
    answer = payroc.create()
    assert answer.status_code == 201
    assert answer.headers["Content-Type"] == "application/json"
    shown = answer.json()
    assert re.fullmatch("[A-Z0-9]{10}", shown.pop("refundId"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", shown["order"].pop("dateTime"))
    request = body()
    assert shown == {
        "processingTerminalId": "1234001",
        "order": request["order"],
        "customer": request["customer"],
        "customFields": request["customFields"],
        "bankAccount": {
            "type": "ach",
            "secCode": "web",
            "nameOnAccount": "Sarah Hazel Hopper",
            "accountNumber": "****7890",
            "routingNumber": "*****6789",
        },
        "transactionResult": {
            "type": "unreferencedRefund",
            "status": "ready",
            "authorizedAmount": -4999,
            "currency": "USD",
            "responseCode": "A",
            "responseMessage": "NoError",
            "processorResponseCode": "0",
        },
    }


def test_the_location_header_leads_to_the_refund(payroc: Client) -> None:
    answer = payroc.create()
    assert payroc.send("GET", answer.headers["Location"]).json() == answer.json()


def test_customer_and_custom_fields_are_absent_when_they_were_not_sent(payroc: Client) -> None:
    shown = payroc.create(body(customer=..., customFields=...)).json()
    assert "customer" not in shown
    assert "customFields" not in shown


def test_a_refund_to_a_secure_token_shows_the_account_behind_it(payroc: Client) -> None:
    account = payroc.create(body(refundMethod=TOKEN_METHOD)).json()["bankAccount"]
    assert account["secureToken"].pop("secureTokenId")
    assert account["secureToken"] == {
        "customerName": "Sandbox Payee",
        "token": "296753123456",
        "status": "bankAccountValidated",
    }
    assert re.fullmatch(r"\*+\d{4}", account["accountNumber"])
    assert re.fullmatch(r"\*+\d{4}", account["routingNumber"])
    assert not account["accountNumber"].endswith("3456")


def test_account_and_routing_numbers_are_never_shown(sandbox: RunningSandbox, payroc: Client) -> None:
    refund_id = payroc.create().json()["refundId"]
    payroc.create(body(refundMethod__routingNumber="bad"))
    record = sandbox.text("/_sandbox/refunds") + sandbox.text("/_sandbox/requests")
    page = sandbox.text("/")
    for text in (payroc.get(refund_id).text, payroc.list().text, record, page):
        assert "1234567890" not in text
        assert "123456789" not in text


def test_the_page_shows_an_order_id_as_text_with_what_is_unseen_by_its_number(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    assert payroc.create(body(order__orderId="<b>1\u202e\x1b[2K&amp;")).status_code == 201
    assert "&lt;b&gt;1⟨U+202E⟩⟨U+001B⟩[2K&amp;amp;" in sandbox.text("/")


def test_unknown_properties_are_tolerated(payroc: Client) -> None:
    assert (
        payroc.create(body(surprise={"a": 1}, order__surprise=2, refundMethod__surprise=3)).status_code == 201
    )


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"processingTerminalId": ...}, "processingTerminalId"),
        ({"processingTerminalId": "123"}, "processingTerminalId"),
        ({"processingTerminalId": "1" * 51}, "processingTerminalId"),
        ({"processingTerminalId": 1234001}, "processingTerminalId"),
        ({"order": ...}, "order"),
        ({"order": []}, "order"),
        ({"order__orderId": ...}, "order.orderId"),
        ({"order__orderId": ""}, "order.orderId"),
        ({"order__orderId": "x" * 25}, "order.orderId"),
        ({"order__description": ...}, "order.description"),
        ({"order__description": "x" * 257}, "order.description"),
        ({"order__amount": ...}, "order.amount"),
        ({"order__amount": 0}, "order.amount"),
        ({"order__amount": -1}, "order.amount"),
        ({"order__amount": "4999"}, "order.amount"),
        ({"order__amount": 49.99}, "order.amount"),
        ({"order__amount": True}, "order.amount"),
        ({"order__amount": 2**63}, "order.amount"),
        ({"order__currency": "usd"}, "order.currency"),
        ({"order__currency": "EURO"}, "order.currency"),
        ({"refundMethod": ...}, "refundMethod"),
        ({"refundMethod__type": ...}, "refundMethod.type"),
        ({"refundMethod__type": "pad"}, "refundMethod.type"),
        ({"refundMethod__nameOnAccount": ""}, "refundMethod.nameOnAccount"),
        ({"refundMethod__nameOnAccount": "x" * 51}, "refundMethod.nameOnAccount"),
        ({"refundMethod__accountNumber": "123"}, "refundMethod.accountNumber"),
        ({"refundMethod__accountNumber": "1" * 18}, "refundMethod.accountNumber"),
        ({"refundMethod__accountNumber": "12-34567"}, "refundMethod.accountNumber"),
        ({"refundMethod__routingNumber": "12345678"}, "refundMethod.routingNumber"),
        ({"refundMethod__routingNumber": "12345678x"}, "refundMethod.routingNumber"),
        ({"refundMethod__accountType": "current"}, "refundMethod.accountType"),
        ({"refundMethod__accountType": None}, "refundMethod.accountType"),
        ({"refundMethod__secCode": "WEB"}, "refundMethod.secCode"),
        ({"refundMethod__secCode": ...}, "refundMethod.secCode"),
        ({"refundMethod": {**TOKEN_METHOD, "token": "2967531234"}}, "refundMethod.token"),
        ({"refundMethod": {**TOKEN_METHOD, "token": "2" * 20}}, "refundMethod.token"),
        ({"customer": None}, "customer"),
        ({"customer__notificationLanguage": "de"}, "customer.notificationLanguage"),
        (
            {"customer__contactMethods": [{"type": "email", "value": "x" * 51}]},
            "customer.contactMethods[0].value",
        ),
        (
            {"customer__contactMethods": [{"type": "phone", "value": "0" * 16}]},
            "customer.contactMethods[0].value",
        ),
        ({"customer__contactMethods": [{"type": "pigeon", "value": "x"}]}, "customer.contactMethods[0].type"),
        ({"customer__contactMethods": [{"type": "fax", "value": "1"}] * 2}, "customer.contactMethods"),
        ({"customFields": [{"name": "a", "value": "b"}, {"name": "a"}]}, "customFields[1].value"),
        ({"customFields": [{"name": "x" * 57, "value": "b"}]}, "customFields[0].name"),
    ],
)
def test_a_bad_body_is_a_bad_request_that_names_the_parameter(
    sandbox: RunningSandbox, payroc: Client, changes: dict[str, Any], parameter: str
) -> None:
    answer = payroc.create(body(**changes))
    assert answer.status_code == 400
    assert problem_type(answer) == "bad-request"
    assert parameters(answer) == [parameter]
    assert sandbox.refunds() == []


def test_all_bad_parameters_are_named_at_once_and_no_value_is_repeated(payroc: Client) -> None:
    answer = payroc.create(
        body(order__amount=-31337, refundMethod__accountNumber="secret", refundMethod__secCode=...)
    )
    assert set(parameters(answer)) == {"order.amount", "refundMethod.accountNumber", "refundMethod.secCode"}
    assert "secret" not in answer.text
    assert "31337" not in answer.text


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"text"', b'{"amount": NaN}', b"\xff", b"[" * 100_000], ids=repr
)
def test_a_body_that_is_no_json_object_is_a_bad_request(payroc: Client, raw: bytes) -> None:
    headers = {"Idempotency-Key": new_key(), "Content-Type": "application/json"}
    answer = payroc.send("POST", "/bank-transfer-refunds", data=raw, headers=headers)
    assert answer.status_code == 400
    assert problem_type(answer) == "bad-request"


def test_the_shortest_and_longest_values_of_the_schema_are_accepted(payroc: Client) -> None:
    shortest = body(
        processingTerminalId="1234",
        order={"orderId": "1", "description": "", "amount": 1, "currency": "JPY"},
        customer={},
        customFields=[],
        refundMethod={**body()["refundMethod"], "accountNumber": "0000", "nameOnAccount": "x"},
    )
    longest = body(
        processingTerminalId="1" * 50,
        order={"orderId": "é" * 24, "description": "x" * 256, "amount": 2**63 - 1, "currency": "KWD"},
        refundMethod={**body()["refundMethod"], "accountNumber": "0" * 17, "nameOnAccount": "x" * 50},
    )
    for content in (shortest, longest):
        answer = payroc.create(content)
        assert answer.status_code == 201, answer.text
        assert answer.json()["transactionResult"]["authorizedAmount"] == -content["order"]["amount"]


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/problem+json", None]
)
def test_another_content_type_is_unsupported(payroc: Client, content_type: str | None) -> None:
    headers = {"Idempotency-Key": new_key(), "Content-Type": content_type}
    answer = payroc.send("POST", "/bank-transfer-refunds", data=b"{}", headers=headers)
    assert answer.status_code == 415
    assert problem_type(answer) == "unsupported-media-type"


def test_json_with_a_charset_is_supported(payroc: Client) -> None:
    headers = {"Idempotency-Key": new_key(), "Content-Type": "application/json; charset=utf-8"}
    assert payroc.send("POST", "/bank-transfer-refunds", json=body(), headers=headers).status_code == 201


@pytest.mark.parametrize(
    "accept", ["text/html", "application/xml", "application/json;q=0", "image/*, text/*"]
)
def test_an_accept_header_that_excludes_json_is_not_acceptable(payroc: Client, accept: str) -> None:
    for method in ("GET", "POST"):
        answer = payroc.send(
            method, "/bank-transfer-refunds", headers={"Accept": accept, "Idempotency-Key": new_key()}
        )
        assert answer.status_code == 406
        assert problem_type(answer) == "not-acceptable"


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "application/*;q=0.5", "text/html, application/json", None]
)
def test_an_accept_header_that_admits_json_is_fine(payroc: Client, accept: str | None) -> None:
    params = {"processingTerminalId": "1234001"}
    assert (
        payroc.send("GET", "/bank-transfer-refunds", headers={"Accept": accept}, params=params).status_code
        == 200
    )


def test_a_body_over_one_mebibyte_is_too_large(payroc: Client) -> None:
    answer = payroc.create(body(order__description="x" * 1024 * 1024))
    assert answer.status_code == 413
    assert problem_type(answer) == "payload-too-large"


def test_a_second_refund_of_the_same_order_is_accepted_and_counted(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    first, second = payroc.create(), payroc.create()
    assert first.json()["refundId"] != second.json()["refundId"]
    assert sandbox.admin("GET", "refunds")["refundsPerOrder"] == {"OrderRef6543": 2}


def test_a_terminal_that_is_not_enabled_is_forbidden_and_works_once_enabled(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    key = new_key()
    sandbox.admin("PUT", "terminals/1234001", mode="not-enabled")
    answer = payroc.create(key=key)
    assert answer.status_code == 403
    assert problem_type(answer) == "forbidden"
    assert answer.json()["resource"] == "processingTerminal"
    assert payroc.create(body(processingTerminalId="1234002")).status_code == 201
    sandbox.admin("PUT", "terminals/1234001", mode="enabled")
    assert payroc.create(key=key).status_code == 201


def test_a_terminal_without_ach_misses_the_capability_and_works_once_it_has_it(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    key = new_key()
    sandbox.admin("PUT", "terminals/1234001", mode="no-ach")
    answer = payroc.create(key=key)
    assert answer.status_code == 400
    assert problem_type(answer) == "capabilities-missing"
    assert parameters(answer) == ["processingTerminalId"]
    sandbox.admin("PUT", "terminals/1234001", mode="enabled")
    assert payroc.create(key=key).status_code == 201


def test_an_unknown_path_or_method_is_a_problem_document(payroc: Client) -> None:
    assert problem_type(payroc.send("GET", "/payments")) == "not-found"
    assert payroc.send("DELETE", "/bank-transfer-refunds").status_code == 405
