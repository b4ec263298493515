"""
Validates responses against Payroc's own OpenAPI file, when it is beside this checkout.

The file has all schemas inlined, so each response schema validates alone; ``discriminator`` only explains its ``oneOf``. One thing is
contradictory in it: the example ``idempotency-key-in-use`` is filed under 400 and says ``"status": 409``. The sandbox answers 409, and
``documented_examples`` therefore files an example under the status that its body names.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import requests
from jsonschema import Draft202012Validator, FormatChecker

from tests.sandbox.running import REPO

OPENAPI_FILE = REPO.parent / "shared" / "payroc" / "openapi-bank-transfer-refunds.json"
OPERATIONS = {
    "create": ("/bank-transfer-refunds", "post"),
    "list": ("/bank-transfer-refunds", "get"),
    "get": ("/bank-transfer-refunds/{refundId}", "get"),
    "reverse": ("/bank-transfer-refunds/{refundId}/reverse", "post"),
    "close-batch": ("/processing-terminals/{processingTerminalId}/close-batch", "post"),
}

needs_openapi = pytest.mark.skipif(
    not OPENAPI_FILE.exists(), reason="Payroc's OpenAPI file is not beside this checkout"
)


@cache
def _document() -> dict[str, Any]:
    return dict(json.loads(OPENAPI_FILE.read_text()))


def documented_statuses(operation: str) -> set[int]:
    """All statuses that the file has for an operation."""
    return {int(status) for status in _operation(operation)["responses"]}


def documented_examples(operation: str) -> list[tuple[int, dict[str, Any]]]:
    """All example bodies of an operation's problem documents, each with the status that it names."""
    return [
        (example["value"]["status"], example["value"])
        for response in _operation(operation)["responses"].values()
        for example in response["content"].get("application/problem+json", {}).get("examples", {}).values()
    ]


def request_schema(operation: str) -> dict[str, Any]:
    """The schema of an operation's request body."""
    return dict(_operation(operation)["requestBody"]["content"]["application/json"]["schema"])


def validate_request(operation: str, content: object) -> None:
    """Raise ``jsonschema.ValidationError`` when a request body breaks the file's schema."""
    Draft202012Validator(request_schema(operation), format_checker=FormatChecker()).validate(content)


def validate_response(operation: str, response: requests.Response) -> None:
    """Check status, media type, headers and body of a response against the file."""
    documented = _operation(operation)["responses"][str(response.status_code)]
    media_type = response.headers["Content-Type"]
    assert media_type in documented["content"], (
        f"{operation} {response.status_code}: {media_type} is not documented"
    )
    for header in documented.get("headers", {}):
        assert header in response.headers
    Draft202012Validator(
        documented["content"][media_type]["schema"], format_checker=FormatChecker()
    ).validate(response.json())


def _operation(operation: str) -> dict[str, Any]:
    path, method = OPERATIONS[operation]
    return dict(_document()["paths"][path][method])
