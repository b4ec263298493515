"""One HTTP request and its whole answer, bounded in time and size; nothing is retried, nothing is followed, nothing is logged."""

from __future__ import annotations

import http.client
import io
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, NameResolutionError

from include.payroc.errors import PayrocNoAnswer, PayrocUnexpectedAnswer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from payroc_airflow.connection import PayrocConnection

MAX_ANSWER_BYTES = 1024 * 1024
"""A page of 100 refunds has about 100 kB."""

MAX_RETRY_AFTER_SECONDS = 24 * 60 * 60
"""A longer wait that a server asks for is a mistake; it must not put a refund to sleep."""

ANSWER_TIMEOUTS = 2
"""How many read timeouts a whole answer may take: a server that sends a byte now and then must not hold a worker."""


@dataclass(frozen=True)
class Answer:
    """
    An answer that came whole.

    :param retry_after: seconds that ``Retry-After`` asks to wait, at most a day; ``None`` without a usable one.
    """

    status: int
    content_type: str
    body: bytes
    retry_after: float | None


def new_session(connection: PayrocConnection) -> requests.Session:
    """Return a session that takes nothing from the environment (proxies, netrc, CA bundles) and always verifies TLS."""
    session = requests.Session()
    session.trust_env = False
    session.verify = connection.ca_bundle or True
    if connection.proxy is not None:
        session.proxies = {"http": connection.proxy, "https": connection.proxy}
    session.headers.clear()
    session.headers.update(
        {
            "Accept": "application/json, application/problem+json",
            # A compressed answer could be of any size once unpacked.
            "Accept-Encoding": "identity",
            "User-Agent": "payroc-refunds",
        }
    )
    # Each request stands alone: no cookie of an answer goes into the next one.
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    adapter = _BoundedAdapter(max_retries=0)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def exchange(
    session: requests.Session,
    operation: str,
    method: str,
    url: str,
    *,
    timeout: float,
    headers: Mapping[str, str],
    params: list[tuple[str, str]] | None = None,
    body: bytes | None = None,
) -> Answer:
    """
    Send one request and read its answer.

    :param operation: Payroc's operation in words, for the messages.
    :param timeout: seconds to connect and seconds to wait for more of the answer; the whole answer may take twice that.
    :raises PayrocNoAnswer: no whole answer came. Payroc may have acted on the request.
    :raises PayrocUnexpectedAnswer: the answer is larger than 1 MiB.
    """
    try:
        response = session.request(
            method, url, params=params, data=body, headers=dict(headers), timeout=timeout, allow_redirects=False, stream=True
        )
    except (requests.RequestException, HTTPError, OSError) as error:
        raise PayrocNoAnswer(operation, _kind(error, timeout)) from None
    try:
        return Answer(
            status=response.status_code,
            content_type=response.headers.get("Content-Type", "").partition(";")[0].strip().lower(),
            body=_read(response, operation),
            retry_after=_retry_after(response.headers.get("Retry-After", "")),
        )
    except (HTTPError, OSError) as error:
        raise PayrocNoAnswer(operation, _kind(error, timeout, started=True)) from None
    finally:
        # Gives the connection back when the answer was read to its end, and closes it otherwise.
        response.close()


def _read(response: requests.Response, operation: str) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := response.raw.read(65536, decode_content=False):
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise PayrocUnexpectedAnswer(operation, "the answer is larger than 1 MiB", http_status=response.status_code)
        chunks.append(chunk)
    return b"".join(chunks)


def _kind(error: Exception, timeout: float, *, started: bool = False) -> str:
    """Say in our own words why there is no answer; the texts of the libraries quote URLs."""
    causes = list(_causes(error))
    if any(isinstance(cause, NameResolutionError | socket.gaierror) for cause in causes):
        return "the host name can't be resolved"
    if any(isinstance(cause, requests.exceptions.ProxyError) for cause in causes):
        return "the proxy gave no way through"
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return "connection refused"
    if any(isinstance(cause, requests.exceptions.ConnectTimeout) for cause in causes):
        return f"no connection within {timeout:g} s"
    if any(isinstance(cause, requests.exceptions.SSLError) for cause in causes):
        untrusted = any("CERTIFICATE_VERIFY_FAILED" in str(cause) for cause in causes)
        return "TLS certificate not trusted" if untrusted else "TLS could not be set up"
    if any(isinstance(cause, _DeadlineExceeded) for cause in causes):
        return f"no complete answer within {timeout * ANSWER_TIMEOUTS:g} s"
    if any(isinstance(cause, TimeoutError | requests.exceptions.Timeout) for cause in causes):
        return f"no answer within {timeout:g} s" if not started else f"the answer stopped for {timeout:g} s before its end"
    if any(isinstance(cause, ConnectionError | http.client.HTTPException) for cause in causes):
        return "connection closed before the answer's end" if started else "connection closed without an answer"
    return f"no usable answer ({type(error).__name__})"


def _causes(error: BaseException | None) -> Any:
    """Yield an exception and those inside it: requests and urllib3 wrap each other's in args, ``reason`` and the chain."""
    seen: set[int] = set()
    todo: list[Any] = [error]
    while todo:
        item = todo.pop()
        if isinstance(item, BaseException) and id(item) not in seen:
            seen.add(id(item))
            yield item
            todo += [item.__cause__, item.__context__, getattr(item, "reason", None), *item.args]


def _retry_after(value: str) -> float | None:
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(min(int(value[:9]), MAX_RETRY_AFTER_SECONDS))
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if when.tzinfo is None:
        return None
    return min(max((when - datetime.now(UTC)).total_seconds(), 0.0), float(MAX_RETRY_AFTER_SECONDS))


class _DeadlineExceeded(TimeoutError):
    """The answer as a whole took too long, though each part of it came in time."""


class _DeadlineReader(io.RawIOBase):
    """
    Reads a socket until a moment.

    A socket's timeout bounds one read only, headers and body come in many.

    :param raw: what ``socket.makefile`` reads from.
    :param sock: the socket, with the timeout of one read set.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw = raw
        self._sock = sock
        self._timeout = sock.gettimeout()
        self._ends = None if self._timeout is None else time.monotonic() + self._timeout * ANSWER_TIMEOUTS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._timeout is None or self._ends is None:
            return self._raw.readinto(buffer)
        left = self._ends - time.monotonic()
        if left <= 0:
            raise _DeadlineExceeded
        self._sock.settimeout(min(self._timeout, left))
        try:
            return self._raw.readinto(buffer)
        except TimeoutError:
            if left < self._timeout:
                raise _DeadlineExceeded from None
            raise

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        buffered = self.fp
        assert isinstance(buffered, io.BufferedReader)  # noqa: S101 - how http.client makes it
        self.fp = io.BufferedReader(_DeadlineReader(buffered.detach(), sock))


class _BoundedHTTPConnection(HTTPConnection):
    response_class = _BoundedResponse
    # http.client prints headers at a higher level, and whoever raises it raises it for all.
    debuglevel = 0


class _BoundedHTTPSConnection(HTTPSConnection):
    response_class = _BoundedResponse
    debuglevel = 0


class _BoundedHTTPPool(HTTPConnectionPool):
    ConnectionCls = _BoundedHTTPConnection


class _BoundedHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _BoundedHTTPSConnection


_POOLS = {"http": _BoundedHTTPPool, "https": _BoundedHTTPSPool}


class _BoundedAdapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager
