"""The ledger's database goes away while workers send: they are retried, nothing is paid twice, nothing is lost."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import psutil
import pytest
from sqlalchemy import URL

from demo import processes
from demo.postgres import PostgresServer
from include.refunds.demo_source import create_table
from include.refunds.migrations import migrate
from tests.conftest import SCRATCH
from tests.processes.books import attempts_of, check_books
from tests.processes.conftest import bring_to_an_end, in_lists, open_run
from tests.processes.line import Line
from tests.processes.scheduler import Scheduler
from tests.refunds.conftest import World

# Payroc answers late, so that the database often goes away between a POST and its record.
LATE_SECONDS = 0.3

_servers = itertools.count(1)


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of its own, which keeps what it has committed: ``fast`` would lose the last commits when the server is killed."""
    with PostgresServer(SCRATCH / f"postgres-in-trouble-{next(_servers)}") as server:
        yield server


@pytest.fixture
def ledger_url(server: PostgresServer) -> URL:
    server.create_database("ledger")
    migrate(server.url("ledger"))
    return server.url("ledger")


@pytest.fixture
def source_url(server: PostgresServer) -> URL:
    server.create_database("source")
    create_table(server.url("source"))
    return server.url("source")


def terminate_backends(server: PostgresServer) -> None:
    with server.connect() as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'ledger'")


def restart(server: PostgresServer) -> None:
    server.stop()
    # For so long that an answer of Payroc which was on its way is there before the database is.
    time.sleep(LATE_SECONDS)
    server.start()


def kill(server: PostgresServer) -> None:
    postmaster = psutil.Process(server.pid)
    processes.end_all([postmaster, *postmaster.children(recursive=True)], first=signal.SIGKILL)
    restart(server)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("each", [1, 10])
def test_no_refund_is_paid_twice_or_lost_when_the_database_goes_away_while_workers_send(
    world: World,
    line: Line,
    server: PostgresServer,
    scheduler: Scheduler,
    figures: Callable[..., None],
    each: int,
    long: bool,
) -> None:
    refunds, troubles = (300, 60) if long else (40, 8)
    if each > 1 and not long:
        troubles = 4
    # As many tasks: trouble that meets none proves nothing.
    refunds *= each
    began = time.monotonic()
    chance = random.Random()
    for _ in range(refunds):
        world.approve(amount=chance.randint(1, 1_000_000))
    refund_ids = open_run(world, "run-1")
    world.sandbox.post(
        "/_sandbox/faults",
        {"operation": "create", "kind": "slow", "when": "after", "seconds": LATE_SECONDS, "times": 10_000},
    )

    # In turn, so that each kind comes as often.
    kinds = [terminate_backends, restart, kill]
    done: Counter[str] = Counter()
    next_at = time.monotonic()
    paid = 0

    def trouble() -> None:
        nonlocal next_at, paid
        if done.total() == troubles:
            return
        paid_before, paid = paid, world.sandbox.get("/_sandbox/health")["refunds"]
        # Every other one comes right after Payroc has accepted a refund and before it answers, the rest at any moment.
        if time.monotonic() < next_at or (done.total() % 2 and paid == paid_before):
            return
        kind = kinds[done.total() % len(kinds)]
        kind(server)
        done[kind.__name__] += 1
        next_at = time.monotonic() + chance.uniform(0.1, 1.0)

    ended = scheduler.run(in_lists("run-1", refund_ids, each), meanwhile=trouble)
    outcomes = Counter(ending.outcome for _, ending in ended)
    assert set(outcomes) <= {"success", "RefundsInDoubt", "LedgerUnavailable"}, [
        ending for _, ending in ended
    ]
    assert all(ending.retried for _, ending in ended if ending.outcome == "LedgerUnavailable")
    assert outcomes["LedgerUnavailable"] >= troubles
    # The world's own connections have ended with the server as well.
    world.ledger_engine.dispose()
    world.source_engine.dispose()
    bring_to_an_end(world, scheduler)
    posts = check_books(world, line)
    unrecorded = [
        item for refund_id in refund_ids for item in attempts_of(world, refund_id) if not item.recorded
    ]
    assert any(attempt.accepted for attempt in unrecorded), (
        "the database never went away between a POST and its record"
    )
    figures(
        f"Database trouble while workers send, {each} to a task",
        **done,
        tries_that_met_it=outcomes["LedgerUnavailable"],
        attempts_without_a_record=len(unrecorded),
        of_them_accepted_by_Payroc=sum(attempt.accepted for attempt in unrecorded),
        refunds=refunds,
        POSTs=posts,
        seconds=round(time.monotonic() - began),
    )
