"""What the tests of the boundaries share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import URL

from tests.boundaries.books import Books
from tests.refunds.conftest import world as world


@pytest.fixture
def books(ledger_url: URL) -> Iterator[Books]:
    """An empty ledger."""
    books = Books(ledger_url)
    yield books
    books.close()
