"""Pages of Payroc's list with objects on them that no reader can take for refunds."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Sequence

from tests.refunds.conftest import World

# Each is one object of a page, with the name under which it is set aside; most still show their id, one shows
# its order id only.
_ODD: dict[str, tuple[bytes, str]] = {
    "half an emoji": (
        rb'{"refundId": "ODDID00001", "order": {"description": "\ud83d"}}',
        "refund ODDID00001",
    ),
    "invalid UTF-8": (b'{"refundId": "ODDID00002", "order": {"description": "\xff"}}', "refund ODDID00002"),
    "a number of 5,000 digits": (
        b'{"order": {"orderId": "ODD-3", "amount": ' + b"9" * 5000 + b"}}",
        "order ODD-3",
    ),
    "nesting of 10,000": (b"[" * 10_000 + b"]" * 10_000, "object %d of page 1"),
    "two amounts": (
        b'{"refundId": "ODDID00005", "processingTerminalId": "7701001", '
        b'"order": {"orderId": "x", "amount": 1, "amount": 4999, "currency": "USD"}, '
        b'"transactionResult": {"type": "unreferencedRefund", "status": "ready", "responseCode": "A"}}',
        "refund ODDID00005",
    ),
    "NaN": (b'{"refundId": "ODDID00006", "order": NaN}', "refund ODDID00006"),
    "no object": (b'"ODDID00007"', "object %d of page 1"),
    "two ids": (b'{"refundId": "ODDID00008", "refundId": "ODDID00009"}', "object %d of page 1"),
    "an id that is free text": (rb'{"refundId": "<!channel>"}', "object %d of page 1"),
}

# The name, with the place that it has on a page behind one good object.
ODD_OBJECTS = {
    what: (odd, name.replace("%d", str(place))) for place, (what, (odd, name)) in enumerate(_ODD.items(), 2)
}


def page_with(odd: Sequence[bytes], shown: list[object]) -> bytes:
    """Return a page on which odd objects lie behind the first one that Payroc shows, before the others."""
    objects = [json.dumps(item).encode() for item in shown]
    objects[1:1] = odd
    data = b", ".join(objects)
    return b'{"limit": 100, "count": %d, "hasMore": false, "links": [], "data": [%s]}' % (len(objects), data)


def spoil_lists(world: World, terminal: str, *odd: bytes) -> None:
    """Let each list of the local Payroc show odd objects between the refunds that it shows of a terminal."""
    token = world.run(world.gateway.token()).access_token.get_secret_value()
    url = f"{world.sandbox.api_url}/bank-transfer-refunds?limit=100&processingTerminalId={terminal}"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
        shown = json.loads(answer.read())["data"]
    answer_with(world, "list", page_with(odd, shown))


def answer_with(world: World, operation: str, body: bytes) -> None:
    """Let the local Payroc answer an operation with these bytes, until :func:`answer_normally`."""
    content = base64.b64encode(body).decode()
    world.sandbox.post(
        "/_sandbox/faults", {"operation": operation, "kind": "body", "content": content, "times": 1000}
    )


def answer_normally(world: World) -> None:
    """Let the local Payroc answer as it does."""
    world.sandbox.delete("/_sandbox/faults")
