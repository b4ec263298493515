"""Workers are killed by SIGKILL at random moments, many of them after Payroc accepted: nothing is paid twice, nothing is lost."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest

from tests.processes.books import attempts_of, check_books
from tests.processes.conftest import bring_to_an_end, in_lists, open_run
from tests.processes.line import Line
from tests.processes.scheduler import Scheduler
from tests.processes.worker import Try
from tests.refunds.conftest import World

# What Payroc does with them, by the ending of the account. The plain ones are answered late, so that many workers die after
# Payroc accepted and before they know it.
ENDINGS = ["4321"] * 8 + ["9001", "9003", "9004", "9005", "9006", "9009", "9010", "9011"]
LATE_SECONDS = 0.5

# From before a worker has begun until after most have ended.
KILLED_WITHIN_SECONDS = 1.0

# How many refunds the tasks have, in turn.
LISTS = (1, 4, 1)

# One or two are enough; when nobody dies any more, something else is wrong.
MOST_RUNS = 6


@pytest.mark.timeout(1800)
def test_no_refund_is_paid_twice_or_lost_when_workers_are_killed_at_random_moments(
    world: World, line: Line, scheduler: Scheduler, figures: Callable[..., None], long: bool
) -> None:
    deaths, accepted, refunds_per_run = (200, 50, 150) if long else (20, 5, 30)
    began = time.monotonic()
    chance = random.Random()
    statuses: dict[str, str] = {}
    killed: list[Try] = []
    died: Counter[str] = Counter()

    def moment_of_death(this: Try) -> float | None:
        enough = len(killed) >= deaths and died["after Payroc accepted"] >= accepted
        # The third try and later ones mostly wait for a lease: to kill them too would only fill the count with idle deaths.
        return None if enough or this.number > 2 else chance.uniform(0, KILLED_WITHIN_SECONDS)

    def note(this: Try) -> None:
        killed.append(this)
        died.update(where_it_died(world, refund_id, this) for refund_id in this.refund_ids)

    runs = 0
    while (len(killed) < deaths or died["after Payroc accepted"] < accepted) and runs < MOST_RUNS:
        runs += 1
        for _ in range(refunds_per_run):
            ending = chance.choice(ENDINGS)
            source_ref = world.approve(ending, amount=chance.randint(1, 1_000_000))
            if ending == "9001":
                statuses[source_ref] = "rejected"
        refund_ids = open_run(world, f"run-{runs}")
        for row in world.rows(
            "SELECT order_id FROM refund_ledger.refunds WHERE payee_last4 = '4321' AND status = 'released'"
        ):
            late = {
                "operation": "create",
                "kind": "slow",
                "when": "after",
                "seconds": LATE_SECONDS,
                "times": 100,
            }
            world.sandbox.post("/_sandbox/faults", {**late, "orderId": row["order_id"]})
        scheduler.run(in_lists(f"run-{runs}", refund_ids, *LISTS), kill_after=moment_of_death, on_death=note)
    bring_to_an_end(world, scheduler)

    posts = check_books(world, line, statuses)
    assert len(killed) >= deaths
    assert any(len(this.refund_ids) > 1 for this in killed)
    assert died["after Payroc accepted"] >= accepted
    figures(
        "Workers killed at random moments",
        killed=len(killed),
        **{what.replace(" ", "_"): died[what] for what in sorted(died)},
        refunds=runs * refunds_per_run,
        POSTs=posts,
        seconds=round(time.monotonic() - began),
    )


def where_it_died(world: World, refund_id: int, this: Try) -> str:
    """Tell from the records how far a worker came with a refund that is dead now."""
    attempt = next((attempt for attempt in attempts_of(world, refund_id) if attempt.is_of(this)), None)
    if attempt is None:
        return "before the claim"
    if attempt.recorded:
        return "after the record"
    return "after Payroc accepted" if attempt.accepted else "between claim and acceptance"
