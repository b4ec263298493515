"""Any extras and any URL: each setting reaches the driver, or is refused by name, without the password."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import psycopg
import pytest
from airflow.sdk import Connection
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import URL
from sqlalchemy.exc import ArgumentError

from include.refunds import ledger_url as urls
from include.refunds.ledger import LedgerEngine
from include.refunds.ledger_url import LEDGER_PARAMETERS, UrlError, as_ledger_url, ledger_url, source_url
from include.refunds.postgres_parameters import UnusableParameter
from include.refunds.source import SourceError
from payroc_airflow import source_connection
from payroc_airflow.source_connection import source_engine
from tests.support.mariadb import why_not

SECRET = "hunter2-Secret"

Phases = Sequence[Phase]
ALL = tuple(Phase)
# That a property goes red is enough; the smallest example of a planted mistake costs seconds.
WITHOUT_SHRINKING = (Phase.generate,)
IGNORED = ("cursor", "sqlalchemy_scheme")

NAMES = st.sampled_from(
    [
        *(set(LEDGER_PARAMETERS) - {"host", "port"}),
        *IGNORED,
        "sslmode",
        "ssl_mode",
        "ssl",
        "ssl_ca",
        "client",
        "charset",
        "client_encoding",
        "iam",
        "prepare_threshold",
        "gssencmode",
        "mode",
        "timeout",
        "sqlalchemy_query",
    ]
) | st.text(max_size=8)
VALUES = (
    st.sampled_from(
        [
            "require",
            "disable",
            "any",
            "10",
            "0",
            "utf8mb4",
            "ro",
            "TLSv1.2",
            "mysql-connector-python",
            "/no/file",
            "",
        ]
    )
    | st.text(max_size=20)
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
    | st.lists(st.text(max_size=3), max_size=2)
)
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "sslmode": st.sampled_from(["disable", "require", "verify-full"]),
        "application_name": TEXTS,
        "options": TEXTS,
        "target_session_attrs": st.sampled_from(["any", "primary"]),
        "connect_timeout": st.integers(0, 100) | st.integers(0, 100).map(str),
        "keepalives_idle": st.integers(1, 100),
        "cursor": st.just("dictcursor"),
        "sslcert": st.just(""),
    },
)
EXTRAS = PLAUSIBLE | st.dictionaries(NAMES, VALUES, max_size=4)


class Reached(OSError):
    """The driver was asked to connect."""


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the driver was asked to connect with, last; no driver connects."""
    asked: dict[str, Any] = {}

    def connect(*positional: Any, **named: Any) -> Any:
        asked.clear()
        asked.update(named)
        if positional:
            asked.update({name: value[-1] for name, value in parse_qs(urlsplit(positional[0]).query).items()})
        raise Reached

    monkeypatch.setattr(psycopg.Connection, "connect", connect)
    monkeypatch.setattr(asyncpg, "connect", connect)
    if why_not() is None:
        import mysql.connector
        import MySQLdb

        monkeypatch.setattr(MySQLdb, "connect", connect)
        monkeypatch.setattr(mysql.connector, "connect", connect)
    return asked


def refused_well(sentence: str, begin: str) -> None:
    assert sentence.startswith(begin)
    assert SECRET not in sentence
    assert "\n" not in sentence


def arrived(extras: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Return whether every extra that says something is among what the driver was asked with."""
    given_values = {
        name: value for name, value in extras.items() if value not in (None, "") and name not in IGNORED
    }
    found = {name: str(value) for name, value in asked.items()}
    return {name: str(value) for name, value in given_values.items()}.items() <= found.items()


def extras_of_the_ledger_arrive_or_are_refused(drivers: dict[str, Any], phases: Phases = ALL) -> None:
    @settings(phases=phases)
    @given(EXTRAS)
    def check(extras: dict[str, Any]) -> None:
        fields = {
            "conn_type": "postgres",
            "host": "db.example",
            "schema": "refunds",
            "password": SECRET,
            "extra": json.dumps(extras),
        }
        try:
            engine = LedgerEngine(as_ledger_url(urls.url_of_connection(fields)), pool_size=0)
            asyncio.run(opened(engine))
        except (UrlError, UnusableParameter) as error:
            refused_well(str(error), "")
            return
        except Reached:
            pass
        # Those about the network are set on the socket, and time is a number.
        timed = {"connect_timeout", *(name for name in extras if name.startswith("keepalives"))}
        assert arrived({name: value for name, value in extras.items() if name not in timed}, drivers)
        if extras.get("connect_timeout"):
            assert (drivers["timeout"] or 0) == float(extras["connect_timeout"])

    check()


async def opened(engine: LedgerEngine) -> None:
    async with engine.connect():
        pass


def extras_of_the_source_arrive_or_are_refused(
    drivers: dict[str, Any], conn_type: str, phases: Phases = ALL
) -> None:
    @settings(phases=phases)
    @given(EXTRAS)
    def check(extras: dict[str, Any]) -> None:
        connection = Connection(
            conn_id="refunds_source",
            conn_type=conn_type,
            host="db.example",
            schema="shop",
            password=SECRET,
            extra=json.dumps(extras),
        )
        try:
            engine = source_engine(connection)
            with engine.connect():
                pass
        except SourceError as error:
            refused_well(str(error), "Airflow connection 'refunds_source'")
            return
        except Reached:
            pass
        # The hook takes `client` and `iam` itself, and sessions set the character set.
        kept = {name: value for name, value in extras.items() if name not in ("client", "charset", "iam")}
        assert arrived(kept, drivers)

    check()


PIECES = st.sampled_from(
    [
        *("postgresql://", "postgres://", "mysql://", "u:", f"{SECRET}@", f"u:{SECRET}@", "h", "h1,h2"),
        *(":5432", ":x", "/refunds", "/", "?", "&", "#", "[::1]", "%", "{", "}", '"', "null", "[" * 50),
        *("sslmode=require", "host=a:1", "host=/tmp", "port=1,2", "foo=1", "__extra__=", "\ud800"),
        *('{"conn_type": "postgres"}', '{"conn_type": "postgres", "schema": "s", "extra": '),
    ]
)
URLS = st.lists(PIECES | st.text(max_size=5), max_size=9).map("".join)


def any_url_is_one_or_refused(monkeypatch: pytest.MonkeyPatch, phases: Phases = ALL) -> None:
    @settings(phases=phases, report_multiple_bugs=False)
    @given(URLS, st.sampled_from(["PAYROC_REFUNDS_{}_URL", "AIRFLOW_CONN_REFUNDS_{}"]), st.booleans())
    def check(text: str, name: str, of_ledger: bool) -> None:
        which = "LEDGER" if of_ledger else "SOURCE"
        with monkeypatch.context() as patch:
            try:
                patch.setenv(name.format(which), text)
            except (ValueError, UnicodeError):
                return
            try:
                url = ledger_url() if of_ledger else source_url()
            except UrlError as error:
                refused_well(str(error), "")
            else:
                assert isinstance(url, URL)
                assert url.drivername == "postgresql+psycopg"

    check()


def test_extras_of_the_ledger_arrive_or_are_refused(drivers: dict[str, Any]) -> None:
    extras_of_the_ledger_arrive_or_are_refused(drivers)


@pytest.mark.parametrize("conn_type", ["postgres", "mysql"])
def test_extras_of_the_source_arrive_or_are_refused(drivers: dict[str, Any], conn_type: str) -> None:
    if conn_type == "mysql" and (reason := why_not()):
        pytest.skip(reason)
    extras_of_the_source_arrive_or_are_refused(drivers, conn_type)


def test_any_url_is_one_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    any_url_is_one_or_refused(monkeypatch)


# -- planted mistakes --------------------------------------------------------------------------------------


def test_the_ledgers_property_finds_a_planted_mistake(
    drivers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "_WITHOUT_MEANING", (*IGNORED, "sslmode"))
    with pytest.raises(AssertionError):
        extras_of_the_ledger_arrive_or_are_refused(drivers, WITHOUT_SHRINKING)


def test_the_sources_property_finds_a_planted_mistake(
    drivers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_connection, "_WITHOUT_MEANING", (*IGNORED, "options"))
    with pytest.raises(AssertionError):
        extras_of_the_source_arrive_or_are_refused(drivers, "postgres", WITHOUT_SHRINKING)


def test_the_urls_property_finds_a_planted_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "NO_URL", (LookupError,))
    with pytest.raises((ArgumentError, ValueError)):
        any_url_is_one_or_refused(monkeypatch, WITHOUT_SHRINKING)
