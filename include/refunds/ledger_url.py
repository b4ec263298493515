"""Where the ledger and the source are, read from the environment without Airflow."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from include.refunds.postgres_parameters import UnusableParameter, checked, shown, text_of

LEDGER_PARAMETERS = (
    "application_name",
    "connect_timeout",
    "host",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "options",
    "passfile",
    "port",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcert",
    "sslcrl",
    "sslkey",
    "sslmode",
    "sslpassword",
    "sslrootcert",
    "target_session_attrs",
)
"""
The parameters of libpq that both drivers of the ledger can use: asyncpg, and psycopg for its migrations.
"""

# Extras of Airflow's Postgres hook about how that hook reads rows, and which driver SQLAlchemy takes. The
# ledger has drivers of its own.
_WITHOUT_MEANING = ("cursor", "sqlalchemy_scheme")

NO_URL = (ArgumentError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What the parsers of URLs and connections raise; their messages may quote a password."""

_POSTGRES = ("postgres", "postgresql")


class UrlError(Exception):
    """A database URL is missing or unusable; the message names where it was looked for and what to set."""


def ledger_url(given: str | None = None) -> URL:
    """
    Return the ledger's URL: ``given``, else ``PAYROC_REFUNDS_LEDGER_URL``, else
    ``AIRFLOW_CONN_REFUNDS_LEDGER``.

    :raises UrlError: when none is set, or it is unusable, as :func:`as_ledger_url` says.
    """
    place, url = _from_environment(given, "LEDGER")
    return as_ledger_url(url, place)


def source_url(given: str | None = None) -> URL:
    """
    Return the source's URL: ``given``, else ``PAYROC_REFUNDS_SOURCE_URL``, else
    ``AIRFLOW_CONN_REFUNDS_SOURCE``.

    :raises UrlError: when none is set, or it is no Postgres database (the commands work with a table in
        Postgres only), or has a parameter that libpq does not know or can't use.
    """
    place, url = _from_environment(given, "SOURCE")
    if url.get_backend_name() not in _POSTGRES:
        raise UrlError(f"{place} names no Postgres database, which this command needs: use postgresql://….")
    return _checked(url, place, source_parameters(), system_authorities=True)


def as_ledger_url(url: URL, place: str = "The ledger's URL") -> URL:
    """
    Return the URL of a ledger, as SQLAlchemy takes it for the migrations;
    :mod:`~include.refunds.ledger.connection` takes it apart.

    :param place: where it comes from, for messages.
    :raises UrlError: when it is not Postgres (the ledger's safety rests on its locks and triggers), names no
        database, or has a parameter that is not known or can't be used.
    """
    if url.get_backend_name() not in _POSTGRES:
        raise UrlError(f"{place} names no Postgres database, which the ledger must be: use postgresql://….")
    if not url.database:
        raise UrlError(
            f"{place} names no database: add it after the host, as in postgresql://user@host/refunds."
        )
    return _checked(url, place, LEDGER_PARAMETERS, system_authorities=False)


def addresses(url: URL) -> list[tuple[str | None, int | None]]:
    """
    Return the hosts of a URL with their ports, in the order in which they are tried; ``None`` for the
    driver's default.

    A host that begins with a slash is the folder of a socket.

    :raises UnusableParameter: when ports and hosts do not fit together, or a port is none.
    """
    hosts = _listed(url.query.get("host") or url.host) or [""]
    ports = _listed(url.query.get("port") or (str(url.port) if url.port else None))
    if len(ports) not in (0, 1, len(hosts)):
        raise UnusableParameter(
            "`port` has not as many ports as there are hosts: give one for all, or one for each"
        )
    if ports:
        pairs = list(zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=True))
    else:
        pairs = [_host_and_port(host) for host in hosts]
    if any(port and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65_536) for _, port in pairs):
        raise UnusableParameter("`port` is no number from 1 to 65535: give one")
    return [(host or None, int(port) if port else None) for host, port in pairs]


def source_parameters() -> list[str]:
    """Return the parameters that libpq knows, except the character set, which sessions with the source set."""
    from psycopg import pq

    names = [option.keyword.decode() for option in pq.Conninfo.get_defaults()]
    return [
        name for name in names if name not in ("client_encoding", "replication", "user", "password", "dbname")
    ]


def url_of_connection(fields: Mapping[str, Any]) -> URL:
    """
    Return the URL of an Airflow connection given as its fields, its extras as parameters.

    :param fields: ``conn_type``, ``host``, ``port``, ``login``, ``password``, ``schema`` (the database) and
        ``extra`` (a mapping, or JSON text).
    :raises UnusableParameter: when an extra is neither text nor a number.
    :raises ValueError: and other errors of Python, when they are no connection.
    """
    extra = fields.get("extra") or {}
    if isinstance(extra, str):
        extra = json.loads(extra)
    if not isinstance(extra, Mapping):
        raise ValueError("the extras are no mapping")
    query = {
        name: text_of(name, value)
        for name, value in extra.items()
        if name not in _WITHOUT_MEANING and value not in (None, "")
    }
    return URL.create(
        drivername=str(fields["conn_type"]),
        username=fields.get("login") or None,
        password=fields.get("password") or None,
        host=fields.get("host") or None,
        port=int(fields["port"]) if fields.get("port") else None,
        database=fields.get("schema") or None,
        query=query,
    )


def _checked(url: URL, place: str, known: Collection[str], *, system_authorities: bool) -> URL:
    """
    Return a URL of Postgres whose parameters can be used, with several hosts in the one form that both
    drivers take.
    """
    try:
        hosts = addresses(url)
        query = {name: value for name, value in url.query.items() if name not in ("host", "port")}
        if twice := [name for name, value in query.items() if not isinstance(value, str)]:
            raise UnusableParameter(f"{shown(twice[0])} is given more than once: give it once")
        parameters = checked(query, known, system_authorities=system_authorities)
    except UnusableParameter as error:
        raise UrlError(f"{place}: {error}.") from None
    url = url.set(drivername="postgresql+psycopg", query=parameters)
    if len(hosts) == 1:
        return url._replace(host=hosts[0][0], port=hosts[0][1])
    several = {
        "host": ",".join(host or "" for host, _ in hosts),
        "port": ",".join(str(port or "") for _, port in hosts),
    }
    return url._replace(host=None, port=None).update_query_dict(several)


def _host_and_port(host: str) -> tuple[str, str]:
    # More than one colon make an IPv6 address.
    name, colon, port = host.partition(":")
    return (name, port) if colon and ":" not in port else (host, "")


def _listed(names: str | tuple[str, ...] | None) -> list[str]:
    together = ",".join(names) if isinstance(names, tuple) else names
    return together.split(",") if together else []


def _from_environment(given: str | None, which: str) -> tuple[str, URL]:
    """Return where a URL was found, and the URL."""
    names = (f"PAYROC_REFUNDS_{which}_URL", f"AIRFLOW_CONN_REFUNDS_{which}")
    values = {f"--{which.lower()}-url": given} | {name: os.environ.get(name) for name in names}
    for name, value in values.items():
        if not value:
            continue
        try:
            if value.lstrip().startswith("{"):
                return name, url_of_connection(json.loads(value))
            if name.startswith("AIRFLOW_CONN_"):
                return name, url_of_connection(_fields_of_airflow_uri(value))
            return name, make_url(value)
        except UnusableParameter as error:
            raise UrlError(f"{name}: {error}.") from None
        except NO_URL:
            raise UrlError(
                f"{name} is not a database URL such as postgresql://user:password@host:5432/refunds."
            ) from None
    raise UrlError(
        f"No {which.lower()} database: give --{which.lower()}-url, or set {names[0]} or {names[1]}."
    )


def _fields_of_airflow_uri(uri: str) -> dict[str, Any]:
    parts = urlsplit(uri)
    if not parts.scheme:
        raise ValueError("no scheme")
    extra: dict[str, Any] = dict(parse_qsl(parts.query))
    if "__extra__" in extra:
        extra = json.loads(extra["__extra__"])
    return {
        "conn_type": parts.scheme,
        "login": unquote(parts.username or ""),
        "password": unquote(parts.password or ""),
        "host": unquote(parts.hostname or ""),
        "port": parts.port,
        "schema": unquote(parts.path.removeprefix("/")),
        "extra": extra,
    }
