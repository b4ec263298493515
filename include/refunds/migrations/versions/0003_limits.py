"""Limits: caps and holds at the door, the approval of a run by a person, and which key encrypted a request."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"

# Amounts are in minor units and hold for each currency by itself; counts hold for all currencies together. NULL lets pass.
CONTROL = """
ALTER TABLE refund_ledger.refund_control
    ADD COLUMN largest_refund    bigint  CHECK (largest_refund > 0),
    ADD COLUMN run_total         bigint  CHECK (run_total > 0),
    ADD COLUMN run_count         bigint  CHECK (run_count > 0),
    ADD COLUMN day_total         bigint  CHECK (day_total > 0),
    ADD COLUMN day_count         bigint  CHECK (day_count > 0),
    ADD COLUMN payee_total       bigint  CHECK (payee_total > 0),
    ADD COLUMN payee_count       bigint  CHECK (payee_count > 0),
    ADD COLUMN payee_days        bigint  CHECK (payee_days BETWEEN 1 AND 366),
    ADD COLUMN duplicate_days    bigint  CHECK (duplicate_days BETWEEN 1 AND 366),
    ADD COLUMN approval_total    bigint  CHECK (approval_total >= 0),
    ADD COLUMN approval_count    bigint  CHECK (approval_count >= 0),
    ADD COLUMN fingerprint_check text,
    DROP CONSTRAINT bonds_belong_to_everything,
    ADD CONSTRAINT only_pauses_belong_to_a_terminal CHECK (scope = '*' OR num_nonnulls(
        environment, source, fingerprint_check, largest_refund, run_total, run_count, day_total, day_count, payee_total, payee_count,
        payee_days, duplicate_days, approval_total, approval_count) = 0),
    ADD CONSTRAINT a_payees_cap_has_its_days CHECK (num_nonnulls(payee_total, payee_count) = 0 OR payee_days IS NOT NULL);

ALTER TABLE refund_ledger.refund_runs
    ADD COLUMN approval_basis jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN candidate_ids  bigint[] NOT NULL DEFAULT '{}',
    ADD COLUMN asked_hash     text,
    ADD COLUMN question       text,
    ADD COLUMN rejected_by    text,
    ADD COLUMN rejected_at    timestamptz,
    ADD COLUMN counted        jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN counted_before jsonb NOT NULL DEFAULT '{}';

ALTER TABLE refund_ledger.refund_events
    DROP CONSTRAINT refund_events_event_check,
    ADD CONSTRAINT refund_events_event_check CHECK (event IN (
        'status', 'contradiction', 'pause', 'resume', 'environment', 'source', 'fingerprint_check', 'proposal', 'reverse',
        'limit', 'approval', 'rejection', 'rotation'));
"""

# A refund counts against the caps once, when it passes the door for the first time; the database notes that moment itself.
REFUNDS = """
ALTER TABLE refund_ledger.refunds
    ADD COLUMN first_released_at  timestamptz,
    ADD COLUMN first_released_run text,
    ADD COLUMN first_released_approver text,
    ADD COLUMN holds              text[] NOT NULL DEFAULT '{}',
    ADD COLUMN released_holds     text[] NOT NULL DEFAULT '{}',
    ADD COLUMN run_rejected_by    text,
    ADD COLUMN request_key        text;
UPDATE refund_ledger.refunds SET first_released_at = released_at, first_released_run = released_run WHERE released_at IS NOT NULL;
UPDATE refund_ledger.refunds SET holds = '{by hand}' WHERE status = 'held';
ALTER TABLE refund_ledger.refunds
    ADD CONSTRAINT held_says_for_what CHECK (status <> 'held' OR holds <> '{}');

CREATE FUNCTION refund_ledger.note_first_release() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.first_released_at IS NOT NULL THEN
        NEW.first_released_at := OLD.first_released_at;
        NEW.first_released_run := OLD.first_released_run;
        NEW.first_released_approver := OLD.first_released_approver;
    ELSIF NEW.status = 'released' THEN
        NEW.first_released_at := NEW.released_at;
        NEW.first_released_run := NEW.released_run;
    ELSE
        NEW.first_released_at := NULL;
        NEW.first_released_run := NULL;
        NEW.first_released_approver := NULL;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER note_first_release BEFORE UPDATE ON refund_ledger.refunds
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.note_first_release();

CREATE INDEX refunds_to_empty ON refund_ledger.refunds (updated_at)
    WHERE request IS NOT NULL AND status IN ('settled', 'returned', 'reversed', 'rejected', 'cancelled');
"""

# A held refund that Payroc shows as paid goes to review in one step: to let a held refund pass is for people alone. The rest of the guard
# stays as the first revision has it.
GRAPH = """
DO $$
DECLARE
    guard text := pg_get_functiondef('refund_ledger.guard_refund()'::regprocedure);
    before CONSTANT text := $part$'held'      THEN ARRAY['approved', 'cancelled']$part$;
    after  CONSTANT text := $part$'held'      THEN ARRAY['approved', 'cancelled', 'review']$part$;
BEGIN
    IF position(before IN guard) = 0 THEN
        RAISE EXCEPTION 'the guard of refunds is not the one of the first revision';
    END IF;
    EXECUTE replace(guard, before, after);
END $$;
"""


def upgrade() -> None:
    for part in (CONTROL, REFUNDS, GRAPH):
        op.execute(part)
