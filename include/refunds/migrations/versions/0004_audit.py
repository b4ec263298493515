"""The audit trail: each event says which login wrote it, and is chained to the one before by a hash."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"

# The name that the code gives as the actor is a claim; the login is what the database knows.
LOGIN = """
ALTER TABLE refund_ledger.refund_events ADD COLUMN login text;
ALTER TABLE refund_ledger.refund_events ALTER COLUMN login SET DEFAULT session_user;
"""

# The chain stands beside the events, so that these are only ever inserted. include/refunds/audit.py computes the same hash by itself.
CHAIN = """
CREATE TABLE refund_ledger.refund_event_chain (
    position bigint PRIMARY KEY CHECK (position > 0),
    event_id bigint NOT NULL UNIQUE REFERENCES refund_ledger.refund_events (id),
    hash     text   NOT NULL CHECK (hash ~ '^[0-9a-f]{64}$')
);

-- What is locked while an event is chained. An advisory lock could be taken by anybody who may connect, and then nobody could commit;
-- this table is its owner's alone, and as it is always empty, no vacuum ever waits for it.
CREATE TABLE refund_ledger.event_chain_lock ();

CREATE FUNCTION refund_ledger.event_hash(previous text, e refund_ledger.refund_events) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT encode(sha256(convert_to(previous || string_agg(
        COALESCE(octet_length(convert_to(field, 'UTF8')) || ':' || field, '-'), ',' ORDER BY place), 'UTF8')), 'hex')
    FROM unnest(ARRAY[e.id::text, (extract(epoch FROM e.at) * 1000000)::bigint::text, e.event, e.refund_id::text, e.from_status,
                      e.to_status, e.actor, e.login, e.reason, e.detail::text]) WITH ORDINALITY AS fields (field, place)
$$;

-- Runs right before the commit, when the transaction takes no other lock any more: so it can be held by one transaction at a time
-- without a deadlock, and only for the moment of the commit. It runs with its owner's rights: nobody else writes to the chain.
CREATE FUNCTION refund_ledger.chain_event() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    last refund_ledger.refund_event_chain;
BEGIN
    LOCK TABLE refund_ledger.event_chain_lock IN EXCLUSIVE MODE;
    SELECT * INTO last FROM refund_ledger.refund_event_chain ORDER BY position DESC LIMIT 1;
    INSERT INTO refund_ledger.refund_event_chain (position, event_id, hash)
    VALUES (COALESCE(last.position, 0) + 1, NEW.id, refund_ledger.event_hash(COALESCE(last.hash, ''), NEW));
    RETURN NULL;
END $$;

DO $$
DECLARE
    e refund_ledger.refund_events;
    place bigint := 0;
    last_hash text := '';
BEGIN
    FOR e IN SELECT * FROM refund_ledger.refund_events ORDER BY id LOOP
        place := place + 1;
        last_hash := refund_ledger.event_hash(last_hash, e);
        INSERT INTO refund_ledger.refund_event_chain (position, event_id, hash) VALUES (place, e.id, last_hash);
    END LOOP;
END $$;

CREATE CONSTRAINT TRIGGER chained AFTER INSERT ON refund_ledger.refund_events
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refund_ledger.chain_event();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON refund_ledger.refund_event_chain
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.refund_event_chain
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();
"""

# As of a refund's status: no way of ending a pause or changing a limit, by code or by hand, can forget its event.
CONTROL = """
CREATE FUNCTION refund_ledger.write_control_events() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    before  jsonb := CASE WHEN TG_OP = 'UPDATE' THEN to_jsonb(OLD) ELSE '{}' END;
    after   jsonb := to_jsonb(NEW);
    moment  timestamptz := COALESCE(NULLIF(current_setting('refund_ledger.at', true), '')::timestamptz, clock_timestamp());
    because text := NULLIF(current_setting('refund_ledger.reason', true), '');
    name    text;
    bond    boolean;
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
        bond := name IN ('environment', 'source', 'fingerprint_check');
        INSERT INTO refund_ledger.refund_events (at, event, actor, reason, detail)
        VALUES (moment, CASE WHEN bond THEN name ELSE 'limit' END, refund_ledger.actor(),
                CASE WHEN bond THEN after ->> name ELSE because END,
                CASE WHEN NOT bond THEN jsonb_build_object('limit', name, 'from', before -> name, 'to', after -> name) END);
    END LOOP;
    RETURN NULL;
END $$;

CREATE TRIGGER events AFTER INSERT OR UPDATE ON refund_ledger.refund_control
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.write_control_events();
"""


def upgrade() -> None:
    for part in (LOGIN, CHAIN, CONTROL):
        op.execute(part)
