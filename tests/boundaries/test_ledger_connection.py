"""The ledger's connection: each parameter reaches both of its drivers, or is refused by name."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL

from demo.postgres import PostgresServer
from include.refunds.ledger import Ledger, LedgerEngine, LedgerUnavailable
from include.refunds.ledger_url import UrlError, as_ledger_url, ledger_url, source_url
from include.refunds.migrations import migrate
from include.refunds.settings import get_settings
from payroc_airflow.databases import ledger_url_of
from tests.conftest import SCRATCH
from tests.refunds.test_cli import cli
from tests.support.pgbouncer import pooled
from tests.support.tls import TlsPostgres

Connect = Callable[..., None]


@pytest.fixture
def connect(ledger_url: URL, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """
    A function that makes the empty ledger the connection refunds_ledger, with changed fields and with extras.
    """

    def connect(fields: dict[str, Any] | None = None, **extra: Any) -> None:
        connection = {
            "conn_type": "postgres",
            "host": ledger_url.host,
            "port": ledger_url.port,
            "login": ledger_url.username,
            "password": ledger_url.password,
            "schema": ledger_url.database,
            "extra": extra,
        }
        monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", json.dumps(connection | (fields or {})))

    return connect


async def asked(engine: LedgerEngine, statement: str) -> Any:
    try:
        async with engine.connect() as connection:
            return (await connection.execute(statement)).scalar_one()
    finally:
        await engine.dispose()


def answer(statement: str = "SELECT 1", url: URL | None = None) -> Any:
    """Return what the ledger of the Airflow connection says over asyncpg."""
    return asyncio.run(asked(LedgerEngine(url or ledger_url_of(), pool_size=0), statement))


def refusal() -> str:
    with pytest.raises(UrlError) as caught:
        answer()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_ledger_with_the_certificate_that_is_demanded_is_used_by_both_drivers(
    connect: Connect, tls_postgres: TlsPostgres
) -> None:
    server = {"host": "localhost", "port": tls_postgres.port}
    connect(server, sslmode="verify-full", sslrootcert=tls_postgres.authority.file)
    assert answer() == 1
    assert migrate(ledger_url_of())


@pytest.mark.parametrize(
    ("host", "right_authority", "sentence"),
    [
        ("localhost", False, "the server's certificate is not signed by the authority in `sslrootcert`"),
        ("127.0.0.1", True, "the server's certificate is for another host name"),
    ],
)
def test_a_ledger_with_another_certificate_is_refused_by_both_drivers(
    connect: Connect, tls_postgres: TlsPostgres, host: str, right_authority: bool, sentence: str
) -> None:
    authority = tls_postgres.authority if right_authority else tls_postgres.other
    connect({"host": host, "port": tls_postgres.port}, sslmode="verify-full", sslrootcert=authority.file)
    assert refusal().startswith(f"The ledger's connection: {sentence}")
    value = os.environ["AIRFLOW_CONN_REFUNDS_LEDGER"]
    for command in ("migrate", "status"):
        done = cli(command, AIRFLOW_CONN_REFUNDS_LEDGER=value)
        assert (done.returncode, sentence in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_a_ledger_without_tls_is_refused_when_tls_is_demanded(connect: Connect) -> None:
    connect(sslmode="require")
    assert "the server has no TLS, which `sslmode` demands" in refusal()


def test_a_certificate_can_not_be_demanded_without_an_authority(
    connect: Connect, tls_postgres: TlsPostgres, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    connect({"host": "localhost", "port": tls_postgres.port}, sslmode="verify-full")
    assert "give its file as `sslrootcert`" in refusal()


def test_a_client_certificate_with_a_password_reaches_the_server(
    connect: Connect, tls_postgres: TlsPostgres
) -> None:
    certificate, key = tls_postgres.authority.sign("ledger-client", password="of the key")
    connect(
        {"host": "localhost", "port": tls_postgres.port},
        sslmode="require",
        sslcert=str(certificate),
        sslkey=str(key),
        sslpassword="of the key",
    )
    assert answer() == 1
    assert migrate(ledger_url_of())


def test_the_parameters_of_a_session_reach_both_drivers(connect: Connect) -> None:
    connect(
        application_name="refunds of the shop",
        options="-c work_mem=7MB",
        connect_timeout=3,
        target_session_attrs="read-write",
        cursor="dictcursor",
        sslcert="",
        sslrootcert=None,
    )
    settings = "SELECT current_setting('application_name') || ', ' || current_setting('work_mem')"
    assert answer(settings) == "refunds of the shop, 7MB"
    url = ledger_url_of()
    assert dict(url.query) == {
        "application_name": "refunds of the shop",
        "options": "-c work_mem=7MB",
        "connect_timeout": "3",
        "target_session_attrs": "read-write",
    }


def test_a_file_of_passwords_is_used(connect: Connect, ledger_url: URL, tmp_path: Path) -> None:
    file = tmp_path / "pgpass"
    file.write_text(f"{ledger_url.host}:{ledger_url.port}:*:{ledger_url.username}:{ledger_url.password}\n")
    file.chmod(0o600)
    connect({"password": None}, passfile=str(file))
    assert answer() == 1
    assert migrate(ledger_url_of())


def test_keepalives_reach_the_socket(connect: Connect) -> None:
    connect(keepalives_idle="31", keepalives_interval="7", keepalives_count="4")

    async def options() -> list[int]:
        engine = LedgerEngine(ledger_url_of(), pool_size=0)
        async with engine.connect() as connection:
            ours = connection._driver._transport.get_extra_info("socket")
            return [
                ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
            ]

    assert asyncio.run(options()) == [1, 31, 7, 4]


def test_keepalives_are_set_on_the_loop_that_tasks_run_on(connect: Connect, ledger_url: URL) -> None:
    import uvloop

    connect(keepalives_idle="31")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(asked(LedgerEngine(ledger_url_of(), pool_size=0), "SELECT 1")) == 1


# -- several hosts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "port"),
    [
        ({"host": "127.0.0.1,127.0.0.1", "port": None}, "1,{port}"),
        ({"host": "127.0.0.1:1,127.0.0.1:{port}", "port": None}, ""),
        ({"host": "/no/such/folder,127.0.0.1"}, ""),
    ],
)
def test_hosts_are_tried_in_their_order_by_both_drivers(
    connect: Connect, ledger_url: URL, fields: dict[str, Any], port: str
) -> None:
    fields = fields | {"host": fields["host"].format(port=ledger_url.port)}
    connect(fields, port=port.format(port=ledger_url.port))
    assert answer() == 1
    assert migrate(ledger_url_of())


def test_a_ledger_that_can_not_be_reached_is_named_with_all_its_hosts(connect: Connect) -> None:
    connect({"host": "127.0.0.1,localhost", "port": None}, port="1,2")
    ledger = Ledger(LedgerEngine(ledger_url_of(), pool_size=0), get_settings(), actor="test")
    with pytest.raises(LedgerUnavailable, match=r"at 127\.0\.0\.1:1, localhost:2 can't be used"):
        asyncio.run(ledger.check())


def test_a_host_that_says_nothing_leaves_time_for_the_next(connect: Connect, ledger_url: URL) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connect(
            {"host": "127.0.0.1,127.0.0.1", "port": None},
            port=f"{silent.getsockname()[1]},{ledger_url.port}",
            connect_timeout=1,
        )
        assert answer() == 1


def test_a_host_of_another_kind_is_left_for_the_next(connect: Connect, ledger_url: URL) -> None:
    connect(target_session_attrs="standby")
    with pytest.raises(Exception, match="target attribute"):
        answer()
    connect(target_session_attrs="prefer-standby")
    assert answer() == 1


def test_a_ledger_that_only_reads_is_tried_again_later(
    connect: Connect, postgres: PostgresServer, ledger_url: URL
) -> None:
    connect(target_session_attrs="read-write")
    with postgres.connect() as connection:
        connection.execute(f"ALTER DATABASE {ledger_url.database} SET default_transaction_read_only = on")
    try:
        ledger = Ledger(LedgerEngine(ledger_url_of(), pool_size=0), get_settings(), actor="test")
        with pytest.raises(LedgerUnavailable):
            asyncio.run(ledger.check())
    finally:
        with postgres.connect() as connection:
            connection.execute(f"ALTER DATABASE {ledger_url.database} RESET default_transaction_read_only")
    asyncio.run(ledger.check())


def test_a_pooler_of_sessions_may_be_in_front_of_the_ledger(
    connect: Connect, postgres: PostgresServer
) -> None:
    if not shutil.which("pgbouncer"):
        pytest.skip("pgbouncer is not installed: `apt-get install pgbouncer`")
    with pooled(postgres, SCRATCH / "session-pooler", "session") as port:
        connect({"port": port})
        ledger = Ledger(LedgerEngine(ledger_url_of(), pool_size=0), get_settings(), actor="test")
        for _ in range(3):
            asyncio.run(ledger.check())
            asyncio.run(ledger.now())


# -- refused -----------------------------------------------------------------------------------------------

UNUSABLE = {
    "an unknown one": (
        {"no_such": "1"},
        "`no_such` can't be used here: remove it; usable are application_name,",
    ),
    "one that asyncpg has not": ({"channel_binding": "require"}, "`channel_binding` can't be used here"),
    "a login by a token": ({"iam": True}, "`iam` is neither text nor a whole number"),
    "another service": ({"service": "ledger"}, "`service` can't be used here"),
    "a mode that is none": ({"sslmode": "full"}, "`sslmode` is none of disable, allow,"),
    "an attribute that is none": (
        {"target_session_attrs": "master"},
        "`target_session_attrs` is none of any,",
    ),
    "a time that is none": ({"connect_timeout": "soon"}, "`connect_timeout` is no whole number"),
    "the authorities of the system": (
        {"sslrootcert": "system"},
        "`sslrootcert` names no file of certificates",
    ),
    "an authority that is no file": (
        {"sslrootcert": "/no/such/ca.pem"},
        "`sslrootcert` names no file of certificates",
    ),
    "a password file that is none": (
        {"passfile": "/no/such/pgpass"},
        "`passfile` names no file that can be read",
    ),
    "too many ports": ({"port": "1,2,3"}, "`port` has not as many ports as there are hosts"),
    "a port that is none": ({"port": "99999"}, "`port` is no number from 1 to 65535"),
}


@pytest.mark.parametrize(("extra", "sentence"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_extra_is_named_with_the_connection(
    connect: Connect, extra: dict[str, Any], sentence: str
) -> None:
    connect(**extra)
    assert refusal().startswith(f"Airflow connection 'refunds_ledger': {sentence}")
    with pytest.raises(UrlError) as caught:
        ledger_url_from_environment()
    assert str(caught.value).startswith(f"AIRFLOW_CONN_REFUNDS_LEDGER: {sentence}")


ledger_url_from_environment = ledger_url


def test_a_setting_that_the_server_has_not_is_refused(connect: Connect) -> None:
    connect(options="-c no_such=1")
    assert refusal().startswith("The ledger's connection: `options` has a setting that the server refuses")


@pytest.mark.parametrize("extra", ["{broken", "[1]", "7"])
def test_extras_that_are_no_object_are_refused(connect: Connect, extra: str) -> None:
    connect({"extra": extra})
    assert refusal() == (
        "Airflow connection 'refunds_ledger' has fields or extras that are none: "
        "the extras are a JSON object."
    )


def test_a_parameter_that_is_given_twice_is_refused() -> None:
    url = URL.create("postgresql", host="h", database="d", query={"sslmode": ("disable", "require")})
    with pytest.raises(UrlError, match="`sslmode` is given more than once: give it once"):
        as_ledger_url(url)


# -- the source of the commands ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (
            "postgresql://h/shop?ssl_mode=require",
            "`ssl_mode` can't be used here: remove it; usable are those of libpq.",
        ),
        ("postgresql://h/shop?sslmode=full", "`sslmode` is none of disable"),
        ("postgresql://h/shop?sslrootcert=/no/such/ca.pem", "`sslrootcert` names no file of certificates"),
        ("sqlite:///shop.db", "names no Postgres database, which this command needs"),
    ],
)
def test_the_commands_refuse_an_unusable_url_of_the_source(url: str, sentence: str) -> None:
    with pytest.raises(UrlError) as caught:
        source_url(url)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("--source-url")


def test_the_commands_demand_the_certificate_of_the_source(
    connect: Connect, tls_postgres: TlsPostgres, ledger_url: URL, source_url: URL
) -> None:
    demanded = {"sslmode": "verify-full", "sslrootcert": tls_postgres.other.file}
    source = source_url.set(host="localhost", port=tls_postgres.port).update_query_dict(demanded)
    done = cli("migrate", "--demo-source", ledger=ledger_url, source=source)
    assert done.returncode == 2
    assert "not signed by the authority in `sslrootcert`" in done.stderr
