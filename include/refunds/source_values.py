"""
Values of a source that its driver can't turn into Python's: they arrive as what the database sent.

A driver raises at the first of them, so that a date of `infinity` in one row would stop all rows. Whether a
value makes a refund is judged row by row, in the pull.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types import datetime as dates
from psycopg.types import json


def _or_as_sent(loader: type[Loader], *, as_text: bool) -> type[Loader]:
    class OrAsSent(loader):  # type: ignore[misc, valid-type]  # its base is a value
        def load(self, data: Buffer) -> Any:
            try:
                return super().load(data)
            except (psycopg.Error, ValueError, OverflowError, RecursionError):
                sent = bytes(data)
                return sent.decode() if as_text else sent

    return OrAsSent


# Text for a date that Python's datetime has not; bytes for JSON, which as text might be taken for what it is
# not.
_LOADERS = {
    "date": _or_as_sent(dates.DateLoader, as_text=True),
    "time": _or_as_sent(dates.TimeLoader, as_text=True),
    "timetz": _or_as_sent(dates.TimetzLoader, as_text=True),
    "timestamp": _or_as_sent(dates.TimestampLoader, as_text=True),
    "timestamptz": _or_as_sent(dates.TimestamptzLoader, as_text=True),
    "interval": _or_as_sent(dates.IntervalLoader, as_text=True),
    "json": _or_as_sent(json.JsonLoader, as_text=False),
    "jsonb": _or_as_sent(json.JsonbLoader, as_text=False),
}


def load_any_value(connection: psycopg.Connection[Any]) -> None:
    """Let every value of a Postgres connection arrive, in arrays and ranges too."""
    for name, loader in _LOADERS.items():
        connection.adapters.register_loader(name, loader)


def load_any_mysql_value(connection: Any) -> None:
    """Let a date such as 0000-00-00 arrive as its text from mysqlclient, which makes it NULL."""
    from MySQLdb.constants import FIELD_TYPE
    from MySQLdb.times import Date_or_None, DateTime_or_None

    connection.converter |= {
        FIELD_TYPE.DATETIME: lambda sent: DateTime_or_None(sent) or sent,
        FIELD_TYPE.TIMESTAMP: lambda sent: DateTime_or_None(sent) or sent,
        FIELD_TYPE.DATE: lambda sent: Date_or_None(sent) or sent,
    }


def text_or_bytes(sent: bytes) -> str | bytes:
    """Return a text of SQLite, as it is when it is not UTF-8."""
    try:
        return sent.decode()
    except UnicodeDecodeError:
        return sent
