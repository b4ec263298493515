-- The ledger: every refund, what became of it, who decided about it, and who may change what.
--
-- Read it from top to bottom. Migration 0001 executes exactly this file, in one transaction and after it has
-- made the roles: every other object of the database is defined here and nowhere else.
--
--   1  Schema and owner
--   2  Functions that several tables use
--   3  Refunds: what was approved
--   4  Refunds: what happens to them
--   5  Attempts
--   6  Events and their seals
--   7  Runs
--   8  Pauses, the gate, limits, bindings, the turn of the write-back
--   9  Invalid rows and write-back notes
--   10 Terminals, and what Payroc lists that no refund has
--   11 The view of all refunds
--   12 Who may do what
--
-- What was approved never changes, so it is a table of its own, and so is the frozen request, which holds the
-- bank data. What happens to a refund is a narrow row beside them. The view of section 11 puts them together.
--
-- The life of a refund: it is approved; a limit may hold it until an operator unholds or cancels it; a run
-- releases it, which is the only gate to Payroc; a worker sends it. Then Payroc has accepted or rejected it,
-- or nobody knows (unknown) and it is looked up or sent again with the same key and the same bytes. What is
-- accepted settles; a bank may return it, an operator may reverse it. What nobody but an operator can decide
-- is in review. A restored ledger has forgotten what it sent: when Payroc's list shows an object with the key
-- of a refund that was never sent from here, that refund takes the object's status, or goes to review if they
-- differ. Section 4 has the complete graph, in guard_state.
--
-- Why a refund is not paid twice. Its key derives from the source row (key_is_derived) and its body is
-- frozen, so Payroc answers a second POST with the first answer, for 7 days; the program sends no refund
-- whose first POST is 6 days old (first_sent_at). Only one attempt at a time has the refund: a claim gives it
-- a number and a lease, and from the last check until the fence the program claims no other one (lease_until,
-- fence_until, refund_attempts). What this ledger may have forgotten is on Payroc's list, which has to be
-- known before a first POST (terminals, foreign_refunds). The conditions that claim and last check share are
-- in include/refunds/ledger/conditions.py.
--
-- Roles. They belong to the server and cannot log in; each login is granted one of them.
--
--   refunds_migrator     owns everything here and migrates it
--   refunds_payer        the DAGs: pull, release, send, look up, write back
--   refunds_operator     the command line: pause and resume, set limits, unhold, cancel, resolve, reissue
--   refunds_auditor      reads everything except the requests and the hash of the API key
--   refunds_key_rotator  encrypts the requests with another key
--
-- refunds_requester and refunds_approver have rights in the source, and none here.
--
-- Words. A time is the ledger database's clock unless its comment says otherwise. An amount is in minor units
-- of its currency, such as cents. The last check is the transaction right before a POST, which asks once more
-- whether it may leave. The gate is the release of refunds by a run. A "folded" form is a text without the
-- differences that people do not see (case, accents composed or not, width, runs of blanks, invisible
-- characters); Python folds, in include/refunds/text.py, because Postgres would fold some letters
-- differently. A trigger says what a right on columns cannot. An index stands below its table, with the
-- question that needs it.


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

-- Every function here except now() sets its search path: with the caller's, operators of a schema of the
-- caller's could stand in the place of `=` and `<>`.

-- Raise an error unless the caller has one of these roles. In a function with its owner's rights the login
-- behind the call counts.
CREATE FUNCTION refund_ledger.require(what text, VARIADIC roles text[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    login CONSTANT name :=
        CASE WHEN current_user = 'refunds_migrator' THEN session_user ELSE current_user END;
BEGIN
    IF NOT EXISTS (SELECT FROM unnest(roles) AS role WHERE pg_has_role(login, role, 'USAGE')) THEN
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


-- 3  Refunds: what was approved -----------------------------------------------------------------------------

-- A text as Python's json.dumps writes it: in ASCII, with \u and four hex digits for everything else.
CREATE FUNCTION refund_ledger.json_text(value text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
    SELECT '"' || COALESCE(string_agg(CASE
            WHEN letter IN ('"', '\') THEN '\' || letter
            WHEN code BETWEEN 32 AND 126 THEN letter
            WHEN code IN (8, 9, 10, 12, 13) THEN '\' || translate(letter, E'\b\t\n\f\r', 'btnfr')
            WHEN code < 65536 THEN '\u' || lpad(to_hex(code), 4, '0')
            -- Beyond the first 65,536 code points JSON has two surrogates.
            ELSE '\u' || to_hex(55296 + ((code - 65536) >> 10))
                || '\u' || to_hex(56320 + ((code - 65536) & 1023))
        END, '' ORDER BY place), '') || '"'
    FROM unnest(string_to_array(value, NULL)) WITH ORDINALITY AS letters (letter, place),
         LATERAL (SELECT ascii(letter)) AS codes (code)
$$;

-- The idempotency key of a refund, as idempotency_key of include/refunds/keys.py derives it: the first half
-- of the SHA-256 of json.dumps([source, source_ref]), with the bits that say "UUID, version 4". Names in
-- plain ASCII, nearly all there are, take a way that is ten times as short.
CREATE FUNCTION refund_ledger.refund_key(source text, source_ref text) RETURNS uuid
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    json text;
    half bytea;
BEGIN
    IF source || source_ref ~ '[^ -~]' THEN
        json := '[' || refund_ledger.json_text(source) || ', ' || refund_ledger.json_text(source_ref) || ']';
    ELSE
        json := '["' || replace(replace(source, '\', '\\'), '"', '\"')
            || '", "' || replace(replace(source_ref, '\', '\\'), '"', '\"') || '"]';
    END IF;
    half := substring(sha256(convert_to(json, 'UTF8')) FROM 1 FOR 16);
    half := set_byte(half, 6, get_byte(half, 6) & 15 | 64);
    half := set_byte(half, 8, get_byte(half, 8) & 63 | 128);
    RETURN encode(half, 'hex')::uuid;
END $$;

-- One row per approved refund, and per reissue: what was approved. A row is inserted once and never changed:
-- no role has the right, and a trigger refuses it to the owner too.
CREATE TABLE refund_ledger.refund_instructions (
    -- The ledger's number of the refund; tasks and operators name it by this.
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
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
    -- The key that every attempt sends. Unique, and derived (key_is_derived): so a source row becomes a
    -- refund once, however often it is pulled, and a row is found by its source_ref.
    idempotency_key uuid NOT NULL UNIQUE,
    -- The refund that this one pays again (a reissue); NULL for all that come from the source.
    replaces bigint REFERENCES refund_ledger.refund_instructions (id),
    -- Why it is paid again, in a sentence for people; NULL for all that come from the source.
    reissue_reason text,
    -- When the ledger stored it.
    created_at timestamptz NOT NULL,

    -- A random key, or another refund's, would let this refund be paid twice, so the key has to be the one
    -- that derives from source and source_ref.
    CONSTRAINT key_is_derived CHECK (idempotency_key = refund_ledger.refund_key(source, source_ref)),
    -- Two spellings of one id are not two refunds. A pull finds its rows by it.
    CONSTRAINT one_refund_per_spelling UNIQUE (source, source_ref_folded),
    -- A refund is looked up by terminal and order, so no two share both. The order first: people search by
    -- it.
    CONSTRAINT one_refund_per_order UNIQUE (order_id, processing_terminal_id),
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
    -- A reissue shows why it was made, and nothing else does.
    CONSTRAINT reissue_says_why CHECK ((replaces IS NULL) = (reissue_reason IS NULL))
);

-- The frozen body holds the refund's own key, so two refunds never have the same body. A login without the
-- encryption key, which cannot make a body, so cannot use another refund's either. As bytes a hash takes half
-- the room.
CREATE UNIQUE INDEX one_refund_per_request
    ON refund_ledger.refund_instructions (decode(request_sha256, 'hex'));

-- A refund is replaced at most once. The write-back and an operator's decisions ask by what a refund is
-- replaced.
-- Hardly any is: without the others the index is next to nothing.
CREATE UNIQUE INDEX one_reissue_per_refund ON refund_ledger.refund_instructions (replaces)
    WHERE replaces IS NOT NULL;

-- The frozen requests: the bodies that are sent, encrypted; they hold the bank data. A body is made once,
-- when its refund is stored, and every attempt sends the same bytes. It is emptied some time after its
-- refund has ended; from then on the refund can be neither sent nor reissued.
CREATE TABLE refund_ledger.frozen_requests (
    -- Whose body it is; a refund has one.
    refund_id bigint PRIMARY KEY REFERENCES refund_ledger.refund_instructions (id),
    -- The body that every attempt sends. The follow-up empties it some time (PAYROC_REFUNDS_REQUEST_DAYS)
    -- after the refund has settled or ended otherwise; then it stays NULL.
    request bytea,
    -- Which key encrypted it, by the first digits of the key's hash; a rotation finds by it what is left to
    -- do.
    request_key text
);

-- The bodies that are kept, for their emptying and a rotation; of a large ledger most are emptied.
CREATE INDEX requests_kept ON refund_ledger.frozen_requests (refund_id) WHERE request IS NOT NULL;

-- Only the payer inserts refunds from the source, only an operator inserts reissues. A reissue pays the same
-- again, so what it replaces must be rejected, returned or reversed (a cancelled refund is never paid, so it
-- is not replaced either), and it pays the same amount to the same payee. The replaced refund is locked, so
-- that it cannot turn out to be paid before the commit.
CREATE FUNCTION refund_ledger.guard_instruction() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    replaced   refund_ledger.refund_instructions;
    its_status text;
BEGIN
    IF NEW.replaces IS NULL THEN
        IF NOT pg_has_role(current_user, 'refunds_payer', 'USAGE') THEN
            PERFORM refund_ledger.require('a refund from the source', 'refunds_payer');
        END IF;
        RETURN NEW;
    END IF;
    PERFORM refund_ledger.require('a reissue', 'refunds_operator');
    SELECT status INTO its_status FROM refund_ledger.refund_states
    WHERE refund_id = NEW.replaces FOR NO KEY UPDATE;
    IF NOT refund_ledger.ended_unpaid(NEW.replaces) THEN
        RAISE EXCEPTION
            'refund % is %: only one that is rejected, returned or reversed, '
            'as all that it replaces, is replaced',
            NEW.replaces, COALESCE(its_status, 'not there') USING ERRCODE = 'check_violation';
    END IF;
    SELECT * INTO replaced FROM refund_ledger.refund_instructions WHERE id = NEW.replaces;
    IF (NEW.source, NEW.amount, NEW.currency, NEW.payee_fingerprint, NEW.processing_terminal_id)
       IS DISTINCT FROM
       (replaced.source, replaced.amount, replaced.currency, replaced.payee_fingerprint,
        replaced.processing_terminal_id) THEN
        RAISE EXCEPTION 'a refund pays what the one that it replaces (%) was to pay', NEW.replaces
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

-- A right to INSERT says nothing about what is inserted.
CREATE TRIGGER guard BEFORE INSERT ON refund_ledger.refund_instructions
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_instruction();

-- What was approved never changes.
CREATE TRIGGER never_changed BEFORE UPDATE OR DELETE ON refund_ledger.refund_instructions
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.refund_instructions
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();

-- A body may be emptied by the payer once its refund has ended, and encrypted again by a rotation. What it
-- says never changes: the instruction has its hash.
CREATE FUNCTION refund_ledger.guard_request() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    its_status text;
BEGIN
    IF NEW.refund_id <> OLD.refund_id OR OLD.request IS NULL AND NEW.request IS NOT NULL THEN
        RAISE EXCEPTION 'refund %: an emptied request stays empty', OLD.refund_id
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.request IS NOT NULL OR NEW.request_key IS DISTINCT FROM OLD.request_key THEN
        PERFORM refund_ledger.require('another encryption of a request', 'refunds_key_rotator');
    END IF;
    IF NEW.request IS NULL AND OLD.request IS NOT NULL THEN
        PERFORM refund_ledger.require('the emptying of a request', 'refunds_payer');
        SELECT status INTO its_status FROM refund_ledger.refund_states WHERE refund_id = OLD.refund_id;
        IF its_status NOT IN ('settled', 'returned', 'reversed', 'rejected', 'cancelled') THEN
            RAISE EXCEPTION 'refund %: the request of a refund that is % is kept', OLD.refund_id, its_status
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    RETURN NEW;
END $$;

-- Column rights cannot tell an emptied request from another one.
CREATE TRIGGER guard BEFORE UPDATE ON refund_ledger.frozen_requests
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_request();

-- A refund without its body could be neither sent nor reissued.
CREATE TRIGGER never_deleted BEFORE DELETE ON refund_ledger.frozen_requests
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.frozen_requests
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();


-- 4  Refunds: what happens to them --------------------------------------------------------------------------

-- One row per instruction: where the refund is. It begins as approved, made by a trigger of the instruction;
-- nobody has the right to INSERT one. It moves along the graph of guard_state, and is never deleted. It is
-- narrow and has few indexes, because it changes eight times in the life of a refund. Rows are locked FOR NO
-- KEY UPDATE in the order of refund_id, so that two transactions wait for each other and are not deadlocked.
CREATE TABLE refund_ledger.refund_states (
    -- Which instruction. No foreign key: the trigger that makes the row has the instruction at hand.
    refund_id bigint PRIMARY KEY,
    -- Its place in the graph of guard_state.
    status text NOT NULL DEFAULT 'approved' CHECK (status IN (
        'approved', 'held', 'released', 'sending', 'unknown', 'accepted',
        'settled', 'returned', 'reversed', 'rejected', 'review', 'cancelled')),
    -- Why it is there, in a sentence for people, without bank data.
    reason text,
    -- When status, reason or Payroc's answer last changed. No two changes of a refund share one
    -- (guard_state).
    updated_at timestamptz NOT NULL,
    -- Which version the source has: the updated_at that was written back. With any other value the row is due
    -- to be written.
    written_back_at timestamptz,

    -- The gate.

    -- The limits that hold it now, such as largest_refund or "duplicate of 17"; empty when none does. A held
    -- refund waits for an operator, who unholds it (it is approved again, and the next run may release it) or
    -- cancels it. The program refuses to unhold a refund for whoever requested it.
    holds text[] NOT NULL DEFAULT '{}',
    -- The holds that an operator has ended. The same ones do not hold it again; others may.
    released_holds text[] NOT NULL DEFAULT '{}',
    -- Who rejected a run with this refund; every later run with it needs approval, until one releases it.
    run_rejected_by text,
    -- Who released it last: the actor of the run.
    released_by text,
    -- Which run released it last.
    released_run text,
    -- When it was last released. A release is good for 24 hours.
    released_at timestamptz,

    -- Sending.

    -- How many attempts were claimed. The newest has this number.
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    -- When the first attempt that may have reached Payroc passed its last check. Payroc keeps a key for 7
    -- days from then on; after 6 there is no POST any more. NULL while none can have reached it.
    first_sent_at timestamptz,
    -- A hash of the API host and key of that attempt; a key may mean nothing with others.
    sent_with text,
    -- The lease: until when the refund is the newest attempt's, and nobody else sends. A claim takes 2
    -- minutes, so that what a killed worker never sent waits no longer. The last check extends it to
    -- fence_until.
    lease_until timestamptz,
    -- The fence: until when the newest attempt could send, were it to pass its last check. The claim
    -- fixes it, 10 minutes after the end of the worker's access token, for clocks that differ: by then
    -- Payroc refuses whatever this worker still sends.
    fence_until timestamptz,
    -- When the next attempt may begin at the earliest.
    next_attempt_at timestamptz,

    -- What Payroc says.

    -- The id of Payroc's object; Payroc's length. Once known it never changes.
    payroc_refund_id text CHECK (length(payroc_refund_id) = 10),
    -- Payroc's own word for the object's state.
    payroc_status text,
    -- When Payroc last showed the object.
    payroc_seen_at timestamptz,

    -- An operator who unholds a refund has to see what for.
    CONSTRAINT held_says_for_what CHECK (status <> 'held' OR holds <> '{}'),
    -- A release without its actor and its time could not be shown, and would not end after 24 hours.
    CONSTRAINT released_says_by_whom_and_when CHECK (
        status <> 'released' OR (released_by IS NOT NULL AND released_at IS NOT NULL)),
    -- The fence and the wait rest on these.
    CONSTRAINT claimed_says_until_when CHECK (
        status NOT IN ('sending', 'unknown')
        OR (attempts > 0 AND lease_until IS NOT NULL AND fence_until IS NOT NULL
            AND next_attempt_at IS NOT NULL)),
    -- The key window rests on these.
    CONSTRAINT sent_says_when_and_with_what CHECK (
        status <> 'unknown' OR (first_sent_at IS NOT NULL AND sent_with IS NOT NULL)),
    -- Only Payroc's object proves that money was accepted.
    CONSTRAINT paid_has_payrocs_refund_id CHECK (
        status NOT IN ('accepted', 'settled', 'returned', 'reversed') OR payroc_refund_id IS NOT NULL)
);

-- One object of Payroc's belongs to one refund, and a list of Payroc's is compared by it. Until Payroc has
-- answered there is no id, and no entry to maintain.
CREATE UNIQUE INDEX one_refund_per_payroc_refund ON refund_ledger.refund_states (payroc_refund_id)
    WHERE payroc_refund_id IS NOT NULL;

-- What has not ended: what a run chooses from, what is under way, what needs someone. Pull, release, send,
-- follow-up and every report ask by status.
CREATE INDEX states_open ON refund_ledger.refund_states (status, refund_id)
    WHERE status IN ('approved', 'held', 'released', 'sending', 'unknown', 'review', 'accepted');

-- What is due to be written back, in the order in which it is.
CREATE INDEX states_to_write_back ON refund_ledger.refund_states (refund_id)
    WHERE (written_back_at = updated_at) IS NOT TRUE;

-- The planner believes that two columns nearly always differ, and would read the whole table for the few rows
-- in which they do. With statistics of the expression it takes the index above.
CREATE STATISTICS refund_ledger.states_written_back ON (written_back_at = updated_at)
    FROM refund_ledger.refund_states;

-- When a refund was released for the first time, or found to be paid without that: from then on it counts
-- against all limits, once. Inserted by a trigger of the states alone; nobody has a right to write here.
-- What the limits of a day and of a payee count is here, so a release reads nothing else for them.
CREATE TABLE refund_ledger.first_releases (
    -- Which refund. No foreign key: the trigger that makes the row has the instruction at hand.
    refund_id bigint PRIMARY KEY,
    -- The instruction's payee, amount and currency.
    payee_fingerprint text NOT NULL,
    -- In minor units.
    amount bigint NOT NULL,
    -- ISO 4217.
    currency text NOT NULL,
    -- Which run released it; NULL when it was found to be paid.
    run text,
    -- Who approved that run; NULL when the thresholds asked nobody.
    approver text,
    -- When.
    at timestamptz NOT NULL
);

-- What was released today. The rows are in the order of their time, so the smallest kind of index serves.
CREATE INDEX first_releases_by_time ON refund_ledger.first_releases USING brin (at)
    WITH (pages_per_range = 16, autosummarize = on);

-- What a payee got before: limits per payee, duplicates, new payees.
CREATE INDEX first_releases_by_payee ON refund_ledger.first_releases (payee_fingerprint, at);

-- What a run released: its limits, and its report.
CREATE INDEX first_releases_by_run ON refund_ledger.first_releases (run);

-- Each new instruction gets its state and its first event, which has a hash of the instruction. It runs with
-- its owner's rights, because nobody has the right to INSERT a state.
CREATE FUNCTION refund_ledger.make_states() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    WITH made AS (
        INSERT INTO refund_ledger.refund_states (refund_id, reason, updated_at)
        -- The source has one row for a refund and its reissue, and takes no news that is older than what it
        -- has.
        SELECT i.id, i.reissue_reason, GREATEST(i.created_at, replaced.updated_at + interval '1 microsecond')
        FROM inserted AS i
        LEFT JOIN refund_ledger.refund_states AS replaced ON replaced.refund_id = i.replaces
        ORDER BY i.id
        RETURNING refund_id, status, reason
    )
    INSERT INTO refund_ledger.refund_events (event, refund_id, to_status, actor, reason, detail)
    SELECT 'status', refund_id, status, refund_ledger.actor(), reason,
           -- Columns of include/refunds/replay.py. An instruction that is changed later has another hash.
           jsonb_build_object('instruction', (
               SELECT encode(sha256(record_send(instruction)), 'hex')
               FROM (SELECT i.id, i.source, i.source_ref, i.source_ref_folded, i.processing_terminal_id,
                            i.order_id, i.description, i.amount, i.currency, i.payee_last4,
                            i.payee_fingerprint, i.request_sha256, i.requested_by, i.requested_by_folded,
                            i.approved_by, i.approved_by_folded, i.approved_at, i.idempotency_key,
                            i.replaces, i.reissue_reason, i.created_at) AS instruction))
    FROM made JOIN inserted AS i ON i.id = refund_id ORDER BY refund_id;
    RETURN NULL;
END $$;

-- Once for all rows of a pull.
CREATE TRIGGER make_states AFTER INSERT ON refund_ledger.refund_instructions
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.make_states();

-- Whether a refund, and all that it replaces to the first of the chain, moved no money or brought it back. It
-- reads with its owner's rights, and tells no more of a chain of reissues than the view of section 11 does.
CREATE FUNCTION refund_ledger.ended_unpaid(refund_id bigint) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE chain AS (
        SELECT id, replaces FROM refund_ledger.refund_instructions WHERE id = ended_unpaid.refund_id
        UNION ALL
        SELECT i.id, i.replaces
        FROM refund_ledger.refund_instructions AS i JOIN chain ON i.id = chain.replaces
    )
    SELECT COALESCE(bool_and(s.status IN ('rejected', 'returned', 'reversed')), false)
    FROM chain JOIN refund_ledger.refund_states AS s ON s.refund_id = chain.id
$$;

-- The source_ref of the first refund of a chain of reissues: the only one that the source knows. It reads
-- with its owner's rights, and tells no more of a chain than the view of section 11 does.
CREATE FUNCTION refund_ledger.first_source_ref(refund_id bigint) RETURNS text
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE chain AS (
        SELECT source_ref, replaces FROM refund_ledger.refund_instructions
        WHERE id = first_source_ref.refund_id
        UNION ALL
        SELECT i.source_ref, i.replaces
        FROM refund_ledger.refund_instructions AS i JOIN chain ON i.id = chain.replaces
    )
    SELECT source_ref FROM chain WHERE replaces IS NULL
$$;

-- A refund moves only along the graph, and only by the role whose step it is. What goes with a step changes
-- with that step alone: nobody adds a hold, another reason or an id of Payroc's to a refund that stays where
-- it is. What a first attempt fixed (when, and with which API host and key) is taken back only by the edge
-- from sending to released, and only when every attempt is known not to have been processed by Payroc.
-- include/refunds/states.py has the same graph.
--
-- PL/pgSQL runs a query in an expression even when what stands before it has decided already. So each query
-- has an IF of its own, and require() is called only when the cheap test of the role has failed.
CREATE FUNCTION refund_ledger.guard_state() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- In note_sighting, which has its owner's rights, the login behind the call counts.
    login       CONSTANT name :=
        CASE WHEN current_user = 'refunds_migrator' THEN session_user ELSE current_user END;
    is_payer    CONSTANT boolean := pg_has_role(login, 'refunds_payer', 'USAGE');
    is_operator CONSTANT boolean := pg_has_role(login, 'refunds_operator', 'USAGE');
    moves       CONSTANT boolean := NEW.status <> OLD.status;
    claims      CONSTANT boolean := NEW.status = 'sending' AND NEW.attempts = OLD.attempts + 1;
    releases    CONSTANT boolean := NEW.status = 'released' AND OLD.status = 'approved';
BEGIN
    IF moves THEN
        IF NEW.status <> ALL (CASE OLD.status
            WHEN 'approved'  THEN ARRAY['held', 'released', 'cancelled', 'review',
                                        'accepted', 'settled', 'returned', 'reversed', 'rejected']
            WHEN 'held'      THEN ARRAY['approved', 'cancelled', 'review',
                                        'accepted', 'settled', 'returned', 'reversed', 'rejected']
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
            RAISE EXCEPTION 'refund % can''t go from % to %', OLD.refund_id, OLD.status, NEW.status
                USING ERRCODE = 'check_violation';
        END IF;
        -- What the DAGs alone do: hold, release, send, find out what became of what was sent, and take over
        -- what Payroc holds and this ledger never sent.
        IF NEW.status IN ('released', 'sending', 'held', 'unknown')
           OR OLD.status IN ('sending', 'unknown')
           OR (OLD.status IN ('approved', 'held')
               AND NEW.status IN ('accepted', 'settled', 'returned', 'reversed', 'rejected')) THEN
            IF NOT is_payer THEN
                PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status), 'refunds_payer');
            END IF;
        -- What an operator alone does: unhold, cancel, resolve. To review both may move a refund, but from
        -- sending and unknown the payer alone.
        ELSIF NEW.status = 'cancelled' OR OLD.status = 'review'
              OR (OLD.status = 'held' AND NEW.status = 'approved') THEN
            IF NOT is_operator THEN
                PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status), 'refunds_operator');
            END IF;
        ELSIF NOT (is_payer OR is_operator) THEN
            PERFORM refund_ledger.require(format('%s to %s', OLD.status, NEW.status),
                'refunds_payer', 'refunds_operator');
        END IF;
        IF OLD.status = 'review' AND OLD.lease_until > refund_ledger.now() THEN
            RAISE EXCEPTION 'refund %: an attempt may still be under way', OLD.refund_id
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    -- A refund that was never sent is rejected only when Payroc shows an object of it; for the paid ones a
    -- constraint says so.
    IF OLD.status IN ('approved', 'held') AND NEW.status = 'rejected' AND NEW.payroc_refund_id IS NULL THEN
        RAISE EXCEPTION 'refund % was never sent, so nothing has rejected it', OLD.refund_id
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.refund_id <> OLD.refund_id THEN
        RAISE EXCEPTION 'refund %: a state stays its refund''s', OLD.refund_id
            USING ERRCODE = 'check_violation';
    END IF;
    IF (NEW.attempts <> OLD.attempts OR NEW.fence_until IS DISTINCT FROM OLD.fence_until) AND NOT claims THEN
        RAISE EXCEPTION 'refund %: attempts and fence change with a claim alone', OLD.refund_id
            USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.status = 'sending' AND NEW.status = 'sending' AND NOT claims
       AND NEW.lease_until IS DISTINCT FROM OLD.lease_until
       AND NEW.lease_until IS DISTINCT FROM NEW.fence_until THEN
        RAISE EXCEPTION 'refund %: a lease ends with its attempt alone', OLD.refund_id
            USING ERRCODE = 'check_violation';
    END IF;
    IF (NEW.reason IS DISTINCT FROM OLD.reason OR NEW.holds <> OLD.holds) AND NOT (moves OR claims) THEN
        RAISE EXCEPTION 'refund %: reason and holds change with the status alone', OLD.refund_id
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.holds <> OLD.holds AND NEW.holds <> '{}' AND NEW.status <> 'held' THEN
        RAISE EXCEPTION 'refund %: only what is held has another hold', OLD.refund_id
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.released_holds <> OLD.released_holds AND (OLD.status <> 'held' OR NEW.status <> 'approved') THEN
        RAISE EXCEPTION 'refund %: only what is held is released from a hold', OLD.refund_id
            USING ERRCODE = 'check_violation';
    END IF;
    IF NOT releases THEN
        IF (NEW.released_by, NEW.released_run, NEW.released_at)
           IS DISTINCT FROM (OLD.released_by, OLD.released_run, OLD.released_at) THEN
            RAISE EXCEPTION 'refund %: who released it changes with a release alone', OLD.refund_id
                USING ERRCODE = 'check_violation';
        END IF;
        IF OLD.run_rejected_by IS NOT NULL AND NEW.run_rejected_by IS NULL THEN
            RAISE EXCEPTION 'refund %: a rejection ends with a release alone', OLD.refund_id
                USING ERRCODE = 'check_violation';
        END IF;
    -- The payer decides what is released, with one exception, which the database checks itself: a refund
    -- above largest_refund is released only after an operator has ended that hold.
    ELSIF 'largest_refund' <> ALL (NEW.released_holds) THEN
        IF EXISTS (SELECT FROM refund_ledger.refund_instructions, refund_ledger.refund_limits
                   WHERE id = OLD.refund_id AND amount > largest_refund) THEN
            RAISE EXCEPTION 'refund % is larger than the largest that passes by itself', OLD.refund_id
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    IF (NEW.first_sent_at, NEW.sent_with) IS DISTINCT FROM (OLD.first_sent_at, OLD.sent_with) THEN
        IF OLD.first_sent_at IS NULL AND NEW.status <> 'sending'
           OR OLD.first_sent_at IS NOT NULL AND NOT (
               OLD.status = 'sending' AND NEW.status = 'released'
               AND NEW.first_sent_at IS NULL AND NEW.sent_with IS NULL) THEN
            RAISE EXCEPTION 'refund %: first_sent_at and sent_with never change', OLD.refund_id
                USING ERRCODE = 'check_violation';
        END IF;
        IF NOT is_payer THEN
            PERFORM refund_ledger.require('what is known of the sending', 'refunds_payer');
        END IF;
        -- The key window starts again only when no attempt was processed: Payroc counts it from the first one
        -- that was, whatever it has answered.
        IF NEW.first_sent_at IS NULL THEN
            IF EXISTS (SELECT FROM refund_ledger.refund_attempts
                       WHERE refund_id = OLD.refund_id
                         AND (posting_at IS NOT NULL OR outcome IS NOT NULL)
                         AND COALESCE(outcome, 'unknown') NOT IN ('not_sent', 'configuration')) THEN
                RAISE EXCEPTION 'refund %: an attempt may have reached Payroc', OLD.refund_id
                    USING ERRCODE = 'check_violation';
            END IF;
        END IF;
    END IF;
    IF NEW.payroc_refund_id IS DISTINCT FROM OLD.payroc_refund_id THEN
        IF OLD.payroc_refund_id IS NOT NULL THEN
            RAISE EXCEPTION 'refund %: Payroc''s refund id never changes', OLD.refund_id
                USING ERRCODE = 'check_violation';
        END IF;
        -- An id of Payroc's keeps a refund from being sent; so one that waits gets it only on its way to
        -- another status, which has its event.
        IF NOT moves AND OLD.status NOT IN ('review', 'rejected') THEN
            RAISE EXCEPTION 'refund %: Payroc''s refund id comes with a status', OLD.refund_id
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    -- A write-back remembers the updated_at it read, so two changes must never share one.
    IF moves OR NEW.updated_at <> OLD.updated_at THEN
        NEW.updated_at := GREATEST(NEW.updated_at, OLD.updated_at + interval '1 microsecond');
    END IF;
    RETURN NEW;
END $$;

-- Not for what a last check writes (lease_until becomes fence_until, and first_sent_at and sent_with are
-- set), of which there is one for each POST; nor for what anyone with the right to the column may change at
-- any time: which version the source has, when Payroc showed the refund and with which word, how long to
-- wait, and the lease of a refund that is not being sent.
CREATE TRIGGER guard BEFORE UPDATE ON refund_ledger.refund_states FOR EACH ROW
    WHEN ((OLD.refund_id, OLD.status, OLD.reason, OLD.updated_at, OLD.holds, OLD.released_holds,
           OLD.run_rejected_by, OLD.released_by, OLD.released_run, OLD.released_at, OLD.attempts,
           OLD.fence_until, OLD.payroc_refund_id)
          IS DISTINCT FROM
          (NEW.refund_id, NEW.status, NEW.reason, NEW.updated_at, NEW.holds, NEW.released_holds,
           NEW.run_rejected_by, NEW.released_by, NEW.released_run, NEW.released_at, NEW.attempts,
           NEW.fence_until, NEW.payroc_refund_id)
          OR (OLD.first_sent_at IS NOT NULL OR OLD.status <> 'sending')
             AND (NEW.first_sent_at, NEW.sent_with) IS DISTINCT FROM (OLD.first_sent_at, OLD.sent_with)
          OR OLD.status = 'sending' AND NEW.lease_until IS DISTINCT FROM OLD.lease_until
             AND NEW.lease_until IS DISTINCT FROM NEW.fence_until)
    EXECUTE FUNCTION refund_ledger.guard_state();

-- A refund without a state would be neither sent nor reported.
CREATE TRIGGER never_deleted BEFORE DELETE ON refund_ledger.refund_states
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.refund_states
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();

-- The event of a state: `status` for another status or attempt, `change` for what changes while both stay.
-- It is written by the database with its owner's rights: no way of changing a state can forget it, and
-- nobody can write one by hand. It has the new value of every column that changed with it, so that the
-- events alone say what the state is. include/refunds/replay.py compares the two, and names the columns
-- that no event has.
CREATE FUNCTION refund_ledger.write_state_event() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- That of refund_ledger.actor(), which costs more to call than the rest of this.
    who     CONSTANT text :=
        COALESCE(NULLIF(current_setting('refund_ledger.actor', true), ''), session_user);
    changed jsonb := '{}';
BEGIN
    IF NEW.attempts <> OLD.attempts THEN
        changed := jsonb_build_object('attempts', NEW.attempts, 'fence_until', NEW.fence_until);
    END IF;
    IF NEW.holds <> OLD.holds THEN
        changed := changed || jsonb_build_object('holds', NEW.holds);
    END IF;
    IF NEW.released_holds <> OLD.released_holds THEN
        changed := changed || jsonb_build_object('released_holds', NEW.released_holds);
    END IF;
    IF NEW.run_rejected_by IS DISTINCT FROM OLD.run_rejected_by THEN
        changed := changed || jsonb_build_object('run_rejected_by', NEW.run_rejected_by);
    END IF;
    IF NEW.released_run IS DISTINCT FROM OLD.released_run THEN
        changed := changed || jsonb_build_object('released_run', NEW.released_run);
    END IF;
    -- Who released it is the event's actor, unless the event says otherwise.
    IF OLD.status = 'approved' AND NEW.status = 'released' AND NEW.released_by <> who THEN
        changed := changed || jsonb_build_object('released_by', NEW.released_by);
    END IF;
    IF NEW.payroc_refund_id IS DISTINCT FROM OLD.payroc_refund_id THEN
        changed := changed || jsonb_build_object('payroc_refund_id', NEW.payroc_refund_id);
    END IF;
    IF NEW.status <> OLD.status OR NEW.attempts <> OLD.attempts THEN
        INSERT INTO refund_ledger.refund_events
            (event, refund_id, from_status, to_status, actor, reason, detail)
        VALUES ('status', NEW.refund_id, OLD.status, NEW.status, who, NEW.reason, NULLIF(changed, '{}'));
    ELSE
        INSERT INTO refund_ledger.refund_events (event, refund_id, actor, detail)
        VALUES ('change', NEW.refund_id, who, changed);
    END IF;
    RETURN NULL;
END $$;

-- The other columns that an event has change only with these (guard_state).
CREATE TRIGGER event_of_a_change AFTER UPDATE ON refund_ledger.refund_states FOR EACH ROW
    WHEN (OLD.status <> NEW.status OR OLD.attempts <> NEW.attempts
          OR OLD.run_rejected_by IS DISTINCT FROM NEW.run_rejected_by
          OR OLD.payroc_refund_id IS DISTINCT FROM NEW.payroc_refund_id)
    EXECUTE FUNCTION refund_ledger.write_state_event();

-- From its first release on a refund counts against the limits. One that turns out to be paid without having
-- been released counts from then on: else a restored ledger would forget it for totals, duplicates and new
-- payees. It runs with its owner's rights, because nobody has a right to write to first_releases.
CREATE FUNCTION refund_ledger.note_first_release() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO refund_ledger.first_releases
        (refund_id, payee_fingerprint, amount, currency, run, approver, at)
    SELECT i.id, i.payee_fingerprint, i.amount, i.currency, NEW.released_run,
           (SELECT approved_by FROM refund_ledger.refund_runs WHERE run_id = NEW.released_run),
           COALESCE(NEW.released_at, NEW.updated_at)
    FROM refund_ledger.refund_instructions AS i WHERE i.id = NEW.refund_id
    -- A refund that was found to be paid takes several steps as such.
    ON CONFLICT (refund_id) DO NOTHING;
    RETURN NULL;
END $$;

-- A first release, or the first status that shows a refund paid without one. A refund that was released keeps
-- its released_at, so this fires once.
CREATE TRIGGER first_release AFTER UPDATE ON refund_ledger.refund_states FOR EACH ROW
    WHEN (OLD.status <> NEW.status AND OLD.released_at IS NULL
          AND NEW.status IN ('released', 'accepted', 'settled', 'returned', 'reversed'))
    EXECUTE FUNCTION refund_ledger.note_first_release();

-- A first release counts forever.
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON refund_ledger.first_releases
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.first_releases
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();

-- What Payroc shows of a refund, noted outside an attempt: by the follow-up, and by an operator who resolves,
-- reissues or reverses. It runs with its owner's rights, so that an operator needs none to Payroc's columns
-- or to a lease; guard_state looks at the login behind the call, so each does only what is theirs. A refund
-- that leaves review has no lease any more; one that goes there keeps it, because its attempt may be under
-- way.
CREATE FUNCTION refund_ledger.note_sighting(
    of_refund bigint,      -- refund_id
    to_status text,        -- its next status; NULL leaves it
    because   text,        -- the reason that goes with it; NULL leaves it
    shown_id  text,        -- Payroc's id of the object; NULL when there is none
    shown     text,        -- Payroc's word for the object's state
    moment    timestamptz  -- the ledger's time
) RETURNS refund_ledger.refund_states
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    UPDATE refund_ledger.refund_states SET
        status = COALESCE(to_status, status),
        reason = CASE WHEN to_status IS NULL THEN reason ELSE COALESCE(because, reason) END,
        lease_until = CASE WHEN to_status IS NULL OR to_status = 'review' THEN lease_until END,
        next_attempt_at = CASE WHEN to_status IS NULL THEN next_attempt_at END,
        payroc_refund_id = COALESCE(payroc_refund_id, shown_id),
        payroc_status = COALESCE(shown, payroc_status),
        payroc_seen_at = CASE WHEN shown IS NULL THEN payroc_seen_at ELSE moment END,
        updated_at = CASE WHEN to_status IS NULL AND payroc_refund_id = shown_id AND payroc_status = shown
                          THEN updated_at ELSE moment END
    WHERE refund_id = of_refund
    RETURNING *
$$;


-- 5  Attempts -----------------------------------------------------------------------------------------------

-- One row per claim, so per POST at most. It is committed before the POST and finished after it: a row with
-- posting_at and without an outcome is an attempt that may have reached Payroc.
CREATE TABLE refund_ledger.refund_attempts (
    -- Whose attempt it is. No foreign key: guard_attempt looks for the claim.
    refund_id bigint NOT NULL,
    -- Its number, from 1; the state has the newest.
    attempt integer NOT NULL CHECK (attempt > 0),
    -- The Airflow run that sent it.
    run_id text NOT NULL,
    -- Which of the run's mapped tasks; NULL when it was not a mapped one.
    map_index integer,
    -- Airflow's number of the task's try, from 1.
    try_number integer,
    -- When it was claimed.
    started_at timestamptz NOT NULL,
    -- When it passed its last check: no POST leaves before this is committed. NULL: nothing was sent, and the
    -- next claim says so if its worker was killed.
    posting_at timestamptz,
    -- When its outcome was recorded; NULL until then, and forever when its worker was killed after
    -- posting_at.
    finished_at timestamptz,
    -- The status of Payroc's HTTP answer; NULL when there was none.
    http_status integer,
    -- The type of Payroc's problem, an address; NULL when it named none.
    problem_type text,
    -- What the answer proved. An attempt whose effect is not proven is unknown; one of review has an answer
    -- that an operator has to look at; configuration and not_sent mean that Payroc has never processed it.
    outcome text
        CHECK (outcome IN ('accepted', 'rejected', 'unknown', 'review', 'configuration', 'not_sent')),
    -- A refund has each number once, so two workers cannot both make an attempt.
    PRIMARY KEY (refund_id, attempt),
    -- The guard holds an attempt with a finished_at to its outcome. If finished_at could be empty beside an
    -- outcome, emptying it would switch the guard off.
    CONSTRAINT ended_says_how_and_when CHECK ((outcome IS NULL) = (finished_at IS NULL))
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
        IF NOT EXISTS (SELECT FROM refund_ledger.refund_states
                       WHERE refund_id = NEW.refund_id AND status = 'sending' AND attempts = NEW.attempt) THEN
            RAISE EXCEPTION 'attempt % of refund % was not claimed', NEW.attempt, NEW.refund_id
                USING ERRCODE = 'check_violation';
        END IF;
    ELSIF OLD.posting_at IS NOT NULL AND NEW.posting_at IS NULL THEN
        RAISE EXCEPTION 'attempt % of refund % has passed its last check', OLD.attempt, OLD.refund_id
            USING ERRCODE = 'check_violation';
    ELSIF NEW.outcome IS NULL OR NEW.posting_at IS DISTINCT FROM OLD.posting_at
          OR (NEW.outcome = ANY (without_effect) AND OLD.outcome <> ALL (without_effect)) THEN
        RAISE EXCEPTION 'attempt % of refund % has ended as %', OLD.attempt, OLD.refund_id, OLD.outcome
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

-- A claim is looked for.
CREATE TRIGGER guard_claim BEFORE INSERT ON refund_ledger.refund_attempts
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_attempt();

-- Later attempts and the key window rest on what these rows say. Not for a last check and a first record.
CREATE TRIGGER guard BEFORE UPDATE ON refund_ledger.refund_attempts
    FOR EACH ROW WHEN (OLD.finished_at IS NOT NULL OR OLD.posting_at IS NOT NULL AND NEW.posting_at IS NULL)
    EXECUTE FUNCTION refund_ledger.guard_attempt();

-- The event of an attempt's outcome, written by the database with its owner's rights. The claim has the
-- event of its status, with the attempt's number.
CREATE FUNCTION refund_ledger.write_attempt_event() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO refund_ledger.refund_events (event, refund_id, actor, detail)
    VALUES ('attempt', NEW.refund_id,
            COALESCE(NULLIF(current_setting('refund_ledger.actor', true), ''), session_user),
            jsonb_strip_nulls(jsonb_build_object(
                'attempt', NEW.attempt, 'posting_at', NEW.posting_at, 'outcome', NEW.outcome,
                'http_status', NEW.http_status, 'problem_type', NEW.problem_type)));
    RETURN NULL;
END $$;

-- Later attempts and the key window rest on these columns, so they leave a trace when they are changed again.
CREATE TRIGGER event_of_an_outcome
    AFTER UPDATE OF finished_at, http_status, problem_type, outcome ON refund_ledger.refund_attempts
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.write_attempt_event();

-- An attempt that is gone would be one that never was.
CREATE TRIGGER never_deleted BEFORE DELETE ON refund_ledger.refund_attempts
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.refund_attempts
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();


-- 6  Events and their seals ---------------------------------------------------------------------------------

-- The audit trail: one row per change of a status, a limit or a pause, per binding and per decision. It is
-- only inserted.
CREATE TABLE refund_ledger.refund_events (
    -- Its number, from number_event. Numbers of transactions that were rolled back are missing.
    id bigint PRIMARY KEY,
    -- When it happened, from number_event.
    at timestamptz NOT NULL,
    -- What happened. The database itself writes status, change and attempt, run, approval and rejection,
    -- pause, resume, limit, restore, and the bindings environment, source and fingerprint_check. The program
    -- writes contradiction (Payroc shows another object of the refund, or one that differs), recovered (an
    -- object was taken over), not_understood (a restore was ended though Payroc lists objects that can't be
    -- understood), proposal (an operator proposes a decision that takes a second one), reverse (an operator
    -- asks Payroc to reverse) and rotation (of keys); who may is in guard_roles_of_events.
    event text NOT NULL CHECK (event IN (
        'status', 'change', 'attempt', 'contradiction', 'pause', 'resume', 'environment', 'source',
        'fingerprint_check', 'proposal', 'reverse', 'limit', 'run', 'approval', 'rejection', 'rotation',
        'restore', 'not_understood', 'recovered')),
    -- Which refund it is about; NULL when it is about none. No foreign key, which would lock the instruction
    -- for each event. What the database writes names a refund that exists; for the others
    -- guard_roles_of_events looks.
    refund_id bigint,
    -- The status before; NULL for a new refund and for an event of another kind.
    from_status text,
    -- The status after; NULL for an event of another kind.
    to_status text,
    -- Who did it, as the program says.
    actor text NOT NULL,
    -- Why, in a sentence for people, without bank data.
    reason text,
    -- What else belongs to it: the new values of what changed.
    detail jsonb,
    -- Which login wrote it, from number_event.
    login text NOT NULL
);

-- The numbers of events. It belongs to their column, and no role may draw from it.
CREATE SEQUENCE refund_ledger.event_numbers OWNED BY refund_ledger.refund_events.id;

-- The history of one refund.
CREATE INDEX events_by_refund ON refund_ledger.refund_events (refund_id, id);

-- What happened lately: the daily summary. The rows are in the order of their time, so the smallest kind of
-- index serves.
CREATE INDEX events_by_time ON refund_ledger.refund_events USING brin (at) WITH (autosummarize = on);

-- Number, time and login are the database's, whoever writes the event. The transaction gets its id before the
-- event draws its number, so a number that is missing belongs to a transaction whose id was given before any
-- later number was drawn. seal() rests on that.
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
        WHEN NEW.event IN ('contradiction', 'recovered') THEN '{refunds_payer,refunds_operator}'
        WHEN NEW.event = 'rotation' THEN '{refunds_key_rotator}'
        -- All others are written by the database itself.
        ELSE '{refunds_migrator}'
    END;
    IF NOT pg_has_role(current_user, takes[1], 'USAGE') THEN
        PERFORM refund_ledger.require(format('the event %s', NEW.event), VARIADIC takes);
    END IF;
    IF takes <> '{refunds_migrator}' AND NEW.refund_id IS NOT NULL THEN
        IF NOT EXISTS (SELECT FROM refund_ledger.refund_instructions WHERE id = NEW.refund_id) THEN
            RAISE EXCEPTION 'there is no refund %', NEW.refund_id USING ERRCODE = 'foreign_key_violation';
        END IF;
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
-- the events are committed, so no transaction with an event waits for another one.
--
-- Seals prove that no sealed event was changed, removed or inserted since, as long as the newest seal's hash
-- is known from elsewhere: every report shows it, because the owner of the tables could make all seals
-- again. They prove nothing of events that are not sealed yet, nor that an event is true: its actor is a
-- claim.
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

-- Seal up to `most` events, at most 20,000, in a transaction of its own. It returns how many it sealed, and
-- position and hash of the newest seal; no row when another session is sealing, for nobody waits for a seal.
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
    -- An id beyond the last one drawn is not from the trigger. Sealing it would make every id below it
    -- pending.
    drawn := (SELECT last_value FROM refund_ledger.event_numbers);
    -- First the horizon, then the events: what has ended before it, the next statement sees. It rests on
    -- nothing else, so a login that keeps a transaction open holds up no seal: only pending ids are declared
    -- lost later.
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
        -- events were read. (The snapshot's xmax would not do: a transaction with a greater id may hold a
        -- number already.)
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


-- 7  Runs ---------------------------------------------------------------------------------------------------

-- One row per DAG run that pulled: what it is about, what was asked and answered, what it released. A
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
    -- Whether the thresholds (approval_total and approval_count of refund_limits) asked for an approval; NULL
    -- until that was found out.
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
    -- When its candidates were stored. What it had released before, in an earlier pull, counts against the
    -- thresholds, even if that was approved.
    candidates_at timestamptz NOT NULL DEFAULT refund_ledger.now()
);

-- The event of an answer: `approval`, `rejection`, or `run` when the thresholds ask nobody, or an answer is
-- taken back. Written by the database with its owner's rights, so that no answer can be noted without its
-- event.
CREATE FUNCTION refund_ledger.write_answer_event() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    answered_by CONSTANT text := COALESCE(
        NULLIF(NEW.approved_by, OLD.approved_by), NULLIF(NEW.rejected_by, OLD.rejected_by));
BEGIN
    INSERT INTO refund_ledger.refund_events (event, actor, reason, detail)
    VALUES (CASE WHEN answered_by IS NULL THEN 'run'
                 WHEN answered_by = NEW.approved_by THEN 'approval' ELSE 'rejection' END,
            COALESCE(answered_by, refund_ledger.actor()),
            'Answered by ' || answered_by || ' in Airflow.',
            NEW.approval_basis || jsonb_build_object(
                'run_id', NEW.run_id, 'candidates_hash', NEW.candidates_hash, 'approved_by', NEW.approved_by,
                'approved_hash', NEW.approved_hash, 'rejected_by', NEW.rejected_by));
    RETURN NULL;
END $$;

-- A release rests on these columns.
CREATE TRIGGER event_of_an_answer AFTER UPDATE ON refund_ledger.refund_runs FOR EACH ROW
    WHEN ((OLD.approved_by, OLD.approved_hash, OLD.rejected_by)
          IS DISTINCT FROM (NEW.approved_by, NEW.approved_hash, NEW.rejected_by))
    EXECUTE FUNCTION refund_ledger.write_answer_event();


-- 8  Pauses, the gate, limits, bindings, the turn of the write-back -----------------------------------------

-- The kill switch: one row per pause. A row is never deleted, and changes only to record the comparison of a
-- restore, and the end. Nothing is claimed or sent while one of its scope has not ended. Only an operator
-- ends it, and that of a restore not before the ledger was compared with Payroc. No unique constraint and no
-- foreign key, because an INSERT that checks one may wait for another transaction; and no role has a right by
-- which it could lock the table. So nobody can hold a pause up.
CREATE TABLE refund_ledger.pauses (
    -- Its number. The first open pause of a scope is the one that is shown.
    id bigint GENERATED ALWAYS AS IDENTITY,
    -- '*' for everything, or a processing terminal id.
    scope text NOT NULL CHECK (scope <> ''),
    -- When it began.
    paused_at timestamptz NOT NULL DEFAULT refund_ledger.now(),
    -- Who paused, as the program says.
    paused_by text NOT NULL DEFAULT refund_ledger.actor(),
    -- Why.
    reason text NOT NULL,

    -- A restore. It pauses everything, and cannot end before the comparison with Payroc has ended.

    -- From when the ledger may have forgotten anything, because it was restored from a backup; NULL for every
    -- other pause.
    restored_to timestamptz,
    -- When the comparison with Payroc ended.
    compared_at timestamptz,

    -- The end, which only an operator may record; who it was the trigger fills in.

    -- When it ended; NULL while it is open.
    ended_at timestamptz,
    -- Who resumed, as the program says.
    ended_by text,
    -- Why.
    end_reason text,

    -- A restore concerns everything.
    CONSTRAINT a_restore_pauses_everything CHECK (
        CASE WHEN restored_to IS NULL THEN compared_at IS NULL ELSE scope = '*' END),
    -- What a restored ledger has forgotten could be paid again, so it is compared with Payroc first.
    CONSTRAINT a_restored_ledger_stays_paused CHECK (
        restored_to IS NULL OR ended_at IS NULL OR compared_at IS NOT NULL),
    -- The report and the audit trail name who resumed, and why. A reason without an end would have no event.
    CONSTRAINT ended_says_by_whom CHECK (
        (ended_at IS NULL) = (ended_by IS NULL) AND (ended_at IS NOT NULL OR end_reason IS NULL))
);

-- Each claim and each last check look for open pauses. Those that ended stay, and grow in number.
CREATE INDEX open_pauses ON refund_ledger.pauses (scope) WHERE ended_at IS NULL;

-- A pause never changes except by its end, which has the database's time and stays. Only an operator may end
-- it, whatever rights a login was given by hand.
CREATE FUNCTION refund_ledger.guard_pause() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM refund_ledger.require('the end of a pause', 'refunds_operator');
    IF (NEW.id, NEW.scope, NEW.paused_at, NEW.paused_by, NEW.reason, NEW.restored_to)
       IS DISTINCT FROM (OLD.id, OLD.scope, OLD.paused_at, OLD.paused_by, OLD.reason, OLD.restored_to)
       OR OLD.ended_at IS NOT NULL
       OR (OLD.compared_at IS NOT NULL AND NEW.compared_at IS DISTINCT FROM OLD.compared_at) THEN
        RAISE EXCEPTION 'a pause never changes except by its end' USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.compared_at IS NOT NULL AND OLD.compared_at IS NULL THEN
        NEW.compared_at := refund_ledger.now();
    END IF;
    IF NEW.ended_at IS NOT NULL THEN
        NEW.ended_at := refund_ledger.now();
        NEW.ended_by := refund_ledger.actor();
    END IF;
    RETURN NEW;
END $$;

-- The right to UPDATE a column does not say that only its first value counts.
CREATE TRIGGER guard BEFORE UPDATE ON refund_ledger.pauses
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_pause();

-- No pause is forgotten, by the owner either.
CREATE TRIGGER never_deleted BEFORE DELETE ON refund_ledger.pauses
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.pauses
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();

-- The events of a pause: pause, resume, and restore for the end of the comparison with Payroc. Written by the
-- database with its owner's rights, so that no pause can begin or end without its event.
CREATE FUNCTION refund_ledger.write_pause_event() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    which jsonb := jsonb_strip_nulls(jsonb_build_object(
        'pause', NEW.id, 'scope', NEW.scope, 'restored_to', NEW.restored_to));
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO refund_ledger.refund_events (event, actor, reason, detail)
        VALUES ('pause', NEW.paused_by, NEW.reason, which);
        RETURN NULL;
    END IF;
    IF NEW.compared_at IS DISTINCT FROM OLD.compared_at THEN
        INSERT INTO refund_ledger.refund_events (event, actor, reason, detail)
        VALUES ('restore', refund_ledger.actor(),
                NULLIF(current_setting('refund_ledger.reason', true), ''), which);
    END IF;
    IF NEW.ended_at IS NOT NULL THEN
        INSERT INTO refund_ledger.refund_events (event, actor, reason, detail)
        VALUES ('resume', NEW.ended_by, NEW.end_reason, which);
    END IF;
    RETURN NULL;
END $$;

-- Whoever pauses or resumes.
CREATE TRIGGER events AFTER INSERT OR UPDATE ON refund_ledger.pauses
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.write_pause_event();

-- The gate's lock. Whoever releases refunds or changes a limit locks its only row first, so that what is
-- counted against a limit stays true until the commit. An advisory lock could be taken by anybody who may
-- connect; this row only by whoever may update its column, which are the payer and operators.
CREATE TABLE refund_ledger.gate (
    -- Makes it one row. Its value never changes; the right to UPDATE it is the right to lock the row.
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row)
);

-- The row is there from the beginning.
INSERT INTO refund_ledger.gate DEFAULT VALUES;

-- The limits, in one row. NULL allows everything. Totals are in minor units and apply to each currency
-- separately; counts apply to all currencies together. Only operators set them, under the gate's lock.
CREATE TABLE refund_ledger.refund_limits (
    -- Makes it one row.
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    -- A larger refund is held.
    largest_refund bigint CHECK (largest_refund > 0),
    -- The sum that one run releases; the rest waits.
    run_total bigint CHECK (run_total > 0),
    -- The number of refunds that one run releases; the rest waits.
    run_count bigint CHECK (run_count > 0),
    -- The sum that is released in one day of PAYROC_REFUNDS_TIMEZONE; the rest waits.
    day_total bigint CHECK (day_total > 0),
    -- The number of refunds that are released in one day; the rest waits.
    day_count bigint CHECK (day_count > 0),
    -- The sum for one payee within payee_days; a refund that would exceed it is held.
    payee_total bigint CHECK (payee_total > 0),
    -- The number of refunds for one payee within payee_days; a refund that would exceed it is held.
    payee_count bigint CHECK (payee_count > 0),
    -- The days of those two, at most a year.
    payee_days bigint CHECK (payee_days BETWEEN 1 AND 366),
    -- A refund of the same payee, amount and currency as another one within these days is held.
    duplicate_days bigint CHECK (duplicate_days BETWEEN 1 AND 366),
    -- The sum that a day releases without an approval of the run; above it the run needs one. 0 asks always.
    approval_total bigint CHECK (approval_total >= 0),
    -- The number of refunds that a day releases without an approval of the run; above it the run needs one.
    approval_count bigint CHECK (approval_count >= 0),
    -- A limit per payee without its days would mean nothing.
    CONSTRAINT a_payees_limit_has_its_days CHECK (
        num_nonnulls(payee_total, payee_count) = 0 OR payee_days IS NOT NULL)
);

-- The row is there from the beginning, without a limit.
INSERT INTO refund_ledger.refund_limits DEFAULT VALUES;

-- Setting a limit takes an operator, whatever rights a login was given by hand.
CREATE FUNCTION refund_ledger.guard_limits() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM refund_ledger.require('a limit', 'refunds_operator');
    RETURN NEW;
END $$;

-- For every change.
CREATE TRIGGER guard BEFORE UPDATE ON refund_ledger.refund_limits
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.guard_limits();

-- An event for each limit that changes, with both values. Written by the database with its owner's rights, so
-- that no change can forget its event. The program gives the reason as a setting of its transaction.
CREATE FUNCTION refund_ledger.write_limit_events() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO refund_ledger.refund_events (event, actor, reason, detail)
    SELECT 'limit', refund_ledger.actor(),
           NULLIF(current_setting('refund_ledger.reason', true), ''),
           jsonb_build_object('limit', name, 'from', to_jsonb(OLD) -> name, 'to', value)
    FROM jsonb_each(to_jsonb(NEW)) AS after (name, value)
    WHERE to_jsonb(OLD) -> name IS DISTINCT FROM value ORDER BY name;
    RETURN NULL;
END $$;

-- Whoever sets a limit.
CREATE TRIGGER events AFTER UPDATE ON refund_ledger.refund_limits
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.write_limit_events();

-- What the ledger is bound to, one row each. Bound once and forever: nobody has the right to change a row.
CREATE TABLE refund_ledger.bindings (
    -- environment: Payroc's API base URL, because keys mean nothing at another Payroc. source: the source's
    -- name, because under another one the same refunds would have other keys, and be paid again.
    -- fingerprint_check: a hash that only the same fingerprint key gives, because with another one no payee
    -- would be recognised.
    name text PRIMARY KEY CHECK (name IN ('environment', 'source', 'fingerprint_check')),
    -- To which one.
    value text NOT NULL CHECK (value <> '')
);

-- The event of a binding, of the kind that its name says. Written by the database with its owner's rights.
CREATE FUNCTION refund_ledger.write_binding_event() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO refund_ledger.refund_events (event, actor, reason)
    VALUES (NEW.name, refund_ledger.actor(), NEW.value);
    RETURN NULL;
END $$;

-- Whoever binds it.
CREATE TRIGGER event AFTER INSERT ON refund_ledger.bindings
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.write_binding_event();

-- The owner can't bind it to anything else either.
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON refund_ledger.bindings
    FOR EACH ROW EXECUTE FUNCTION refund_ledger.refuse_change();

-- TRUNCATE fires no trigger of a row.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON refund_ledger.bindings
    FOR EACH STATEMENT EXECUTE FUNCTION refund_ledger.refuse_change();

-- Whose turn it is to write back, in one row, so that an older write-back does not overtake a newer one. A
-- turn is taken for two minutes and renewed with each batch: no transaction stays open while the source is
-- written, and a worker that dies keeps the others waiting no longer than that.
CREATE TABLE refund_ledger.write_back_turn (
    -- Makes it one row.
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    -- Who has it, by a name that no other write-back has; NULL for nobody.
    holder text,
    -- When it ends unless it is renewed.
    until timestamptz,
    -- A turn without its end would never end.
    CONSTRAINT turn_says_until_when CHECK ((holder IS NULL) = (until IS NULL))
);

-- The row is there from the beginning.
INSERT INTO refund_ledger.write_back_turn DEFAULT VALUES;


-- 9  Invalid rows and write-back notes ----------------------------------------------------------------------

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

-- Forgets source rows that were not found invalid lately and are valid now, or have no id and so are known by
-- their place alone. It runs with its owner's rights, because a right to DELETE would allow a lock of the
-- whole table.
CREATE FUNCTION refund_ledger.forget_invalid_rows(
    of_source text,        -- the source's name
    valid     text[],      -- ids of the rows that are valid now
    nameless  text,        -- how the place of a row without an id begins
    since     timestamptz  -- rows found invalid since then stay
) RETURNS void
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    DELETE FROM refund_ledger.invalid_rows
    WHERE source = of_source AND last_seen_at < since
      AND (source_ref = ANY (valid) OR starts_with(source_ref, nameless))
$$;

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


-- 10  Terminals, and what Payroc lists that no refund has ---------------------------------------------------

-- How far Payroc's list of refunds is known, by terminal. Claims and last checks look here: nothing is sent
-- for the first time unless its terminal's list is known up to less than 4 days ago, and was read with
-- today's API host and key. A ledger that was restored, lost or copied has an older read_to, so it reads what
-- it has forgotten; nothing outside the ledger is needed for that.
CREATE TABLE refund_ledger.terminals (
    -- Payroc's id of the terminal; Payroc's length. Each that a row of the source or a refund ever named.
    terminal text PRIMARY KEY CHECK (length(terminal) BETWEEN 4 AND 50),
    -- Since when its list is known; NULL when it was never read.
    read_from timestamptz,
    -- Up to when its list is known: a day before the last reading began, because an object may take a day to
    -- show.
    read_to timestamptz,
    -- A hash of the API host and key of that reading; another key may show another list.
    read_with text,
    -- Payroc refused the list for a reason that concerns this terminal. One that was never read is asked for
    -- again only when a refund needs it.
    refused boolean NOT NULL DEFAULT false,
    -- Since when the list was due and could not be read to its end; NULL when the last reading came to it.
    failed_at timestamptz,
    -- Why, without values of objects.
    failure text CHECK (length(failure) BETWEEN 1 AND 500),

    -- How far a list is known means nothing without the rest.
    CONSTRAINT read_says_from_when_to_when_and_with_what CHECK (
        num_nonnulls(read_from, read_to, read_with) IN (0, 3)),
    -- A report says since when a list could not be read.
    CONSTRAINT failure_says_since_when CHECK ((failure IS NULL) = (failed_at IS NULL))
);

-- Objects on Payroc's lists that no refund of this ledger had when they were read: made by another ledger, in
-- Payroc's portal, by other software, or by this ledger before it was restored. Rows are only added.
--
-- A refund that one of them may have paid goes to review instead of being sent: when the refund is stored,
-- when the object is, or when a run is about to release it. One whose own key stands here was sent by a
-- ledger that has forgotten it, so sending through all terminals pauses as well. A plain object stops only a
-- refund with its terminal and order id, or with its terminal, amount, currency and last four digits.
CREATE TABLE refund_ledger.foreign_refunds (
    -- Payroc's id of the object; Payroc's length.
    payroc_refund_id text PRIMARY KEY CHECK (length(payroc_refund_id) = 10),
    -- The key that it carries as this project's requests do; NULL without one. Not unique: two objects with
    -- one key are a payment made twice.
    idempotency_key uuid,
    -- The terminal on whose list it stands.
    terminal text NOT NULL,
    -- Its order id.
    order_id text NOT NULL,
    -- What it pays, in minor units.
    amount bigint NOT NULL,
    -- ISO 4217, or ? for anything else.
    currency text NOT NULL,
    -- The last four digits of the account that it pays; NULL when Payroc does not show them.
    last4 text,
    -- Payroc's word for its state when it was first seen.
    payroc_status text NOT NULL,
    -- It came without any custom field, so nothing says whether this project made it.
    plain boolean NOT NULL,
    -- When a reading first saw it.
    seen_at timestamptz NOT NULL
);

-- A refund's own key, and those of its reissues, are looked for.
CREATE INDEX foreign_refunds_by_key ON refund_ledger.foreign_refunds (idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- A plain object with a refund's order id.
CREATE INDEX foreign_refunds_by_order ON refund_ledger.foreign_refunds (terminal, order_id) WHERE plain;

-- A plain object with a refund's amount and last four digits.
CREATE INDEX foreign_refunds_by_amount ON refund_ledger.foreign_refunds (terminal, amount, last4) WHERE plain;

-- What reports name: the objects seen lately.
CREATE INDEX foreign_refunds_by_time ON refund_ledger.foreign_refunds (seen_at);


-- 11  The view of all refunds -------------------------------------------------------------------------------

-- What reports, people and auditors look at: every refund with its state, without its frozen request, the
-- request's hash, the folded texts and the hash of the API key. It reads with its owner's rights, so that
-- reading it takes no right on the tables.
--
-- Who approved a refund is approved_by, in the source; who approved the run that first released it is
-- first_released_approver, in Airflow. Of refund 42:
--   SELECT requested_by, approved_by, approved_at, first_released_at, first_released_run,
--          first_released_approver FROM refund_ledger.refunds WHERE id = 42
CREATE VIEW refund_ledger.refunds AS
SELECT i.id, i.source, i.source_ref, i.processing_terminal_id, i.order_id, i.description, i.amount,
       i.currency, i.payee_last4, i.payee_fingerprint, i.requested_by, i.approved_by, i.approved_at,
       i.idempotency_key,
       s.status, s.reason, s.released_by, s.released_run, s.released_at,
       f.at AS first_released_at, f.run AS first_released_run, f.approver AS first_released_approver,
       s.run_rejected_by, s.holds, s.released_holds,
       s.attempts, s.first_sent_at, s.lease_until, s.fence_until, s.next_attempt_at,
       s.payroc_refund_id, s.payroc_status, s.payroc_seen_at, i.replaces,
       i.created_at, s.updated_at, s.written_back_at,
       q.request IS NOT NULL AS has_request, q.request_key
FROM refund_ledger.refund_instructions AS i
JOIN refund_ledger.refund_states AS s ON s.refund_id = i.id
LEFT JOIN refund_ledger.first_releases AS f ON f.refund_id = i.id
LEFT JOIN refund_ledger.frozen_requests AS q ON q.refund_id = i.id;


-- 12  Who may do what ---------------------------------------------------------------------------------------

-- Columns are granted, never tables: with a right to UPDATE or DELETE on a table a login may lock the whole
-- of it. A right to UPDATE one column is enough to lock a row, so nobody who may not change a state has one
-- there.

-- Whoever was granted none of the roles has no right to a table.
REVOKE ALL ON ALL TABLES IN SCHEMA refund_ledger FROM PUBLIC;

-- The same for functions, which anybody may otherwise execute: one could be the trigger of somebody else's
-- table.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA refund_ledger FROM PUBLIC;

-- Whoever works with the ledger has to find its objects.
GRANT USAGE ON SCHEMA refund_ledger TO refunds_payer, refunds_operator, refunds_auditor, refunds_key_rotator;

-- Everything except the requests, for all who report.
GRANT SELECT ON refund_ledger.refunds, refund_ledger.first_releases, refund_ledger.refund_attempts,
    refund_ledger.refund_events, refund_ledger.event_numbers, refund_ledger.event_seals,
    refund_ledger.refund_runs, refund_ledger.pauses, refund_ledger.refund_limits, refund_ledger.bindings,
    refund_ledger.invalid_rows, refund_ledger.write_back_notes, refund_ledger.terminals,
    refund_ledger.foreign_refunds
    TO refunds_payer, refunds_operator, refunds_auditor;

-- Everybody checks that the ledger is at the revision that the program knows.
GRANT SELECT ON refund_ledger.schema_version
    TO refunds_payer, refunds_operator, refunds_auditor, refunds_key_rotator;

-- Reports and write-backs look at chains of reissues, and find a refund by its source_ref.
GRANT EXECUTE ON FUNCTION refund_ledger.ended_unpaid(bigint), refund_ledger.first_source_ref(bigint),
    refund_ledger.refund_key(text, text), refund_ledger.json_text(text)
    TO refunds_payer, refunds_operator, refunds_auditor;

-- Whoever works with the ledger asks it for the time.
GRANT EXECUTE ON FUNCTION refund_ledger.now()
    TO refunds_payer, refunds_operator, refunds_auditor, refunds_key_rotator;

-- The guards call it with the rights of the login that they guard against.
GRANT EXECUTE ON FUNCTION refund_ledger.require(text, text[])
    TO refunds_payer, refunds_operator, refunds_key_rotator;

-- The payer and operators send and decide by what the refund says, its encrypted request included.
GRANT SELECT ON refund_ledger.refund_instructions, refund_ledger.refund_states, refund_ledger.frozen_requests
    TO refunds_payer, refunds_operator;

-- verify-audit compares what was approved and where it is with the events. The hash of the body says nothing
-- without its key.
GRANT SELECT ON refund_ledger.refund_instructions TO refunds_auditor;

-- Not sent_with, which no audit needs.
GRANT SELECT (refund_id, status, reason, holds, released_holds, run_rejected_by, released_by, released_run,
        released_at, attempts, first_sent_at, fence_until, payroc_refund_id)
    ON refund_ledger.refund_states TO refunds_auditor;

-- The payer stores what was approved.
GRANT INSERT (source, source_ref, source_ref_folded, processing_terminal_id, order_id, description, amount,
        currency, payee_last4, payee_fingerprint, request_sha256, requested_by, requested_by_folded,
        approved_by, approved_by_folded, approved_at, idempotency_key, created_at)
    ON refund_ledger.refund_instructions TO refunds_payer;

-- An operator inserts reissues, which alone have these columns: replaces and reissue_reason.
GRANT INSERT (source, source_ref, source_ref_folded, processing_terminal_id, order_id, description, amount,
        currency, payee_last4, payee_fingerprint, request_sha256, requested_by, requested_by_folded,
        approved_by, approved_by_folded, approved_at, idempotency_key, replaces, reissue_reason, created_at)
    ON refund_ledger.refund_instructions TO refunds_operator;

-- Each with its body.
GRANT INSERT (refund_id, request, request_key) ON refund_ledger.frozen_requests
    TO refunds_payer, refunds_operator;

-- The payer empties a body after the end (guard_request).
GRANT UPDATE (request) ON refund_ledger.frozen_requests TO refunds_payer;

-- A rotation reads the bodies, which it can decrypt, and their hashes, and no other column of an instruction.
GRANT SELECT (refund_id, request, request_key) ON refund_ledger.frozen_requests TO refunds_key_rotator;

-- The hash says whether the bytes are the same.
GRANT SELECT (id, source, request_sha256) ON refund_ledger.refund_instructions TO refunds_key_rotator;

-- A rotation puts another encryption of the same bytes in their place.
GRANT UPDATE (request, request_key) ON refund_ledger.frozen_requests TO refunds_key_rotator;

-- The payer moves a refund along its graph, and notes what was written back.
GRANT UPDATE (status, reason, holds, released_by, released_run, released_at, run_rejected_by, attempts,
        first_sent_at, sent_with, lease_until, fence_until, next_attempt_at, payroc_refund_id, payroc_status,
        payroc_seen_at, updated_at, written_back_at)
    ON refund_ledger.refund_states TO refunds_payer;

-- An operator unholds and cancels.
GRANT UPDATE (status, reason, holds, released_holds, updated_at)
    ON refund_ledger.refund_states TO refunds_operator;

-- The payer's follow-up and an operator's decisions note what Payroc shows.
GRANT EXECUTE ON FUNCTION refund_ledger.note_sighting(bigint, text, text, text, text, timestamptz)
    TO refunds_payer, refunds_operator;

-- The payer claims an attempt.
GRANT INSERT (refund_id, attempt, run_id, map_index, try_number, started_at)
    ON refund_ledger.refund_attempts TO refunds_payer;

-- The payer passes the last check, and records how the attempt ended.
GRANT UPDATE (posting_at, finished_at, http_status, problem_type, outcome)
    ON refund_ledger.refund_attempts TO refunds_payer;

-- Events that the database does not write itself. Who may write which: guard_roles_of_events. Number, time
-- and login nobody gives.
GRANT INSERT (event, refund_id, actor, reason, detail)
    ON refund_ledger.refund_events TO refunds_payer, refunds_operator, refunds_key_rotator;

-- Whoever leaves events seals them. Nobody may insert a seal.
GRANT EXECUTE ON FUNCTION refund_ledger.seal(integer)
    TO refunds_payer, refunds_operator, refunds_key_rotator;

-- The payer notes what a run is about.
GRANT INSERT (run_id, params, candidates, candidate_ids, candidate_totals, candidates_hash, approval_basis,
        findings, started_at)
    ON refund_ledger.refund_runs TO refunds_payer;

-- The payer notes the answer that was given in Airflow, and what was released.
GRANT UPDATE (params, candidates, candidate_ids, candidate_totals, candidates_hash, candidates_at,
        approval_basis, findings, started_at, finished_at, approval_needed, asked_hash, question, approved_by,
        approved_at, approved_hash, rejected_by, rejected_at, released, released_totals)
    ON refund_ledger.refund_runs TO refunds_payer;

-- A pause names who pauses and who resumes.
GRANT EXECUTE ON FUNCTION refund_ledger.actor() TO refunds_payer, refunds_operator;

-- Whoever sees something wrong may pause.
GRANT INSERT (scope, reason) ON refund_ledger.pauses TO refunds_payer, refunds_operator;

-- A restore takes an operator.
GRANT INSERT (restored_to) ON refund_ledger.pauses TO refunds_operator;

-- Only an operator resumes, and says that a restored ledger was compared with Payroc. The payer may UPDATE no
-- column, so it can lock no row and hold no operator up.
GRANT UPDATE (compared_at, ended_at, end_reason) ON refund_ledger.pauses TO refunds_operator;

-- Both release or change limits under the gate's lock. To lock a row takes the right to read the table and to
-- UPDATE a column of it.
GRANT SELECT, UPDATE (only_row) ON refund_ledger.gate TO refunds_payer, refunds_operator;

-- Operators set limits.
GRANT UPDATE (largest_refund, run_total, run_count, day_total, day_count, payee_total, payee_count,
        payee_days, duplicate_days, approval_total, approval_count)
    ON refund_ledger.refund_limits TO refunds_operator;

-- The payer binds the ledger to the first Payroc, source and fingerprint key that it works with.
GRANT INSERT (name, value) ON refund_ledger.bindings TO refunds_payer;

-- The payer takes, renews and ends the turn of the write-back.
GRANT SELECT, UPDATE (holder, until) ON refund_ledger.write_back_turn TO refunds_payer;

-- The payer notes invalid rows.
GRANT INSERT (source, source_ref, errors, first_seen_at, last_seen_at, updated_at)
    ON refund_ledger.invalid_rows TO refunds_payer;

-- The payer notes that a row is still invalid, and that this was written back.
GRANT UPDATE (last_seen_at, errors, updated_at, written_back_at)
    ON refund_ledger.invalid_rows TO refunds_payer;

-- The payer forgets rows that are valid now.
GRANT EXECUTE ON FUNCTION refund_ledger.forget_invalid_rows(text, text[], text, timestamptz) TO refunds_payer;

-- The payer notes rows that could not be written back.
GRANT INSERT (source, source_ref, problem, problem_since, offered_again_at)
    ON refund_ledger.write_back_notes TO refunds_payer;

-- The payer notes that such a row is written now, or was offered again.
GRANT UPDATE (problem, problem_since, offered_again_at) ON refund_ledger.write_back_notes TO refunds_payer;

-- The payer notes terminals, and how far it has read their lists.
GRANT INSERT (terminal, read_from, read_to, read_with, refused, failed_at, failure)
    ON refund_ledger.terminals TO refunds_payer;

-- The same after each later reading.
GRANT UPDATE (read_from, read_to, read_with, refused, failed_at, failure)
    ON refund_ledger.terminals TO refunds_payer;

-- The payer keeps what it read; nobody changes or removes it.
GRANT INSERT (payroc_refund_id, idempotency_key, terminal, order_id, amount, currency, last4, payroc_status,
        plain, seen_at)
    ON refund_ledger.foreign_refunds TO refunds_payer;
