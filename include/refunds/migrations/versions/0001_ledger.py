"""
The ledger of release 1.0: exactly ``ledger/schema.sql``.

The first migration after release 1.0 keeps that release's text beside this module and executes it here. From then on
``schema.sql`` is the sum of all migrations, and its test compares the two.
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op

from include.refunds.roles import create_roles

revision = "1.0001"
down_revision = None


def upgrade() -> None:
    connection = op.get_bind()
    create_roles(connection)
    schema = files("include.refunds.ledger").joinpath("schema.sql").read_text(encoding="utf-8")
    # As it is: neither a colon nor a percent sign in it is a parameter.
    connection.exec_driver_sql(schema, execution_options={"no_parameters": True})
