"""The two databases, by their Airflow connections: ``refunds_ledger`` and ``refunds_source``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from include.refunds.ledger_url import NO_URL, UrlError, as_ledger_url, url_of_connection
from include.refunds.postgres_parameters import UnusableParameter
from payroc_airflow.task_context import outside_of_tasks

if TYPE_CHECKING:
    from airflow.sdk import Connection, Context
    from sqlalchemy import URL

    from include.refunds.ledger import Ledger
    from include.refunds.settings import Settings
    from include.refunds.source import SqlSource

LEDGER_CONN_ID = "refunds_ledger"
SOURCE_CONN_ID = "refunds_source"


def ledger_url_of(conn_id: str = LEDGER_CONN_ID) -> URL:
    """
    Return the ledger's URL from an Airflow connection.

    :raises UrlError: when the connection is missing or is not a Postgres one.
    """
    connection = _connection(conn_id, "a Postgres connection to the database that holds the refund ledger")
    fields = {
        name: getattr(connection, name)
        for name in ("conn_type", "host", "port", "login", "password", "schema", "extra")
    }
    place = f"Airflow connection {conn_id!r}"
    try:
        url = url_of_connection(fields)
    except UnusableParameter as error:
        raise UrlError(f"{place}: {error}.") from None
    except NO_URL:
        raise UrlError(f"{place} has fields or extras that are none: the extras are a JSON object.") from None
    return as_ledger_url(url, place)


@asynccontextmanager
async def open_ledger(
    context: Context, settings: Settings, conn_id: str = LEDGER_CONN_ID
) -> AsyncIterator[Ledger]:
    """
    Yield the ledger, once it is known to be reachable and migrated. What is changed is the doing of the DAG
    run.

    :param context: the task's context.
    :param conn_id: Airflow connection of type ``postgres``.
    :raises UrlError: when the connection is missing or is not a Postgres one.
    :raises LedgerError: when the ledger can't be used.
    """
    async with ledger_as(f"{context['ti'].dag_id} {context['run_id']}", settings, conn_id) as ledger:
        yield ledger


@asynccontextmanager
async def ledger_as(actor: str, settings: Settings, conn_id: str = LEDGER_CONN_ID) -> AsyncIterator[Ledger]:
    """
    Yield the ledger as :func:`open_ledger` does, also where there is no task.

    :param actor: whose doing it is what is changed.
    """
    # DAG files import this module, and whoever only parses them opens nothing.
    from include.refunds.ledger import Ledger, LedgerEngine
    from payroc_airflow.refund_metrics import count_outcome

    # A task needs one for each kind of call that refunds share, and one more; the rest of a long list waits
    # for its turn.
    engine = LedgerEngine(ledger_url_of(conn_id), pool_size=5)
    try:
        ledger = Ledger(engine, settings, actor=actor, on_record=count_outcome)
        await ledger.check()
        yield ledger
    finally:
        await engine.dispose()


def source_of(conn_id: str = SOURCE_CONN_ID) -> SqlSource:
    """
    Return the source behind an Airflow connection of any type that has a SQL hook.

    :raises SourceError: when the connection is missing, its type has no SQL hook, or one of its extras can't
        be used.
    """
    from include.refunds.source import SourceError, SqlSource
    from payroc_airflow.source_connection import source_engine

    try:
        connection = _connection(conn_id, "a connection to the database in which refunds are approved")
    except UrlError as error:
        raise SourceError(str(error)) from None
    return SqlSource(source_engine(connection))


def connect_source(conn_id: str) -> SqlSource:
    """
    Return the source behind an Airflow connection: how the commands of ``include/`` reach it, by an entry
    point.

    :raises SourceError: as :func:`source_of` does.
    """
    outside_of_tasks()
    return source_of(conn_id)


def _connection(conn_id: str, what: str) -> Connection:
    try:
        return BaseHook.get_connection(conn_id)
    except (AirflowNotFoundException, ValueError):
        # Airflow's text may quote the URI, and with it a password.
        raise UrlError(
            f"Airflow connection {conn_id!r} is not defined or can't be read; create it: {what}."
        ) from None
