"""
A Payroc that costs next to nothing, so that a benchmark measures its client: `python -m benchmarks.server`.

It prints its port and serves until its standard input ends. It answers `POST /authorize`, `POST /v1/bank-transfer-refunds` and its GET by
order id the way Payroc does, checks nothing, and knows a refund again by its idempotency key. `PUT /latency/50` makes it answer so many
milliseconds later and begins to count anew; `GET /counts` tells what it has counted.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from typing import Any
from urllib.parse import parse_qs

_TOKEN = json.dumps(
    {"access_token": "benchmark-token", "expires_in": 3600, "scope": "service", "token_type": "Bearer"}
).encode()
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_REFUNDS = "/v1/bank-transfer-refunds"


class Payroc:
    """What the connections of the server share."""

    def __init__(self) -> None:
        self.latency = 0.0
        self.by_key: dict[str, bytes] = {}
        self.by_order: dict[str, list[bytes]] = {}
        self.counts: Counter[str] = Counter()
        self.in_flight = 0
        self.most_in_flight = 0

    def answer(self, method: str, target: str, key: str, body: bytes) -> tuple[int, bytes]:
        """Return the status and the body of the answer to a request."""
        path, _, query = target.partition("?")
        if method == "POST" and path == _REFUNDS:
            return 201, self._create(key, body)
        if method == "POST" and path == "/authorize":
            self.counts["token"] += 1
            return 200, _TOKEN
        if method == "GET" and path == _REFUNDS:
            self.counts["list"] += 1
            return 200, self._list(parse_qs(query))
        if method == "GET" and path == "/counts":
            return 200, json.dumps(
                {**self.counts, "refunds": len(self.by_key), "most_in_flight": self.most_in_flight}
            ).encode()
        if method == "PUT" and path.startswith("/latency/"):
            self.latency = float(path.removeprefix("/latency/")) / 1000
            self.counts.clear()
            self.most_in_flight = 0
            return 200, b"{}"
        return (
            404,
            b'{"type": "https://docs.payroc.com/api/errors#not-found", "title": "Not found", "status": 404, "detail": "Not found"}',
        )

    def _create(self, key: str, body: bytes) -> bytes:
        self.counts["create"] += 1
        known = self.by_key.get(key)
        if known is not None:
            self.counts["replay"] += 1
            return known
        request = json.loads(body)
        order = request["order"]
        shown: dict[str, Any] = {
            "refundId": _refund_id(len(self.by_key)),
            "processingTerminalId": request["processingTerminalId"],
            "order": {**order, "dateTime": "2026-11-23T12:00:00Z"},
            "bankAccount": _account(request["refundMethod"]),
            "transactionResult": {
                "type": "unreferencedRefund",
                "status": "ready",
                "authorizedAmount": -order["amount"],
                "currency": order["currency"],
                "responseCode": "A",
                "responseMessage": "NoError",
                "processorResponseCode": "0",
            },
        }
        if "customFields" in request:
            shown["customFields"] = request["customFields"]
        self.by_key[key] = made = json.dumps(shown).encode()
        self.by_order.setdefault(order["orderId"], []).append(made)
        return made

    def _list(self, query: dict[str, list[str]]) -> bytes:
        found = self.by_order.get(query["orderId"][0], []) if "orderId" in query else []
        return b'{"limit": 100, "count": %d, "hasMore": false, "data": [%s], "links": []}' % (
            len(found),
            b", ".join(found),
        )


class _Connection(asyncio.Protocol):
    """One client. None of them sends a request before it has the answer to the last one."""

    def __init__(self, payroc: Payroc) -> None:
        self._payroc = payroc
        self._received = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the types
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while True:
            head, end, rest = self._received.partition(b"\r\n\r\n")
            if not end:
                return
            lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            length = int(headers.get("content-length", "0"))
            if len(rest) < length:
                return
            self._received = rest[length:]
            method, target, _ = lines[0].split(" ", 2)
            self._serve(method, target, headers.get("idempotency-key", ""), rest[:length])

    def _serve(self, method: str, target: str, key: str, body: bytes) -> None:
        payroc = self._payroc
        payroc.in_flight += 1
        payroc.most_in_flight = max(payroc.most_in_flight, payroc.in_flight)
        status, content = payroc.answer(method, target, key, body)
        head = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
            status,
            len(content),
        )
        if payroc.latency:
            asyncio.get_running_loop().call_later(payroc.latency, self._send, head + content)
        else:
            self._send(head + content)

    def _send(self, answer: bytes) -> None:
        self._payroc.in_flight -= 1
        self._transport.write(answer)


def _refund_id(number: int) -> str:
    digits = ""
    for _ in range(9):
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    # No other Payroc's, such as that of the refunds which ended long ago.
    return f"R{digits}"


def _account(method: dict[str, str]) -> dict[str, str]:
    return {
        "type": "ach",
        "secCode": method["secCode"],
        "nameOnAccount": method["nameOnAccount"],
        "accountNumber": "****" + method["accountNumber"][-4:],
        "routingNumber": "*****" + method["routingNumber"][-4:],
    }


async def serve() -> None:
    """Serve until standard input ends."""
    payroc = Payroc()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(payroc), "127.0.0.1", 0, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    # Standard input ends with the benchmark that started it, however that ends.
    async with server:
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve())
