"""``schema.sql`` is the whole ledger, and says of each thing in it what it is for."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from sqlalchemy import URL

from demo.postgres import PostgresServer
from tests.conftest import ROOT, NewDatabase
from tests.support.catalog import catalog

SCHEMA = (ROOT / "include/refunds/ledger/schema.sql").read_text()

# -- it is the sum of the migrations -----------------------------------------------------------------------


def test_the_file_alone_makes_the_ledger_that_the_migrations_make(
    postgres: PostgresServer, new_ledger: NewDatabase
) -> None:
    postgres.create_database("ledger_of_the_file")
    with postgres.connect("ledger_of_the_file") as connection:
        with connection.transaction():
            connection.execute(SCHEMA)
        of_the_file = catalog(connection)
    with postgres.connect(str(new_ledger().database)) as connection:
        of_the_migrations = catalog(connection)
    assert sorted(of_the_file - of_the_migrations) == sorted(of_the_migrations - of_the_file) == []


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE refund_ledger.refund_states ADD COLUMN more text",
        "ALTER TABLE refund_ledger.refund_runs ALTER COLUMN released TYPE bigint",
        "ALTER TABLE refund_ledger.refund_states ALTER COLUMN attempts SET DEFAULT 1",
        "ALTER TABLE refund_ledger.refund_states ALTER COLUMN status DROP NOT NULL",
        "ALTER TABLE refund_ledger.refund_states DROP CONSTRAINT held_says_for_what",
        "ALTER TABLE refund_ledger.frozen_requests ALTER CONSTRAINT frozen_requests_refund_id_fkey DEFERRABLE",
        "DROP INDEX refund_ledger.states_open",
        "DROP STATISTICS refund_ledger.states_written_back",
        "DROP TRIGGER guard ON refund_ledger.refund_states",
        "ALTER TABLE refund_ledger.refund_states DISABLE TRIGGER guard",
        "ALTER FUNCTION refund_ledger.guard_state() RESET search_path",
        "ALTER FUNCTION refund_ledger.guard_state() SECURITY DEFINER",
        "CREATE OR REPLACE FUNCTION refund_ledger.actor() RETURNS text LANGUAGE sql STABLE "
        "SET search_path = pg_catalog, pg_temp AS $$ SELECT 'ann' $$",
        "ALTER FUNCTION refund_ledger.seal(integer) OWNER TO postgres",
        "GRANT EXECUTE ON FUNCTION refund_ledger.seal(integer) TO PUBLIC",
        "ALTER VIEW refund_ledger.refunds SET (security_invoker = true)",
        "DROP VIEW refund_ledger.refunds",
        "ALTER TABLE refund_ledger.seal_lock OWNER TO postgres",
        "GRANT USAGE ON SEQUENCE refund_ledger.event_numbers TO refunds_payer",
        "GRANT DELETE ON refund_ledger.refund_runs TO refunds_payer",
        "GRANT UPDATE (amount) ON refund_ledger.refund_instructions TO refunds_operator",
        "REVOKE SELECT (id) ON refund_ledger.refund_instructions FROM refunds_key_rotator",
        "GRANT CREATE ON SCHEMA refund_ledger TO refunds_payer",
        "ALTER SCHEMA refund_ledger OWNER TO postgres",
    ],
)
def test_the_comparison_notices_a_difference(
    postgres: PostgresServer, shared_ledger: URL, change: str
) -> None:
    with postgres.connect(str(shared_ledger.database)) as connection:
        before = catalog(connection)
        with connection.transaction(force_rollback=True):
            connection.execute(change)
            assert catalog(connection) != before


def test_no_line_of_the_file_is_longer_than_a_line_of_code() -> None:
    assert [line for line in SCHEMA.splitlines() if len(line) > 110] == []


# -- everything in it has a comment ------------------------------------------------------------------------

TOKENS = re.compile(r"--[^\n]*|'(?:[^']|'')*'|\$\$.*?\$\$|[();,]|[^-'$();,]+|.", re.DOTALL)
# What a statement, or an item between the parentheses of a table, begins with.
ABOVE = re.compile(r"(?:[ \t]*(?:--[^\n]*)?\n)*")
MADE = re.compile(
    r"CREATE (?:CONSTRAINT |UNIQUE )?"
    r"(?:(TABLE|VIEW|INDEX|STATISTICS|FUNCTION|SCHEMA|SEQUENCE) (?:IF NOT EXISTS )?([\w.]+)"
    r"|(TRIGGER) (\w+).*? ON ([\w.]+))",
    re.DOTALL,
)


def split(sql: str, separator: str) -> Iterator[str]:
    """Split SQL at a separator that is in no comment, string or parenthesis."""
    part, depth = "", 0
    for token in TOKENS.findall(sql):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if token == separator and depth == 0:
            yield part
            part = ""
        else:
            part += token
    yield part


def read(sql: str, separator: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of SQL without what is above them, and whether a comment is right above them."""
    for part in split(sql, separator):
        above = ABOVE.match(part)
        assert above
        if text := part[above.end() :].strip():
            yield text, bool(re.search(r"--[^\n]*\n\Z", above[0]))


def commented(sql: str) -> dict[str, bool]:
    """Return what a file makes, changes and grants, and whether a comment is right above it."""
    found = {}
    for statement, has_comment in read(sql, ";"):
        made = MADE.match(statement)
        name = " ".join(filter(None, made.groups())) if made else " ".join(statement.split())
        found[name] = has_comment
        if name.startswith("TABLE"):
            inside = statement[statement.index("(") + 1 : statement.rindex(")")].removeprefix("\n")
            for item, has_comment in read(inside, ","):
                first, second, *_ = item.split()
                found[f"{name} {first} {second}" if first.isupper() else f"{name} {first}"] = has_comment
    return found


def without_each_comment(sql: str) -> Iterator[str]:
    """Yield the file without the comment above one thing, for each thing in it."""
    outside = re.split(r"(\$\$.*?\$\$)", sql, flags=re.DOTALL)
    for number in range(0, len(outside), 2):
        for comment in re.finditer(r"(?:^ *--[^\n]*\n)+(?= *[^ \n-])", outside[number], re.MULTILINE):
            rest = outside[number][: comment.start()] + outside[number][comment.end() :]
            yield "".join((*outside[:number], rest, *outside[number + 1 :]))


def test_everything_in_the_file_has_a_comment_right_above_it() -> None:
    assert [name for name, has_comment in commented(SCHEMA).items() if not has_comment] == []


def test_each_missing_comment_is_noticed() -> None:
    missing = [
        [name for name, has_comment in commented(sql).items() if not has_comment]
        for sql in without_each_comment(SCHEMA)
    ]
    assert missing == [[name] for name in commented(SCHEMA)]


def test_the_comments_are_looked_for_above_all_that_postgres_knows(
    postgres: PostgresServer, new_ledger: NewDatabase
) -> None:
    query = """
        WITH tables AS (
            SELECT oid, relname, 'TABLE ' || oid::regclass AS name
            FROM pg_class WHERE relnamespace = 'refund_ledger'::regnamespace AND relkind = 'r'
        )
        SELECT name FROM tables
        UNION ALL SELECT name || ' ' || attname FROM tables JOIN pg_attribute ON attrelid = tables.oid
            WHERE attnum > 0 AND NOT attisdropped
        -- A constraint that begins with its table's name was named by Postgres: it is its column's.
        UNION ALL SELECT name || ' CONSTRAINT ' || conname FROM tables JOIN pg_constraint ON conrelid = tables.oid
            WHERE NOT starts_with(conname, relname || '_') AND contype <> 't'
        UNION ALL SELECT 'INDEX ' || pg_class.relname FROM tables
            JOIN pg_index ON indrelid = tables.oid JOIN pg_class ON pg_class.oid = indexrelid
            WHERE NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
        UNION ALL SELECT format('TRIGGER %s %s', tgname, tgrelid::regclass)
            FROM tables JOIN pg_trigger ON tgrelid = tables.oid WHERE NOT tgisinternal
        UNION ALL SELECT 'FUNCTION refund_ledger.' || proname
            FROM pg_proc WHERE pronamespace = 'refund_ledger'::regnamespace
        UNION ALL SELECT 'SEQUENCE ' || oid::regclass FROM pg_class
            WHERE relnamespace = 'refund_ledger'::regnamespace AND relkind = 'S'
              AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype = 'i')
        UNION ALL SELECT 'VIEW ' || oid::regclass
            FROM pg_class WHERE relnamespace = 'refund_ledger'::regnamespace AND relkind = 'v'"""
    with postgres.connect(str(new_ledger().database)) as connection:
        known = [name for (name,) in connection.execute(query)]
    assert len(known) > 100
    assert set(known) - set(commented(SCHEMA)) == set()
