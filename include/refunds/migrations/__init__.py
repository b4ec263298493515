"""The ledger's schema, as Alembic migrations. The DAGs never migrate: a person or an init job does."""

from __future__ import annotations

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


def migrate(url: URL) -> str:
    """
    Bring the ledger's schema to the newest revision, in one transaction.

    Two migrations at a time wait for one another.

    :param url: URL of the ledger's database, as its owner.
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
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('refund_ledger.migrate'))"))
            found = current_revision(connection)
            config = _config()
            if found is not None and found not in {
                script.revision for script in ScriptDirectory.from_config(config).walk_revisions()
            }:
                raise MigrationRefused(other_revision(found))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            return current_revision(connection) or ""
    except IntegrityError as error:
        rule = getattr(getattr(error.orig, "diag", None), "constraint_name", None)
        raise MigrationRefused(
            f"The ledger holds refunds that break the rule {rule} of this version, so it was left as it is: "
            "end them with the version that made them, and start this one with a new ledger."
        ) from None
    finally:
        engine.dispose()


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
