"""Which revision of the ledger's schema this version needs; apart from the migrations, so that a task need not import Alembic."""

REVISION = "0013"
VERSION_TABLE = "schema_version"
ENCODING = "UTF8"

FSYNC_IS_OFF = (
    "The ledger's server runs with `fsync = off`, so a crash may lose a claim whose payment Payroc has made: "
    "set `fsync = on` in its configuration and restart it."
)


def newer(found: str) -> str:
    """Return the sentence about a ledger that a later version has migrated."""
    return f"The ledger is at revision {found}, and this version knows {REVISION} at most: install the version that migrated it."


def other_encoding(found: str) -> str:
    """Return the sentence about a ledger whose database can't hold every character."""
    return (
        f"The ledger's database is in {found}, which cannot hold every name: create another one with "
        "ENCODING 'UTF8' TEMPLATE template0, and migrate that."
    )
