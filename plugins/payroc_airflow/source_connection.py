"""
How the source is connected to: as the hook of its connection's type connects, with no extra lost on the way.

A hook's SQLAlchemy engine is made of a URL, which drops extras without a word, those about TLS among them. So
the engines here take their connections from what the hook itself uses, and an extra that would not reach the
driver is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from airflow.sdk.exceptions import AirflowException
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.pool import NullPool

from include.refunds.ledger_url import source_parameters
from include.refunds.postgres_parameters import UnusableParameter, checked, refusal, shown
from include.refunds.quiet import QUIET
from include.refunds.source import SourceError

if TYPE_CHECKING:
    from airflow.sdk import Connection

_CONNECT_SECONDS = 10

# A connection is opened for one use: a pool's would belong to the thread that opened it, and nobody would
# close it.
_OPTIONS: dict[str, Any] = {"poolclass": NullPool, **QUIET}

# Extras that the Postgres hook takes itself, for a login by a token of AWS or Azure.
_POSTGRES_LOGIN = (
    "iam",
    "aws_conn_id",
    "redshift",
    "redshift-serverless",
    "cluster-identifier",
    "workgroup-name",
    "azure_conn_id",
)
# Extras about how a hook gives rows to who calls it, and which driver its URL names: neither is used here.
_WITHOUT_MEANING = ("cursor", "sqlalchemy_scheme")
_MYSQLCLIENT = ("client", "charset", "ssl", "ssl_mode", "unix_socket", "iam", "aws_conn_id")
_MYSQL_SSL = ("ca", "capath", "cert", "cipher", "key")
_MYSQL_SSL_MODES = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
_MYSQL_CHARSETS = ("utf8", "utf8mb3", "utf8mb4")
_SQLITE = ("mode", "cache", "immutable", "nolock", "psow", "vfs", "modeof")

# https://dev.mysql.com/doc/mysql-errors/8.4/en/client-error-reference.html
_MYSQL_TLS = 2026

# What drivers raise for an argument that they don't know or can't use, and hooks for an extra or a package
# that is missing.
_UNUSABLE = (TypeError, ValueError, LookupError, AttributeError, ImportError, RuntimeError, AirflowException)


def source_engine(connection: Connection) -> Engine:
    """
    Return the engine of a source.

    :param connection: an Airflow connection of any type that has a SQL hook. For ``postgres``, ``mysql`` and
        ``sqlite`` every extra reaches the driver or is refused; for another type the hook's own engine is
        taken.
    :raises SourceError: when the connection can't be used; the message names the extra.
    """
    place = f"Airflow connection {connection.conn_id!r}"
    try:
        extras = _extras(connection)
        match connection.conn_type:
            case "postgres":
                url, connect = _postgres(connection, extras)
            case "mysql":
                url, connect = _mysql(connection, extras)
            case "sqlite":
                url, connect = _sqlite(connection, extras)
            case _:
                return _of_hook(connection, extras, place)
    except UnusableParameter as error:
        raise SourceError(f"{place}: {error}.") from None
    except _UNUSABLE as error:
        raise SourceError(
            f"{place} has no SQL hook ({type(error).__name__}): give it the type of a SQL database whose "
            "provider is installed."
        ) from None
    return create_engine(url, creator=lambda: _connected(connect, place, extras), **_OPTIONS)


_Connect = tuple[str, Callable[[], Any]]


def _postgres(connection: Connection, extras: dict[str, Any]) -> _Connect:
    login = {name: value for name, value in extras.items() if name in _POSTGRES_LOGIN}
    others = {name: value for name, value in extras.items() if name not in _POSTGRES_LOGIN}
    parameters = checked(others, source_parameters(), system_authorities=True)
    given = {"connect_timeout": _CONNECT_SECONDS, **parameters, "client_encoding": "UTF8", **login}
    return "postgresql+psycopg://", _hook_with(connection, given).get_conn


def _mysql(connection: Connection, extras: dict[str, Any]) -> _Connect:
    if extras.get("charset", "utf8mb4") not in _MYSQL_CHARSETS:
        raise UnusableParameter("`charset` is not utf8mb4, which reads every character: remove it")
    match extras.get("client", "mysqlclient"):
        case "mysqlclient":
            _check_mysqlclient(extras)
            hook = _hook_with(connection, extras)
            return "mysql+mysqldb://", lambda: _mysqlclient(
                hook._get_conn_config_mysql_client(hook.connection)
            )
        case "mysql-connector-python":
            others = {name: value for name, value in extras.items() if not name.startswith("ssl_")}
            _refuse_unknown(others, ("client", "charset"))
            hook = _hook_with(connection, extras)
            return "mysql+mysqlconnector://", lambda: _connector(
                hook._get_conn_config_mysql_connector_python(hook.connection)
            )
    raise UnusableParameter("`client` is neither mysqlclient nor mysql-connector-python: give one of them")


def _check_mysqlclient(extras: Mapping[str, Any]) -> None:
    _refuse_unknown(extras, _MYSQLCLIENT)
    if extras.get("ssl_mode", "REQUIRED") not in _MYSQL_SSL_MODES:
        raise UnusableParameter(f"`ssl_mode` is none of {', '.join(_MYSQL_SSL_MODES)}: give one of them")
    if "ssl" in extras:
        _refuse_unknown(_object("ssl", extras["ssl"]), _MYSQL_SSL, "in `ssl` ")


def _mysqlclient(arguments: Mapping[str, Any]) -> Any:
    import MySQLdb
    from MySQLdb.constants.CLIENT import FOUND_ROWS

    # The hook gives no flags. Without this one an update that changes nothing touches nothing, and its row
    # would be called missing.
    return MySQLdb.connect(**arguments, client_flag=FOUND_ROWS, connect_timeout=_CONNECT_SECONDS)


def _connector(arguments: Mapping[str, Any]) -> Any:
    import mysql.connector
    from mysql.connector.constants import ClientFlag

    return mysql.connector.connect(
        **arguments, client_flags=[ClientFlag.FOUND_ROWS], connection_timeout=_CONNECT_SECONDS
    )


def _sqlite(connection: Connection, extras: dict[str, Any]) -> _Connect:
    _refuse_unknown(extras, _SQLITE)
    if wrong := [name for name, value in extras.items() if not isinstance(value, str)]:
        raise UnusableParameter(f"`{wrong[0]}` is no text: give it in quotes")
    return "sqlite://", _hook_of(connection).get_conn


def _of_hook(connection: Connection, extras: dict[str, Any], place: str) -> Engine:
    engine: Engine = _hook_of(connection).get_sqlalchemy_engine(engine_kwargs=_OPTIONS)

    def connect(dialect: Any, _record: Any, positional: list[Any], named: dict[str, Any]) -> Any:
        return _connected(lambda: dialect.connect(*positional, **named), place, extras)

    event.listen(engine, "do_connect", connect)
    return engine


def _connected(connect: Callable[[], Any], place: str, extras: Mapping[str, Any]) -> Any:
    """
    Return a new connection of the driver.

    :raises SourceError: when a setting is to blame. What may pass by itself is left to who uses the
        connection.
    """
    try:
        return connect()
    except _UNUSABLE as error:
        raise SourceError(
            f"{place} {_named(error, extras)} ({type(error).__name__}): check its extras."
        ) from None
    except Exception as error:
        if sentence := _refusal(error):
            raise SourceError(f"{place}: {sentence}.") from None
        raise


def _refusal(error: Exception) -> str | None:
    """Return the setting that is to blame, and what to do; ``None`` when none is."""
    family = type(error).__module__.partition(".")[0]
    if family == "psycopg":
        return refusal(error)
    if _MYSQL_TLS in error.args or (family == "mysql" and "CERTIFICATE_VERIFY_FAILED" in str(error)):
        return "the server's certificate or encryption is not accepted: check the extras about `ssl`"
    return None


def _named(error: Exception, extras: Mapping[str, Any]) -> str:
    words = str(error)
    blamed = next((name for name in extras if name in words), None)
    return (
        f"has the extra {shown(blamed)}, which its driver refuses" if blamed else "is refused by its driver"
    )


def _hook_of(conn: Connection, **params: Any) -> Any:
    return conn.get_hook(hook_params=params)  # type: ignore[no-untyped-call]  # Airflow does not type it


def _hook_with(connection: Connection, extras: Mapping[str, Any]) -> Any:
    """Return the hook of a connection with these extras in place of its own."""
    changed = attrs.evolve(connection, extra=json.dumps(dict(extras)))
    return _hook_of(connection, connection=changed)


def _extras(connection: Connection) -> dict[str, Any]:
    """Return the extras without the empty ones of Airflow's form and those without a meaning here."""
    extras = _object("extra", connection.extra or "{}")
    return {
        name: value
        for name, value in extras.items()
        if value not in (None, "") and name not in _WITHOUT_MEANING
    }


def _object(name: str, value: Any) -> dict[str, Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UnusableParameter(f"`{name}` is no JSON object: give one, such as {{}}")
    return found


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], of: str = "") -> None:
    if unknown := [name for name in given if name not in known]:
        raise UnusableParameter(
            f"{shown(unknown[0])} {of}would not reach the driver: remove it; usable are {', '.join(known)}"
        )
