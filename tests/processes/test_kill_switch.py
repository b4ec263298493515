"""A person pauses while several workers are in the middle of their lists: no POST goes out any more, and nothing is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime

import pytest

from tests.patience import PATIENCE_SECONDS
from tests.processes.books import check_books
from tests.processes.conftest import bring_to_an_end, open_run
from tests.processes.line import Handler, Line
from tests.processes.scheduler import Scheduler
from tests.processes.worker import Try
from tests.refunds.conftest import World

_REFUNDS, _WORKERS, _IN_FLIGHT = 80, 2, 8
_ANSWER_SECONDS = 0.05


@pytest.fixture
def timeout_seconds() -> float:
    """Longer than the test takes to pause."""
    return 30.0


@pytest.fixture(scope="module")
def token_seconds() -> int:
    """Nobody waits for the end of a lease here."""
    return 3600


@pytest.mark.parametrize("scope", ["*", "7701001"])
def test_a_pause_stops_every_worker_in_the_middle_of_its_list_before_its_next_post(
    world: World,
    line: Line,
    scheduler: Scheduler,
    figures: Callable[..., None],
    scope: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_REQUESTS_IN_FLIGHT", str(_IN_FLIGHT))
    for number in range(_REFUNDS):
        world.approve(processing_terminal_id="7701001" if scope == "*" or number % 2 else "7701002")
    refund_ids = open_run(world, "run-1")
    paused_at: list[float] = []
    committed_at: list[datetime] = []
    paused = threading.Event()

    def are_in_the_middle() -> bool:
        return len(line.posts) >= _REFUNDS // 4

    def slowly(handler: Handler, answer_of_payroc: Callable[[], bytes | None]) -> None:
        if handler.headers.get("Idempotency-Key"):
            time.sleep(_ANSWER_SECONDS)
            # Until all that a worker may have under way waits, the others continue. So no list ends before.
            if are_in_the_middle() and len(line.posts) % 2:
                paused.wait(PATIENCE_SECONDS)
        handler.hand_on(answer_of_payroc())

    def pause_in_the_middle() -> None:
        if are_in_the_middle() and not paused_at:
            world.run(world.ledger.pauses.pause(scope, "The bank called."))
            committed_at.append(world.run(world.ledger.now()))
            paused_at.append(time.monotonic())
            paused.set()

    line.fault = slowly
    each = _REFUNDS // _WORKERS
    tries = [
        Try("run-1", index, tuple(refund_ids[index * each : (index + 1) * each])) for index in range(_WORKERS)
    ]
    ended = scheduler.run(tries, meanwhile=pause_in_the_middle)

    paused_orders = {
        row["order_id"]
        for row in world.rows("SELECT * FROM refund_ledger.refunds")
        if scope in ("*", row["processing_terminal_id"])
    }
    late = [post for post in line.posts if post.at > paused_at[0] and post.order_id in paused_orders]
    # What left later was on its way: its last check was committed before the pause, whenever its worker got to it.
    checked = """
        SELECT order_id FROM refund_ledger.refunds JOIN refund_ledger.refund_attempts ON refund_id = id
        WHERE posting_at <= :pause"""
    permitted = {row["order_id"] for row in world.rows(checked, pause=committed_at[0])}
    assert {post.order_id for post in late} <= permitted
    all_checked = world.rows(
        "SELECT refund_id FROM refund_ledger.refund_attempts WHERE posting_at > :pause", pause=committed_at[0]
    )
    assert scope != "*" or all_checked == []
    # A worker that has not counted the others yet takes all the places of the host.
    assert len(late) <= _WORKERS * _IN_FLIGHT, "a worker sends more than what it had on its way already"
    assert [ending.outcome for _, ending in ended] == ["RefundsStopped"] * _WORKERS
    waiting = world.rows("SELECT processing_terminal_id FROM refund_ledger.refunds WHERE status = 'released'")
    assert waiting
    assert {row["processing_terminal_id"] for row in waiting} == {"7701001"}, "only what is paused waits"

    line.fault = None
    assert world.run(world.ledger.pauses.resume(scope, "All is well."))
    bring_to_an_end(world, scheduler, each=10)
    figures(
        f"A pause of {'everything' if scope == '*' else 'one terminal'} in the middle of {_WORKERS} lists",
        refunds=_REFUNDS,
        POSTs=check_books(world, line),
        POSTs_that_were_on_their_way=len(late),
    )
