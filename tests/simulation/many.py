"""Many histories, on all processors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context

from tests.simulation.engine import Violation
from tests.simulation.history import Counts, History

_BATCH = 250


@dataclass(slots=True)
class Outcome:
    """
    What many histories came to.

    :param violations: seed and sentence of each history that broke an invariant.
    :param seconds: how long it took by the clock.
    """

    counts: Counts = field(default_factory=Counts)
    violations: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0


def run_batch(seeds: Sequence[int]) -> Outcome:
    """Run histories one after the other."""
    outcome = Outcome()
    for seed in seeds:
        try:
            outcome.counts.add(History(seed).run())
        except Violation as violation:
            outcome.violations.append((seed, str(violation)))
    return outcome


def run_many(seeds: Iterable[int], *, progress: Callable[[int], None] = lambda count: None) -> Outcome:
    """
    Run histories on all processors.

    :param progress: told after each batch how many histories it was.
    """
    began, total = time.monotonic(), Outcome()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        for future in as_completed([pool.submit(run_batch, batch) for batch in _batches(list(seeds))]):
            outcome = future.result()
            total.counts.add(outcome.counts)
            total.violations += outcome.violations
            progress(outcome.counts.histories + len(outcome.violations))
    total.violations.sort()
    total.seconds = time.monotonic() - began
    return total


def _batches(seeds: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(seeds), _BATCH):
        yield seeds[start : start + _BATCH]
