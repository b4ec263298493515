"""The books are checked at the end: what Payroc holds, what the ledger says, what passed on the line, what the source was told."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tests.processes.line import Line
from tests.processes.worker import Try
from tests.refunds.conftest import World


def check_books(world: World, line: Line, statuses: Mapping[str, str] | None = None) -> int:
    """
    Make sure that every refund of the ledger is paid exactly once and known to be, and nothing else is.

    :param statuses: final status by source_ref where it is another than ``accepted``.
    :returns: how many creates Payroc got.
    """
    payroc = defaultdict(list)
    for refund in world.sandbox.get("/_sandbox/refunds")["refunds"]:
        payroc[refund["orderId"]].append(refund)
    attempts: Counter[int] = Counter()
    for row in world.rows(
        "SELECT refund_id, count(*) AS n FROM refund_ledger.refund_attempts GROUP BY refund_id"
    ):
        attempts[row["refund_id"]] = row["n"]
    creates = defaultdict(list)
    for request in world.sandbox.get("/_sandbox/requests?operation=create")["requests"]:
        creates[request["orderId"]].append(request)
    passed = defaultdict(set)
    for post in line.posts:
        passed[post.order_id].add((post.key, post.body))
    source = _source(world)

    rows = world.rows("SELECT * FROM refund_ledger.refunds ORDER BY id")
    posts = 0
    assert set(payroc) == set(passed) == {row["order_id"] for row in rows}, (
        "Payroc holds other refunds than the ledger"
    )
    for row in rows:
        order_id, key = row["order_id"], str(row["idempotency_key"])
        expected = (statuses or {}).get(row["source_ref"], "accepted")
        assert len(payroc[order_id]) == 1, (
            f"{order_id} is paid {len(payroc[order_id])} times, the ledger says {row['status']}"
        )
        [held] = payroc[order_id]
        assert (row["status"], row["payroc_refund_id"]) == (expected, held["refundId"]), (
            f"{order_id}: {row['reason']}"
        )
        assert (held["amount"], held["currency"], held["idempotencyKey"]) == (
            row["amount"],
            row["currency"],
            key,
        )
        assert (held["processingTerminalId"], held["last4"]) == (
            row["processing_terminal_id"],
            row["payee_last4"],
        )
        assert {request["idempotencyKey"] for request in creates[order_id]} == {key}
        # One key and the same bytes in every POST, and no more POSTs than attempts that the ledger knew of before.
        assert len(passed[order_id]) == 1, f"{order_id} was sent with different bytes or keys"
        assert len(creates[order_id]) <= attempts[row["id"]], f"{order_id}: more POSTs than attempts"
        posts += len(creates[order_id])
        told = source.pop(row["source_ref"])
        assert (told["status"], told["payroc_refund_id"], told["amount"]) == (
            expected,
            held["refundId"],
            held["amount"],
        )
    assert not source, "approved refunds that the ledger does not have"
    assert not line.overlapping, "two POSTs at the same time under one key"
    return posts


@dataclass(frozen=True)
class Attempt:
    """
    An attempt by the records of both sides.

    :param recorded: the ledger has its outcome.
    :param accepted: Payroc has accepted, or replayed, what it sent.
    """

    run_id: str
    map_index: int
    number: int
    recorded: bool
    accepted: bool

    def is_of(self, this: Try) -> bool:
        """Tell whether a try of a task made this attempt."""
        return (self.run_id, self.map_index, self.number) == (this.run_id, this.map_index, this.number)


def attempts_of(world: World, refund_id: int) -> list[Attempt]:
    """Return the attempts of a refund, each with the creates of its time: there is never another attempt in it."""
    query = """
        SELECT run_id, map_index, try_number, outcome, started_at,
               lead(started_at) OVER (ORDER BY attempt) AS next_at
        FROM refund_ledger.refund_attempts WHERE refund_id = :id ORDER BY attempt"""
    requests = world.sandbox.get(
        f"/_sandbox/requests?operation=create&orderId={world.row(refund_id)['order_id']}"
    )["requests"]
    # Payroc's record cuts off below the millisecond.
    accepted_at = [
        datetime.fromisoformat(item["at"]) + timedelta(milliseconds=1)
        for item in requests
        if item["refundId"]
    ]
    found = []
    for row in world.rows(query, id=refund_id):
        accepted = any(
            row["started_at"] <= at and (row["next_at"] is None or at < row["next_at"]) for at in accepted_at
        )
        found.append(
            Attempt(row["run_id"], row["map_index"], row["try_number"], row["outcome"] is not None, accepted)
        )
    return found


def _source(world: World) -> dict[str, dict[str, Any]]:
    with world.source_engine.connect() as connection:
        return {
            row["source_ref"]: dict(row)
            for row in connection.exec_driver_sql("SELECT * FROM refund_requests").mappings()
        }
