"""A ledger full of refunds that ended long ago, made by set-based SQL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg.sql import SQL, Identifier

# Three years: ids ascend with time, as they would have. Everything has ended and is written back, and the requests are emptied.
_REFUNDS = """
    INSERT INTO refund_ledger.refunds (source, source_ref, source_ref_folded, processing_terminal_id,
        order_id, description, amount, currency, payee_last4, payee_fingerprint, request_sha256,
        requested_by, requested_by_folded, approved_by, approved_by_folded, approved_at,
        idempotency_key, sent_with, status, reason, released_by,
        released_run, released_at, first_released_at, first_released_run, attempts, first_sent_at,
        payroc_refund_id, payroc_status, payroc_seen_at, created_at, updated_at, written_back_at)
    SELECT 'refund_requests', 'old-' || n, 'old-' || n, (2201001 + n %% 40)::text, 'OLD-' || n,
        'Refund of order OLD-' || n, 100 + (n * 7919) %% 99900, 'USD', lpad((n %% 10000)::text, 4, '0'),
        encode(sha256(('payee' || (n * 7919) %% (%(total)s / 3 + 1))::bytea), 'hex'),
        encode(sha256(('body' || n)::bytea), 'hex'), 'ann', 'ann', 'bob', 'bob', at,
        md5('key' || n)::uuid, repeat('a', 64), ended.status,
        ended.reason, 'payroc_refunds ' || run, run, at + interval '5 minutes',
        at + interval '5 minutes', run, 1, at + interval '6 minutes',
        CASE WHEN ended.status <> 'cancelled' THEN lpad(upper(to_hex(n)), 10, '0') END, ended.payroc_status, changed, at, changed, changed
    FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n
    CROSS JOIN LATERAL (SELECT now() - interval '3 years 4 days' + n * (interval '3 years' / %(total)s) AS at) AS approved
    CROSS JOIN LATERAL (
        SELECT at + interval '3 days' AS changed, 'scheduled__' || to_char(at, 'YYYY-MM-DD') || 'T11:00:00+00:00' AS run) AS later
    CROSS JOIN LATERAL (SELECT
        CASE WHEN n %% 100 < 97 THEN 'settled' WHEN n %% 100 < 99 THEN 'rejected' ELSE 'returned' END AS status,
        CASE WHEN n %% 100 >= 97 AND n %% 100 < 99 THEN 'Declined by the bank.' END AS reason,
        CASE WHEN n %% 100 < 97 THEN 'complete' WHEN n %% 100 < 99 THEN 'declined' ELSE 'returned' END AS payroc_status) AS ended"""

_ATTEMPTS = """
    INSERT INTO refund_ledger.refund_attempts (refund_id, attempt, run_id, map_index, try_number, started_at, finished_at, http_status,
        outcome)
    SELECT id, 1, released_run, (id %% 1000)::integer, 1, first_sent_at, first_sent_at + interval '1 second', 201,
        CASE status WHEN 'rejected' THEN 'rejected' ELSE 'accepted' END
    FROM refund_ledger.refunds WHERE id >= %(first)s AND id <= %(last)s"""

_EVENTS = """
    INSERT INTO refund_ledger.refund_events (id, at, event, refund_id, from_status, to_status, actor, reason, login)
    SELECT nextval('refund_ledger.event_numbers'), updated_at, 'status', id, 'accepted', status,
        'payroc_refunds_followup ' || released_run, reason, 'postgres'
    FROM refund_ledger.refunds WHERE id >= %(first)s AND id <= %(last)s"""

_TABLES = ("refunds", "refund_attempts", "refund_events")
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
        for statement in (_REFUNDS, _ATTEMPTS, _EVENTS):
            for first in range(1, count + 1, _STEP):
                connection.execute(
                    statement.encode(),
                    {"first": first, "last": min(first + _STEP - 1, count), "total": count},
                )
        seconds["rows"] = time.monotonic() - began
        began = time.monotonic()
    seconds["indexes"] = time.monotonic() - began
    began = time.monotonic()
    for table in _TABLES:
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
    """Take away all indexes and foreign keys of the three tables, and make the same ones again."""
    constraints = connection.execute(
        """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'refund_ledger'::regnamespace AND conrelid::regclass::text = ANY(%s) AND contype IN ('p', 'u', 'f')
        ORDER BY contype = 'f' DESC""",
        [[f"refund_ledger.{table}" for table in _TABLES]],
    ).fetchall()
    indexes = connection.execute(
        """
        SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
        WHERE indrelid::regclass::text = ANY(%s) AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)""",
        [[f"refund_ledger.{table}" for table in _TABLES]],
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
