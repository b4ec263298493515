"""The ledger's database goes away while workers send: they are retried, nothing is paid twice, nothing is lost."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil
import pytest
from sqlalchemy import URL

from demo import processes
from demo.postgres import PostgresServer
from include.refunds.demo_source import create_table
from include.refunds.migrations import migrate
from tests.conftest import SCRATCH
from tests.patience import PATIENCE_SECONDS
from tests.processes.books import attempts_of, check_books
from tests.processes.conftest import bring_to_an_end, in_lists, open_run
from tests.processes.line import Handler, Line
from tests.processes.scheduler import Scheduler
from tests.processes.worker import Ending, Try
from tests.refunds.conftest import World

# Payroc answers late, so that several workers are between POST and record when the database goes away.
LATE_SECONDS = 0.3

# When this many did not meet all the trouble, something else is wrong.
MOST_RUNS = 6

_servers = itertools.count(1)


@pytest.fixture
def timeout_seconds() -> float:
    """Longer than a create is stopped before the database goes away; a lease gets three times as long."""
    return 6.0


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


class Stopper:
    """Stops creates on the line, so that the database goes away between the claim and the record of each."""

    def __init__(self, line: Line) -> None:
        self._wanted: list[str] = []
        self._is_there = threading.Event()
        self._over = threading.Event()
        line.fault = self._receive

    def stop_next(self, *, accepted: bool) -> None:
        """
        Stop the next create.

        :param accepted: when Payroc has accepted it, or before it comes to Payroc.
        """
        self._is_there.clear()
        self._over.clear()
        self._wanted.append("accepted" if accepted else "on its way")

    def is_there(self) -> bool:
        return self._is_there.is_set()

    def let_go(self) -> None:
        self._is_there.clear()
        self._over.set()

    def _receive(self, handler: Handler, answer: Callable[[], bytes | None]) -> None:
        stop = None
        # A handler runs in a thread of its own: only one of them gets it.
        if handler.headers.get("Idempotency-Key"):
            with suppress(IndexError):
                stop = self._wanted.pop()
        if stop != "on its way":
            whole = answer()
        if stop is not None:
            self._is_there.set()
            self._over.wait(PATIENCE_SECONDS)
        if stop == "on its way":
            whole = answer()
        handler.hand_on(whole)


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
    world.sandbox.post(
        "/_sandbox/faults",
        {"operation": "create", "kind": "slow", "when": "after", "seconds": LATE_SECONDS, "times": 100_000},
    )

    # In turn, so that each kind comes as often.
    kinds = [terminate_backends, restart, kill]
    done: Counter[str] = Counter()
    stopper = Stopper(line)
    stopper.stop_next(accepted=False)
    next_at = time.monotonic()

    def trouble() -> None:
        nonlocal next_at
        # At a random moment of the other workers, while this one waits for its answer.
        if done.total() == troubles or not stopper.is_there() or time.monotonic() < next_at:
            return
        kind = kinds[done.total() % len(kinds)]
        kind(server)
        done[kind.__name__] += 1
        stopper.let_go()
        next_at = time.monotonic() + chance.uniform(0, 0.5)
        if done.total() < troubles:
            stopper.stop_next(accepted=done.total() % 2 == 1)

    ended: list[tuple[Try, Ending]] = []
    refund_ids: set[int] = set()
    runs = 0
    # One is enough when each trouble meets no more creates than there are workers.
    while done.total() < troubles and runs < MOST_RUNS:
        runs += 1
        for _ in range(refunds):
            world.approve(amount=chance.randint(1, 1_000_000))
        of_this_run = open_run(world, f"run-{runs}")
        refund_ids.update(of_this_run)
        ended += scheduler.run(in_lists(f"run-{runs}", of_this_run, each), meanwhile=trouble)
        # The world's own connections have ended with the server as well.
        world.ledger_engine.dispose()
        world.source_engine.dispose()
    outcomes = Counter(ending.outcome for _, ending in ended)
    assert set(outcomes) <= {"success", "RefundsInDoubt", "LedgerUnavailable"}, [
        ending for _, ending in ended
    ]
    assert all(ending.retried for _, ending in ended if ending.outcome == "LedgerUnavailable")
    assert done.total() == troubles
    assert outcomes["LedgerUnavailable"] >= troubles
    bring_to_an_end(world, scheduler, each)
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
        refunds=len(refund_ids),
        POSTs=posts,
        seconds=round(time.monotonic() - began),
    )
