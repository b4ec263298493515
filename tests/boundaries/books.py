"""A real ledger that pulls rows of any values, without a source database in between."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import URL, create_engine, text

from include.refunds.cipher import Cipher
from include.refunds.ledger import Ledger, LedgerEngine, WriteBack
from include.refunds.pull import Pulled, pull
from include.refunds.settings import get_settings
from include.refunds.source import COLUMNS
from tests.refunds.conftest import PLAIN
from tests.support.clock import clock
from tests.support.refunds import REFUNDS

GOOD: dict[str, Any] = dict.fromkeys(COLUMNS) | {
    **PLAIN,
    "account_number": "556677889911",
    "requested_by": "ann@example.com",
    "approved_by": "bob@example.com",
    "approved_at": datetime(2026, 11, 20, 9, tzinfo=UTC),
}
"""A valid row, but for the source_ref."""


class Listed:
    """A source that returns these rows."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows

    async def select_approved(self) -> Sequence[dict[str, Any]]:
        return self._rows

    async def write_back(self, rows: Sequence[WriteBack]) -> Any:
        raise AssertionError("nothing is written back here")


class Books:
    """
    A ledger whose clock stands still, and what comes into it.
    """

    def __init__(self, url: URL) -> None:
        self.settings = get_settings()
        self.cipher = Cipher(self.settings)
        self.url = url
        self.engine = create_engine(url)
        self.ledger = Ledger(LedgerEngine(url, pool_size=0), self.settings, actor="test")
        self.now = datetime.now(UTC)

    @property
    def now(self) -> datetime:
        """The ledger's time; tests move it."""
        return self._now

    @now.setter
    def now(self, now: datetime) -> None:
        self._now = now
        with self.engine.begin() as connection:
            connection.exec_driver_sql(clock(f"SELECT timestamptz '{now.isoformat()}'"))

    def pull(self, rows: Sequence[dict[str, Any]]) -> Pulled:
        return asyncio.run(pull(Listed(rows), self.ledger, self.cipher, self.settings))

    def pull_beside_good_ones(self, **columns: Any) -> tuple[Pulled, dict[str, str]]:
        """Pull a row between two good ones, which come through; return what is wrong with it, by column."""
        rows = [
            GOOD | {"source_ref": "before"},
            GOOD | {"source_ref": "ref"} | columns,
            GOOD | {"source_ref": "after"},
        ]
        pulled = self.pull(rows)
        assert {"before", "after"} <= set(self.refunds())
        assert not {"before", "after"} & set(pulled.invalid)
        errors = dict(next(iter(pulled.invalid.values()), {}))
        assert len(pulled.invalid) <= 1
        return pulled, errors

    def refunds(self) -> dict[str, dict[str, Any]]:
        """Return the ledger's refunds by source_ref."""
        with self.engine.connect() as connection:
            query = text(f"SELECT * FROM {REFUNDS} ORDER BY id")
            rows = connection.execute(query).mappings()
            return {row["source_ref"]: dict(row) for row in rows}

    def close(self) -> None:
        self.engine.dispose()
