"""The figures as a picture: how far each is from its goal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.figure import Figure

matplotlib.use("Agg")

from matplotlib import pyplot

_GREEN, _RED = "#1b7f4d", "#b3261e"


def plot(figures: Sequence[Figure], path: Path) -> None:
    """
    Draw each figure that has a goal, in multiples of it: to the right of the line it is reached.

    :param path: the PNG that is written.
    """
    shown = [(figure, figure.goal_number) for figure in reversed(figures) if figure.goal_number is not None]
    height = 1.6 + 0.5 * len(shown)
    picture, axes = pyplot.subplots(figsize=(12, height), dpi=110)
    for place, (figure, goal) in enumerate(shown):
        assert goal is not None  # noqa: S101 - for the types
        colour = _GREEN if figure.reached else _RED
        middle, *ends = (figure.times_goal(value) for value in (figure.value, figure.low, figure.high))
        axes.plot(ends, [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot([middle], [place], "o", color=colour, markersize=8)
        text = f"{figure.value:,.3g} {figure.unit}   (goal {figure.goal})"
        end = (max(middle, *ends), place)
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(
            text, end, xytext=(10, 0), textcoords="offset points", va="center", fontsize=10, bbox=ground
        )
    axes.axvline(1, color="#444444", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    # Room for the text to the right of the points.
    axes.set_xlim(min(low, 0.5), max(high, 2) * 6)
    axes.set_yticks(range(len(shown)), [figure.name for figure, _ in shown], fontsize=11)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    ticks = [
        tick
        for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000)
        if min(low, 0.5) <= tick <= max(high, 2)
    ]
    axes.set_xticks(ticks, [f"{tick:g} ×" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        "how much better than the goal (dashed line); the bars show the smallest and the largest run"
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    picture.tight_layout()
    picture.savefig(path)
    pyplot.close(picture)
