"""The Airflow connection refunds_source: each extra reaches the driver, or is refused by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import BaseHook
from sqlalchemy import URL, text

from demo.postgres import PostgresServer
from include.refunds.source import COLUMNS, SourceError, SourceUnavailable, SqlSource
from payroc_airflow import source_connection
from payroc_airflow.databases import source_of
from tests.support.certificates import Authority
from tests.support.mariadb import AirflowMySql
from tests.support.tls import TlsPostgres


@pytest.fixture
def connect(source_url: URL, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """
    A function that makes the empty source the connection refunds_source, with changed fields and with extras.
    """

    def connect(fields: dict[str, Any] | None = None, **extra: Any) -> None:
        connection = {
            "conn_type": "postgres",
            "host": source_url.host,
            "port": source_url.port,
            "login": source_url.username,
            "password": source_url.password,
            "schema": source_url.database,
            "extra": extra,
        }
        monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_SOURCE", json.dumps(connection | (fields or {})))

    return connect


def refusal() -> str:
    """Return why the source can't be read, which no retry would change."""
    with pytest.raises(SourceError) as caught:
        asyncio.run(source_of().select_approved())
    sentence = str(caught.value)
    assert not isinstance(caught.value, SourceUnavailable), sentence
    assert "\n" not in sentence
    return sentence


def driver_of_source() -> Any:
    """Return what the source's driver connects to, as it says itself."""
    with source_of()._engine.connect() as connection:
        return connection.connection.driver_connection.info.get_parameters()


# -- Postgres ----------------------------------------------------------------------------------------------


def test_a_source_with_the_certificate_that_is_demanded_is_read(
    connect: Callable[..., None], tls_postgres: TlsPostgres
) -> None:
    server = {"host": "localhost", "port": tls_postgres.port}
    connect(server, sslmode="verify-full", sslrootcert=tls_postgres.authority.file)
    assert asyncio.run(source_of().select_approved()) == []


def test_a_source_with_another_certificate_is_refused(
    connect: Callable[..., None], tls_postgres: TlsPostgres
) -> None:
    server = {"host": "localhost", "port": tls_postgres.port}
    connect(server, sslmode="verify-full", sslrootcert=tls_postgres.other.file)
    assert refusal() == (
        "Airflow connection 'refunds_source': the server's certificate is not signed by the authority in "
        "`sslrootcert`: give the right one."
    )


def test_a_source_with_a_certificate_for_another_host_is_refused(
    connect: Callable[..., None], tls_postgres: TlsPostgres
) -> None:
    server = {"host": "127.0.0.1", "port": tls_postgres.port}
    connect(server, sslmode="verify-full", sslrootcert=tls_postgres.authority.file)
    assert "the server's certificate is for another host name" in refusal()


def test_a_source_without_tls_is_refused_when_tls_is_demanded(connect: Callable[..., None]) -> None:
    connect(sslmode="require")
    assert "the server has no TLS, which `sslmode` demands" in refusal()


@pytest.mark.parametrize("extra", [{"sslmode": "verify-full"}, {"sslmode": "verify-ca", "sslrootcert": ""}])
def test_a_certificate_can_not_be_demanded_without_an_authority(
    connect: Callable[..., None],
    tls_postgres: TlsPostgres,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    extra: dict[str, str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    connect({"host": "localhost", "port": tls_postgres.port}, **extra)
    assert "give its file as `sslrootcert`" in refusal()


def test_a_client_certificate_reaches_the_server(
    connect: Callable[..., None], tls_postgres: TlsPostgres
) -> None:
    certificate, key = tls_postgres.authority.sign("shop-client", password="of the key")
    foreign, foreign_key = tls_postgres.other.sign("foreign-client")
    server = {"host": "localhost", "port": tls_postgres.port}
    connect(server, sslmode="require", sslcert=str(certificate), sslkey=str(key), sslpassword="of the key")
    assert asyncio.run(source_of().select_approved()) == []
    connect(server, sslmode="require", sslcert=str(foreign), sslkey=str(foreign_key))
    with pytest.raises(SourceError):
        asyncio.run(source_of().select_approved())


def test_every_extra_of_libpq_reaches_the_driver(connect: Callable[..., None], tmp_path: Path) -> None:
    extra = {
        "application_name": "refunds of the shop",
        "options": "-c search_path=pg_catalog -c work_mem=7MB",
        "connect_timeout": "3",
        "target_session_attrs": "read-write",
        "keepalives": "1",
        "keepalives_idle": "30",
        "keepalives_interval": "5",
        "keepalives_count": "3",
        "sslmode": "allow",
    }
    connect(
        **(
            extra
            | {"keepalives": 1, "connect_timeout": 3, "cursor": "dictcursor", "sslcert": "", "sslkey": None}
        )
    )
    assert {name: driver_of_source().get(name) for name in extra} == extra
    with source_of()._engine.connect() as connection:
        shown = [
            connection.execute(text(f"SHOW {name}")).scalar_one() for name in ("search_path", "work_mem")
        ]
    assert shown == ["pg_catalog", "7MB"]


def test_several_hosts_are_tried_in_their_order(connect: Callable[..., None], source_url: URL) -> None:
    connect({"host": "127.0.0.1,127.0.0.1", "port": None}, port=f"1,{source_url.port}")
    assert asyncio.run(source_of().select_approved()) == []


UNUSABLE = {
    "a misspelled extra": ({"ssl_mode": "verify-full"}, "`ssl_mode` can't be used here: remove it"),
    "an argument of psycopg": ({"prepare_threshold": 0}, "`prepare_threshold` can't be used here"),
    "the character set": ({"client_encoding": "LATIN1"}, "`client_encoding` can't be used here"),
    "a mode that is none": ({"sslmode": "full"}, "`sslmode` is none of disable, allow,"),
    "an attribute that is none": (
        {"target_session_attrs": "master"},
        "`target_session_attrs` is none of any,",
    ),
    "a number that is none": (
        {"keepalives_idle": "soon"},
        "`keepalives_idle` is no whole number: give seconds",
    ),
    "a list": ({"options": ["-c", "a=b"]}, "`options` is neither text nor a whole number"),
    "a bool": ({"keepalives": True}, "`keepalives` is neither text nor a whole number"),
    "a control character": ({"application_name": "a\nb"}, "`application_name` has a control character"),
    "an authority that is no file": (
        {"sslrootcert": "/no/such/ca.pem"},
        "`sslrootcert` names no file of certificates",
    ),
    "a key that is no file": (
        {"sslcert": "/no/client.pem", "sslkey": "/no/key"},
        "`sslcert` and `sslkey` name no",
    ),
    "a password file that is none": (
        {"passfile": "/no/such/pgpass"},
        "`passfile` names no file that can be read",
    ),
    "a setting the server has not": (
        {"options": "-c no_such=1"},
        "`options` has a setting that the server refuses",
    ),
    "parameters in one": (
        {"sqlalchemy_query": {"sslmode": "require"}},
        "`sqlalchemy_query` can't be used here",
    ),
}


@pytest.mark.parametrize(("extra", "sentence"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_extra_is_named_with_the_connection(
    connect: Callable[..., None], extra: dict[str, Any], sentence: str
) -> None:
    connect(**extra)
    assert refusal().startswith(f"Airflow connection 'refunds_source': {sentence}")


@pytest.mark.parametrize("extra", ["{broken", "[1]", '"text"', "7"])
def test_extras_that_are_no_object_are_refused(connect: Callable[..., None], extra: str) -> None:
    connect({"extra": extra})
    assert (
        refusal() == "Airflow connection 'refunds_source': `extra` is no JSON object: give one, such as {}."
    )


def test_a_server_that_does_not_answer_is_tried_again_later(connect: Callable[..., None]) -> None:
    connect({"port": 1})
    with pytest.raises(SourceUnavailable):
        asyncio.run(source_of().select_approved())


def test_a_server_that_only_reads_is_tried_again_later(
    connect: Callable[..., None], postgres: PostgresServer, source_url: URL
) -> None:
    connect(target_session_attrs="read-write")
    with postgres.connect() as connection:
        connection.execute(f"ALTER DATABASE {source_url.database} SET default_transaction_read_only = on")
    try:
        with pytest.raises(SourceUnavailable):
            asyncio.run(source_of().select_approved())
    finally:
        with postgres.connect() as connection:
            connection.execute(f"ALTER DATABASE {source_url.database} RESET default_transaction_read_only")
    assert asyncio.run(source_of().select_approved()) == []


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_database_in_sql_ascii_works_as_far_as_it_holds_utf_8(
    connect: Callable[..., None], postgres: PostgresServer, encoding: str
) -> None:
    with postgres.connect() as connection:
        connection.execute("DROP DATABASE IF EXISTS old_shop WITH (FORCE)")
        connection.execute(
            "CREATE DATABASE old_shop TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C'"
        )
    with postgres.connect("old_shop") as connection:
        columns = ", ".join(f"{name} text" for name in (*COLUMNS, "withdrawn_at", "status"))
        connection.execute(f"CREATE TABLE refund_requests ({columns})")
        connection.execute(
            "INSERT INTO refund_requests (source_ref, approved_at, name_on_account) "
            f"VALUES ('RF-1', '-', convert_from('\\x{'Größe'.encode(encoding).hex()}', 'SQL_ASCII'))"
        )
    connect({"schema": "old_shop"})
    if encoding == "utf-8":
        (row,) = asyncio.run(source_of().select_approved())
        assert row["name_on_account"] == "Größe"
    else:
        assert refusal().startswith("select_approved.sql failed on the connection refunds_source:")


# -- SQLite ------------------------------------------------------------------------------------------------


def test_the_extras_of_sqlite_reach_it(connect: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "shop.db"
    fields = {
        "conn_type": "sqlite",
        "host": str(file),
        "port": None,
        "login": None,
        "password": None,
        "schema": None,
    }
    connect(fields)
    with source_of()._engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (a)")
    connect(fields, mode="ro")
    with source_of()._engine.connect() as connection, pytest.raises(Exception, match="readonly"):
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"modus": "ro"}, "`modus` would not reach the driver: remove it; usable are mode, cache,"),
        ({"timeout": "5"}, "`timeout` would not reach the driver"),
        ({"immutable": 1}, "`immutable` is no text: give it in quotes"),
    ],
)
def test_another_extra_of_sqlite_is_refused(
    connect: Callable[..., None], tmp_path: Path, extra: dict[str, Any], sentence: str
) -> None:
    fields = {
        "conn_type": "sqlite",
        "host": str(tmp_path / "shop.db"),
        "port": None,
        "login": None,
        "password": None,
    }
    connect(fields | {"schema": None}, **extra)
    assert refusal().startswith(f"Airflow connection 'refunds_source': {sentence}")


# -- MySQL -------------------------------------------------------------------------------------------------


def encrypted() -> str:
    with source_of()._engine.connect() as connection:
        return str(connection.exec_driver_sql("SHOW STATUS LIKE 'Ssl_cipher'").one()[1])


# The client of MariaDB reaches `localhost` by a socket; by TCP it is 127.0.0.1, for which the certificate is
# not.
def tls(client: str, ca: str, *, host: bool) -> dict[str, Any]:
    if client == "mysqlclient":
        return {"ssl": {"ca": ca}, "ssl_mode": "VERIFY_IDENTITY" if host else "REQUIRED"}
    return {"client": client, "ssl_ca": ca, "ssl_verify_cert": True, "ssl_verify_identity": host}


CLIENTS = ["mysqlclient", "mysql-connector-python"]


@pytest.mark.parametrize("client", CLIENTS)
def test_mysql_with_the_certificate_that_is_demanded_is_encrypted(
    mysql_source: AirflowMySql, authority: Authority, client: str
) -> None:
    mysql_source(**tls(client, authority.file, host=False))
    assert encrypted() != ""


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("wrong", ["authority", "host"])
def test_mysql_with_another_certificate_is_refused(
    mysql_source: AirflowMySql, authority: Authority, other_authority: Authority, client: str, wrong: str
) -> None:
    ca = (authority if wrong == "host" else other_authority).file
    mysql_source(**tls(client, ca, host=wrong == "host"))
    assert refusal() == (
        "Airflow connection 'refunds_source': the server's certificate or encryption is not accepted: "
        "check the extras about `ssl`."
    )


@pytest.mark.parametrize("client", CLIENTS)
def test_each_client_of_mysql_counts_rows_that_an_update_leaves_as_they_are(
    mysql_source: AirflowMySql, client: str
) -> None:
    mysql_source(client=client)
    with source_of()._engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (a int, b text)")
        connection.exec_driver_sql("INSERT INTO t VALUES (1, 'Größe 😀'), (2, 'x')")
    with source_of()._engine.begin() as connection:
        update = text("UPDATE t SET a = a WHERE b = :b")
        assert connection.execute(update, {"b": "Größe 😀"}).rowcount == 1


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (
            {"ssl_ca": "/ca.pem"},
            "`ssl_ca` would not reach the driver: remove it; usable are client, charset, ssl,",
        ),
        (
            {"ssl": {"ca": "/ca.pem", "check_hostname": True}},
            "`check_hostname` in `ssl` would not reach the driver",
        ),
        ({"ssl": "{broken"}, "`ssl` is no JSON object"),
        ({"ssl_mode": "verify-full"}, "`ssl_mode` is none of DISABLED, PREFERRED,"),
        ({"charset": "latin1"}, "`charset` is not utf8mb4"),
        ({"client": "pymysql"}, "`client` is neither mysqlclient nor mysql-connector-python"),
        ({"connect_timeout": 5}, "`connect_timeout` would not reach the driver"),
        ({"client": "mysql-connector-python", "compress": True}, "`compress` would not reach the driver"),
    ],
)
def test_another_extra_of_mysql_is_refused(
    mysql_source: AirflowMySql, extra: dict[str, Any], sentence: str
) -> None:
    mysql_source(**extra)
    assert refusal().startswith(f"Airflow connection 'refunds_source': {sentence}")


def test_an_extra_that_the_driver_of_mysql_refuses_is_named(mysql_source: AirflowMySql) -> None:
    mysql_source(client="mysql-connector-python", ssl_no_such=1)
    assert refusal().startswith(
        "Airflow connection 'refunds_source' has the extra `ssl_no_such`, which its driver refuses"
    )


# -- other types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conn_type", ["http", "no_such_type"])
def test_a_connection_without_a_database_is_refused(connect: Callable[..., None], conn_type: str) -> None:
    connect({"conn_type": conn_type})
    assert "Airflow connection 'refunds_source' has no SQL hook" in refusal()


def test_the_engine_of_another_hook_refuses_what_its_driver_does_not_know(
    connect: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"conn_type": "sqlite", "host": str(tmp_path / "shop.db"), "port": None, "login": None}
    connect(fields | {"password": None, "schema": None})
    connection = BaseHook.get_connection("refunds_source")
    engine = source_connection._of_hook(connection, {"warehouse": "w"}, "Airflow connection 'refunds_source'")
    with engine.connect() as opened:
        assert opened.exec_driver_sql("SELECT 1").scalar_one() == 1

    def connect_with_no_such(*positional: Any, **named: Any) -> Any:
        raise TypeError("connect() got an unexpected keyword argument 'warehouse'")

    monkeypatch.setattr(engine.dialect, "connect", connect_with_no_such)
    with pytest.raises(SourceError) as caught:
        asyncio.run(SqlSource(engine).select_approved())
    assert str(caught.value) == (
        "Airflow connection 'refunds_source' has the extra `warehouse`, which its driver refuses (TypeError): "
        "check its extras."
    )
