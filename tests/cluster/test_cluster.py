"""
A cluster loses a worker and its broker in the middle of a run of 500 refunds, and each is paid once.

CeleryExecutor with two workers and a real broker, Postgres for metadata, ledger and results, all started as docker-compose.yaml says
and driven over REST. Celery keeps a killed worker's tasks for it for a day; Airflow gives them up and hands them out anew. A broker that
comes back may hand out a task that is still at work. The ledger makes all of that harmless, and what a run does not finish the next one
does.

In lists of 10 a run takes a minute; with ``--long`` each refund is a task of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from sqlalchemy import text

from tests.cluster.cluster import DAG, Cluster
from tests.patience import eventually
from tests.refunds.conftest import World
from tests.scheduler.client import TaskInstance

pytestmark = pytest.mark.timeout(3600)

REFUNDS = 500
LIST = 10
# So many of the last ones are kept from being claimed until the broker is back.
KEPT = REFUNDS // 4
# The run and those that take up what it left.
RUNS = 4


def test_500_refunds_are_paid_once_though_a_worker_dies_one_is_added_and_the_broker_restarts(
    cluster: Cluster, world: World, long: bool, measured: Callable[..., None]
) -> None:
    refs = [world.approve() for _ in range(REFUNDS)]
    order_id = str(world.source_row(refs[0])["order_id"])
    # Payroc pays this one so long after it was asked that nobody is there any more to hear of it.
    cluster.sandbox.post(
        "/_sandbox/faults", {"operation": "create", "kind": "slow", "seconds": 3600, "orderId": order_id}
    )
    begin = time.monotonic()
    runs = [cluster.client.trigger(DAG, batch_size=1 if long else LIST)]

    eventually(
        lambda: not cluster.sandbox.get("/_sandbox/faults")["faults"],
        "Payroc receives the create",
        pause=0.05,
    )
    with kept_from_being_claimed(world, refs[-KEPT:]):
        task = task_of(cluster, world, refs[0])
        victim = cluster.worker_of(task)
        cluster.kill(victim)
        assert outcome_of_last_attempt(world, refs[0]) is None, (
            "the worker had ended the attempt before it was killed"
        )
        cluster.sandbox.delete(f"/_sandbox/faults?orderId={order_id}")
        killed_at = paid(cluster)

        added = cluster.add_worker()
        added_at = paid(cluster)
        eventually(lambda: paid(cluster) >= REFUNDS // 2, "half are paid")
        restarted_at = paid(cluster)
        cluster.restart_broker()
        assert cluster.client.run_state(DAG, runs[0]) == "running", (
            "the run had ended before the broker was restarted"
        )
        eventually(lambda: cluster.tasks_begun_by(added) > 0, "the worker that was added has work")

    states = [cluster.client.wait_for_run(DAG, runs[0], "success", "failed")]
    while world_states(world) != {"accepted": REFUNDS} and len(runs) < RUNS:
        runs.append(cluster.client.trigger(DAG, batch_size=LIST))
        states.append(cluster.client.wait_for_run(DAG, runs[-1], "success", "failed"))

    assert world_states(world) == {"accepted": REFUNDS}
    theirs = cluster.sandbox.get("/_sandbox/refunds")["refunds"]
    assert Counter(each["orderId"] for each in theirs) == Counter(
        str(row["order_id"]) for row in rows(world, "SELECT order_id FROM refund_requests")
    )
    ledger = "SELECT source_ref, order_id, amount, payroc_refund_id FROM refund_ledger.refunds"
    source = (
        "SELECT source_ref, order_id, amount, payroc_refund_id FROM refund_requests WHERE status = 'accepted'"
    )
    assert {tuple(row.values()) for row in rows(world, ledger)} == {
        tuple(row.values()) for row in rows(world, source)
    }
    assert {(row["order_id"], row["amount"], row["payroc_refund_id"]) for row in rows(world, ledger)} == {
        (each["orderId"], each["amount"], each["refundId"]) for each in theirs
    }
    # The killed worker's attempt was cut off, the worker that was added has worked.
    assert outcome_of_first_attempt(world, refs[0]) is None
    assert cluster.tasks_done_by(added) > 0
    creates = cluster.sandbox.get("/_sandbox/requests?operation=create")["requests"]
    measured(
        refunds=REFUNDS,
        refunds_per_task=1 if long else LIST,
        seconds=time.monotonic() - begin,
        paid_when_the_worker_was_killed=killed_at,
        paid_when_one_was_added=added_at,
        paid_when_the_broker_was_restarted=restarted_at,
        runs=" ".join(states),
        tasks_of_the_added_worker=cluster.tasks_done_by(added),
        creates=len(creates),
    )


@contextmanager
def kept_from_being_claimed(world: World, source_refs: Sequence[str]) -> Iterator[None]:
    """Lock refunds, so that those who come to them wait; a worker who waits for too long comes again."""
    query = """
        SELECT status FROM refund_ledger.refund_states JOIN refund_ledger.refund_instructions ON id = refund_id
        WHERE source_ref = ANY(:refs) ORDER BY refund_id FOR UPDATE OF refund_states"""
    with world.ledger_engine.begin() as connection:
        statuses = set(connection.execute(text(query), {"refs": list(source_refs)}).scalars())
        assert statuses == {"released"}, f"they had been claimed already: {statuses}"
        yield


def rows(world: World, query: str, **values: object) -> list[dict[str, object]]:
    with world.ledger_engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(query), values).mappings()]


def world_states(world: World) -> dict[str, int]:
    """Return how many refunds the ledger has, by state."""
    return {
        str(row["status"]): int(str(row["count"]))
        for row in rows(world, "SELECT status, count(*) FROM refund_ledger.refunds GROUP BY status")
    }


def paid(cluster: Cluster) -> int:
    """Return how many refunds exist at Payroc."""
    return int(cluster.sandbox.get("/_sandbox/health")["refunds"])


def attempts(world: World, source_ref: str) -> list[dict[str, object]]:
    return rows(
        world,
        "SELECT a.run_id, a.map_index, a.outcome FROM refund_ledger.refund_attempts AS a JOIN refund_ledger.refunds AS r "
        "ON r.id = a.refund_id WHERE r.source_ref = :ref ORDER BY a.attempt",
        ref=source_ref,
    )


def outcome_of_first_attempt(world: World, source_ref: str) -> object:
    return attempts(world, source_ref)[0]["outcome"]


def outcome_of_last_attempt(world: World, source_ref: str) -> object:
    return attempts(world, source_ref)[-1]["outcome"]


def task_of(cluster: Cluster, world: World, source_ref: str) -> TaskInstance:
    """Return the task instance that has claimed a refund last."""
    last = attempts(world, source_ref)[-1]
    return cluster.client.task_instances(DAG, str(last["run_id"]))["send_refund", int(str(last["map_index"]))]
