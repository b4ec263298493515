"""Workers are killed at every stage of a refund, and at random moments: nothing is paid twice or lost."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from tests.processes.books import check_books
from tests.processes.conftest import bring_to_an_end, in_lists, open_run
from tests.processes.deaths import Death, Deaths
from tests.processes.line import Line
from tests.processes.scheduler import Scheduler
from tests.processes.worker import Try
from tests.refunds.conftest import World

# What Payroc does with refunds, by the ending of the account. Half are plain: accepted at their first create.
PLAIN = "4321"
ENDINGS = [PLAIN, "9001", PLAIN, "9003", PLAIN, "9004", PLAIN, "9005"]
ENDINGS += [PLAIN, "9006", PLAIN, "9009", PLAIN, "9010", PLAIN, "9011"]

# Plain refunds are answered late, so that random moments hit more than the start of a process.
LATE_SECONDS = 0.5

# How many refunds the tasks have, in turn, and how many turns a run has.
LISTS = (1, 4, 1)
TURNS = 5

# Of the tasks of a run, so many die at each stage. All others, and second tries, may die at a random moment.
# However the plain half of the refunds is dealt, it is in as many tasks as die when Payroc has accepted.
DEATHS = {Death.ACCEPTED: 4, Death.BEFORE_CLAIM: 2, Death.BEFORE_ACCEPTANCE: 2, Death.RECORDED: 2}

# By the plan two are enough; when nobody dies any more, something else is wrong.
MOST_RUNS = 6


@pytest.fixture
def timeout_seconds() -> float:
    """Long enough for the line to stop a worker whose create it has received."""
    return 5.0


@pytest.mark.timeout(1800)
def test_no_refund_is_paid_twice_or_lost_when_workers_are_killed_at_every_stage(
    world: World, line: Line, scheduler: Scheduler, figures: Callable[..., None], long: bool
) -> None:
    times = 10 if long else 1
    deaths = 20 * times
    goals = {death: number * times for death, number in DEATHS.items()} | {Death.ACCEPTED: 5 * times}
    per_run = TURNS * (5 if long else 1)
    began = time.monotonic()
    chance = random.Random()
    statuses: dict[str, str] = {}
    killed: list[Try] = []
    died: Counter[Death] = Counter()

    def are_enough() -> bool:
        return len(killed) >= deaths and all(died[death] >= number for death, number in goals.items())

    runs = refunds = 0
    while not are_enough() and runs < MOST_RUNS:
        runs += 1
        count = per_run * sum(LISTS)
        endings = [ENDINGS[number % len(ENDINGS)] for number in range(count)]
        for ending in chance.sample(endings, count):
            source_ref = world.approve(ending, amount=chance.randint(1, 1_000_000))
            if ending == "9001":
                statuses[source_ref] = "rejected"
        refunds += count
        tries = in_lists(f"run-{runs}", open_run(world, f"run-{runs}"), *LISTS)
        answer_late(world)
        with Deaths(world, line, scheduler, chance) as run:
            plan(world, run, tries, chance, per_run // TURNS)
            scheduler.run(
                tries, signal_now=run.signal_now, dies_unreported=run.dies_unreported, on_death=run.note
            )
        killed += run.killed
        died += run.died
    bring_to_an_end(world, scheduler)

    posts = check_books(world, line, statuses)
    assert len(killed) >= deaths
    assert any(len(this.refund_ids) > 1 for this in killed)
    assert {death: died[death] for death in goals if died[death] < goals[death]} == {}
    figures(
        "Workers killed at every stage",
        killed=len(killed),
        **{death.replace(" ", "_"): died[death] for death in Death},
        refunds=refunds,
        POSTs=posts,
        seconds=round(time.monotonic() - began),
    )


def answer_late(world: World) -> None:
    query = "SELECT order_id FROM refund_ledger.refunds WHERE payee_last4 = :plain AND status = 'released'"
    late = {"operation": "create", "kind": "slow", "when": "after", "seconds": LATE_SECONDS, "times": 100}
    for row in world.rows(query, plain=PLAIN):
        world.sandbox.post("/_sandbox/faults", {**late, "orderId": row["order_id"]})


def plan(world: World, run: Deaths, tries: Sequence[Try], chance: random.Random, times: int) -> None:
    """Plan so many times :data:`DEATHS` among the tries that have refunds which were never sent."""
    query = """
        SELECT id, CAST(idempotency_key AS text) AS key, payee_last4 = :plain AS plain
        FROM refund_ledger.refunds WHERE status = 'released' AND attempts = 0"""
    new = {row["id"]: row for row in world.rows(query, plain=PLAIN)}
    left = chance.sample(tries, len(tries))
    for death, number in DEATHS.items():
        keys_of = {
            this: {
                new[item]["key"]
                for item in this.refund_ids
                if item in new and (new[item]["plain"] or death is not Death.ACCEPTED)
            }
            for this in left
        }
        chosen = [this for this in left if keys_of[this]][: number * times]
        for this in chosen:
            run.plan(this, death, keys_of[this])
            left.remove(this)
