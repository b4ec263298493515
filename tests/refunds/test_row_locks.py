"""Transactions with the same refunds wait for each other and are not deadlocked: all lock the refund with the smaller id first."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from include.refunds.ledger import Selection
from tests.patience import eventually
from tests.refunds.conftest import World
from tests.refunds.test_reissue import reissued, returned

LOCK = "SELECT FROM refund_ledger.refund_states WHERE refund_id = {} FOR NO KEY UPDATE NOWAIT"
WAITING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock'"""

Begin = Callable[[], Coroutine[Any, Any, object]]


def a_cancelled_reissue(world: World) -> tuple[int, int, Begin]:
    old = returned(world)
    new = reissued(world, old)
    return old, new, lambda: world.ledger.decisions.cancel(new, "the customer called")


def two_released(world: World) -> tuple[int, int]:
    refs = world.approve(), world.approve()
    world.pull()
    world.release()
    return int(world.row(refs[0])["id"]), int(world.row(refs[1])["id"])


def a_write_back(world: World) -> tuple[int, int, Begin]:
    ids = two_released(world)
    due = world.run(world.ledger.write_backs.due_write_backs(10))
    assert world.run(world.ledger.write_backs.take_turn("test"))
    return *ids, lambda: world.ledger.write_backs.mark_written_back("test", due[::-1])


def a_list_of_payrocs(world: World) -> tuple[int, int, Begin]:
    ids = two_released(world)
    return *ids, lambda: world.ledger.records.mark_seen(ids[::-1])


def stale_releases(world: World) -> tuple[int, int, Begin]:
    ids = two_released(world)
    world.hours_ahead = 25
    return *ids, world.ledger.runs.return_stale_releases


def a_withdrawal(world: World) -> tuple[int, int, Begin]:
    return *two_released(world), lambda: world.ledger.intake.set_aside([])


def a_release(world: World) -> tuple[int, int, Begin]:
    refs = world.approve(), world.approve()
    world.pull()
    # The younger refund was approved first, so it is the first that is released.
    first, second = (int(world.row(ref)["id"]) for ref in refs)
    candidates = world.run(world.ledger.runs.candidates(Selection()))[::-1]

    async def release() -> object:
        ids = [item.id for item in candidates]
        await world.ledger.runs.begin_run("run-1", {}, candidates, {}, await world.ledger.now())
        await world.ledger.approvals.ask_approval("run-1")
        return await world.ledger.gate.release("run-1", ids, ids, {})

    return first, second, release


@pytest.mark.parametrize(
    "begun",
    [a_cancelled_reissue, a_write_back, a_list_of_payrocs, stale_releases, a_withdrawal, a_release],
)
def test_who_waits_for_a_refund_has_locked_none_with_a_greater_id(
    world: World, begun: Callable[[World], tuple[int, int, Begin]]
) -> None:
    first, second, begin = begun(world)
    # Its row is the later one in the table, so the order of the rows is not that of the ids.
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.refund_states SET payroc_seen_at = now() WHERE refund_id = {first}"
        )
    with ThreadPoolExecutor(1) as thread, world.ledger_engine.connect() as other:
        other.exec_driver_sql(LOCK.format(first))
        work = thread.submit(lambda: world.run(begin()))
        with world.ledger_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as looking:
            eventually(
                lambda: looking.exec_driver_sql(WAITING).scalar_one() or work.done(), "it waits for the lock"
            )
        assert not work.done()
        other.exec_driver_sql(LOCK.format(second))
        other.rollback()
        work.result()
