"""Connections that end without an answer: what no web framework offers, and what a client of a payment API must survive."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

TRANSPORT = "sandbox.transport"


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, handing the connection's transport on to the application."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Put the transport into the state that uvicorn copies into the scope of each request."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, TRANSPORT: transport}


class HeldConnections:
    """The connections that are held open without an answer, so that the server can stop while they are."""

    def __init__(self) -> None:
        self._transports: set[asyncio.Transport] = set()

    async def hold(self, transport: asyncio.Transport, receive: Receive, seconds: float) -> None:
        """Hold a connection for so many seconds or until its client leaves, then close it."""
        self._transports.add(transport)
        try:
            if seconds > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await _client_left(receive)
            transport.abort()
            # uvicorn would answer 500 for a request that ends unanswered before it has seen the connection close.
            await _client_left(receive)
        finally:
            self._transports.discard(transport)

    def release(self) -> None:
        """Close them all."""
        for transport in self._transports:
            transport.abort()


class NoAnswer(Response):
    """
    Sends nothing.

    :param seconds: how long the connection is held open before it is closed.
    """

    def __init__(self, held: HeldConnections, seconds: float) -> None:
        super().__init__()
        self._held = held
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hold the connection, then close it."""
        await self._held.hold(scope["state"][TRANSPORT], receive, self._seconds)


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
