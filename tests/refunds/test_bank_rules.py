"""The rules of Nacha and of the American Bankers Association that a source row is held against."""

from __future__ import annotations

import json
from typing import Any

import pytest

from include.payroc.routing import aba_checksum_valid
from include.refunds.bank_rules import routing_number_error, routing_number_warning, sec_code, sec_code_error
from include.refunds.reissue import with_order


@pytest.mark.parametrize("given", [None, ""])
@pytest.mark.parametrize("default", ["ppd", "ccd"])
def test_a_row_without_a_code_gets_the_default(given: str | None, default: str) -> None:
    assert sec_code(given, default) == default


@pytest.mark.parametrize("given", ["ccd", "CCD", "Ccd"])
def test_a_code_is_taken_in_the_capitals_of_nacha_and_sent_in_the_small_letters_of_payroc(given: str) -> None:
    assert sec_code(given, "ppd") == "ccd"


@pytest.mark.parametrize("code", ["ppd", "ccd"])
@pytest.mark.parametrize("allow_web", [True, False])
def test_consumers_are_paid_by_ppd_and_businesses_by_ccd(code: str, allow_web: bool) -> None:
    assert sec_code_error(code, allow_web=allow_web) is None


@pytest.mark.parametrize("allow_web", [True, False])
def test_tel_is_refused_whatever_the_setting_says(allow_web: bool) -> None:
    assert "debits" in str(sec_code_error("tel", allow_web=allow_web))


def test_web_is_refused_unless_the_setting_allows_it_and_the_refusal_names_the_setting() -> None:
    assert "PAYROC_REFUNDS_ALLOW_SEC_WEB" in str(sec_code_error("web", allow_web=False))
    assert sec_code_error("web", allow_web=True) is None


@pytest.mark.parametrize("given", ["xyz", " ", "ppd ", "p\x00d", 7, True, b"ppd", ["ppd"]])
@pytest.mark.parametrize("allow_web", [True, False])
def test_anything_else_is_refused_with_what_to_give_and_without_the_value(
    given: object, allow_web: bool
) -> None:
    assert (
        sec_code_error(sec_code(given, "ppd"), allow_web=allow_web)
        == "must be ppd for a consumer or ccd for a business"
    )


def test_nine_zeros_are_refused_although_they_pass_the_checksum() -> None:
    assert aba_checksum_valid("000000000")
    assert "zeros" in str(routing_number_error("000000000"))
    assert routing_number_error("053200983") is None


@pytest.mark.parametrize(
    "first_two", [f"{number:02}" for number in (*range(13), *range(21, 33), *range(61, 73), 80)]
)
def test_a_routing_number_of_a_documented_range_is_not_warned_of(first_two: str) -> None:
    assert routing_number_warning(f"{first_two}0000000") is None


@pytest.mark.parametrize(
    "first_two",
    [f"{number:02}" for number in (*range(13, 21), *range(33, 61), *range(73, 80), *range(81, 100))],
)
def test_a_routing_number_of_no_documented_range_is_warned_of_without_the_number(first_two: str) -> None:
    number = f"{first_two}4477881"
    warning = str(routing_number_warning(number))
    assert "first two digits" in warning
    assert number not in warning
    assert number[2:] not in warning


@pytest.mark.parametrize("given", [None, "", 130000006, "13000000", "١٣٠٠٠٠٠٠٦"])
def test_what_is_no_routing_number_is_refused_elsewhere_and_not_warned_of(given: object) -> None:
    assert routing_number_warning(given) is None


FROZEN: dict[str, Any] = {
    "processingTerminalId": "7701001",
    "order": {"orderId": "OLD", "description": "", "amount": 1, "currency": "USD"},
    "customFields": [{"name": "refundKey", "value": "old"}],
}
REISSUED = FROZEN | {
    "order": FROZEN["order"] | {"orderId": "NEW"},
    "customFields": [{"name": "refundKey", "value": "new"}],
}
ACCOUNT = {
    "type": "ach",
    "accountType": "checking",
    "nameOnAccount": "Sarah Hopper",
    "accountNumber": "556677889911",
}


@pytest.mark.parametrize(
    "method",
    [
        ACCOUNT | {"secCode": "tel", "routingNumber": "053200983"},
        ACCOUNT | {"secCode": "web", "routingNumber": "053200983"},
        ACCOUNT | {"secCode": "ppd", "routingNumber": "000000000"},
        ACCOUNT | {"secCode": "ppd", "routingNumber": "130000006"},
        {"type": "secureToken", "token": "296753123456"},
        {"type": "secureToken", "token": "296753123456", "secCode": "tel"},
    ],
)
def test_a_body_that_was_frozen_under_other_rules_is_reissued_as_it_is(method: dict[str, str]) -> None:
    frozen = json.dumps(FROZEN | {"refundMethod": method}).encode()
    assert json.loads(with_order(frozen, "NEW", "new")) == REISSUED | {"refundMethod": method}
