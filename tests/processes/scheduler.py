"""What Airflow does with send tasks: a process for each try, as many at a time as there are slots, retries as the policy says."""

from __future__ import annotations

import heapq
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.processes.worker import Ending, Try, work

# All workers are forked from one process that has imported everything, though nothing else: importing Airflow takes seconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.processes.worker"])

KILLED = Ending("killed", retried=True)

SignalNow = Callable[[Try], int | None]


@dataclass
class _Running:
    this: Try
    process: BaseProcess
    answer: Connection

    def signal(self, number: int) -> bool:
        """Send a signal, and tell whether the process was still there to get it."""
        if self.process.pid is None:
            return False
        try:
            os.kill(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True


class Scheduler:
    """
    Runs send tasks in processes of their own.

    :param slots: how many at a time, as the pool ``payroc_api`` limits them.
    :param log: file that gets what the workers print.
    :param retry_delay: seconds until a try that died, or failed with no word about when, is tried again.
    """

    def __init__(self, slots: int, log: Path, *, retry_delay: float = 1.0) -> None:
        self.slots = slots
        self.log = log
        self.retry_delay = retry_delay
        self._running: list[_Running] = []
        # Wait for the imports now, so that the first workers take no longer than the others.
        first = _processes.Process(target=int)
        first.start()
        first.join()

    def run(
        self,
        tries: Sequence[Try],
        *,
        retries: int = 5,
        signal_now: SignalNow = lambda _: None,
        dies_unreported: Callable[[Try], bool] = lambda _: False,
        on_death: Callable[[Try], None] = lambda _: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[tuple[Try, Ending]]:
        """
        Run send tasks until each has succeeded, failed for good or used up its retries.

        :param retries: how often a task is tried again.
        :param signal_now: asked again and again which signal the process of a try gets now; ``None`` for none.
        :param dies_unreported: whether a process is killed when it has done its work, before it can report.
        :param on_death: called when a process was killed before it had ended by itself.
        :param meanwhile: called again and again while workers run.
        :returns: every try with its ending, in the order in which they ended.
        """
        order = itertools.count()
        waiting = [(0.0, next(order), this) for this in tries]
        running = self._running
        ended: list[tuple[Try, Ending]] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.slots and waiting[0][0] <= time.monotonic():
                    running.append(self._start(heapq.heappop(waiting)[2], dies_unreported))
                for item in running:
                    number = signal_now(item.this)
                    if number is not None:
                        item.signal(number)
                meanwhile()
                wait([item.process.sentinel for item in running], timeout=0.01)
                for item in [item for item in running if item.process.exitcode is not None]:
                    running.remove(item)
                    ending = self._ending(item)
                    ended.append((item.this, ending))
                    if ending is KILLED:
                        on_death(item.this)
                    if ending.retried and item.this.number <= retries:
                        due = time.monotonic() + (self.retry_delay if ending.delay is None else ending.delay)
                        heapq.heappush(
                            waiting, (due, next(order), replace(item.this, number=item.this.number + 1))
                        )
        finally:
            for item in running:
                item.process.kill()
                item.process.join()
            running.clear()
        return ended

    def signal(self, run_id: str, map_index: int, number: int) -> bool:
        """
        Send a signal to the process of a task, from any thread.

        :returns: whether there was one.
        """
        return any(
            item.signal(number)
            for item in list(self._running)
            if (item.this.run_id, item.this.map_index) == (run_id, map_index)
        )

    def _start(self, this: Try, dies_unreported: Callable[[Try], bool]) -> _Running:
        answer, to_us = _processes.Pipe(duplex=False)
        arguments = (dict(os.environ), this, to_us, self.log, dies_unreported(this))
        process = _processes.Process(target=work, args=arguments, daemon=True)
        process.start()
        # Otherwise a worker that died would leave us waiting for its answer.
        to_us.close()
        return _Running(this, process, answer)

    def _ending(self, item: _Running) -> Ending:
        item.process.join()
        with item.answer:
            if item.process.exitcode == 0:
                ending: Ending = item.answer.recv()
                return ending
        if item.process.exitcode == -9:
            return KILLED
        raise AssertionError(
            f"worker of {item.this} ended with {item.process.exitcode}: {self.log.read_text()[-5000:]}"
        )
