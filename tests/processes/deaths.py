"""Deaths of workers at moments that events decide, not seconds."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from enum import StrEnum

from sqlalchemy import Connection, text

from tests.processes.books import attempts_of
from tests.processes.line import Handler, Line
from tests.processes.scheduler import Scheduler
from tests.processes.worker import Try
from tests.refunds.conftest import World

# A task of a run; the planned death meets whichever of its tries comes so far first.
_Task = tuple[str, int]


# From before a worker has begun until after most have ended.
RANDOM_WITHIN_SECONDS = 1.0


class Death(StrEnum):
    """How far a worker had come with a refund when it was killed."""

    BEFORE_CLAIM = "before the claim"
    BEFORE_ACCEPTANCE = "between claim and acceptance"
    ACCEPTED = "after Payroc accepted"
    RECORDED = "after the record"


class Deaths:
    """
    Kills the workers of one run, some where a test plans it, the others at random moments, and notes how far
    they had come.

    Before the claim: locks on the refunds keep a worker at its claim. Between claim and acceptance, and after
    Payroc accepted: the line has received the create. It stops the worker first, so that no time-out ends
    meanwhile. After the record: the worker dies before it can report its outcome.

    :param chance: decides the random moments, and whether a create whose worker died before the acceptance is
        lost or comes to Payroc later.
    """

    def __init__(self, world: World, line: Line, scheduler: Scheduler, chance: random.Random) -> None:
        self.killed: list[Try] = []
        self.died: Counter[Death] = Counter()
        self._world = world
        self._line = line
        self._scheduler = scheduler
        self._chance = chance
        self._planned: dict[_Task, Death] = {}
        self._locks: dict[_Task, Connection] = {}
        self._task_of_key: dict[str, _Task] = {}
        self._noted: dict[_Task, threading.Event] = {}
        self._random_moments: dict[Try, float] = {}

    def __enter__(self) -> Deaths:
        self._line.fault = self._receive
        return self

    def __exit__(self, *_: object) -> None:
        self._line.fault = None
        for task in list(self._locks):
            self._unlock(task)

    def plan(self, this: Try, death: Death, keys: Collection[str]) -> None:
        """
        Plan the death of a try that has not begun.

        :param keys: idempotency keys of its refunds that were never sent; the first create is the moment.
        """
        task = _task(this)
        self._planned[task] = death
        self._noted[task] = threading.Event()
        if death is Death.BEFORE_CLAIM:
            self._locks[task] = lock = self._world.ledger_engine.connect()
            query = (
                "SELECT FROM refund_ledger.refund_states WHERE refund_id = ANY(:ids) "
                "ORDER BY refund_id FOR UPDATE"
            )
            lock.execute(text(query), {"ids": list(this.refund_ids)})
        elif death in (Death.BEFORE_ACCEPTANCE, Death.ACCEPTED):
            self._task_of_key |= dict.fromkeys(keys, task)

    def signal_now(self, this: Try) -> int | None:
        """Return SIGKILL when a worker has come to its moment, and the line does not see it."""
        task = _task(this)
        if task in self._planned:
            is_now = task in self._locks and bool(self._held(task))
        elif this.number > 2:
            # Later tries mostly wait for a lease: killing them, too, would only count idle deaths.
            is_now = False
        else:
            moment = time.monotonic() + self._chance.uniform(0, RANDOM_WITHIN_SECONDS)
            is_now = time.monotonic() >= self._random_moments.setdefault(this, moment)
        return signal.SIGKILL if is_now else None

    def dies_unreported(self, this: Try) -> bool:
        """Tell whether a worker dies when all is recorded."""
        return self._planned.get(_task(this)) is Death.RECORDED

    def note(self, this: Try) -> None:
        """Take note of a death, and let go what was held for it."""
        task = _task(this)
        self.killed.append(this)
        self.died.update(where_it_died(self._world, refund_id, this) for refund_id in this.refund_ids)
        if task in self._planned:
            del self._planned[task]
            self._noted[task].set()
            self._unlock(task)

    def _held(self, task: _Task) -> list[int]:
        holder = self._locks[task].execute(text("SELECT pg_backend_pid()")).scalar_one()
        query = "SELECT pid FROM pg_stat_activity WHERE :holder = ANY(pg_blocking_pids(pid))"
        return [row["pid"] for row in self._world.rows(query, holder=holder)]

    def _unlock(self, task: _Task) -> None:
        if task in self._locks:
            # The statement of a worker that is dead must not go on.
            for pid in self._held(task):
                self._world.rows("SELECT pg_terminate_backend(:pid)", pid=pid)
            self._locks.pop(task).close()

    def _receive(self, handler: Handler, answer: Callable[[], bytes | None]) -> None:
        task = self._task_of_key.pop(handler.headers.get("Idempotency-Key", ""), None)
        death = None if task is None else self._planned.get(task)
        if task is None or death is None or not self._scheduler.signal(*task, signal.SIGSTOP):
            handler.hand_on(answer())
            return
        if death is Death.ACCEPTED:
            answer()
        self._scheduler.signal(*task, signal.SIGKILL)
        if death is Death.BEFORE_ACCEPTANCE and self._chance.random() < 0.5:
            self._noted[task].wait()
            answer()


def where_it_died(world: World, refund_id: int, this: Try) -> Death:
    """Tell from the records how far a worker had come with a refund."""
    attempt = next((attempt for attempt in attempts_of(world, refund_id) if attempt.is_of(this)), None)
    if attempt is None:
        return Death.BEFORE_CLAIM
    if attempt.recorded:
        return Death.RECORDED
    return Death.ACCEPTED if attempt.accepted else Death.BEFORE_ACCEPTANCE


def _task(this: Try) -> _Task:
    return this.run_id, this.map_index
