"""The ledger's schema, as Alembic migrations. The DAGs never migrate: a person or an init job does."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import URL, Connection, create_engine, text

from include.refunds.revision import VERSION_TABLE

_FOLDER = Path(__file__).parent


def migrate(url: URL, revision: str = "head") -> str:
    """
    Bring the ledger's schema to the newest revision, in one transaction.

    Two migrations at a time wait for one another.

    :param url: URL of the ledger's database, as its owner.
    :param revision: another revision to stop at, for tests of the next one.
    :returns: the revision that the ledger is at now.
    """
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('refund_ledger.migrate'))"))
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
            return current_revision(connection) or ""
    finally:
        engine.dispose()


def current_revision(connection: Connection) -> str | None:
    """Return the revision that the ledger is at, or ``None`` when it was never migrated."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "version_table_schema": "refund_ledger"})
    return context.get_current_revision()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    return config
