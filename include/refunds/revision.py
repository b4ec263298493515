"""Which revision of the ledger's schema this version needs; apart from the migrations, so that a task need not import Alembic."""

REVISION = "1.0001"
"""
The release, a point, and the number of its migration. Versions before 1.0 counted from 0001 to 0013: none of their
ledgers is taken for one of ours, and ids are in order as text.
"""
VERSION_TABLE = "schema_version"
ENCODING = "UTF8"

FSYNC_IS_OFF = (
    "The ledger's server runs with `fsync = off`, so a crash may lose a claim whose payment Payroc has made: "
    "set `fsync = on` in its configuration and restart it."
)


def other_revision(found: str | None) -> str:
    """
    Return the sentence about a ledger that is at another revision than :data:`REVISION`.

    :param found: its revision; ``None`` when it was never migrated.
    """
    if found is None or "1" <= found < REVISION:
        return (
            f"The ledger is at revision {found or 'none'}, this version needs {REVISION}: "
            "run `python -m include.refunds migrate`."
        )
    if found < "1":
        return (
            f"The ledger is at revision {found}, which a version before 1.0 made, and stays as it is: finish its "
            "refunds with that version, and start this one with a new, empty ledger database; for the demo run "
            "`make reset`."
        )
    return (
        f"The ledger is at revision {found}, and this version knows {REVISION} at most: "
        "install the version that migrated it."
    )


def other_encoding(found: str) -> str:
    """Return the sentence about a ledger whose database can't hold every character."""
    return (
        f"The ledger's database is in {found}, which cannot hold every name: create another one with "
        "ENCODING 'UTF8' TEMPLATE template0, and migrate that."
    )
