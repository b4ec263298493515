"""What a benchmark's figure says of its goal."""

from __future__ import annotations

import pytest

from benchmarks.figure import figure_of


def at_least(values: list[float]) -> bool:
    return figure_of("lists", "≥ 3 ×", values, "×", {}, lambda ratio: ratio >= 3).clearly_short


def at_most(values: list[float]) -> bool:
    return figure_of("tasks", "≤ 1.1 ×", values, "×", {}, lambda ratio: ratio <= 1.1).clearly_short


def test_a_figure_is_the_median_of_its_runs_with_the_smallest_and_the_largest() -> None:
    figure = figure_of("lists", "≥ 3 ×", [5.0, 1.0, 3.0], "×", {}, lambda ratio: ratio >= 3)
    assert (figure.value, figure.low, figure.high, figure.runs, figure.reached) == (3.0, 1.0, 5.0, 3, True)


def test_what_misses_its_goal_by_no_more_than_noise_is_not_clearly_short() -> None:
    assert (at_least([3.0]), at_least([1.9]), at_least([1.7])) == (False, False, True)
    assert (at_most([1.1]), at_most([1.8]), at_most([1.9])) == (False, False, True)


def test_one_slow_run_of_three_does_not_make_a_figure_fall_short() -> None:
    assert not at_least([3.1, 1.0, 3.2])


def test_a_figure_without_a_goal_falls_short_of_nothing() -> None:
    told = figure_of("lists, refunds per second", "told only", [1.0], "1/s", {})
    assert (told.reached, told.clearly_short, told.goal_number) == (None, False, None)
    with pytest.raises(ValueError, match="has no goal"):
        told.times_goal(1.0)


def test_nothing_is_as_much_better_than_a_limit_as_a_picture_can_show() -> None:
    assert figure_of("tokens", "≤ 1", [0.0], "", {}, lambda value: value <= 1).times_goal(0.0) == 1000
