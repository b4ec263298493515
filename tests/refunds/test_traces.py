"""Whatever a role may change leaves an event, or docs/security.md names it as a change that needs none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL, create_engine
from sqlalchemy.pool import NullPool

from demo.postgres import PostgresServer
from include.refunds.classify import Outcome
from include.refunds.roles import KEY_ROTATOR, OPERATOR, PAYER
from include.refunds.states import Status
from tests.conftest import ROOT, Login, NewDatabase
from tests.refunds.test_audit import audit
from tests.refunds.test_roles import (
    A_NOTE,
    A_PAUSE,
    A_RESTORE,
    IDS,
    REISSUED,
    RESUME,
    fill,
    new_refund,
    refund,
    sighting,
)

ROLES = (PAYER, OPERATOR, KEY_ROTATOR)

# Other values of each type; of columns that take no value of one's choice, those that they take.
OF_TYPE = {
    "text": ["'x'"],
    "text[]": ["'{{x}}'", "'{{}}'"],
    "integer": ["1", "7"],
    "bigint": ["1", "7"],
    "bigint[]": ["'{{7}}'"],
    "boolean": ["true", "false"],
    "jsonb": ["""'{{"x": 1}}'"""],
    "bytea": ["'x'"],
    "timestamp with time zone": ["now() - interval '8 days'", "now() + interval '8 days'"],
}
OF_COLUMN = {
    "status": [f"'{status}'" for status in Status],
    "outcome": [f"'{outcome}'" for outcome in Outcome],
    "payroc_refund_id": ["'ZZZZZZZZZZ'"],
    # Another time than that of its event would be found.
    "finished_at": ["now()"],
}
# The rows of a table that are tried one by one; of all others the ledger has one row.
KEYS = {
    "refund_states": "refund_id",
    "frozen_requests": "refund_id",
    "refund_attempts": "refund_id",
    "pauses": "id",
}

RELEASE = "status = 'released', released_by = 'x', released_run = 'x', released_at = now()"
CLAIM = "status = 'sending', attempts = attempts + 1, fence_until = now(), lease_until = now(), next_attempt_at = now()"
HOLD = refund("approved", "status = 'held', holds = '{{x}}', reason = 'x'")
UNHOLD = refund("held", "status = 'approved', holds = '{{}}', released_holds = holds, reason = 'x'")
LAST_CHECK = refund("released", "lease_until = fence_until, first_sent_at = now(), sent_with = 'x'")
READ = "UPDATE refund_ledger.terminals SET read_from = now(), read_to = now(), read_with = 'x'"
NOT_READ = "UPDATE refund_ledger.terminals SET failed_at = now(), failure = 'x'"
WRITTEN = "UPDATE refund_ledger.write_back_notes SET problem = NULL, problem_since = NULL"
TURN = "UPDATE refund_ledger.write_back_turn SET holder = 'x', until = now()"
PER_PAYEE = "UPDATE refund_ledger.refund_limits SET payee_days = 7, payee_total = 7, payee_count = 7"

# Columns that change only together with others: by role and table, each with an example, and what comes before it.
TOGETHER: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
    (PAYER, "refund_states"): {
        **dict.fromkeys(("released_by", "released_run", "released_at"), (refund("approved", RELEASE), "")),
        **dict.fromkeys(("attempts", "fence_until"), (refund("released", CLAIM), "")),
        **dict.fromkeys(("first_sent_at", "sent_with"), (LAST_CHECK, refund("released", CLAIM))),
        **dict.fromkeys(("reason", "holds"), (HOLD, "")),
    },
    (PAYER, "terminals"): {
        **dict.fromkeys(("read_from", "read_to", "read_with"), (READ, "")),
        **dict.fromkeys(("failed_at", "failure"), (NOT_READ, "")),
    },
    (PAYER, "write_back_notes"): {"problem": (WRITTEN, "")},
    (PAYER, "write_back_turn"): dict.fromkeys(("holder", "until"), (TURN, "")),
    (OPERATOR, "refund_states"): dict.fromkeys(("reason", "holds", "released_holds"), (UNHOLD, "")),
    (OPERATOR, "pauses"): {"end_reason": (f"{RESUME} WHERE id = 2", "")},
    (OPERATOR, "refund_limits"): dict.fromkeys(("payee_total", "payee_count"), (PER_PAYEE, "")),
}

# Rows that a role may insert: of each table an example, and what has to be there before.
INSERTS: dict[tuple[str, str], tuple[str, str]] = {
    (PAYER, "refund_instructions"): (new_refund("approved"), ""),
    (OPERATOR, "refund_instructions"): (new_refund("rejected", **REISSUED), ""),
    **dict.fromkeys(
        ((PAYER, "frozen_requests"), (OPERATOR, "frozen_requests")),
        (
            "INSERT INTO refund_ledger.frozen_requests "
            "SELECT max(id), 'x', 'x' FROM refund_ledger.refund_instructions",
            new_refund("approved"),
        ),
    ),
    (PAYER, "refund_attempts"): (
        "INSERT INTO refund_ledger.refund_attempts (refund_id, attempt, run_id, started_at) "
        "VALUES ({released}, 1, 'x', now())",
        refund("released", CLAIM),
    ),
    **{
        (role, "refund_events"): (
            f"INSERT INTO refund_ledger.refund_events (event, actor) VALUES ('{name}', 'x')",
            "",
        )
        for role, name in ((PAYER, "contradiction"), (OPERATOR, "proposal"), (KEY_ROTATOR, "rotation"))
    },
    (PAYER, "refund_runs"): (
        "INSERT INTO refund_ledger.refund_runs (run_id, params, candidates, candidate_totals, "
        "candidates_hash, started_at) VALUES ('x', '{{}}', 1, '{{}}', 'hash', now())",
        "",
    ),
    (PAYER, "pauses"): (A_PAUSE, ""),
    (OPERATOR, "pauses"): (A_RESTORE, ""),
    (PAYER, "bindings"): (
        "INSERT INTO refund_ledger.bindings (name, value) VALUES ('source', 'x')",
        "SET LOCAL session_replication_role = replica; DELETE FROM refund_ledger.bindings; "
        "SET LOCAL session_replication_role = origin",
    ),
    (PAYER, "invalid_rows"): (
        "INSERT INTO refund_ledger.invalid_rows (source, source_ref, errors, first_seen_at, last_seen_at, "
        "updated_at) VALUES ('shop', 'x', '{{}}', now(), now(), now())",
        "",
    ),
    (PAYER, "write_back_notes"): (A_NOTE, ""),
    (PAYER, "terminals"): ("INSERT INTO refund_ledger.terminals (terminal) VALUES ('7701001')", ""),
    (PAYER, "foreign_refunds"): (
        "INSERT INTO refund_ledger.foreign_refunds (payroc_refund_id, terminal, order_id, amount, currency, "
        "payroc_status, plain, seen_at) VALUES ('FOREIGN001', '7701001', 'x', 1, 'USD', 'ready', true, now())",
        "",
    ),
}


class Tried:
    """
    A ledger with a row of each kind, on which a role's changes are tried.

    :param owner: a superuser's connection, which acts as the role's login for each of them.
    """

    def __init__(self, url: URL, owner: psycopg.Connection, login: Login) -> None:
        self.url = url
        self._owner = owner
        self._logins = {role: login(url, role).username for role in ROLES}

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        return self._owner.execute(query).fetchall()

    def change(self, role: str, statement: str, before: str = "", *, keep: bool = False) -> str:
        """Return whether a change is ``refused``, changes ``nothing``, leaves an ``event``, or is ``silent``."""
        with self._owner.transaction(force_rollback=not keep):
            if before:
                self._owner.execute(before.format(**IDS))
            events = self.rows(EVENTS)
            self._owner.execute(f"SET LOCAL SESSION AUTHORIZATION {self._logins[role]}")
            try:
                with self._owner.transaction():
                    changed = self._owner.execute(statement.format(**IDS)).rowcount
            except (psycopg.errors.InsufficientPrivilege, psycopg.IntegrityError):
                return "refused"
            finally:
                self._owner.execute("RESET SESSION AUTHORIZATION")
            return "event" if self.rows(EVENTS) != events else "silent" if changed else "nothing"

    def granted(self, right: str) -> list[tuple[str, str, str, str]]:
        """Return role, table, column and the column's type of each right, as the catalog has them."""
        query = f"""
            SELECT role, relname, attname, format_type(atttypid, NULL)
            FROM unnest('{{{",".join(ROLES)}}}'::text[]) AS role, pg_attribute
            JOIN pg_class ON pg_class.oid = attrelid AND relnamespace = 'refund_ledger'::regnamespace
            WHERE attnum > 0 AND NOT attisdropped AND has_column_privilege(role, attrelid, attnum, '{right}')
            ORDER BY role, relname, attnum"""
        return [
            (str(role), str(table), str(column), str(kind)) for role, table, column, kind in self.rows(query)
        ]

    def alone(self, table: str, column: str, kind: str) -> Iterator[str]:
        """Yield changes of one column in one row, to each other value."""
        key = KEYS.get(table)
        found = self.rows(f"SELECT {key} FROM refund_ledger.{table} ORDER BY 1") if key else []
        for row in [f"{key} = {number} AND " for (number,) in found] or [""]:
            for value in (*OF_COLUMN.get(column, OF_TYPE[kind]), "NULL"):
                yield (
                    f"UPDATE refund_ledger.{table} SET {column} = {value} "
                    f"WHERE {row}{column} IS DISTINCT FROM {value}"
                )


EVENTS = "SELECT count(*) FROM refund_ledger.refund_events"


@pytest.fixture(scope="module")
def filled(new_ledger: NewDatabase, postgres: PostgresServer, login: Login) -> Iterator[Callable[[], Tried]]:
    """A function that makes a ledger with a row of each kind."""
    with ExitStack() as stack:

        def make() -> Tried:
            url = new_ledger()
            engine = create_engine(url, poolclass=NullPool)
            with engine.begin() as connection:
                fill(connection)
                for table in ("write_back_notes", "terminals"):
                    row = INSERTS[PAYER, table][0].replace("1'", "2'")
                    connection.exec_driver_sql(row)
            return Tried(url, stack.enter_context(postgres.connect(str(url.database))), login)

        yield make


@pytest.fixture(scope="module")
def tried(filled: Callable[[], Tried]) -> Tried:
    """A ledger for changes that are rolled back."""
    return filled()


# The list stands in the docs alone, where a security reviewer reads it: columns, or "new rows", by table.
LIST = (ROOT / "docs" / "security.md").read_text().partition("**Changes that leave no event.**")[2]
DOCUMENTED = {
    (table, item)
    for table, what in re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", LIST, re.M)
    for item in re.findall(r"(?<=`)\w+(?=`)|new rows", what)
}


def test_each_column_that_a_role_may_change_leaves_an_event_or_is_documented(tried: Tried) -> None:
    silent, untried = set(), set()
    for role, table, column, kind in tried.granted("UPDATE"):
        found = {tried.change(role, statement) for statement in tried.alone(table, column, kind)}
        if together := TOGETHER.get((role, table), {}).get(column):
            found.add(tried.change(role, *together))
        if "silent" in found:
            silent.add((table, column))
        elif "event" not in found:
            untried.add((table, column))
    # It has one value: the right to UPDATE it is the right to lock the row.
    assert untried == {("gate", "only_row")}
    assert silent == {(table, column) for table, column in DOCUMENTED if column != "new rows"}


def test_each_row_that_a_role_may_insert_leaves_an_event_or_is_documented(tried: Tried) -> None:
    assert {(role, table) for role, table, _, _ in tried.granted("INSERT")} == set(INSERTS)
    left = {(role, table): tried.change(role, *example) for (role, table), example in INSERTS.items()}
    assert set(left.values()) == {"event", "silent"}
    silent = {(table, "new rows") for (_, table), how in left.items() if how == "silent"}
    assert silent == {(table, what) for table, what in DOCUMENTED if what == "new rows"}


def test_each_function_that_changes_rows_for_a_role_is_known(tried: Tried) -> None:
    query = """
        SELECT DISTINCT proname FROM pg_proc, unnest('{{{}}}'::text[]) AS role
        WHERE pronamespace = 'refund_ledger'::regnamespace AND prosecdef AND provolatile = 'v'
          AND has_function_privilege(role, pg_proc.oid, 'EXECUTE') ORDER BY 1"""
    functions = [str(name) for (name,) in tried.rows(query.format(",".join(ROLES)))]
    # A seal is its own trace; the rows that are forgotten are in the list, and so is what note_sighting leaves alone.
    assert functions == ["forget_invalid_rows", "note_sighting", "seal"]
    shown = sighting("accepted", "NULL", "'ABCDEFGHIJ'")
    assert tried.change(PAYER, shown) == tried.change(OPERATOR, shown) == "silent"
    assert {("refund_states", "payroc_status"), ("refund_states", "payroc_seen_at")} <= DOCUMENTED
    assert tried.change(OPERATOR, sighting("review", "'accepted'")) == "event"


def test_nothing_that_a_role_may_change_is_called_tampering(filled: Callable[[], Tried]) -> None:
    tried = filled()
    for role, table, column, kind in tried.granted("UPDATE"):
        for statement in tried.alone(table, column, kind):
            tried.change(role, statement, keep=True)
    found = audit(tried.url)
    assert found.events + found.unsealed > 100
    assert found.findings == []
