"""The update of the source: what became of refunds goes back into the merchant's table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC
from typing import Any

from sqlalchemy import DateTime, Engine, String, bindparam, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import TypeEngine

from include.refunds.ledger import WriteBack
from include.refunds.source_errors import failed
from include.refunds.sql_files import SqlFile

_TYPES: dict[str, TypeEngine[Any]] = {
    name: DateTime(timezone=True) if name == "updated_at" else String() for name in WriteBack.__slots__
}
PARAMETERS = tuple(_TYPES)
"""The parameters that the update may use; it has to use the first."""


def run_update(engine: Engine, update: SqlFile, rows: Sequence[WriteBack]) -> list[str]:
    """
    Run the update for each row, in one transaction.

    :param update: the file's statement, whose parameters are among :data:`PARAMETERS`.
    :returns: the source_refs that touched no row.
    :raises SourceError: when it fails; then nothing of it was written.
    """
    used = update.parameters
    # Typed, so that a parameter may stand anywhere in the statement, and each dialect gets the instant in its own form.
    statement = text(update.text).bindparams(*(bindparam(name, type_=_TYPES[name]) for name in used))
    untouched = []
    try:
        with engine.begin() as connection:
            values = [_parameters(row, used) for row in rows]
            # All at once where the driver counts what they touched together; one by one only to find which of them touched no row.
            counts = bool(values) and connection.dialect.supports_sane_multi_rowcount
            if counts and connection.execute(statement, values).rowcount == len(rows):
                return []
            for row, given in zip(rows, values, strict=True):
                if connection.execute(statement, given).rowcount == 0:
                    untouched.append(row.source_ref)
    except DBAPIError as error:
        raise failed(update.name, error) from None
    return untouched


def _parameters(row: WriteBack, used: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in used}
    if "updated_at" in values:
        values["updated_at"] = row.updated_at.astimezone(UTC)
    return values
