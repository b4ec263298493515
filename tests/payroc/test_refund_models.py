"""The models refuse what Payroc refuses, accept what Payroc sends, and show no bank data."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from include.payroc import problems
from include.payroc.answers import NotUnderstood, read_page
from include.payroc.currencies import CURRENCIES
from include.payroc.models import (
    MAX_AMOUNT,
    AccessToken,
    AchMethod,
    Problem,
    Refund,
    RefundRequest,
    explain,
)
from include.payroc.routing import aba_checksum_valid

EXAMPLES = Path(__file__).parents[3] / "shared" / "payroc" / "examples"
needs_examples = pytest.mark.skipif(
    not EXAMPLES.is_dir(), reason="Payroc's example bodies are not beside this checkout"
)

NO_CHECKSUM = {"aba_checksum": False}

ACH: dict[str, Any] = {
    "processingTerminalId": "1234001",
    "order": {
        "orderId": "OrderRef6543",
        "description": "Refund for order OrderRef6543",
        "amount": 4999,
        "currency": "USD",
    },
    "refundMethod": {
        "type": "ach",
        "secCode": "ppd",
        "accountType": "checking",
        "nameOnAccount": "Canary Payee",
        "accountNumber": "9876543210",
        "routingNumber": "053200983",
    },
    "customer": {
        "notificationLanguage": "en",
        "contactMethods": [{"type": "email", "value": "canary@example.com"}],
    },
    "customFields": [{"name": "refundKey", "value": "8e03978e-40d5-43e8-bc93-6894a57f9324"}],
}
TOKEN = ACH | {
    "refundMethod": {
        "type": "secureToken",
        "token": "296753123456",
        "accountType": "checking",
        "secCode": "ppd",
    }
}
SECRETS = ("Canary Payee", "9876543210", "053200983", "canary@example.com", "296753123456")

REFUND: dict[str, Any] = {
    "refundId": "CD3HN88U9F",
    "processingTerminalId": "1234001",
    "order": {
        "orderId": "OrderRef6543",
        "dateTime": "2024-07-02T15:30:00Z",
        "description": "",
        "amount": 4999,
        "currency": "USD",
    },
    "bankAccount": {
        "type": "ach",
        "secCode": "web",
        "nameOnAccount": "Canary Payee",
        "accountNumber": "****7890",
        "routingNumber": "*****6789",
    },
    "transactionResult": {
        "type": "unreferencedRefund",
        "status": "ready",
        "authorizedAmount": -4999,
        "currency": "USD",
        "responseCode": "A",
    },
    "customFields": [
        {"name": "other", "value": "x"},
        {"name": "refundKey", "value": "8e03978e-40d5-43e8-bc93-6894a57f9324"},
    ],
}


def changed(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy with one field set, or removed when the value is ``...``."""
    body = copy.deepcopy(body)
    *parents, last = path.split(".")
    target: Any = body
    for name in parents:
        target = target[int(name)] if isinstance(target, list) else target[name]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return body


def request(body: dict[str, Any], **context: bool) -> RefundRequest:
    return RefundRequest.model_validate(body, context=context)


def refused(body: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        RefundRequest.model_validate(body)
    return explain(caught.value)


# --- requests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [ACH, TOKEN], ids=["ach", "secure token"])
def test_a_body_has_everything_that_was_given_and_no_null(body) -> None:
    sent = request(body).to_body()
    assert json.loads(sent) == body
    assert b"null" not in sent
    assert b": " not in sent


def test_optional_parts_are_left_out_of_the_body() -> None:
    body = {name: value for name, value in TOKEN.items() if name not in ("customer", "customFields")}
    body["refundMethod"] = {"type": "secureToken", "token": "296753123456"}
    assert json.loads(request(body).to_body()) == body


def test_equal_requests_give_equal_bytes_whatever_the_order_and_spelling_of_the_input() -> None:
    other = {name: ACH[name] for name in reversed(ACH)}
    other["refundMethod"] = {name: ACH["refundMethod"][name] for name in reversed(ACH["refundMethod"])}
    other["processing_terminal_id"] = other.pop("processingTerminalId")
    assert request(other).to_body() == request(ACH).to_body()
    assert request(ACH).to_body() == RefundRequest.model_validate_json(request(ACH).to_body()).to_body()


def test_text_beyond_ascii_travels_as_utf_8() -> None:
    sent = request(changed(ACH, "refundMethod.nameOnAccount", "Zoë Ñandú 李")).to_body()
    assert "Zoë Ñandú 李".encode() in sent


@given(st.integers(1, MAX_AMOUNT))
def test_every_amount_of_an_int64_above_zero_is_sent_as_it_is(amount: int) -> None:
    assert json.loads(request(changed(ACH, "order.amount", amount)).to_body())["order"]["amount"] == amount


@given(
    st.integers(max_value=0)
    | st.integers(MAX_AMOUNT + 1)
    | st.floats()
    | st.booleans()
    | st.text()
    | st.decimals()
)
def test_no_other_amount_is_accepted(amount: object) -> None:
    assert set(refused(changed(ACH, "order.amount", amount))) == {"order.amount"}


LENGTHS = [
    ("processingTerminalId", 4, 50),
    ("order.orderId", 1, 24),
    ("order.description", 0, 256),
    ("refundMethod.nameOnAccount", 1, 50),
    ("customFields.0.name", 1, 56),
    ("customFields.0.value", 1, 100),
]


@given(st.data())
@pytest.mark.parametrize(("path", "least", "most"), LENGTHS)
def test_text_is_accepted_exactly_within_its_length(path, least, most, data) -> None:
    text = data.draw(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=most + 10))
    body = changed(ACH, path, text)
    if least <= len(text) <= most:
        assert json.loads(request(body).to_body()) == body
    else:
        assert len(refused(body)) == 1


@given(st.data())
@pytest.mark.parametrize(
    ("path", "least", "most"), [("refundMethod.accountNumber", 4, 17), ("refundMethod.routingNumber", 9, 9)]
)
def test_a_number_of_an_account_is_accepted_exactly_within_its_digits(path, least, most, data) -> None:
    text = data.draw(st.text("0123456789", max_size=most + 5))
    body = changed(ACH, path, text)
    if least <= len(text) <= most:
        assert json.loads(request(body, aba_checksum=False).to_body()) == body
    else:
        assert "digits" in "".join(refused(body).values())


@pytest.mark.parametrize("text", ["12 34", "1234a", "-1234", "12.34", "١٢٣٤", "1234\n", "", " 1234", "1234²"])
def test_only_the_digits_0_to_9_make_a_number(text) -> None:
    assert refused(changed(ACH, "refundMethod.accountNumber", text)) == {
        "refund_method.account_number": "must be 4 to 17 digits"
    }


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("processingTerminalId", 1234001, "processing_terminal_id"),
        ("processingTerminalId", ..., "processing_terminal_id"),
        ("order", ..., "order"),
        ("order.orderId", ..., "order.order_id"),
        ("order.description", ..., "order.description"),
        ("order.amount", ..., "order.amount"),
        ("order.currency", ..., "order.currency"),
        ("order.currency", "usd", "order.currency"),
        ("order.currency", "XXX", "order.currency"),
        ("order.currency", "BTC", "order.currency"),
        ("order.orderId", "a\udc80", "order.order_id"),
        ("refundMethod", ..., "refund_method"),
        ("refundMethod.type", "pad", "refund_method"),
        ("refundMethod.type", ..., "refund_method"),
        ("refundMethod.secCode", ..., "refund_method.sec_code"),
        ("refundMethod.secCode", "PPD", "refund_method.sec_code"),
        ("refundMethod.accountType", ..., "refund_method.account_type"),
        ("refundMethod.accountType", "current", "refund_method.account_type"),
        ("refundMethod.nameOnAccount", ..., "refund_method.name_on_account"),
        ("refundMethod.nameOnAccount", "a\udc80", "refund_method.name_on_account"),
        ("refundMethod.accountNumber", ..., "refund_method.account_number"),
        ("refundMethod.accountNumber", 9876543210, "refund_method.account_number"),
        ("refundMethod.routingNumber", ..., "refund_method.routing_number"),
        ("customer.notificationLanguage", "de", "customer.notification_language"),
        ("customer.contactMethods.0.type", "pigeon", "customer.contact_methods.0.type"),
        ("customer.contactMethods.0.value", ..., "customer.contact_methods.0.value"),
        ("customer.contactMethods.0.value", "a" * 51, "customer.contact_methods.0"),
        ("customFields.0.name", ..., "custom_fields.0.name"),
        ("unknown", 1, "unknown"),
        ("order.dateTime", "2024-07-02T15:30:00Z", "order.dateTime"),
    ],
)
def test_what_is_wrong_is_told_by_its_field(path, value, field) -> None:
    assert list(refused(changed(ACH, path, value))) == [field]


@pytest.mark.parametrize("sec_code", ["web", "tel", "ccd", "ppd"])
@pytest.mark.parametrize("account_type", ["checking", "savings"])
def test_every_sec_code_and_account_type_of_payrocs_is_accepted(sec_code, account_type) -> None:
    body = changed(changed(ACH, "refundMethod.secCode", sec_code), "refundMethod.accountType", account_type)
    assert json.loads(request(body).to_body()) == body


@pytest.mark.parametrize(("kind", "most"), [("email", 50), ("phone", 15), ("mobile", 15), ("fax", 15)])
def test_a_contact_has_at_most_its_length(kind, most) -> None:
    fitting = changed(ACH, "customer.contactMethods", [{"type": kind, "value": "1" * most}])
    assert json.loads(request(fitting).to_body()) == fitting
    too_long = changed(ACH, "customer.contactMethods", [{"type": kind, "value": "1" * (most + 1)}])
    assert refused(too_long) == {"customer.contact_methods.0": f"must have at most {most} characters"}


def test_a_contact_may_not_be_repeated() -> None:
    contact = {"type": "phone", "value": "2025550164"}
    assert list(refused(changed(ACH, "customer.contactMethods", [contact, dict(contact)]))) == [
        "customer.contact_methods"
    ]


@pytest.mark.parametrize(("length", "accepted"), [(11, False), (12, True), (19, True), (20, False)])
def test_a_secure_token_has_12_to_19_characters_and_need_not_pass_luhn(length, accepted) -> None:
    body = changed(TOKEN, "refundMethod.token", "296753123456789012345"[:length])
    if accepted:
        assert json.loads(request(body).to_body()) == body
    else:
        assert refused(body) == {"refund_method.token": "must have 12 to 19 characters"}


def test_payroc_lists_171_currencies() -> None:
    assert len(CURRENCIES) == 171
    assert {"USD", "CAD"} < CURRENCIES


def test_a_request_can_not_be_changed_once_made() -> None:
    with pytest.raises(ValidationError):
        request(ACH).order.amount = 1


# --- routing numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["053200983", "111000025", "011000015", "021000021", "000000000"])
def test_numbers_with_a_fitting_check_digit_are_valid(number) -> None:
    assert aba_checksum_valid(number)


@pytest.mark.parametrize(
    "number", ["123456789", "053200984", "", "05320098", "0532009830", "05320098a", "٠٥٣٢٠٠٩٨٣", "05320098²"]
)
def test_numbers_without_a_fitting_check_digit_are_not(number) -> None:
    assert not aba_checksum_valid(number)


@given(st.integers(0, 10**8 - 1), st.integers(0, 8), st.integers(1, 9))
def test_one_wrong_digit_is_always_found(stem: int, place: int, shift: int) -> None:
    (number,) = (text for last in range(10) if aba_checksum_valid(text := f"{stem:08}{last}"))
    wrong = number[:place] + str((int(number[place]) + shift) % 10) + number[place + 1 :]
    assert not aba_checksum_valid(wrong)


@pytest.mark.parametrize("number", ["123456789", "000000000"])
def test_the_checksum_is_demanded_unless_the_context_says_otherwise(number) -> None:
    body = changed(ACH, "refundMethod.routingNumber", number)
    assert list(refused(body)) == ["refund_method.routing_number"]
    assert json.loads(request(body, **NO_CHECKSUM).to_body()) == body
    with pytest.raises(ValidationError):
        AchMethod(**body["refundMethod"])


# --- answers --------------------------------------------------------------------------------------------------------------


def refund(path: str | None = None, value: Any = None) -> Refund:
    return Refund.model_validate_json(json.dumps(changed(REFUND, path, value) if path else REFUND))


def test_a_refund_tells_its_key_its_last_four_and_its_result() -> None:
    got = refund()
    assert (got.refund_id, got.last4, got.refund_key) == (
        "CD3HN88U9F",
        "7890",
        "8e03978e-40d5-43e8-bc93-6894a57f9324",
    )
    assert (got.order.amount, got.transaction_result.authorized_amount) == (4999, -4999)
    assert got.order.date_time is not None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("transactionResult.status", "a-word-of-tomorrow"),
        ("transactionResult.responseCode", "Z"),
        ("transactionResult.type", "another"),
        ("transactionResult.authorizedAmount", ...),
        ("transactionResult.authorizedAmount", None),
        ("transactionResult.currency", ...),
        ("transactionResult.extra", {"deep": [1]}),
        ("extra", 1),
        ("order.extra", 1),
        ("order.dateTime", "yesterday"),
        ("order.dateTime", 5),
        ("order.currency", "NEW"),
        ("order.description", ...),
        ("bankAccount.type", "new"),
        (
            "bankAccount",
            {
                "type": "pad",
                "nameOnAccount": "A",
                "accountNumber": "***4567",
                "transitNumber": "76543",
                "institutionNumber": "543",
            },
        ),
        ("bankAccount.secureToken", {"secureTokenId": "x"}),
        ("bankAccount", ...),
        ("customer", {"contactMethods": "odd"}),
        ("customFields", ...),
        ("customFields", None),
        ("payment", {"paymentId": "M2MJOG6O2Y"}),
    ],
)
def test_a_refund_is_recognized_whatever_is_new_or_missing_beside_it(path, value) -> None:
    assert refund(path, value).refund_id == "CD3HN88U9F"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("refundId", ...),
        ("refundId", "SHORT"),
        ("refundId", "ELEVENCHARS"),
        ("refundId", 1234567890),
        ("processingTerminalId", ...),
        ("order", ...),
        ("order.orderId", ...),
        ("order.amount", "4999"),
        ("order.amount", 49.99),
        ("order.amount", True),
        ("transactionResult", ...),
        ("transactionResult.status", ...),
        ("transactionResult.status", None),
        ("transactionResult.responseCode", ...),
        ("transactionResult.authorizedAmount", "-4999"),
        ("customFields", "odd"),
    ],
)
def test_what_lacks_the_facts_we_decide_on_is_no_refund(path, value) -> None:
    with pytest.raises(ValidationError):
        refund(path, value)


@pytest.mark.parametrize(
    ("number", "last4"),
    [
        ("****7890", "7890"),
        ("*******7890", "7890"),
        ("*7890", "7890"),
        ("123456789", "6789"),
        ("7890", "7890"),
        ("****", None),
        ("***789", None),
        ("", None),
        ("7890****", None),
        ("****7890\n", None),
        ("****٧٨٩٠", None),
    ],
)
def test_last_four_are_the_digits_at_the_end_however_many_stars_precede_them(number, last4) -> None:
    assert refund("bankAccount.accountNumber", number).last4 == last4


def test_without_an_account_or_custom_fields_there_is_neither_last_four_nor_key() -> None:
    assert refund("bankAccount", ...).last4 is None
    assert refund("bankAccount.accountNumber", ...).last4 is None
    assert refund("customFields", ...).refund_key is None
    assert refund("customFields.1.name", "RefundKey").refund_key is None


def test_a_page_needs_to_say_whether_it_is_the_last() -> None:
    page = {"limit": 10, "count": 1, "hasMore": False, "data": [REFUND]}
    assert read_page(json.dumps(page).encode(), 1).refunds[0].refund_id == "CD3HN88U9F"
    for name in page:
        with pytest.raises(NotUnderstood, match="see "):
            read_page(json.dumps({key: value for key, value in page.items() if key != name}).encode(), 1)


@pytest.mark.parametrize(
    ("kind", "fragment"),
    [
        ("https://docs.payroc.com/api/errors#bad-request", problems.BAD_REQUEST),
        ("https://docs.payroc.com/api/errors#idempotency-key-in-use", problems.IDEMPOTENCY_KEY_IN_USE),
        ("https://docs.payroc.com/api/errors/forbidden", problems.FORBIDDEN),
        ("https://docs.payroc.com/api/errors/forbidden/", problems.FORBIDDEN),
        ("api-error", problems.API_ERROR),
        ("about:blank", "about:blank"),
        ("#", ""),
    ],
)
def test_a_problem_is_named_by_the_end_of_its_type(kind, fragment) -> None:
    assert Problem.model_validate_json(json.dumps({"type": kind})).fragment == fragment


def test_odd_extras_do_not_hide_a_problem() -> None:
    odd = {
        "type": "x#bad-request",
        "title": 1,
        "status": "400",
        "detail": None,
        "errors": 5,
        "instance": [],
        "resource": {},
        "link": "x",
    }
    got = Problem.model_validate_json(json.dumps(odd))
    assert (got.fragment, got.errors, got.instance) == ("bad-request", None, None)
    assert not got.complete


@needs_examples
@pytest.mark.parametrize(
    "name",
    [
        "create-refund-response-201",
        "retrieve-refund-response-200",
        "reverse-refund-response-200",
        "sdk-python-wiremock-create-201",
    ],
)
def test_payrocs_example_refunds_are_refunds(name) -> None:
    got = Refund.model_validate_json((EXAMPLES / f"{name}.json").read_bytes())
    assert got.refund_id == "CD3HN88U9F"
    assert got.customer is not None
    assert got.order.date_time is not None


@needs_examples
@pytest.mark.parametrize(
    ("name", "count"), [("list-refunds-response-200", 2), ("list-refunds-response-200-empty", 0)]
)
def test_payrocs_example_pages_are_pages(name, count) -> None:
    page = read_page((EXAMPLES / f"{name}.json").read_bytes(), 1)
    assert (len(page.refunds), page.not_understood) == (count, ())


@needs_examples
@pytest.mark.parametrize(
    "name",
    [
        "create-refund-request-ach",
        "create-refund-request-securetoken",
        "sdk-dotnet-functional-unreferenced-refund",
    ],
)
def test_payrocs_example_requests_come_out_as_they_went_in(name) -> None:
    body = (EXAMPLES / f"{name}.json").read_bytes()
    assert json.loads(RefundRequest.model_validate_json(body, context=NO_CHECKSUM).to_body()) == json.loads(
        body
    )


@needs_examples
def test_payrocs_smallest_example_lacks_what_its_text_demands() -> None:
    body = (EXAMPLES / "create-refund-request-ach-schema-minimum.json").read_bytes()
    with pytest.raises(ValidationError) as caught:
        RefundRequest.model_validate_json(body, context=NO_CHECKSUM)
    assert set(explain(caught.value)) == {"refund_method.sec_code", "refund_method.account_type"}


@needs_examples
def test_payrocs_example_errors_are_problems_with_known_types() -> None:
    known = {value for name, value in vars(problems).items() if name.isupper()}
    examples = sorted(EXAMPLES.glob("error-*.json"))
    assert examples
    for path in examples:
        problem = Problem.model_validate_json(path.read_bytes())
        assert problem.complete
        assert problem.fragment in known


@needs_examples
def test_payrocs_example_token_is_a_token() -> None:
    assert (
        AccessToken.model_validate_json((EXAMPLES / "authorize-response-200.json").read_bytes()).expires_in
        == 3600
    )


# --- secrecy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [ACH, TOKEN], ids=["ach", "secure token"])
def test_a_request_shows_no_bank_data_however_it_is_printed(body, caplog) -> None:
    made = request(body)
    logging.getLogger("test").warning("%s %r", made, made)
    shown = "".join(
        [
            str(made),
            repr(made),
            f"{made.model_dump()}",
            made.model_dump_json(),
            caplog.text,
            repr(made.refund_method),
        ]
    )
    for secret in SECRETS:
        assert secret not in shown


def test_an_answer_shows_no_bank_data_however_it_is_printed() -> None:
    got = refund("bankAccount.accountNumber", "9876543210")
    shown = str(got) + repr(got) + str(got.model_dump()) + got.model_dump_json()
    assert "Canary Payee" not in shown
    assert "9876543210" not in shown


def test_a_token_shows_itself_to_nobody() -> None:
    token = AccessToken.model_validate({"access_token": "canary-token", "expires_in": 60})
    assert "canary" not in str(token) + repr(token) + str(token.model_dump()) + token.model_dump_json()


BROKEN = [
    ("refundMethod.accountNumber", "98765-43210-canary"),
    ("refundMethod.routingNumber", "123456789"),
    ("refundMethod.nameOnAccount", "Canary Payee" * 10),
    ("refundMethod.type", "9876543210"),
    ("refundMethod.secCode", "9876543210"),
    ("refundMethod.accountType", "9876543210"),
    ("refundMethod", "9876543210"),
    ("order.currency", "9876543210"),
    ("order.amount", "9876543210"),
    ("customer.contactMethods.0.value", "canary@example.com" * 5),
    ("customer.contactMethods.0.type", "9876543210"),
    ("9876543210", 1),
]


@pytest.mark.parametrize(("path", "value"), BROKEN)
def test_a_refused_request_explains_itself_without_values(path, value, caplog) -> None:
    with pytest.raises(ValidationError) as caught:
        RefundRequest.model_validate(changed(ACH, path, value))
    told = explain(caught.value)
    assert told
    # Pydantic names an unknown key in its own text; explain() does not.
    if path != "9876543210":
        logging.getLogger("test").error("refused: %s", caught.value, exc_info=caught.value)
        told |= {"log": caplog.text, "str": str(caught.value), "repr": repr(caught.value)}
    for secret in (*SECRETS, "98765", "canary", "123456789"):
        assert secret.lower() not in repr(told).lower().replace("canary_", "")


def test_models_survive_a_pickle() -> None:
    for model in (
        request(ACH),
        refund(),
        AccessToken.model_validate({"access_token": "a", "expires_in": 60}),
    ):
        assert pickle.loads(pickle.dumps(model)) == model
