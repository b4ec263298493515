"""Lists of refunds: sent side by side, with shared transactions, and each of them as safe as if it were alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from include.refunds.ledger import LedgerUnavailable, Task
from include.refunds.ledger.grouping import FEWEST, GATHER_SECONDS, Grouped
from include.refunds.send import Result, Sent, send_refunds
from include.refunds.settings import get_settings
from payroc_airflow.gateway import HookGateway
from payroc_airflow.hooks.payroc import PayrocHook
from tests.refunds.conftest import Intercepted, World

TASK = Task("run-1", 0, 1)


def send_list(world: World, refund_ids: Sequence[int], gateway: Any = None) -> list[Result]:
    return world.run(
        send_refunds(
            refund_ids,
            TASK,
            ledger=world.ledger,
            gateway=gateway or world.gateway,
            cipher=world.cipher,
            settings=world.settings,
        )
    )


def released(world: World, count: int) -> list[int]:
    for _ in range(count):
        world.approve()
    world.pull()
    return world.release()


class Turns(Intercepted):
    """The gateway with a number of turns, and twice as many places in its queue; it remembers how many had their turn at a time."""

    def __init__(self, gateway: Any, turns: int, **steps: Any) -> None:
        super().__init__(gateway, **steps)
        self.turns = asyncio.Semaphore(turns)
        self.places = asyncio.Semaphore(2 * turns)
        self.taken = self.most = 0

    @asynccontextmanager
    async def queue(self) -> AsyncIterator[None]:
        async with self.places:
            yield

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        async with self.turns:
            self.taken += 1
            self.most = max(self.most, self.taken)
            try:
                yield
            finally:
                self.taken -= 1


def test_the_refunds_of_a_list_are_sent_side_by_side_as_many_as_there_are_turns(world: World) -> None:
    refund_ids = released(world, 12)
    gateway = Turns(world.gateway, turns=5)
    results = send_list(world, refund_ids, gateway)
    assert [(result.refund_id, result.sent) for result in results] == [
        (item, Sent.ACCEPTED) for item in refund_ids
    ]
    assert gateway.most == 5
    assert all(world.paid(refund_id) == 1 for refund_id in refund_ids)


@pytest.fixture
def real_turns(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[HookGateway]:
    """The real gateway, with three turns."""
    monkeypatch.setenv("PAYROC_REFUNDS_REQUESTS_IN_FLIGHT", "3")
    get_settings.cache_clear()
    gateway = HookGateway(PayrocHook())
    yield gateway
    world.run(gateway.close())


# Of a list of twelve, three that Payroc has and three more in the queue; the other six are left alone until then.
CLAIMED_AHEAD = 6


class AnswersLater(Intercepted):
    """
    Payroc answers the first three only when nothing more is claimed.

    :param meanwhile: called then.
    """

    def __init__(self, gateway: Any, world: World, meanwhile: Callable[[], Any] | None = None) -> None:
        super().__init__(gateway)
        self.sent: list[str] = []
        self.claimed = 0
        self._world = world
        self._meanwhile = meanwhile
        self._answers = asyncio.Event()

    async def create_refund(self, token: Any, idempotency_key: str, body: bytes) -> Any:
        self.sent.append(idempotency_key)
        if len(self.sent) == 3:
            self.claimed = await self._all_claimed()
            if self._meanwhile is not None:
                await self._meanwhile()
            self._answers.set()
        await self._answers.wait()
        return await super().create_refund(token, idempotency_key, body)

    async def _all_claimed(self) -> int:
        counts = [0]
        # All that may be claimed are, and as many as before for a second: nobody claims any more.
        while counts[-1] < CLAIMED_AHEAD or len(counts) < 11 or counts[-1] != counts[-11]:
            await asyncio.sleep(0.1)
            counts.append(
                self._world.rows("SELECT count(*) AS n FROM refund_ledger.refunds WHERE status = 'sending'")[
                    0
                ]["n"]
            )
        return counts[-1]


def test_the_next_refunds_of_a_list_are_claimed_while_payroc_answers(
    world: World, real_turns: HookGateway
) -> None:
    refund_ids = released(world, 12)
    gateway = AnswersLater(real_turns, world)
    results = send_list(world, refund_ids, gateway)
    assert gateway.claimed == CLAIMED_AHEAD
    assert [result.sent for result in results] == [Sent.ACCEPTED] * 12
    assert [world.paid(refund_id) for refund_id in refund_ids] == [1] * 12


def test_a_pause_lets_none_of_those_out_that_were_claimed_ahead_and_leaves_them_released(
    world: World, real_turns: HookGateway
) -> None:
    refund_ids = released(world, 12)
    gateway = AnswersLater(
        real_turns, world, meanwhile=lambda: world.ledger.pauses.pause("*", "the bank called")
    )
    send_list(world, refund_ids, gateway)
    assert len(gateway.sent) == 3
    assert sum(world.paid(refund_id) for refund_id in refund_ids) == 3
    assert sorted(world.row(item)["status"] for item in refund_ids) == ["accepted"] * 3 + ["released"] * 9
    outcomes = world.rows("SELECT outcome FROM refund_ledger.refund_attempts ORDER BY outcome")
    assert [row["outcome"] for row in outcomes] == ["accepted"] * 3 + ["not_sent"] * 3


def test_what_a_list_writes_at_the_same_time_shares_a_transaction(world: World) -> None:
    refund_ids = released(world, 12)
    send_list(world, refund_ids)
    (shared,) = world.rows("""
        SELECT count(DISTINCT xmin::text) FILTER (WHERE to_status = 'sending') AS claims,
               count(DISTINCT xmin::text) FILTER (WHERE to_status = 'accepted') AS records, count(*) AS events
        FROM refund_ledger.refund_events WHERE to_status IN ('sending', 'accepted')""")
    assert shared["events"] == 24
    # The first claim does not wait for the others, so it goes alone.
    assert shared["claims"] <= 3
    assert shared["records"] < 12


def test_the_first_of_a_list_are_claimed_without_all_the_others(world: World) -> None:
    send_list(world, released(world, 40))
    claims = world.rows("""
        SELECT count(*) AS n FROM refund_ledger.refund_events WHERE to_status = 'sending'
        GROUP BY xmin::text ORDER BY min(id)""")
    assert [claims[0]["n"], sum(claim["n"] for claim in claims)] == [FEWEST, 40]


def test_only_one_of_two_claims_at_the_same_time_gets_the_refund(world: World) -> None:
    (refund_id,) = released(world, 1)

    async def twice() -> list[Any]:
        claim = {
            "environment": world.gateway.environment,
            "sent_with": world.gateway.sent_with,
            "token_seconds": 60,
        }
        return await asyncio.gather(*(world.ledger.claims.claim(refund_id, TASK, **claim) for _ in range(5)))

    assert [claim is not None for claim in world.run(twice())].count(True) == 1
    assert world.row(refund_id)["attempts"] == 1


def test_a_record_that_the_database_refuses_keeps_no_other_of_its_transaction_from_being_recorded(
    world: World,
) -> None:
    refund_ids = released(world, 8)
    arrived = asyncio.Event()
    answers: list[Any] = []

    class Confuses(Intercepted):
        """Answers come all at once, and two of them carry the same refund id of Payroc's."""

        async def create_refund(self, token: Any, idempotency_key: str, body: bytes) -> Any:
            answer = await self._gateway.create_refund(token, idempotency_key, body)
            answers.append(answer)
            if len(answers) == len(refund_ids):
                arrived.set()
            await arrived.wait()
            return (
                answer.model_copy(update={"refund_id": answers[0].refund_id})
                if answer is answers[1]
                else answer
            )

    results = send_list(world, refund_ids, Confuses(world.gateway))
    assert sorted(result.sent for result in results) == ["accepted"] * 7 + ["review"]
    (shared,) = world.rows(
        "SELECT count(DISTINCT payroc_refund_id) AS ids FROM refund_ledger.refunds WHERE status = 'accepted'"
    )
    assert shared["ids"] == 7


def test_when_a_shared_transaction_fails_none_of_its_refunds_is_sent(world: World) -> None:
    refund_ids = released(world, 6)
    claim = world.ledger.claims._claims._answer

    async def lost(calls: Any) -> Any:
        await claim(calls)
        raise LedgerUnavailable("The connection was lost at the commit.")

    world.ledger.claims._claims._answer = lost
    with pytest.raises(LedgerUnavailable):
        send_list(world, refund_ids)
    assert [world.paid(refund_id) for refund_id in refund_ids] == [0] * 6


def test_after_what_stops_all_no_further_refund_of_a_list_is_begun(world: World) -> None:
    refund_ids = released(world, 9)
    gateway = Turns(world.gateway, turns=2)
    world.run(world.ledger.pauses.pause("*", "the bank called"))
    results = send_list(world, refund_ids, gateway)
    # Those at most that had a place in the queue when the first one heard of it.
    assert 1 <= len(results) <= 4
    assert {result.sent for result in results} == {Sent.CONFIGURATION}
    assert [world.row(item)["status"] for item in refund_ids] == ["released"] * 9


def test_a_pause_in_the_middle_of_a_list_lets_only_those_out_that_have_passed_the_last_check(
    world: World,
) -> None:
    refund_ids = released(world, 10)
    sent: list[str] = []

    class PausesAtTheThird(Turns):
        async def create_refund(self, token: Any, idempotency_key: str, body: bytes) -> Any:
            sent.append(idempotency_key)
            if len(sent) == 3:
                await world.ledger.pauses.pause("*", "the bank called")
            return await self._gateway.create_refund(token, idempotency_key, body)

    send_list(world, refund_ids, PausesAtTheThird(world.gateway, turns=3))
    # Those two at most that had the other turns at that moment.
    assert 3 <= len(sent) <= 5
    assert sum(world.paid(refund_id) for refund_id in refund_ids) == len(sent)
    statuses = [world.row(item)["status"] for item in refund_ids]
    assert statuses.count("released") == 10 - len(sent)


# -- how long a call waits for others ------------------------------------------------------------------------


def gathered(
    monkeypatch: pytest.MonkeyPatch, calls: Callable[[Grouped[int, int]], Coroutine[Any, Any, Any]]
) -> int:
    """Return how often calls waited for others to share a transaction with."""
    waits = 0
    sleep = asyncio.sleep

    async def counted(seconds: float) -> None:
        nonlocal waits
        waits += seconds == GATHER_SECONDS
        await sleep(0)

    async def answer(group: Sequence[int]) -> Sequence[int]:
        await sleep(0)
        return group

    monkeypatch.setattr(asyncio, "sleep", counted)
    asyncio.run(calls(Grouped(answer)))
    return waits


def test_calls_that_come_one_after_the_other_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def one_by_one(grouped: Grouped[int, int]) -> None:
        for refund_id in range(50):
            await grouped(refund_id, refund_id)

    assert gathered(monkeypatch, one_by_one) == 0


def test_calls_of_a_list_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def side_by_side(grouped: Grouped[int, int]) -> None:
        await asyncio.gather(*(grouped(refund_id, refund_id) for refund_id in range(3 * FEWEST)))

    assert gathered(monkeypatch, side_by_side) > 0
