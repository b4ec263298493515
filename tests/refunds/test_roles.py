"""Each database role can do its work, and the database itself refuses everything else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool
from typer.testing import CliRunner

from demo.postgres import PostgresServer
from include.refunds.approval import Question
from include.refunds.case import DecisionRefused
from include.refunds.cli import app
from include.refunds.demo_source import create_table
from include.refunds.ledger import Ledger, LedgerEngine, Selection
from include.refunds.reissue import reissue
from include.refunds.report import run_report
from include.refunds.roles import APPROVER, AUDITOR, KEY_ROTATOR, MIGRATOR, OPERATOR, PAYER, REQUESTER
from include.refunds.source import SqlSource
from tests.conftest import Login, NewDatabase
from tests.dags.conftest import Runner, airflow_connection
from tests.dags.conftest import run_dag as run_dag
from tests.refunds.conftest import PLAIN, World
from tests.refunds.test_cli import cli
from tests.refunds.test_follow_up import Listing, object_of
from tests.refunds.test_ledger_rules import force
from tests.support.refunds import LISTS, TABLES, TRAIL

# -- what is forbidden ---------------------------------------------------------------------------------------------------------------

A_REFUND = """
    INSERT INTO refund_ledger.refund_instructions (source, source_ref, source_ref_folded,
        processing_terminal_id, order_id, description, amount, currency, payee_last4, payee_fingerprint,
        request_sha256, requested_by, requested_by_folded, approved_by, approved_by_folded, approved_at,
        idempotency_key, created_at{more})
    SELECT source, '{ref}', '{ref}', processing_terminal_id, '{ref}',
        '', amount, currency, payee_last4, payee_fingerprint, {sha256},
        'ann', 'ann', 'bob', 'bob', now(), {key}, now(){values}
    FROM refund_ledger.refund_instructions WHERE id = {of}"""
AN_EVENT = """
    INSERT INTO refund_ledger.refund_events (event, refund_id, actor, reason)
    VALUES ('{event}', {{accepted}}, 'ann', 'x')"""
A_NOTE = (
    "INSERT INTO refund_ledger.write_back_notes (source, source_ref, problem, problem_since) "
    "VALUES ('shop', 'RF-1', 'x', now())"
)
A_PAUSE = "INSERT INTO refund_ledger.pauses (scope, reason) VALUES ('*', 'x')"
A_RESTORE = "INSERT INTO refund_ledger.pauses (scope, reason, restored_to) VALUES ('*', 'x', now())"
RESUME = "UPDATE refund_ledger.pauses SET ended_at = now(), end_reason = 'x'"
COMPARED = "UPDATE refund_ledger.pauses SET compared_at = now() WHERE restored_to IS NOT NULL"
NO_LIMIT = "UPDATE refund_ledger.refund_limits SET largest_refund = NULL"
ALL_TABLES = (
    *TABLES,
    *TRAIL,
    *LISTS,
    "refund_runs",
    "pauses",
    "refund_limits",
    "bindings",
    "gate",
    "write_back_turn",
    "write_back_notes",
    "invalid_rows",
)


def refund(kind: str, assignments: str) -> str:
    return f"UPDATE refund_ledger.refund_states SET {assignments} WHERE refund_id = {{{kind}}}"


def instruction(assignments: str) -> str:
    return f"UPDATE refund_ledger.refund_instructions SET {assignments} WHERE id = {{accepted}}"


def request(kind: str, assignments: str) -> str:
    return f"UPDATE refund_ledger.frozen_requests SET {assignments} WHERE refund_id = {{{kind}}}"


def sighting(kind: str, status: str = "NULL", shown_id: str = "'ZZZZZZZZZZ'") -> str:
    return f"SELECT refund_ledger.note_sighting({{{kind}}}, {status}, 'x', {shown_id}, 'ready', now())"


def event(name: str) -> str:
    return AN_EVENT.format(event=name)


def of_ones_choice(name: str) -> list[str]:
    """Events that the role may write, with a number, a time or a login of its choice."""
    values = {"id": "1000000", "at": "'2000-01-01'", "login": "'somebody_else'"}
    insert = "INSERT INTO refund_ledger.refund_events (event, actor, {}) VALUES ('{}', 'ann', {})"
    return [insert.format(column, name, value) for column, value in values.items()]


DERIVED = "refund_ledger.refund_key(source, 'new')"
REISSUED = {"more": ", replaces, reissue_reason", "values": ", id, 'x'"}


def new_refund(
    of: str, *, sha256: str = "repeat('c', 64)", key: str = DERIVED, more: str = "", values: str = ""
) -> str:
    return A_REFUND.format(ref="new", of=f"{{{of}}}", sha256=sha256, key=key, more=more, values=values)


# Whoever may write nothing but by the functions of the ledger's owner.
EVERYBODY = [
    *(f"DELETE FROM refund_ledger.{table}" for table in ALL_TABLES),
    # A lock of a table that stops readers or writers.
    *(
        f"LOCK TABLE refund_ledger.{table} IN {mode} MODE"
        for table in ALL_TABLES
        for mode in ("SHARE", "ACCESS EXCLUSIVE")
    ),
    "INSERT INTO refund_ledger.refund_states (refund_id, status, updated_at) VALUES (1000, 'approved', now())",
    "INSERT INTO refund_ledger.first_releases SELECT 1000, repeat('a', 64), 1, 'USD', NULL, NULL, now()",
    "UPDATE refund_ledger.first_releases SET at = at - interval '1 year'",
    *(f"TRUNCATE refund_ledger.{table} CASCADE" for table in ALL_TABLES),
    "UPDATE refund_ledger.refund_events SET reason = 'x'",
    "INSERT INTO refund_ledger.event_seals SELECT 1000000, 1000000, '{{}}', '{{}}', 1, '1', 1, now(), sha256('')",
    "UPDATE refund_ledger.event_seals SET hash = sha256('')",
    "UPDATE refund_ledger.schema_version SET version_num = '0001'",
    event("status"),
    event("pause"),
    event("resume"),
    event("limit"),
    event("environment"),
    event("change"),
    event("attempt"),
    event("run"),
    event("approval"),
    event("rejection"),
    instruction("amount = 1"),
    instruction("payee_fingerprint = repeat('0', 64)"),
    instruction("payee_last4 = '0000'"),
    instruction("requested_by = 'eve'"),
    instruction("approved_by = 'eve'"),
    instruction("approved_at = now()"),
    instruction("approved_by_folded = 'carl'"),
    instruction("idempotency_key = gen_random_uuid()"),
    instruction("request_sha256 = repeat('0', 64)"),
    instruction("replaces = {rejected}"),
    refund("approved", "refund_id = 1000"),
    instruction("reissue_reason = 'x'"),
    "UPDATE refund_ledger.bindings SET value = 'https://elsewhere.example.com'",
    "INSERT INTO refund_ledger.gate VALUES (true)",
    "UPDATE refund_ledger.pauses SET reason = 'another'",
    "UPDATE refund_ledger.pauses SET restored_to = NULL",
    "UPDATE refund_ledger.pauses SET paused_at = now()",
    "INSERT INTO refund_ledger.pauses (scope, reason, paused_by) VALUES ('*', 'x', 'eve')",
    "INSERT INTO refund_ledger.pauses (scope, reason, ended_at, ended_by) VALUES ('*', 'x', now(), 'eve')",
    "CREATE OR REPLACE FUNCTION refund_ledger.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT now()'",
    "CREATE TABLE refund_ledger.mine (id bigint)",
    "ALTER TABLE refund_ledger.refund_states DISABLE TRIGGER ALL",
    "ALTER TABLE refund_ledger.refund_instructions DROP CONSTRAINT approver_is_not_requester",
    "DROP TRIGGER guard ON refund_ledger.refund_states",
    "CREATE OR REPLACE FUNCTION refund_ledger.require(what text, VARIADIC roles text[]) RETURNS void LANGUAGE sql AS 'SELECT'",
    "CREATE TRIGGER mine BEFORE INSERT ON refund_ledger.refund_instructions FOR EACH ROW "
    "EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "SET session_replication_role = replica",
    "LOCK TABLE refund_ledger.seal_lock IN ACCESS SHARE MODE",
    "SET ROLE refunds_migrator",
    "SET SESSION AUTHORIZATION postgres",
    "GRANT refunds_migrator TO CURRENT_USER",
    # The ledger's own trigger on a table of one's own would write events with the rights of their owner.
    """CREATE TEMP TABLE mine (refund_id bigint, status text, updated_at timestamptz, reason text);
       CREATE TRIGGER mine AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION refund_ledger.write_state_event()""",
    """CREATE TEMP TABLE mine (LIKE refund_ledger.refund_events);
       CREATE TRIGGER mine AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION refund_ledger.number_event()""",
]

FORBIDDEN: dict[str, list[str]] = {
    PAYER: [
        refund("held", "status = 'approved', holds = '{{}}'"),
        refund("held", "status = 'cancelled'"),
        refund("approved", "status = 'cancelled'"),
        refund("review", "status = 'accepted', payroc_refund_id = 'ZZZZZZZZZZ'"),
        refund("review", "status = 'rejected'"),
        refund("approved", "released_holds = '{{largest_refund}}'"),
        refund("large", "status = 'released', released_by = 'x', released_at = now()"),
        request("approved", "request = NULL"),
        request("accepted", "request = NULL"),
        request("review", "request = NULL"),
        request("rejected", "request = 'other'"),
        request("rejected", "request_key = 'other'"),
        refund("sending", "first_sent_at = now()"),
        refund("sending", "sent_with = 'other'"),
        refund("sending", "attempts = 0"),
        refund("sending", "fence_until = now() + interval '1 hour'"),
        refund("sending", "lease_until = now() - interval '1 hour'"),
        refund("sending", "lease_until = NULL"),
        refund("unknown", "first_sent_at = now()"),
        refund("released", "first_sent_at = now(), sent_with = 'x'"),
        # Another's body under a key of its own would be a second payment.
        new_refund("approved", sha256="request_sha256"),
        # So would a key that does not derive from the row.
        new_refund("approved", key="gen_random_uuid()"),
        new_refund("approved", key="refund_ledger.refund_key(source, 'other')"),
        new_refund("approved", key="idempotency_key"),
        new_refund("rejected", **REISSUED),
        # A limit that is passed, a reason that is not the database's.
        refund("held", "holds = holds || '{{duplicate of 1}}'"),
        refund("held", "holds = '{{by hand}}'"),
        refund("approved", "holds = '{{by hand}}'"),
        refund("released", "status = 'approved', holds = '{{by hand}}'"),
        refund("held", "reason = 'Approved by the bank.'"),
        refund("review", "reason = 'x'"),
        refund("released", "released_at = now() + interval '1 year'"),
        refund("again", "released_by = 'x', released_run = 'run-2'"),
        refund("approved", "payroc_refund_id = 'ZZZZZZZZZZ'"),
        refund("held", "payroc_refund_id = 'ZZZZZZZZZZ'"),
        refund("released", "payroc_refund_id = 'ZZZZZZZZZZ'"),
        refund("approved", "attempts = 1"),
        refund("approved", "first_sent_at = now(), sent_with = 'x'"),
        sighting("approved"),
        sighting("held", "'approved'"),
        sighting("review", "'rejected'", "NULL"),
        event("proposal"),
        event("reverse"),
        event("not_understood"),
        event("rotation"),
        *of_ones_choice("contradiction"),
        RESUME,
        COMPARED,
        "SELECT FROM refund_ledger.pauses FOR UPDATE",
        "SELECT FROM refund_ledger.pauses FOR KEY SHARE",
        A_RESTORE,
        "INSERT INTO refund_ledger.bindings (name, value) VALUES ('environment', 'https://elsewhere.example.com')",
        "INSERT INTO refund_ledger.bindings (name, value) VALUES ('source', 'elsewhere')",
        NO_LIMIT,
        "UPDATE refund_ledger.refund_limits SET approval_count = 1000000",
        refund("sending", "status = 'released', first_sent_at = NULL, sent_with = NULL"),
        # Attempts that were never claimed, and another outcome of one that has ended.
        "INSERT INTO refund_ledger.refund_attempts (refund_id, attempt, run_id, started_at) VALUES ({rejected}, 2, 'run-2', now())",
        "INSERT INTO refund_ledger.refund_attempts (refund_id, attempt, run_id, started_at) VALUES ({sending}, 2, 'run-2', now())",
        "UPDATE refund_ledger.refund_attempts SET outcome = 'not_sent' WHERE refund_id = {unknown}",
        "UPDATE refund_ledger.refund_attempts SET outcome = NULL WHERE refund_id = {accepted}",
        # Without its end an outcome could be changed to any other.
        "UPDATE refund_ledger.refund_attempts SET finished_at = NULL WHERE refund_id = {unknown}",
        "UPDATE refund_ledger.refund_attempts SET outcome = 'unknown' WHERE refund_id = {sending}",
        "UPDATE refund_ledger.refund_attempts SET posting_at = NULL WHERE refund_id = {sending}",
        "UPDATE refund_ledger.refund_attempts SET posting_at = NULL WHERE refund_id = {unknown}",
        "UPDATE refund_ledger.refund_attempts SET posting_at = now() + interval '1 s' WHERE refund_id = {unknown}",
        "UPDATE refund_ledger.refund_attempts SET attempt = 7 WHERE refund_id = {sending}",
        "SET ROLE refunds_operator",
        "SET ROLE refunds_key_rotator",
    ],
    OPERATOR: [
        refund("approved", "status = 'released', released_by = 'x', released_at = now()"),
        refund("again", "status = 'released'"),
        refund("released", "status = 'sending'"),
        refund("released", "status = 'held', holds = '{{x}}'"),
        refund("sending", "status = 'rejected'"),
        refund("sending", "status = 'unknown'"),
        refund("unknown", "status = 'rejected'"),
        refund("unknown", "status = 'review'"),
        refund("approved", "attempts = 1"),
        refund("approved", "first_sent_at = now()"),
        refund("approved", "sent_with = 'x'"),
        refund("approved", "released_holds = '{{largest_refund}}'"),
        request("rejected", "request = NULL"),
        request("rejected", "request = 'other'"),
        new_refund("approved"),
        new_refund("accepted", **REISSUED),
        new_refund("rejected", sha256="request_sha256", **REISSUED),
        new_refund("rejected", key="gen_random_uuid()", **REISSUED),
        new_refund("rejected", more=", replaces", values=", id"),
        # The fence against a worker that stands still, and what Payroc says.
        refund("sending", "lease_until = now()"),
        refund("sending", "fence_until = now()"),
        refund("review", "lease_until = NULL"),
        refund("unknown", "next_attempt_at = now()"),
        refund("approved", "payroc_refund_id = 'ZZZZZZZZZZ'"),
        refund("accepted", "payroc_status = 'complete'"),
        refund("accepted", "payroc_seen_at = now()"),
        refund("accepted", "written_back_at = updated_at"),
        refund("held", "reason = 'x'"),
        refund("held", "holds = '{{by hand}}'"),
        refund("leased", "status = 'rejected'"),
        sighting("leased", "'rejected'", "NULL"),
        sighting("approved"),
        sighting("released"),
        sighting("sending", "'accepted'"),
        sighting("unknown", "'review'"),
        sighting("approved", "'accepted'"),
        sighting("approved", "'released'"),
        event("rotation"),
        *of_ones_choice("proposal"),
        "INSERT INTO refund_ledger.bindings (name, value) VALUES ('environment', 'https://elsewhere.example.com')",
        "UPDATE refund_ledger.write_back_turn SET holder = 'erin', until = now()",
        "UPDATE refund_ledger.pauses SET ended_at = now() WHERE restored_to IS NOT NULL",
        "UPDATE refund_ledger.pauses SET compared_at = now() WHERE restored_to IS NULL",
        "UPDATE refund_ledger.pauses SET ended_at = NULL WHERE ended_at IS NOT NULL",
        "UPDATE refund_ledger.pauses SET end_reason = 'another' WHERE ended_at IS NOT NULL",
        "UPDATE refund_ledger.pauses SET end_reason = 'x' WHERE ended_at IS NULL",
        "UPDATE refund_ledger.refund_runs SET approved_by = 'eve'",
        "INSERT INTO refund_ledger.refund_attempts (refund_id, attempt, run_id, started_at) VALUES ({sending}, 2, 'run-2', now())",
        "UPDATE refund_ledger.refund_attempts SET outcome = 'not_sent' WHERE refund_id = {sending}",
        "DELETE FROM refund_ledger.invalid_rows",
        A_NOTE,
        "UPDATE refund_ledger.write_back_notes SET problem = NULL, problem_since = NULL",
        "SET ROLE refunds_payer",
    ],
    AUDITOR: [
        "SELECT request FROM refund_ledger.frozen_requests",
        "SELECT sent_with FROM refund_ledger.refund_states",
        "SELECT FROM refund_ledger.first_releases FOR UPDATE",
        "UPDATE refund_ledger.refund_states SET status = 'cancelled'",
        sighting("review", "'accepted'"),
        refund("approved", "status = 'cancelled'"),
        event("contradiction"),
        new_refund("approved"),
        A_PAUSE,
        A_RESTORE,
        RESUME,
        COMPARED,
        NO_LIMIT,
        "SELECT FROM refund_ledger.gate FOR KEY SHARE",
        "UPDATE refund_ledger.refund_runs SET approved_by = 'eve'",
        "DELETE FROM refund_ledger.invalid_rows",
        A_NOTE,
        "UPDATE refund_ledger.write_back_notes SET problem = NULL, problem_since = NULL",
        "SET ROLE refunds_operator",
    ],
    KEY_ROTATOR: [
        "SELECT * FROM refund_ledger.refund_states",
        "SELECT FROM refund_ledger.refund_states FOR UPDATE",
        "SELECT amount FROM refund_ledger.refund_instructions",
        sighting("review", "'accepted'"),
        "SELECT payee_last4 FROM refund_ledger.refunds",
        "SELECT * FROM refund_ledger.refund_events",
        refund("approved", "status = 'cancelled'"),
        request("rejected", "request = NULL, request_key = NULL"),
        request("approved", "request = NULL"),
        event("contradiction"),
        event("proposal"),
        *of_ones_choice("rotation"),
        "SELECT * FROM refund_ledger.pauses",
        "SELECT * FROM refund_ledger.refund_limits",
        A_PAUSE,
        RESUME,
        "SET ROLE refunds_payer",
    ],
    REQUESTER: ["SELECT * FROM refund_ledger.refunds", "SET ROLE refunds_approver"],
    APPROVER: ["SELECT * FROM refund_ledger.refunds", "SET ROLE refunds_payer"],
    # Logins of their own, and those from before there were roles.
    "old login": [
        refund("approved", "status = 'cancelled'"),
        refund("approved", "status = 'released', released_by = 'x', released_at = now()"),
        refund("released", "status = 'approved'"),
        refund("accepted", "status = 'settled'"),
        request("rejected", "request = NULL"),
        new_refund("approved"),
        new_refund("rejected", **REISSUED),
        sighting("review", "'accepted'"),
        event("contradiction"),
        RESUME,
        NO_LIMIT,
    ],
}

ROW = "source_ref, processing_terminal_id, amount, currency, requested_by"
FORBIDDEN_IN_THE_SOURCE: dict[str, list[str]] = {
    REQUESTER: [
        f"INSERT INTO refund_requests ({ROW}, approved_by, approved_at) VALUES ('b', '7701001', 1, 'USD', 'ann', 'bob', now())",
        f"INSERT INTO refund_requests ({ROW}, approved_at) VALUES ('b', '7701001', 1, 'USD', 'ann', now())",
        f"INSERT INTO refund_requests ({ROW}, status) VALUES ('b', '7701001', 1, 'USD', 'ann', 'settled')",
        f"INSERT INTO refund_requests ({ROW}) VALUES ('b', '7701001', 1, 'USD', 'ann') RETURNING account_number",
        f"INSERT INTO refund_requests ({ROW}) VALUES ('a', '7701001', 1, 'USD', 'ann') ON CONFLICT (source_ref) DO UPDATE SET amount = 1",
        "SELECT source_ref FROM refund_requests",
        "UPDATE refund_requests SET amount = 1",
        "UPDATE refund_requests SET approved_by = 'bob', approved_at = now()",
        "SET ROLE refunds_approver",
    ],
    APPROVER: [
        "SELECT * FROM refund_requests",
        "SELECT account_number FROM refund_requests",
        "SELECT routing_number FROM refund_requests",
        "SELECT secure_token FROM refund_requests",
        "SELECT source_ref FROM refund_requests WHERE account_number LIKE '1%'",
        "SELECT refund_requests::text FROM refund_requests",
        "UPDATE refund_requests SET amount = 1",
        "UPDATE refund_requests SET account_number = '1'",
        "UPDATE refund_requests SET requested_by = 'carol'",
        "UPDATE refund_requests SET status = 'settled'",
        "UPDATE refund_requests SET approved_by = ' Ann ', approved_at = now()",
        f"INSERT INTO refund_requests ({ROW}) VALUES ('b', '7701001', 1, 'USD', 'ann')",
        "SET ROLE refunds_requester",
    ],
    PAYER: [
        "UPDATE refund_requests SET amount = 1",
        "UPDATE refund_requests SET account_number = '1'",
        "UPDATE refund_requests SET approved_by = 'bob', approved_at = now()",
        "UPDATE refund_requests SET withdrawn_at = NULL",
        f"INSERT INTO refund_requests ({ROW}) VALUES ('b', '7701001', 1, 'USD', 'ann')",
        "SET ROLE refunds_approver",
    ],
}
EVERYBODY_IN_THE_SOURCE = [
    "DELETE FROM refund_requests",
    "TRUNCATE refund_requests",
    "ALTER TABLE refund_requests DROP CONSTRAINT approver_is_not_requester",
    "CREATE TABLE public.mine (id bigint)",
]

SENDING = (
    "status = 'sending', attempts = 1, first_sent_at = now(), sent_with = 'x', lease_until = now(), fence_until = now(), "
    "next_attempt_at = now()"
)
RELEASED = "status = 'released', released_by = 'x', released_run = 'run-1', released_at = now()"
WAYS: dict[str, tuple[str, ...]] = {
    "approved": (),
    "large": (),
    "held": ("status = 'held', holds = '{largest_refund}'",),
    "released": (RELEASED,),
    "again": (RELEASED, "status = 'approved'"),
    "sending": (RELEASED, SENDING),
    "unknown": (RELEASED, SENDING, "status = 'unknown'"),
    "accepted": (RELEASED, SENDING, "status = 'accepted', payroc_refund_id = 'ABCDEFGHIJ'"),
    "rejected": (RELEASED, SENDING, "status = 'rejected'"),
    "review": (RELEASED, SENDING, "status = 'review'"),
    # In review while its attempt may still be under way.
    "leased": (RELEASED, SENDING, "status = 'review', lease_until = now() + interval '1 day'"),
}
IDS = {kind: number for number, kind in enumerate(WAYS, start=1)}


def fill(connection: Connection) -> None:
    """Put a refund of each kind into an empty ledger, a pause, a limit, a run and an invalid row."""
    for kind, assignments in WAYS.items():
        connection.exec_driver_sql(f"""
            WITH stored AS (
                INSERT INTO refund_ledger.refund_instructions (source, source_ref, source_ref_folded,
                    processing_terminal_id, order_id, description, amount, currency, payee_last4,
                    payee_fingerprint, request_sha256, requested_by, requested_by_folded, approved_by,
                    approved_by_folded, approved_at, idempotency_key, created_at)
                VALUES ('shop', '{kind}', '{kind}', '7701001', '{kind}', 'Refund',
                    {10**6 if kind == "large" else 4999}, 'USD', '4321', repeat('a', 64),
                    repeat(md5('{kind}'), 2), 'ann', 'ann', 'bob', 'bob', now(),
                    refund_ledger.refund_key('shop', '{kind}'), now())
                RETURNING id
            )
            INSERT INTO refund_ledger.frozen_requests SELECT id, 'sealed', 'first' FROM stored""")
        for assignment in assignments:
            connection.exec_driver_sql(
                f"UPDATE refund_ledger.refund_states SET {assignment} WHERE refund_id = {IDS[kind]}"
            )
            if assignment == SENDING:
                connection.exec_driver_sql(
                    "INSERT INTO refund_ledger.refund_attempts (refund_id, attempt, run_id, started_at, posting_at) "
                    f"VALUES ({IDS[kind]}, 1, 'run-1', now(), now())"
                )
        if kind in ("unknown", "accepted", "rejected"):
            connection.exec_driver_sql(
                f"UPDATE refund_ledger.refund_attempts SET finished_at = now(), outcome = '{kind}' WHERE refund_id = {IDS[kind]}"
            )
    connection.exec_driver_sql("""
        INSERT INTO refund_ledger.bindings
        VALUES ('environment', 'https://api.example.com'), ('source', 'shop'), ('fingerprint_check', 'x')""")
    connection.exec_driver_sql("UPDATE refund_ledger.refund_limits SET largest_refund = 100000")
    for _ in range(2):
        connection.exec_driver_sql(A_PAUSE)
    connection.exec_driver_sql(RESUME + " WHERE id = 1")
    connection.exec_driver_sql(A_RESTORE)
    connection.exec_driver_sql("""
        INSERT INTO refund_ledger.refund_runs (run_id, params, candidates, candidate_totals, candidates_hash, started_at)
        VALUES ('run-1', '{}', 1, '{}', 'hash', now())""")
    connection.exec_driver_sql(
        "INSERT INTO refund_ledger.invalid_rows VALUES ('shop', 'bad', '{}', now(), now(), now())"
    )


@pytest.fixture(scope="module")
def filled_ledger(new_ledger: NewDatabase) -> URL:
    """A ledger with a refund of each kind. Only refused statements are run on it, so the tests share it."""
    url = new_ledger()
    engine = create_engine(url)
    with engine.begin() as connection:
        fill(connection)
        # As a login of an installation that is older than the roles: it was given the tables.
        connection.exec_driver_sql("CREATE ROLE old_login LOGIN PASSWORD 'old_login'")
        connection.exec_driver_sql(f"GRANT CONNECT ON DATABASE {url.database} TO old_login")
        connection.exec_driver_sql("GRANT USAGE ON SCHEMA refund_ledger TO old_login")
        connection.exec_driver_sql(
            "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA refund_ledger TO old_login"
        )
    engine.dispose()
    return url


@pytest.fixture(scope="module")
def filled_source(new_source: NewDatabase) -> URL:
    url = new_source()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO refund_requests ({ROW}) VALUES ('a', '7701001', 4999, 'USD', 'ann')"
        )
    engine.dispose()
    return url


class Connections:
    """Engines of logins, kept for the module."""

    def __init__(self, login: Login) -> None:
        self._login = login
        self._engines: dict[URL, Engine] = {}

    def of(self, url: URL, role: str) -> Engine:
        name = "old_login"
        own = url.set(username=name, password=name) if role == "old login" else self._login(url, role)
        return self._engines.setdefault(own, create_engine(own))

    def close(self) -> None:
        for engine in self._engines.values():
            engine.dispose()


@pytest.fixture(scope="module")
def connections(login: Login) -> Iterator[Connections]:
    connections = Connections(login)
    yield connections
    connections.close()


def refused(engine: Engine, statement: str) -> str:
    """Run a statement to its commit, and return with what the database refused it."""
    with pytest.raises(DBAPIError) as caught, engine.begin() as connection:
        connection.exec_driver_sql(statement.replace("%", "%%"))
    return str(caught.value.orig.sqlstate)  # type: ignore[union-attr]


# No right, a check or a unique index of the ledger, or a trigger of its. Anything else would be a mistake of the statement.
REFUSALS = {"42501", "23514", "23505", "23001"}


def name_of(statement: str) -> str:
    return re.sub(r"\s+", " ", statement.replace("refund_ledger.", ""))[:80]


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        *((role, statement) for role in (PAYER, OPERATOR, AUDITOR, KEY_ROTATOR) for statement in EVERYBODY),
        *((role, statement) for role, statements in FORBIDDEN.items() for statement in statements),
    ],
    ids=name_of,
)
def test_the_ledger_refuses_what_a_role_may_not_do(
    connections: Connections, filled_ledger: URL, role: str, statement: str
) -> None:
    assert refused(connections.of(filled_ledger, role), statement.format(**IDS)) in REFUSALS


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        *(
            (role, statement)
            for role in (REQUESTER, APPROVER, PAYER)
            for statement in EVERYBODY_IN_THE_SOURCE
        ),
        *(
            (role, statement)
            for role, statements in FORBIDDEN_IN_THE_SOURCE.items()
            for statement in statements
        ),
    ],
    ids=name_of,
)
def test_the_source_refuses_what_a_role_may_not_do(
    connections: Connections, filled_source: URL, role: str, statement: str
) -> None:
    assert refused(connections.of(filled_source, role), statement) in REFUSALS


# What is only added, and what not even the owner of the tables may do to it.
ONLY_ADDED = {
    **dict.fromkeys(
        ("refund_instructions", "first_releases", "refund_events", "event_seals", "bindings"),
        ("UPDATE", "DELETE", "TRUNCATE"),
    ),
    **dict.fromkeys(
        ("frozen_requests", "refund_states", "refund_attempts", "pauses"), ("DELETE", "TRUNCATE")
    ),
}
OWNERS = {
    "UPDATE": "UPDATE refund_ledger.{table} SET {column} = {column}",
    "DELETE": "DELETE FROM refund_ledger.{table}",
    "TRUNCATE": "TRUNCATE refund_ledger.{table} CASCADE",
}


@pytest.mark.parametrize(
    ("table", "what"), [(table, what) for table, refused in ONLY_ADDED.items() for what in refused]
)
def test_what_is_only_added_is_refused_to_the_owner_too(filled_ledger: URL, table: str, what: str) -> None:
    engine = create_engine(filled_ledger, poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("SELECT FROM refund_ledger.seal()")
        (column,) = connection.exec_driver_sql(
            f"SELECT attname FROM pg_attribute WHERE attrelid = 'refund_ledger.{table}'::regclass AND attnum = 2"
        ).one()
        with pytest.raises(DBAPIError, match="append-only"):
            connection.exec_driver_sql(OWNERS[what].format(table=table, column=column))


def test_operators_of_a_schema_of_ones_own_do_not_take_the_place_of_those_that_the_guards_use(
    postgres: PostgresServer, connections: Connections, filled_ledger: URL
) -> None:
    payer = connections.of(filled_ledger, PAYER)
    with postgres.connect(str(filled_ledger.database)) as connection:
        connection.execute(f"CREATE SCHEMA mine AUTHORIZATION {payer.url.username}")
    never = "FUNCTION mine.never(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false'"
    with payer.begin() as own:
        own.exec_driver_sql(
            f"CREATE {never}; CREATE OPERATOR mine.<> (LEFTARG = text, RIGHTARG = text, FUNCTION = mine.never)"
        )
        own.exec_driver_sql(
            f"ALTER ROLE CURRENT_USER IN DATABASE {filled_ledger.database} SET search_path = mine, pg_catalog"
        )
    payer.dispose()
    forged = refund("approved", "status = 'unknown', payroc_refund_id = 'ZZZZZZZZZZ'").format(**IDS)
    try:
        assert refused(payer, forged) == "23514"
    finally:
        with payer.begin() as own:
            own.exec_driver_sql(
                f"ALTER ROLE CURRENT_USER IN DATABASE {filled_ledger.database} RESET search_path"
            )
        payer.dispose()


def test_all_of_the_ledger_is_the_migrators_and_no_function_of_it_is_everybodys_or_follows_the_callers_search_path(
    filled_ledger: URL, connections: Connections
) -> None:
    owners = """
        SELECT nspname, pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'refund_ledger'
        UNION ALL SELECT relname, pg_get_userbyid(relowner) FROM pg_class
        WHERE relnamespace = 'refund_ledger'::regnamespace AND relkind IN ('r', 'v', 'S')
        UNION ALL SELECT proname, pg_get_userbyid(proowner) FROM pg_proc WHERE pronamespace = 'refund_ledger'::regnamespace"""
    # now() names the schema of all that it uses.
    loose = """
        SELECT proname FROM pg_proc WHERE pronamespace = 'refund_ledger'::regnamespace
        AND (proacl IS NULL OR has_function_privilege('public', oid, 'EXECUTE')
             OR proname <> 'now' AND proconfig IS DISTINCT FROM ARRAY['search_path=pg_catalog, pg_temp'])"""
    with connections.of(filled_ledger, AUDITOR).connect() as connection:
        assert {owner for _, owner in connection.exec_driver_sql(owners)} == {MIGRATOR}
        assert connection.exec_driver_sql(loose).all() == []


# -- what each role can do -----------------------------------------------------------------------------------------------------------


def acting(world: World, url: URL, actor: str = "test") -> Ledger:
    """Return the world's ledger, through another login."""
    return Ledger(LedgerEngine(url, pool_size=0), world.settings, actor=actor)


def command(url: URL, *arguments: str, by: str | None = None, exit_code: int = 0) -> str:
    """Run a command in this process, and return what it printed."""
    who = ("--by", by, "--reason", "seen") if by else ()
    done = CliRunner().invoke(
        app, [*arguments, *who, "--ledger-url", url.render_as_string(hide_password=False)]
    )
    assert done.exit_code == exit_code, (done.output, done.exception)
    return done.output


def enter(source: URL, login: Login, ref: str, **columns: Any) -> None:
    """Request a refund as a requester, and approve it as an approver."""
    row = {
        "source_ref": ref,
        **PLAIN,
        "order_id": ref,
        "account_number": "556670000004321",
        "requested_by": "ann",
    } | columns
    steps = (
        (
            REQUESTER,
            f"INSERT INTO refund_requests ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})",
        ),
        (
            APPROVER,
            "UPDATE refund_requests SET approved_by = 'bob', approved_at = now() WHERE source_ref = :source_ref AND amount = :amount",
        ),
    )
    for role, statement in steps:
        engine = create_engine(login(source, role), poolclass=NullPool)
        with engine.begin() as connection:
            assert connection.execute(text(statement), row).rowcount == 1


def test_both_dags_do_all_their_work_with_the_payers_rights_alone(
    world: World,
    run_dag: Runner,
    ledger_url: URL,
    source_url: URL,
    login: Login,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, url in {"LEDGER": ledger_url, "SOURCE": source_url}.items():
        monkeypatch.setenv(f"AIRFLOW_CONN_REFUNDS_{name}", airflow_connection(login(url, PAYER)))
    people = login(ledger_url, OPERATOR)
    command(people, "limit", "largest_refund", "100000", by="erin")
    enter(source_url, login, "roles-paid")
    enter(source_url, login, "roles-rejected", account_number="556670000009002")
    enter(source_url, login, "roles-invalid", routing_number="123456789")
    enter(source_url, login, "roles-large", amount=100_001)
    run = run_dag()
    assert (run.state, run.result["notes"][0][:7]) == ("success", "1 held:")
    rows = {
        ref: world.source_row(f"roles-{ref}")["status"] for ref in ("paid", "rejected", "invalid", "large")
    }
    assert rows == {"paid": "accepted", "rejected": "rejected", "invalid": "invalid", "large": "held"}

    # A configuration error pauses sending, people let it go on.
    world.fault(None, "problem", problem="forbidden")
    enter(source_url, login, "roles-later")
    assert run_dag().state == "failed"
    assert list(world.paused()) == ["*"]
    command(people, "resume", by="erin")
    command(people, "unhold", str(world.row("roles-large")["id"]), by="erin")
    assert run_dag().state == "success"
    assert {world.row(f"roles-{ref}")["status"] for ref in ("later", "large")} == {"accepted"}

    # The follow-up reads Payroc, and empties the request of what ended long ago.
    world.sandbox.patch(
        f"/_sandbox/refunds/{world.row('roles-paid')['payroc_refund_id']}", {"status": "complete"}
    )
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql(
            "UPDATE refund_ledger.refund_states SET updated_at = now() - interval '31 days' WHERE status = 'rejected'"
        )
    run = run_dag("payroc_refunds_followup")
    assert run.state == "success", run.log
    assert world.source_row("roles-paid")["status"] == "settled"
    assert [world.row(f"roles-{ref}")["request"] is None for ref in ("paid", "rejected")] == [False, True]

    logins = world.rows(
        "SELECT event, login FROM refund_ledger.refund_events GROUP BY event, login ORDER BY event, login"
    )
    own, theirs = (login(ledger_url, role).username for role in (PAYER, OPERATOR))
    assert {row["login"] for row in logins} == {own, theirs}
    assert [row["login"] for row in logins if row["event"] in ("resume", "limit")] == [theirs, theirs]
    assert "intact" in command(login(ledger_url, AUDITOR), "verify-audit")


def test_the_payer_notes_the_answer_about_a_run_and_what_payroc_shows_of_a_held_refund(
    world: World, ledger_url: URL, login: Login
) -> None:
    world.limit(approval_count=0, largest_refund=5000)
    small, large = world.approve(), world.approve(amount=5001)
    world.pull()
    world.ledger = acting(world, login(ledger_url, PAYER))

    async def work() -> tuple[Question | None, list[int]]:
        ids = [item.id for item in await world.ledger.runs.candidates(Selection())]
        await world.ledger.runs.begin_run(
            "run-1", {}, await world.ledger.runs.candidates(Selection()), {}, await world.ledger.now()
        )
        question = await world.ledger.approvals.ask_approval("run-1")
        await world.ledger.approvals.record_rejection("run-1", by="dora")
        await world.ledger.approvals.record_approval("run-1", by="frank", triggered_by=None)
        return question, await world.release_only("run-1", ids)

    question, released = world.run(work())
    assert question is not None
    assert released == [world.row(small)["id"]]
    held = world.row(large)
    assert held["status"] == "held"
    found = object_of(world, held["id"], "FOUND00002")
    world.gateway = Listing(world, lambda listed: [*listed, found])
    world.follow_up()
    assert (world.row(large)["status"], list(world.paused())) == ("accepted", ["*"])


def test_people_do_all_their_commands_with_the_operators_rights_alone(
    world: World, ledger_url: URL, login: Login
) -> None:
    url, of_frank = (login(ledger_url, OPERATOR, name) for name in ("erin", "frank"))
    # A terminal of its own: the local Payroc holds the refunds of other tests too.
    terminal = "7701792"
    for scope in ((), ("--terminal", terminal)):
        command(url, "pause", *scope, by="erin")
        command(url, "resume", *scope, by="erin")
    command(url, "limit", "largest_refund", "10000", by="erin")
    held = [world.released(amount=10_001, processing_terminal_id=terminal) for _ in range(2)]
    assert {world.row(refund_id)["status"] for refund_id in held} == {"held"}
    command(url, "unhold", str(held[0]), by="erin")
    command(url, "cancel", str(held[1]), by="erin")
    review, paid, waiting = (
        world.released(ending, processing_terminal_id=terminal) for ending in ("9013", "4321", "4321")
    )
    for refund_id in (review, paid):
        world.send(refund_id)
    command(url, "cancel", str(waiting), by="erin")
    command(url, "resolve", str(review), "--as", "accepted", by="erin", exit_code=1)
    command(of_frank, "resolve", str(review), "--as", "accepted", by="frank")
    command(url, "reverse", str(paid), by="erin")
    command(url, "reissue", str(paid), by="erin", exit_code=1)
    command(of_frank, "reissue", str(paid), by="frank")
    statuses = [row["status"] for row in world.rows("SELECT status FROM refund_ledger.refunds ORDER BY id")]
    assert statuses == ["approved", "cancelled", "accepted", "reversed", "cancelled", "approved"]
    reissue = world.rows(
        "SELECT replaces, requested_by, approved_by FROM refund_ledger.refunds ORDER BY id DESC LIMIT 1"
    )[0]
    assert tuple(reissue.values()) == (paid, "erin", "frank")
    today = f"{world.run(world.ledger.now()):%Y-%m-%d}"
    for arguments in (
        ("status",),
        ("show", str(paid)),
        ("limits",),
        ("verify-audit",),
        ("verify", "--from", today, "--to", today),
    ):
        command(url, *arguments)


def test_what_follows_a_restore_takes_the_rights_of_payer_and_operator_together(
    world: World,
    ledger_url: URL,
    source_url: URL,
    login: Login,
    postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(
        "AIRFLOW_CONN_REFUNDS_SOURCE",
        source_url.set(drivername="postgres").render_as_string(hide_password=False),
    )
    refund_id = world.released(processing_terminal_id="7701793")
    # As in a ledger that was restored from a backup of before it was sent.
    world.send(refund_id)
    force(
        world,
        refund_id,
        "status = 'released', payroc_refund_id = NULL, payroc_status = NULL, attempts = 0, first_sent_at = NULL",
    )
    arguments = ("restored", "--backup-at", "2026-01-01", "--by", "erin", "--reason", "the disk was lost")
    for role in (PAYER, OPERATOR):
        refused = cli(*arguments, ledger=login(ledger_url, role))
        assert refused.returncode == 2
        assert "give --ledger-url a login that is granted both" in refused.stderr
    assert world.paused() == {}
    with postgres.connect() as connection:
        connection.execute(f"GRANT {PAYER} TO {login(ledger_url, OPERATOR, 'restorer').username}")
    both = login(ledger_url, OPERATOR, "restorer")
    assert f"Refund {refund_id} " in command(both, *arguments)
    assert world.row(refund_id)["status"] == "accepted"
    command(both, "resume", by="erin")


def test_a_reissue_that_finds_the_first_refund_paid_is_refused_and_noted_with_the_operators_rights_alone(
    world: World, ledger_url: URL, login: Login
) -> None:
    refund_id = world.released("9002")
    world.send(refund_id)
    found = object_of(world, refund_id, "FOUND00003")
    world.gateway = Listing(world, lambda listed: [*listed, found])
    world.ledger = acting(world, login(ledger_url, OPERATOR), "erin")
    work = reissue(
        refund_id,
        "seen",
        ledger=world.ledger,
        gateway=world.gateway,
        cipher=world.cipher,
        source=world.settings.source,
    )
    with pytest.raises(DecisionRefused, match="may be paid after all"):
        world.run(work)
    assert (world.row(refund_id)["status"], list(world.paused())) == ("review", ["*"])


def test_an_auditor_sees_everything_but_requests(world: World, ledger_url: URL, login: Login) -> None:
    refund_id, invalid = world.released(), world.approve(routing_number="123456789")
    world.send(refund_id)
    world.send(world.released("9013"))
    world.pull()
    world.run(world.ledger.pauses.pause("7701009", "the bank called"))
    world.run(world.ledger.seals.seal())
    url = login(ledger_url, AUDITOR)
    assert "1 in review" in command(url, "status", exit_code=1)
    assert world.row(refund_id)["payroc_refund_id"] in command(url, "show", str(refund_id))
    assert "largest_refund" in command(url, "limits")
    assert "intact" in command(url, "verify-audit")
    report = world.run(run_report(LedgerEngine(url, pool_size=0), world.settings.source, "run-1"))
    assert report.audit_head is not None
    assert invalid in report.invalid
    shown = json.loads(command(url, "show", str(refund_id), "--json"))
    assert not {"request", "request_sha256", "sent_with", "payee_fingerprint"} & set(shown)


def test_a_changed_limit_and_the_end_of_a_pause_leave_their_events_though_they_are_done_by_hand(
    world: World, ledger_url: URL, login: Login
) -> None:
    world.run(world.ledger.pauses.pause("*", "the bank called"))
    engine = create_engine(login(ledger_url, OPERATOR), poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE refund_ledger.pauses SET ended_at = '2020-01-01', end_reason = 'all is well'"
        )
        connection.exec_driver_sql("UPDATE refund_ledger.refund_limits SET day_total = 5, approval_count = 0")
    name = engine.url.username
    events = world.rows(
        "SELECT event, actor, login, reason, detail FROM refund_ledger.refund_events ORDER BY id"
    )
    assert [tuple(row.values()) for row in events[1:]] == [
        ("resume", name, name, "all is well", {"pause": 1, "scope": "*"}),
        ("limit", name, name, None, {"limit": "approval_count", "from": None, "to": 0}),
        ("limit", name, name, None, {"limit": "day_total", "from": None, "to": 5}),
    ]


# -- the source ----------------------------------------------------------------------------------------------------------------------


def test_a_table_that_is_older_than_the_rule_of_two_people_gets_it_and_its_rows_are_still_written_back(
    postgres: PostgresServer, world: World, source_url: URL, login: Login
) -> None:
    with postgres.connect(str(source_url.database)) as connection:
        connection.execute("ALTER TABLE refund_requests DROP CONSTRAINT approver_is_not_requester")
    alone, fine = world.approve(requested_by="Bob", approved_by="bob "), world.approve()
    for _ in range(2):
        create_table(source_url)
    world.source = SqlSource(create_engine(login(source_url, PAYER), poolclass=NullPool))
    world.pull()
    world.release()
    assert world.write_back() == (2, [])
    assert [world.source_row(ref)["status"] for ref in (alone, fine)] == ["invalid", "released"]
    with pytest.raises(DBAPIError, match="approver_is_not_requester"):
        world.approve(requested_by="Bob", approved_by="bob ")
