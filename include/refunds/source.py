"""The merchant's database: approved refunds come from it, and what became of them goes back, by two SQL files."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from include.refunds.ledger import WriteBack
from include.refunds.source_errors import SourceError as SourceError
from include.refunds.source_errors import SourceUnavailable as SourceUnavailable
from include.refunds.source_errors import failed
from include.refunds.source_update import run_update

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
        return await asyncio.to_thread(run_update, self._engine, self._update, _read(self._update), rows)

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
            raise failed(self._select, error) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path} can't be read ({error.strerror}).") from None
