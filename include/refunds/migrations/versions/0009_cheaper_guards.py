"""
The guards and events for less: a role that is there is found without a query, and no query stands beside a condition.

They run for each change of each refund. An expression of PL/pgSQL with a query in it is planned and run as one even where what stands
before the query has decided already, so such a query is an IF of its own.

One guard is stricter: a refund that Payroc has processed keeps the beginning of its key's window, also when Payroc has refused it.
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"

REFUNDS = """
CREATE OR REPLACE FUNCTION refund_ledger.guard_roles_of_refunds() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    is_payer    CONSTANT boolean := pg_has_role(current_user, 'refunds_payer', 'USAGE');
    is_operator CONSTANT boolean := pg_has_role(current_user, 'refunds_operator', 'USAGE');
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.replaces IS NULL AND NOT is_payer THEN
            PERFORM refund_ledger.require('a refund from the source', 'refunds_payer');
        ELSIF NEW.replaces IS NOT NULL AND NOT is_operator THEN
            PERFORM refund_ledger.require('a reissue', 'refunds_operator');
        END IF;
        RETURN NEW;
    END IF;
    IF NEW.status <> OLD.status THEN
        -- What the DAGs alone do: pass the door, send, and find out what became of what was sent.
        IF NEW.status IN ('released', 'sending', 'held', 'unknown') OR OLD.status IN ('sending', 'unknown') THEN
            IF NOT is_payer THEN
                PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status), 'refunds_payer');
            END IF;
        -- What people alone do. Whatever waits may turn out to be paid, and then it goes to review, without them too.
        ELSIF NEW.status = 'cancelled' OR OLD.status = 'review' OR (OLD.status = 'held' AND NEW.status <> 'review') THEN
            IF NOT is_operator THEN
                PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status), 'refunds_operator');
            END IF;
        ELSIF NOT (is_payer OR is_operator) THEN
            PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status), 'refunds_payer', 'refunds_operator');
        END IF;
    END IF;
    IF NOT is_payer
       AND (NEW.attempts, NEW.first_sent_at, NEW.sent_with, NEW.released_by, NEW.released_run, NEW.released_at)
           IS DISTINCT FROM (OLD.attempts, OLD.first_sent_at, OLD.sent_with, OLD.released_by, OLD.released_run, OLD.released_at) THEN
        PERFORM refund_ledger.require('what is known of the sending', 'refunds_payer');
    END IF;
    -- Held to approved takes a person, see above, and has its event.
    IF NEW.released_holds <> OLD.released_holds AND (OLD.status <> 'held' OR NEW.status <> 'approved') THEN
        RAISE EXCEPTION 'refund %: only what is held is released from a hold', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    -- The payer decides what passes the door, except this: the largest amount that nobody has to look at is people's alone to set.
    IF OLD.status = 'approved' AND NEW.status = 'released' AND 'largest_refund' <> ALL (NEW.released_holds) THEN
        IF NEW.amount > (SELECT largest_refund FROM refund_ledger.refund_control WHERE scope = '*') THEN
            RAISE EXCEPTION 'refund % is larger than the largest that passes by itself', OLD.id USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    -- The window of the key begins anew only when no attempt was processed: Payroc counts it from the first one that was, whatever it
    -- has answered.
    IF OLD.first_sent_at IS NOT NULL AND NEW.first_sent_at IS NULL THEN
        IF EXISTS (SELECT FROM refund_ledger.refund_attempts
                   WHERE refund_id = OLD.id AND COALESCE(outcome, 'unknown') NOT IN ('not_sent', 'configuration')) THEN
            RAISE EXCEPTION 'refund %: an attempt may have reached Payroc', OLD.id USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    IF OLD.request IS NOT NULL AND NEW.request IS NULL AND NOT is_payer THEN
        PERFORM refund_ledger.require('the emptying of a request', 'refunds_payer');
    END IF;
    IF NEW.request_key IS DISTINCT FROM OLD.request_key OR (NEW.request IS NOT NULL AND NEW.request IS DISTINCT FROM OLD.request) THEN
        PERFORM refund_ledger.require('another encryption of a request', 'refunds_key_rotator');
    END IF;
    RETURN NEW;
END $$;
"""

EVENTS = """
CREATE OR REPLACE FUNCTION refund_ledger.guard_roles_of_events() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    takes text[];
BEGIN
    takes := CASE
        WHEN NEW.event IN ('proposal', 'reverse') THEN '{refunds_operator}'
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

CREATE OR REPLACE FUNCTION refund_ledger.write_status_event() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- The actor is that of refund_ledger.actor(), which costs more to call than the rest of this.
    INSERT INTO refund_ledger.refund_events (at, event, refund_id, from_status, to_status, actor, reason)
    VALUES (NEW.updated_at, 'status', NEW.id, CASE WHEN TG_OP = 'UPDATE' THEN OLD.status END, NEW.status,
            COALESCE(NULLIF(current_setting('refund_ledger.actor', true), ''), session_user), NEW.reason);
    RETURN NULL;
END $$;
"""


def upgrade() -> None:
    for part in (REFUNDS, EVENTS):
        op.execute(part)
