"""The line between workers and the local Payroc: it keeps what passes, and spoils it as a test tells it to."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.patience import PATIENCE_SECONDS

# What a test does to an answer: it gets the handler, and a function that lets Payroc act and returns its whole answer,
# ``None`` when Payroc closed the connection without one.
Fault = Callable[["Handler", Callable[[], bytes | None]], None]

_CREATE = "/v1/bank-transfer-refunds"


@dataclass(frozen=True)
class Post:
    """A create as it passed; ``at`` is the monotonic clock's."""

    order_id: str
    key: str
    body: bytes
    at: float


class _Server(ThreadingHTTPServer):
    # A worker opens the connections for a whole list at once.
    request_queue_size = 128


class Line:
    """
    Hands requests on to the local Payroc and its answers back.

    :param target: base URL of the local Payroc.
    :param tls: speak TLS with this context.
    """

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        self.target = urlsplit(target)
        self.tls = tls
        self.fault: Fault | None = None
        self.requests: list[str] = []
        self.posts: list[Post] = []
        self.overlapping: list[str] = []
        self.ended = threading.Event()
        self._in_flight: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.open()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Listen; after :meth:`close` on the same port as before."""
        server = _Server(("127.0.0.1", self.port), type("BoundHandler", (Handler,), {"line": self}))
        server.daemon_threads = True
        # Workers that die in the middle are what the tests are about.
        server.handle_error = lambda *args: None  # type: ignore[method-assign]
        if self.tls is not None:
            # The handshake is for the handler's thread: here it would let all others wait.
            server.socket = self.tls.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = server.server_port
        self._server = server
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @contextmanager
    def passing(self, method: str, path: str, key: str, body: bytes) -> Iterator[None]:
        """Keep a request, and note when two creates with one key are under way at the same time."""
        is_create = method == "POST" and path == _CREATE
        with self._lock:
            self.requests.append(f"{method} {path}")
            if is_create:
                self.posts.append(Post(json.loads(body)["order"]["orderId"], key, body, time.monotonic()))
                self._in_flight[key] += 1
                if self._in_flight[key] > 1:
                    self.overlapping.append(key)
        try:
            yield
        finally:
            if is_create:
                with self._lock:
                    self._in_flight[key] -= 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    line: Line

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            # The worker died while it sent: no server takes half a request for one.
            self.close_connection = True
            return
        with self.line.passing(
            self.command, urlsplit(self.path).path, self.headers.get("Idempotency-Key", ""), body
        ):
            fault = self.line.fault
            if fault is not None:
                self.close_connection = True
                fault(self, lambda: self._answer_of_payroc(body))
                return
            answer = self._answer_of_payroc(body)
        self.hand_on(answer)

    def hand_on(self, answer: bytes | None) -> None:
        """Hand a whole answer on, and keep the connection; close it when Payroc has given none."""
        self.close_connection = answer is None
        if answer is not None:
            self.wfile.write(answer)

    do_GET = do_POST = answer

    def log_message(self, *args: Any) -> None:
        pass

    def _answer_of_payroc(self, body: bytes) -> bytes | None:
        payroc = http.client.HTTPConnection(
            self.line.target.hostname or "", self.line.target.port, timeout=PATIENCE_SECONDS
        )
        # Host stays ours: Payroc makes its links from it.
        payroc.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            payroc.putheader(name, value)
        try:
            payroc.endheaders(body)
            response = payroc.getresponse()
            content = response.read()
        except (http.client.HTTPException, OSError):
            return None
        finally:
            payroc.close()
        kept = [
            (name, value)
            for name, value in response.getheaders()
            if name.lower() not in ("content-length", "connection", "date")
        ]
        head = [
            f"HTTP/1.1 {response.status} {response.reason}",
            *(f"{name}: {value}" for name, value in kept),
        ]
        return "\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content


@contextmanager
def running(target: str, tls: ssl.SSLContext | None = None) -> Iterator[Line]:
    """Yield a line that is closed at the end."""
    line = Line(target, tls)
    try:
        yield line
    finally:
        line.ended.set()
        with suppress(OSError):
            line.close()
