"""One measured figure, with its goal and its spread."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

# A machine that does something else besides moves a ratio of few runs by less than this.
_MARGIN = 0.6


@dataclass(frozen=True)
class Figure:
    """
    One line of the table.

    :param name: what was measured.
    :param goal: what it should be, as text: ``≥ 3 ×``, ``≤ 150 MB``, or words when it is only told.
    :param value: the median of the runs.
    :param low: the smallest of the runs.
    :param high: the largest of the runs.
    :param unit: unit of these three; ``×`` for a ratio.
    :param reached: whether the value reaches the goal; ``None`` when it is only told.
    :param runs: how many runs there were.
    :param detail: what it was computed from.
    """

    name: str
    goal: str
    value: float
    low: float
    high: float
    unit: str
    reached: bool | None
    runs: int
    detail: dict[str, Any]

    @property
    def goal_number(self) -> float | None:
        """The number in the goal, ``None`` when the goal has none."""
        found = re.match(r"[≤≥] ?([0-9.,]+)", self.goal)
        return float(found[1].replace(",", "")) if found and self.reached is not None else None

    def times_goal(self, value: float) -> float:
        """Return how many times as good as the goal a value is; 1 reaches it. Only for a goal with a number."""
        goal = self.goal_number
        if goal is None:
            raise ValueError(f"{self.name} has no goal with a number")
        # What is nothing is as much better than a limit as a picture can show.
        return value / goal if self.goal.startswith("≥") else goal / max(value, goal / 1000)

    @property
    def clearly_short(self) -> bool:
        """Whether the goal is missed by more than the noise of a busy machine explains."""
        if self.reached is not False:
            return False
        return self.goal_number is None or self.times_goal(self.value) < _MARGIN


def figure_of(
    name: str,
    goal: str,
    values: Sequence[float],
    unit: str,
    detail: dict[str, Any],
    reaches: Callable[[float], bool] | None = None,
) -> Figure:
    """
    Return the figure of several runs.

    :param values: one value per run, at least one.
    :param reaches: whether a median reaches the goal; ``None`` when the figure is only told.
    """
    value = median(values)
    return Figure(
        name,
        goal,
        value,
        min(values),
        max(values),
        unit,
        None if reaches is None else reaches(value),
        len(values),
        detail,
    )
