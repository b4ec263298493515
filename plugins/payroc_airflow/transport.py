"""One HTTP request and its whole answer, bounded in time and size; nothing is retried, nothing is followed, nothing is logged."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import inf
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import aiohttp
from aiohttp.http import HttpProcessingError
from yarl import URL

from include.payroc.errors import PayrocNoAnswer, PayrocUnexpectedAnswer
from payroc_airflow.trust import trusted

if TYPE_CHECKING:
    from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, ClientSession
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

    from payroc_airflow.connection import PayrocConnection

MAX_ANSWER_BYTES = 1024 * 1024
"""A page of 100 refunds has about 100 kB."""

MAX_RETRY_AFTER_SECONDS = 24 * 60 * 60
"""A longer wait that a server asks for is a mistake; it must not put a refund to sleep."""

ANSWER_TIMEOUTS = 2
"""How many timeouts a whole exchange may take: a server that sends a byte now and then must not hold a worker."""

IDLE_SECONDS = 1.5
"""
How long a connection is kept without a request. A server closes an idle one without asking (the hastiest common ones after 2 seconds),
and a POST that meets the closing has no known outcome: its refund waits for a minute and more. In a list the gaps are milliseconds.
"""

HEADERS = {
    "Accept": "application/json, application/problem+json",
    # A compressed answer could be of any size once unpacked.
    "Accept-Encoding": "identity",
    "User-Agent": "payroc-refunds",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """
    An answer that came whole.

    :param retry_after: seconds that ``Retry-After`` asks to wait, at most a day; ``None`` without a usable one.
    """

    status: int
    content_type: str
    body: bytes
    retry_after: float | None


class Transport:
    """
    The way to one Payroc: it takes nothing from the environment (proxies, netrc, CA bundles) and always verifies TLS.

    It may be used by several event loops, each with connections of its own. They are closed by :meth:`close`, else at the end of
    :func:`asyncio.run`, or when the transport is forgotten.

    :param connection: gives the proxy and the trusted certificates.
    :param timeout: seconds to connect, and seconds to wait for more of an answer; a whole exchange may take twice that.
    """

    def __init__(self, connection: PayrocConnection, timeout: float) -> None:
        self._connection = connection
        self._seconds = timeout
        self._timeout = aiohttp.ClientTimeout(
            total=timeout * ANSWER_TIMEOUTS,
            connect=timeout,
            sock_read=timeout,
            # Otherwise long timeouts are rounded up to whole seconds of the loop's clock.
            ceil_threshold=inf,
        )
        self._opened: dict[
            asyncio.AbstractEventLoop, tuple[ClientSession, AsyncGenerator[ClientSession, None]]
        ] = {}
        # It holds the sessions as well: they are closed before they can be forgotten.
        weakref.finalize(self, _close_all, self._opened).atexit = False

    async def exchange(
        self,
        operation: str,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        params: list[tuple[str, str]] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """
        Send one request and read its answer.

        :param operation: Payroc's operation in words, for the messages.
        :param url: sent as it is, so it is quoted already.
        :raises PayrocNoAnswer: no whole answer came. Payroc may have acted on the request.
        :raises PayrocUnexpectedAnswer: the answer is larger than 1 MiB.
        """
        session = await self._session()
        if params:
            url = f"{url}?{urlencode(params)}"
        response: ClientResponse | None = None
        try:
            response = await session.request(
                method,
                URL(url, encoded=True),
                data=body,
                headers=headers,
                skip_auto_headers=["Content-Type"] if body is None else None,
                allow_redirects=False,
            )
            return Answer(
                status=response.status,
                content_type=response.headers.get("Content-Type", "").partition(";")[0].strip().lower(),
                body=await _read(response, operation),
                retry_after=_retry_after(response.headers.get("Retry-After", "")),
            )
        except (aiohttp.ClientError, HttpProcessingError, OSError, _Once) as error:
            why = _why(error, self._seconds, started=response is not None)
        finally:
            # What was read to its end has given its connection back already; any other connection is closed.
            if response is not None:
                response.close()
        # Outside of the handler, so that it does not carry the library's exception along: that one holds the URL and the headers.
        raise PayrocNoAnswer(operation, why)

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        _, owner = self._opened.pop(asyncio.get_running_loop(), (None, None))
        if owner is not None:
            await owner.aclose()

    async def _session(self) -> ClientSession:
        loop = asyncio.get_running_loop()
        session, _ = self._opened.get(loop, (None, None))
        if session is None:
            for ended in [each for each in self._opened if each.is_closed()]:
                del self._opened[ended]
            owner = _session_of_the_loop(self._connection, self._timeout)
            session = await anext(owner)
            self._opened[loop] = session, owner
        return session


def _close_all(
    opened: dict[asyncio.AbstractEventLoop, tuple[ClientSession, AsyncGenerator[ClientSession, None]]],
) -> None:
    for loop, (_, owner) in opened.items():
        # A loop that has ended has closed its sessions.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_close_soon, loop, owner)


def _close_soon(loop: asyncio.AbstractEventLoop, owner: AsyncGenerator[ClientSession, None]) -> None:
    loop.create_task(owner.aclose())


async def _session_of_the_loop(
    connection: PayrocConnection, timeout: aiohttp.ClientTimeout
) -> AsyncGenerator[ClientSession, None]:
    """Yield a session. An event loop closes its generators when it ends, and so the session, also where nobody thought of it."""
    urls = (connection.api_url, connection.identity_url, connection.proxy or "")
    connector = _Connector(
        # Reading the certificates takes as long as a hundred requests.
        ssl=trusted(connection.ca_bundle) if any(url.startswith("https:") for url in urls) else True,
        # How many go out at a time is the limiter's: what is claimed must not wait here.
        limit=0,
        keepalive_timeout=IDLE_SECONDS,
    )
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        headers=HEADERS,
        # Each request stands alone: no cookie of an answer goes into the next one.
        cookie_jar=aiohttp.DummyCookieJar(),
        proxy=connection.proxy,
        trust_env=False,
        auto_decompress=False,
        middlewares=[_once],
    ) as session:
        yield session


class _Connector(aiohttp.TCPConnector):
    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        """Return a connection to use again, but none on which something came that nobody had asked for: it would pass as the answer."""
        while (connection := await super()._get(key, traces)) is not None:
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()
        return None


class _Once(Exception):
    """Carries an error past aiohttp, which sends a GET again when the connection was lost."""

    def __init__(self, error: Exception) -> None:
        self.error = error


async def _once(request: ClientRequest, send: ClientHandlerType) -> ClientResponse:
    try:
        return await send(request)
    except (aiohttp.ClientError, OSError) as error:
        raise _Once(error) from None


async def _read(response: ClientResponse, operation: str) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := await response.content.readany():
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise PayrocUnexpectedAnswer(
                operation, "the answer is larger than 1 MiB", http_status=response.status
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _why(error: Exception, timeout: float, *, started: bool) -> str:
    """Say in our own words why there is no answer; the texts of the library quote URLs."""
    match error:
        case _Once(error=inner):
            return _why(inner, timeout, started=started)
        case aiohttp.ClientConnectorDNSError():
            return "the host name can't be resolved"
        case aiohttp.ClientProxyConnectionError() | aiohttp.ClientHttpProxyError():
            return "the proxy gave no way through"
        case aiohttp.ClientConnectorCertificateError():
            return "TLS certificate not trusted"
        case aiohttp.ClientConnectorSSLError():
            return "TLS could not be set up"
        case aiohttp.ClientConnectorError():
            return (
                "connection refused"
                if isinstance(error.os_error, ConnectionRefusedError)
                else "no connection could be made"
            )
        case aiohttp.ConnectionTimeoutError():
            return f"no connection within {timeout:g} s"
        case aiohttp.SocketTimeoutError():
            return (
                f"the answer stopped for {timeout:g} s before its end"
                if started
                else f"no answer within {timeout:g} s"
            )
        case TimeoutError():
            return f"no complete answer within {timeout * ANSWER_TIMEOUTS:g} s"
        case aiohttp.ClientConnectionError() | aiohttp.ClientPayloadError() | ConnectionError():
            return (
                "connection closed before the answer's end"
                if started
                else "connection closed without an answer"
            )
        case aiohttp.ClientResponseError() | HttpProcessingError():
            return "the answer is not HTTP, or its head is too large"
    return f"no usable answer ({type(error).__name__})"


def _retry_after(value: str) -> float | None:
    value = value.strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return float(min(int(value[:9]), MAX_RETRY_AFTER_SECONDS))
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if when.tzinfo is None:
        return None
    return min(max((when - datetime.now(UTC)).total_seconds(), 0.0), float(MAX_RETRY_AFTER_SECONDS))
