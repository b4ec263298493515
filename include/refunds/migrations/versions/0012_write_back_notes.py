"""Notes on single rows of the source: why one could not be written, and when one was offered again."""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"

# Rights on columns alone: a right on the whole table would allow a lock of it.
NOTES = """
CREATE TABLE refund_ledger.write_back_notes (
    source           text        NOT NULL,
    source_ref       text        NOT NULL,
    problem          text        CHECK (length(problem) BETWEEN 1 AND 500),
    problem_since    timestamptz,
    offered_again_at timestamptz,
    PRIMARY KEY (source, source_ref),
    CONSTRAINT problem_says_since_when CHECK ((problem IS NULL) = (problem_since IS NULL))
);
COMMENT ON TABLE refund_ledger.write_back_notes IS
    'Rows of the source whose write-back needs or needed attention; all others have no note';
COMMENT ON COLUMN refund_ledger.write_back_notes.problem IS
    'Why it could not be written, without a value of the row; NULL once it is';
COMMENT ON COLUMN refund_ledger.write_back_notes.problem_since IS 'Since when it could not be written';
COMMENT ON COLUMN refund_ledger.write_back_notes.offered_again_at IS
    'When the source offered the row again after its refund had ended, and it was made due again';
CREATE INDEX unwritten_rows ON refund_ledger.write_back_notes (source, source_ref) WHERE problem IS NOT NULL;

REVOKE ALL ON refund_ledger.write_back_notes FROM PUBLIC;
GRANT SELECT ON refund_ledger.write_back_notes TO refunds_payer, refunds_operator, refunds_auditor;
GRANT INSERT (source, source_ref, problem, problem_since, offered_again_at),
    UPDATE (problem, problem_since, offered_again_at)
    ON refund_ledger.write_back_notes TO refunds_payer;
ALTER TABLE refund_ledger.write_back_notes OWNER TO refunds_migrator;
"""


def upgrade() -> None:
    op.execute(NOTES)
