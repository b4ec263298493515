"""The ledger's schema, as Alembic migrations. The DAGs never migrate: a person or an init job does."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, create_engine, text

from include.refunds.revision import VERSION_TABLE, newer

_FOLDER = Path(__file__).parent


class NewerLedger(Exception):
    """A later version has migrated the ledger; nothing was changed."""


def migrate(url: URL, revision: str = "head") -> str:
    """
    Bring the ledger's schema to the newest revision, in one transaction.

    Two migrations at a time wait for one another.

    :param url: URL of the ledger's database, as its owner.
    :param revision: another revision to stop at, for tests of the next one.
    :returns: the revision that the ledger is at now.
    :raises NewerLedger: when it is at a revision that this version does not know.
    """
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('refund_ledger.migrate'))"))
            found = current_revision(connection)
            config = _config()
            if found is not None and found not in {
                script.revision for script in ScriptDirectory.from_config(config).walk_revisions()
            }:
                raise NewerLedger(newer(found))
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
            return current_revision(connection) or ""
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
