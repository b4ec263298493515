"""The merchant's database: approved refunds come from it, and what became of them goes back, by two SQL files."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import DateTime, Engine, String, bindparam, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError

from include.refunds.ledger import WriteBack

SQL_FOLDER = Path(__file__).parent.parent / "sql"

COLUMNS = (
    "source_ref",
    "processing_terminal_id",
    "order_id",
    "description",
    "amount",
    "currency",
    "name_on_account",
    "account_type",
    "sec_code",
    "routing_number",
    "account_number",
    "secure_token",
    "email",
    "requested_by",
    "approved_by",
    "approved_at",
)

SourceRow = Mapping[str, Any]


class SourceError(Exception):
    """The source can't be read or written; the message names the file or connection and what to do."""


class SourceUnavailable(SourceError):
    """The source's database does not answer; it may a little later."""


class Source(Protocol):
    """The source, as pull, release and write-back see it."""

    async def select_approved(self) -> Sequence[SourceRow]:
        """Return the approved refunds, one row each, with the columns of :data:`COLUMNS`."""

    async def write_back(self, rows: Sequence[WriteBack]) -> list[str]:
        """Write what became of refunds; return the source_refs that touched no row."""


class SqlSource:
    """
    A source behind SQLAlchemy: any database that Airflow has a SQL hook for.

    :param engine: a synchronous engine.
    :param select_approved: path of the query; ``include/sql/select_approved.sql`` unless told otherwise.
    :param write_back: path of the update; ``include/sql/write_back.sql`` unless told otherwise.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        select_approved: Path = SQL_FOLDER / "select_approved.sql",
        write_back: Path = SQL_FOLDER / "write_back.sql",
    ) -> None:
        self._engine = engine
        self._select = select_approved
        self._update = write_back

    async def select_approved(self) -> Sequence[SourceRow]:
        """
        Run the query.

        :raises SourceError: when it fails or lacks a column.
        """
        return await asyncio.to_thread(self._run_select)

    async def write_back(self, rows: Sequence[WriteBack]) -> list[str]:
        """
        Run the update for each row, in one transaction.

        :raises SourceError: when it fails; then nothing of it was written.
        """
        return await asyncio.to_thread(self._run_update, rows)

    def _run_select(self) -> list[SourceRow]:
        try:
            with self._engine.connect() as connection:
                result = connection.execute(text(_read(self._select)))
                returned = set(result.keys())
                missing = [name for name in COLUMNS if name not in returned]
                if missing:
                    raise SourceError(
                        f"{self._select.name} does not return {', '.join(missing)}: add the column, or NULL AS {missing[0]}."
                    )
                return [dict(row) for row in result.mappings()]
        except DBAPIError as error:
            raise _failed(self._select, error) from None

    def _run_update(self, rows: Sequence[WriteBack]) -> list[str]:
        statement = text(_read(self._update))
        # Typed, so that a parameter may stand anywhere in the statement, and each dialect gets the instant in its own form.
        types = {
            name: DateTime(timezone=True) if name == "updated_at" else String()
            for name in WriteBack.__slots__
        }
        used = statement.compile().params
        unknown = sorted(set(used) - set(types))
        if unknown or "source_ref" not in used:
            problem = (
                f"names unknown parameters ({', '.join(unknown)})"
                if unknown
                else "does not name the parameter :source_ref"
            )
            raise SourceError(
                f"{self._update.name} {problem}; it may use {', '.join(f':{name}' for name in types)}."
            )
        statement = statement.bindparams(*(bindparam(name, type_=types[name]) for name in used))
        untouched = []
        try:
            with self._engine.begin() as connection:
                values = [_parameters(row, used) for row in rows]
                # All at once where the driver counts what they touched together; one by one only to find which of them touched no row.
                counts = bool(values) and connection.dialect.supports_sane_multi_rowcount
                if counts and connection.execute(statement, values).rowcount == len(rows):
                    return []
                for row, given in zip(rows, values, strict=True):
                    if connection.execute(statement, given).rowcount == 0:
                        untouched.append(row.source_ref)
        except DBAPIError as error:
            raise _failed(self._update, error) from None
        return untouched


def _parameters(row: WriteBack, used: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in used}
    if "updated_at" in values:
        values["updated_at"] = row.updated_at.astimezone(UTC)
    return values


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path} can't be read ({error.strerror}).") from None


def _failed(path: Path, error: DBAPIError) -> SourceError:
    kind = (
        SourceUnavailable
        if error.connection_invalidated or (isinstance(error, OperationalError) and not _is_sqlite(error))
        else SourceError
    )
    return kind(f"{path.name} failed on the connection refunds_source: {_without_values(error)}")


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
