"""
A Postgres that speaks TLS: a proxy in front of the tests' server, whose build has none, with a certificate
made for the session.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.postgres import HOST, PostgresServer
from tests.conftest import SCRATCH
from tests.support.certificates import Authority, new_authority

# The first message of a client that asks for encryption,
# https://www.postgresql.org/docs/current/protocol-message-formats.html.
_SSL_REQUEST = bytes.fromhex("0000000804d2162f")
_GSS_REQUEST = bytes.fromhex("0000000804d21630")


@dataclass(frozen=True)
class TlsPostgres:
    """
    :param port: where the server listens with TLS, on 127.0.0.1; its certificate is for ``localhost`` alone.
    :param authority: the authority that signed it.
    :param other: another authority.
    """

    port: int
    authority: Authority
    other: Authority


@pytest.fixture(scope="session")
def authority() -> Authority:
    """The certification authority of the tests' servers."""
    return new_authority(SCRATCH / "authority")


@pytest.fixture(scope="session")
def other_authority() -> Authority:
    """An authority that signed none of them."""
    return new_authority(SCRATCH / "other-authority")


@pytest.fixture(scope="session")
def tls_postgres(
    postgres: PostgresServer, authority: Authority, other_authority: Authority
) -> Iterator[TlsPostgres]:
    """
    The tests' Postgres with TLS, which it demands; it looks at a client's certificate when there is one.
    """
    certificate, key = authority.sign("postgres-server", "localhost")
    with terminated(postgres.port, certificate, key, authority) as port:
        yield TlsPostgres(port, authority, other_authority)


@contextmanager
def terminated(behind: int, certificate: Path, key: Path, authority: Authority) -> Iterator[int]:
    """Yield the port of a proxy that ends TLS and passes on to another port what comes in by it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(authority.file)
    context.verify_mode = ssl.CERT_OPTIONAL
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            async with _closed(writer):
                while (request := await reader.readexactly(8)) != _SSL_REQUEST:
                    if request != _GSS_REQUEST:
                        return
                    writer.write(b"N")
                writer.write(b"S")
                await writer.start_tls(context)
                theirs, ours = await asyncio.open_connection(HOST, behind)
                async with _closed(ours):
                    await asyncio.gather(_pass_on(reader, ours), _pass_on(theirs, writer))

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, HOST, 0)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


@asynccontextmanager
async def _closed(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
