"""Our requests against Payroc's own OpenAPI, which is the only judge of them that we have without an account."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from include.payroc.currencies import CURRENCIES
from include.payroc.models import RefundRequest

OPENAPI = Path(__file__).parents[3] / "shared" / "payroc" / "openapi-bank-transfer-refunds.json"

pytestmark = pytest.mark.skipif(
    not OPENAPI.is_file(), reason="Payroc's OpenAPI file is not beside this checkout"
)


def operation(path: str, method: str) -> dict[str, Any]:
    return json.loads(OPENAPI.read_text())["paths"][path][method]


@pytest.fixture(scope="module")
def create_schema() -> jsonschema.Draft202012Validator:
    schema = operation("/bank-transfer-refunds", "post")["requestBody"]["content"]["application/json"][
        "schema"
    ]
    return jsonschema.Draft202012Validator(schema)


def text(least: int, most: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=least, max_size=most)


contacts = st.fixed_dictionaries({"type": st.just("email"), "value": text(0, 50)}) | st.fixed_dictionaries(
    {"type": st.sampled_from(["phone", "mobile", "fax"]), "value": text(0, 15)}
)
ach = st.fixed_dictionaries(
    {
        "type": st.just("ach"),
        "secCode": st.sampled_from(["web", "tel", "ccd", "ppd"]),
        "accountType": st.sampled_from(["checking", "savings"]),
        "nameOnAccount": text(1, 50),
        "accountNumber": st.text("0123456789", min_size=4, max_size=17),
        "routingNumber": st.text("0123456789", min_size=9, max_size=9),
    }
)
secure_token = st.fixed_dictionaries(
    {"type": st.just("secureToken"), "token": text(12, 19)},
    optional={
        "accountType": st.sampled_from(["checking", "savings"]),
        "secCode": st.sampled_from(["web", "tel", "ccd", "ppd"]),
    },
)
bodies = st.fixed_dictionaries(
    {
        "processingTerminalId": text(4, 50),
        "order": st.fixed_dictionaries(
            {
                "orderId": text(1, 24),
                "description": text(0, 256),
                "amount": st.integers(1, 2**63 - 1),
                "currency": st.sampled_from(sorted(CURRENCIES)),
            }
        ),
        "refundMethod": ach | secure_token,
    },
    optional={
        "customer": st.fixed_dictionaries(
            {},
            optional={
                "notificationLanguage": st.sampled_from(["en", "fr"]),
                "contactMethods": st.lists(
                    contacts, max_size=3, unique_by=lambda item: (item["type"], item["value"])
                ),
            },
        ),
        "customFields": st.lists(
            st.fixed_dictionaries({"name": text(1, 56), "value": text(1, 100)}), max_size=3
        ),
    },
)


@given(body=bodies)
def test_every_request_that_we_can_make_is_valid_for_payroc_and_says_what_it_was_given(
    create_schema, body
) -> None:
    sent = json.loads(RefundRequest.model_validate(body, context={"aba_checksum": False}).to_body())
    create_schema.validate(sent)
    assert sent == body


def test_the_schema_of_the_test_refuses_what_it_should(create_schema) -> None:
    assert not create_schema.is_valid({"processingTerminalId": "1234001"})


def test_our_currencies_are_payrocs() -> None:
    schema = operation("/bank-transfer-refunds", "post")["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert set(schema["properties"]["order"]["allOf"][0]["properties"]["currency"]["enum"]) == CURRENCIES


def test_every_filter_of_our_lists_is_payrocs() -> None:
    ours = {
        "processingTerminalId",
        "orderId",
        "type",
        "status",
        "dateFrom",
        "dateTo",
        "last4",
        "settlementState",
        "limit",
    }
    parameters = operation("/bank-transfer-refunds", "get")["parameters"]
    assert ours <= {parameter["name"] for parameter in parameters if parameter["in"] == "query"}
