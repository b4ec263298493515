"""Where the ledger and the source are, read from the environment without Airflow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

# The parameters of libpq that both drivers of the ledger know: asyncpg, and psycopg for its migrations.
_PARAMETERS = (
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "connect_timeout",
    "options",
    "application_name",
    "host",
)


class UrlError(Exception):
    """A database URL is missing or unusable; the message names where it was looked for and what to set."""


def ledger_url(given: str | None = None) -> URL:
    """
    Return the ledger's URL: ``given``, else ``PAYROC_REFUNDS_LEDGER_URL``, else ``AIRFLOW_CONN_REFUNDS_LEDGER``.

    :raises UrlError: when none is set, or it is not a Postgres URL.
    """
    url = _from_environment(given, "LEDGER")
    return as_ledger_url(url)


def source_url(given: str | None = None) -> URL:
    """
    Return the source's URL: ``given``, else ``PAYROC_REFUNDS_SOURCE_URL``, else ``AIRFLOW_CONN_REFUNDS_SOURCE``.

    :raises UrlError: when none is set.
    """
    url = _from_environment(given, "SOURCE")
    if url.get_backend_name() in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    return url


def as_ledger_url(url: URL) -> URL:
    """
    Return the URL of a ledger, as SQLAlchemy takes it for the migrations; :mod:`~include.refunds.ledger.connection` takes it apart.

    :raises UrlError: when it is not Postgres (the ledger's safety rests on its locks and triggers), names no database, or has a parameter
        that is not known or can't be used.
    """
    if url.get_backend_name() not in ("postgres", "postgresql"):
        raise UrlError(
            f"The ledger must be a Postgres database, but its URL says {url.get_backend_name()!r}; use postgresql://…."
        )
    if not url.database:
        raise UrlError(
            "The ledger's URL names no database; add it after the host, as in postgresql://user@host/refunds."
        )
    if unknown := sorted(set(url.query) - set(_PARAMETERS)):
        known = ", ".join(_PARAMETERS)
        raise UrlError(
            f"The ledger's URL has the parameter {unknown[0]!r}, which can't be used here: remove it; known are {known}."
        )
    if not str(url.query.get("connect_timeout", "0")).isdecimal():
        raise UrlError(
            "The ledger's URL has a connect_timeout that is no number of seconds: give one, or 0 to wait without a limit."
        )
    return url.set(drivername="postgresql+psycopg")


def url_of_connection(fields: Mapping[str, Any]) -> URL:
    """
    Return the URL of an Airflow connection given as its fields.

    :param fields: ``conn_type``, ``host``, ``port``, ``login``, ``password``, ``schema`` (the database) and ``extra``
        (a mapping, or JSON text).
    """
    extra = fields.get("extra") or {}
    if isinstance(extra, str):
        extra = json.loads(extra)
    query = {name: str(extra[name]) for name in _PARAMETERS if name in extra}
    return URL.create(
        drivername=str(fields["conn_type"]),
        username=fields.get("login") or None,
        password=fields.get("password") or None,
        host=fields.get("host") or None,
        port=int(fields["port"]) if fields.get("port") else None,
        database=fields.get("schema") or None,
        query=query,
    )


def _from_environment(given: str | None, which: str) -> URL:
    names = (f"PAYROC_REFUNDS_{which}_URL", f"AIRFLOW_CONN_REFUNDS_{which}")
    name, value = next(
        (
            (name, value)
            for name, value in ((f"--{which.lower()}-url", given), *((n, os.environ.get(n)) for n in names))
            if value
        ),
        (None, None),
    )
    if not value:
        raise UrlError(
            f"No {which.lower()} database: give --{which.lower()}-url, or set {names[0]} or {names[1]}."
        )
    try:
        if value.lstrip().startswith("{"):
            return url_of_connection(json.loads(value))
        if name and name.startswith("AIRFLOW_CONN_"):
            return url_of_connection(_fields_of_airflow_uri(value))
        return make_url(value)
    except (ArgumentError, ValueError, KeyError):
        # The value may hold a password, so the parser's own message is not repeated.
        raise UrlError(
            f"{name} is not a database URL such as postgresql://user:password@host:5432/refunds."
        ) from None


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
