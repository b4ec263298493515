"""A ledger full of refunds that ended long ago, made by set-based SQL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg.sql import SQL, Identifier

# Three years: ids ascend with time, as they would have. Everything has ended and is written back, and the requests are emptied.
_INSTRUCTIONS = """
    INSERT INTO refund_ledger.refund_instructions (source, source_ref, source_ref_folded,
        processing_terminal_id, order_id, description, amount, currency, payee_last4, payee_fingerprint,
        request_sha256, requested_by, requested_by_folded, approved_by, approved_by_folded, approved_at,
        idempotency_key, created_at)
    SELECT 'refund_requests', 'old-' || n, 'old-' || n, (2201001 + n %% 40)::text, 'OLD-' || n,
        'Refund of order OLD-' || n, 100 + (n * 7919) %% 99900, 'USD', lpad((n %% 10000)::text, 4, '0'),
        encode(sha256(('payee' || (n * 7919) %% (%(total)s / 3 + 1))::bytea), 'hex'),
        encode(sha256(('body' || n)::bytea), 'hex'), 'ann', 'ann', 'bob', 'bob', at,
        refund_ledger.refund_key('refund_requests', 'old-' || n), at
    FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n
    CROSS JOIN LATERAL (
        SELECT now() - interval '3 years 4 days' + n * (interval '3 years' / %(total)s) AS at) AS approved"""

_STATES = """
    INSERT INTO refund_ledger.refund_states (refund_id, sent_with, status, reason, released_by, released_run,
        released_at, attempts, first_sent_at, fence_until, payroc_refund_id, payroc_status, payroc_seen_at,
        updated_at, written_back_at)
    SELECT id, repeat('a', 64), ended.status, ended.reason, 'payroc_refunds ' || run, run,
        created_at + interval '5 minutes', 1, created_at + interval '6 minutes',
        created_at + interval '76 minutes', lpad(upper(to_hex(id)), 10, '0'), ended.payroc_status,
        changed, changed, changed
    FROM refund_ledger.refund_instructions
    CROSS JOIN LATERAL (
        SELECT created_at + interval '3 days' AS changed,
            'scheduled__' || to_char(created_at, 'YYYY-MM-DD') || 'T11:00:00+00:00' AS run) AS later
    CROSS JOIN LATERAL (SELECT
        CASE WHEN id %% 100 < 97 THEN 'settled' WHEN id %% 100 < 99 THEN 'rejected' ELSE 'returned' END
            AS status,
        CASE WHEN id %% 100 >= 97 AND id %% 100 < 99 THEN 'Declined by the bank.' END AS reason,
        CASE WHEN id %% 100 < 97 THEN 'complete' WHEN id %% 100 < 99 THEN 'declined' ELSE 'returned' END
            AS payroc_status) AS ended
    WHERE id >= %(first)s AND id <= %(last)s"""

_REQUESTS = """
    INSERT INTO refund_ledger.frozen_requests (refund_id, request_key)
    SELECT id, '5f0c21aa' FROM refund_ledger.refund_instructions WHERE id >= %(first)s AND id <= %(last)s"""

_FIRST_RELEASES = """
    INSERT INTO refund_ledger.first_releases (refund_id, payee_fingerprint, amount, currency, run, at)
    SELECT id, payee_fingerprint, amount, currency, released_run, released_at
    FROM refund_ledger.refunds WHERE id >= %(first)s AND id <= %(last)s"""

_ATTEMPTS = """
    INSERT INTO refund_ledger.refund_attempts (refund_id, attempt, run_id, map_index, try_number, started_at,
        posting_at, finished_at, http_status, outcome)
    SELECT id, 1, released_run, (id %% 1000)::integer, 1, first_sent_at - interval '1 second', first_sent_at,
        first_sent_at + interval '1 second', 201,
        CASE status WHEN 'rejected' THEN 'rejected' ELSE 'accepted' END
    FROM refund_ledger.refunds WHERE id >= %(first)s AND id <= %(last)s"""

_EVENTS = """
    INSERT INTO refund_ledger.refund_events (id, at, event, refund_id, from_status, to_status, actor, reason,
        login)
    SELECT nextval('refund_ledger.event_numbers'), updated_at, 'status', id, 'accepted', status,
        'payroc_refunds_followup ' || released_run, reason, 'postgres'
    FROM refund_ledger.refunds WHERE id >= %(first)s AND id <= %(last)s"""

_STATEMENTS = {
    "refund_instructions": _INSTRUCTIONS,
    "refund_states": _STATES,
    "frozen_requests": _REQUESTS,
    "first_releases": _FIRST_RELEASES,
    "refund_attempts": _ATTEMPTS,
    "refund_events": _EVENTS,
}
_STEP = 500_000


def fill(connection: psycopg.Connection, count: int) -> dict[str, float]:
    """
    Put finished refunds into an empty ledger, each with its attempt and one event, and seal the events.

    The other four events that a settled refund has are left out. Triggers are off meanwhile, and
    indexes are made at the end, because ten million rows one by one would take hours.

    :param count: how many.
    :returns: seconds of each part.
    """
    seconds = {}
    connection.execute("SET session_replication_role = replica")
    connection.execute("SET synchronous_commit = off")
    connection.execute("SET maintenance_work_mem = '1GB'")
    connection.execute("SET max_parallel_maintenance_workers = 2")
    began = time.monotonic()
    with _without_indexes(connection):
        for statement in _STATEMENTS.values():
            for first in range(1, count + 1, _STEP):
                connection.execute(
                    statement.encode(),
                    {"first": first, "last": min(first + _STEP - 1, count), "total": count},
                )
        seconds["rows"] = time.monotonic() - began
        began = time.monotonic()
    seconds["indexes"] = time.monotonic() - began
    began = time.monotonic()
    for table in _STATEMENTS:
        connection.execute(SQL("VACUUM (ANALYZE) refund_ledger.{}").format(Identifier(table)))
    seconds["vacuum"] = time.monotonic() - began
    connection.execute("SET session_replication_role = origin")
    began = time.monotonic()
    while _sealed(connection):
        pass
    seconds["seals"] = time.monotonic() - began
    return seconds


def _sealed(connection: psycopg.Connection) -> bool:
    (sealed,) = connection.execute("SELECT sealed FROM refund_ledger.seal()").fetchone() or (0,)
    return bool(sealed)


def warm(connection: psycopg.Connection) -> None:
    """Read the indexes into the server's memory, where those of a ledger that is at work are."""
    connection.execute("CREATE EXTENSION IF NOT EXISTS pg_prewarm")
    connection.execute("""
        SELECT pg_prewarm(indexrelid) FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
        WHERE relnamespace = 'refund_ledger'::regnamespace""")


def sizes(connection: psycopg.Connection) -> dict[str, dict[str, int]]:
    """Return the bytes of each table and of each of its indexes, largest first."""
    query = """
        SELECT t.relname, t.relname AS part, pg_table_size(t.oid) AS bytes FROM pg_class AS t
        WHERE t.relnamespace = 'refund_ledger'::regnamespace AND t.relkind = 'r'
        UNION ALL
        SELECT t.relname, i.relname, pg_relation_size(i.oid) FROM pg_index
        JOIN pg_class AS t ON t.oid = indrelid JOIN pg_class AS i ON i.oid = indexrelid
        WHERE t.relnamespace = 'refund_ledger'::regnamespace
        ORDER BY 3 DESC"""
    found: dict[str, dict[str, int]] = {}
    for table, part, size in connection.execute(query):
        if size > 1_000_000:
            found.setdefault(table, {})["rows" if part == table else part] = size
    return found


@contextmanager
def _without_indexes(connection: psycopg.Connection) -> Iterator[None]:
    """Drop the indexes and foreign keys of these tables, but not the primary keys, and create them again."""
    constraints = connection.execute(
        """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'refund_ledger'::regnamespace AND conrelid::regclass::text = ANY(%s)
          AND contype IN ('u', 'f')
        ORDER BY contype = 'f' DESC""",
        [[f"refund_ledger.{table}" for table in _STATEMENTS]],
    ).fetchall()
    indexes = connection.execute(
        """
        SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
        WHERE indrelid::regclass::text = ANY(%s) AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)""",
        [[f"refund_ledger.{table}" for table in _STATEMENTS]],
    ).fetchall()
    for table, name, _ in constraints:
        connection.execute(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"'.encode())
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}".encode())
    yield
    for table, name, definition in reversed(constraints):
        connection.execute(f'ALTER TABLE {table} ADD CONSTRAINT "{name}" {definition}'.encode())
    for _, definition in indexes:
        connection.execute(definition.encode())
