"""Histories drawn from seeds: 2,000 that are always the same, and 1,000 that nobody has seen before."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pytest

from tests.simulation.engine import Violation
from tests.simulation.history import History, tell
from tests.simulation.many import Outcome, run_many
from tests.simulation.mutants import MUTANTS

_FIXED, _FRESH, _LONG = 2_000, 1_000, 100_000


@pytest.mark.timeout(1800)
def test_no_refund_is_paid_twice_or_lost_in_histories_that_are_always_the_same(
    long: bool, record_property: Callable[[str, object], None]
) -> None:
    outcome = run_many(range(_LONG if long else _FIXED))
    record_property("histories", _line(outcome))
    _assert_all_well(outcome)
    # Nothing that is to happen in them may have stopped happening unnoticed.
    counts = outcome.counts
    assert (
        min(counts.deaths, counts.freezes, counts.failures, counts.posts, counts.paid) > counts.histories / 2
    )
    assert counts.with_lists > counts.histories / 2
    assert len(counts.faults) >= 23
    assert len(counts.events) >= 18


def test_no_refund_is_paid_twice_or_lost_in_histories_that_nobody_has_seen(
    record_property: Callable[[str, object], None],
) -> None:
    first = secrets.randbelow(2**48)
    outcome = run_many(range(first, first + _FRESH))
    record_property("fresh histories", _line(outcome))
    _assert_all_well(outcome)


def test_the_same_seed_gives_the_same_history() -> None:
    assert tell(7) == tell(7)
    assert tell(7) != tell(8)


def test_a_history_that_breaks_an_invariant_is_told_step_by_step() -> None:
    with MUTANTS[0].applied():
        lines = next(lines for lines in map(tell, range(100)) if lines[-1].startswith("VIOLATION"))
    assert any("POST" in line for line in lines[:-1])


def test_a_fresh_seed_is_a_history_like_any_other() -> None:
    History(2**48).run()


def _line(outcome: Outcome) -> str:
    counts = outcome.counts
    line = (
        f"{counts.histories:,} histories in {outcome.seconds:.1f} s, {counts.histories / outcome.seconds:,.0f} a second: "
        f"{counts.posts:,} POSTs, {counts.posts_beside:,} beside others of their list, {counts.deaths:,} deaths, "
        f"{len(outcome.violations)} violations"
    )
    return line


def _assert_all_well(outcome: Outcome) -> None:
    if outcome.violations:
        seed, sentence = outcome.violations[0]
        raise Violation(
            f"{len(outcome.violations)} histories broke an invariant. Seed {seed}: {sentence} "
            f"Tell it step by step: python -m tests.simulation --seed {seed}"
        )
