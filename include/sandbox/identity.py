"""
Identity: an API key buys an access token.

Assumption, since Payroc does not say: a wrong or missing key is 401 with the problem document ``not-authorized``; a new token leaves
the older ones valid.
"""

from __future__ import annotations

import base64
import hmac
import json
import secrets

from fastapi import APIRouter, Request, Response

from include.sandbox.answers import Answer, Refusal
from include.sandbox.pipeline import Call, Operation, Sandbox, serve
from include.sandbox.problems import problem

AUTHORIZE = Operation("authorize", bearer=False)
SCOPE = "bank-transfer-refunds"


def identity_routes(sandbox: Sandbox) -> APIRouter:
    """Make the routes of the identity host."""
    router = APIRouter()

    def issue(call: Call) -> Answer:
        if not _accepted(call.request.headers.get("x-api-key", ""), sandbox.options.api_keys):
            raise Refusal(problem("not-authorized"))
        token = _new_token()
        call.entry.token = sandbox.store.add_token(token, sandbox.options.token_seconds)
        lifetime = sandbox.options.token_seconds
        return Answer(
            200,
            json.dumps(
                {"access_token": token, "expires_in": lifetime, "scope": SCOPE, "token_type": "Bearer"}
            ),
        )

    @router.post("/authorize")
    async def authorize(request: Request) -> Response:
        return await serve(sandbox, request, AUTHORIZE, issue)

    return router


def _accepted(api_key: str, api_keys: frozenset[str]) -> bool:
    if api_keys:
        return any(hmac.compare_digest(api_key.encode(), known.encode()) for known in api_keys)
    return bool(api_key) and not api_key.startswith("wrong")


def _new_token() -> str:
    # Payroc's tokens are JWTs. A client must treat them as opaque; the look of one lets masking rules recognise it.
    header, claims = (
        _base64(json.dumps(part).encode())
        for part in ({"alg": "none", "typ": "JWT"}, {"iss": "payroc-sandbox"})
    )
    return f"{header}.{claims}.{_base64(secrets.token_bytes(32))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
