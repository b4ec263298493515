"""One refund, and two in a list, exhaustively: every point of an attempt × what happens to the worker there × everything Payroc may do."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.simulation.exhaustive import Case, every_case, try_every_point
from tests.simulation.mutants import MUTANTS


def test_wherever_a_worker_dies_fails_or_freezes_and_whatever_payroc_does_each_refund_is_paid_once(
    record_property: Callable[[str, object], None],
) -> None:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        results = list(pool.map(_try, every_case(), chunksize=20))
    points = sum(count for count, _ in results)
    broken = [found for _, found in results for found in found]
    line = f"{points:,} cases: every point of the first and the second attempt, and of two in a list, {len(results):,} combinations at each"
    record_property("every point", line)
    assert not broken, f"{len(broken)} cases break an invariant, first {broken[0]}"
    assert points > 10 * len(results)


def test_a_case_that_breaks_an_invariant_is_found() -> None:
    [mutant] = [mutant for mutant in MUTANTS if mutant.name == "no answer is a rejection"]
    with mutant.applied():
        _, broken = try_every_point("", "lost after", "freeze 100", 0, 1)
    assert broken


def _try(case: tuple[str, str, str, int, int]) -> tuple[int, list[tuple[Case, str]]]:
    return try_every_point(*case)
