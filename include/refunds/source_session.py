"""
Settings of each transaction with a source: those that change how values are read, and those that end a wait.

They are set in the transaction and not in the session: behind a transaction pooler the next transaction may
run in another session.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy import Connection, Engine, event

LOCK_SECONDS = 10
"""How long a statement waits for a lock that another session holds."""

STATEMENT_SECONDS = 300
"""How long a statement may take; MySQL bounds only queries."""

_POSTGRES = {
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "TimeZone": "UTC",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    # A backslash in a literal is a backslash: sql_text.py reads the files so.
    "standard_conforming_strings": "on",
    "lock_timeout": f"{LOCK_SECONDS}s",
    "statement_timeout": f"{STATEMENT_SECONDS}s",
}
# The server's other modes stay: the merchant's statements may rely on them. CHAR is not padded, and a text
# that does not fit is refused, not cut. Fractions of a second that a column can't hold are cut, not rounded:
# `updated_at` rounded up would be later than the same value when it is written again.
_MYSQL_MODES_OFF = ("PAD_CHAR_TO_FULL_LENGTH", "NO_BACKSLASH_ESCAPES", "TIME_ROUND_FRACTIONAL")
_MYSQL_MODES_ON = ("STRICT_ALL_TABLES",)


def prepare_transactions(engine: Engine) -> Engine:
    """
    Return the engine with every transaction prepared for a source; its connections are shared with the engine
    that is given.
    """
    prepared = engine.execution_options()
    event.listen(prepared, "begin", _prepare)
    return prepared


def wait_for_locks(connection: Connection, seconds: float) -> None:
    """
    Limit how long a transaction waits for locks of other sessions, in place of :data:`LOCK_SECONDS`.

    :param seconds: MySQL takes whole ones, at least 1. Where nothing is set, the database's own limit holds.
    """
    whole, milliseconds = max(1, int(seconds)), int(seconds * 1000)
    match connection.dialect.name:
        case "postgresql":
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {milliseconds}")
        case "mysql" | "mariadb":
            connection.exec_driver_sql(
                f"SET SESSION innodb_lock_wait_timeout = {whole}, lock_wait_timeout = {whole}"
            )
        case "sqlite":
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {milliseconds}")


def _prepare(connection: Connection) -> None:
    match connection.dialect.name:
        case "postgresql":
            _prepare_postgres(connection)
        case "mysql" | "mariadb":
            _prepare_mysql(connection)
        case "sqlite":
            _prepare_sqlite(connection)


def _prepare_postgres(connection: Connection) -> None:
    import psycopg

    from include.refunds.source_values import load_any_value

    driver = connection.connection.driver_connection
    if isinstance(driver, psycopg.Connection):
        # A transaction pooler gives the next transaction another session, which knows no statement of this
        # one.
        driver.prepare_threshold = None
        load_any_value(driver)
    settings = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in _POSTGRES.items())
    connection.exec_driver_sql(f"SELECT {settings}")


def _prepare_mysql(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "mysqldb":
        from include.refunds.source_values import load_any_mysql_value

        # It tells the driver too, which decodes what it reads.
        driver.set_character_set("utf8mb4")
        load_any_mysql_value(driver)
    else:
        connection.exec_driver_sql("SET NAMES utf8mb4")
    modes = "@@SESSION.sql_mode"
    for mode in _MYSQL_MODES_OFF:
        modes = f"REPLACE({modes}, '{mode}', '')"
    added = [*_MYSQL_MODES_ON]
    if getattr(connection.dialect, "is_mariadb", False):
        longest = f"max_statement_time = {STATEMENT_SECONDS}"
    else:
        added.append("TIME_TRUNCATE_FRACTIONAL")
        longest = f"max_execution_time = {STATEMENT_SECONDS * 1000}"
    connection.exec_driver_sql(
        f"SET SESSION time_zone = '+00:00', sql_mode = CONCAT({modes}, ',{','.join(added)}'), "
        f"innodb_lock_wait_timeout = {LOCK_SECONDS}, lock_wait_timeout = {LOCK_SECONDS}, {longest}"
    )


def _prepare_sqlite(connection: Connection) -> None:
    from include.refunds.source_values import text_or_bytes

    driver = connection.connection.driver_connection
    if isinstance(driver, sqlite3.Connection):
        driver.text_factory = text_or_bytes
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {LOCK_SECONDS * 1000}")
