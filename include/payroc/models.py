"""
Payroc's unreferenced bank-transfer refunds as models.

Requests are strict: what Payroc's schema refuses is refused here, before it costs a call. Answers are tolerant: fields and
status words that are new to us must not hide a refund that exists. Sources: https://docs.payroc.com/api and Payroc's OpenAPI
(operations ``bankTransferUnreferencedRefund``, ``listBankTransferRefunds``).

Bank data, tokens and contact details are ``SecretStr``, so that no ``repr`` and no log shows them. Pydantic keeps the input in
``ValidationError.errors()``: use :func:`explain`, which never does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, LiteralString

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from include.payroc.currencies import CURRENCIES
from include.payroc.routing import aba_checksum_valid

REFUND_KEY_FIELD: Final = "refundKey"
"""Name of the custom field in which our idempotency key travels; Payroc echoes it."""

MAX_AMOUNT: Final = 2**63 - 1
"""``order.amount`` is an int64 in Payroc's schema."""

_LAST4: Final = re.compile(r"[0-9]{4}\Z")

AccountType = Literal["checking", "savings"]
SecCode = Literal["web", "tel", "ccd", "ppd"]


def explain(error: ValidationError) -> dict[str, str]:
    """
    Return what is wrong, by field, without any value that was given.

    :param error: from any model of this module.
    :return: dotted path in snake_case (``refund_method.account_number``) to a message; an empty path is the object itself.
    """
    problems: dict[str, str] = {}
    for item in error.errors(include_input=False, include_url=False):
        path = ".".join(_safe_part(part) for part in item["loc"] if part not in _TAGS)
        known = _SENTENCES.get(item["type"])
        problems.setdefault(
            path, known.format(**item.get("ctx", {})) if known else item["msg"].removeprefix("Value error, ")
        )
    return problems


_SENTENCES: Final = {
    "missing": "is missing",
    "string_type": "must be text",
    "string_too_short": "must have at least {min_length} characters",
    # As Pydantic calls it behind a validator of ours.
    "too_short": "must have at least {min_length} characters",
    "too_long": "must have at most {max_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "literal_error": "must be {expected}",
}
"""
Sentences that follow the name of a field, by Pydantic's name of the error. What they take from its context is
the rule's, never the value.
"""


_TAGS: Final = frozenset({"ach", "secureToken"})
"""Pydantic names the chosen member of ``refundMethod`` in its paths; a reader looks for the field."""


def _safe_part(part: int | str) -> str:
    # An unknown key is the caller's text, and the caller may have put anything there.
    return str(part) if isinstance(part, int) or re.fullmatch(r"[A-Za-z_]{1,40}", part) else "?"


def _utf8(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("utf8", "must be text that UTF-8 can carry") from None
    if "\x00" in value:
        # Neither Postgres nor most banks' systems can hold it.
        raise PydanticCustomError("nul", "must not contain a NUL character")
    return value


def _secret(rule: Callable[[str], bool], sentence: LiteralString) -> AfterValidator:
    def check(value: SecretStr) -> SecretStr:
        _utf8(value.get_secret_value())
        if not rule(value.get_secret_value()):
            raise PydanticCustomError("format", sentence)
        return value

    return AfterValidator(check)


def _digits(value: str, least: int, most: int) -> bool:
    return re.fullmatch(f"[0-9]{{{least},{most}}}", value) is not None


Text = Annotated[str, AfterValidator(_utf8)]


class _Request(BaseModel):
    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        loc_by_alias=False,
        hide_input_in_errors=True,
        # Tasks that send need no model of a request, and each task is a process that would build them all.
        defer_build=True,
    )


class RefundOrder(_Request):
    """
    What is refunded.

    :param order_id: our id of the refund, 1 to 24 characters; also the filter by which a lost refund is looked up.
    :param description: 0 to 256 characters.
    :param amount: minor units, 1 to 2**63 - 1. The lower bound is the gateway's (``'amount' must be greater than 0``), not the schema's.
    :param currency: ISO 4217 code.
    """

    order_id: Annotated[Text, Field(min_length=1, max_length=24)]
    description: Annotated[Text, Field(max_length=256)]
    amount: Annotated[int, Field(gt=0, le=MAX_AMOUNT)]
    currency: str

    @field_validator("currency")
    @classmethod
    def _known_currency(cls, value: str) -> str:
        if value not in CURRENCIES:
            raise PydanticCustomError(
                "currency", "must be an ISO 4217 code in capitals that Payroc lists, such as USD"
            )
        return value


class AchMethod(_Request):
    """
    A US bank account.

    ``account_type`` and ``sec_code`` are optional in Payroc's schema and mandatory in its text, so they are required here.
    The checksum of the routing number is our check, not Payroc's; validation context ``{"aba_checksum": False}`` leaves it out.

    :param name_on_account: 1 to 50 characters.
    :param account_number: 4 to 17 digits.
    :param routing_number: 9 digits.
    """

    type: Literal["ach"] = "ach"
    sec_code: SecCode
    account_type: AccountType
    name_on_account: Annotated[
        SecretStr, _secret(lambda value: 1 <= len(value) <= 50, "must have 1 to 50 characters")
    ]
    account_number: Annotated[
        SecretStr, _secret(lambda value: _digits(value, 4, 17), "must be 4 to 17 digits")
    ]
    routing_number: Annotated[SecretStr, _secret(lambda value: _digits(value, 9, 9), "must be 9 digits")]

    @field_validator("routing_number")
    @classmethod
    def _aba(cls, value: SecretStr, info: ValidationInfo) -> SecretStr:
        number = value.get_secret_value()
        wanted = (info.context or {}).get("aba_checksum", True)
        # Nine zeros pass the checksum and are no bank.
        if wanted and (number == "000000000" or not aba_checksum_valid(number)):
            raise PydanticCustomError(
                "aba_checksum", "is not a valid ABA routing number: the check digit does not fit"
            )
        return value


class SecureTokenMethod(_Request):
    """
    A token of Payroc's that stands for a payee.

    :param token: 12 to 19 characters. Payroc's documented sample fails a Luhn check, so none is made.
    :param account_type: needed when the token stands for a bank account.
    :param sec_code: needed when the token stands for ACH details.
    """

    type: Literal["secureToken"] = "secureToken"
    token: Annotated[
        SecretStr, _secret(lambda value: 12 <= len(value) <= 19, "must have 12 to 19 characters")
    ]
    account_type: AccountType | None = None
    sec_code: SecCode | None = None


RefundMethod = Annotated[AchMethod | SecureTokenMethod, Discriminator("type")]


class ContactMethod(_Request):
    """A way to reach the payee. Payroc may use it to notify them. An email has up to 50 characters, a number up to 15."""

    type: Literal["email", "phone", "mobile", "fax"]
    value: Annotated[SecretStr, _secret(lambda value: True, "")]

    @model_validator(mode="after")
    def _length(self) -> ContactMethod:
        most = 50 if self.type == "email" else 15
        if len(self.value.get_secret_value()) > most:
            raise PydanticCustomError("length", "must have at most {most} characters", {"most": most})
        return self


class Customer(_Request):
    """
    Contact details of the payee.

    :param notification_language: language of Payroc's notifications.
    :param contact_methods: all different.
    """

    notification_language: Literal["en", "fr"] | None = None
    contact_methods: Annotated[tuple[ContactMethod, ...], Field(strict=False)] | None = None

    @field_validator("contact_methods")
    @classmethod
    def _unique(cls, value: tuple[ContactMethod, ...] | None) -> tuple[ContactMethod, ...] | None:
        if value is not None and len({(item.type, item.value.get_secret_value()) for item in value}) != len(
            value
        ):
            raise PydanticCustomError("unique", "must not repeat a contact method")
        return value


class CustomField(_Request):
    """
    A name and a value of our own that Payroc echoes.

    :param name: 1 to 56 characters.
    :param value: 1 to 100 characters.
    """

    name: Annotated[Text, Field(min_length=1, max_length=56)]
    value: Annotated[Text, Field(min_length=1, max_length=100)]


class RefundRequest(_Request):
    """
    The body of ``POST /bank-transfer-refunds``.

    :param processing_terminal_id: 4 to 50 characters; always text, even when all digits.
    """

    processing_terminal_id: Annotated[Text, Field(min_length=4, max_length=50)]
    order: RefundOrder
    refund_method: RefundMethod
    customer: Customer | None = None
    custom_fields: Annotated[tuple[CustomField, ...], Field(strict=False)] | None = None

    @field_validator("refund_method", mode="before")
    @classmethod
    def _known_method(cls, value: object) -> object:
        # Pydantic's own message would quote the type that was given.
        if isinstance(value, dict) and value.get("type") not in ("ach", "secureToken"):
            raise PydanticCustomError("refund_method", "must have the type ach or secureToken")
        return value

    def to_body(self) -> bytes:
        """Return the JSON to send: the same request gives the same bytes, and a key is only safe with the same bytes."""
        data = self.model_dump(by_alias=True, exclude_none=True)
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False, default=_reveal).encode()


def _reveal(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    raise TypeError(f"{type(value).__name__} has no place in a request")


def _or_none(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


Unimportant = WrapValidator(_or_none)
"""
For facts that decide nothing: an odd one is dropped rather than hiding the object around it. What stands inside must not be
strict, because a wrapped validator sees JSON's strings and lists as Python's.
"""


def _instant_or_none(value: object) -> datetime | None:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
        if found is None:
            return None
        # Some years have no place in UTC: 0001 east of it, 9999 west of it.
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class _Answer(BaseModel):
    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="ignore",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        loc_by_alias=False,
        hide_input_in_errors=True,
    )


class AnsweredOrder(_Answer):
    """
    The order of a refund that exists.

    :param amount: minor units, positive.
    :param date_time: in UTC; a date without a zone is taken for UTC, and one that can't be read for none.
    """

    order_id: Text
    amount: Int64
    currency: str
    description: str | None = None
    date_time: Annotated[datetime | None, BeforeValidator(_instant_or_none)] = None


class BankAccount(_Answer):
    """The account that is paid. Payroc masks its numbers, but not always: treat them as secret. ``type`` is ach, pad or a new word."""

    type: str
    name_on_account: SecretStr | None = None
    account_number: SecretStr | None = None
    routing_number: SecretStr | None = None
    transit_number: SecretStr | None = None
    institution_number: SecretStr | None = None
    sec_code: str | None = None


class TransactionResult(_Answer):
    """
    What became of a refund.

    :param status: ready, pending, declined, complete, admin, reversal, returned, or a word that is new to us.
    :param response_code: ``A`` approved, ``D`` declined, or another.
    :param authorized_amount: minor units, negative for a refund.
    """

    type: str
    status: str
    response_code: str
    authorized_amount: Int64 | None = None
    currency: str | None = None
    response_message: str | None = None
    processor_response_code: str | None = None


class AnsweredContact(_Answer):
    """A contact of the payee, as Payroc echoes it."""

    type: str
    value: SecretStr


class AnsweredCustomer(_Answer):
    """Contact details, as Payroc echoes them."""

    notification_language: str | None = None
    contact_methods: Annotated[tuple[AnsweredContact, ...], Field(strict=False)] | None = None


class AnsweredField(_Answer):
    """A custom field, as Payroc echoes it."""

    name: str
    value: str


class Refund(_Answer):
    """
    A refund that exists at Payroc. It may be declined all the same: look at ``transaction_result``.

    :param refund_id: exactly 10 characters.
    """

    refund_id: Annotated[str, Field(pattern=r"^[!-~]{10}$")]
    processing_terminal_id: str
    order: AnsweredOrder
    transaction_result: TransactionResult
    bank_account: BankAccount | None = None
    customer: Annotated[AnsweredCustomer | None, Unimportant] = None
    custom_fields: tuple[AnsweredField, ...] | None = None

    @property
    def last4(self) -> str | None:
        """Last four digits of the account; how many asterisks precede them is not fixed."""
        if self.bank_account is None or self.bank_account.account_number is None:
            return None
        found = _LAST4.search(self.bank_account.account_number.get_secret_value())
        return found.group() if found else None

    @property
    def refund_key(self) -> str | None:
        """The idempotency key that we sent along as a custom field."""
        return next(
            (field.value for field in self.custom_fields or () if field.name == REFUND_KEY_FIELD), None
        )


class Link(_Answer):
    """A link of a page."""

    rel: str
    href: str


class PageFrame(_Answer):
    """
    What is around the refunds of one page of ``GET /bank-transfer-refunds``.

    :param limit: largest number of refunds on a page.
    :param count: refunds on this page.
    :param has_more: whether a ``next`` link leads on.
    :param data: a zero in the place of each refund; :func:`~include.payroc.answers.read_page` reads these one
        by one.
    """

    limit: int
    count: int
    has_more: bool
    data: tuple[int, ...]
    links: tuple[Link, ...] = ()


class AccessToken(_Answer):
    """
    A bearer token (https://docs.payroc.com/api/authentication).

    :param expires_in: seconds from its issue, as Payroc said; a token from the cache has already lived a part of them.
    """

    model_config = ConfigDict(alias_generator=None)

    access_token: Annotated[
        SecretStr, _secret(lambda value: re.fullmatch(r"[!-~]+", value) is not None, "must be visible ASCII")
    ]
    expires_in: Annotated[int, Field(gt=0)]
    token_type: Annotated[str, Field(pattern="^(?i:bearer)$")] = "Bearer"  # noqa: S105 - a scheme's name
    scope: str | None = None


class ProblemError(_Answer):
    """One complaint of a problem document; ``parameter`` is the JSON path of a request field."""

    parameter: Annotated[str | None, Unimportant] = None
    detail: Annotated[str | None, Unimportant, Field(repr=False)] = None
    message: Annotated[str | None, Unimportant, Field(repr=False)] = None


class Problem(_Answer):
    """A problem document (RFC 7807, https://docs.payroc.com/api/errors); its texts may echo what was sent, so they are not shown."""

    type: Annotated[str, Field(min_length=1)]
    title: Annotated[str | None, Unimportant, Field(repr=False)] = None
    status: Annotated[int | None, Unimportant] = None
    detail: Annotated[str | None, Unimportant, Field(repr=False)] = None
    errors: Annotated[Annotated[tuple[ProblemError, ...], Field(strict=False)] | None, Unimportant] = None
    instance: Annotated[str | None, Unimportant] = None
    resource: Annotated[str | None, Unimportant] = None
    link: Annotated[Link | None, Unimportant] = None

    @property
    def complete(self) -> bool:
        """Whether all four members are there that Payroc's schema requires."""
        return None not in (self.title, self.status, self.detail)

    @property
    def fragment(self) -> str:
        """What the problem is: the part of ``type`` after ``#``, or the last part of its path."""
        before, _, after = self.type.partition("#")
        return after or before.rstrip("/").rpartition("/")[2]
