"""Large runs, and runs on a ledger that has grown large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil

from benchmarks import finished
from benchmarks.figure import Figure, figure_of
from benchmarks.stage import Books, Product, Stage, in_lists

_FINISHED = 10_000_000
_FINISHED_QUICK = 50_000
_OVER_AIRFLOW_MB = 150


@dataclass(slots=True)
class _Run:
    """
    What a run took, in seconds.

    :param over_airflow_mb: the most memory of each list's process, over what Airflow takes when it is imported.
    """

    refunds: int
    pull: float
    release: float
    write_back: float
    report: float
    sending: float
    over_airflow_mb: list[float]

    @property
    def seconds(self) -> float:
        return self.pull + self.release + self.sending + self.write_back + self.report

    def milliseconds_each(self) -> dict[str, float]:
        """Return milliseconds per refund of each part of the run."""
        parts = ("pull", "release", "sending", "write_back", "report")
        return {part: round(1000 * float(getattr(self, part)) / self.refunds, 4) for part in parts}


def measure(quick: bool, finished_refunds: int | None = None) -> list[Figure]:
    """
    Measure a run of 100,000 refunds beside runs of 10,000, and runs on a ledger of ten million beside runs on an empty one.

    :param quick: small runs, and 50,000 finished refunds.
    :param finished_refunds: how many refunds the large ledger holds.
    """
    count = finished_refunds if finished_refunds is not None else (_FINISHED_QUICK if quick else _FINISHED)
    with Stage() as stage:
        return [
            *_large_run(stage, *((500, 2_500) if quick else (10_000, 100_000))),
            *_large_ledger(stage, count, quick=quick),
        ]


def _large_run(stage: Stage, small: int, large: int) -> Iterator[Figure]:
    # Before and after the large one, so that a machine that slows down meanwhile is not taken for growth.
    runs = [
        _run(stage, name, count) for name, count in (("before", small), ("large", large), ("after", small))
    ]
    each = [run.seconds / run.refunds for run in runs]
    peaks = runs[1].over_airflow_mb
    detail = {f"{run.refunds} refunds, ms each": run.milliseconds_each() for run in runs[:2]}
    ratios = [each[1] / each[0], each[1] / each[2]]
    name = f"Run of {large:,} ÷ runs of {small:,}, time per refund"
    yield figure_of(
        name, "≤ 1.1 ×", ratios, "×", {**detail, "seconds": runs[1].seconds}, lambda ratio: ratio <= 1.1
    )
    memory = {"first": peaks[0], "last": peaks[-1], "lists": len(peaks)}
    yield figure_of(
        "Memory of a list's task over Airflow's",
        f"≤ {_OVER_AIRFLOW_MB} MB",
        peaks,
        "MB",
        memory,
        lambda _: max(peaks) <= _OVER_AIRFLOW_MB,
    )


def _run(stage: Stage, name: str, count: int) -> _Run:
    """Pay so many refunds from an empty ledger, in lists, each in a process of its own."""
    books = stage.new_books(name)
    # One for each ledger: a ledger belongs to one Payroc.
    with stage.payroc() as payroc, stage.product(books, payroc) as product:
        return _pay(stage, books, product, count, run_id=name)


def _pay(stage: Stage, books: Books, product: Product, count: int, run_id: str) -> _Run:
    stage.approve(books.source, count)
    prepared = product.released(run_id)
    if len(prepared["ids"]) != count:
        raise RuntimeError(f"{len(prepared['ids'])} refunds were released, not {count}.")
    sent = product.send(run_id, in_lists(prepared["ids"]))
    ended = product.ask("finish", run_id=run_id)
    if ended["totals"] != {"accepted": count} or ended["unfinished"]:
        raise RuntimeError(
            f"The run {run_id} did not pay all {count} refunds: {ended['totals']}, {ended['unfinished']}"
        )
    return _Run(
        count,
        prepared["pull"],
        prepared["release"],
        ended["write_back"],
        ended["report"],
        sent["seconds"],
        sent["over_airflow_mb"],
    )


def _large_ledger(stage: Stage, count: int, *, quick: bool) -> Iterator[Figure]:
    rounds, refunds = (3, 250) if quick else (7, 2_000)
    # A quarter of the memory, as is usual: the indexes of a large ledger belong there. A checkpoint after each gigabyte would write most
    # pages several times.
    stage.configure(shared_buffers=f"{psutil.virtual_memory().total // 4 // 2**20}MB", max_wal_size="8GB")
    empty, full = stage.new_books("empty"), stage.new_books("full")
    grown = grow(stage, full, count)
    yield from _beside(*_in_turns(stage, empty, full, rounds, refunds), count, grown)


def _in_turns(
    stage: Stage, empty: Books, full: Books, rounds: int, refunds: int
) -> tuple[list[_Run], list[_Run]]:
    """Run on one ledger and on the other in turns, so that what else the machine does meets both."""
    runs: dict[str, list[_Run]] = {"empty": [], "full": []}
    with ExitStack() as stack:
        products = {}
        for books in (empty, full):
            payroc = stack.enter_context(stage.payroc())
            products[books] = stack.enter_context(stage.product(books, payroc))
        # The first round only warms.
        for number in range(rounds + 1):
            for name, books in (("empty", empty), ("full", full)):
                run = _pay(stage, books, products[books], refunds, run_id=f"round-{number}")
                if number:
                    runs[name].append(run)
    return runs["empty"], runs["full"]


def _beside(
    empty: Sequence[_Run], full: Sequence[_Run], count: int, grown: dict[str, Any]
) -> Iterator[Figure]:
    told = {"ms_each_empty": _medians(empty), "ms_each_full": _medians(full)}
    for part, name in (("pull", "Pull"), ("sending", "Claim and record"), ("report", "Report")):
        ratios = [getattr(one, part) / getattr(other, part) for one, other in zip(full, empty, strict=True)]
        detail = {**told, **(grown if part == "pull" else {})}
        yield figure_of(
            f"{name} with {count:,} refunds ÷ empty ledger",
            "≤ 1.2 ×",
            ratios,
            "×",
            detail,
            lambda ratio: ratio <= 1.2,
        )


def grow(stage: Stage, books: Books, count: int) -> dict[str, Any]:
    """Fill a ledger with refunds that have ended, and return what it took and how large it is."""
    with stage.postgres.connect(books.ledger) as ledger:
        seconds = finished.fill(ledger, count)
        finished.warm(ledger)
        sizes = finished.sizes(ledger)
    total = sum(size for parts in sizes.values() for size in parts.values())
    return {"seconds_to_fill": seconds, "bytes_per_refund": round(total / count), "bytes": sizes}


def _medians(runs: Sequence[_Run]) -> dict[str, float]:
    found = [run.milliseconds_each() for run in runs]
    return {part: median(each[part] for each in found) for part in found[0]}
