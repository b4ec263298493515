"""
The checks of hashes for a tenth, and no entry in an index for what has none.

A check runs for each change of its row, whatever has changed. A pattern that counts to 64 is compiled to so many states anew each time it
is matched; a length and a search for a character that does not belong there say the same.
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"

# All of a table at once: its rows are read once, and nobody else uses it meanwhile.
_HASHES = {"refunds": ("payee_fingerprint", "request_sha256"), "refund_event_chain": ("hash",)}

# Until Payroc has answered a refund has no id of Payroc's, and until then it changes three times.
PAYROC_REFUND_ID = """
ALTER TABLE refund_ledger.refunds DROP CONSTRAINT refunds_payroc_refund_id_key;
CREATE UNIQUE INDEX refunds_payroc_refund_id_key ON refund_ledger.refunds (payroc_refund_id) WHERE payroc_refund_id IS NOT NULL;
"""


def upgrade() -> None:
    for table, columns in _HASHES.items():
        changes = ", ".join(
            f"DROP CONSTRAINT {table}_{column}_check, "
            f"ADD CONSTRAINT {table}_{column}_check CHECK (length({column}) = 64 AND {column} !~ '[^0-9a-f]')"
            for column in columns
        )
        op.execute(f"ALTER TABLE refund_ledger.{table} {changes}")
    op.execute(PAYROC_REFUND_ID)
