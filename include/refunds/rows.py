"""
Source rows: what a driver returned becomes a valid row, or is refused with what is wrong with each column.

The pull, the release, the dry run and the import of CSV files ask here; nothing else knows a rule about a
column. Payroc's own rules are in :mod:`include.payroc.models`, those of banks in
:mod:`~include.refunds.bank_rules`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, TypeVar
from uuid import UUID

from pydantic import ValidationError

from include.payroc.models import REFUND_KEY_FIELD, RefundRequest, explain
from include.refunds.bank_rules import routing_number_error, sec_code, sec_code_error
from include.refunds.keys import default_order_id, idempotency_key, payee_of_account, payee_of_token
from include.refunds.ledger import NAMELESS
from include.refunds.money import decimals_of
from include.refunds.people import same_person
from include.refunds.settings import Settings
from include.refunds.source import SourceRow
from include.refunds.text import kind, name_error, text_error

MAX_AMOUNT: Final = 10**12
"""Largest amount of a refund, in minor units. A larger one is a mistake, such as an account number."""

EARLIEST: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""Earliest time of an approval. An earlier one is a mistake, such as a date that a database fills in."""

AHEAD: Final = timedelta(days=1)
"""How far an approval may lie ahead of the ledger's clock."""

LONGEST_NAME: Final = 200
"""Most characters of a source_ref, requester or approver."""

_TEXTS: Final = (
    "processing_terminal_id",
    "order_id",
    "description",
    "currency",
    "name_on_account",
    "account_type",
    "sec_code",
    "routing_number",
    "account_number",
    "secure_token",
    "email",
)
_ACCOUNT: Final = ("name_on_account", "account_type", "routing_number", "account_number")

# A larger one may be an account number that slipped into the column, and is not quoted.
_QUOTED: Final = Decimal(10**6)
_QUOTED_DIGITS: Final = 12
_CENTS: Final = ("USD", "CAD", "EUR", "AUD")

_INSTANT: Final = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d.*", re.ASCII)
_EXAMPLE: Final = "2026-11-23T09:30:00-05:00"
_UUID: Final = re.compile(
    r"(urn:uuid:)?[{(]?[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}[)}]?", re.ASCII | re.IGNORECASE
)
_EMAIL: Final = re.compile(r"[^\s@<>()\[\],;:\"\\]+@[\w-]+(\.[\w-]+)+")

_T = TypeVar("_T")


class InvalidRow(Exception):
    """
    A source row that can't become a refund.

    :param errors: what is wrong, by column, without bank data: the rest of a sentence that begins with the
        column, without its full stop.
    """

    def __init__(self, errors: Mapping[str, str]) -> None:
        self.errors = dict(errors)
        super().__init__(sentences(errors))


def sentences(errors: Mapping[str, str]) -> str:
    """Return what is wrong with a row in sentences, one for each column."""
    return " ".join(f"`{column}` {what}." for column, what in errors.items())


@dataclass(frozen=True, slots=True)
class RefundRow:
    """
    A source row that keeps every rule.

    :param request: what is sent to Payroc for it.
    :param payee: what the payee is recognised by: the same for all spellings of one account or token.
    :param payee_last4: last four digits of the account; ``None`` for a token.
    """

    source_ref: str
    requested_by: str
    approved_by: str
    approved_at: datetime
    idempotency_key: UUID
    request: RefundRequest
    payee: str = field(repr=False)
    payee_last4: str | None

    @classmethod
    def read(cls, row: SourceRow, settings: Settings, now: datetime) -> RefundRow:
        """
        Return the row of :data:`~include.refunds.source.COLUMNS` that a driver returned, in values of any
        type.

        :param settings: ``source``, ``sec_code``, ``allow_sec_web`` and ``aba_checksum``.
        :param now: the ledger's time.
        :raises InvalidRow: when it breaks a rule of Payroc's, of the banks' or of ours; never anything else.
        """
        errors = _text_errors(row)
        if problem := source_ref_error(row["source_ref"]):
            errors["source_ref"] = problem
        errors |= _people_errors(row)
        amount = _noted(errors, "amount", _amount, row["amount"], row["currency"])
        approved_at = _noted(errors, "approved_at", _approved_at, row["approved_at"], now)
        key = idempotency_key(settings.source, "" if "source_ref" in errors else str(row["source_ref"]))
        request = _request(row, key, amount, settings, errors)
        if request is None or amount is None or approved_at is None or errors:
            raise InvalidRow(errors)
        by_token = is_given(row["secure_token"])
        return cls(
            source_ref=str(row["source_ref"]),
            requested_by=row["requested_by"],
            approved_by=row["approved_by"],
            approved_at=approved_at,
            idempotency_key=key,
            request=request,
            payee=payee_of_token(row["secure_token"])
            if by_token
            else payee_of_account(row["routing_number"], row["account_number"]),
            payee_last4=None if by_token else row["account_number"][-4:],
        )


def is_given(value: object) -> bool:
    """Return whether a column says anything: an empty text says as little as NULL."""
    return value is not None and not (isinstance(value, str) and not value)


def name_of(row: SourceRow) -> str | None:
    """Return the source_ref by which a row can be named and written back; ``None`` when it has none."""
    value = row["source_ref"]
    if isinstance(value, UUID):
        return str(value)
    # Blanks at an end are no canonical form, but they do name the row, in the source too.
    if (
        not isinstance(value, str)
        or text_error(value.strip(), longest=LONGEST_NAME)
        or len(value) > LONGEST_NAME
    ):
        return None
    return None if value.startswith(NAMELESS) else value


def source_ref_error(value: object) -> str | None:
    """
    Return what is wrong with a source_ref; ``None`` when nothing is.

    It is the refund's identity, and a second spelling of it would be a second refund, so only the canonical
    one is accepted. A UUID object is that of its canonical text.
    """
    if isinstance(value, UUID):
        return None
    if problem := name_error(value, longest=LONGEST_NAME):
        return problem
    text = str(value)
    if text.startswith(NAMELESS):
        return f"begins with {NAMELESS.strip()!r}, which names rows without a source_ref; choose another one"
    if not unicodedata.is_normalized("NFC", text):
        return "has an accent apart from its letter; give it in Unicode's form NFC"
    if _UUID.fullmatch(text) and text != str(UUID(text.lower().strip("()"))):
        return "is a UUID in another form; give it in lower case with hyphens, 8-4-4-4-12"
    return None


def _text_errors(row: SourceRow) -> dict[str, str]:
    return {
        column: problem
        for column in _TEXTS
        if is_given(row[column]) and (problem := text_error(row[column])) is not None
    }


def _people_errors(row: SourceRow) -> dict[str, str]:
    errors = {
        column: problem
        for column in ("requested_by", "approved_by")
        if (problem := name_error(row[column], longest=LONGEST_NAME)) is not None
    }
    if not errors and same_person(row["requested_by"], row["approved_by"]):
        errors["approved_by"] = "is the same person as requested_by; a refund needs two"
    return errors


class _Refused(Exception):
    """A value breaks a rule; the message is what :class:`InvalidRow` says of its column."""


def _noted(errors: dict[str, str], column: str, read: Callable[..., _T], *values: object) -> _T | None:
    """Return what a value is read as; note why it is refused, and return ``None``."""
    try:
        return read(*values)
    except _Refused as refusal:
        errors[column] = str(refusal)
        return None


def _amount(value: object, currency: object) -> int:
    decimals = decimals_of(currency) if isinstance(currency, str) else 2
    name = currency if isinstance(currency, str) and re.fullmatch("[A-Z]{3}", currency) else "USD"
    unit = "a whole number" if decimals == 0 else "whole cents" if name in _CENTS else "whole minor units"

    def example(amount: int) -> str:
        return f"give {unit}, such as {amount} for {name} {Decimal(amount).scaleb(-decimals):,.{decimals}f}"

    # NaN and infinity have no number as their exponent.
    if isinstance(value, Decimal) and isinstance(exponent := value.as_tuple().exponent, int):
        if exponent < 0:
            # The column holds whole units of the currency, also where this one has no cents.
            minor = (
                value.scaleb(decimals)
                if 0 < value < _QUOTED and len(value.as_tuple().digits) <= _QUOTED_DIGITS
                else None
            )
            if minor is None or minor < 1 or minor != minor.to_integral_value():
                raise _Refused(f"has decimal places; {example(5000)}")
            raise _Refused(f"is {value:f}; {example(int(minor))}")
        if value > MAX_AMOUNT:
            raise _Refused(_TOO_LARGE)
        value = int(value) if value >= 0 else -1
    if value is None:
        raise _Refused("is missing")
    if not isinstance(value, int) or isinstance(value, bool):
        what = "not a whole number" if isinstance(value, (float, Decimal)) else kind(value)
        raise _Refused(f"is {what}; {example(5000)}")
    if value < 1:
        raise _Refused("is not more than 0")
    if value > MAX_AMOUNT:
        raise _Refused(_TOO_LARGE)
    return value


_TOO_LARGE: Final = f"is more than {MAX_AMOUNT:,} minor units, the most that a refund may have"


def _approved_at(value: object, now: datetime) -> datetime:
    if value is None:
        raise _Refused("is missing")
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value) if _INSTANT.fullmatch(value) else None
        except ValueError:
            value = None
        if value is None:
            raise _Refused(f"is no date and time; give one such as {_EXAMPLE}")
    if not isinstance(value, datetime):
        raise _Refused(f"is {kind(value)}; give a date and time, such as {_EXAMPLE}")
    at = value if value.tzinfo else value.replace(tzinfo=UTC)
    if at < EARLIEST:
        raise _Refused(f"is before {EARLIEST:%Y-%m-%d}")
    if at - AHEAD > now:
        raise _Refused("is more than a day in the future")
    # Only now: the first and the last years have dates that no other time zone can name.
    return at.astimezone(UTC)


def _request(
    row: SourceRow, key: UUID, amount: int | None, settings: Settings, errors: dict[str, str]
) -> RefundRequest | None:
    """Return what is sent for a row; note what is wrong with its columns, and return ``None``."""
    if is_given(row["email"]) and "email" not in errors and not _EMAIL.fullmatch(row["email"]):
        errors["email"] = "is no email address; leave it empty when there is none"
    for column in ("processing_terminal_id", "currency"):
        if not is_given(row[column]):
            errors[column] = "is missing"
    order_id = row["order_id"] if is_given(row["order_id"]) else default_order_id(key)
    if isinstance(order_id, str) and not order_id.isascii():
        errors.setdefault("order_id", "has other characters than those of ASCII")
    try:
        return RefundRequest.model_validate(
            {
                "processing_terminal_id": row["processing_terminal_id"],
                "order": {
                    "order_id": order_id,
                    "description": row["description"]
                    if is_given(row["description"])
                    else f"Refund {order_id}",
                    "amount": amount if amount is not None else 1,
                    "currency": row["currency"],
                },
                "refund_method": _method(row, settings, errors),
                "customer": {"contact_methods": [{"type": "email", "value": row["email"]}]}
                if is_given(row["email"])
                else None,
                "custom_fields": [{"name": REFUND_KEY_FIELD, "value": str(key)}],
            },
            context={"aba_checksum": settings.aba_checksum},
        )
    except ValidationError as error:
        for path, message in explain(error).items():
            errors.setdefault(_column_of(path), message)
        # The method could not even be built when its columns contradict one another, which is said already.
        if len(errors) > 1:
            errors.pop("refund_method", None)
        return None


def _method(row: SourceRow, settings: Settings, errors: dict[str, str]) -> dict[str, Any] | None:
    code = sec_code(row["sec_code"], settings.sec_code)
    if "sec_code" not in errors and (problem := sec_code_error(code, allow_web=settings.allow_sec_web)):
        errors["sec_code"] = problem
    has_token = is_given(row["secure_token"])
    has_account = is_given(row["routing_number"]) or is_given(row["account_number"])
    if has_token and has_account:
        errors.setdefault("secure_token", "is given together with a bank account; give one of the two")
        return None
    if has_token:
        return {
            "type": "secureToken",
            "token": row["secure_token"],
            "account_type": row["account_type"] if is_given(row["account_type"]) else None,
            "sec_code": code,
        }
    if not has_account:
        errors["account_number"] = "is missing, and so is secure_token; give one of the two"
        return None
    for column in _ACCOUNT:
        if not is_given(row[column]):
            errors[column] = "is missing"
    if problem := routing_number_error(row["routing_number"]):
        errors["routing_number"] = problem
    return {"type": "ach", "sec_code": code} | {column: row[column] for column in _ACCOUNT}


def _column_of(path: str) -> str:
    """Return the source column behind a field of Payroc's request."""
    if path.startswith("customer"):
        return "email"
    name = path.rpartition(".")[2]
    return "secure_token" if name == "token" else name
