"""Alembic's entry: runs the revisions on the connection that :func:`include.refunds.migrations.migrate` opened."""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

from include.refunds.revision import VERSION_TABLE

connection = context.config.attributes["connection"]
# The version table lives in the ledger's own schema, so the schema has to be there before the first revision.
connection.execute(text("CREATE SCHEMA IF NOT EXISTS refund_ledger"))
context.configure(connection=connection, version_table=VERSION_TABLE, version_table_schema="refund_ledger")
with context.begin_transaction():
    context.run_migrations()
