"""Two runs with many workers each send the same refunds at the same time: each is sent by one of them, and paid once."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.patience import PATIENCE_SECONDS
from tests.processes.books import check_books
from tests.processes.conftest import bring_to_an_end, open_run
from tests.processes.line import Handler, Line
from tests.processes.scheduler import Scheduler
from tests.processes.worker import Try
from tests.refunds.conftest import World

# Most are plain; the others need a second attempt, for which the workers race again.
ENDINGS = ["4321"] * 17 + ["9005", "9009", "9020"]


@pytest.fixture(scope="module")
def token_seconds() -> int:
    """Longer than a POST may take, or its last check would permit none."""
    return 300


@pytest.fixture
def timeout_seconds() -> float:
    """Longer than all workers take to start."""
    return 60.0


def attempts_by_run(world: World) -> list[dict[str, Any]]:
    return world.rows(
        "SELECT run_id, count(*) AS n FROM refund_ledger.refund_attempts GROUP BY run_id ORDER BY run_id"
    )


def test_two_runs_whose_workers_all_send_the_same_refunds_pay_each_once(
    world: World,
    line: Line,
    scheduler: Scheduler,
    figures: Callable[..., None],
    long: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One turn for each process. With more the first one would have claimed everything before the last one has started.
    monkeypatch.setenv("PAYROC_REFUNDS_REQUESTS_IN_FLIGHT", "1")
    workers, refunds = (8, 500) if long else (4, 60)
    chance = random.Random()
    for _ in range(refunds):
        world.approve(chance.choice(ENDINGS), amount=chance.randint(1, 1_000_000))
    refund_ids = open_run(world, "run-0")
    assert len(refund_ids) == refunds

    both_have_begun = threading.Event()

    def hold(handler: Handler, answer: Callable[[], bytes | None]) -> None:
        # Until both runs have begun to send, none gets any further.
        if handler.headers.get("Idempotency-Key"):
            both_have_begun.wait(PATIENCE_SECONDS)
        handler.hand_on(answer())

    def let_go_when_both_have_begun() -> None:
        if not both_have_begun.is_set() and len(attempts_by_run(world)) == 2:
            line.fault = None
            both_have_begun.set()

    line.fault = hold
    # Every worker gets all refunds, in an order of its own.
    tries = [
        Try(run_id, index, tuple(chance.sample(refund_ids, refunds)))
        for run_id in ("run-1", "run-2")
        for index in range(workers)
    ]
    began = time.monotonic()
    scheduler.slots = len(tries)
    ended = scheduler.run(tries, meanwhile=let_go_when_both_have_begun)
    seconds = time.monotonic() - began
    outcomes = Counter(ending.outcome for _, ending in ended)
    assert set(outcomes) <= {"success", "RefundsInDoubt"}, [ending for _, ending in ended]

    # The claim makes it so, before the key has to: no attempt began while another one of the same refund was under way.
    overlapping = world.rows("""
        SELECT refund_id, attempt FROM (
            SELECT *, lag(finished_at) OVER (PARTITION BY refund_id ORDER BY attempt) AS last_finished_at
            FROM refund_ledger.refund_attempts) AS attempts
        WHERE attempt > 1 AND (last_finished_at IS NULL OR last_finished_at > started_at)""")
    assert not overlapping
    both = attempts_by_run(world)
    assert [row["run_id"] for row in both] == ["run-1", "run-2"]

    bring_to_an_end(world, scheduler)
    figures(
        f"Two runs side by side, {workers} workers each",
        refunds=refunds,
        POSTs=check_books(world, line),
        attempts_of_run_1=both[0]["n"],
        attempts_of_run_2=both[1]["n"],
        tries_that_had_to_wait=outcomes["RefundsInDoubt"],
        seconds=round(seconds),
    )
