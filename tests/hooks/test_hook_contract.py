"""The requests that leave the hook, as a server receives them, against Payroc's own OpenAPI."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from include.refunds.cipher import Cipher
from include.refunds.pull import build
from include.refunds.settings import get_settings
from include.refunds.source import COLUMNS

OPENAPI = Path(__file__).parents[3] / "shared" / "payroc" / "openapi-bank-transfer-refunds.json"

pytestmark = pytest.mark.skipif(
    not OPENAPI.is_file(), reason="Payroc's OpenAPI file is not beside this checkout"
)

ROW: dict[str, Any] = dict.fromkeys(COLUMNS) | {
    "source_ref": "ref-1",
    "processing_terminal_id": "1234001",
    "amount": 4999,
    "currency": "USD",
    "name_on_account": "Sarah Hopper",
    "account_type": "checking",
    "sec_code": "ppd",
    "routing_number": "053200983",
    "account_number": "556677889911",
    "email": "sarah.hopper@example.com",
    "requested_by": "ann",
    "approved_by": "bob",
    "approved_at": datetime(2026, 11, 20, tzinfo=UTC),
}
EMPTY_PAGE = {"limit": 10, "count": 0, "hasMore": False, "links": [], "data": []}
TOKEN_ROW = ROW | {
    "routing_number": None,
    "account_number": None,
    "name_on_account": None,
    "secure_token": "296753123456",
}


def violations(operation: dict[str, Any], seen: Any) -> list[str]:
    """Return what a received request breaks of an operation: required parameters, their schemas, unknown ones, the body."""
    found = []
    known = {
        parameter["name"]: parameter for parameter in operation["parameters"] if parameter["in"] == "query"
    }
    found += [f"unknown query parameter {name}" for name, _ in seen.query if name not in known]
    for parameter in operation["parameters"]:
        name = parameter["name"]
        if parameter["in"] == "header":
            values: list[str] = [seen.headers[name.lower()]] if name.lower() in seen.headers else []
        elif parameter["in"] == "query":
            values = [value for key, value in seen.query if key == name]
        else:
            continue
        if parameter.get("required") and not values:
            found.append(f"{name} is missing")
        schema = parameter["schema"]
        validator = Draft202012Validator(schema.get("items", schema), format_checker=FormatChecker())
        for value in values:
            typed = int(value) if schema.get("type") in ("integer", "number") else value
            found += [f"{name}: {error.message}" for error in validator.iter_errors(typed)]
    if "requestBody" in operation:
        content = operation["requestBody"]["content"]
        schema = content[seen.headers["content-type"]]["schema"]
        found += [error.message for error in Draft202012Validator(schema).iter_errors(json.loads(seen.body))]
    elif seen.body:
        found.append("a body where none is documented")
    return found


@pytest.mark.parametrize("row", [ROW, TOKEN_ROW], ids=["bank account", "secure token"])
def test_what_the_hook_sends_for_a_source_row_is_what_payroc_documents(
    hook, payroc, token, reply, refund_body, row: dict[str, Any]
) -> None:
    paths = json.loads(OPENAPI.read_text())["paths"]
    refund, body = build(row, Cipher(get_settings()), get_settings(), datetime.now(UTC))
    refund_id = "CD3HN88U9F"
    payroc.on("POST", "/v1/bank-transfer-refunds", reply(201, refund_body))
    payroc.on("GET", "/v1/bank-transfer-refunds", reply(200, EMPTY_PAGE))
    payroc.on("GET", f"/v1/bank-transfer-refunds/{refund_id}", reply(200, refund_body))
    payroc.on("POST", f"/v1/bank-transfer-refunds/{refund_id}/reverse", reply(200, refund_body))

    hook.create_refund(body, idempotency_key=refund.idempotency_key, token=token)
    since = datetime(2026, 11, 20, 1, 2, 3, tzinfo=UTC)
    list(
        hook.list_refunds(
            "1234001",
            order_id=refund.order_id,
            status=("ready", "pending"),
            date_from=since,
            date_to=since,
            last4="1234",
            settlement_state="settled",
            token=token,
        )
    )
    hook.get_refund(refund_id, token=token)
    hook.reverse_refund(refund_id, idempotency_key=refund.idempotency_key, token=token)

    received = [seen for seen in payroc.seen if seen.path.startswith("/v1/")]
    assert len(received) == 4
    for seen in received:
        template = re.sub(refund_id, "{refundId}", seen.path.removeprefix("/v1"))
        assert violations(paths[template][seen.method.lower()], seen) == []
        assert seen.headers["authorization"].startswith("Bearer ")


def test_the_check_finds_what_is_not_documented(hook, payroc, token, reply) -> None:
    operation = json.loads(OPENAPI.read_text())["paths"]["/bank-transfer-refunds"]["get"]
    payroc.on("GET", "/v1/bank-transfer-refunds", reply(200, EMPTY_PAGE))
    list(hook.list_refunds("1", status="odd", token=token))
    found = violations(operation, payroc.seen[-1])
    assert any(text.startswith("processingTerminalId") for text in found)
    assert any(text.startswith("status") for text in found)
