"""The ledger's database: its encoding, its rules for rows, and what gets into its server's log."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from demo.postgres import PostgresServer
from include.refunds.csv_lines import read_lines
from include.refunds.demo_source import import_lines
from include.refunds.ledger import Ledger, LedgerEngine, LedgerError
from include.refunds.migrations import MigrationRefused, migrate
from include.refunds.revision import REVISION
from include.refunds.rows import EARLIEST, MAX_AMOUNT
from include.refunds.settings import get_settings
from include.refunds.text import UNPRINTABLE, text_error
from tests.boundaries.books import GOOD, Books
from tests.boundaries.test_csv import lines
from tests.conftest import NewDatabase
from tests.refunds.conftest import World

# -- encoding --------------------------------------------------------------------------------------

OTHER_ENCODINGS = ("LATIN1", "SQL_ASCII", "EUC_JP")


def database_in(postgres: PostgresServer, encoding: str) -> str:
    name = f"ledger_in_{encoding.lower()}"
    with postgres.connect() as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0"
        )
    return name


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_a_ledger_in_another_encoding_than_utf8_is_not_migrated(
    postgres: PostgresServer, encoding: str
) -> None:
    name = database_in(postgres, encoding)
    with pytest.raises(MigrationRefused, match=f"is in {encoding}, .*ENCODING 'UTF8' TEMPLATE template0"):
        migrate(postgres.url(name))
    with postgres.connect(name) as connection:
        assert connection.execute("SELECT to_regnamespace('refund_ledger')").fetchone() == (None,)


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_a_ledger_that_was_restored_into_another_encoding_is_not_used(
    postgres: PostgresServer, encoding: str
) -> None:
    name = database_in(postgres, encoding)
    with postgres.connect(name) as connection:
        connection.execute("CREATE SCHEMA refund_ledger")
        connection.execute(f"CREATE TABLE refund_ledger.schema_version AS SELECT '{REVISION}' AS version_num")
    ledger = Ledger(LedgerEngine(postgres.url(name), pool_size=0), get_settings(), actor="test")
    with pytest.raises(LedgerError, match=f"is in {encoding}"):
        asyncio.run(ledger.check())


# -- the rules of the database ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(new_ledger: NewDatabase) -> Iterator[psycopg.Connection]:
    """A connection to a ledger with one refund, on which the guards of what never changes are off."""
    books = Books(new_ledger())
    books.pull([GOOD | {"source_ref": "ref"}])
    url = books.url.set(drivername="postgresql").render_as_string(hide_password=False)
    books.close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        yield connection


def is_refused(connection: psycopg.Connection, column: str, value: object) -> bool:
    """Return whether the database refuses a value; it is not kept."""
    with connection.transaction(force_rollback=True):
        try:
            with connection.transaction():
                # The key derives from the source_ref, and is refused for other reasons.
                key = (
                    "refund_ledger.refund_key(source, %(value)s)"
                    if column == "source_ref"
                    else "idempotency_key"
                )
                connection.execute(
                    f"UPDATE refund_ledger.refund_instructions SET {column} = %(value)s, idempotency_key = {key}",
                    {"value": value},
                )
        except psycopg.errors.CheckViolation:
            return True
    return False


@pytest.mark.parametrize(
    ("column", "value", "refused"),
    [
        ("amount", 0, True),
        ("amount", 1, False),
        ("amount", MAX_AMOUNT, False),
        ("amount", MAX_AMOUNT + 1, True),
        ("approved_at", "1999-12-31 23:59:59.999999+00", True),
        ("approved_at", EARLIEST, False),
        ("approved_at", "infinity", True),
        ("approved_at", "-infinity", True),
        ("order_id", "SO 1~!", False),
        ("order_id", "SO\u20131", True),
        ("order_id", "SO-1\n", True),
        ("approved_by_folded", "ann@example.com", True),
        ("requested_by_folded", "bob@example.com", True),
    ],
)
def test_the_database_has_the_same_bounds(
    stored: psycopg.Connection, column: str, value: object, refused: bool
) -> None:
    assert is_refused(stored, column, value) is refused


def test_the_database_refuses_the_same_characters(stored: psycopg.Connection) -> None:
    edges = {0xD7FF, 0xE000, 0xFFFE, 0x10FFFF, 0xFE0F, *range(1, 0x180)}
    for item in UNPRINTABLE.replace("-", "-").split("-"):
        edges |= {ord(character) + step for character in item for step in (-1, 0, 1)}
    edges |= {code for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cf", "Zl", "Zp", "Zs")}
    edges -= {0, -1, *range(0xD800, 0xE000)}
    values = [f"a{chr(code)}b" for code in sorted(edges)]
    # One statement for all: the constraint itself, asked of each.
    row = stored.execute(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'texts_can_be_printed'"
    ).fetchone()
    assert row is not None
    names = ("source_ref", "processing_terminal_id", "order_id", "requested_by", "approved_by")
    others = ", ".join(f"''::text AS {name}" for name in names)
    found = stored.execute(
        f"SELECT description FROM (SELECT unnest(%s::text[]) AS description, {others}) AS texts "
        f"WHERE NOT ({row[0].removeprefix('CHECK ')})",
        [values],
    )
    assert {value for (value,) in found} == {value for value in values if text_error(value)}


@pytest.mark.parametrize(
    "column",
    ["source_ref", "processing_terminal_id", "order_id", "description", "requested_by", "approved_by"],
)
@pytest.mark.parametrize("blank", [" ", "\u00a0", "\u2003", "\u3000"])
def test_the_database_refuses_blanks_at_an_end(stored: psycopg.Connection, column: str, blank: str) -> None:
    assert is_refused(stored, column, f"7701001{blank}")
    assert is_refused(stored, column, f"{blank}7701001")


@pytest.mark.parametrize("column", ["source_ref_folded", "requested_by_folded", "approved_by_folded"])
def test_a_folded_form_never_changes(books: Books, column: str) -> None:
    books.pull([GOOD | {"source_ref": "ref"}])
    with (
        pytest.raises(IntegrityError, match="refund_instructions is append-only"),
        books.engine.begin() as connection,
    ):
        connection.execute(text(f"UPDATE refund_ledger.refund_instructions SET {column} = 'other'"))


# -- the server's log ------------------------------------------------------------------------------

SECRET = "5566778899112233"


class Log:
    """What the server has logged since the test began."""

    def __init__(self, postgres: PostgresServer) -> None:
        self._file = postgres.log
        self._begin = self._file.stat().st_size

    def read(self) -> str:
        with self._file.open("rb") as opened:
            opened.seek(self._begin)
            return opened.read().decode(errors="replace")


@pytest.fixture
def log(postgres: PostgresServer) -> Log:
    return Log(postgres)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO refund_requests (source_ref, account_number) VALUES ('x', '{}')",
        "UPDATE refund_requests SET requested_by = approved_by, account_number = '{}'",
        "INSERT INTO refund_requests SELECT * FROM refund_requests WHERE '{}' <> ''",
    ],
    ids=["NOT NULL", "CHECK", "UNIQUE"],
)
def test_a_statement_that_the_source_refuses_leaves_no_row_in_the_log(
    world: World, log: Log, statement: str
) -> None:
    world.approve(account_number=SECRET)
    with pytest.raises(IntegrityError), world.source_engine.begin() as connection:
        connection.exec_driver_sql(statement.format(SECRET))
    assert "ERROR" in log.read()
    assert SECRET not in log.read()


BAD_CELLS: list[dict[str, str]] = [
    {"approved_by": "ann@example.com"},
    {"approved_at": SECRET},
    {"amount": SECRET},
    {"currency": ""},
    {"requested_by": "", "description": SECRET},
    {"approved_by": "ANN@example.com\u200b"},
    {"description": f"{SECRET}\u0001"},
]


def test_an_import_is_refused_before_it_gets_to_the_server(world: World, log: Log) -> None:
    # As on a server that is not set as ours is.
    with world.source_engine.begin() as connection:
        connection.exec_driver_sql("ALTER ROLE postgres SET log_error_verbosity = 'default'")
        connection.exec_driver_sql("ALTER ROLE postgres SET log_min_error_statement = 'error'")
    try:
        content = lines(*({"account_number": SECRET} | cells for cells in BAD_CELLS)).encode()
        url = world.source_engine.url
        imported = import_lines(url, read_lines(content), get_settings(), advance=lambda: None)
        assert len(imported.errors) == len(BAD_CELLS)
    finally:
        with world.source_engine.begin() as connection:
            connection.exec_driver_sql("ALTER ROLE postgres RESET ALL")
    assert "ERROR" not in log.read()


BAD_ROWS: list[dict[str, Any]] = [
    {"approved_by": "Ann@example.com"},
    {"requested_by": "Jos\u00e9", "approved_by": "Jose\u0301"},
    {"description": f"{SECRET}\u0001"},
    {"amount": 10**15},
    {"order_id": "x" * 25},
    {"source_ref": "before".upper()},
    {"source_ref": "\ufdfa" * 199},
]


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_row_is_refused_before_it_gets_to_the_ledger(books: Books, log: Log, row: dict[str, Any]) -> None:
    assert books.pull_beside_good_ones(**row)[1]
    assert "ERROR" not in log.read()
