"""What goes wrong with the merchant's database, as errors that quote no value of a row."""

from __future__ import annotations

import re

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError


class SourceError(Exception):
    """The source can't be read or written; the message names the file or connection and what to do."""


class SourceUnavailable(SourceError):
    """The source's database does not answer; it may a little later."""


def failed(file: str, error: DBAPIError) -> SourceError:
    """Return the error to raise for the statement of a file that a database refused."""
    kind = (
        SourceUnavailable
        if error.connection_invalidated or (isinstance(error, OperationalError) and not _is_sqlite(error))
        else SourceError
    )
    return kind(f"{file} failed on the connection refunds_source: {_without_values(error)}")


def _without_values(error: DBAPIError) -> str:
    """Return what a driver says in its first line, unless that may quote a value of the row: names of columns and tables are wanted."""
    lines = str(error.orig).strip().splitlines() or [type(error.orig).__name__]
    state = getattr(error.orig, "sqlstate", None)
    # What is told of these classes of SQLSTATE is about names, rights and the server. Anything else may quote a value: one that does not
    # fit, one that a constraint refuses, or what a trigger of the merchant's says.
    is_told = (
        state.startswith(("08", "28", "3D", "42", "53", "57"))
        if state
        else not isinstance(error, DataError | IntegrityError)
    )
    if not is_told:
        column = getattr(getattr(error.orig, "diag", None), "column_name", None)
        return f"{type(error.orig).__name__}{f', SQLSTATE {state}' if state else ''}{f', column {column}' if column else ''}."
    return re.sub(r"'[^']*'|[0-9]{4,}", "…", lines[0])


def _is_sqlite(error: DBAPIError) -> bool:
    # SQLite reports a missing column as an operational error; others keep the word for a server that does not answer.
    return type(error.orig).__module__ == "sqlite3"
