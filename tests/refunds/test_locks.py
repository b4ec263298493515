"""No login holds up what it may not: whatever it locks, the kill switch works, and the others' work goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL

from demo.postgres import PostgresServer
from include.refunds.ledger import Claim, Ledger, LedgerEngine, LedgerUnavailable, Task
from include.refunds.ledger.database import LedgerDatabase
from include.refunds.migrations import migrate
from include.refunds.params import RunParams
from include.refunds.pull import pull
from include.refunds.rehearse import rehearse
from include.refunds.resolve import resolve
from include.refunds.roles import APPROVER, AUDITOR, KEY_ROTATOR, OPERATOR, PAYER, REQUESTER
from include.refunds.states import Status
from include.refunds.write_back import write_back
from tests.conftest import ROOT, Login
from tests.refunds.conftest import World

MODES = (
    "ACCESS EXCLUSIVE",
    "EXCLUSIVE",
    "SHARE ROW EXCLUSIVE",
    "SHARE",
    "SHARE UPDATE EXCLUSIVE",
    "ROW EXCLUSIVE",
    "ROW SHARE",
    "ACCESS SHARE",
)
STRENGTHS = ("UPDATE", "NO KEY UPDATE", "SHARE", "KEY SHARE")
# What earlier versions locked, and what somebody might guess.
ADVISORY = [
    f"SELECT {function}(hashtext('refund_ledger.{name}'))"
    for name in ("door", "gate", "write_back", "restored", "migrate", "pause")
    for function in ("pg_advisory_lock", "pg_advisory_xact_lock")
]
# What stays open: each of these transactions has written what it may, and does not end.
WRITES = [
    "INSERT INTO refund_ledger.pauses (scope, reason) VALUES ('7701009', 'x')",
    "INSERT INTO refund_ledger.bindings (name, value) VALUES ('fingerprint_check', 'x')",
    "INSERT INTO refund_ledger.invalid_rows (source, source_ref, errors, first_seen_at, last_seen_at, updated_at) "
    "VALUES ('shop', 'bad', '{}', now(), now(), now())",
    "INSERT INTO refund_ledger.refund_runs (run_id, params, candidates, candidate_totals, candidates_hash, started_at) "
    "VALUES ('run-9', '{}', 1, '{}', 'hash', now())",
    "UPDATE refund_ledger.write_back_turn SET holder = 'x', until = now()",
    "UPDATE refund_ledger.gate SET only_row = true",
    "SET CONSTRAINTS ALL IMMEDIATE",
    "INSERT INTO refund_ledger.refund_events (event, actor, reason) VALUES ('contradiction', 'x', 'x')",
    "INSERT INTO refund_ledger.refund_events (event, actor, reason) VALUES ('rotation', 'x', 'x')",
    "CREATE TEMP TABLE held (id bigint)",
]


def tables(connection: psycopg.Connection) -> list[str]:
    query = """
        SELECT relname FROM pg_class WHERE relnamespace = 'refund_ledger'::regnamespace AND relkind IN ('r', 'v')
        ORDER BY relname"""
    return [f"refund_ledger.{name}" for (name,) in connection.execute(query).fetchall()]


@contextmanager
def holding_all_it_can(url: URL) -> Iterator[list[str]]:
    """Let a login take every lock that it gets, and keep its transaction open; yield the locks it got."""
    taken = []
    conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(conninfo) as connection:
        everything = tables(connection)
        statements = [
            *(f"LOCK TABLE {table} IN {mode} MODE NOWAIT" for table in everything for mode in MODES),
            *(f"SELECT FROM {table} FOR {how} NOWAIT" for table in everything for how in STRENGTHS),
            *WRITES,
            *ADVISORY,
        ]
        connection.execute("SET lock_timeout = '100ms'")
        for statement in statements:
            # What is refused, or taken by another one, must not end the transaction.
            with suppress(psycopg.Error), connection.transaction():
                connection.execute(statement)
                taken.append(statement)
        yield taken
        connection.rollback()


@pytest.fixture
def held_by(ledger_url: URL, login: Login) -> Callable[..., Any]:
    """Return a context in which logins of these roles hold all they can."""

    @contextmanager
    def hold(roles: Sequence[str]) -> Iterator[list[str]]:
        with ExitStack() as stack:
            yield [
                statement
                for role in roles
                for statement in stack.enter_context(
                    holding_all_it_can(login(ledger_url, role, f"{role}_idler"))
                )
            ]

    return hold


def through(world: World, login: Login, role: str) -> Ledger:
    url = login(world.ledger_engine.url, role)
    return Ledger(LedgerEngine(url, pool_size=0), world.settings, actor="erin")


# Another operator is one of them.
OTHERS = (PAYER, OPERATOR, KEY_ROTATOR, AUDITOR, REQUESTER, APPROVER)


@pytest.mark.parametrize("roles", [OTHERS, *([role] for role in OTHERS)], ids=lambda roles: " ".join(roles))
def test_a_pause_takes_effect_while_other_logins_hold_all_they_can(
    world: World,
    login: Login,
    held_by: Callable[..., Any],
    record_property: Callable[[str, object], None],
    roles: Sequence[str],
) -> None:
    sending, waiting = world.released(), world.released()
    operator, payer = through(world, login, OPERATOR), through(world, login, PAYER)

    async def claim(refund_id: int) -> Claim | None:
        environment, sent_with = world.gateway.environment, world.gateway.sent_with
        return await payer.claims.claim(
            refund_id, Task("run-1", 0, 1), environment=environment, sent_with=sent_with, token_seconds=600
        )

    claimed = world.run(claim(sending))
    assert claimed is not None
    with held_by(roles) as taken:
        assert ADVISORY[0] in taken
        assert ("SELECT FROM refund_ledger.gate FOR UPDATE NOWAIT" in taken) == bool(
            {PAYER, OPERATOR} & {*roles}
        )
        began = time.monotonic()
        # It gives up after a second.
        world.run(operator.pauses.pause("*", "The bank called."))
        record_property(
            f"a pause beside locks of {', '.join(roles)}", f"{1000 * (time.monotonic() - began):.0f} ms"
        )
        assert world.run(payer.claims.may_post(claimed, 60.0)) is False
    assert world.run(claim(waiting)) is None
    assert world.run(operator.pauses.resume("*", "All is well."))
    assert world.run(claim(waiting)) is not None


@pytest.mark.parametrize(
    ("role", "mistake"),
    [
        (PAYER, "GRANT UPDATE ON refund_ledger.pauses TO refunds_payer"),
        (AUDITOR, "GRANT TRUNCATE ON refund_ledger.pauses TO refunds_auditor"),
        (KEY_ROTATOR, "GRANT DELETE ON refund_ledger.refund_events TO refunds_key_rotator"),
        (PAYER, "CREATE UNIQUE INDEX mistake ON refund_ledger.pauses (scope)"),
        (
            PAYER,
            "ALTER TABLE refund_ledger.pauses ADD gate boolean DEFAULT true REFERENCES refund_ledger.gate",
        ),
    ],
)
def test_a_pause_that_can_be_held_up_is_noticed(
    world: World,
    login: Login,
    held_by: Callable[..., Any],
    postgres: PostgresServer,
    role: str,
    mistake: str,
) -> None:
    operator = through(world, login, OPERATOR)
    with postgres.connect(str(world.ledger_engine.url.database)) as connection:
        connection.execute(mistake)
        try:
            with held_by([role]), pytest.raises(LedgerUnavailable, match="a lock"):
                world.run(operator.pauses.pause("7701009", "The bank called."))
        finally:
            connection.execute("DROP INDEX IF EXISTS refund_ledger.mistake")
            connection.execute("ALTER TABLE refund_ledger.pauses DROP COLUMN IF EXISTS gate")
            connection.execute("REVOKE UPDATE ON refund_ledger.pauses FROM refunds_payer")
            connection.execute("REVOKE TRUNCATE ON refund_ledger.pauses FROM refunds_auditor")
            connection.execute("REVOKE DELETE ON refund_ledger.refund_events FROM refunds_key_rotator")


@pytest.mark.parametrize("role", [REQUESTER, APPROVER, AUDITOR])
def test_releases_limits_write_backs_restores_and_migrations_go_on_beside_a_login_that_only_reads(
    world: World,
    ledger_url: URL,
    login: Login,
    held_by: Callable[..., Any],
    postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
) -> None:
    monkeypatch.setattr(LedgerDatabase, "lock_seconds", 2)
    ref = world.approve()
    world.pull()
    with postgres.connect() as connection:
        connection.execute(f"GRANT {PAYER}, {OPERATOR} TO {login(ledger_url, PAYER, 'restorer').username}")
    payer, operator = through(world, login, PAYER), through(world, login, OPERATOR)
    restorer = Ledger(
        LedgerEngine(login(ledger_url, PAYER, "restorer"), pool_size=0), world.settings, actor="x"
    )
    with held_by([role]) as taken:
        assert ADVISORY[0] in taken
        world.run(operator.limits.set_limit("largest_refund", 10_000_000, "A limit."))
        world.ledger = payer
        assert world.release() == [world.row(ref)["id"]]
        assert world.run(write_back(world.source, payer.write_backs)).written == 1
        begun = world.run(restorer.pauses.begin_restore(world.run(payer.now()), "The disk was lost."))
        world.run(restorer.pauses.end_restore(begun.number, "Compared."))
        assert world.run(operator.pauses.resume("*", "Compared."))
        migrate(ledger_url)


def test_a_gate_that_is_held_too_long_names_the_process_and_the_login(
    world: World, ledger_url: URL, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LedgerDatabase, "lock_seconds", 1)
    world.approve()
    world.pull()
    url = login(ledger_url, PAYER).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False)) as holder:
        holder.execute("SELECT FROM refund_ledger.gate FOR UPDATE")
        names = rf"The gate was locked for more than 1 s by process {holder.info.backend_pid} of the login {url.username}"
        with pytest.raises(LedgerUnavailable, match=names):
            world.run(through(world, login, OPERATOR).limits.set_limit("day_count", 5, "A limit."))
        world.ledger = through(world, login, PAYER)
        with pytest.raises(LedgerUnavailable, match=names):
            world.release()
    world.release()


def test_a_turn_that_was_not_renewed_goes_to_the_next_write_back_and_what_is_late_is_written_again(
    world: World,
) -> None:
    ledger = world.ledger
    refund_id = world.released()
    assert world.run(ledger.write_backs.take_turn("first"))
    due = world.run(ledger.write_backs.due_write_backs(10))
    assert not world.run(ledger.write_backs.take_turn("second"))
    world.hours_ahead = 0.1
    assert world.run(ledger.write_backs.take_turn("second"))
    world.send(refund_id)
    newer = world.run(ledger.write_backs.due_write_backs(10))
    world.run(
        ledger.write_backs.mark_written_back("second", world.run(world.source.write_back(newer)).written)
    )
    assert world.run(ledger.write_backs.due_write_backs(10)) == []
    with pytest.raises(LedgerUnavailable, match="another one took its turn"):
        world.run(ledger.write_backs.mark_written_back("first", due))
    assert world.run(ledger.write_backs.due_write_backs(10)) == newer
    world.run(ledger.write_backs.end_turn("first"))
    assert not world.run(ledger.write_backs.take_turn("third"))
    world.run(ledger.write_backs.end_turn("second"))
    assert world.run(ledger.write_backs.take_turn("third"))


IN_A_TRANSACTION = """
    SELECT count(*) AS n FROM pg_stat_activity
    WHERE datname = current_database() AND state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()"""


class Watching:
    """A source that counts the ledger's open transactions while it is read or written."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.open: list[int] = []

    def _count(self) -> None:
        self.open.append(self._world.rows(IN_A_TRANSACTION)[0]["n"])

    async def select_approved(self) -> Any:
        self._count()
        return await self._world.source.select_approved()

    async def write_back(self, rows: Any) -> Any:
        self._count()
        return await self._world.source.write_back(rows)


def test_no_transaction_of_the_ledger_is_open_while_the_source_is_read_or_written(world: World) -> None:
    source = Watching(world)
    world.approve()
    world.run(rehearse(RunParams(dry_run=True), source, world.ledger, world.cipher, world.settings))
    world.run(pull(source, world.ledger, world.cipher, world.settings))
    world.run(write_back(source, world.ledger.write_backs))
    assert source.open == [0, 0, 0]


class WatchingPayroc:
    """Payroc's gateway that counts the ledger's open transactions with each of its calls."""

    def __init__(self, world: World) -> None:
        self._world, self._gateway = world, world.gateway
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._gateway, name)
        if not callable(found):
            return found

        def counted(*arguments: Any, **values: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + self._world.rows(IN_A_TRANSACTION)[0]["n"]
            return found(*arguments, **values)

        return counted


def test_no_transaction_of_the_ledger_is_open_while_payroc_is_asked(world: World) -> None:
    refund_id = world.released("9003")
    review = world.released("9013")
    world.gateway = watching = WatchingPayroc(world)
    world.release("run-2")
    world.send(refund_id)
    world.send(review)
    world.hours_ahead = 1
    world.send(refund_id)
    world.follow_up()
    world.run(
        resolve(
            review, Status.ACCEPTED, "seen", payroc_refund_id=None, ledger=world.ledger, gateway=world.gateway
        )
    )
    assert {"token", "create_refund", "list_refunds"} <= watching.calls.keys()
    assert set(watching.calls.values()) == {0}


def test_nothing_takes_an_advisory_lock() -> None:
    files = [path for folder in ("include", "plugins", "dags") for path in (ROOT / folder).rglob("*")]
    assert [
        path for path in files if path.suffix in (".py", ".sql") and "advisory_" in path.read_text()
    ] == []
