"""
Group commit: what a worker asks of the ledger for several refunds at the same time shares a
transaction.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from include.refunds.ledger.database import LedgerUnavailable

Call = TypeVar("Call")
Answer = TypeVar("Answer")

MOST = 64
"""
Calls of one group at most: a transaction holds the locks of all their rows, and more of them hardly save
anything.
"""

FEWEST = 8
"""
Calls of the first group, twice as many in the next, and so on up to :data:`MOST`: all of a list come at once,
and the first of them go on while the others are being answered.
"""


GATHER_SECONDS = 0.01
"""
How long a call waits for others soon after calls have shared a transaction: those of a list come one by one,
and alone cost most.
"""

# What was shared this long ago was another list's.
_SOON_SECONDS = 0.1


class Grouped(Generic[Call, Answer]):
    """
    Calls about one refund each. Those that come while others are being answered are answered together after
    those.

    A call that comes alone, or after the answer to the one before, waits for nobody. A refund is in a group only
    once.

    :param answer: answers calls in one transaction, in their order: all of them, or it raises and has done
        nothing.
    :param gather_seconds: how long a call waits for others when a moment ago calls have shared a transaction.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Call]], Awaitable[Sequence[Answer]]],
        gather_seconds: float = GATHER_SECONDS,
    ) -> None:
        self._answer = answer
        self._gather_seconds = gather_seconds
        self._last_shared = -_SOON_SECONDS
        self._waiting: list[tuple[int, Call, asyncio.Future[Answer]]] = []
        self._at_work: asyncio.Task[None] | None = None
        self._most = FEWEST

    async def __call__(self, refund_id: int, call: Call) -> Answer:
        """
        Return the answer to a call.

        :param refund_id: the refund that the call is about.
        :raises LedgerUnavailable: the transaction failed, for all of its calls.
        :raises Exception: what the call raises when it is answered alone; it keeps no other call from its
            answer.
        """
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((refund_id, call, answered))
        if self._at_work is None:
            self._at_work = asyncio.create_task(self._work())
        return await answered

    async def _work(self) -> None:
        try:
            while self._waiting:
                if len(self._waiting) < MOST and time.monotonic() - self._last_shared < _SOON_SECONDS:
                    await asyncio.sleep(self._gather_seconds)
                group = self._next_group()
                await self._answer_together(group)
                if len(group) > 1:
                    self._last_shared = time.monotonic()
        finally:
            self._at_work = None

    def _next_group(self) -> list[tuple[Call, asyncio.Future[Answer]]]:
        group: dict[int, tuple[Call, asyncio.Future[Answer]]] = {}
        left = []
        for refund_id, call, answered in self._waiting:
            if refund_id in group or len(group) == self._most:
                left.append((refund_id, call, answered))
            else:
                group[refund_id] = call, answered
        self._waiting = left
        self._most = min(2 * self._most, MOST)
        return list(group.values())

    async def _answer_together(self, group: Sequence[tuple[Call, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._answer([call for call, _ in group])
        except Exception as error:  # noqa: BLE001 - handed to those who called
            if len(group) > 1 and not isinstance(error, LedgerUnavailable):
                # One of them can't be answered. Which one shows when each has a transaction of its own.
                for one in group:
                    await self._answer_together([one])
                return
            for _, answered in group:
                if not answered.done():
                    answered.set_exception(error)
            return
        for (_, answered), answer in zip(group, answers, strict=True):
            # Whoever called may have been cancelled meanwhile.
            if not answered.done():
                answered.set_result(answer)
