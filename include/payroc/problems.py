"""
Problem types: the part after ``#`` of a problem document's ``type``.

Source: https://docs.payroc.com/api/errors and the OpenAPI of the bank-transfer refunds. The list is not complete (a type not
listed is judged by its HTTP status), and one type may come under more than one status.
"""

from __future__ import annotations

from typing import Final

BAD_REQUEST: Final = "bad-request"
"""400. The request is wrong, or the state of the resource forbids it."""

IDEMPOTENCY_KEY_MISSING: Final = "idempotency-key-missing"
"""400."""

CAPABILITIES_MISSING: Final = "capabilities-missing"
"""400. The terminal is not set up for the operation."""

NOT_AUTHORIZED: Final = "not-authorized"
"""401. The token has expired or was never valid."""

FORBIDDEN: Final = "forbidden"
"""403. The account lacks the permission or the feature."""

NOT_FOUND: Final = "not-found"
"""404."""

NOT_ACCEPTABLE: Final = "not-acceptable"
"""406."""

IDEMPOTENCY_KEY_IN_USE: Final = "idempotency-key-in-use"
"""409, listed under 400 in the OpenAPI. The key was used with another URI or body."""

RESOURCE_ALREADY_EXISTS: Final = "resource-already-exists"
"""409. Something equal exists; ``instance`` names it."""

CANNOT_BE_MODIFIED: Final = "cannot-be-modified"
"""409, documented for other resources."""

PAYLOAD_TOO_LARGE: Final = "payload-too-large"
"""413, documented for other resources."""

UNSUPPORTED_MEDIA_TYPE: Final = "unsupported-media-type"
"""415."""

API_ERROR: Final = "api-error"
"""500. The outcome is unknown."""
