"""The ledger: refunds, attempts, events, runs, control and invalid rows, with the state graph in the database."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

TABLES = """
CREATE TABLE refund_ledger.refunds (
    id                     bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source                 text        NOT NULL CHECK (length(source) BETWEEN 1 AND 100),
    source_ref             text        NOT NULL CHECK (length(source_ref) BETWEEN 1 AND 200),
    processing_terminal_id text        NOT NULL CHECK (length(processing_terminal_id) BETWEEN 4 AND 50),
    order_id               text        NOT NULL CHECK (length(order_id) BETWEEN 1 AND 24),
    description            text        NOT NULL CHECK (length(description) <= 256),
    amount                 bigint      NOT NULL CHECK (amount > 0),
    currency               text        NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    payee_last4            text        CHECK (payee_last4 ~ '^[0-9]{4}$'),
    payee_fingerprint      text        NOT NULL CHECK (payee_fingerprint ~ '^[0-9a-f]{64}$'),
    request                bytea,
    request_sha256         text        NOT NULL CHECK (request_sha256 ~ '^[0-9a-f]{64}$'),
    requested_by           text        NOT NULL CHECK (btrim(requested_by) <> ''),
    approved_by            text        NOT NULL CHECK (btrim(approved_by) <> ''),
    approved_at            timestamptz NOT NULL,
    idempotency_key        uuid        NOT NULL UNIQUE,
    sent_with              text,
    status                 text        NOT NULL DEFAULT 'approved' CHECK (status IN (
        'approved', 'held', 'released', 'sending', 'unknown', 'accepted',
        'settled', 'returned', 'reversed', 'rejected', 'review', 'cancelled')),
    reason                 text,
    released_by            text,
    released_run           text,
    released_at            timestamptz,
    attempts               integer     NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    first_sent_at          timestamptz,
    lease_until            timestamptz,
    next_attempt_at        timestamptz,
    payroc_refund_id       text        UNIQUE CHECK (length(payroc_refund_id) = 10),
    payroc_status          text,
    payroc_seen_at         timestamptz,
    replaces               bigint      UNIQUE REFERENCES refund_ledger.refunds (id),
    created_at             timestamptz NOT NULL,
    updated_at             timestamptz NOT NULL,
    written_back_at        timestamptz,
    UNIQUE (source, source_ref),
    UNIQUE (processing_terminal_id, order_id),
    CONSTRAINT approver_is_not_requester CHECK (lower(btrim(requested_by)) <> lower(btrim(approved_by))),
    CONSTRAINT request_is_kept_until_final CHECK (
        request IS NOT NULL OR status IN ('settled', 'returned', 'reversed', 'rejected', 'cancelled', 'review')),
    CONSTRAINT released_says_by_whom_and_when CHECK (
        status <> 'released' OR (released_by IS NOT NULL AND released_at IS NOT NULL)),
    CONSTRAINT sent_says_when_and_with_what CHECK (
        status NOT IN ('sending', 'unknown')
        OR (attempts > 0 AND first_sent_at IS NOT NULL AND sent_with IS NOT NULL
            AND lease_until IS NOT NULL AND next_attempt_at IS NOT NULL)),
    CONSTRAINT paid_has_payrocs_refund_id CHECK (
        status NOT IN ('accepted', 'settled', 'returned', 'reversed') OR payroc_refund_id IS NOT NULL)
);

CREATE TABLE refund_ledger.refund_attempts (
    refund_id    bigint      NOT NULL REFERENCES refund_ledger.refunds (id),
    attempt      integer     NOT NULL CHECK (attempt > 0),
    run_id       text        NOT NULL,
    map_index    integer,
    try_number   integer,
    started_at   timestamptz NOT NULL,
    finished_at  timestamptz,
    http_status  integer,
    problem_type text,
    outcome      text CHECK (outcome IN ('accepted', 'rejected', 'unknown', 'review', 'configuration', 'not_sent')),
    PRIMARY KEY (refund_id, attempt)
);

CREATE TABLE refund_ledger.refund_events (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL,
    event       text        NOT NULL CHECK (event IN ('status', 'contradiction', 'pause', 'resume', 'environment', 'source')),
    refund_id   bigint      REFERENCES refund_ledger.refunds (id),
    from_status text,
    to_status   text,
    actor       text        NOT NULL,
    reason      text,
    detail      jsonb
);

CREATE TABLE refund_ledger.refund_runs (
    run_id           text        PRIMARY KEY,
    params           jsonb       NOT NULL,
    candidates       integer     NOT NULL,
    candidate_totals jsonb       NOT NULL,
    candidates_hash  text        NOT NULL,
    approval_needed  boolean,
    approved_by      text,
    approved_at      timestamptz,
    approved_hash    text,
    released         integer,
    released_totals  jsonb,
    findings         jsonb       NOT NULL DEFAULT '{}',
    started_at       timestamptz NOT NULL,
    finished_at      timestamptz
);

CREATE TABLE refund_ledger.refund_control (
    scope        text        PRIMARY KEY,
    environment  text,
    source       text,
    paused_at    timestamptz,
    paused_by    text,
    pause_reason text,
    CONSTRAINT bonds_belong_to_everything CHECK ((environment IS NULL AND source IS NULL) OR scope = '*'),
    CONSTRAINT pause_says_by_whom_and_why CHECK (
        paused_at IS NULL OR (paused_by IS NOT NULL AND pause_reason IS NOT NULL))
);
INSERT INTO refund_ledger.refund_control (scope) VALUES ('*');

CREATE TABLE refund_ledger.invalid_rows (
    source          text        NOT NULL,
    source_ref      text        NOT NULL,
    errors          jsonb       NOT NULL,
    first_seen_at   timestamptz NOT NULL,
    last_seen_at    timestamptz NOT NULL,
    updated_at      timestamptz NOT NULL,
    written_back_at timestamptz,
    PRIMARY KEY (source, source_ref)
);

CREATE INDEX refunds_queue ON refund_ledger.refunds (source, approved_at, id) WHERE status IN ('approved', 'held', 'released');
CREATE INDEX refunds_open ON refund_ledger.refunds (status, id) WHERE status IN ('held', 'sending', 'unknown', 'review', 'accepted');
CREATE INDEX refunds_settled ON refund_ledger.refunds (updated_at) WHERE status = 'settled';
CREATE INDEX refunds_to_write_back ON refund_ledger.refunds (source, source_ref) WHERE written_back_at IS DISTINCT FROM updated_at;
CREATE INDEX refunds_by_run ON refund_ledger.refunds (released_run) WHERE released_run IS NOT NULL;
CREATE INDEX refunds_by_payee ON refund_ledger.refunds (payee_fingerprint, created_at);
CREATE INDEX attempts_by_run ON refund_ledger.refund_attempts (run_id);
CREATE INDEX events_by_refund ON refund_ledger.refund_events (refund_id, id);
"""

# A new refund is approved and untouched; a refund that exists moves only along the graph, and what identifies the
# payment never changes. What a first attempt fixed (when, and with which API host and key) is only taken back by
# the one edge that proves that no attempt reached Payroc's processing.
GUARD = """
CREATE FUNCTION refund_ledger.guard_refund() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'refund % is never deleted', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF TG_OP = 'INSERT' THEN
        IF NEW.status <> 'approved' OR NEW.attempts <> 0 OR NEW.first_sent_at IS NOT NULL OR NEW.payroc_refund_id IS NOT NULL THEN
            RAISE EXCEPTION 'a new refund is approved and unsent, not %', NEW.status USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END IF;
    IF (NEW.id, NEW.source, NEW.source_ref, NEW.processing_terminal_id, NEW.order_id, NEW.description, NEW.amount, NEW.currency,
        NEW.payee_last4, NEW.payee_fingerprint, NEW.request_sha256, NEW.requested_by, NEW.approved_by, NEW.approved_at,
        NEW.idempotency_key, NEW.replaces, NEW.created_at)
       IS DISTINCT FROM
       (OLD.id, OLD.source, OLD.source_ref, OLD.processing_terminal_id, OLD.order_id, OLD.description, OLD.amount, OLD.currency,
        OLD.payee_last4, OLD.payee_fingerprint, OLD.request_sha256, OLD.requested_by, OLD.approved_by, OLD.approved_at,
        OLD.idempotency_key, OLD.replaces, OLD.created_at) THEN
        RAISE EXCEPTION 'refund %: what identifies the payment never changes', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.request IS NULL AND NEW.request IS NOT NULL THEN
        RAISE EXCEPTION 'refund %: an emptied request stays empty', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.request IS NOT NULL AND NEW.request IS NULL
       AND OLD.status NOT IN ('settled', 'returned', 'reversed', 'rejected', 'cancelled') THEN
        RAISE EXCEPTION 'refund %: the request of a refund that is % is kept', OLD.id, OLD.status USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.attempts < OLD.attempts OR NEW.attempts > OLD.attempts + 1 THEN
        RAISE EXCEPTION 'refund %: attempts count up by one', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.payroc_refund_id IS NOT NULL AND NEW.payroc_refund_id IS DISTINCT FROM OLD.payroc_refund_id THEN
        RAISE EXCEPTION 'refund %: Payroc''s refund id never changes', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.first_sent_at IS NOT NULL
       AND (NEW.first_sent_at, NEW.sent_with) IS DISTINCT FROM (OLD.first_sent_at, OLD.sent_with)
       AND NOT (OLD.status = 'sending' AND NEW.status = 'released' AND NEW.first_sent_at IS NULL AND NEW.sent_with IS NULL) THEN
        RAISE EXCEPTION 'refund %: first_sent_at and sent_with never change', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status <> OLD.status AND NEW.status <> ALL (CASE OLD.status
            WHEN 'approved'  THEN ARRAY['held', 'released', 'cancelled', 'review']
            WHEN 'held'      THEN ARRAY['approved', 'cancelled']
            WHEN 'released'  THEN ARRAY['sending', 'approved', 'held']
            WHEN 'sending'   THEN ARRAY['accepted', 'settled', 'rejected', 'unknown', 'review', 'released']
            WHEN 'unknown'   THEN ARRAY['sending', 'accepted', 'settled', 'returned', 'reversed', 'rejected', 'review']
            WHEN 'accepted'  THEN ARRAY['settled', 'returned', 'reversed', 'rejected', 'review']
            WHEN 'settled'   THEN ARRAY['returned', 'review']
            WHEN 'review'    THEN ARRAY['accepted', 'rejected', 'settled', 'returned', 'reversed']
            WHEN 'reversed'  THEN ARRAY['review']
            WHEN 'returned'  THEN ARRAY['review']
            WHEN 'rejected'  THEN ARRAY['review']
            WHEN 'cancelled' THEN ARRAY['review']
        END) THEN
        RAISE EXCEPTION 'refund % can''t go from % to %', OLD.id, OLD.status, NEW.status USING ERRCODE = 'check_violation';
    END IF;
    -- A write-back remembers the updated_at it read, so two changes must never share one.
    IF NEW.status <> OLD.status OR NEW.updated_at <> OLD.updated_at THEN
        NEW.updated_at := GREATEST(NEW.updated_at, OLD.updated_at + interval '1 microsecond');
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER guard BEFORE INSERT OR UPDATE OR DELETE ON refund_ledger.refunds
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_refund();
"""

# Written by the database itself, so that no way of changing a status can forget its event.
EVENTS = """
CREATE FUNCTION refund_ledger.actor() RETURNS text LANGUAGE sql STABLE AS
    $$ SELECT COALESCE(NULLIF(current_setting('refund_ledger.actor', true), ''), session_user::text) $$;

CREATE FUNCTION refund_ledger.write_status_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO refund_ledger.refund_events (at, event, refund_id, from_status, to_status, actor, reason)
    VALUES (NEW.updated_at, 'status', NEW.id, CASE WHEN TG_OP = 'UPDATE' THEN OLD.status END, NEW.status,
            refund_ledger.actor(), NEW.reason);
    RETURN NULL;
END $$;

CREATE TRIGGER event_of_a_new_refund AFTER INSERT ON refund_ledger.refunds
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.write_status_event();
CREATE TRIGGER event_of_a_change AFTER UPDATE ON refund_ledger.refunds
    FOR EACH ROW WHEN (OLD.status <> NEW.status OR OLD.attempts <> NEW.attempts)
    EXECUTE FUNCTION refund_ledger.write_status_event();

CREATE FUNCTION refund_ledger.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END $$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON refund_ledger.refund_events
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();
CREATE TRIGGER never_deleted BEFORE DELETE ON refund_ledger.refund_attempts
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.refunds
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.refund_attempts
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.refund_events
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();
"""


def upgrade() -> None:
    for part in (TABLES, GUARD, EVENTS):
        op.execute(part)
