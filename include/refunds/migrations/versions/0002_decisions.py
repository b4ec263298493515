"""Decisions of people: proposals that wait for a second person, reversals, and refunds that replace another one."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"

# A rejected refund whose request was emptied may turn out to be paid; people then have to be able to call it accepted. When a request
# may be emptied is decided by the guard, and does not change.
CONSTRAINTS = """
ALTER TABLE refund_ledger.refund_events
    DROP CONSTRAINT refund_events_event_check,
    ADD CONSTRAINT refund_events_event_check CHECK (event IN (
        'status', 'contradiction', 'pause', 'resume', 'environment', 'source', 'proposal', 'reverse'));
ALTER TABLE refund_ledger.refunds
    DROP CONSTRAINT request_is_kept_until_final,
    ADD CONSTRAINT request_is_kept_until_final CHECK (
        request IS NOT NULL OR status IN ('accepted', 'settled', 'returned', 'reversed', 'rejected', 'cancelled', 'review'));
"""

# A refund that replaces another one pays the same again, so what it replaces must have moved no money, or have brought it back; and so
# must what that one replaces, to the first of the chain.
# The row is locked, so that it can't turn out to be paid between this look at it and the commit.
GUARD_OF_REISSUES = """
CREATE FUNCTION refund_ledger.ended_unpaid(refund_id bigint) RETURNS boolean LANGUAGE sql STABLE AS $$
    WITH RECURSIVE chain AS (
        SELECT status, replaces FROM refund_ledger.refunds WHERE id = refund_id
        UNION ALL
        SELECT r.status, r.replaces FROM refund_ledger.refunds AS r JOIN chain ON r.id = chain.replaces
    )
    SELECT COALESCE(bool_and(status IN ('rejected', 'returned', 'reversed')), false) FROM chain
$$;

CREATE FUNCTION refund_ledger.guard_reissue() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    replaced refund_ledger.refunds;
BEGIN
    SELECT * INTO replaced FROM refund_ledger.refunds WHERE id = NEW.replaces FOR SHARE;
    IF NOT refund_ledger.ended_unpaid(NEW.replaces) THEN
        RAISE EXCEPTION 'refund % is %: only one that is rejected, returned or reversed, as all that it replaces, is replaced',
            NEW.replaces, COALESCE(replaced.status, 'not there') USING ERRCODE = 'check_violation';
    END IF;
    IF (NEW.source, NEW.amount, NEW.currency, NEW.payee_fingerprint, NEW.processing_terminal_id)
       IS DISTINCT FROM
       (replaced.source, replaced.amount, replaced.currency, replaced.payee_fingerprint, replaced.processing_terminal_id) THEN
        RAISE EXCEPTION 'a refund pays what the one that it replaces (%) was to pay', NEW.replaces USING ERRCODE = 'check_violation';
    END IF;
    -- The source has one row for both, and takes no news that is older than what it has.
    NEW.updated_at := GREATEST(NEW.updated_at, replaced.updated_at + interval '1 microsecond');
    RETURN NEW;
END $$;

CREATE TRIGGER guard_reissue BEFORE INSERT ON refund_ledger.refunds
    FOR EACH ROW WHEN (NEW.replaces IS NOT NULL) EXECUTE FUNCTION refund_ledger.guard_reissue();

-- The source knows only the first refund of a chain.
CREATE FUNCTION refund_ledger.first_source_ref(refund_id bigint) RETURNS text LANGUAGE sql STABLE AS $$
    WITH RECURSIVE chain AS (
        SELECT source_ref, replaces FROM refund_ledger.refunds WHERE id = refund_id
        UNION ALL
        SELECT r.source_ref, r.replaces FROM refund_ledger.refunds AS r JOIN chain ON r.id = chain.replaces
    )
    SELECT source_ref FROM chain WHERE replaces IS NULL
$$;
"""

# For the comparison with Payroc, which asks by the key, by Payroc's id, and by the order id whatever the terminal; and for the
# follow-up, which asks for what changed not long ago.
INDEXES = """
CREATE INDEX refunds_by_order ON refund_ledger.refunds (order_id);
CREATE INDEX refunds_by_change ON refund_ledger.refunds (updated_at);
CREATE INDEX refunds_by_first_sent ON refund_ledger.refunds (first_sent_at) WHERE first_sent_at IS NOT NULL;
"""


def upgrade() -> None:
    for part in (CONSTRAINTS, GUARD_OF_REISSUES, INDEXES):
        op.execute(part)
