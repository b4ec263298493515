"""Database roles with the least rights that their work needs, and a view of the refunds without their requests."""

from __future__ import annotations

from alembic import op

from include.refunds.roles import create_roles

revision = "0005"
down_revision = "0004"

# What people, reports and auditors look at: everything but the frozen request and the hash of the API key.
MASKED = """
CREATE VIEW refund_ledger.refunds_masked AS
SELECT id, source, source_ref, processing_terminal_id, order_id, description, amount, currency, payee_last4, payee_fingerprint,
       requested_by, approved_by, approved_at, idempotency_key, status, reason, released_by, released_run, released_at,
       first_released_at, first_released_run, first_released_approver, run_rejected_by, holds, released_holds, attempts, first_sent_at,
       lease_until, next_attempt_at,
       payroc_refund_id, payroc_status, payroc_seen_at, replaces, created_at, updated_at, written_back_at,
       request IS NOT NULL AS has_request, request_key
FROM refund_ledger.refunds;
"""

# What a right on a column can't say. A login that was granted no role of these, such as an old one, is refused too.
GUARDS = """
CREATE FUNCTION refund_ledger.require(what text, VARIADIC roles text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM unnest(roles) AS role WHERE pg_has_role(current_user, role, 'USAGE')) THEN
        RAISE EXCEPTION '% takes the role %', what, array_to_string(roles, ' or ') USING ERRCODE = 'insufficient_privilege';
    END IF;
END $$;

CREATE FUNCTION refund_ledger.guard_roles_of_refunds() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.replaces IS NULL THEN
            PERFORM refund_ledger.require('a refund from the source', 'refunds_payer');
        ELSE
            PERFORM refund_ledger.require('a reissue', 'refunds_operator');
        END IF;
        RETURN NEW;
    END IF;
    -- What the DAGs alone do: pass the door, send, and find out what became of what was sent.
    IF NEW.status <> OLD.status
       AND (NEW.status IN ('released', 'sending', 'held', 'unknown') OR OLD.status IN ('sending', 'unknown')) THEN
        PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status), 'refunds_payer');
    -- What people alone do. Whatever waits may turn out to be paid, and then it goes to review, without them too.
    ELSIF NEW.status <> OLD.status
       AND (NEW.status = 'cancelled' OR OLD.status = 'review' OR (OLD.status = 'held' AND NEW.status <> 'review')) THEN
        PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status), 'refunds_operator');
    ELSIF NEW.status <> OLD.status THEN
        PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status), 'refunds_payer', 'refunds_operator');
    END IF;
    IF (NEW.attempts, NEW.first_sent_at, NEW.sent_with, NEW.released_by, NEW.released_run, NEW.released_at)
       IS DISTINCT FROM (OLD.attempts, OLD.first_sent_at, OLD.sent_with, OLD.released_by, OLD.released_run, OLD.released_at) THEN
        PERFORM refund_ledger.require('what is known of the sending', 'refunds_payer');
    END IF;
    -- Held to approved takes a person, see above, and has its event.
    IF NEW.released_holds <> OLD.released_holds AND (OLD.status <> 'held' OR NEW.status <> 'approved') THEN
        RAISE EXCEPTION 'refund %: only what is held is released from a hold', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    -- The payer decides what passes the door, except this: the largest amount that nobody has to look at is people's alone to set.
    IF OLD.status = 'approved' AND NEW.status = 'released' AND 'largest_refund' <> ALL (NEW.released_holds)
       AND NEW.amount > (SELECT largest_refund FROM refund_ledger.refund_control WHERE scope = '*') THEN
        RAISE EXCEPTION 'refund % is larger than the largest that passes by itself', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    -- The window of the key begins anew only when no attempt is unresolved.
    IF OLD.first_sent_at IS NOT NULL AND NEW.first_sent_at IS NULL
       AND EXISTS (SELECT FROM refund_ledger.refund_attempts WHERE refund_id = OLD.id AND COALESCE(outcome, 'unknown') = 'unknown') THEN
        RAISE EXCEPTION 'refund %: an attempt may have reached Payroc', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.request IS NOT NULL AND NEW.request IS NULL THEN
        PERFORM refund_ledger.require('the emptying of a request', 'refunds_payer');
    END IF;
    IF NEW.request_key IS DISTINCT FROM OLD.request_key OR (NEW.request IS NOT NULL AND NEW.request IS DISTINCT FROM OLD.request) THEN
        PERFORM refund_ledger.require('another encryption of a request', 'refunds_key_rotator');
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard_roles BEFORE INSERT OR UPDATE ON refund_ledger.refunds
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_roles_of_refunds();

-- The frozen body holds the refund's own key, so two refunds never have the same. Whoever can't make a body, having no key, can't make
-- a second refund out of that of another one either.
CREATE UNIQUE INDEX one_refund_per_request ON refund_ledger.refunds (request_sha256);

-- An attempt belongs to the claim that was made for it, and what may have reached Payroc is never called without effect later.
CREATE FUNCTION refund_ledger.guard_attempt() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    without_effect CONSTANT text[] := '{rejected,configuration,not_sent}';
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NOT EXISTS (SELECT FROM refund_ledger.refunds WHERE id = NEW.refund_id AND status = 'sending' AND attempts = NEW.attempt) THEN
            RAISE EXCEPTION 'attempt % of refund % was not claimed', NEW.attempt, NEW.refund_id USING ERRCODE = 'check_violation';
        END IF;
    ELSIF OLD.finished_at IS NOT NULL
          AND (NEW.outcome IS NULL OR (NEW.outcome = ANY (without_effect) AND OLD.outcome <> ALL (without_effect))) THEN
        RAISE EXCEPTION 'attempt % of refund % has ended as %', OLD.attempt, OLD.refund_id, OLD.outcome USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard BEFORE INSERT OR UPDATE ON refund_ledger.refund_attempts
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_attempt();

CREATE FUNCTION refund_ledger.guard_control() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    no_limits CONSTANT text[] := '{scope,environment,source,fingerprint_check,paused_at,paused_by,pause_reason}';
BEGIN
    IF (OLD.environment IS NOT NULL AND NEW.environment IS DISTINCT FROM OLD.environment)
       OR (OLD.source IS NOT NULL AND NEW.source IS DISTINCT FROM OLD.source)
       OR (OLD.fingerprint_check IS NOT NULL AND NEW.fingerprint_check IS DISTINCT FROM OLD.fingerprint_check) THEN
        RAISE EXCEPTION 'what the ledger is bound to never changes' USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.paused_at IS NOT NULL AND (NEW.paused_at, NEW.paused_by, NEW.pause_reason)
                                     IS DISTINCT FROM (OLD.paused_at, OLD.paused_by, OLD.pause_reason) THEN
        PERFORM refund_ledger.require('the end or the change of a pause', 'refunds_operator');
    END IF;
    IF to_jsonb(NEW) - no_limits <> to_jsonb(OLD) - no_limits THEN
        PERFORM refund_ledger.require('a limit', 'refunds_operator');
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard BEFORE UPDATE ON refund_ledger.refund_control
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_control();

CREATE FUNCTION refund_ledger.guard_roles_of_events() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    what CONSTANT text := format('the event %s', NEW.event);
BEGIN
    CASE
        WHEN NEW.event IN ('proposal', 'reverse') THEN PERFORM refund_ledger.require(what, 'refunds_operator');
        WHEN NEW.event IN ('approval', 'rejection') THEN PERFORM refund_ledger.require(what, 'refunds_payer');
        WHEN NEW.event = 'contradiction' THEN PERFORM refund_ledger.require(what, 'refunds_payer', 'refunds_operator');
        WHEN NEW.event = 'rotation' THEN PERFORM refund_ledger.require(what, 'refunds_key_rotator');
        -- All others are written by the database itself.
        ELSE PERFORM refund_ledger.require(what, 'refunds_migrator');
    END CASE;
    RETURN NEW;
END $$;
CREATE TRIGGER guard_roles BEFORE INSERT ON refund_ledger.refund_events
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_roles_of_events();
"""

# Two of these tell whoever may read the view only no more of a chain of reissues than the view does; the others write the events that
# nobody may write by hand. With the search path of whoever calls, operators of a schema of theirs could stand in the place of `=` and `<>`;
# and a function that anybody may execute could be the trigger of a table of theirs.
FUNCTIONS = """
ALTER FUNCTION refund_ledger.ended_unpaid(bigint) SECURITY DEFINER;
ALTER FUNCTION refund_ledger.first_source_ref(bigint) SECURITY DEFINER;
ALTER FUNCTION refund_ledger.write_status_event() SECURITY DEFINER;
ALTER FUNCTION refund_ledger.write_control_events() SECURITY DEFINER;
DO $$
DECLARE
    item record;
BEGIN
    FOR item IN SELECT p.oid::regprocedure AS name FROM pg_proc AS p WHERE p.pronamespace = 'refund_ledger'::regnamespace LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = pg_catalog, pg_temp', item.name);
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', item.name);
    END LOOP;
END $$;
GRANT EXECUTE ON FUNCTION refund_ledger.ended_unpaid(bigint), refund_ledger.first_source_ref(bigint)
    TO refunds_payer, refunds_operator, refunds_auditor;
GRANT EXECUTE ON FUNCTION refund_ledger.require(text, text[]) TO refunds_payer, refunds_operator, refunds_key_rotator;
"""

GRANTS = """
REVOKE ALL ON ALL TABLES IN SCHEMA refund_ledger FROM PUBLIC;
GRANT USAGE ON SCHEMA refund_ledger TO refunds_payer, refunds_operator, refunds_auditor, refunds_key_rotator;
GRANT SELECT ON refund_ledger.refunds_masked, refund_ledger.refund_attempts, refund_ledger.refund_events,
    refund_ledger.refund_event_chain, refund_ledger.refund_runs, refund_ledger.refund_control, refund_ledger.invalid_rows,
    refund_ledger.schema_version TO refunds_payer, refunds_operator, refunds_auditor;

-- The DAGs.
GRANT SELECT ON refund_ledger.refunds TO refunds_payer;
GRANT INSERT (source, source_ref, processing_terminal_id, order_id, description, amount, currency, payee_last4, payee_fingerprint,
        request, request_sha256, request_key, requested_by, approved_by, approved_at, idempotency_key, created_at, updated_at),
    UPDATE (status, reason, holds, released_by, released_run, released_at, first_released_approver, run_rejected_by, attempts,
        first_sent_at, sent_with, lease_until,
        next_attempt_at, payroc_refund_id, payroc_status, payroc_seen_at, request, updated_at, written_back_at)
    ON refund_ledger.refunds TO refunds_payer;
GRANT INSERT (refund_id, attempt, run_id, map_index, try_number, started_at), UPDATE (finished_at, http_status, problem_type, outcome)
    ON refund_ledger.refund_attempts TO refunds_payer;
GRANT INSERT, UPDATE ON refund_ledger.refund_runs TO refunds_payer;
GRANT INSERT, UPDATE, DELETE ON refund_ledger.invalid_rows TO refunds_payer;
GRANT UPDATE (environment, source, fingerprint_check) ON refund_ledger.refund_control TO refunds_payer;

-- People with the command line. What is known of the sending they may name in an UPDATE, and not change.
GRANT SELECT ON refund_ledger.refunds TO refunds_operator;
GRANT INSERT (source, source_ref, processing_terminal_id, order_id, description, amount, currency, payee_last4, payee_fingerprint,
        request, request_sha256, request_key, requested_by, approved_by, approved_at, idempotency_key, replaces, reason,
        created_at, updated_at),
    UPDATE (status, reason, holds, released_holds, first_sent_at, sent_with, lease_until, next_attempt_at, payroc_refund_id,
        payroc_status, payroc_seen_at, updated_at)
    ON refund_ledger.refunds TO refunds_operator;
GRANT UPDATE (largest_refund, run_total, run_count, day_total, day_count, payee_total, payee_count, payee_days, duplicate_days,
        approval_total, approval_count)
    ON refund_ledger.refund_control TO refunds_operator;

-- Both: whoever sees something wrong may stop the sending.
GRANT INSERT (scope, paused_at, paused_by, pause_reason), UPDATE (paused_at, paused_by, pause_reason)
    ON refund_ledger.refund_control TO refunds_payer, refunds_operator;
GRANT INSERT (at, event, refund_id, actor, reason, detail)
    ON refund_ledger.refund_events TO refunds_payer, refunds_operator, refunds_key_rotator;

-- rotate-keys.
GRANT SELECT (id, source, request, request_key, request_sha256), UPDATE (request, request_key)
    ON refund_ledger.refunds TO refunds_key_rotator;
GRANT SELECT ON refund_ledger.schema_version TO refunds_key_rotator;
"""

# From here on whoever is granted refunds_migrator may migrate; the first time it takes a login that may create roles.
OWNER = """
DO $$
DECLARE
    item record;
BEGIN
    ALTER SCHEMA refund_ledger OWNER TO refunds_migrator;
    FOR item IN SELECT c.oid::regclass AS name FROM pg_class AS c
                WHERE c.relnamespace = 'refund_ledger'::regnamespace AND c.relkind IN ('r', 'v') LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO refunds_migrator', item.name);
    END LOOP;
    FOR item IN SELECT p.oid::regprocedure AS name FROM pg_proc AS p WHERE p.pronamespace = 'refund_ledger'::regnamespace LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO refunds_migrator', item.name);
    END LOOP;
END $$;
"""


def upgrade() -> None:
    create_roles(op.get_bind())
    for part in (MASKED, GUARDS, FUNCTIONS, GRANTS, OWNER):
        op.execute(part)
