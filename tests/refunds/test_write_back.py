"""Write-backs run one at a time, and an older one never replaces a newer one."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from include.refunds.ledger import LedgerUnavailable, write_backs
from tests.refunds.conftest import World


def test_an_older_write_back_that_comes_late_changes_nothing_and_is_told_apart(world: World) -> None:
    refund_id = world.released()
    [older] = world.run(world.ledger.write_backs.due_write_backs(10))
    world.send(refund_id)
    world.write_back()
    late = replace(older, updated_at=older.updated_at - timedelta(seconds=1))
    [missed] = world.run(world.source.write_back([late])).not_written
    assert missed.source_ref == older.source_ref
    assert world.source_row(older.source_ref)["status"] == "accepted"


def test_the_same_write_back_may_come_twice(world: World) -> None:
    refund_id = world.released()
    world.send(refund_id)
    due = world.run(world.ledger.write_backs.due_write_backs(10))
    assert world.run(world.source.write_back(due)).written == due
    assert world.run(world.source.write_back(due)).written == due


def test_a_write_back_does_not_wait_forever_for_another_and_names_the_source(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_backs, "_WAIT_SECONDS", 1)
    world.released()

    async def second_next_to_the_first() -> None:
        async with world.ledger.write_backs.write_back_turn(), world.ledger.write_backs.write_back_turn():
            pytest.fail("two write-backs have the turn")

    with pytest.raises(LedgerUnavailable, match=r"Another write-back is at work.*connection refunds_source"):
        world.run(second_next_to_the_first())
    assert world.write_back()[0] == 1
