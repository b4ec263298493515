"""Accepting objects that can't be understood at the end of a restore: an event that takes an operator."""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"

EVENTS = """
ALTER TABLE refund_ledger.refund_events DROP CONSTRAINT refund_events_event_check, ADD CONSTRAINT
refund_events_event_check CHECK (event IN ( 'status', 'contradiction', 'pause', 'resume', 'environment',
'source', 'fingerprint_check', 'proposal', 'reverse', 'limit', 'approval', 'rejection', 'rotation', 'restore',
'not_understood'));

CREATE OR REPLACE FUNCTION refund_ledger.guard_roles_of_events() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    takes text[];
BEGIN
    takes := CASE
        WHEN NEW.event IN ('proposal', 'reverse', 'not_understood') THEN '{refunds_operator}'
        WHEN NEW.event IN ('approval', 'rejection') THEN '{refunds_payer}'
        WHEN NEW.event = 'contradiction' THEN '{refunds_payer,refunds_operator}'
        WHEN NEW.event = 'rotation' THEN '{refunds_key_rotator}'
        -- All others are written by the database itself.
        ELSE '{refunds_migrator}'
    END;
    IF NOT pg_has_role(current_user, takes[1], 'USAGE') THEN
        PERFORM refund_ledger.require(format('the event %s', NEW.event), VARIADIC takes);
    END IF;
    RETURN NEW;
END $$;
"""


def upgrade() -> None:
    op.execute(EVENTS)
