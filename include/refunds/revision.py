"""Which revision of the ledger's schema this version needs; apart from the migrations, so that a task need not import Alembic."""

REVISION = "0006"
VERSION_TABLE = "schema_version"
