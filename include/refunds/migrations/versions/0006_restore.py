"""A ledger that was restored from a backup stays paused until it was compared with Payroc."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"

CONTROL = """
ALTER TABLE refund_ledger.refund_control
    ADD COLUMN restored_to timestamptz,
    ADD CONSTRAINT a_restored_ledger_is_paused CHECK (restored_to IS NULL OR (scope = '*' AND paused_at IS NOT NULL));
GRANT UPDATE (restored_to) ON refund_ledger.refund_control TO refunds_operator;

ALTER TABLE refund_ledger.refund_events
    DROP CONSTRAINT refund_events_event_check,
    ADD CONSTRAINT refund_events_event_check CHECK (event IN (
        'status', 'contradiction', 'pause', 'resume', 'environment', 'source', 'fingerprint_check', 'proposal', 'reverse',
        'limit', 'approval', 'rejection', 'rotation', 'restore'));
"""

# As before, but the begin and the end of a restore are no change of a limit.
EVENTS = """
CREATE OR REPLACE FUNCTION refund_ledger.write_control_events() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    before  jsonb := CASE WHEN TG_OP = 'UPDATE' THEN to_jsonb(OLD) ELSE '{}' END;
    after   jsonb := to_jsonb(NEW);
    moment  timestamptz := COALESCE(NULLIF(current_setting('refund_ledger.at', true), '')::timestamptz, clock_timestamp());
    because text := NULLIF(current_setting('refund_ledger.reason', true), '');
    name    text;
    kind    text;
BEGIN
    IF NEW.paused_at IS NOT NULL AND (before ->> 'paused_at', before ->> 'paused_by', before ->> 'pause_reason')
                                     IS DISTINCT FROM (after ->> 'paused_at', after ->> 'paused_by', after ->> 'pause_reason') THEN
        INSERT INTO refund_ledger.refund_events (at, event, actor, reason, detail)
        VALUES (NEW.paused_at, 'pause', NEW.paused_by, NEW.pause_reason, jsonb_build_object('scope', NEW.scope));
    ELSIF NEW.paused_at IS NULL AND before ->> 'paused_at' IS NOT NULL THEN
        INSERT INTO refund_ledger.refund_events (at, event, actor, reason, detail)
        VALUES (moment, 'resume', refund_ledger.actor(), because, jsonb_build_object('scope', NEW.scope));
    END IF;
    FOR name IN SELECT key FROM jsonb_object_keys(after - '{scope,paused_at,paused_by,pause_reason}'::text[]) AS keys (key)
                WHERE before -> key IS DISTINCT FROM after -> key AND COALESCE(before ->> key, after ->> key) IS NOT NULL ORDER BY key LOOP
        kind := CASE WHEN name IN ('environment', 'source', 'fingerprint_check') THEN name
                     WHEN name = 'restored_to' THEN 'restore' ELSE 'limit' END;
        INSERT INTO refund_ledger.refund_events (at, event, actor, reason, detail)
        VALUES (moment, kind, refund_ledger.actor(),
                CASE WHEN kind = name THEN after ->> name ELSE because END,
                CASE kind WHEN 'limit' THEN jsonb_build_object('limit', name, 'from', before -> name, 'to', after -> name)
                          WHEN 'restore' THEN jsonb_build_object('from', before -> name, 'to', after -> name) END);
    END LOOP;
    RETURN NULL;
END $$;
"""


# As before, but a refund that turns out to be paid without having passed the door counts from then on: else a restored ledger would
# forget it for caps, duplicates and new payees.
FIRST_RELEASE = """
CREATE OR REPLACE FUNCTION refund_ledger.note_first_release() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF OLD.first_released_at IS NOT NULL THEN
        NEW.first_released_at := OLD.first_released_at;
        NEW.first_released_run := OLD.first_released_run;
        NEW.first_released_approver := OLD.first_released_approver;
    ELSIF NEW.status = 'released' THEN
        NEW.first_released_at := NEW.released_at;
        NEW.first_released_run := NEW.released_run;
    ELSE
        NEW.first_released_at := CASE WHEN NEW.status IN ('accepted', 'settled', 'returned', 'reversed') THEN NEW.updated_at END;
        NEW.first_released_run := NULL;
        NEW.first_released_approver := NULL;
    END IF;
    RETURN NEW;
END $$;
"""


def upgrade() -> None:
    for part in (CONTROL, EVENTS, FIRST_RELEASE):
        op.execute(part)
