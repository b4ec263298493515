-- The ledger: every refund, what became of it, who decided about it, and who may change what.
--
-- Read it from top to bottom. Migration 0001 executes exactly this file, in one transaction and after it has
-- made the roles, so nothing about the ledger's structure is written anywhere else.
--
--   1  Schema and owner
--   2  Functions that several tables use
--   3  Refunds
--   4  Attempts
--   5  Events and their seals
--   6  Runs
--   7  Control: pauses, bonds, limits, restore
--   8  Invalid rows and write-back notes
--   9  The view without requests
--   10 Who may do what
--
-- The life of a refund: it is approved; a limit may hold it until an operator unholds or cancels it; a run
-- releases it, which is the only gate to Payroc; a worker sends it. Then Payroc has accepted or rejected it,
-- or nobody knows (unknown) and it is looked up or sent again with the same key and the same bytes. What is
-- accepted settles; a bank may return it, an operator may reverse it. What nobody but an operator can decide
-- is in review. Section 3 has the complete graph, in guard_refund.
--
-- Roles. They belong to the server and cannot log in; each login is granted one of them.
--
--   refunds_migrator     owns everything here and migrates it
--   refunds_payer        the DAGs: pull, release, send, look up, write back
--   refunds_operator     the command line: pause and resume, set limits, unhold, cancel, resolve, reissue
--   refunds_auditor      reads everything except the requests
--   refunds_key_rotator  encrypts the requests with another key
--
-- refunds_requester and refunds_approver have rights in the source, and none here.
--
-- Words. A time is the ledger database's clock unless its comment says otherwise. An amount is in minor units
-- of its currency, such as cents. A "folded" form is a text without the differences that people do not see
-- (case, accents composed or not, width, runs of blanks, invisible characters); Python folds, in
-- include/refunds/text.py, because Postgres would fold some letters differently. A trigger says what a right
-- on columns cannot.


-- 1  Schema and owner ---------------------------------------------------------------------------------------

-- Everything is in this schema. When this file runs as a migration, the schema and the next table are there
-- already.
CREATE SCHEMA IF NOT EXISTS refund_ledger;

-- Which migration the schema is at. Alembic makes it and writes its only row.
CREATE TABLE IF NOT EXISTS refund_ledger.schema_version (
    -- The id of the newest migration that was executed.
    version_num varchar(32) NOT NULL,
    -- Alembic looks its row up by the id; the name is the one Alembic gives.
    CONSTRAINT schema_version_pkc PRIMARY KEY (version_num)
);

-- One role owns all, whichever login migrates, so that another login may run the next migration.
ALTER SCHEMA refund_ledger OWNER TO refunds_migrator;

-- After the schema: who takes over a table needs the right to create one there.
ALTER TABLE refund_ledger.schema_version OWNER TO refunds_migrator;

-- From here to the end of the transaction: what is created belongs to the owner from its first moment.
SET LOCAL ROLE refunds_migrator;


-- 2  Functions that several tables use ----------------------------------------------------------------------

-- Every function here but now() sets its search path: with the caller's, operators of a schema of the
-- caller's could stand in the place of `=` and `<>`.

-- Refuse what none of these roles may do. A login that was granted none of them is refused as well.
CREATE FUNCTION refund_ledger.require(what text, VARIADIC roles text[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM unnest(roles) AS role WHERE pg_has_role(current_user, role, 'USAGE')) THEN
        RAISE EXCEPTION '% takes the role %', what, array_to_string(roles, ' or ')
            USING ERRCODE = 'insufficient_privilege';
    END IF;
END $$;

-- The ledger's time. Every statement and trigger asks this function, so that a test can set the time by
-- replacing it; `check` compares its body, so that no other clock is ever used in production. It names the
-- schema itself and sets no search path, so that Postgres puts its body in the place of each call.
CREATE FUNCTION refund_ledger.now() RETURNS timestamptz
    LANGUAGE sql VOLATILE AS 'SELECT pg_catalog.clock_timestamp()';

-- Who acts: the name that the program gave for this transaction, or the login. It is a claim; events keep the
-- login too.
CREATE FUNCTION refund_ledger.actor() RETURNS text
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT COALESCE(NULLIF(current_setting('refund_ledger.actor', true), ''), session_user::text)
$$;

-- Refuse a change of what is only ever added, to the owner too.
CREATE FUNCTION refund_ledger.refuse_change() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END $$;


-- 3  Refunds ------------------------------------------------------------------------------------------------

-- One row per approved refund, and per reissue. It is inserted once, moves along the graph of guard_refund,
-- and is never deleted.
CREATE TABLE refund_ledger.refunds (
    -- The ledger's number of the refund; tasks and operators name it by this.
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,

    -- What was approved. None of it ever changes (guard_refund).

    -- The source's name, from PAYROC_REFUNDS_SOURCE. The key derives from it.
    source text NOT NULL CHECK (length(source) BETWEEN 1 AND 100),
    -- The id of the row in the source, or of a reissue its own. The key derives from it.
    source_ref text NOT NULL CHECK (length(source_ref) BETWEEN 1 AND 200),
    -- The folded source_ref.
    source_ref_folded text NOT NULL,
    -- The terminal at Payroc that pays; Payroc's length.
    processing_terminal_id text NOT NULL CHECK (length(processing_terminal_id) BETWEEN 4 AND 50),
    -- The merchant's order, by which Payroc finds the refund; Payroc's length.
    order_id text NOT NULL CHECK (length(order_id) BETWEEN 1 AND 24),
    -- The text that Payroc shows for the refund; the project's length.
    description text NOT NULL CHECK (length(description) <= 256),
    -- What the payee gets, in minor units. A refund of more than 10^12 is a mistake.
    amount bigint NOT NULL CHECK (amount BETWEEN 1 AND 1000000000000),
    -- ISO 4217, in capitals.
    currency text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    -- The account's last four digits, for people; NULL for a secure token, whose digits are not the
    -- account's.
    payee_last4 text CHECK (payee_last4 ~ '^[0-9]{4}$'),
    -- A keyed hash (HMAC-SHA256) of the payee's account, in hex: limits and duplicates recognise the payee by
    -- it. Length and characters are checked apart: the pattern '^[0-9a-f]{64}$' takes ten times as long.
    payee_fingerprint text NOT NULL
        CHECK (length(payee_fingerprint) = 64 AND payee_fingerprint !~ '[^0-9a-f]'),
    -- A keyed hash of the request's bytes, in hex: every attempt sends the same bytes, or none.
    request_sha256 text NOT NULL CHECK (length(request_sha256) = 64 AND request_sha256 !~ '[^0-9a-f]'),
    -- Who requested it, as the source spells the name.
    requested_by text NOT NULL CHECK (btrim(requested_by) <> ''),
    -- The folded requested_by.
    requested_by_folded text NOT NULL,
    -- Who approved it, as the source spells the name; of a reissue the second operator.
    approved_by text NOT NULL CHECK (btrim(approved_by) <> ''),
    -- The folded approved_by.
    approved_by_folded text NOT NULL,
    -- When it was approved, by the source's clock. Infinity and years before the project are mistakes.
    approved_at timestamptz NOT NULL
        CHECK (approved_at >= '2000-01-01 00:00:00+00' AND approved_at < 'infinity'),
    -- The key that every attempt sends, derived from source and source_ref. Unique: two refunds never share
    -- one.
    idempotency_key uuid NOT NULL UNIQUE,
    -- The refund that this one pays again (a reissue); NULL for all that come from the source.
    replaces bigint REFERENCES refund_ledger.refunds (id),
    -- When the ledger stored it.
    created_at timestamptz NOT NULL,

    -- The frozen request.

    -- The body that every attempt sends, encrypted; it holds the bank data. The follow-up empties it some
    -- time (PAYROC_REFUNDS_REQUEST_DAYS) after the refund has settled or ended otherwise; then it stays NULL.
    request bytea,
    -- Which key encrypted it, by the first digits of the key's hash; a rotation finds by it what is left to
    -- do.
    request_key text,

    -- Where it is.

    -- Its place in the graph of guard_refund.
    status text NOT NULL DEFAULT 'approved' CHECK (status IN (
        'approved', 'held', 'released', 'sending', 'unknown', 'accepted',
        'settled', 'returned', 'reversed', 'rejected', 'review', 'cancelled')),
    -- Why it is there, in a sentence for people, without bank data.
    reason text,
    -- When status, reason or Payroc's answer last changed. No two changes of a refund share one
    -- (guard_refund).
    updated_at timestamptz NOT NULL,
    -- The updated_at that the source has; any other value means that the row is due to be written.
    written_back_at timestamptz,

    -- The gate.

    -- The limits that hold it now, such as largest_refund or "duplicate of 17"; empty when none does.
    holds text[] NOT NULL DEFAULT '{}',
    -- The holds that an operator has ended; the same ones do not hold it again.
    released_holds text[] NOT NULL DEFAULT '{}',
    -- Who rejected a run with this refund; every later run with it needs approval, until one releases it.
    run_rejected_by text,
    -- Who released it last: the actor of the run.
    released_by text,
    -- Which run released it last.
    released_run text,
    -- When it was last released. A release is good for 24 hours.
    released_at timestamptz,
    -- When it was first released, or found to be paid without that. From then on it counts against the
    -- limits.
    first_released_at timestamptz,
    -- Which run released it first.
    first_released_run text,
    -- Who approved that run; NULL when the thresholds asked nobody.
    first_released_approver text,

    -- Sending.

    -- How many attempts were claimed. The newest has this number.
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    -- When the first attempt that may have reached Payroc was claimed. Payroc keeps a key for 7 days from
    -- then on; after 6 there is no POST any more.
    first_sent_at timestamptz,
    -- A hash of the API host and key of that attempt; a key may mean nothing with others.
    sent_with text,
    -- Until when the newest attempt may still send: longer than its token lives. Nobody else sends before
    -- that.
    lease_until timestamptz,
    -- When the next attempt may begin at the earliest.
    next_attempt_at timestamptz,

    -- What Payroc says.

    -- The id of Payroc's object; Payroc's length. Once known it never changes.
    payroc_refund_id text CHECK (length(payroc_refund_id) = 10),
    -- Payroc's own word for the object's state.
    payroc_status text,
    -- When Payroc last showed the object.
    payroc_seen_at timestamptz,

    -- A source row becomes a refund once, however often it is pulled.
    CONSTRAINT refunds_source_source_ref_key UNIQUE (source, source_ref),
    -- Two spellings of one id are not two refunds.
    CONSTRAINT refunds_source_source_ref_folded_key UNIQUE (source, source_ref_folded),
    -- A refund is looked up by terminal and order, so no two share both. The order first: people search by
    -- it.
    CONSTRAINT refunds_order_id_processing_terminal_id_key UNIQUE (order_id, processing_terminal_id),
    -- Two people, by the folded names: one name in two spellings is one person.
    CONSTRAINT approver_is_not_requester CHECK (requested_by_folded <> approved_by_folded),
    -- Printable ASCII alone, so that no two order ids look alike.
    CONSTRAINT order_id_is_ascii CHECK (order_id !~ '[^ -~]'),
    -- No control, format or invisible characters in what people read: the list of include/refunds/text.py.
    -- The texts are searched in one go, which takes a fifth of searching each.
    CONSTRAINT texts_can_be_printed CHECK (
        (source_ref || processing_terminal_id || order_id || description || requested_by || approved_by) !~
        '[\u0001-\u001f\u007f-\u009f\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160'
        '\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0'
        '\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a'
        '\U000e0000-\U000e0fff]'),
    -- Two ids that differ in a blank at an end would look the same. The blanks are those that Python strips.
    CONSTRAINT texts_have_no_blank_at_an_end CHECK (
        source_ref = btrim(source_ref,
            U&' \00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\202F\205F\3000')
        AND processing_terminal_id = btrim(processing_terminal_id,
            U&' \00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\202F\205F\3000')
        AND order_id = btrim(order_id,
            U&' \00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\202F\205F\3000')
        AND description = btrim(description,
            U&' \00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\202F\205F\3000')
        AND requested_by = btrim(requested_by,
            U&' \00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\202F\205F\3000')
        AND approved_by = btrim(approved_by,
            U&' \00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\202F\205F\3000')),
    -- What may still be sent needs its bytes. A rejected refund whose request was emptied may turn out to be
    -- paid, so accepted and review are here too; when a request may be emptied is guard_refund's to say.
    CONSTRAINT request_is_kept_until_final CHECK (
        request IS NOT NULL
        OR status IN ('accepted', 'settled', 'returned', 'reversed', 'rejected', 'cancelled', 'review')),
    -- An operator who unholds a refund has to see what for.
    CONSTRAINT held_says_for_what CHECK (status <> 'held' OR holds <> '{}'),
    -- A release without its actor and its time could not be shown, and would not end after 24 hours.
    CONSTRAINT released_says_by_whom_and_when CHECK (
        status <> 'released' OR (released_by IS NOT NULL AND released_at IS NOT NULL)),
    -- The key window, the fence and the wait all rest on these.
    CONSTRAINT sent_says_when_and_with_what CHECK (
        status NOT IN ('sending', 'unknown')
        OR (attempts > 0 AND first_sent_at IS NOT NULL AND sent_with IS NOT NULL
            AND lease_until IS NOT NULL AND next_attempt_at IS NOT NULL)),
    -- Only Payroc's object proves that money was accepted.
    CONSTRAINT paid_has_payrocs_refund_id CHECK (
        status NOT IN ('accepted', 'settled', 'returned', 'reversed') OR payroc_refund_id IS NOT NULL)
);

-- A refund is replaced at most once. Hardly any is: without the others the index is next to nothing.
CREATE UNIQUE INDEX refunds_replaces_key ON refund_ledger.refunds (replaces) WHERE replaces IS NOT NULL;

-- One object of Payroc's belongs to one refund. Until Payroc has answered there is no id, and no entry to
-- maintain.
CREATE UNIQUE INDEX refunds_payroc_refund_id_key ON refund_ledger.refunds (payroc_refund_id)
    WHERE payroc_refund_id IS NOT NULL;

-- The frozen body holds the refund's own key, so two refunds never have the same: who has no encryption key
-- and so cannot make a body cannot copy another refund's either. As bytes a hash takes half the room.
CREATE UNIQUE INDEX one_refund_per_request ON refund_ledger.refunds (decode(request_sha256, 'hex'));

-- What a run chooses from, oldest approval first.
CREATE INDEX refunds_queue ON refund_ledger.refunds (source, approved_at, id)
    WHERE status IN ('approved', 'held', 'released');

-- What is under way or needs someone: every report counts it.
CREATE INDEX refunds_open ON refund_ledger.refunds (status, id)
    WHERE status IN ('held', 'sending', 'unknown', 'review', 'accepted');

-- Settled refunds by their time: a bank may still return those of the last days.
CREATE INDEX refunds_settled ON refund_ledger.refunds (updated_at) WHERE status = 'settled';

-- What is due to be written back.
CREATE INDEX refunds_to_write_back ON refund_ledger.refunds (source, source_ref)
    WHERE (written_back_at = updated_at) IS NOT TRUE;

-- The planner believes that two columns nearly always differ, and would read the whole table for the few rows
-- in which they do. With statistics of the expression it takes the index above.
CREATE STATISTICS refund_ledger.refunds_written_back ON (written_back_at = updated_at)
    FROM refund_ledger.refunds;

-- What a run released, for its report.
CREATE INDEX refunds_by_run ON refund_ledger.refunds (released_run) WHERE released_run IS NOT NULL;

-- What a payee got before: limits per payee and duplicates.
CREATE INDEX refunds_by_payee ON refund_ledger.refunds (payee_fingerprint, created_at);

-- What changed lately: the day's totals and the follow-up.
CREATE INDEX refunds_by_change ON refund_ledger.refunds (updated_at);

-- What was sent in a span of time: the comparison with Payroc.
CREATE INDEX refunds_by_first_sent ON refund_ledger.refunds (first_sent_at) WHERE first_sent_at IS NOT NULL;

-- Whose requests may be emptied, oldest first.
CREATE INDEX refunds_to_empty ON refund_ledger.refunds (updated_at)
    WHERE request IS NOT NULL AND status IN ('settled', 'returned', 'reversed', 'rejected', 'cancelled');

-- A new refund is approved and unsent. One that exists moves only along the graph, what identifies the
-- payment never changes, and what a first attempt fixed (when, and with which API host and key) is taken back
-- only by the edge that proves that no attempt reached Payroc's processing. include/refunds/states.py has the
-- same graph.
CREATE FUNCTION refund_ledger.guard_refund() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'refund % is never deleted', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF TG_OP = 'INSERT' THEN
        IF NEW.status <> 'approved' OR NEW.attempts <> 0 OR NEW.first_sent_at IS NOT NULL
           OR NEW.payroc_refund_id IS NOT NULL THEN
            RAISE EXCEPTION 'a new refund is approved and unsent, not %', NEW.status
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END IF;
    IF (NEW.id, NEW.source, NEW.source_ref, NEW.source_ref_folded, NEW.processing_terminal_id, NEW.order_id,
        NEW.description, NEW.amount, NEW.currency, NEW.payee_last4, NEW.payee_fingerprint, NEW.request_sha256,
        NEW.requested_by, NEW.requested_by_folded, NEW.approved_by, NEW.approved_by_folded, NEW.approved_at,
        NEW.idempotency_key, NEW.replaces, NEW.created_at)
       IS DISTINCT FROM
       (OLD.id, OLD.source, OLD.source_ref, OLD.source_ref_folded, OLD.processing_terminal_id, OLD.order_id,
        OLD.description, OLD.amount, OLD.currency, OLD.payee_last4, OLD.payee_fingerprint, OLD.request_sha256,
        OLD.requested_by, OLD.requested_by_folded, OLD.approved_by, OLD.approved_by_folded, OLD.approved_at,
        OLD.idempotency_key, OLD.replaces, OLD.created_at) THEN
        RAISE EXCEPTION 'refund %: what identifies the payment never changes', OLD.id
            USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.request IS NULL AND NEW.request IS NOT NULL THEN
        RAISE EXCEPTION 'refund %: an emptied request stays empty', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.request IS NOT NULL AND NEW.request IS NULL
       AND OLD.status NOT IN ('settled', 'returned', 'reversed', 'rejected', 'cancelled') THEN
        RAISE EXCEPTION 'refund %: the request of a refund that is % is kept', OLD.id, OLD.status
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.attempts < OLD.attempts OR NEW.attempts > OLD.attempts + 1 THEN
        RAISE EXCEPTION 'refund %: attempts count up by one', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.payroc_refund_id IS NOT NULL AND NEW.payroc_refund_id IS DISTINCT FROM OLD.payroc_refund_id THEN
        RAISE EXCEPTION 'refund %: Payroc''s refund id never changes', OLD.id
            USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.first_sent_at IS NOT NULL
       AND (NEW.first_sent_at, NEW.sent_with) IS DISTINCT FROM (OLD.first_sent_at, OLD.sent_with)
       AND NOT (OLD.status = 'sending' AND NEW.status = 'released'
                AND NEW.first_sent_at IS NULL AND NEW.sent_with IS NULL) THEN
        RAISE EXCEPTION 'refund %: first_sent_at and sent_with never change', OLD.id
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status <> OLD.status AND NEW.status <> ALL (CASE OLD.status
            WHEN 'approved'  THEN ARRAY['held', 'released', 'cancelled', 'review']
            WHEN 'held'      THEN ARRAY['approved', 'cancelled', 'review']
            WHEN 'released'  THEN ARRAY['sending', 'approved', 'held']
            WHEN 'sending'   THEN ARRAY['accepted', 'settled', 'rejected', 'unknown', 'review', 'released']
            WHEN 'unknown'   THEN
                ARRAY['sending', 'accepted', 'settled', 'returned', 'reversed', 'rejected', 'review']
            WHEN 'accepted'  THEN ARRAY['settled', 'returned', 'reversed', 'rejected', 'review']
            WHEN 'settled'   THEN ARRAY['returned', 'review']
            WHEN 'review'    THEN ARRAY['accepted', 'rejected', 'settled', 'returned', 'reversed']
            WHEN 'reversed'  THEN ARRAY['review']
            WHEN 'returned'  THEN ARRAY['review']
            WHEN 'rejected'  THEN ARRAY['review']
            WHEN 'cancelled' THEN ARRAY['review']
        END) THEN
        RAISE EXCEPTION 'refund % can''t go from % to %', OLD.id, OLD.status, NEW.status
            USING ERRCODE = 'check_violation';
    END IF;
    -- A write-back remembers the updated_at it read, so two changes must never share one.
    IF NEW.status <> OLD.status OR NEW.updated_at <> OLD.updated_at THEN
        NEW.updated_at := GREATEST(NEW.updated_at, OLD.updated_at + interval '1 microsecond');
    END IF;
    RETURN NEW;
END $$;

-- Triggers of one kind fire in the order of their names, so this one is the first.
CREATE TRIGGER guard BEFORE INSERT OR UPDATE OR DELETE ON refund_ledger.refunds
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_refund();

-- Whether a refund, and all that it replaces to the first of the chain, moved no money or brought it back. It
-- reads with its owner's rights, and tells no more of a chain of reissues than the view of section 9 does.
CREATE FUNCTION refund_ledger.ended_unpaid(refund_id bigint) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE chain AS (
        SELECT status, replaces FROM refund_ledger.refunds WHERE id = refund_id
        UNION ALL
        SELECT r.status, r.replaces FROM refund_ledger.refunds AS r JOIN chain ON r.id = chain.replaces
    )
    SELECT COALESCE(bool_and(status IN ('rejected', 'returned', 'reversed')), false) FROM chain
$$;

-- A reissue pays the same again, so what it replaces must have ended unpaid, and it pays the same amount to
-- the same payee. The replaced row is locked, so that it cannot turn out to be paid before the commit.
CREATE FUNCTION refund_ledger.guard_reissue() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    replaced refund_ledger.refunds;
BEGIN
    SELECT * INTO replaced FROM refund_ledger.refunds WHERE id = NEW.replaces FOR SHARE;
    IF NOT refund_ledger.ended_unpaid(NEW.replaces) THEN
        RAISE EXCEPTION
            'refund % is %: only one that is rejected, returned or reversed, '
            'as all that it replaces, is replaced',
            NEW.replaces, COALESCE(replaced.status, 'not there') USING ERRCODE = 'check_violation';
    END IF;
    IF (NEW.source, NEW.amount, NEW.currency, NEW.payee_fingerprint, NEW.processing_terminal_id)
       IS DISTINCT FROM
       (replaced.source, replaced.amount, replaced.currency, replaced.payee_fingerprint,
        replaced.processing_terminal_id) THEN
        RAISE EXCEPTION 'a refund pays what the one that it replaces (%) was to pay', NEW.replaces
            USING ERRCODE = 'check_violation';
    END IF;
    -- The source has one row for both, and takes no news that is older than what it has.
    NEW.updated_at := GREATEST(NEW.updated_at, replaced.updated_at + interval '1 microsecond');
    RETURN NEW;
END $$;

-- Only reissues pay for the check.
CREATE TRIGGER guard_reissue BEFORE INSERT ON refund_ledger.refunds
    FOR EACH ROW WHEN (NEW.replaces IS NOT NULL) EXECUTE FUNCTION refund_ledger.guard_reissue();

-- Which role may make which change. It runs for each change of each refund. An expression of PL/pgSQL with a
-- query in it runs the query even where what stands before it has decided already; hence each query has an IF
-- of its own, and a role that is there is found without one.
CREATE FUNCTION refund_ledger.guard_roles_of_refunds() RETURNS trigger
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
        -- What the DAGs alone do: hold, release, send, and find out what became of what was sent.
        IF NEW.status IN ('released', 'sending', 'held', 'unknown')
           OR OLD.status IN ('sending', 'unknown') THEN
            IF NOT is_payer THEN
                PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status), 'refunds_payer');
            END IF;
        -- What an operator alone does: unhold, cancel, resolve. What is held may turn out to be paid; then it
        -- goes to review without one.
        ELSIF NEW.status = 'cancelled' OR OLD.status = 'review'
              OR (OLD.status = 'held' AND NEW.status <> 'review') THEN
            IF NOT is_operator THEN
                PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status), 'refunds_operator');
            END IF;
        ELSIF NOT (is_payer OR is_operator) THEN
            PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status),
                'refunds_payer', 'refunds_operator');
        END IF;
    END IF;
    IF NOT is_payer
       AND (NEW.attempts, NEW.first_sent_at, NEW.sent_with,
            NEW.released_by, NEW.released_run, NEW.released_at)
           IS DISTINCT FROM
           (OLD.attempts, OLD.first_sent_at, OLD.sent_with,
            OLD.released_by, OLD.released_run, OLD.released_at) THEN
        PERFORM refund_ledger.require('what is known of the sending', 'refunds_payer');
    END IF;
    -- Held to approved takes an operator, see above, and has its event.
    IF NEW.released_holds <> OLD.released_holds AND (OLD.status <> 'held' OR NEW.status <> 'approved') THEN
        RAISE EXCEPTION 'refund %: only what is held is released from a hold', OLD.id
            USING ERRCODE = 'check_violation';
    END IF;
    -- The payer decides what is released, with one exception: only an operator may set the largest amount
    -- that is released without anybody's look at it.
    IF OLD.status = 'approved' AND NEW.status = 'released'
       AND 'largest_refund' <> ALL (NEW.released_holds) THEN
        IF NEW.amount > (SELECT largest_refund FROM refund_ledger.refund_control WHERE scope = '*') THEN
            RAISE EXCEPTION 'refund % is larger than the largest that passes by itself', OLD.id
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    -- The key window starts again only when no attempt was processed: Payroc counts it from the first one
    -- that was, whatever it has answered.
    IF OLD.first_sent_at IS NOT NULL AND NEW.first_sent_at IS NULL THEN
        IF EXISTS (SELECT FROM refund_ledger.refund_attempts
                   WHERE refund_id = OLD.id
                     AND COALESCE(outcome, 'unknown') NOT IN ('not_sent', 'configuration')) THEN
            RAISE EXCEPTION 'refund %: an attempt may have reached Payroc', OLD.id
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    IF OLD.request IS NOT NULL AND NEW.request IS NULL AND NOT is_payer THEN
        PERFORM refund_ledger.require('the emptying of a request', 'refunds_payer');
    END IF;
    IF NEW.request_key IS DISTINCT FROM OLD.request_key
       OR (NEW.request IS NOT NULL AND NEW.request IS DISTINCT FROM OLD.request) THEN
        PERFORM refund_ledger.require('another encryption of a request', 'refunds_key_rotator');
    END IF;
    RETURN NEW;
END $$;

-- For what column rights cannot say: which status a role may set.
CREATE TRIGGER guard_roles BEFORE INSERT OR UPDATE ON refund_ledger.refunds
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_roles_of_refunds();

-- A refund counts against the limits once, from when it was first released; the database notes that moment
-- itself. One that turns out to be paid without having been released counts from then on: else a restored
-- ledger would forget it for totals, duplicates and new payees.
CREATE FUNCTION refund_ledger.note_first_release() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF OLD.first_released_at IS NOT NULL THEN
        NEW.first_released_at := OLD.first_released_at;
        NEW.first_released_run := OLD.first_released_run;
        NEW.first_released_approver := OLD.first_released_approver;
    ELSIF NEW.status = 'released' THEN
        NEW.first_released_at := NEW.released_at;
        NEW.first_released_run := NEW.released_run;
    ELSE
        NEW.first_released_at :=
            CASE WHEN NEW.status IN ('accepted', 'settled', 'returned', 'reversed') THEN NEW.updated_at END;
        NEW.first_released_run := NULL;
        NEW.first_released_approver := NULL;
    END IF;
    RETURN NEW;
END $$;

-- Nobody but this trigger decides when a refund counts.
CREATE TRIGGER note_first_release BEFORE UPDATE ON refund_ledger.refunds
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.note_first_release();

-- The event of a status, written by the database with its owner's rights: no way of changing a status can
-- forget it, and nobody can write one by hand.
CREATE FUNCTION refund_ledger.write_status_event() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- The actor is that of refund_ledger.actor(), which costs more to call than the rest of this.
    INSERT INTO refund_ledger.refund_events (event, refund_id, from_status, to_status, actor, reason)
    VALUES ('status', NEW.id, CASE WHEN TG_OP = 'UPDATE' THEN OLD.status END, NEW.status,
            COALESCE(NULLIF(current_setting('refund_ledger.actor', true), ''), session_user), NEW.reason);
    RETURN NULL;
END $$;

-- The first event of each refund.
CREATE TRIGGER event_of_a_new_refund AFTER INSERT ON refund_ledger.refunds
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.write_status_event();

-- An attempt that follows another one leaves the status at sending, and is an event too.
CREATE TRIGGER event_of_a_change AFTER UPDATE ON refund_ledger.refunds
    FOR EACH ROW WHEN (OLD.status <> NEW.status OR OLD.attempts <> NEW.attempts)
    EXECUTE FUNCTION refund_ledger.write_status_event();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.refunds
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();

-- The source_ref of the first refund of a chain of reissues: the only one that the source knows. It reads
-- with its owner's rights, and tells no more of a chain than the view of section 9 does.
CREATE FUNCTION refund_ledger.first_source_ref(refund_id bigint) RETURNS text
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE chain AS (
        SELECT source_ref, replaces FROM refund_ledger.refunds WHERE id = refund_id
        UNION ALL
        SELECT r.source_ref, r.replaces FROM refund_ledger.refunds AS r JOIN chain ON r.id = chain.replaces
    )
    SELECT source_ref FROM chain WHERE replaces IS NULL
$$;


-- 4  Attempts -----------------------------------------------------------------------------------------------

-- One row per claim, so per POST at most. It is committed before the POST and finished after it: a row
-- without an outcome is an attempt that may have reached Payroc.
CREATE TABLE refund_ledger.refund_attempts (
    -- Whose attempt it is.
    refund_id bigint NOT NULL REFERENCES refund_ledger.refunds (id),
    -- Its number, from 1; refunds.attempts has the newest.
    attempt integer NOT NULL CHECK (attempt > 0),
    -- The Airflow run that sent it.
    run_id text NOT NULL,
    -- Which of the run's mapped tasks; NULL when it was not a mapped one.
    map_index integer,
    -- Airflow's number of the task's try, from 1.
    try_number integer,
    -- When it was claimed.
    started_at timestamptz NOT NULL,
    -- When its outcome was recorded; NULL until then, and forever when its worker was killed.
    finished_at timestamptz,
    -- The status of Payroc's HTTP answer; NULL when there was none.
    http_status integer,
    -- The type of Payroc's problem, an address; NULL when it named none.
    problem_type text,
    -- What the answer proved. Not proven to be without effect is unknown; configuration and not_sent were
    -- never processed by Payroc.
    outcome text
        CHECK (outcome IN ('accepted', 'rejected', 'unknown', 'review', 'configuration', 'not_sent')),
    -- A refund has each number once, so two workers cannot both make an attempt.
    PRIMARY KEY (refund_id, attempt)
);

-- What a run sent, for its report.
CREATE INDEX attempts_by_run ON refund_ledger.refund_attempts (run_id);

-- An attempt belongs to the claim that was made for it. What may have reached Payroc is never called without
-- effect later, because that would allow another attempt.
CREATE FUNCTION refund_ledger.guard_attempt() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    without_effect CONSTANT text[] := '{rejected,configuration,not_sent}';
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NOT EXISTS (SELECT FROM refund_ledger.refunds
                       WHERE id = NEW.refund_id AND status = 'sending' AND attempts = NEW.attempt) THEN
            RAISE EXCEPTION 'attempt % of refund % was not claimed', NEW.attempt, NEW.refund_id
                USING ERRCODE = 'check_violation';
        END IF;
    ELSIF OLD.finished_at IS NOT NULL
          AND (NEW.outcome IS NULL
               OR (NEW.outcome = ANY (without_effect) AND OLD.outcome <> ALL (without_effect))) THEN
        RAISE EXCEPTION 'attempt % of refund % has ended as %', OLD.attempt, OLD.refund_id, OLD.outcome
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

-- Later attempts and the key window rest on what these rows say.
CREATE TRIGGER guard BEFORE INSERT OR UPDATE ON refund_ledger.refund_attempts
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_attempt();

-- An attempt that is gone would be one that never was.
CREATE TRIGGER never_deleted BEFORE DELETE ON refund_ledger.refund_attempts
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.refund_attempts
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();


-- 5  Events and their seals ---------------------------------------------------------------------------------

-- The audit trail: one row per change of a status, a limit, a pause or a bond, and per decision. Only ever
-- inserted.
CREATE TABLE refund_ledger.refund_events (
    -- Its number, from number_event. Numbers of transactions that were rolled back are missing.
    id bigint PRIMARY KEY,
    -- When it happened, from number_event.
    at timestamptz NOT NULL,
    -- What happened. The database itself writes status, pause, resume, limit, restore, and the bonds
    -- environment, source and fingerprint_check; who may write the others is guard_roles_of_events' to say.
    event text NOT NULL CHECK (event IN (
        'status', 'contradiction', 'pause', 'resume', 'environment', 'source', 'fingerprint_check',
        'proposal', 'reverse', 'limit', 'approval', 'rejection', 'rotation', 'restore', 'not_understood')),
    -- Which refund it is about; NULL when it is about none.
    refund_id bigint REFERENCES refund_ledger.refunds (id),
    -- The status before; NULL for a new refund and for an event of another kind.
    from_status text,
    -- The status after; NULL for an event of another kind.
    to_status text,
    -- Who did it, as the program says.
    actor text NOT NULL,
    -- Why, in a sentence for people, without bank data.
    reason text,
    -- What else belongs to it, such as a limit's old and new value.
    detail jsonb,
    -- Which login wrote it, from number_event.
    login text NOT NULL
);

-- The numbers of events. It belongs to their column, and no role may draw from it.
CREATE SEQUENCE refund_ledger.event_numbers OWNED BY refund_ledger.refund_events.id;

-- The history of one refund.
CREATE INDEX events_by_refund ON refund_ledger.refund_events (refund_id, id);

-- Number, time and login are the database's, whoever writes the event. The transaction gets its id before
-- the event draws its number: a number that is missing belongs to a transaction that is older than the next
-- number. seal() rests on that.
CREATE FUNCTION refund_ledger.number_event() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    older CONSTANT xid8 := pg_current_xact_id();
BEGIN
    NEW.id := nextval('refund_ledger.event_numbers');
    NEW.at := refund_ledger.now();
    NEW.login := session_user;
    RETURN NEW;
END $$;

-- Roles have no right to these columns; this is for the owner's functions.
CREATE TRIGGER number BEFORE INSERT ON refund_ledger.refund_events
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.number_event();

-- Whose event it is. A login without the role cannot write a decision that was never made.
CREATE FUNCTION refund_ledger.guard_roles_of_events() RETURNS trigger
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

-- The right to INSERT says nothing about which events.
CREATE TRIGGER guard_roles BEFORE INSERT ON refund_ledger.refund_events
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_roles_of_events();

-- History is never changed.
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON refund_ledger.refund_events
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.refund_events
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();

-- One row per seal: a hash over a batch of events and over the seal before. Only seal() makes seals, after
-- the events are committed, so no transaction with an event waits for another one. The hash of the newest
-- seal is in every report: who rewrites the trail has to rewrite those too.
CREATE TABLE refund_ledger.event_seals (
    -- Its number, from 1 and without a gap.
    number bigint PRIMARY KEY CHECK (number > 0),
    -- How many events are sealed so far, its own included. Reports show it with the hash: "position:hash".
    position bigint NOT NULL CHECK (position > 0),
    -- The ids that it seals, exactly.
    events int8multirange NOT NULL,
    -- The ids below next_event that no seal holds and that may still come: their transactions had not
    -- committed, or were rolled back.
    pending int8multirange NOT NULL,
    -- One more than the greatest id that any seal holds. It never goes back.
    next_event bigint NOT NULL,
    -- A transaction id greater than that of any transaction with a pending id. Once no older transaction
    -- runs, what is still pending never comes.
    pending_until xid8 NOT NULL,
    -- Which cluster that transaction id is of. A restore into another one starts them again.
    cluster bigint NOT NULL,
    -- When it was made.
    sealed_at timestamptz NOT NULL,
    -- SHA-256 over the hash before it, its other columns, and its events in the order of their ids.
    -- include/refunds/audit.py computes the same.
    hash bytea NOT NULL CHECK (length(hash) = 32)
);

-- A seal is never changed.
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON refund_ledger.event_seals
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.event_seals
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();

-- Locked while a seal is made; it has no columns and no rows. Only the owner may lock it. The lock of a row
-- would need a transaction id, which seal() must not have yet when it reads.
CREATE TABLE refund_ledger.seal_lock ();

-- Seal up to `most` events, at most 20,000, in a transaction of its own. It returns how many it sealed and
-- the end of the newest seal; no row when another session is sealing, for nobody waits for a seal.
CREATE FUNCTION refund_ledger.seal(most integer DEFAULT 20000)
    RETURNS TABLE (sealed bigint, "position" bigint, hash bytea)
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    last    refund_ledger.event_seals;
    new     refund_ledger.event_seals;
    drawn   bigint;
    horizon xid8;
    newest  bigint;
    body    bytea;
BEGIN
    -- Each statement below has to see what committed before it.
    IF pg_current_xact_id_if_assigned() IS NOT NULL
       OR current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'events are sealed in a transaction of its own, in read committed'
            USING ERRCODE = 'active_sql_transaction';
    END IF;
    BEGIN
        LOCK TABLE refund_ledger.seal_lock IN EXCLUSIVE MODE NOWAIT;
    EXCEPTION WHEN lock_not_available THEN
        RETURN;
    END;
    most := LEAST(most, 20000);
    SELECT * INTO last FROM refund_ledger.event_seals ORDER BY number DESC LIMIT 1;
    last.next_event := COALESCE(last.next_event, 1);
    last.pending := COALESCE(last.pending, '{}');
    new.cluster := (SELECT system_identifier FROM pg_control_system());
    -- An id that the ledger has not drawn is not from its trigger, and would leave a hole up to it.
    drawn := (SELECT last_value FROM refund_ledger.event_numbers);
    -- First the horizon, then the events: what has ended before it, the next statement sees. It rests on
    -- nothing else, so a login that keeps a transaction open delays only that holes are given up.
    horizon := pg_snapshot_xmin(pg_current_snapshot());
    WITH candidates AS (
        (SELECT id, at, event, refund_id, from_status, to_status, actor, login, reason, detail
         FROM refund_ledger.refund_events
         WHERE id >= last.next_event AND id <= drawn ORDER BY id LIMIT most)
        UNION ALL
        SELECT late.*
        FROM unnest(last.pending) AS ids CROSS JOIN LATERAL (
            SELECT id, at, event, refund_id, from_status, to_status, actor, login, reason, detail
            FROM refund_ledger.refund_events
            WHERE id >= lower(ids) AND id < upper(ids) ORDER BY id LIMIT most) AS late
    ), batch AS (
        SELECT * FROM candidates ORDER BY id LIMIT most
    )
    -- The binary form of a row has each value with its type and length, so no two rows have the same.
    SELECT count(*), max(id), range_agg(int8range(id, id + 1)), string_agg(record_send(batch), '' ORDER BY id)
    INTO sealed, newest, new.events, body FROM batch;
    IF sealed > 0 THEN
        -- An event's transaction has its id before the event draws its number. So whoever drew a number
        -- below the newest one has an older transaction than this one, which gets its id here, after the
        -- events were read. (The end of a snapshot is no such bound: a transaction may be running that is
        -- younger than it.)
        new.pending_until := pg_current_xact_id();
        new.number := COALESCE(last.number, 0) + 1;
        new.position := COALESCE(last.position, 0) + sealed;
        new.next_event := GREATEST(last.next_event, newest + 1);
        new.sealed_at := refund_ledger.now();
        -- A full batch may have left out pending events that are there by now.
        IF sealed < most AND (last.cluster <> new.cluster OR last.pending_until <= horizon) THEN
            last.pending := '{}';
        END IF;
        new.pending :=
            last.pending + int8multirange(int8range(last.next_event, new.next_event)) - new.events;
        new.hash := sha256(COALESCE(last.hash, '') || (
            SELECT record_send(header)
            FROM (SELECT new.number, new.position, new.events, new.pending, new.next_event,
                         new.pending_until, new.cluster, new.sealed_at) AS header) || body);
        INSERT INTO refund_ledger.event_seals VALUES (new.*);
        last := new;
    END IF;
    position := last.position;
    hash := last.hash;
    RETURN NEXT;
END $$;


-- 6  Runs ---------------------------------------------------------------------------------------------------

-- One row per run of the DAG that pulled: what it is about, what was asked and answered, what it released. A
-- pull that is repeated starts the row again and takes its approval back.
CREATE TABLE refund_ledger.refund_runs (
    -- Airflow's id of the run.
    run_id text PRIMARY KEY,
    -- The run's params, as they were given.
    params jsonb NOT NULL,
    -- How many refunds it would release.
    candidates integer NOT NULL,
    -- Their number and sum per currency.
    candidate_totals jsonb NOT NULL,
    -- A hash of their ids. An approval is of exactly these.
    candidates_hash text NOT NULL,
    -- Whether the thresholds asked for an approval; NULL until that was found out.
    approval_needed boolean,
    -- Who approved the run in Airflow; NULL when nobody had to, or has yet.
    approved_by text,
    -- When they did.
    approved_at timestamptz,
    -- The candidates_hash that may be released; NULL while none may.
    approved_hash text,
    -- How many it released.
    released integer,
    -- Their number and sum per currency.
    released_totals jsonb,
    -- What its report has to name, by kind.
    findings jsonb NOT NULL DEFAULT '{}',
    -- When its pull began.
    started_at timestamptz NOT NULL,
    -- When it was reported.
    finished_at timestamptz,
    -- What the thresholds look at: sums of what it would release for the first time, new payees, and what it
    -- would release again.
    approval_basis jsonb NOT NULL DEFAULT '{}',
    -- The refunds it would release.
    candidate_ids bigint[] NOT NULL DEFAULT '{}',
    -- The candidates_hash that was asked about. An answer about other candidates counts for nothing.
    asked_hash text,
    -- The question as it was shown. Airflow shows the first one again after a clear, so a run asks only one.
    question text,
    -- Who rejected the run in Airflow.
    rejected_by text,
    -- When they did.
    rejected_at timestamptz,
    -- What this run has released for the first time, per currency: counted against the limits of a run.
    counted jsonb NOT NULL DEFAULT '{}',
    -- What it had released before it was pulled again: counted against the thresholds, even if that was
    -- approved.
    counted_before jsonb NOT NULL DEFAULT '{}'
);


-- 7  Control: pauses, bonds, limits, restore ----------------------------------------------------------------

-- One row for everything ('*') and one for each terminal that was ever paused.
CREATE TABLE refund_ledger.refund_control (
    -- '*' or a processing terminal id.
    scope text PRIMARY KEY,

    -- Bonds: what the ledger belongs to. Set once, never changed (guard_control).

    -- Payroc's API base URL. Keys mean nothing at another Payroc.
    environment text,
    -- The source's name. Under another one the same refunds would have other keys, and be paid again.
    source text,
    -- A hash that only the same fingerprint key gives. With another one no payee would be recognised.
    fingerprint_check text,

    -- The pause. The payer and operators begin one, an operator alone ends it.

    -- Since when sending is paused; NULL when it is not.
    paused_at timestamptz,
    -- Who paused it.
    paused_by text,
    -- Why they did, in a sentence that every command and report shows.
    pause_reason text,

    -- Limits, in the row '*' alone. NULL allows everything. Totals are in minor units and apply to each
    -- currency separately; counts apply to all currencies together.

    -- A larger refund is held.
    largest_refund bigint CHECK (largest_refund > 0),
    -- The sum that one run releases; the rest waits.
    run_total bigint CHECK (run_total > 0),
    -- The number of refunds that one run releases; the rest waits.
    run_count bigint CHECK (run_count > 0),
    -- The sum that a day releases; the rest waits.
    day_total bigint CHECK (day_total > 0),
    -- The number of refunds that a day releases; the rest waits.
    day_count bigint CHECK (day_count > 0),
    -- The sum for one payee within payee_days; a refund that would exceed it is held.
    payee_total bigint CHECK (payee_total > 0),
    -- The number of refunds for one payee within payee_days; a refund that would exceed it is held.
    payee_count bigint CHECK (payee_count > 0),
    -- The days of those two, at most a year.
    payee_days bigint CHECK (payee_days BETWEEN 1 AND 366),
    -- A refund of the same payee and amount as another one within these days is held.
    duplicate_days bigint CHECK (duplicate_days BETWEEN 1 AND 366),
    -- The sum that a day releases without an approval of the run; above it the run needs one. 0 asks always.
    approval_total bigint CHECK (approval_total >= 0),
    -- The number of refunds that a day releases without an approval of the run; above it the run needs one.
    approval_count bigint CHECK (approval_count >= 0),

    -- A restore.

    -- From when the ledger may have forgotten things: it was restored from a backup and not yet compared with
    -- Payroc. NULL otherwise.
    restored_to timestamptz,

    -- A terminal has a pause of its own, and nothing else.
    CONSTRAINT only_pauses_belong_to_a_terminal CHECK (scope = '*' OR num_nonnulls(
        environment, source, fingerprint_check, largest_refund, run_total, run_count, day_total, day_count,
        payee_total, payee_count, payee_days, duplicate_days, approval_total, approval_count) = 0),
    -- Every command and report shows who and why.
    CONSTRAINT pause_says_by_whom_and_why CHECK (
        paused_at IS NULL OR (paused_by IS NOT NULL AND pause_reason IS NOT NULL)),
    -- A limit per payee without its days would mean nothing.
    CONSTRAINT a_payees_cap_has_its_days CHECK (
        num_nonnulls(payee_total, payee_count) = 0 OR payee_days IS NOT NULL),
    -- What was forgotten could be paid again, so nothing is sent until the comparison has come to its end.
    CONSTRAINT a_restored_ledger_is_paused CHECK (
        restored_to IS NULL OR (scope = '*' AND paused_at IS NOT NULL))
);

-- The row for everything is there from the beginning: limits and bonds are updates of it.
INSERT INTO refund_ledger.refund_control (scope) VALUES ('*');

-- What the right to UPDATE a column cannot say: a bond is set once, only an operator ends or changes a pause
-- or sets a limit. What is no limit is named, so a new column is one until somebody decides otherwise.
CREATE FUNCTION refund_ledger.guard_control() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    no_limits CONSTANT text[] :=
        '{scope,environment,source,fingerprint_check,paused_at,paused_by,pause_reason}';
BEGIN
    IF (OLD.environment IS NOT NULL AND NEW.environment IS DISTINCT FROM OLD.environment)
       OR (OLD.source IS NOT NULL AND NEW.source IS DISTINCT FROM OLD.source)
       OR (OLD.fingerprint_check IS NOT NULL
           AND NEW.fingerprint_check IS DISTINCT FROM OLD.fingerprint_check) THEN
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

-- An INSERT needs no guard: its columns are the pause of a terminal, which both roles may begin.
CREATE TRIGGER guard BEFORE UPDATE ON refund_ledger.refund_control
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_control();

-- The events of a pause, a bond, a limit and a restore, written by the database with its owner's rights: no
-- way of changing one of them can forget its event. The program gives the reason as a setting of its
-- transaction.
CREATE FUNCTION refund_ledger.write_control_events() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    before  jsonb := CASE WHEN TG_OP = 'UPDATE' THEN to_jsonb(OLD) ELSE '{}' END;
    after   jsonb := to_jsonb(NEW);
    because text := NULLIF(current_setting('refund_ledger.reason', true), '');
    name    text;
    kind    text;
BEGIN
    IF NEW.paused_at IS NOT NULL
       AND (before ->> 'paused_at', before ->> 'paused_by', before ->> 'pause_reason')
           IS DISTINCT FROM (after ->> 'paused_at', after ->> 'paused_by', after ->> 'pause_reason') THEN
        INSERT INTO refund_ledger.refund_events (event, actor, reason, detail)
        VALUES ('pause', NEW.paused_by, NEW.pause_reason,
                jsonb_build_object('scope', NEW.scope));
    ELSIF NEW.paused_at IS NULL AND before ->> 'paused_at' IS NOT NULL THEN
        INSERT INTO refund_ledger.refund_events (event, actor, reason, detail)
        VALUES ('resume', refund_ledger.actor(), because, jsonb_build_object('scope', NEW.scope));
    END IF;
    FOR name IN SELECT key
                FROM jsonb_object_keys(after - '{scope,paused_at,paused_by,pause_reason}'::text[])
                     AS keys (key)
                WHERE before -> key IS DISTINCT FROM after -> key
                  AND COALESCE(before ->> key, after ->> key) IS NOT NULL
                ORDER BY key LOOP
        kind := CASE WHEN name IN ('environment', 'source', 'fingerprint_check') THEN name
                     WHEN name = 'restored_to' THEN 'restore' ELSE 'limit' END;
        INSERT INTO refund_ledger.refund_events (event, actor, reason, detail)
        VALUES (kind, refund_ledger.actor(),
                CASE WHEN kind = name THEN after ->> name ELSE because END,
                CASE kind
                    WHEN 'limit' THEN
                        jsonb_build_object('limit', name, 'from', before -> name, 'to', after -> name)
                    WHEN 'restore' THEN jsonb_build_object('from', before -> name, 'to', after -> name)
                END);
    END LOOP;
    RETURN NULL;
END $$;

-- For an INSERT too: a terminal's first pause makes its row.
CREATE TRIGGER events AFTER INSERT OR UPDATE ON refund_ledger.refund_control
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.write_control_events();


-- 8  Invalid rows and write-back notes ----------------------------------------------------------------------

-- Source rows that cannot become refunds, each with what is wrong. A row that is valid later is forgotten.
CREATE TABLE refund_ledger.invalid_rows (
    -- The source's name.
    source text NOT NULL,
    -- The id of the row, or its place in the pull, such as "(row 3)", when it has none.
    source_ref text NOT NULL,
    -- What is wrong, by column, without a value of the row.
    errors jsonb NOT NULL,
    -- When a pull first found it.
    first_seen_at timestamptz NOT NULL,
    -- When a pull last found it.
    last_seen_at timestamptz NOT NULL,
    -- When its errors last changed.
    updated_at timestamptz NOT NULL,
    -- The updated_at that the source has; any other value means that the row is due to be written.
    written_back_at timestamptz,
    -- A row is invalid once, however often it is pulled.
    PRIMARY KEY (source, source_ref)
);

-- Source rows whose write-back needs or needed attention; all others have no note.
CREATE TABLE refund_ledger.write_back_notes (
    -- The source's name.
    source text NOT NULL,
    -- The id of the row.
    source_ref text NOT NULL,
    -- Why it could not be written, without a value of the row; NULL once it is written.
    problem text CHECK (length(problem) BETWEEN 1 AND 500),
    -- Since when it could not be written.
    problem_since timestamptz,
    -- When the source offered the row again after its refund had ended, and it was made due again.
    offered_again_at timestamptz,
    -- A row has one note.
    PRIMARY KEY (source, source_ref),
    -- A report says since when a row is unwritten.
    CONSTRAINT problem_says_since_when CHECK ((problem IS NULL) = (problem_since IS NULL))
);

-- The rows with a problem, which every report names; notes without one stay and grow in number.
CREATE INDEX unwritten_rows ON refund_ledger.write_back_notes (source, source_ref) WHERE problem IS NOT NULL;


-- 9  The view without requests ------------------------------------------------------------------------------

-- What reports, people and auditors look at: every refund without its frozen request, the request's hash, the
-- folded texts and the hash of the API key. It reads with its owner's rights, so that the auditor needs none
-- on the table.
CREATE VIEW refund_ledger.refunds_masked AS
SELECT id, source, source_ref, processing_terminal_id, order_id, description, amount, currency,
       payee_last4, payee_fingerprint, requested_by, approved_by, approved_at, idempotency_key,
       status, reason, released_by, released_run, released_at,
       first_released_at, first_released_run, first_released_approver, run_rejected_by, holds, released_holds,
       attempts, first_sent_at, lease_until, next_attempt_at,
       payroc_refund_id, payroc_status, payroc_seen_at, replaces, created_at, updated_at, written_back_at,
       request IS NOT NULL AS has_request, request_key
FROM refund_ledger.refunds;


-- 10  Who may do what ---------------------------------------------------------------------------------------

-- Columns are granted rather than tables: with a right to UPDATE or DELETE on a table a login may lock the
-- whole of it. Two tables are granted as a whole, refund_runs and invalid_rows; a lock of those stops no
-- pause.

-- Nobody has a right that is not named here, whatever defaults the database has.
REVOKE ALL ON ALL TABLES IN SCHEMA refund_ledger FROM PUBLIC;

-- The same for functions, which anybody may otherwise execute: one could be the trigger of somebody else's
-- table.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA refund_ledger FROM PUBLIC;

-- Whoever works with the ledger has to find its objects.
GRANT USAGE ON SCHEMA refund_ledger TO refunds_payer, refunds_operator, refunds_auditor, refunds_key_rotator;

-- Everything except the requests, for all who report.
GRANT SELECT ON refund_ledger.refunds_masked, refund_ledger.refund_attempts, refund_ledger.refund_events,
    refund_ledger.event_numbers, refund_ledger.event_seals, refund_ledger.refund_runs,
    refund_ledger.refund_control, refund_ledger.invalid_rows, refund_ledger.write_back_notes
    TO refunds_payer, refunds_operator, refunds_auditor;

-- Everybody checks that the ledger is at the revision that the program knows.
GRANT SELECT ON refund_ledger.schema_version
    TO refunds_payer, refunds_operator, refunds_auditor, refunds_key_rotator;

-- Reports and write-backs look at chains of reissues.
GRANT EXECUTE ON FUNCTION refund_ledger.ended_unpaid(bigint), refund_ledger.first_source_ref(bigint)
    TO refunds_payer, refunds_operator, refunds_auditor;

-- Whoever works with the ledger asks it for the time.
GRANT EXECUTE ON FUNCTION refund_ledger.now()
    TO refunds_payer, refunds_operator, refunds_auditor, refunds_key_rotator;

-- The guards call it with the rights of the login that they guard against.
GRANT EXECUTE ON FUNCTION refund_ledger.require(text, text[])
    TO refunds_payer, refunds_operator, refunds_key_rotator;

-- The payer and operators send and decide by what the refund says, its encrypted request included.
GRANT SELECT ON refund_ledger.refunds TO refunds_payer, refunds_operator;

-- The payer stores what was approved, and never changes it.
GRANT INSERT (source, source_ref, source_ref_folded, processing_terminal_id, order_id, description, amount,
        currency, payee_last4, payee_fingerprint, request, request_sha256, request_key,
        requested_by, requested_by_folded, approved_by, approved_by_folded, approved_at,
        idempotency_key, created_at, updated_at)
    ON refund_ledger.refunds TO refunds_payer;

-- The payer moves a refund along its graph, empties its request after the end, and notes what was written
-- back.
GRANT UPDATE (status, reason, holds, released_by, released_run, released_at, first_released_approver,
        run_rejected_by, attempts, first_sent_at, sent_with, lease_until, next_attempt_at, payroc_refund_id,
        payroc_status, payroc_seen_at, request, updated_at, written_back_at)
    ON refund_ledger.refunds TO refunds_payer;

-- An operator inserts reissues, which alone have these columns: replaces and a reason.
GRANT INSERT (source, source_ref, source_ref_folded, processing_terminal_id, order_id, description, amount,
        currency, payee_last4, payee_fingerprint, request, request_sha256, request_key,
        requested_by, requested_by_folded, approved_by, approved_by_folded, approved_at,
        idempotency_key, replaces, reason, created_at, updated_at)
    ON refund_ledger.refunds TO refunds_operator;

-- An operator unholds, cancels, resolves and takes over what Payroc says. first_sent_at and sent_with may be
-- named in an UPDATE and not changed (guard_roles_of_refunds).
GRANT UPDATE (status, reason, holds, released_holds, first_sent_at, sent_with, lease_until, next_attempt_at,
        payroc_refund_id, payroc_status, payroc_seen_at, updated_at)
    ON refund_ledger.refunds TO refunds_operator;

-- A rotation reads encrypted requests; it sees neither amount nor payee.
GRANT SELECT (id, source, request, request_key, request_sha256)
    ON refund_ledger.refunds TO refunds_key_rotator;

-- A rotation puts another encryption of the same bytes in their place.
GRANT UPDATE (request, request_key) ON refund_ledger.refunds TO refunds_key_rotator;

-- The payer claims an attempt.
GRANT INSERT (refund_id, attempt, run_id, map_index, try_number, started_at)
    ON refund_ledger.refund_attempts TO refunds_payer;

-- The payer records how it ended.
GRANT UPDATE (finished_at, http_status, problem_type, outcome)
    ON refund_ledger.refund_attempts TO refunds_payer;

-- Events that the database does not write itself. Who may write which: guard_roles_of_events. Number, time
-- and login nobody gives.
GRANT INSERT (event, refund_id, actor, reason, detail)
    ON refund_ledger.refund_events TO refunds_payer, refunds_operator, refunds_key_rotator;

-- Whoever leaves events seals them. Nobody may insert a seal.
GRANT EXECUTE ON FUNCTION refund_ledger.seal(integer)
    TO refunds_payer, refunds_operator, refunds_key_rotator;

-- The payer notes what a run is about, and the answer that was given in Airflow.
GRANT INSERT, UPDATE ON refund_ledger.refund_runs TO refunds_payer;

-- The payer binds the ledger to the first Payroc, source and fingerprint key that it works with.
GRANT UPDATE (environment, source, fingerprint_check) ON refund_ledger.refund_control TO refunds_payer;

-- Whoever sees something wrong may pause. A terminal's first pause is a new row.
GRANT INSERT (scope, paused_at, paused_by, pause_reason)
    ON refund_ledger.refund_control TO refunds_payer, refunds_operator;

-- Later pauses are updates. Ending one takes an operator (guard_control).
GRANT UPDATE (paused_at, paused_by, pause_reason)
    ON refund_ledger.refund_control TO refunds_payer, refunds_operator;

-- Operators set limits, and begin and end what follows a restore.
GRANT UPDATE (largest_refund, run_total, run_count, day_total, day_count, payee_total, payee_count,
        payee_days, duplicate_days, approval_total, approval_count, restored_to)
    ON refund_ledger.refund_control TO refunds_operator;

-- The payer notes invalid rows, and forgets those that are valid now.
GRANT INSERT, UPDATE, DELETE ON refund_ledger.invalid_rows TO refunds_payer;

-- The payer notes rows that could not be written back.
GRANT INSERT (source, source_ref, problem, problem_since, offered_again_at)
    ON refund_ledger.write_back_notes TO refunds_payer;

-- The payer notes that such a row is written now, or was offered again.
GRANT UPDATE (problem, problem_since, offered_again_at) ON refund_ledger.write_back_notes TO refunds_payer;
