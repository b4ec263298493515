"""Alembic's entry: runs the revisions on the connection that :func:`include.refunds.migrations.migrate` opened."""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

from include.refunds.revision import VERSION_TABLE
from include.refunds.roles import MIGRATOR, told_in_one_sentence

connection = context.config.attributes["connection"]
owner = text("SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'refund_ledger'")
with told_in_one_sentence(
    f"This login may not make or change the schema refund_ledger: migrate as one that is granted {MIGRATOR}, or, before there is "
    "this role, as the database's owner with CREATEROLE; docs/security.md shows both."
):
    found = connection.execute(owner).scalar_one_or_none()
    if found is None:
        # The version table lives in the ledger's own schema, so the schema has to be there before the first revision.
        connection.execute(text("CREATE SCHEMA refund_ledger"))
    elif found == MIGRATOR:
        # What a later revision makes belongs to the same owner as the rest, whoever migrates.
        connection.execute(text(f"SET LOCAL ROLE {MIGRATOR}"))
        # One migration at a time. Nobody but the owner has a right by which this lock could be kept from it.
        connection.execute(text(f"LOCK TABLE refund_ledger.{VERSION_TABLE} IN SHARE ROW EXCLUSIVE MODE"))
    context.configure(
        connection=connection, version_table=VERSION_TABLE, version_table_schema="refund_ledger"
    )
    with context.begin_transaction():
        context.run_migrations()
