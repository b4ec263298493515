"""
A worker dies, or stands still, in the middle of a list that it sends side by side: each refund of it is paid once, however far it was.

Nothing is left to chance: the line and a lock in the ledger hold each refund where the test wants it, until all are there.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum

import pytest
from sqlalchemy import text

from include.refunds.classify import Outcome, Verdict
from include.refunds.ledger import Task
from tests.patience import PATIENCE_SECONDS
from tests.processes.books import attempts_of, check_books
from tests.processes.conftest import bring_to_an_end, open_run
from tests.processes.line import Handler, Line
from tests.processes.scheduler import Scheduler
from tests.processes.worker import Try
from tests.refunds.conftest import World

_OF_EACH = 4


class Stop(StrEnum):
    """How far a refund has come when its worker is hit."""

    LOOK_UP = "claimed, and looked up before its POST"
    ON_THE_WAY = "its POST has left the worker, and comes to Payroc later"
    LOST = "its POST has left the worker, and never comes to Payroc"
    ACCEPTED = "accepted by Payroc, and no answer came"
    ANSWERED = "accepted by Payroc, answered, and not recorded"


class Held:
    """
    A list of which each refund is held at its stop, the first time that it comes there.

    :param stops: where the refunds are held, by their order ids.
    """

    def __init__(self, world: World, line: Line, stops: dict[str, Stop]) -> None:
        self._world = world
        self._line = line
        self._stops = stops
        keys = world.rows("SELECT order_id, CAST(idempotency_key AS text) AS key FROM refund_ledger.refunds")
        self._order_of_key = {row["key"]: row["order_id"] for row in keys}
        self._here: set[str] = set()
        self._answers, self._on_the_way = threading.Event(), threading.Event()
        line.fault = self._hold

    def are_all_there(self) -> bool:
        return len(self._here) == len(self._stops)

    def answer(self) -> None:
        """Let the answers go that are to be answered."""
        self._answers.set()

    def let_go(self) -> None:
        """What is on the way arrives, and nothing is held any more."""
        self._on_the_way.set()
        self._answers.set()

    def _hold(self, handler: Handler, answer: Callable[[], bytes | None]) -> None:
        order_id = self._order_of_key.get(handler.headers.get("Idempotency-Key", ""), "")
        stop = self._stops.get(order_id)
        if handler.command == "GET":
            order_id = next((item for item in self._stops if f"orderId={item}" in handler.path), "")
            stop = Stop.LOOK_UP if self._stops.get(order_id) is Stop.LOOK_UP else None
        if stop is None or order_id in self._here:
            handler.wfile.write(answer() or b"")
            return
        whole = answer() if stop in (Stop.ACCEPTED, Stop.ANSWERED) else None
        self._here.add(order_id)
        (self._answers if stop is Stop.ANSWERED else self._on_the_way).wait(PATIENCE_SECONDS)
        if stop in (Stop.LOOK_UP, Stop.ON_THE_WAY):
            whole = answer()
        with suppress(OSError):
            handler.wfile.write(whole or b"")


@pytest.fixture
def timeout_seconds() -> float:
    """Long enough for all refunds of a list to come to their stops; the lease gets three times as long."""
    return 6.0


@pytest.fixture(scope="module")
def token_seconds() -> int:
    """Long enough for such an exchange after all claims."""
    return 30


def held_list(world: World, line: Line, stops: list[Stop]) -> tuple[tuple[int, ...], Held]:
    """Approve and release so many refunds for each stop, and return their ids and what holds them."""
    wanted: dict[str, Stop] = {}
    for stop in stops:
        for _ in range(_OF_EACH):
            wanted[world.approve()] = stop
    refund_ids = open_run(world, "run-1")
    rows = world.rows("SELECT id, source_ref, order_id FROM refund_ledger.refunds")
    # A later attempt is looked up before its POST.
    looked_up = [row["id"] for row in rows if wanted[row["source_ref"]] is Stop.LOOK_UP]
    leave_unknown(world, looked_up)
    return tuple(refund_ids), Held(world, line, {row["order_id"]: wanted[row["source_ref"]] for row in rows})


def leave_unknown(world: World, refund_ids: list[int]) -> None:
    """Leave an attempt behind of which nothing came to Payroc, and no outcome is known."""

    async def work() -> None:
        for refund_id in refund_ids:
            claim = await world.ledger.claims.claim(
                refund_id,
                Task("run-0", 0, 1),
                environment=world.gateway.environment,
                sent_with=world.gateway.sent_with,
                token_seconds=60,
            )
            assert claim is not None
            assert await world.ledger.claims.may_post(claim, 1)
            verdict = Verdict(Outcome.UNKNOWN, "No answer came.")
            await world.ledger.records.record(refund_id, verdict, claim.attempt)

    world.run(work())
    with world.ledger_engine.begin() as connection:
        over = "lease_until = now(), next_attempt_at = now()"
        connection.execute(
            text(f"UPDATE refund_ledger.refund_states SET {over} WHERE refund_id = ANY(:ids)"),
            {"ids": refund_ids},
        )


@contextmanager
def no_record_gets_through(world: World) -> Iterator[None]:
    with world.ledger_engine.begin() as connection:
        connection.execute(text("LOCK TABLE refund_ledger.refund_attempts IN SHARE MODE"))
        yield


def a_record_waits(world: World) -> bool:
    query = "SELECT count(*) AS n FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return bool(world.rows(query)[0]["n"])


def test_a_worker_that_is_killed_in_the_middle_of_its_list_pays_none_of_it_twice_and_loses_none(
    world: World, line: Line, scheduler: Scheduler, figures: Callable[..., None]
) -> None:
    began = time.monotonic()
    refund_ids, held = held_list(world, line, list(Stop))
    lock = ExitStack()
    locked_at: list[float] = []

    def bring_all_to_their_stops() -> None:
        if held.are_all_there() and not locked_at:
            lock.enter_context(no_record_gets_through(world))
            locked_at.append(time.monotonic())
            held.answer()

    def kill(this: Try) -> int | None:
        # The answers of the others have come while the first record waits.
        return (
            signal.SIGKILL
            if locked_at and time.monotonic() > locked_at[0] + 0.5 and a_record_waits(world)
            else None
        )

    with lock:
        [(_, ending)] = scheduler.run(
            [Try("run-1", 0, refund_ids)], retries=0, meanwhile=bring_all_to_their_stops, signal_now=kill
        )
    assert ending.outcome == "killed", ending
    assert {row["status"] for row in world.rows("SELECT status FROM refund_ledger.refunds")} == {"sending"}
    left = [attempts_of(world, refund_id)[-1] for refund_id in refund_ids]
    assert [item.number for item in left] == [1] * len(refund_ids)
    assert not any(item.recorded for item in left)
    assert sum(item.accepted for item in left) == 2 * _OF_EACH

    held.let_go()
    scheduler.run([Try("run-1", 0, refund_ids, number=2)])
    bring_to_an_end(world, scheduler)
    figures(
        "A worker killed in the middle of its list",
        refunds=len(refund_ids),
        **{stop.name.lower(): _OF_EACH for stop in Stop},
        POSTs=check_books(world, line),
        seconds=round(time.monotonic() - began),
    )


def test_a_worker_that_stands_still_in_the_middle_of_its_list_and_wakes_up_late_pays_none_of_it_twice(
    world: World, line: Line, scheduler: Scheduler, figures: Callable[..., None]
) -> None:
    began = time.monotonic()
    stops = [Stop.LOOK_UP, Stop.ON_THE_WAY, Stop.LOST, Stop.ACCEPTED]
    refund_ids, held = held_list(world, line, stops)
    done: list[str] = []

    def send_beside_the_frozen_one() -> None:
        if done == ["stopped"]:
            # Airflow starts it again when the heartbeat is missing. It waits for the leases, and sends what is left to send.
            beside = Scheduler(1, scheduler.log).run([Try("run-1", 0, refund_ids, number=2)])
            assert beside[-1][1].outcome == "success", beside
            done.append("sent by another")

    def stop_and_go_on(this: Try) -> int | None:
        if not done and held.are_all_there():
            done.append("stopped")
            return signal.SIGSTOP
        if done == ["stopped", "sent by another"]:
            done.append("woken up")
            held.let_go()
            return signal.SIGCONT
        return None

    [(_, ending)] = scheduler.run(
        [Try("run-1", 0, refund_ids)],
        retries=0,
        meanwhile=send_beside_the_frozen_one,
        signal_now=stop_and_go_on,
    )
    assert done == ["stopped", "sent by another", "woken up"], ending
    # What was on the way for so long came with a token that had ended. So two of one key never met at Payroc, though they did on the line.
    creates = world.sandbox.get("/_sandbox/requests?operation=create")["requests"]
    assert Counter(item["status"] for item in creates) == {201: len(refund_ids), 401: _OF_EACH}
    line.overlapping.clear()
    # What it had claimed and looked up, it did not send any more.
    late = """
        SELECT outcome FROM refund_ledger.refund_attempts AS late
        WHERE run_id = 'run-1' AND try_number = 1
          AND EXISTS (SELECT FROM refund_ledger.refund_attempts AS earlier
                      WHERE earlier.refund_id = late.refund_id AND earlier.run_id = 'run-0')"""
    outcomes = [row["outcome"] for row in world.rows(late)]
    assert outcomes == ["not_sent"] * _OF_EACH
    bring_to_an_end(world, scheduler)
    figures(
        "A worker that stood still in the middle of its list",
        refunds=len(refund_ids),
        **{stop.name.lower(): _OF_EACH for stop in stops},
        POSTs=check_books(world, line),
        POSTs_that_came_with_a_token_that_had_ended=_OF_EACH,
        seconds=round(time.monotonic() - began),
    )
