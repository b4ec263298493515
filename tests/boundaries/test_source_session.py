"""
A session with a Postgres source: values arrive whatever the database is set to, and nothing waits without
end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine
from sqlalchemy.pool import NullPool

from demo.postgres import PostgresServer
from include.refunds.source import COLUMNS, SourceError, SourceUnavailable, SqlSource
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world

Read = Callable[[str], list[Any]]


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[URL]:
    """A database of its own, whose settings a test may change."""
    postgres.drop_database("settings_of_its_own")
    postgres.create_database("settings_of_its_own")
    yield postgres.url("settings_of_its_own")
    postgres.drop_database("settings_of_its_own")


@pytest.fixture
def read(database: URL, tmp_path: Path) -> Read:
    """A function that returns what a query's column ``description`` says in each row."""
    return lambda query: descriptions(database, tmp_path, query)


def descriptions(url: URL, folder: Path, query: str) -> list[Any]:
    file = folder / "select_approved.sql"
    others = ", ".join(f"NULL AS {name}" for name in COLUMNS if name != "description")
    file.write_text(f"SELECT t.description, {others} FROM ({query}) AS t")
    source = SqlSource(create_engine(url, poolclass=NullPool), select_approved=file)
    return [row["description"] for row in asyncio.run(source.select_approved())]


def setting(postgres: PostgresServer, name: str, value: str) -> None:
    with postgres.connect() as connection:
        connection.execute(f"ALTER DATABASE settings_of_its_own SET {name} = '{value}'")


GOOD = datetime(2026, 11, 2, 14, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("'infinity'::timestamptz", "infinity"),
        ("'-infinity'::timestamptz", "-infinity"),
        ("'0044-03-15 BC'::timestamptz", "0044-03-15 00:00:00+00 BC"),
        ("'10000-01-01'::timestamptz", "10000-01-01 00:00:00+00"),
        ("'0001-01-01 00:00:00+14'::timestamptz", "0001-12-31 10:00:00+00 BC"),
        ("'infinity'::timestamp", "infinity"),
        ("'10000-01-01'::date", "10000-01-01"),
    ],
)
def test_a_date_python_has_not_arrives_as_text_and_its_neighbours_as_dates(
    postgres: PostgresServer, read: Read, value: str, text: str
) -> None:
    setting(postgres, "timezone", "Asia/Tokyo")
    good = "'2026-11-02 14:30+00'::timestamptz"
    kind = value.rpartition("::")[2]
    found = read(
        f"SELECT {good}::{kind} AS description UNION ALL SELECT {value} UNION ALL SELECT {good}::{kind}"
    )
    expected = {"timestamptz": GOOD, "timestamp": GOOD.replace(tzinfo=None), "date": GOOD.date()}[kind]
    assert found == [expected, text, expected]


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        ("'24:00'::time", "24:00:00"),
        ("'24:00+05'::timetz", "24:00:00+05"),
        ("'1 day'::interval", timedelta(days=1)),
        ("'NaN'::numeric", Decimal("NaN")),
        ("'-Infinity'::numeric", Decimal("-Infinity")),
        ("'10:30'::time", time(10, 30)),
        ("'{infinity,2026-11-02}'::date[]", ["infinity", date(2026, 11, 2)]),
        ("'{\"a\": 1}'::jsonb", {"a": 1}),
        ("'\\x00ff'::bytea", b"\x00\xff"),
        ("int4range(1, 3)::text", "[1,3)"),
    ],
)
def test_a_value_of_any_type_arrives(read: Read, value: str, arrives: Any) -> None:
    assert repr(read(f"SELECT {value} AS description")) == repr([arrives])


@pytest.mark.parametrize(
    "value",
    [
        "repeat('9', 5000)::jsonb",
        "(repeat('[', 20000) || repeat(']', 20000))::json",
        "daterange('infinity', 'infinity', '[]')",
        "tstzrange('10000-01-01', NULL)",
    ],
)
def test_a_value_that_python_can_not_parse_stops_no_other(read: Read, value: str) -> None:
    if "20000" in value:
        value = value.replace("20000", "5000")
    (found,) = read(f"SELECT {value} AS description")
    assert found is not None
    assert not isinstance(found, str)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("datestyle", "German"),
        ("datestyle", "SQL, DMY"),
        ("timezone", "America/New_York"),
        ("intervalstyle", "sql_standard"),
        ("bytea_output", "escape"),
        ("client_encoding", "LATIN1"),
        ("standard_conforming_strings", "off"),
    ],
)
def test_a_setting_of_the_database_changes_no_value(
    postgres: PostgresServer, read: Read, name: str, value: str
) -> None:
    setting(postgres, name, value)
    values = (
        "'2026-11-02 14:30+00'::timestamptz",
        "'2026-11-02 09:30-05'::timestamptz::timestamp AT TIME ZONE 'UTC'",
        "'1 day 02:00'::interval",
        r"'\x005c'::bytea",
        "'Größe 😀'::text",
        r"'a\'::text",
    )
    assert [read(f"SELECT {value} AS description")[0] for value in values] == [
        GOOD,
        GOOD,
        timedelta(days=1, hours=2),
        b"\x00\\",
        "Größe 😀",
        "a\\",
    ]


def test_every_wait_of_a_session_has_an_end(read: Read) -> None:
    waits = ("lock_timeout", "statement_timeout")
    assert [read(f"SELECT current_setting('{name}') AS description")[0] for name in waits] == ["10s", "5min"]


def test_nothing_of_it_outlives_the_transaction(database: URL, tmp_path: Path) -> None:
    engine = create_engine(database)
    file = tmp_path / "select_approved.sql"
    file.write_text("SELECT 1")
    with pytest.raises(SourceError, match="does not return"):
        asyncio.run(SqlSource(engine, select_approved=file).select_approved())
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW lock_timeout").scalar_one() == "0"


# -- SQLite ------------------------------------------------------------------------------------------------


def test_a_text_of_sqlite_that_is_no_utf_8_arrives_as_bytes_beside_good_ones(tmp_path: Path) -> None:
    query = "SELECT 'Größe 😀' AS description UNION ALL SELECT CAST(x'47ff' AS text) UNION ALL SELECT 'b'"
    assert descriptions(URL.create("sqlite"), tmp_path, query) == ["Größe 😀", b"G\xff", "b"]


def test_a_lock_on_sqlite_is_waited_for_no_longer_than_on_others(tmp_path: Path) -> None:
    query = "SELECT timeout AS description FROM pragma_busy_timeout"
    assert descriptions(URL.create("sqlite"), tmp_path, query) == [10_000]


def test_a_lock_on_sqlite_that_stays_is_reported_as_passing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("include.refunds.source_session.LOCK_SECONDS", 0)
    url = URL.create("sqlite", database=str(tmp_path / "shop.db"))
    with create_engine(url).connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (description)")
        connection.exec_driver_sql("BEGIN EXCLUSIVE")
        with pytest.raises(SourceUnavailable):
            descriptions(url, tmp_path, "SELECT description FROM t")


# -- in a pull ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["'infinity'", "'-infinity'", "'0044-03-15 BC'", "'10000-01-02'", "'0001-01-01 00:00:00+14'"],
)
def test_a_row_with_a_date_python_has_not_is_named_and_its_neighbours_are_pulled(
    postgres: PostgresServer, world: World, value: str
) -> None:
    name = world.source_engine.url.database
    with postgres.connect() as connection:
        connection.execute(f"ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'")
    try:
        before, bad, after = world.approve(), world.approve(), world.approve()
        world.change_source(bad, f"approved_at = {value}")
        pulled = world.pull()
    finally:
        with postgres.connect() as connection:
            connection.execute(f"ALTER DATABASE {name} RESET timezone")
    assert (pulled.new, set(pulled.invalid)) == (2, {bad})
    assert "approved_at" in pulled.invalid[bad]
    assert world.row(before)["approved_at"] == world.source_row(before)["approved_at"]
    assert world.row(after)["status"] == "approved"
