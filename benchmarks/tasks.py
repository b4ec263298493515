"""What refunds cost under the scheduler, beside a mapped task that does nothing and a mapped ``HttpOperator`` in the same deployment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.deployment import CELERY, LOCAL, Cost, Deployment
from benchmarks.figure import Figure, figure_of
from benchmarks.stage import BATCH_SIZE

GOAL = 1.10

_ROUNDS, _TASKS, _TASKS_WITH_ONE_TOKEN = 3, 150, 1000
_IN_LISTS = 10_000
_QUICK_ROUNDS, _QUICK_TASKS = 2, 20


def measure(quick: bool) -> list[Figure]:
    """
    Measure, each round one after the other, so that what else the machine does hits all alike.

    :param quick: LocalExecutor alone, few tasks; for CI.
    """
    with Deployment(LOCAL) as deployment:
        if quick:
            return [*_against_empty(deployment, LOCAL, _QUICK_ROUNDS, _QUICK_TASKS), _tokens(deployment)]
        figures = [*_against_empty(deployment, LOCAL, _ROUNDS, _TASKS), *_http_operator(deployment)]
        deployment.forget_token()
        _refunds(deployment, _TASKS_WITH_ONE_TOKEN)
        figures.append(_tokens(deployment))
        deployment.use(CELERY)
        return [*figures, *_against_empty(deployment, CELERY, _ROUNDS, _TASKS)]


def _against_empty(deployment: Deployment, executor: str, rounds: int, tasks: int) -> list[Figure]:
    # The first tasks of a deployment find caches of Airflow and Postgres cold.
    _empty(deployment, 4)
    pairs = [(_refunds(deployment, tasks), _empty(deployment, tasks)) for _ in range(rounds)]
    return [
        _ratio(f"CPU per refund ÷ empty mapped task, {executor}", pairs, lambda cost: cost.cpu / cost.tasks),
        _ratio(
            f"wall time per refund ÷ empty mapped task, {executor}",
            pairs,
            lambda cost: cost.wall / cost.tasks,
        ),
        figure_of(
            f"CPU that Postgres adds per refund, {executor}",
            "told",
            [
                1000 * (refunds.database_cpu / refunds.tasks - empty.database_cpu / empty.tasks)
                for refunds, empty in pairs
            ],
            "ms",
            {},
        ),
    ]


def _ratio(name: str, pairs: Sequence[tuple[Cost, Cost]], per_task: Callable[[Cost], float]) -> Figure:
    detail = {
        "seconds per refund": median(per_task(refunds) for refunds, _ in pairs),
        "seconds per empty task": median(per_task(empty) for _, empty in pairs),
        "refunds": [asdict(refunds) for refunds, _ in pairs],
        "empty tasks": [asdict(empty) for _, empty in pairs],
    }
    ratios = [per_task(refunds) / per_task(empty) for refunds, empty in pairs]
    return figure_of(name, f"≤ {GOAL:.2f} ×", ratios, "×", detail, lambda value: value <= GOAL)


def _http_operator(deployment: Deployment) -> list[Figure]:
    """Measure whole runs, from the start of the first task to the end of the last one: the usual way, and lists beside it."""
    lists, usual, ratios, costs = [], [], [], []
    for _ in range(_ROUNDS):
        deployment.approve(_TASKS)
        cost = deployment.measure("http_operator", "send", "read")
        usual.append(cost.tasks / deployment.seconds_of("http_operator"))
        empty = _empty(deployment, _TASKS)
        ratios.append(cost.cpu / cost.tasks / (empty.cpu / empty.tasks))
        costs.append(asdict(cost))
        _refunds(deployment, _IN_LISTS, batch_size=BATCH_SIZE)
        lists.append(_IN_LISTS / deployment.seconds_of("payroc_refunds"))
    times = [one / other for one, other in zip(lists, usual, strict=True)]
    detail = {
        "in lists, 1/s": lists,
        "by the usual way, 1/s": usual,
        "refunds in lists": _IN_LISTS,
        "refunds by the usual way": _TASKS,
    }
    name = "run in lists ÷ run of mapped HttpOperators, refunds per second"
    return [
        figure_of(name, "≥ 30 ×", times, "×", detail, lambda ratio: ratio >= 30),
        figure_of(
            f"CPU per HttpOperator ÷ empty mapped task, {LOCAL}", "told", ratios, "×", {"tasks": costs}
        ),
    ]


def _tokens(deployment: Deployment) -> Figure:
    detail = {"refunds": deployment.accepted()}
    tokens = float(deployment.tokens_issued())
    return figure_of(
        "token requests of one worker host, tasks of one refund",
        "≤ 1",
        [tokens],
        "",
        detail,
        lambda value: value <= 1,
    )


def _refunds(deployment: Deployment, number: int, **params: Any) -> Cost:
    before = deployment.accepted()
    deployment.approve(number)
    cost = deployment.measure("payroc_refunds", "send_refund", "release", **params)
    if (accepted := deployment.accepted() - before) != number:
        raise RuntimeError(f"{accepted} of {number} refunds were accepted: what they cost says nothing")
    return cost


def _empty(deployment: Deployment, number: int) -> Cost:
    return deployment.measure("empty_task", "empty", "numbers", count=number)


if __name__ == "__main__":
    print(
        json.dumps(
            [asdict(figure) for figure in measure("--quick" in sys.argv)], indent=1, ensure_ascii=False
        )
    )
