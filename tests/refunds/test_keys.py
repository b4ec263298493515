"""The database derives a refund's idempotency key as Python does."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.postgres import PostgresServer
from include.refunds.keys import idempotency_key
from tests.conftest import NewDatabase

# All that Postgres can store. A source_ref may hold less.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def database(postgres: PostgresServer, new_ledger: NewDatabase) -> Iterator[psycopg.Connection]:
    with postgres.connect(str(new_ledger().database)) as connection:
        yield connection


def derived(connection: psycopg.Connection, pairs: list[tuple[str, str]]) -> list[UUID]:
    """Return the key that the database derives from each source and source_ref."""
    query = """
        SELECT refund_ledger.refund_key(source, source_ref)
        FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS pairs (source, source_ref, place) ORDER BY place"""
    sources, refs = zip(*pairs, strict=True)
    return [key for (key,) in connection.execute(query, [list(sources), list(refs)])]


@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=20))
def test_the_database_derives_the_key_as_python_does(
    database: psycopg.Connection, pairs: list[tuple[str, str]]
) -> None:
    assert derived(database, pairs) == [idempotency_key(*pair) for pair in pairs]


def test_the_keys_of_all_code_points_are_the_same(database: psycopg.Connection) -> None:
    letters = [chr(code) for code in range(1, 0x11000) if not 0xD800 <= code < 0xE000]
    pairs = [
        ("refund_requests", "".join(letters[start : start + 20])) for start in range(0, len(letters), 20)
    ]
    assert derived(database, pairs) == [idempotency_key(*pair) for pair in pairs]
