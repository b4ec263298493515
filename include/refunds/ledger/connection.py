"""
Connections to the ledger's database, over asyncpg.

What a worker computes for a refund is mostly what a statement costs it, so there is nothing between a
statement and the driver but its parameters' names and the rows' attributes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import cache
from typing import Any, Literal
from urllib.parse import urlencode

import asyncpg
from sqlalchemy import URL

from include.refunds.ledger_url import UrlError, addresses
from include.refunds.postgres_parameters import refusal

# asyncpg calls it an internal error when a server dies in the middle of a message.
DATABASE_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""What may be raised while the database is used: its own errors, the driver's, the network's."""

_CONNECT_SECONDS = 10
_CLOSE_SECONDS = 2
# A little longer than the server lets a statement of a transaction take. A server that has lost its power
# says nothing, not even that.
_STATEMENT_SECONDS = 330

_KEEPALIVE = {
    "keepalives": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    # 16 on macOS, which calls it TCP_KEEPALIVE.
    "keepalives_idle": (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", 16)),
    "keepalives_interval": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    "keepalives_count": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
}

# `:name` but not the cast `::type`.
_PARAMETER = re.compile(r"(?<!:):([a-z][a-z0-9_]*)")


class Row(asyncpg.Record):  # type: ignore[misc]  # asyncpg is not typed
    """A row: a mapping of its columns, which are its attributes as well."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Rows(list[Row]):
    """The rows that a statement returns."""

    def one(self) -> Row:
        """
        Return the only row.

        :raises ValueError: when there is none, or more than one.
        """
        (row,) = self
        return row

    def one_or_none(self) -> Row | None:
        """
        Return the only row, ``None`` when there is none.

        :raises ValueError: when there is more than one.
        """
        return self.one() if self else None

    def scalars(self) -> list[Any]:
        """Return each row's first column."""
        return [row[0] for row in self]

    def scalar_one(self) -> Any:
        """Return the first column of the only row; raises as :meth:`one` does."""
        return self.one()[0]

    def scalar_one_or_none(self) -> Any:
        """Return the first column of the only row, ``None`` without one; raises as :meth:`one` does."""
        return self.one()[0] if self else None


class Connection:
    """
    A connection as the ledger's statements use it.

    Values are given by name, ``:name`` in the statement; JSON goes in as text and comes out as what it says.
    An array as a value costs each new connection a query about its type, of several milliseconds: what every
    refund needs takes text instead (:func:`as_array`).
    """

    def __init__(self, driver: asyncpg.Connection) -> None:
        self._driver = driver

    async def execute(self, statement: str, values: Mapping[str, Any] | None = None) -> Rows:
        """
        Return the rows of a statement.

        :raises asyncpg.PostgresError: and others of :data:`DATABASE_ERRORS`, when it can't be carried out.
        """
        numbered, names = _numbered(statement)
        return Rows(await self._driver.fetch(numbered, *_by_number(names, values)))

    async def change(self, statement: str, values: Mapping[str, Any] | None = None) -> int:
        """Return how many rows a statement changed; raises as :meth:`execute` does."""
        numbered, names = _numbered(statement)
        # Such as `UPDATE 3`.
        status: str = await self._driver.execute(numbered, *_by_number(names, values))
        return int(status.rpartition(" ")[2])

    @asynccontextmanager
    async def transaction(
        self, isolation: Literal["repeatable_read"] | None = None, *, readonly: bool = False
    ) -> AsyncIterator[None]:
        """
        Commit what happens within, or roll it back when an error leaves it; inside of another one it is a
        savepoint.

        :param isolation: ``repeatable_read`` for one snapshot of all that is read.
        """
        async with self._driver.transaction(isolation=isolation, readonly=readonly):
            yield

    @asynccontextmanager
    async def rolled_back(self) -> AsyncIterator[None]:
        """Roll back what happens within, whatever comes of it."""
        transaction = self._driver.transaction()
        await transaction.start()
        try:
            yield
        finally:
            await transaction.rollback()


class LedgerEngine:
    """
    The ledger's database, and the connections to it that are kept.

    asyncpg's own pool belongs to one event loop and resets a connection each time it comes back, which is a
    round trip; what is set here ends with its transaction.

    :param url: the database, with the parameters of libpq that :mod:`~include.refunds.ledger_url` lets
        through.
    :param pool_size: connections at most, of which each is kept for the next who asks. 0: as many as are
        asked for, and none is kept.
    """

    def __init__(self, url: URL, *, pool_size: int = 5) -> None:
        self.url = url
        # Each with what it was used for last.
        self._idle: list[tuple[str, asyncpg.Connection]] = []
        self._places = asyncio.Semaphore(pool_size) if pool_size else None

    @property
    def place(self) -> str:
        """Hosts and ports, for messages."""
        return ", ".join(f"{host}:{port}" for host, port in addresses(self.url))

    @asynccontextmanager
    async def connect(self, purpose: str = "") -> AsyncIterator[Connection]:
        """
        Yield a connection, on which each statement commits by itself.

        :param purpose: what it is for. A new connection learns each statement and the triggers behind it
            once, which takes as long as a dozen refunds; so of the idle ones the one that was last used for
            the same is taken.
        :raises OSError: and others of :data:`DATABASE_ERRORS`, when the database can't be reached.
        """
        async with self._places or nullcontext():
            driver = await self._driver(purpose)
            usable = False
            try:
                yield Connection(driver)
                usable = self._places is not None and not driver.is_closed()
            finally:
                # One that an error has passed through is not trusted with another transaction.
                if usable:
                    self._idle.append((purpose, driver))
                else:
                    await _close(driver)

    @asynccontextmanager
    async def begin(
        self,
        isolation: Literal["repeatable_read"] | None = None,
        *,
        readonly: bool = False,
        purpose: str = "",
    ) -> AsyncIterator[Connection]:
        """
        Yield a connection in a transaction (see :meth:`Connection.transaction`); for the rest as
        :meth:`connect`.
        """
        async with self.connect(purpose) as connection, connection.transaction(isolation, readonly=readonly):
            yield connection

    async def dispose(self) -> None:
        """Close the connections that nobody uses."""
        idle, self._idle = self._idle, []
        await asyncio.gather(*(_close(driver) for _, driver in idle))

    async def _driver(self, purpose: str) -> asyncpg.Connection:
        self._idle = [item for item in self._idle if not item[1].is_closed()]
        if self._idle:
            fitting = (place for place, (used_for, _) in enumerate(self._idle) if used_for == purpose)
            return self._idle.pop(next(fitting, -1))[1]
        driver = await self._connected()
        await driver.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=json.loads)
        await driver.set_type_codec("jsonb", schema="pg_catalog", encoder=str, decoder=json.loads)
        return driver

    async def _connected(self) -> asyncpg.Connection:
        """
        Return a connection to the first host that takes one. The driver's own list of hosts has one time
        limit for all of them.
        """
        query = {name: str(value) for name, value in self.url.query.items() if name not in ("host", "port")}
        timeout = float(query.pop("connect_timeout", _CONNECT_SECONDS)) or None
        keepalive = {name: int(query.pop(name)) for name in [*query] if name in _KEEPALIVE}
        wanted = query.pop("target_session_attrs", "any")
        failure: Exception | None = None
        for attributes in ("standby", "any") if wanted == "prefer-standby" else (wanted,):
            for host, port in addresses(self.url):
                try:
                    driver = await asyncpg.connect(
                        f"postgresql://?{urlencode(query)}",
                        host=host,
                        port=port,
                        user=self.url.username,
                        password=self.url.password,
                        database=self.url.database,
                        target_session_attrs=attributes,
                        timeout=timeout,
                        command_timeout=_STATEMENT_SECONDS,
                        record_class=Row,
                    )
                except DATABASE_ERRORS as error:
                    failure = error
                else:
                    _keep_alive(driver, keepalive)
                    return driver
        if sentence := refusal(failure or OSError()):
            raise UrlError(f"The ledger's connection: {sentence}.") from None
        raise failure or OSError("no host")


def as_array(values: Iterable[object]) -> str:
    """Return numbers as the text of an array of Postgres, for ``CAST(CAST(:name AS text) AS bigint[])``."""
    return f"{{{','.join(map(str, values))}}}"


def _keep_alive(driver: asyncpg.Connection, settings: Mapping[str, int]) -> None:
    """Set what libpq does by itself."""
    transport = driver._transport
    if not settings or transport.get_extra_info("socket").family == socket.AF_UNIX:
        return
    # uvloop's socket lets nobody set options; a second one for the same connection does.
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as same:
        for name, value in {"keepalives": 1, **settings}.items():
            level, option = _KEEPALIVE[name]
            same.setsockopt(level, option, value)


async def _close(driver: asyncpg.Connection) -> None:
    # A server that does not answer any more keeps nobody waiting: the connection is dropped then.
    with suppress(*DATABASE_ERRORS):
        await driver.close(timeout=_CLOSE_SECONDS)


@cache
def _numbered(statement: str) -> tuple[str, tuple[str, ...]]:
    """Return a statement with ``$1`` for the first name and so on, and the names."""
    names = tuple(dict.fromkeys(_PARAMETER.findall(statement)))
    return _PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", statement), names


def _by_number(names: Iterable[str], values: Mapping[str, Any] | None) -> list[Any]:
    return [values[name] for name in names] if values is not None else []
