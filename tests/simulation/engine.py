"""The clock, the actors, and what may happen to them at each point."""

from __future__ import annotations

import heapq
import random
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

T = TypeVar("T")

# A Monday, 07:00 in New York.
EPOCH = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)

MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0

# How long a worker may stand still: a slow network, a paused machine, a laptop lid, a snapshot that is started again.
FREEZES = (
    3.0,
    40.0,
    100.0,
    5 * MINUTE,
    20 * MINUTE,
    55 * MINUTE,
    65 * MINUTE,
    75 * MINUTE,
    2 * HOUR,
    26 * HOUR,
    8 * DAY,
)

# Between two steps of a worker: mostly milliseconds, sometimes seconds.
_STEPS = (0.001, 0.002, 0.004, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 2.5)

# A history that goes on for longer than this does not end.
MOST_STEPS = 60_000


class Violation(AssertionError):
    """An invariant does not hold; the message says which, and for which refund."""


class Mistake(Violation):
    """The code failed in a way that nobody foresaw."""


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine that waits for nothing returns."""
    try:
        work.send(None)
    except StopIteration as returned:
        result: T = returned.value
        return result
    raise AssertionError("It waits for something.")


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
AT_THE_GATE = frozenset(
    {"ledger: after candidates", "source: select", "ledger: after stored", "ledger: before release"}
)
IN_A_WRITE_BACK = frozenset({"ledger: after due_write_backs", "source: write back", "source: written back"})


# The calls of the ledger that share a transaction when several refunds of one list make them at the same time.
_GROUPED = ("read", "claim", "may_post", "record")
_SHARED = frozenset(f"ledger: {side} {name}" for name in _GROUPED for side in ("before", "after"))


class Actor:
    """
    A running process: its strands, and what became of it.

    :param name: how the history calls it.
    :param ended: called with the actor when it has returned, raised or been killed.
    """

    __slots__ = ("ended", "error", "frozen_until", "most_claimed", "name", "result", "running", "strands")

    def __init__(
        self, name: str, coroutine: Coroutine[Any, Any, Any], ended: Callable[[Actor], None] | None
    ) -> None:
        self.name = name
        self.ended = ended
        self.running = True
        self.frozen_until = 0.0
        # How many refunds it may have claimed at a time that have no answer yet.
        self.most_claimed = 0
        self.result: Any = None
        self.error: Exception | None = None
        # The first one is the process's own; the others are what it does side by side.
        self.strands = [Strand(self, name, coroutine)]


class Strand:
    """
    One coroutine of production code in a process: the process itself, or one refund of its list.

    :param name: how the history calls it.
    :param parent: what waits for it, and for those beside it.
    """

    __slots__ = (
        "actor",
        "attempt",
        "checked",
        "children",
        "coroutine",
        "error",
        "has_turn",
        "is_queued",
        "label",
        "lease_until",
        "looked_at",
        "name",
        "parent",
        "seen_source",
        "waits_for_answer",
        "write_back",
    )

    def __init__(
        self, actor: Actor, name: str, coroutine: Coroutine[Any, Any, Any], parent: Strand | None = None
    ) -> None:
        self.actor = actor
        self.name = name
        self.coroutine = coroutine
        self.parent = parent
        # How many it waits for.
        self.children = 0
        # The point at which it is, and what the call there fails with.
        self.label = ""
        self.error: Exception | None = None
        # What it claimed last and until when, which attempt's last look before the POST let it go on, whether it holds a place in the
        # queue and a turn, whether what it claimed has had its turn, and what it read last from the source: what the invariants hold its
        # acts against.
        self.attempt: tuple[int, int] | None = None
        self.lease_until: datetime | None = None
        self.checked: tuple[int, int] | None = None
        self.is_queued = self.has_turn = self.waits_for_answer = False
        self.seen_source: dict[str, Any] | None = None
        # The name under which it has, or had, the turn of the write-back.
        self.write_back: str | None = None
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
        self.current: Strand | None = None
        self.failure: Callable[[str], Exception] = RuntimeError
        self.steps = 0
        self.deaths = 0
        self.freezes = 0
        self.failures = 0
        self._tell = tell
        # What is due. A strand that runs stands here once, unless it is parked or waits for its children.
        self._queue: list[tuple[float, int, Callable[[], None] | Strand]] = []
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
        heapq.heappush(self._queue, (self.time + seconds, self._number, act))

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
        self.time, _, act = heapq.heappop(self._queue)
        if isinstance(act, Strand):
            self._step(act)
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

    def start(
        self, name: str, coroutine: Coroutine[Any, Any, Any], ended: Callable[[Actor], None] | None = None
    ) -> Actor:
        """Start a process; it takes its first step now."""
        actor = Actor(name, coroutine, ended)
        self.actors.append(actor)
        self.wake(actor.strands[0])
        return actor

    @types.coroutine
    def point(self, label: str) -> Generator[str, None, None]:
        """A point at which something may happen to the current actor."""
        yield label

    @types.coroutine
    def sleep(self, seconds: float) -> Generator[float, None, None]:
        """Let time pass for the current strand, with nothing else happening to it; the others of its process go on."""
        yield seconds

    @types.coroutine
    def park(self) -> Generator[None, None, None]:
        """Let the current strand wait until another one wakes it."""
        yield None

    @types.coroutine
    def together(self, coroutines: Sequence[Coroutine[Any, Any, None]]) -> Generator[Any, None, None]:
        """
        Run coroutines side by side in the current process, until all have ended. What is next is chance.

        A failure hits the one at whose point it happens, and those that share its transaction. A process dies and stands still as a whole.
        """
        if len(coroutines) == 1:
            yield from coroutines[0]
        elif coroutines:
            yield coroutines

    def wake(self, strand: Strand, seconds: float = 0.0) -> None:
        """Let a strand go on."""
        self._number += 1
        heapq.heappush(self._queue, (self.time + seconds, self._number, strand))

    def kill(self, actor: Actor) -> None:
        """Kill a process: none of its code runs any more."""
        if not actor.running:
            return
        self.deaths += 1
        self.tell(f"☠ {actor.name} is killed")
        actor.running = False
        for strand in reversed(actor.strands):
            strand.coroutine.close()
        self._end(actor)

    def abandon(self) -> None:
        """Break the history off: nothing runs any more, and nobody is told."""
        for actor in self.actors:
            actor.running = False
            for strand in reversed(actor.strands):
                strand.coroutine.close()

    def freeze(self, actor: Actor, seconds: float) -> None:
        """Make a process stand still from its present points on."""
        self.freezes += 1
        self.tell(f"❄ {actor.name} stands still for {seconds:.0f} s")
        actor.frozen_until = max(actor.frozen_until, self.time + seconds)
        if self.on_freeze is not None:
            self.on_freeze(actor, seconds)

    def _step(self, strand: Strand) -> None:
        actor = strand.actor
        if not actor.running:
            return
        if self.time < actor.frozen_until:
            self._number += 1
            heapq.heappush(self._queue, (actor.frozen_until, self._number, strand))
            return
        self.current = strand
        error, strand.error = strand.error, None
        try:
            request = strand.coroutine.send(None) if error is None else strand.coroutine.throw(error)
        except StopIteration as stop:
            self._returned(strand, stop.value)
        except Violation:
            raise
        except Exception as raised:  # noqa: BLE001 - whoever started the actor judges it
            self._raised(strand, raised)
        else:
            if isinstance(request, str):
                self._at_point(strand, request)
            else:
                strand.label = ""
                if isinstance(request, float):
                    self.wake(strand, request)
                elif request is not None:
                    self._divide(strand, request)
        self.current = None

    def _at_point(self, strand: Strand, label: str) -> None:
        trouble = self.trouble
        strand.label = label
        if self.script is not None:
            what = self.script(strand.actor, label)
        else:
            drawn = self.chance()
            if drawn < trouble.total and label in trouble.where:
                drawn /= trouble.critical
            if drawn >= trouble.die + trouble.fail + trouble.freeze:
                # The way of nearly every step, so it is written out.
                self._number += 1
                heapq.heappush(
                    self._queue, (self.time + _STEPS[int(self.chance() * 10)], self._number, strand)
                )
                return
            what = (
                "die" if drawn < trouble.die else "fail" if drawn < trouble.die + trouble.fail else "freeze"
            )
        if what == "die":
            self.tell(f"  {label}")
            self.kill(strand.actor)
        elif what == "fail":
            self._fail(strand, label)
        elif what is not None and what.startswith("freeze"):
            self.freeze(strand.actor, float(what.removeprefix("freeze") or self.rng.choice(FREEZES)))
            self.wake(strand)
        else:
            self.wake(strand, 0.001)

    def _fail(self, strand: Strand, label: str) -> None:
        """The call fails, and with it those that share its transaction: all had their effect, or none."""
        self.tell(f"  {label} ⚡ fails")
        self.failures += 1
        for other in strand.actor.strands if label in _SHARED else (strand,):
            if other.label == label:
                other.error = self.failure(label)
        self.wake(strand)

    def _divide(self, strand: Strand, coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
        strand.children = len(coroutines)
        children = [
            Strand(strand.actor, f"{strand.name} ·{number}", coroutine, strand)
            for number, coroutine in enumerate(coroutines, 1)
        ]
        strand.actor.strands += children
        for child in children:
            self._step(child)

    def _returned(self, strand: Strand, result: Any) -> None:
        actor, parent = strand.actor, strand.parent
        if parent is None:
            actor.running, actor.result = False, result
            self._end(actor)
            return
        actor.strands.remove(strand)
        parent.children -= 1
        if parent.children == 0:
            self.wake(parent)

    def _raised(self, strand: Strand, error: Exception) -> None:
        if strand.parent is not None:
            raise Mistake(f"{strand.name} raises, and nobody waits for that: {error!r}") from error
        strand.actor.running, strand.actor.error = False, error
        self._end(strand.actor)

    def _end(self, actor: Actor) -> None:
        if actor in self.actors:
            self.actors.remove(actor)
        if actor.ended is not None:
            actor.ended(actor)
