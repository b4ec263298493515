"""The merchant's database: approved refunds come from it and outcomes go back, by two SQL files."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from include.refunds.ledger import WriteBack
from include.refunds.source_errors import SourceError as SourceError
from include.refunds.source_errors import SourceUnavailable as SourceUnavailable
from include.refunds.source_errors import failed
from include.refunds.source_session import prepare_transactions
from include.refunds.source_update import PARAMETERS, Updated, run_update
from include.refunds.sql_files import in_words, read_sql

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


class ReadableSource(Protocol):
    """The source, as pull sees it."""

    async def select_approved(self) -> Sequence[SourceRow]:
        """Return the approved refunds, one row each, with the columns of :data:`COLUMNS`."""


class Source(ReadableSource, Protocol):
    """The source, as release and write-back see it, too."""

    async def write_back(self, rows: Sequence[WriteBack]) -> Updated:
        """Write the outcomes of refunds; return which rows were written and which were not."""


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
        self._engine = prepare_transactions(engine)
        self._select = select_approved
        self._update = write_back

    async def select_approved(self) -> Sequence[SourceRow]:
        """
        Run the query.

        :raises SourceError: when it fails, lacks a column, or returns one twice.
        """
        return await asyncio.to_thread(self._run_select)

    async def write_back(self, rows: Sequence[WriteBack]) -> Updated:
        """
        Run the update for each row (see :func:`~include.refunds.source_update.run_update`).

        :raises SourceError: when the file can't be used; then nothing was written.
        """
        return await asyncio.to_thread(self._run_update, rows)

    def _run_select(self) -> list[SourceRow]:
        query = read_sql(self._select, self._engine.dialect.name)
        try:
            # Begun here, so that the cursor is made by a connection that is prepared.
            with self._engine.begin() as connection:
                result = connection.execute(text(query.text))
                places = _places(query.name, result.keys() if result.returns_rows else ())
                return [{name: row[place] for name, place in places.items()} for row in result]
        except DBAPIError as error:
            raise failed(query.name, error) from None

    def _run_update(self, rows: Sequence[WriteBack]) -> Updated:
        update = read_sql(self._update, self._engine.dialect.name, PARAMETERS, required=PARAMETERS[0])
        return run_update(self._engine, update, rows)


def _places(file: str, returned: Iterable[str]) -> dict[str, int]:
    """
    Return which column of a result is which of :data:`COLUMNS`, in any case: Oracle and Snowflake fold names
    to capitals.

    :raises SourceError: when one is missing, or comes twice: then nobody knows which of them was meant.
    """
    names = [name.lower() for name in returned]
    if not names:
        raise SourceError(f"{file} returns no rows: give a SELECT.")
    if twice := [name for name in COLUMNS if names.count(name) > 1]:
        raise SourceError(
            f"{file} returns {in_words(twice)} more than once: keep one of each, by naming the columns in "
            "place of a *."
        )
    if missing := [name for name in COLUMNS if name not in names]:
        plural = "s" if len(missing) > 1 else ""
        raise SourceError(
            f"{file} does not return {in_words(missing)}: add the column{plural}, or NULL AS {missing[0]}."
        )
    return {name: names.index(name) for name in COLUMNS}
