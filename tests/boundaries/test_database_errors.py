"""Errors of real servers on each driver: transient or permanent, and no word of a row or a trigger."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from airflow.sdk import RetryAction, RetryDecision
from sqlalchemy import URL, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from demo.postgres import PostgresServer, free_port
from include.refunds.database_errors import MYSQL_NUMBERS, SQLITE_CODES, Failure, Kind, describe
from include.refunds.ledger import Ledger, LedgerEngine, LedgerError, LedgerUnavailable
from include.refunds.ledger.connection import DATABASE_ERRORS
from include.refunds.roles import AUDITOR
from payroc_airflow.retry_policy import PayrocRetryPolicy
from tests.conftest import ROOT, Login
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world
from tests.support.mariadb import MariaDbServer

# What no description may repeat: a payee, an account, and the words of a trigger.
WORDS = "O'Brien, account 55667788, is closed"
FORBIDDEN = ("Brien", "55667788", "closed", "UPDATE", "SELECT", "postgresql://", "mysql://")

SCHEMA = f"""
CREATE TABLE shop (ref text PRIMARY KEY, status varchar(8), n integer, CONSTRAINT n_is_small CHECK (n < 10));
CREATE TABLE secret (ref text);
INSERT INTO shop VALUES ('RF-1', NULL, 1), ('RF-2', NULL, 2);
CREATE ROLE clerk LOGIN PASSWORD 'clerk';
GRANT SELECT, INSERT, UPDATE ON shop TO clerk;
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.n = 3 THEN RAISE EXCEPTION '{WORDS.replace("'", "''")}'; END IF;
    IF NEW.n = 4 THEN RAISE EXCEPTION '{WORDS.replace("'", "''")}'
        USING ERRCODE = '42703', COLUMN = 'closed', CONSTRAINT = 'closed', DETAIL = 'account 55667788';
    END IF;
    IF NEW.n = 5 THEN EXECUTE 'SELECT closed FROM shop'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse BEFORE UPDATE ON shop FOR EACH ROW EXECUTE FUNCTION refuse();
"""
UPDATE = "UPDATE shop SET status = 'ok' WHERE ref = 'RF-1'"

# What is run in one session, of which the last statement fails; then kind and words of the description.
POSTGRES: dict[str, tuple[Sequence[str], Kind, str]] = {
    "an unknown column": (
        ["UPDATE shop SET nope = 1 WHERE ref = 'RF-1'"],
        Kind.UNUSABLE,
        "a column does not exist: nope",
    ),
    "an unknown column of a table": (
        ["SELECT s.nope FROM shop AS s"],
        Kind.UNUSABLE,
        "a column does not exist: nope",
    ),
    "an unknown table": (["UPDATE nope SET n = 1"], Kind.UNUSABLE, "a table does not exist: nope"),
    "a missing right": (
        ["UPDATE secret SET ref = ''"],
        Kind.UNUSABLE,
        "the login lacks a right: secret",
    ),
    "a mistake in the statement": (
        ["UPDAT shop"],
        Kind.UNUSABLE,
        "the statement is not valid",
    ),
    "a trigger": (
        ["UPDATE shop SET n = 3 WHERE ref = 'RF-1'"],
        Kind.REFUSED,
        "a trigger or function refuses the row",
    ),
    "a trigger that names a column": (
        ["UPDATE shop SET n = 4 WHERE ref = 'RF-1'"],
        Kind.UNUSABLE,
        "a column does not exist",
    ),
    "a mistake in a trigger": (
        ["UPDATE shop SET n = 5 WHERE ref = 'RF-1'"],
        Kind.UNUSABLE,
        "a column does not exist",
    ),
    "a CHECK": (
        ["UPDATE shop SET n = 55667788 WHERE ref = 'RF-1'"],
        Kind.REFUSED,
        "a constraint refuses the row: n_is_small",
    ),
    "a unique key": (
        ["INSERT INTO shop (ref) VALUES ('RF-1')"],
        Kind.REFUSED,
        "refuses the row: shop_pkey",
    ),
    "a column too short": (
        [f"UPDATE shop SET status = '{WORDS.replace(chr(39), '')}' WHERE ref = 'RF-1'"],
        Kind.REFUSED,
        "too long",
    ),
    "another type": (
        ["SELECT CAST('55667788 O''Brien' AS integer)"],
        Kind.REFUSED,
        "a value does not fit",
    ),
    "a server that only reads": (
        ["SET default_transaction_read_only = on", UPDATE],
        Kind.UNAVAILABLE,
        "the server only reads for now, as after a failover",
    ),
    "a lock": (
        ["SET lock_timeout = '10ms'", UPDATE.replace("-1", "-2")],
        Kind.LOCKED,
        "another session holds a lock",
    ),
    "a statement that takes too long": (
        ["SET statement_timeout = '10ms'", "SELECT pg_sleep(60)"],
        Kind.LOCKED,
        "the statement took too long and was cancelled",
    ),
    "an end of the session": (
        ["SELECT pg_terminate_backend(pg_backend_pid())"],
        Kind.UNAVAILABLE,
        "",
    ),
}


def of_psycopg(url: URL, statements: Sequence[str]) -> Failure:
    """Return what the last statement fails with through SQLAlchemy, as source and migrations are used."""

    def work() -> None:
        engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    with pytest.raises(DBAPIError) as caught:
        work()
    return describe(caught.value)


def of_psycopg2(url: URL, statements: Sequence[str]) -> Failure:
    """Return what the last statement fails with through the driver that an older deployment's source has."""
    return of_psycopg(url.set(drivername="postgresql+psycopg2"), statements)


def of_asyncpg(url: URL, statements: Sequence[str]) -> Failure:
    """Return what the last statement fails with as the ledger is used."""

    async def work() -> None:
        async with LedgerEngine(url, pool_size=0).connect() as connection:
            for statement in statements:
                await connection.execute(statement)

    with pytest.raises(DATABASE_ERRORS) as caught:
        asyncio.run(work())
    return describe(caught.value)


Driver = Callable[[URL, Sequence[str]], Failure]
DRIVERS: dict[str, Driver] = {"psycopg": of_psycopg, "psycopg2": of_psycopg2, "asyncpg": of_asyncpg}
each_driver = pytest.mark.parametrize("driver", DRIVERS.values(), ids=DRIVERS)


@pytest.fixture(scope="module")
def shop(postgres: PostgresServer) -> Iterator[URL]:
    """A database with a table of which one row is locked."""
    postgres.create_database("shop")
    with postgres.connect("shop") as connection:
        connection.execute(SCHEMA)
        with connection.transaction():
            connection.execute("SELECT FROM shop WHERE ref = 'RF-2' FOR UPDATE")
            yield postgres.url("shop").set(username="clerk", password="clerk")


def says_nothing_of_the_merchants(failure: Failure) -> bool:
    return not any(word in f"{failure} {failure.remedy}" for word in FORBIDDEN)


@each_driver
@pytest.mark.parametrize("case", POSTGRES)
def test_an_error_of_postgres_means_the_same_on_each_driver(driver: Driver, case: str, shop: URL) -> None:
    statements, kind, words = POSTGRES[case]
    failure = driver(shop, statements)
    assert failure.kind is kind
    assert words in failure.meaning
    assert says_nothing_of_the_merchants(failure)


@each_driver
def test_no_server_no_database_and_no_login_are_transient(driver: Driver, shop: URL) -> None:
    for url, words in (
        (shop.set(port=free_port()), "reach|answer"),
        (shop.set(database="nope"), "answer|does not exist"),
        (shop.set(password="wrong 55667788"), "answer|refuses the login"),
    ):
        failure = driver(url, ["SELECT 1"])
        assert failure.kind is Kind.UNAVAILABLE
        assert any(word in str(failure) for word in words.split("|"))
        assert says_nothing_of_the_merchants(failure)


@each_driver
def test_too_many_connections_are_transient(driver: Driver, postgres: PostgresServer, shop: URL) -> None:
    with postgres.connect() as connection:
        connection.execute("ALTER ROLE clerk CONNECTION LIMIT 0")
        try:
            assert driver(shop, ["SELECT 1"]).kind is Kind.UNAVAILABLE
        finally:
            connection.execute("ALTER ROLE clerk CONNECTION LIMIT -1")


@contextmanager
def two_sessions(url: URL) -> Iterator[tuple[psycopg.Connection, psycopg.Connection]]:
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with closing(psycopg.connect(dsn)) as first, closing(psycopg.connect(dsn)) as second:
        yield first, second


def test_a_deadlock_is_transient(postgres: PostgresServer) -> None:
    errors = []

    def take(connection: psycopg.Connection, key: int) -> None:
        try:
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [key])
        except psycopg.Error as error:
            errors.append(error)
            connection.rollback()

    with two_sessions(postgres.url("postgres")) as (first, second):
        for connection, key in ((first, 1), (second, 2)):
            connection.execute("SET deadlock_timeout = '10ms'")
            take(connection, key)
        other = threading.Thread(target=take, args=(second, 1))
        other.start()
        take(first, 2)
        other.join()
    assert [describe(error).kind for error in errors] == [Kind.LOCKED]
    assert "a deadlock with another session" in str(describe(errors[0]))


def test_a_serialization_failure_is_transient(shop: URL) -> None:
    with two_sessions(shop) as (first, second):
        first.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        first.execute("SELECT FROM shop")
        second.execute(UPDATE)
        second.commit()
        with pytest.raises(psycopg.Error) as caught:
            first.execute(UPDATE)
    assert describe(caught.value).kind is Kind.LOCKED


def test_a_ledger_that_only_reads_for_now_is_tried_again_and_names_its_connection(
    world: World, postgres: PostgresServer
) -> None:
    change = f"ALTER DATABASE {world.ledger_engine.url.database} SET default_transaction_read_only"
    with postgres.connect() as connection:
        connection.execute(f"{change} = on")
        try:
            with pytest.raises(
                LedgerUnavailable, match=r"only reads for now.* connection is refunds_ledger"
            ) as caught:
                world.run(world.ledger.pauses.pause("*", "the bank called"))
        finally:
            connection.execute(f"{change} TO DEFAULT")
    assert PayrocRetryPolicy().evaluate(caught.value, 1, 5) == RetryDecision.default()
    world.run(world.ledger.pauses.pause("*", "the bank called"))


def test_a_login_of_the_ledger_that_lacks_a_right_fails_at_once_and_names_the_table(
    world: World, login: Login
) -> None:
    ledger = Ledger(
        LedgerEngine(login(world.ledger_engine.url, AUDITOR), pool_size=0), world.settings, actor="test"
    )
    with pytest.raises(LedgerError, match="the login lacks a right: pauses") as caught:
        world.run(ledger.pauses.pause("*", "the bank called"))
    assert PayrocRetryPolicy().evaluate(caught.value, 1, 5).action is RetryAction.FAIL


# -- MariaDB ------------------------------------------------------------------------------------------------

MYSQL_SCHEMA = [
    "CREATE TABLE shop (ref varchar(32) PRIMARY KEY, status enum('ok', 'bad'), name varchar(8), n integer, "
    "CONSTRAINT n_is_small CHECK (n < 10)) ENGINE = InnoDB",
    "CREATE TABLE secret (ref varchar(32))",
    "INSERT INTO shop VALUES ('RF-1', NULL, NULL, 1), ('RF-2', NULL, NULL, 2)",
    "CREATE TRIGGER refuse BEFORE UPDATE ON shop FOR EACH ROW BEGIN IF NEW.n = 3 THEN "
    f'SIGNAL SQLSTATE "45000" SET MESSAGE_TEXT = "{WORDS}"; END IF; END',
]
MYSQL: dict[str, tuple[Sequence[str], Kind, str]] = {
    "an unknown column": (
        ["UPDATE shop SET nope = 1 WHERE ref = 'RF-1'"],
        Kind.UNUSABLE,
        "not exist: nope (OperationalError, error 1054",
    ),
    "an unknown table": (
        ["UPDATE nope SET n = 1"],
        Kind.UNUSABLE,
        "not exist: nope (ProgrammingError, error 1146",
    ),
    "a missing right": (
        ["UPDATE secret SET ref = ''"],
        Kind.UNUSABLE,
        "a right: secret (OperationalError, error 1142",
    ),
    "a mistake in the statement": (["UPDAT shop"], Kind.UNUSABLE, "not valid (ProgrammingError, error 1064"),
    "a trigger": (
        ["UPDATE shop SET n = 3 WHERE ref = 'RF-1'"],
        Kind.REFUSED,
        "a trigger refuses the row (OperationalError, error 1644",
    ),
    "a CHECK": (
        ["UPDATE shop SET n = 55667788 WHERE ref = 'RF-1'"],
        Kind.REFUSED,
        "the row: n_is_small (OperationalError, error 4025",
    ),
    "a primary key": (
        ["INSERT INTO shop (ref) VALUES ('RF-1')"],
        Kind.REFUSED,
        "a constraint refuses the row (Integrity",
    ),
    "a column too short": (
        ["UPDATE shop SET name = '55667788 closed' WHERE ref = 'RF-1'"],
        Kind.REFUSED,
        "column: name (DataError",
    ),
    "an enum": (
        ["UPDATE shop SET status = 'closed' WHERE ref = 'RF-1'"],
        Kind.REFUSED,
        "a value does not fit: status (DataError",
    ),
    "a server that only reads": (
        ["SET SESSION TRANSACTION READ ONLY", UPDATE],
        Kind.UNAVAILABLE,
        "only reads for now",
    ),
    "a lock": (
        ["SET innodb_lock_wait_timeout = 1", "UPDATE shop SET n = 4 WHERE ref = 'RF-2'"],
        Kind.LOCKED,
        "another session holds a lock (OperationalError, error 1205",
    ),
    "a statement that takes too long": (
        ["SET max_statement_time = 0.01", "SELECT sleep(60) FROM shop"],
        Kind.LOCKED,
        "the statement took too long",
    ),
    "an end of the session": (["KILL CONNECTION_ID()"], Kind.UNAVAILABLE, "the connection failed"),
}


@pytest.fixture(scope="module")
def mysql_shop(mariadb: MariaDbServer) -> Iterator[URL]:
    """A database with a table of which one row is locked, for a login with few rights."""
    url = mariadb.new_database()
    with mariadb.connect(str(url.database)) as connection:
        for statement in MYSQL_SCHEMA:
            connection.query(statement)
        connection.query("CREATE USER clerk@'%' IDENTIFIED BY 'clerk'")
        connection.query(f"GRANT SELECT, INSERT, UPDATE ON {url.database}.shop TO clerk@'%'")
        connection.query(f"GRANT SELECT ON {url.database}.secret TO clerk@'%'")
        # Without a right on a table that may come to be, the server does not say that there is none.
        connection.query(f"GRANT CREATE, UPDATE ON {url.database}.nope TO clerk@'%'")
        connection.autocommit(False)
        connection.query("UPDATE shop SET n = 5 WHERE ref = 'RF-2'")
        yield url.set(username="clerk", password="clerk")
        connection.rollback()


@pytest.mark.parametrize("case", MYSQL)
def test_an_error_of_mariadb_is_told_by_its_number(case: str, mysql_shop: URL) -> None:
    statements, kind, words = MYSQL[case]
    failure = of_psycopg(mysql_shop, statements)
    assert failure.kind is kind
    assert words in str(failure)
    assert says_nothing_of_the_merchants(failure)


def test_a_mariadb_that_is_down_or_refuses_the_login_is_transient(mysql_shop: URL) -> None:
    urls = (
        mysql_shop.set(port=free_port()),
        mysql_shop.set(password="wrong"),
        mysql_shop.set(database="nope"),
    )
    failures = [of_psycopg(url, ["SELECT 1"]) for url in urls]
    assert {failure.kind for failure in failures} == {Kind.UNAVAILABLE}


# -- SQLite -------------------------------------------------------------------------------------------------

SQLITE: dict[str, tuple[str, Kind, str]] = {
    "an unknown column": (
        "UPDATE shop SET nope = 1 WHERE ref = 'RF-1'",
        Kind.UNUSABLE,
        "nope (OperationalError, SQLITE_ERROR)",
    ),
    "an unknown table": ("UPDATE nope SET n = 1", Kind.UNUSABLE, "nope (OperationalError, SQLITE_ERROR)"),
    "a trigger": (
        "UPDATE shop SET n = 3 WHERE ref = 'RF-1'",
        Kind.REFUSED,
        "a trigger refuses the row (IntegrityError, SQLITE_CONS",
    ),
    "a CHECK": (
        "UPDATE shop SET n = 55667788 WHERE ref = 'RF-1'",
        Kind.REFUSED,
        "a constraint refuses the row: n_is_small (Integ",
    ),
    "a CHECK without a name": (
        "UPDATE shop SET m = 55667788 WHERE ref = 'RF-1'",
        Kind.REFUSED,
        "refuses the row (IntegrityError",
    ),
}


@pytest.fixture
def sqlite_shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE shop (ref text, n integer CONSTRAINT n_is_small CHECK (n < 10), "
            "m integer CHECK (m <> 55667788));"
            "INSERT INTO shop VALUES ('RF-1', 1, 1);"
            "CREATE TRIGGER refuse BEFORE UPDATE ON shop WHEN NEW.n = 3 BEGIN "
            f'SELECT RAISE(ABORT, "{WORDS}"); END;'
        )
    return path


def sqlite_url(path: Path, **query: str) -> URL:
    return URL.create("sqlite", database=f"file:{path}", query={"uri": "true", "timeout": "0", **query})


@pytest.mark.parametrize("case", SQLITE)
def test_an_error_of_sqlite_is_told_by_its_code(case: str, sqlite_shop: Path) -> None:
    statement, kind, words = SQLITE[case]
    failure = of_psycopg(sqlite_url(sqlite_shop), [statement])
    assert failure.kind is kind
    assert words in str(failure)
    assert says_nothing_of_the_merchants(failure)


def test_a_database_of_sqlite_that_is_locked_is_transient(sqlite_shop: Path) -> None:
    with closing(sqlite3.connect(sqlite_shop)) as other:
        other.execute("BEGIN EXCLUSIVE")
        failure = of_psycopg(sqlite_url(sqlite_shop), ["UPDATE shop SET n = 2 WHERE ref = 'RF-1'"])
    assert (failure.kind, failure.error) == (Kind.LOCKED, "OperationalError, SQLITE_BUSY")


def test_a_file_of_sqlite_that_can_not_be_used_is_permanent(sqlite_shop: Path, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database " * 100)
    for url, words in (
        (sqlite_url(sqlite_shop, mode="ro"), "may not be written"),
        (sqlite_url(tmp_path / "no" / "shop.db"), "can't be opened"),
        (sqlite_url(tmp_path / "text.db"), "is no database of SQLite"),
    ):
        failure = of_psycopg(url, ["UPDATE shop SET n = 2 WHERE ref = 'RF-1'"])
        assert (failure.kind, words in str(failure)) == (Kind.UNUSABLE, True)
        assert str(os.fspath(tmp_path)) not in str(failure)


# -- any other driver ---------------------------------------------------------------------------------------


class Error(Exception):
    """Of a driver that nobody here knows."""


class DatabaseError(Error): ...


class OperationalError(DatabaseError): ...


class IntegrityError(DatabaseError): ...


class ProgrammingError(DatabaseError): ...


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OperationalError(WORDS), Kind.UNAVAILABLE),
        (IntegrityError(WORDS), Kind.REFUSED),
        (ProgrammingError(WORDS), Kind.UNUSABLE),
        (DatabaseError(WORDS), Kind.REFUSED),
        (DatabaseError("40001", WORDS), Kind.LOCKED),
        (OperationalError("HYT00", WORDS), Kind.LOCKED),
        (ProgrammingError("42S02", WORDS), Kind.UNUSABLE),
        (OperationalError("certificate verify failed"), Kind.UNUSABLE),
        (asyncpg.InternalClientError(WORDS), Kind.UNAVAILABLE),
        (UnicodeEncodeError("latin-1", WORDS, 0, 1, "no"), Kind.REFUSED),
        (TimeoutError(WORDS), Kind.UNAVAILABLE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_an_unknown_driver_is_judged_by_sqlstate_or_the_classes_of_the_db_api(error: Any, kind: Kind) -> None:
    failure = describe(error)
    assert failure.kind is kind
    assert says_nothing_of_the_merchants(failure)


def test_the_docs_list_the_codes_as_they_are_judged() -> None:
    table = re.findall(
        r"^\| (\w+) \| (.*) \| (.*) \| (.*) \|$", (ROOT / "docs" / "boundaries.md").read_text(), re.M
    )
    rows = {row[0]: row[1:] for row in table if row[0] in set(Kind)}
    assert set(rows) == {"unavailable", "locked", "refused", "unusable"}
    for kind, (states, numbers, codes) in rows.items():
        for state in re.findall(r"\b(?:[0-9A-Z]{5}|[0-9A-Z]{2})\b", states):
            assert describe(DatabaseError(state.ljust(5, "9") if len(state) < 5 else state)).kind == kind, (
                state
            )
        for number in re.findall(r"[0-9]+", numbers):
            assert MYSQL_NUMBERS.get(int(number), (Kind.REFUSED, ""))[0] == kind, number
        for code in re.findall(r"[0-9]+", codes):
            assert SQLITE_CODES.get(int(code), (Kind.REFUSED, ""))[0] == kind, code
