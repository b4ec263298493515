"""A worker that is killed keeps what it had claimed and not sent for two minutes, and what it may have sent until its token has ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from tests.patience import PATIENCE_SECONDS
from tests.processes.books import check_books
from tests.processes.conftest import bring_to_an_end, open_run
from tests.processes.line import Handler, Line
from tests.processes.scheduler import Scheduler
from tests.processes.worker import Try
from tests.refunds.conftest import World

_REFUNDS, _TURNS = 20, 4
_LONGEST_WAIT = timedelta(minutes=2.5)


@pytest.fixture(scope="module")
def token_seconds() -> int:
    """As Payroc's."""
    return 3600


@pytest.fixture
def timeout_seconds() -> float:
    """Longer than the test takes to kill."""
    return 30.0


def attempts(world: World) -> list[dict[str, Any]]:
    return world.rows("""
        SELECT refund_id, attempt, started_at, posting_at, outcome, lease_until, fence_until, status
        FROM refund_ledger.refund_attempts JOIN refund_ledger.refund_states USING (refund_id) ORDER BY refund_id""")


def time_passes(world: World, how_much: timedelta) -> None:
    """Move what is noted of refunds into the past: a worker refuses a ledger whose clock was replaced."""
    columns = ("released_at", "first_sent_at", "lease_until", "fence_until", "next_attempt_at")
    earlier = ", ".join(f"{column} = {column} - :how_much" for column in columns)
    with world.ledger_engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(text(f"UPDATE refund_ledger.refund_states SET {earlier}"), {"how_much": how_much})


def test_refunds_that_a_killed_worker_never_sent_wait_two_and_a_half_minutes_at_most(
    world: World,
    line: Line,
    scheduler: Scheduler,
    figures: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_REQUESTS_IN_FLIGHT", str(_TURNS))
    for _ in range(_REFUNDS):
        world.approve()
    refund_ids = tuple(open_run(world, "run-1"))
    released = threading.Event()

    def hold(handler: Handler, answer_of_payroc: Callable[[], bytes | None]) -> None:
        if handler.headers.get("Idempotency-Key"):
            released.wait(PATIENCE_SECONDS)
        handler.hand_on(answer_of_payroc())

    def all_are_claimed(this: Try) -> int | None:
        # As many wait for their turn as have one.
        rows = attempts(world)
        posted = [row for row in rows if row["posting_at"] is not None]
        return signal.SIGKILL if len(posted) == _TURNS and len(rows) == 2 * _TURNS else None

    line.fault = hold
    [(_, ending)] = scheduler.run([Try("run-1", 0, refund_ids)], retries=0, signal_now=all_are_claimed)
    assert ending.outcome == "killed", ending
    left = attempts(world)
    assert {row["status"] for row in left} == {"sending"}
    sent = {row["refund_id"] for row in left if row["posting_at"] is not None}
    for row in left:
        if row["refund_id"] in sent:
            assert row["lease_until"] == row["fence_until"] > row["started_at"] + timedelta(hours=1)
        else:
            assert row["lease_until"] <= row["started_at"] + _LONGEST_WAIT

    # What was on its way when the worker was killed comes to Payroc later still.
    line.fault = None
    time_passes(world, _LONGEST_WAIT)
    scheduler.run([Try("run-1", 0, refund_ids, number=2)], retries=0)
    statuses = {
        row["id"]: row["status"] for row in world.rows("SELECT id, status FROM refund_ledger.refunds")
    }
    assert statuses == {refund_id: "sending" if refund_id in sent else "accepted" for refund_id in refund_ids}

    released.set()
    time_passes(world, timedelta(hours=2))
    bring_to_an_end(world, scheduler, each=10)
    figures(
        "A worker killed with claimed refunds that it had not sent",
        refunds=_REFUNDS,
        sent_again_within_two_and_a_half_minutes=len(left) - len(sent),
        POSTs=check_books(world, line),
    )
