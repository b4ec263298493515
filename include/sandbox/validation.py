"""
The rules for the body of a create, as Payroc's specification states them.

Beyond the schema: the amount must be positive (the text of Payroc's gateway on the referenced refund says so), and ``secCode`` is
mandatory, which the specification's text demands and its schema does not. Unknown properties are tolerated; neither the ABA checksum
of routing numbers nor the Luhn digit of tokens is enforced, since Payroc's own samples fail both. A number written with a fraction,
such as 4999.0, is not an integer here. Messages never repeat a value.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

_CURRENCY_CODES = """
    AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BOV BRL BSD BTN BWP BYR BZD CAD CDF CHE CHF CHW CLF CLP
    CNY COP COU CRC CUC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HRK HTG HUF IDR ILS
    INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LTL LVL LYD MAD MDL MGA MKD MMK MNT MOP MRO MRU
    MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP
    SLL SOS SRD SSP STD STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD USN USS UYI UYU UZS VEF VES VND VUV WST XAF XCD
    XOF XPF YER ZAR ZMW ZWL
"""
CURRENCIES = frozenset(_CURRENCY_CODES.split())
MAX_INT64 = 2**63 - 1

REQUIRED = "Required field not populated"
INVALID = "Invalid format"

AccountType = Literal["checking", "savings"]
SecCode = Literal["web", "tel", "ccd", "ppd"]

Error = dict[str, str]


def _known_currency(code: str) -> str:
    if code not in CURRENCIES:
        raise ValueError("unknown currency")
    return code


class _Model(BaseModel):
    model_config = ConfigDict(strict=True)


# An optional property may be absent but not null, as the schema has it: hence the defaults that do not fit their types. They are never
# read, the content that was received is.
_ABSENT: Any = None


class _Order(_Model):
    orderId: str = Field(min_length=1, max_length=24)
    description: str = Field(max_length=256)
    amount: int = Field(gt=0, le=MAX_INT64)
    currency: Annotated[str, AfterValidator(_known_currency)]


class _Ach(_Model):
    type: Literal["ach"]
    nameOnAccount: str = Field(min_length=1, max_length=50)
    accountNumber: str = Field(min_length=4, max_length=17, pattern="^[0-9]*$")
    routingNumber: str = Field(min_length=9, max_length=9, pattern="^[0-9]*$")
    accountType: AccountType = _ABSENT
    secCode: SecCode = _ABSENT


class _SecureToken(_Model):
    type: Literal["secureToken"]
    token: str = Field(min_length=12, max_length=19)
    accountType: AccountType = _ABSENT
    secCode: SecCode = _ABSENT


class _Email(_Model):
    type: Literal["email"]
    value: str = Field(max_length=50)


class _Number(_Model):
    type: Literal["phone", "mobile", "fax"]
    value: str = Field(max_length=15)


_ContactMethod = Annotated[_Email | _Number, Field(discriminator="type")]


def _unique(methods: list[_Email | _Number]) -> list[_Email | _Number]:
    seen: set[Hashable] = {(method.type, method.value) for method in methods}
    if len(seen) < len(methods):
        raise ValueError("items are not unique")
    return methods


class _Customer(_Model):
    notificationLanguage: Literal["en", "fr"] = _ABSENT
    contactMethods: Annotated[list[_ContactMethod], AfterValidator(_unique)] = _ABSENT


class _CustomField(_Model):
    name: str = Field(min_length=1, max_length=56)
    value: str = Field(min_length=1, max_length=100)


class _Create(_Model):
    processingTerminalId: str = Field(min_length=4, max_length=50)
    order: _Order
    refundMethod: Annotated[_Ach | _SecureToken, Field(discriminator="type")]
    customer: _Customer = _ABSENT
    customFields: list[_CustomField] = _ABSENT


def create_errors(content: object, *, demand_sec_code: bool) -> Sequence[Error]:
    """
    Check the body of a create.

    :param content: the parsed body.
    :param demand_sec_code: refuse a refund method without ``secCode``.
    :return: the items of the problem's ``errors`` member; none when the body is good.
    """
    errors: list[Error] = []
    try:
        _Create.model_validate(content)
    except ValidationError as failed:
        errors = [
            _error(detail)
            for detail in failed.errors(include_url=False, include_context=False, include_input=False)
        ]
    if (
        demand_sec_code
        and isinstance(content, dict)
        and isinstance(content.get("refundMethod"), dict)
        and "secCode" not in content["refundMethod"]
    ):
        errors.append(required("refundMethod.secCode"))
    return errors


def required(parameter: str) -> Error:
    """Make the error about a missing parameter."""
    return {"parameter": parameter, "detail": REQUIRED, "message": f"The '{parameter}' field is required"}


def invalid(parameter: str, message: str = "") -> Error:
    """Make the error about a parameter with an unusable value."""
    return {
        "parameter": parameter,
        "detail": INVALID,
        "message": message or f"The value of '{parameter}' is not valid",
    }


_TAGS = {"ach", "secureToken", "email", "phone", "mobile", "fax"}


def _error(detail: ErrorDetails) -> Error:
    parameter = ""
    for step in detail["loc"]:
        if isinstance(step, int):
            parameter += f"[{step}]"
        # pydantic puts the value of the discriminator into the path, which is no part of the body's path.
        elif step not in _TAGS:
            parameter += f".{step}" if parameter else step
    match detail["type"]:
        case "missing":
            return required(parameter)
        case "union_tag_not_found":
            return required(f"{parameter}.type")
        case "union_tag_invalid":
            return invalid(f"{parameter}.type")
        case "greater_than":
            return invalid(parameter, f"'{parameter.rpartition('.')[2]}' must be greater than 0.")
        case _ if not parameter:
            return {"detail": INVALID, "message": "The body is not a JSON object"}
        case _:
            return invalid(parameter)
