"""The clock, the actors, and what may happen to them at each point."""

from __future__ import annotations

import heapq
import random
import types
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

# A Monday, 07:00 in New York.
EPOCH = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)

MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0

# How long a worker may stand still: a slow network, a paused machine, a laptop lid, a snapshot that is started again.
FREEZES = (3.0, 40.0, 100.0, 5 * MINUTE, 20 * MINUTE, 55 * MINUTE, 65 * MINUTE, 75 * MINUTE, 2 * HOUR, 26 * HOUR, 8 * DAY)

# Between two steps of a worker: mostly milliseconds, sometimes seconds.
_STEPS = (0.001, 0.002, 0.004, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 2.5)

# A history that goes on for longer than this does not end.
MOST_STEPS = 60_000


class Violation(AssertionError):
    """An invariant does not hold; the message says which, and for which refund."""


class Mistake(Violation):
    """The code failed in a way that nobody foresaw."""


@dataclass(slots=True)
class Trouble:
    """
    How likely each kind of trouble is at one point of one worker.

    :param die: the process is killed.
    :param fail: the database or the network fails: the call raises, with or without having had its effect.
    :param freeze: the process stands still for a while.
    :param critical: how many times likelier all of it is at the points of ``where``.
    """

    die: float = 0.0
    fail: float = 0.0
    freeze: float = 0.0
    critical: float = 1.0
    where: frozenset[str] = frozenset()
    total: float = 0.0

    def __post_init__(self) -> None:
        self.total = (self.die + self.fail + self.freeze) * self.critical


# Where it hurts most: between claim, POST and record, and inside a write-back.
AROUND_THE_POST = frozenset(
    {
        "ledger: after claim",
        "ledger: before may_post",
        "ledger: after may_post",
        "payroc: about to POST",
        "payroc: answered",
        "ledger: before record",
    }
)
AT_THE_DOOR = frozenset({"ledger: after candidates", "source: select", "ledger: after stored", "ledger: before release"})
IN_A_WRITE_BACK = frozenset({"ledger: after due_write_backs", "source: write back", "source: written back"})


class Actor:
    """
    A running process: one coroutine of production code, and what became of it.

    :param name: how the history calls it.
    :param ended: called with the actor when it has returned, raised or been killed.
    """

    __slots__ = ("attempt", "coroutine", "ended", "error", "looked_at", "name", "result", "running", "seen_source", "sleeping")

    def __init__(self, name: str, coroutine: Coroutine[Any, Any, Any], ended: Callable[[Actor], None] | None) -> None:
        self.name = name
        self.coroutine = coroutine
        self.ended = ended
        self.running = True
        self.sleeping = 0
        self.result: Any = None
        self.error: Exception | None = None
        # What it claimed last, and what it read last from the source: what the invariants hold its acts against.
        self.attempt: tuple[int, int] | None = None
        self.seen_source: dict[str, Any] | None = None
        # When it last looked at the ledger.
        self.looked_at = -1.0


class Engine:
    """
    Runs actors in simulated time. Everything random comes from one generator.

    :param rng: the history's only source of chance.
    :param tell: gets each step as a line, when somebody wants to read the history.
    """

    def __init__(self, rng: random.Random, tell: Callable[[str], None] | None = None) -> None:
        self.rng = rng
        self.chance = rng.random
        self.time = 0.0
        self.ledger_skew = 0.0
        # The ledger's clock as it was last read: it is read several times at the same moment.
        self._ledger_seconds, self._ledger_time = 0.0, EPOCH
        self.host_skew = 0.0
        self.trouble = Trouble()
        self.current: Actor | None = None
        self.failure: Callable[[str], Exception] = RuntimeError
        self.steps = 0
        self.deaths = 0
        self.freezes = 0
        self.failures = 0
        self._tell = tell
        # What is due, and for the next step of an actor the ticket that says whether it still is.
        self._queue: list[tuple[float, int, Callable[[], None] | Actor, int]] = []
        self._number = 0
        self.actors: list[Actor] = []
        # Asked instead of chance, when every point is to be tried in turn: "die", "fail", "freeze" and for how many seconds.
        self.script: Callable[[Actor, str], str | None] | None = None
        # Told when an actor begins to stand still, and for how long.
        self.on_freeze: Callable[[Actor, float], None] | None = None

    # -- time ----------------------------------------------------------------------------------------------------

    def ledger_time(self) -> datetime:
        """The clock of the ledger's database."""
        seconds = self.time + self.ledger_skew
        if seconds != self._ledger_seconds:
            self._ledger_seconds, self._ledger_time = seconds, EPOCH + timedelta(seconds=seconds)
        return self._ledger_time

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Have something happen later, whoever is alive then."""
        self._number += 1
        heapq.heappush(self._queue, (self.time + seconds, self._number, act, 0))

    def run(self, until: float | None = None) -> None:
        """Let time pass until nothing is left to happen, or up to an instant."""
        queue = self._queue
        last = float("inf") if until is None else until
        while queue and queue[0][0] <= last:
            self._next()
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise Violation(f"The history does not end: {MOST_STEPS} steps at {self.when()}.")
        if until is not None and until > self.time:
            self.time = until

    def take(self, steps: int) -> None:
        """Let so many things happen."""
        while self._queue and steps:
            self._next()
            steps -= 1

    def _next(self) -> None:
        self.time, _, act, ticket = heapq.heappop(self._queue)
        if isinstance(act, Actor):
            self._step(act, ticket)
        else:
            act()

    def when(self) -> str:
        """Return the simulated time as a person reads it."""
        days, rest = divmod(self.time, DAY)
        return f"day {int(days)} {EPOCH + timedelta(seconds=rest):%H:%M:%S.%f}"[:-3]

    @property
    def telling(self) -> bool:
        """Whether somebody reads the history."""
        return self._tell is not None

    def tell(self, what: str) -> None:
        """Add a line to the history."""
        if self._tell is not None:
            who = f"{self.current.name:<22}" if self.current is not None else " " * 22
            self._tell(f"{self.when()}  {who} {what}")

    # -- actors --------------------------------------------------------------------------------------------------

    def start(self, name: str, coroutine: Coroutine[Any, Any, Any], ended: Callable[[Actor], None] | None = None) -> Actor:
        """Start a process; it takes its first step now."""
        actor = Actor(name, coroutine, ended)
        self.actors.append(actor)
        self._wake(actor, 0.0)
        return actor

    @types.coroutine
    def point(self, label: str) -> Generator[str, None, None]:
        """A point at which something may happen to the current actor."""
        yield label

    @types.coroutine
    def sleep(self, seconds: float) -> Generator[float, None, None]:
        """Let time pass for the current actor, with nothing else happening to it."""
        yield seconds

    def kill(self, actor: Actor) -> None:
        """Kill a process: none of its code runs any more."""
        if not actor.running:
            return
        self.deaths += 1
        self.tell(f"☠ {actor.name} is killed")
        actor.running = False
        actor.coroutine.close()
        self._end(actor)

    def freeze(self, actor: Actor, seconds: float) -> None:
        """Make a process stand still from its present point on."""
        self.freezes += 1
        self.tell(f"❄ {actor.name} stands still for {seconds:.0f} s")
        self._wake(actor, seconds)
        if self.on_freeze is not None:
            self.on_freeze(actor, seconds)

    def _wake(self, actor: Actor, seconds: float) -> None:
        actor.sleeping += 1
        self._number += 1
        heapq.heappush(self._queue, (self.time + seconds, self._number, actor, actor.sleeping))

    def _step(self, actor: Actor, ticket: int, error: Exception | None = None) -> None:
        if not actor.running or ticket != actor.sleeping:
            return
        self.current = actor
        try:
            request = actor.coroutine.send(None) if error is None else actor.coroutine.throw(error)
        except StopIteration as stop:
            actor.running, actor.result = False, stop.value
        except Violation:
            raise
        except Exception as raised:  # noqa: BLE001 - whoever started the actor judges it
            actor.running, actor.error = False, raised
        if not actor.running:
            self._end(actor)
        elif isinstance(request, str):
            self._at_point(actor, request)
        else:
            self._wake(actor, request)
        self.current = None

    def _at_point(self, actor: Actor, label: str) -> None:
        trouble = self.trouble
        if self.script is not None:
            what = self.script(actor, label)
        else:
            drawn = self.chance()
            if drawn < trouble.total and label in trouble.where:
                drawn /= trouble.critical
            if drawn >= trouble.die + trouble.fail + trouble.freeze:
                # The way of nearly every step, so it is written out.
                actor.sleeping += 1
                self._number += 1
                heapq.heappush(self._queue, (self.time + _STEPS[int(self.chance() * 10)], self._number, actor, actor.sleeping))
                return
            what = "die" if drawn < trouble.die else "fail" if drawn < trouble.die + trouble.fail else "freeze"
        if what == "die":
            self.tell(f"  {label}")
            self.kill(actor)
        elif what == "fail":
            self.tell(f"  {label} ⚡ fails")
            self.failures += 1
            actor.sleeping += 1
            ticket, error = actor.sleeping, self.failure(label)
            self.after(0.0, lambda: self._step(actor, ticket, error))
        elif what is not None and what.startswith("freeze"):
            self.freeze(actor, float(what.removeprefix("freeze") or self.rng.choice(FREEZES)))
        else:
            self._wake(actor, 0.001)

    def _end(self, actor: Actor) -> None:
        if actor in self.actors:
            self.actors.remove(actor)
        if actor.ended is not None:
            actor.ended(actor)
