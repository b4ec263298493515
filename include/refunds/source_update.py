"""The update of the source: the outcome of each refund goes into its row of the merchant's table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, DateTime, Dialect, Engine, String, bindparam, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import TypeEngine

from include.refunds.database_errors import Kind, describe
from include.refunds.ledger import NotWritten, WriteBack
from include.refunds.source_errors import SourceError, SourceUnavailable, failed
from include.refunds.source_session import wait_for_locks
from include.refunds.sql_files import SqlFile

_TYPES: dict[str, TypeEngine[Any]] = {
    name: DateTime(timezone=True) if name == "updated_at" else String()
    for name in WriteBack.__slots__
    if name != "refund_id"
}
PARAMETERS = tuple(_TYPES)
"""The parameters that the update may use; it has to use the first."""

# How long a statement waits for another session's lock, in seconds: at first, and once a row may be locked.
_PATIENCE = 3.0
_SHORT_PATIENCE = 0.5
# So many rows that are locked one by one are enough: whoever has locked them may have locked the rest.
_MOST_LOCKED = 20

_COUNTS = "refunds_counts"
# The dialects that count per row.
_COUNTING: WeakSet[Dialect] = WeakSet()


@dataclass(slots=True)
class Updated:
    """
    What an update did.

    :param written: the rows that were written; committed.
    :param not_written: the rows that were refused, locked or not found, each with the reason.
    :param doubled: by source_ref of a written row, how many rows the UPDATE touched when it was more than
        one.
    :param stopped: why the rest was not even tried: the database went away, or too many rows are locked.
    :param unusable: the error of a statement that failed for every row, such as an unknown column.
    """

    written: list[WriteBack] = field(default_factory=list)
    not_written: list[NotWritten] = field(default_factory=list)
    doubled: dict[str, int] = field(default_factory=dict)
    stopped: SourceError | None = None
    unusable: SourceError | None = None


def run_update(engine: Engine, update: SqlFile, rows: Sequence[WriteBack]) -> Updated:
    """
    Run the update for each row: for all of them in one transaction, and where that fails in smaller ones.

    A refused row is found by halves, so that one of 200 costs 15 transactions more; a locked one by trying
    each row, because each try may wait. There are no savepoints: a constraint may be checked at the commit,
    and a deadlock ends a whole transaction.

    :param update: the file's statement, whose parameters are among :data:`PARAMETERS`.
    """
    return _Update(engine, update).run(rows)


class _Update:
    def __init__(self, engine: Engine, update: SqlFile) -> None:
        self._engine = engine
        self._name = update.name
        self._used = update.parameters
        # Typed: so a parameter may be anywhere in the statement, and each dialect gets the time in its form.
        self._statement = text(update.text).bindparams(
            *(bindparam(name, type_=_TYPES[name]) for name in self._used)
        )
        self._locked = 0
        self._unusable = 0
        self._done = Updated()

    def run(self, rows: Sequence[WriteBack]) -> Updated:
        done = self._done
        try:
            if rows:
                self._write(rows, _PATIENCE)
        except SourceUnavailable as error:
            done.stopped = error
        if self._unusable < len(rows):
            done.unusable = None
        return done

    def _write(self, rows: Sequence[WriteBack], patience: float) -> None:
        try:
            with self._engine.begin() as connection:
                wait_for_locks(connection, patience)
                counts = self._counts(connection, rows)
        except (DBAPIError, UnicodeError) as error:
            self._refused(rows, error)
        else:
            for row, count in zip(rows, counts, strict=True):
                self._counted(row, count)

    def _refused(self, rows: Sequence[WriteBack], error: Exception) -> None:
        failure = describe(error)
        if failure.kind is Kind.UNAVAILABLE:
            raise failed(self._name, error) from None
        if len(rows) > 1:
            pieces = len(rows) if failure.kind is Kind.LOCKED else 2
            for piece in _split(rows, pieces):
                self._write(piece, _SHORT_PATIENCE)
            return
        (row,) = rows
        self._done.not_written.append(
            NotWritten(row.source_ref, f"{self._name}: {failure}", failure.kind.is_transient)
        )
        if failure.kind is Kind.LOCKED:
            self._locked += 1
            if self._locked == _MOST_LOCKED:
                raise failed(self._name, error) from None
        elif failure.kind is Kind.UNUSABLE:
            self._unusable += 1
            self._done.unusable = failed(self._name, error)

    def _counted(self, row: WriteBack, count: int) -> None:
        # Some drivers do not count: -1.
        if count == 0:
            self._done.not_written.append(
                NotWritten(row.source_ref, f"{self._name} touched no row: it is gone, or newer.", False)
            )
            return
        self._done.written.append(row)
        if count > 1:
            self._done.doubled[row.source_ref] = count

    def _counts(self, connection: Connection, rows: Sequence[WriteBack]) -> list[int]:
        """Run the statement for each row, and return how many rows of the table each touched."""
        values = [_parameters(row, self._used) for row in rows]
        if len(values) == 1:
            return [connection.execute(self._statement, values[0]).rowcount]
        counts: list[int] = []
        _count_each(connection.engine)
        connection.execute(self._statement, values, execution_options={_COUNTS: counts})
        return counts


def _split(rows: Sequence[WriteBack], pieces: int) -> Iterable[Sequence[WriteBack]]:
    size = -(-len(rows) // pieces)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _parameters(row: WriteBack, used: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in used}
    if "updated_at" in values:
        # In whole seconds: a column without fractions would round it up, and then refuse the next as older.
        values["updated_at"] = row.updated_at.astimezone(UTC).replace(microsecond=0)
    return values


def _count_each(engine: Engine) -> None:
    """Let an engine count per row what many updates touch; SQLAlchemy returns their sum, or nothing."""
    # The dialect has the listeners, which engines of the same database share. SQLAlchemy itself asks by an
    # engine's place in memory, where another one may have been before.
    if engine.dialect not in _COUNTING:
        event.listen(engine, "do_executemany", _execute_and_count)
        _COUNTING.add(engine.dialect)


def _execute_and_count(cursor: Any, statement: str, parameters: Sequence[Any], context: Any) -> bool | None:
    counts: list[int] | None = context.execution_options.get(_COUNTS)
    if counts is None:
        return None
    if context.dialect.driver == "psycopg":
        # A pipeline, with one result per row: 200 rows take a few round trips.
        cursor.executemany(statement, parameters, returning=True)
        counts.append(cursor.rowcount)
        while cursor.nextset():
            counts.append(cursor.rowcount)
    else:
        for values in parameters:
            cursor.execute(statement, values)
            counts.append(cursor.rowcount)
    return True
