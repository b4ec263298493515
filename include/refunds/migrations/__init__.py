"""The ledger's schema, as Alembic migrations. The DAGs never migrate: a person or an init job does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.exc import IntegrityError

from include.refunds.revision import (
    ENCODING,
    FSYNC_IS_OFF,
    VERSION_TABLE,
    other_encoding,
    other_revision,
)

_FOLDER = Path(__file__).parent


class MigrationRefused(Exception):
    """The ledger stays as it is; the message says why and what to do."""


# Whose constraint is violated when two migrations make the schema at the same time.
_SCHEMA_NAMES = "pg_namespace_nspname_index"

_LOCK_SECONDS = 60


def migrate(url: URL, *, say: Callable[[str], None] = lambda sentence: None) -> str:
    """
    Bring the ledger's schema to the newest revision, in one transaction, and keep strangers out of its database.

    Two migrations at a time wait for one another.

    :param url: URL of the ledger's database, as its owner.
    :param say: gets a sentence about who may connect to the database, when there is something to do about it.
    :returns: the revision that the ledger is at now.
    :raises MigrationRefused: when a version before 1.0 made it, a later version has migrated it, its database
        is not in UTF8, its server runs with ``fsync = off``, or its refunds break a rule of this version.
    """
    # A server in SQL_ASCII would hand out bytes.
    engine = create_engine(url, connect_args={"client_encoding": "UTF8"})
    try:
        with engine.begin() as connection:
            encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
            if encoding != ENCODING:
                raise MigrationRefused(other_encoding(encoding))
            if connection.execute(text("SHOW fsync")).scalar_one() == "off":
                raise MigrationRefused(FSYNC_IS_OFF)
            connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'"))
            found = current_revision(connection)
            config = _config()
            if found is not None and found not in {
                script.revision for script in ScriptDirectory.from_config(config).walk_revisions()
            }:
                raise MigrationRefused(other_revision(found))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            if sentence := _keep_strangers_out(connection):
                say(sentence)
            return current_revision(connection) or ""
    except IntegrityError as error:
        rule = getattr(getattr(error.orig, "diag", None), "constraint_name", None)
        if rule == _SCHEMA_NAMES:
            # Another migration has just made it.
            return migrate(url, say=say)
        raise MigrationRefused(
            f"The ledger holds refunds that break the rule {rule} of this version, so it was left as it is: "
            "end them with the version that made them, and start this one with a new ledger."
        ) from None
    finally:
        engine.dispose()


def _keep_strangers_out(connection: Connection) -> str | None:
    """
    Let nobody connect to the ledger's database who was not granted it, and nobody make temporary tables there.

    The roles belong to the server: without this, the payer of a test ledger would be one of every ledger beside it. A
    database with tables of others is left as it is, because their logins could not connect any more.

    :returns: a sentence about what was done or is left to do, ``None`` when there is nothing to say.
    """
    query = text("""
        SELECT datname, quote_ident(datname) AS name, pg_has_role(session_user, datdba, 'USAGE') AS is_owner,
               has_database_privilege('public', datname, 'CONNECT, TEMPORARY') AS is_open,
               EXISTS (SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
                       WHERE relkind IN ('r', 'p', 'm', 'f') AND nspname NOT IN ('refund_ledger', 'information_schema')
                         AND nspname NOT LIKE 'pg\\_%') AS is_shared
        FROM pg_database WHERE datname = current_database()""")
    found = connection.execute(query).one()
    if not found.is_open:
        return None
    revoke = f"REVOKE CONNECT, TEMPORARY ON DATABASE {found.name} FROM PUBLIC"
    if found.is_shared or not found.is_owner:
        why = "holds other tables too" if found.is_shared else "belongs to another login"
        return (
            f"Every login of the server may connect to the database {found.datname}, and it {why}, so that stays as "
            f"it is: grant CONNECT to each login that needs it, then let its owner run `{revoke}`."
        )
    # The schema was made as its owner's role.
    connection.execute(text("RESET ROLE"))
    connection.execute(text(revoke))
    return (
        f"Only logins that are granted CONNECT on the database {found.datname} may connect to it from now on: "
        "docs/security.md shows how."
    )


def current_revision(connection: Connection) -> str | None:
    """Return the revision that the ledger is at, or ``None`` when it was never migrated."""
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "version_table_schema": "refund_ledger"}
    )
    return context.get_current_revision()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    return config
