"""
The events of a transaction are chained together, by the first of them that comes to the commit.

A list of refunds commits many events at a time. The lock, the end of the chain and the insert are needed once for all of them.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"

# The same text is hashed as before, put together without a subquery.
HASH = """
CREATE OR REPLACE FUNCTION refund_ledger.event_hash(previous text, e refund_ledger.refund_events) RETURNS text
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    moment text := (extract(epoch FROM e.at) * 1000000)::bigint::text;
BEGIN
    RETURN encode(sha256(convert_to(concat(
        previous,
        COALESCE(octet_length(e.id::text) || ':' || e.id::text, '-'), ',',
        COALESCE(octet_length(moment) || ':' || moment, '-'), ',',
        COALESCE(octet_length(convert_to(e.event, 'UTF8')) || ':' || e.event, '-'), ',',
        COALESCE(octet_length(e.refund_id::text) || ':' || e.refund_id::text, '-'), ',',
        COALESCE(octet_length(convert_to(e.from_status, 'UTF8')) || ':' || e.from_status, '-'), ',',
        COALESCE(octet_length(convert_to(e.to_status, 'UTF8')) || ':' || e.to_status, '-'), ',',
        COALESCE(octet_length(convert_to(e.actor, 'UTF8')) || ':' || e.actor, '-'), ',',
        COALESCE(octet_length(convert_to(e.login, 'UTF8')) || ':' || e.login, '-'), ',',
        COALESCE(octet_length(convert_to(e.reason, 'UTF8')) || ':' || e.reason, '-'), ',',
        COALESCE(octet_length(convert_to(e.detail::text, 'UTF8')) || ':' || e.detail::text, '-')
    ), 'UTF8')), 'hex');
END $$;
"""

CHAIN = """
CREATE OR REPLACE FUNCTION refund_ledger.chain_event() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    last   refund_ledger.refund_event_chain;
    e      refund_ledger.refund_events;
    ids    bigint[] := '{}';
    hashes text[] := '{}';
BEGIN
    IF EXISTS (SELECT FROM refund_ledger.refund_event_chain WHERE event_id = NEW.id) THEN
        RETURN NULL;
    END IF;
    LOCK TABLE refund_ledger.event_chain_lock IN EXCLUSIVE MODE;
    SELECT * INTO last FROM refund_ledger.refund_event_chain ORDER BY position DESC LIMIT 1;
    -- Its own, and those that this transaction wrote after it. What a savepoint wrote bears another number, and is chained in its turn, as
    -- is what lies beyond the span. The span is there for the planner: without statistics it would read the whole table for an open end.
    FOR e IN SELECT * FROM refund_ledger.refund_events
             WHERE id BETWEEN NEW.id AND NEW.id + 9999 AND (id = NEW.id OR xmin = pg_current_xact_id()::xid) ORDER BY id LOOP
        last.hash := refund_ledger.event_hash(COALESCE(last.hash, ''), e);
        ids := ids || e.id;
        hashes := hashes || last.hash;
    END LOOP;
    INSERT INTO refund_ledger.refund_event_chain (position, event_id, hash)
    SELECT COALESCE(last.position, 0) + place, id, hash FROM unnest(ids, hashes) WITH ORDINALITY AS chained (id, hash, place);
    RETURN NULL;
END $$;
"""


def upgrade() -> None:
    for part in (HASH, CHAIN):
        op.execute(part)
