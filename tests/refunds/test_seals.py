"""Seals: every event that is committed is sealed exactly once, and nobody waits for a seal."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL

from demo.postgres import PostgresServer
from include.refunds.audit import Audited, verify_audit
from include.refunds.ledger import Ledger, LedgerEngine, LedgerUnavailable
from include.refunds.ledger.seals import Seals
from include.refunds.roles import AUDITOR, KEY_ROTATOR, OPERATOR, PAYER
from include.refunds.settings import get_settings
from tests.conftest import Login
from tests.patience import eventually
from tests.refunds.conftest import World
from tests.refunds.test_roles import command

# An event that each of the roles may write.
EVENT = {
    role: f"INSERT INTO refund_ledger.refund_events (event, actor) VALUES ('{event}', 'somebody')"
    for role, event in ((PAYER, "contradiction"), (OPERATOR, "not_understood"), (KEY_ROTATOR, "rotation"))
}
# Ids that no seal holds, and those that more than one does.
NOT_ONCE = """
    SELECT event.id, count(seal.number) FROM refund_ledger.refund_events AS event
    LEFT JOIN refund_ledger.event_seals AS seal ON event.id <@ seal.events
    GROUP BY event.id HAVING count(seal.number) <> 1"""

Connect = Callable[..., psycopg.Connection]


@pytest.fixture
def connect(ledger_url: URL, login: Login) -> Iterator[Connect]:
    """A function that connects to the ledger as a role, or as its owner."""
    opened: list[psycopg.Connection] = []
    one_at_a_time = threading.Lock()

    def to_the_ledger(role: str = "", *, autocommit: bool = False) -> psycopg.Connection:
        with one_at_a_time:
            url = login(ledger_url, role) if role else ledger_url
        opened.append(psycopg.connect(conninfo(url), autocommit=autocommit))
        return opened[-1]

    yield to_the_ledger
    for connection in opened:
        connection.close()


def conninfo(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def seal(connection: psycopg.Connection, most: int = 20_000) -> int | None:
    """Seal one batch, and return how many events it has; ``None`` when another one is sealing."""
    row = connection.execute("SELECT sealed FROM refund_ledger.seal(%s)", [most]).fetchone()
    return None if row is None else int(row[0])


def value(connection: psycopg.Connection, query: str) -> Any:
    """Return what a query for one value returns."""
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def audit(url: URL) -> Audited:
    return asyncio.run(verify_audit(LedgerEngine(url, pool_size=0)))


# -- each event once ---------------------------------------------------------------------------------------


def test_an_event_that_commits_late_is_sealed_by_a_later_seal(connect: Connect, ledger_url: URL) -> None:
    early, late = connect(PAYER), connect(PAYER)
    sealer = connect(OPERATOR, autocommit=True)
    late.execute(EVENT[PAYER])
    early.execute(EVENT[PAYER])
    early.commit()
    assert [seal(sealer), seal(sealer)] == [1, 0]
    late.commit()
    assert [seal(sealer), seal(sealer)] == [1, 0]
    assert audit(ledger_url).findings == []


def test_a_younger_transaction_that_drew_its_number_first_is_waited_for(
    connect: Connect, ledger_url: URL
) -> None:
    older, younger = connect(PAYER), connect(PAYER)
    sealer = connect(OPERATOR, autocommit=True)
    older.execute("SELECT pg_current_xact_id()")
    younger.execute(EVENT[PAYER])
    older.execute(EVENT[PAYER])
    older.commit()
    # Nothing older runs any more, so what these seals may give up is given up.
    for _ in range(3):
        assert seal(sealer) == 1
        sealer.execute(EVENT[OPERATOR])
    younger.commit()
    assert seal(sealer) == 2
    assert audit(ledger_url).findings == []


def test_numbers_of_events_that_were_rolled_back_are_given_up_once_nothing_older_runs(
    connect: Connect, ledger_url: URL
) -> None:
    sealer, payer, holder = connect(OPERATOR, autocommit=True), connect(PAYER), connect(AUDITOR)
    holder.execute("SELECT pg_current_xact_id()")
    payer.execute(EVENT[PAYER])
    payer.rollback()

    def pending_after_one_more() -> str:
        payer.execute(EVENT[PAYER])
        payer.commit()
        assert seal(sealer) == 1
        query = "SELECT pending::text FROM refund_ledger.event_seals ORDER BY number DESC LIMIT 1"
        return str(value(sealer, query))

    assert [pending_after_one_more(), pending_after_one_more()] == ["{[1,2)}", "{[1,2)}"]
    holder.rollback()
    assert pending_after_one_more() == "{}"
    assert audit(ledger_url).findings == []


def test_a_batch_that_is_full_leaves_the_rest_to_the_next(connect: Connect, ledger_url: URL) -> None:
    sealer, payer, late = connect(OPERATOR, autocommit=True), connect(PAYER), connect(PAYER)
    for _ in range(3):
        late.execute(EVENT[PAYER])
    for _ in range(4):
        payer.execute(EVENT[PAYER])
    payer.commit()
    assert [seal(sealer, 3)] == [3]
    late.commit()
    assert [seal(sealer, 3), seal(sealer, 3), seal(sealer, 3)] == [3, 1, 0]
    assert audit(ledger_url).findings == []


def test_under_stress_every_event_is_sealed_once(
    connect: Connect, ledger_url: URL, long: bool, record_property: Callable[[str, object], None]
) -> None:
    transactions = 1500 if long else 150
    # All through it, a login that may only read holds a transaction id open.
    connect(AUDITOR).execute("SELECT pg_current_xact_id()")
    over = threading.Event()
    counting = connect(autocommit=True)

    def write(seed: int) -> int:
        rng, written = random.Random(seed), 0
        connection = connect(PAYER)
        for _ in range(transactions):
            if rng.random() < 0.3:
                connection.execute("SELECT pg_current_xact_id()")
            events = 0
            for _ in range(rng.randint(1, 4)):
                savepoint = rng.random()
                if savepoint < 0.3:
                    connection.execute("SAVEPOINT here")
                connection.execute(EVENT[PAYER])
                events += 1
                if savepoint < 0.15:
                    connection.execute("ROLLBACK TO SAVEPOINT here")
                    events -= 1
            if rng.random() < 0.1:
                # Commit late: others seal meanwhile.
                connection.execute("SELECT pg_sleep(0.05)")
            if rng.random() < 0.2:
                connection.rollback()
            else:
                connection.commit()
                written += events
        return written

    def work_as_sealer(seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            # One that was killed comes back.
            with suppress(psycopg.OperationalError):
                connection = connect(OPERATOR, autocommit=True)
                while not over.is_set():
                    seal(connection, rng.choice((1, 7, 100, 20_000)))

    def kill() -> int:
        killed = 0
        connection = connect(autocommit=True)
        query = """
            SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
            WHERE datname = current_database() AND state = 'active' AND query LIKE 'SELECT sealed%'"""
        while not over.wait(0.02):
            killed += int(value(connection, query))
        return killed

    with ThreadPoolExecutor(12) as pool:
        sealers = [pool.submit(work_as_sealer, seed) for seed in range(2)]
        killer = pool.submit(kill)
        try:
            written = sum(pool.map(write, range(6)))
        finally:
            over.set()
        for sealer in sealers:
            sealer.result()
        record_property("sealers killed", killer.result())
    last = connect(OPERATOR, autocommit=True)
    eventually(lambda: seal(last) == 0, "all events are sealed")
    found = audit(ledger_url)
    assert (found.events, found.unsealed, found.findings) == (written, 0, [])
    assert counting.execute(NOT_ONCE).fetchall() == []
    record_property(
        "events sealed under stress",
        f"{written} by {value(counting, 'SELECT count(*) FROM refund_ledger.event_seals')} seals",
    )


# A rule of seal() taken away: a part of it, and what is there instead.
MUTANTS = {
    "an event is left out": ("FROM candidates ORDER", "FROM candidates WHERE id <> 3 ORDER"),
    "late events are not looked for": ("unnest(last.pending) AS ids", "unnest('{}'::int8multirange) AS ids"),
    "missing numbers are given up at once": (
        "last.pending := COALESCE(last.pending, '{}');",
        "last.pending := '{}';",
    ),
    "numbers are given up while an older transaction runs": ("last.pending_until <= horizon", "true"),
    "younger transactions are forgotten": (
        "new.pending_until := pg_current_xact_id();",
        "new.pending_until := pg_snapshot_xmax(pg_current_snapshot());",
    ),
}


@pytest.fixture
def mutated(postgres: PostgresServer, ledger_url: URL) -> Iterator[Callable[..., None]]:
    """A function that replaces a part of ``seal()`` or of another function, until the end of the test."""
    with postgres.connect(str(ledger_url.database)) as connection:
        originals = {}

        def replace(old: str, new: str, function: str = "seal(integer)") -> None:
            definition = f"SELECT pg_get_functiondef('refund_ledger.{function}'::regprocedure)"
            originals[function] = value(connection, definition)
            assert old in originals[function]
            connection.execute(originals[function].replace(old, new))

        yield replace
        for original in originals.values():
            connection.execute(original)


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_a_seal_that_skips_an_event_is_noticed(
    connect: Connect, ledger_url: URL, mutated: Callable[..., None], mutant: str | None
) -> None:
    if mutant is not None:
        mutated(*MUTANTS[mutant])
    sealer, payer = connect(OPERATOR, autocommit=True), connect(PAYER, autocommit=True)

    def seal_thrice() -> None:
        for _ in range(3):
            seal(sealer)
            payer.execute(EVENT[PAYER])
        seal(sealer)

    for younger_first in (True, False):
        older, younger = connect(PAYER), connect(PAYER)
        older.execute("SELECT pg_current_xact_id()")
        for writer in (younger, older) if younger_first else (older, younger):
            writer.execute(EVENT[PAYER])
        older.commit()
        seal_thrice()
        younger.commit()
        seal_thrice()
    found = audit(ledger_url)
    assert bool(found.findings or found.unsealed) == (mutant is not None)


@pytest.fixture
def slow(connect: Connect) -> Iterator[Callable[[], None]]:
    """A function that lets go on whoever writes an event as `slow`: they wait after the event has drawn its number."""
    owner = connect(autocommit=True)
    owner.execute("""
        CREATE FUNCTION waits_for_the_test() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            AS $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END $$;
        CREATE TRIGGER waits BEFORE INSERT ON refund_ledger.refund_events FOR EACH ROW
            WHEN (NEW.actor = 'slow') EXECUTE FUNCTION waits_for_the_test();
        ALTER SEQUENCE refund_ledger.event_numbers CACHE 10;
        SELECT pg_advisory_lock(1)""")
    yield lambda: owner.execute("SELECT pg_advisory_unlock_all()") and None
    owner.execute("SELECT pg_advisory_unlock_all()")
    owner.execute("DROP FUNCTION waits_for_the_test() CASCADE")
    owner.execute("ALTER SEQUENCE refund_ledger.event_numbers CACHE 1")


@pytest.mark.parametrize("mutant", [False, True], ids=["as it is", "the number first"])
def test_an_event_that_draws_its_number_before_its_transaction_has_an_id_is_noticed(
    connect: Connect,
    ledger_url: URL,
    mutated: Callable[..., None],
    slow: Callable[[], None],
    mutant: bool,
) -> None:
    if mutant:
        mutated("pg_current_xact_id()", "'1'", "number_event()")
    late, payer = connect(PAYER), connect(PAYER, autocommit=True)
    sealer, looking = connect(OPERATOR, autocommit=True), connect(autocommit=True)
    # From here on the session draws its numbers from its cache, which writes nothing and so takes no transaction id.
    late.execute(EVENT[PAYER])
    late.commit()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(late.execute, EVENT[PAYER].replace("somebody", "slow"))
        waits = f"SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = {late.info.backend_pid}"
        eventually(lambda: value(looking, waits), "the event has its number")
        for _ in range(3):
            payer.execute(EVENT[PAYER])
            seal(sealer)
        slow()
        writing.result()
    late.commit()
    seal(sealer)
    found = audit(ledger_url)
    assert (found.unsealed, bool(found.findings)) == (0, mutant)


def test_a_killed_sealer_leaves_its_events_to_the_next(connect: Connect, ledger_url: URL) -> None:
    owner, killed, payer = connect(), connect(OPERATOR, autocommit=True), connect(PAYER, autocommit=True)
    payer.execute(EVENT[PAYER])
    # It waits in the middle of its work: the seal is computed, and can't be stored yet.
    owner.execute("LOCK TABLE refund_ledger.event_seals IN SHARE MODE")
    with ThreadPoolExecutor(1) as pool:
        sealing = pool.submit(seal, killed)
        waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = {}"
        pid = killed.info.backend_pid
        eventually(lambda: value(owner, waits.format(pid)), "the sealer is in the middle of its work")
        assert seal(connect(PAYER, autocommit=True)) is None
        assert value(owner, f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(psycopg.OperationalError):
            sealing.result()
    owner.rollback()
    assert seal(connect(PAYER, autocommit=True)) == 1
    assert audit(ledger_url).findings == []


@pytest.mark.parametrize(
    "begin",
    [EVENT[OPERATOR], "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT pg_current_xact_id()"],
)
def test_a_seal_that_could_miss_events_is_refused(connect: Connect, begin: str) -> None:
    sealer = connect(OPERATOR)
    sealer.execute(begin)
    with pytest.raises(psycopg.errors.ActiveSqlTransaction, match="in a transaction of its own"):
        seal(sealer)


def test_an_event_has_the_time_and_the_login_of_the_database(
    connect: Connect, ledger_url: URL, login: Login
) -> None:
    operator = connect(OPERATOR, autocommit=True)
    operator.execute("SET refund_ledger.at = '2000-01-01'")
    before = value(operator, "SELECT clock_timestamp()")
    operator.execute(EVENT[OPERATOR])
    operator.execute("UPDATE refund_ledger.refund_limits SET day_count = 5")
    after = value(operator, "SELECT clock_timestamp()")
    rows = operator.execute("SELECT at, login FROM refund_ledger.refund_events").fetchall()
    assert [before <= at <= after for at, _ in rows] == [True, True]
    assert {name for _, name in rows} == {login(ledger_url, OPERATOR).username}


# -- nobody waits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "statements"),
    [
        (KEY_ROTATOR, ("SET CONSTRAINTS ALL IMMEDIATE", EVENT[KEY_ROTATOR])),
        (PAYER, ("SET CONSTRAINTS ALL IMMEDIATE", EVENT[PAYER], "SAVEPOINT here", EVENT[PAYER])),
        (KEY_ROTATOR, ("SELECT FROM refund_ledger.seal()",)),
    ],
    ids=["rotator with an event", "payer with events", "rotator who seals"],
)
def test_an_open_transaction_holds_up_no_pause(
    connect: Connect, ledger_url: URL, login: Login, role: str, statements: tuple[str, ...]
) -> None:
    connect(PAYER, autocommit=True).execute(EVENT[PAYER])
    holder = connect(role)
    for statement in statements:
        holder.execute(statement)
    (paused,) = command(login(ledger_url, OPERATOR), "pause", by="erin").splitlines()
    assert "paused" in paused
    holder.commit()
    asyncio.run(Ledger(LedgerEngine(ledger_url, pool_size=0), get_settings(), actor="test").seals.seal())
    found = audit(ledger_url)
    assert (found.unsealed, found.findings) == (0, [])


# -- who seals ---------------------------------------------------------------------------------------------


def test_commands_that_change_something_seal_it(world: World, ledger_url: URL, login: Login) -> None:
    held = world.released()
    world.run(world.ledger.seals.seal())
    operator = login(ledger_url, OPERATOR)
    for arguments in (
        ("pause",),
        ("resume",),
        ("limit", "largest_refund", "100"),
        ("cancel", str(held)),
    ):
        before = audit(ledger_url).events
        command(operator, *arguments, by="erin")
        found = audit(ledger_url)
        assert found.events > before
        assert found.unsealed == 0


def test_a_command_that_cannot_seal_says_so_and_is_done(
    ledger_url: URL, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def seal(self: Seals) -> None:
        raise LedgerUnavailable("The ledger database has gone.")

    monkeypatch.setattr(Seals, "seal", seal)
    paused, unsealed = command(login(ledger_url, OPERATOR), "pause", by="erin").splitlines()
    assert "paused" in paused
    assert unsealed == (
        "The newest events are not sealed yet; the next run or command seals them. "
        "The ledger database has gone."
    )


def test_what_a_seal_costs(
    connect: Connect, ledger_url: URL, record_property: Callable[[str, object], None]
) -> None:
    connect(PAYER, autocommit=True).execute(
        "INSERT INTO refund_ledger.refund_events (event, actor, reason) "
        "SELECT 'contradiction', 'payroc_refunds scheduled__2026-11-30', 'x' FROM generate_series(1, 20000)"
    )
    sealer = connect(OPERATOR, autocommit=True)
    began = time.perf_counter()
    assert seal(sealer) == 20_000
    record_property("seconds to seal 20,000 events", f"{time.perf_counter() - began:.3f}")
    assert audit(ledger_url).findings == []
