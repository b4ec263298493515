"""Which revision of the ledger's schema this version needs; apart from the migrations, so that a task need not import Alembic."""

REVISION = "0012"
VERSION_TABLE = "schema_version"


def newer(found: str) -> str:
    """Return the sentence about a ledger that a later version has migrated."""
    return f"The ledger is at revision {found}, and this version knows {REVISION} at most: install the version that migrated it."
