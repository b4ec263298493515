"""
Runs, tasks, retries, clears and marks, as Airflow delivers them: each task at least once, now and then twice at a time.

What the DAGs do in each task is said here in the same words, with the same functions of ``include/refunds``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from include.payroc.errors import PayrocError
from include.refunds.case import DecisionRefused
from include.refunds.cipher import Cipher
from include.refunds.follow_up import follow_up
from include.refunds.ledger import LedgerError, LedgerUnavailable, Selection, Task
from include.refunds.pull import pull
from include.refunds.release import PreflightFailed, PreflightRefused, release
from include.refunds.send import Result, Sent, send_refunds
from include.refunds.settings import Settings
from include.refunds.source import SourceError
from include.refunds.write_back import write_back
from tests.simulation.engine import MINUTE, Actor, Engine, Mistake
from tests.simulation.merchant import SimulatedSource
from tests.simulation.payroc import Host, Payroc, SimulatedGateway
from tests.simulation.worker import SteppedLedger

# Airflow takes a task for dead when its heartbeat is missing for so long, and starts it again beside the one that stands still.
HEARTBEAT_TIMEOUT = 5 * MINUTE


_FINANCE = ("carl", "dora")
_REJECTED = "rejected"


class NobodyApproved(Exception):
    """Nobody answered in time: the task fails, and is not tried again."""


# How a task may fail; anything else is a mistake in the code.
_EXPECTED: tuple[type[Exception], ...] = (
    LedgerError,
    SourceError,
    PayrocError,
    PreflightFailed,
    DecisionRefused,
    NobodyApproved,
)


class FollowUpFailed(PayrocError):
    """A list or a look-up failed, so the task fails and is tried again."""


@dataclass(slots=True)
class Deployment:
    """What the tasks of a deployment work with."""

    engine: Engine
    ledger: SteppedLedger
    payroc: Payroc
    host: Host
    source: SimulatedSource
    cipher: Cipher
    settings: Settings

    def connect(self) -> SimulatedGateway:
        """Return a new task's way to Payroc."""
        return SimulatedGateway(self.payroc, self.host)


class TaskInstance:
    """
    One task of one run: started, retried, cleared, marked.

    :param name: how the history calls it.
    :param work: makes a new coroutine for each try, given its number.
    :param then: called once with what the task returned, or ``None`` when it failed or was marked a success.
    """

    __slots__ = ("_airflow", "_downstream", "_then", "actor", "name", "tries", "tries_left", "work")

    def __init__(
        self,
        airflow: Airflow,
        name: str,
        work: Callable[[int], Coroutine[Any, Any, Any]],
        then: Callable[[Any], None] | None,
    ) -> None:
        self._airflow = airflow
        self.name = name
        self.work = work
        self._then = self._downstream = then
        self.tries = 0
        self.tries_left = airflow.deployment.settings.retries
        self.actor: Actor | None = None

    def start(self) -> None:
        """Start the next try."""
        self.tries += 1
        self.actor = self._airflow.deployment.engine.start(
            f"{self.name} try {self.tries}", self.work(self.tries), self._ended
        )

    def clear(self, *, downstream: bool = False) -> None:
        """
        A person clears it, whatever its state: it runs again, with fresh retries. A running try is ended first, or only nearly so.

        :param downstream: what comes after it runs again, too.
        """
        if downstream:
            self._then = self._downstream
        self.tries_left = self._airflow.deployment.settings.retries
        if self.actor is not None and self.actor.running:
            if self._airflow.deployment.engine.chance() < 0.5:
                self._let_go(self.actor)
            else:
                self.actor.ended = None
                self._airflow.deployment.engine.kill(self.actor)
        self.start()

    def mark_success(self) -> None:
        """A person marks it a success: what it runs is ended, and the run goes on without its result."""
        if self.actor is not None and self.actor.running:
            self.actor.ended = None
            self._airflow.deployment.engine.kill(self.actor)
        self._finish(None)

    def lose_heartbeat(self) -> None:
        """Airflow takes a try that stands still for dead and starts another beside it."""
        if self.actor is not None and self.actor.running and self.tries_left > 0:
            self._let_go(self.actor)
            self.tries_left -= 1
            self.start()

    def _let_go(self, actor: Actor) -> None:
        # It goes on, and nobody hears what becomes of it.
        actor.ended = None

    def _ended(self, actor: Actor) -> None:
        if actor.error is not None and not isinstance(actor.error, _EXPECTED):
            raise Mistake(
                f"{actor.name} fails in a way that nobody foresaw: {actor.error!r}"
            ) from actor.error
        wait = self._airflow.retry_after(actor)
        if actor.error is None and actor.result is not None and wait is None:
            self._finish(actor.result)
        elif wait is not None and self.tries_left > 0:
            self.tries_left -= 1
            self._airflow.deployment.engine.after(wait, self._retry)
        else:
            self._finish(None)

    def _retry(self) -> None:
        if self.actor is None or not self.actor.running:
            self.start()

    def _finish(self, result: Any) -> None:
        # Downstream tasks start once; what a cleared task returns later starts them again only when they are cleared too.
        then, self._then = self._then, None
        if then is not None:
            then(result)


class Airflow:
    """
    The scheduler.

    :param deployment: what its tasks work with.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.tasks: list[TaskInstance] = []
        self.runs = 0
        # From here on nobody does anything odd.
        self.calm = False
        # How often a person marks a task a success before it has started.
        self.skips = 0.0

    def run(self, selection: Selection | None = None, batch_size: int = 1) -> None:
        """Start a run of ``payroc_refunds``."""
        self.runs += 1
        Run(self, f"run-{self.runs}", selection or Selection(), batch_size).pull()

    def follow_up(self) -> None:
        """Start a run of ``payroc_refunds_followup``."""
        self.runs += 1
        name = f"followup-{self.runs}"
        self._task(f"{name} follow_up", lambda _: self._follow_up(), lambda _: self._write_back(name))

    def write_back(self) -> None:
        """Start a write-back by itself."""
        self._write_back("alone")

    def _write_back(self, name: str) -> None:
        self._task(f"{name} write_back", lambda _: self._written_back(), None)

    def _task(
        self, name: str, work: Callable[[int], Coroutine[Any, Any, Any]], then: Callable[[Any], None] | None
    ) -> TaskInstance:
        task = TaskInstance(self, name, work, then)
        self.tasks.append(task)
        if self.skips and self.deployment.engine.chance() < self.skips:
            self.deployment.engine.tell(f"{name} is marked a success before it starts")
            task.mark_success()
        else:
            task.start()
        return task

    def retry_after(self, actor: Actor) -> float | None:
        """Return after how many seconds a try that has ended is tried again, or ``None``: the retry policy, in short."""
        error, result = actor.error, actor.result
        delay = float(self.deployment.settings.retry_delay_seconds)
        if error is None:
            if result is None:
                return delay  # killed
            if isinstance(result, list) and result and isinstance(result[0], Result):
                return _wait_of(result)
            return None
        if isinstance(error, PreflightRefused | DecisionRefused | NobodyApproved) or (
            isinstance(error, LedgerError) and not isinstance(error, LedgerUnavailable)
        ):
            return None
        return delay

    async def _follow_up(self) -> bool:
        d = self.deployment
        found = await follow_up(d.ledger, d.connect(), d.settings)
        if found.counts["failed"]:
            raise FollowUpFailed("list refunds", "lists failed")
        return True

    async def _written_back(self) -> bool:
        d = self.deployment
        (await write_back(d.source, d.ledger.write_backs)).raise_trouble()
        return True


class Run:
    """One run of ``payroc_refunds``, task after task."""

    def __init__(self, airflow: Airflow, run_id: str, selection: Selection, batch_size: int) -> None:
        self.airflow = airflow
        self.d = airflow.deployment
        self.run_id = run_id
        self.selection = selection
        self.batch_size = batch_size
        self.waiting_for = 0
        # What pull_approved handed on last: a pull that is cleared hands on anew.
        self.pulled: tuple[list[int], list[int]] | None = None
        self.triggered_by = None if airflow.calm else airflow.deployment.engine.rng.choice((None, *_FINANCE))

    def pull(self) -> None:
        self.airflow._task(f"{self.run_id} pull_approved", lambda _: self._pull(), lambda _: self.approve())

    def approve(self) -> None:
        self.airflow._task(f"{self.run_id} approve_run", lambda _: self._approve(), self._answered)

    def _answered(self, answer: Any) -> None:
        # When it was rejected, release is skipped; now and then a person clears it all the same.
        if answer == _REJECTED and self.d.engine.chance() < 0.7:
            self.write_back()
        else:
            self.release()

    def release(self) -> None:
        if self.pulled is None:
            self.write_back()
            return
        self.airflow._task(f"{self.run_id} release", lambda _: self._release(*self.pulled), self.send)

    def send(self, ids: Any) -> None:
        lists = (
            [ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)]
            if ids
            else []
        )
        self.waiting_for = len(lists)
        if not lists:
            self.write_back()
        for index, refund_ids in enumerate(lists):
            self.airflow._task(
                f"{self.run_id} send[{index}]", self._sending(index, refund_ids), lambda _: self._one_sent()
            )

    def write_back(self) -> None:
        self.airflow._task(f"{self.run_id} write_back", lambda _: self.airflow._written_back(), None)

    def _one_sent(self) -> None:
        self.waiting_for -= 1
        if self.waiting_for == 0:
            self.write_back()

    async def _pull(self) -> tuple[list[int], list[int]]:
        d = self.d
        await d.ledger.runs.return_stale_releases()
        pulled = await pull(d.source, d.ledger, d.cipher, d.settings)
        candidates = await d.ledger.runs.candidates(self.selection, standing=pulled.standing)
        await d.ledger.runs.begin_run(self.run_id, {}, candidates, {}, pulled.at)
        self.pulled = [item.id for item in candidates], await d.ledger.runs.due()
        return self.pulled

    async def _approve(self) -> str:
        d = self.d
        question = await d.ledger.approvals.ask_approval(self.run_id)
        if question is None:
            return "approved"
        await d.engine.sleep(d.engine.rng.choice((MINUTE, 30 * MINUTE)))
        answer = d.engine.rng.choice(("approved", "approved", "approved", _REJECTED, "nothing"))
        if self.airflow.calm:
            answer = "approved"
        if answer == "nothing":
            raise NobodyApproved
        who = d.engine.rng.choice(_FINANCE)
        if answer == _REJECTED:
            await d.ledger.approvals.record_rejection(self.run_id, by=who)
        else:
            await d.ledger.approvals.record_approval(self.run_id, by=who, triggered_by=self.triggered_by)
        return answer

    async def _release(self, candidates: list[int], due: list[int]) -> list[int]:
        d = self.d
        return await release(
            self.run_id,
            candidates,
            due,
            source=d.source,
            ledger=d.ledger,
            gateway=d.connect(),
            cipher=d.cipher,
            settings=d.settings,
        )

    def _sending(
        self, index: int, refund_ids: Sequence[int]
    ) -> Callable[[int], Coroutine[Any, Any, list[Result]]]:
        d = self.d
        return lambda number: send_refunds(
            refund_ids,
            Task(self.run_id, index, number),
            ledger=d.ledger,
            gateway=d.connect(),
            cipher=d.cipher,
            settings=d.settings,
            together=d.engine.together,
        )


def _wait_of(results: Sequence[Result]) -> float | None:
    if any(result.sent is Sent.CONFIGURATION for result in results):
        return None
    waits = [result.retry_after for result in results if result.sent in (Sent.UNKNOWN, Sent.BUSY)]
    # What the operator asks for, and the second that the retry policy adds.
    return min(waits) + 1 if waits else None
