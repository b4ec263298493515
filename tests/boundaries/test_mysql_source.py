"""A source in MySQL, here Debian's MariaDB, through the Airflow connection ``refunds_source``."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, text

from include.refunds.ledger import WriteBack
from include.refunds.source import COLUMNS, SqlSource
from payroc_airflow.databases import source_of
from tests.support.mariadb import AirflowMySql, MariaDbServer

TABLE = """
CREATE TABLE refund_requests (
    source_ref             varchar(64) PRIMARY KEY,
    processing_terminal_id varchar(32) NOT NULL,
    order_id               varchar(64),
    description            text,
    amount                 bigint NOT NULL,
    currency               char(3) NOT NULL,
    name_on_account        varchar(255),
    account_type           varchar(16),
    sec_code               varchar(8),
    routing_number         varchar(16),
    account_number         varchar(32),
    secure_token           varchar(64),
    email                  varchar(255),
    requested_by           varchar(255) NOT NULL,
    approved_by            varchar(255),
    approved_at            datetime(6),
    withdrawn_at           datetime(6),
    status                 varchar(16),
    payroc_refund_id       varchar(32),
    payroc_status          varchar(16),
    reason                 varchar(255),
    updated_at             datetime(6)
)"""


INSERT = (
    "INSERT INTO refund_requests (source_ref, processing_terminal_id, amount, "
    "currency, requested_by) "
    "VALUES ('RF-1', '7701001', 4999, 'USD', 'ann')"
)


def line(source_ref: str, at: datetime) -> WriteBack:
    return WriteBack(
        source_ref=source_ref,
        status="accepted",
        payroc_refund_id="JD80BRUT1T",
        payroc_status="ready",
        reason=None,
        updated_at=at,
    )


def not_written(source: SqlSource, *rows: WriteBack) -> list[str]:
    return [item.source_ref for item in asyncio.run(source.write_back(rows)).not_written]


@pytest.fixture
def table(mysql_url: URL, mysql_source: AirflowMySql) -> URL:
    with create_engine(mysql_url).begin() as connection:
        connection.execute(text(TABLE))
    return mysql_url


def test_approved_refunds_are_read(table: URL) -> None:
    with create_engine(table).begin() as connection:
        connection.execute(
            text(
                "INSERT INTO refund_requests (source_ref, processing_terminal_id, amount, "
                "currency, name_on_account, "
                "requested_by, approved_by, approved_at) VALUES "
                "('RF-1', '7701001', 4999, 'USD', 'José 😀', 'ann', 'bob', '2026-11-02 09:30:00')"
            )
        )
    (row,) = asyncio.run(source_of().select_approved())
    assert set(row) == set(COLUMNS)
    assert (row["amount"], row["name_on_account"]) == (4999, "José 😀")


def test_outcomes_are_written_back_and_a_missing_row_is_named(table: URL) -> None:
    run(table, INSERT)
    at = datetime(2026, 11, 2, 14, 30, tzinfo=UTC)
    assert not_written(source_of(), line("RF-1", at), line("RF-2", at)) == ["RF-2"]
    with create_engine(table).connect() as connection:
        written = connection.execute(text("SELECT status, updated_at FROM refund_requests")).one()
    assert written == ("accepted", at.replace(tzinfo=None))


def descriptions(url: URL, folder: Path, query: str) -> list[Any]:
    """Return what a query's column ``description`` says in each row."""
    file = folder / "select_approved.sql"
    others = ", ".join(f"NULL AS {name}" for name in COLUMNS if name != "description")
    file.write_text(f"SELECT t.description, {others} FROM ({query}) AS t")
    source = SqlSource(create_engine(url), select_approved=file)
    return [row["description"] for row in asyncio.run(source.select_approved())]


def run(url: URL, *statements: str) -> None:
    with create_engine(url).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def test_a_date_of_zeros_arrives_as_text_and_its_neighbours_as_dates(mysql_url: URL, tmp_path: Path) -> None:
    run(
        mysql_url,
        "SET sql_mode = ''",
        "CREATE TABLE t (n int, at datetime, stamp timestamp NULL, day date)",
        "INSERT INTO t VALUES (1, '2026-11-02 14:30', '2026-11-02 14:30', '2026-11-02'), "
        "(2, '0000-00-00', '0000-00-00', '0000-00-00'), (3, '2026-11-00 10:30', NULL, '2026-00-02')",
    )
    at = datetime(2026, 11, 2, 14, 30, tzinfo=UTC).replace(tzinfo=None)
    assert descriptions(mysql_url, tmp_path, "SELECT at AS description FROM t ORDER BY n") == [
        at,
        "0000-00-00 00:00:00",
        "2026-11-00 10:30:00",
    ]
    assert descriptions(mysql_url, tmp_path, "SELECT stamp AS description FROM t ORDER BY n")[1:] == [
        "0000-00-00 00:00:00",
        None,
    ]
    assert descriptions(mysql_url, tmp_path, "SELECT day AS description FROM t ORDER BY n") == [
        at.date(),
        "0000-00-00",
        "2026-00-02",
    ]


def test_a_text_arrives_whole_from_any_character_set(mysql_url: URL, tmp_path: Path) -> None:
    run(
        mysql_url.update_query_dict({"charset": "utf8mb4"}),
        "CREATE TABLE t (a varchar(20) CHARACTER SET latin1, b varchar(20) CHARACTER SET utf8mb4, "
        "c varbinary(20))",
        "INSERT INTO t VALUES ('Größe', 'Größe 😀', x'ff00')",
    )
    latin1 = mysql_url.update_query_dict({"charset": "latin1"})
    found = [descriptions(latin1, tmp_path, f"SELECT {name} AS description FROM t")[0] for name in "abc"]
    assert found == ["Größe", "Größe 😀", b"\xff\x00"]


# Before, in the middle of and behind the hour that New York's clocks leave out, and the one that they show
# twice.
CHANGES_OF_CLOCKS = [
    datetime(2026, 3, 8, 6, 59, 59, tzinfo=UTC),
    datetime(2026, 3, 8, 7, 0, tzinfo=UTC),
    datetime(2026, 3, 8, 2, 30, tzinfo=UTC),
    datetime(2026, 11, 1, 5, 30, tzinfo=UTC),
    datetime(2026, 11, 1, 6, 30, tzinfo=UTC),
    datetime(2026, 11, 1, 1, 30, tzinfo=UTC),
]


@pytest.mark.parametrize("kind", ["timestamp(6)", "datetime(6)"])
def test_instants_survive_both_changes_of_clocks(table: URL, tmp_path: Path, kind: str) -> None:
    run(table, f"ALTER TABLE refund_requests MODIFY updated_at {kind} NULL, MODIFY approved_at {kind} NULL")
    with create_engine(table).begin() as connection:
        connection.exec_driver_sql("SET time_zone = '+00:00'")
        for number, at in enumerate(CHANGES_OF_CLOCKS):
            connection.execute(
                text(
                    "INSERT INTO refund_requests (source_ref, processing_terminal_id, amount, "
                    "currency, requested_by, "
                    "approved_at) VALUES (:ref, '7701001', 4999, 'USD', 'ann', :at)"
                ),
                {"ref": f"RF-{number}", "at": at.replace(tzinfo=None)},
            )
    source = SqlSource(create_engine(table))
    read = {row["source_ref"]: row["approved_at"] for row in asyncio.run(source.select_approved())}
    assert [read[f"RF-{n}"].replace(tzinfo=UTC) for n in range(len(read))] == CHANGES_OF_CLOCKS
    lines = [line(f"RF-{number}", at) for number, at in enumerate(CHANGES_OF_CLOCKS)]
    assert not_written(source, *lines) == []
    written = descriptions(
        table, tmp_path, "SELECT updated_at AS description FROM refund_requests ORDER BY source_ref"
    )
    assert [at.replace(tzinfo=UTC) for at in written] == CHANGES_OF_CLOCKS


@pytest.mark.parametrize("kind", ["timestamp", "datetime", "datetime(3)", "timestamp(6)"])
def test_a_fraction_of_a_second_is_cut_so_that_the_same_may_be_written_again(
    table: URL, mariadb: MariaDbServer, kind: str
) -> None:
    run(table, f"ALTER TABLE refund_requests MODIFY updated_at {kind} NULL", INSERT)
    with mariadb.connect() as connection:
        connection.query("SET GLOBAL sql_mode = CONCAT(@@GLOBAL.sql_mode, ',TIME_ROUND_FRACTIONAL')")
    try:
        source = SqlSource(create_engine(table))
        at = datetime(2026, 11, 2, 14, 30, 0, 999_999, tzinfo=UTC)
        for later in (timedelta(), timedelta(), timedelta(microseconds=1)):
            assert not_written(source, line("RF-1", at + later)) == []
    finally:
        with mariadb.connect() as connection:
            connection.query("SET GLOBAL sql_mode = REPLACE(@@GLOBAL.sql_mode, 'TIME_ROUND_FRACTIONAL', '')")


def test_a_reason_that_does_not_fit_is_refused_and_not_cut(table: URL) -> None:
    run(table, "SET GLOBAL sql_mode = ''", INSERT, "ALTER TABLE refund_requests MODIFY status varchar(4)")
    try:
        source = SqlSource(create_engine(table))
        assert not_written(source, line("RF-1", CHANGES_OF_CLOCKS[0])) == ["RF-1"]
    finally:
        run(table, "SET GLOBAL sql_mode = DEFAULT")


def test_the_merchants_own_sql_mode_stays(mysql_url: URL, tmp_path: Path) -> None:
    run(mysql_url, "SET GLOBAL sql_mode = 'ANSI_QUOTES,PIPES_AS_CONCAT,NO_BACKSLASH_ESCAPES'")
    try:
        query = """SELECT 'a' || '\\'b' AS "description" """
        assert descriptions(mysql_url, tmp_path, query) == ["a'b"]
    finally:
        run(mysql_url, "SET GLOBAL sql_mode = DEFAULT")


def test_every_wait_has_an_end(mysql_url: URL, tmp_path: Path) -> None:
    names = ("innodb_lock_wait_timeout", "lock_wait_timeout", "max_statement_time")
    found = [descriptions(mysql_url, tmp_path, f"SELECT @@{name} AS description")[0] for name in names]
    assert [float(value) for value in found] == [10, 10, 300]
