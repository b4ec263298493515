"""
Payroc's problem documents (RFC 7807, ``application/problem+json``).

Types, titles and details of DOCUMENTED are Payroc's own words. For the types in OTHERS, which Payroc documents for other products,
only type and status are known; title and detail are made from the name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from include.sandbox.answers import Answer

MEDIA_TYPE = "application/problem+json"
TYPE_BASE = "https://docs.payroc.com/api/errors#"

DOCUMENTED: Mapping[str, tuple[int, str, str]] = {
    "bad-request": (
        400,
        "Bad request",
        "One or more validation errors occurred, see error section for more info",
    ),
    "idempotency-key-missing": (
        400,
        "Idempotency-Key header missing",
        "An 'Idempotency-Key' must be supplied for this request",
    ),
    "capabilities-missing": (
        400,
        "Capabilities missing",
        "The terminal does not support the capability you are trying to use.",
    ),
    "not-authorized": (401, "Not Authorized", "Your identity could not be verified"),
    "forbidden": (403, "Forbidden", "You do not have the required permissions to perform this action"),
    "not-found": (404, "Not found", "Resource not found"),
    "not-acceptable": (406, "Not acceptable", "Resource does not support the representation requested"),
    "idempotency-key-in-use": (
        409,
        "Idempotency-Key in use",
        "'Idempotency-Key' is already in use against a different request",
    ),
    "resource-already-exists": (
        409,
        "Resource already exists",
        "The resource you attempted to create already exists",
    ),
    "cannot-be-modified": (409, "Cannot be modified", "You cannot modify this resource in its current state"),
    "payload-too-large": (413, "Payload too large", "The payload submitted is too large"),
    "unsupported-media-type": (
        415,
        "Unsupported media type",
        "You submitted a payload in an unsupported format",
    ),
    "api-error": (500, "Api error", "We are unable to process your request at this time"),
}

OTHERS: Mapping[str, int] = {
    "currency-not-supported": 400,
    "card-type-not-supported": 400,
    "contract-already-signed": 400,
    "not-requested-by-email": 400,
    "no-pricing-agreement-exists-for-the-processing-account": 400,
    "kyc-check-failed": 400,
    "insufficient-funds": 400,
    "funding-accounts-restricted": 400,
    "funding-accounts-limit-reached": 400,
    "recipient-amount-value-limit-exceeded": 400,
    "no-control-prong-or-authorized-signatory": 400,
    "too-many-control-prongs": 400,
    "daily-discount-and-reward-pay-conflict": 400,
    "cannot-be-canceled": 409,
    "tax-id-in-use": 409,
    "national-id-in-use": 409,
    "attribute-conflict": 409,
}

Errors = Sequence[Mapping[str, str]]


def problem(
    fragment: str,
    *,
    status: int | None = None,
    detail: str | None = None,
    errors: Errors | None = None,
    headers: Mapping[str, str] | None = None,
    **members: str,
) -> Answer:
    """
    Build the answer that carries one problem document.

    :param fragment: last part of the problem type, such as ``bad-request``; a word that Payroc does not document is allowed.
    :param status: HTTP status; None takes the documented one, 400 for an unknown type.
    :param detail: replaces the documented detail.
    :param errors: the ``errors`` member, items of ``parameter``, ``detail`` and ``message``.
    :param members: further members, such as ``instance`` and ``resource``.
    """
    known_status, title, known_detail = DOCUMENTED.get(fragment) or _from_name(fragment)
    status = known_status if status is None else status
    document: dict[str, object] = {
        "type": TYPE_BASE + fragment,
        "title": title,
        "status": status,
        "detail": detail or known_detail,
        **members,
    }
    if errors is None and fragment == "api-error":
        errors = [{"message": "Service offline"}]
    if errors is not None:
        document["errors"] = list(errors)
    return Answer(status, json.dumps(document), MEDIA_TYPE, headers or {}, fragment)


def _from_name(fragment: str) -> tuple[int, str, str]:
    words = fragment.replace("-", " ").capitalize()
    return OTHERS.get(fragment, 400), words, words
