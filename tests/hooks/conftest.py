"""A server that answers as a test tells it to, and a hook that is connected to it. Nothing of the hook is replaced."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from include.payroc.models import AccessToken
from include.refunds.settings import get_settings
from payroc_airflow.hooks.payroc import PayrocHook

API_KEY = "canary-api-key-5f0c9a7e2b"
KEY = "8e03978e-40d5-43e8-bc93-6894a57f9324"

REFUND = {
    "refundId": "CD3HN88U9F",
    "processingTerminalId": "1234001",
    "order": {"orderId": "OrderRef6543", "description": "A refund", "amount": 4999, "currency": "USD"},
    "bankAccount": {
        "type": "ach",
        "nameOnAccount": "Canary Payee",
        "accountNumber": "****7890",
        "routingNumber": "*****6789",
    },
    "transactionResult": {
        "type": "unreferencedRefund",
        "status": "ready",
        "responseCode": "A",
        "authorizedAmount": -4999,
        "currency": "USD",
    },
    "customFields": [{"name": "refundKey", "value": KEY}],
}


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    body: bytes
    client: tuple[str, int]


@dataclass
class Reply:
    """What to answer; ``raw`` takes the handler and does as it likes."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    raw: Callable[[BaseHTTPRequestHandler], None] | None = None


class FakePayroc:
    """Replies by method and path, one after the other; the last one stays."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.server = server
        self.seen: list[Seen] = []
        self.replies: dict[tuple[str, str], list[Reply]] = {}
        self.tokens = 0
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def on(self, method: str, path: str, *replies: Reply) -> None:
        self.replies[method, path] = list(replies)

    def of(self, path: str) -> list[Seen]:
        return [request for request in self.seen if request.path == path]

    def reply(self, request: Seen) -> Reply:
        with self.lock:
            self.seen.append(request)
            planned = self.replies.get((request.method, request.path))
            if planned:
                return planned.pop(0) if len(planned) > 1 else planned[0]
            if request.path == "/authorize":
                self.tokens += 1
                return Reply(
                    200,
                    {
                        "access_token": f"canary-token-{self.tokens}",
                        "expires_in": 3600,
                        "token_type": "Bearer",
                    },
                )
        return Reply(
            404,
            {
                "type": "https://docs.payroc.com/api/errors#not-found",
                "title": "Not found",
                "status": 404,
                "detail": "x",
            },
        )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are two writes, and the second would wait 40 ms for the client to acknowledge the first.
    disable_nagle_algorithm = True
    payroc: FakePayroc

    def answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.payroc.reply(
            Seen(self.command, url.path, parse_qsl(url.query), headers, body, self.client_address)
        )
        if reply.raw is not None:
            self.close_connection = True
            reply.raw(self)
            return
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    # Many connections may come at once.
    request_queue_size = 128
    daemon_threads = True


def serve(tls: Any = None) -> Iterator[FakePayroc]:
    handler = type("BoundHandler", (Handler,), {})
    server = Server(("127.0.0.1", 0), handler)
    # A client that leaves in the middle is what some tests are about.
    server.handle_error = lambda *args: None
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    payroc = FakePayroc(server)
    handler.payroc = payroc
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield payroc
    payroc.stopped.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def payroc() -> Iterator[FakePayroc]:
    yield from serve()


@pytest.fixture
def serve_tls() -> Callable[[Any], Iterator[FakePayroc]]:
    return serve


@pytest.fixture
def reply() -> type[Reply]:
    return Reply


@pytest.fixture(autouse=True)
def _own_token_cache(tmp_path, monkeypatch) -> Iterator[None]:
    folder = tmp_path / "tokens"
    monkeypatch.setenv("PAYROC_REFUNDS_TOKEN_CACHE_DIR", str(folder))
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture
def connect(monkeypatch) -> Callable[..., None]:
    """Define an Airflow connection, as JSON from parts or as the text given."""

    def define(text: str | None = None, *, conn_id: str = "payroc_default", **parts: Any) -> None:
        value = (
            text if text is not None else json.dumps({"conn_type": "payroc", "password": API_KEY, **parts})
        )
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", value)

    return define


@pytest.fixture
def hook(payroc, connect) -> PayrocHook:
    connect(host=f"{payroc.url}/v1", extra={"identity_url": payroc.url})
    return PayrocHook(timeout_seconds=60)


@pytest.fixture
def hasty(hook) -> PayrocHook:
    """A hook that does not wait long, for servers that give no answer."""
    return PayrocHook(timeout_seconds=0.5)


@pytest.fixture
def token() -> AccessToken:
    return AccessToken.model_validate({"access_token": "canary-token-given", "expires_in": 3600})


@pytest.fixture
def refund_body() -> dict[str, Any]:
    return json.loads(json.dumps(REFUND))


@pytest.fixture
def api_key() -> str:
    return API_KEY


@pytest.fixture
def key() -> str:
    return KEY
