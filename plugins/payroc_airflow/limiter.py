"""
How much is under way to Payroc at a time from one worker host, and how fast it may follow.

Payroc documents no rate limit; that it answers 429, perhaps with ``Retry-After``, when there is one is an assumption.

Each task is a process. Those that send share the host's places evenly: each holds the lock of a file of its own as long as it lives,
and counts the others' locks, up to fifty times a second. What all have to heed beside that, a pause and the next free moment, stands in one
small file.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from uuid import uuid4

from payroc_airflow.token_cache import usable

log = logging.getLogger(__name__)

COUNT_EVERY_SECONDS = 0.02

MAX_PAUSE_SECONDS = 60.0
"""
A task must not sleep in its slot for longer; then the few places that are left find out whether Payroc takes more. The refund that met
the 429 has a date of its own, which heeds all of ``Retry-After``.
"""

CATCH_UP_SECONDS = 0.05
"""As much of what late wake-ups have cost may be made up for."""

LOCK_SECONDS = 1.0
"""A process that stopped in the middle of a step is not waited for."""

_TIME = struct.Struct("<d")
_FREE_AT, _PAUSED_UNTIL = 0, _TIME.size


class Limiter:
    """
    Places in the queue to Payroc, and turns to talk to it, for one event loop at a time.

    Twice as many may queue as have turns, so that what comes next is claimed while Payroc answers. Under a limit per second as many as
    have turns: the queue then moves at that pace, and nothing that was claimed waits.

    A 429 halves the places of this process and lets no turn begin on the host until the pause is over; each other answer gives a
    little back. Where the folder can't be used, the process is limited by itself.

    :param folder: with owner-only rights, shared by the processes of the host; ``None`` when there is none.
    :param account: what may stand in a file's name; those with another one are limited apart.
    :param in_flight: turns of the host; each process has at least one.
    :param per_second: refunds that may enter the queues of the host in a second; ``None`` for no limit.
    """

    def __init__(self, folder: Path | None, account: str, in_flight: int, per_second: float | None) -> None:
        self._host = _Host(folder, account, in_flight, per_second)
        self._in_flight = in_flight
        self._allowed = float(in_flight)
        ahead = 1 if per_second else 2
        self._queue = _Places(lambda: ahead * self._limit())
        self._turns = _Places(self._limit)

    def queue(self) -> AbstractAsyncContextManager[None]:
        """Hold a place in the queue; entering waits for one, for the end of a pause, and for the moment that the limit per second gives."""
        return _Place(self._queue, self._host.ready)

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Hold a turn; entering waits for one, and for the end of a pause."""
        return _Place(self._turns, self._host.pause_over)

    def answered(self) -> None:
        """Give back a little of what 429s have taken."""
        self._allowed = min(self._in_flight, self._allowed + 1 / self._allowed)

    def refused(self, retry_after: float | None) -> None:
        """
        Slow down, because Payroc says that it is too much.

        :param retry_after: seconds that Payroc asks to wait.
        """
        # All that was under way hears the same, and it counts once.
        if self._host.pause_left() == 0:
            self._allowed = max(1.0, self._limit() / 2)
        self._host.pause(min(max(retry_after or 0.0, 1.0), MAX_PAUSE_SECONDS))

    def leave(self) -> None:
        """Leave this process's share to the others."""
        self._host.leave()

    def _limit(self) -> int:
        return max(1, min(self._in_flight // self._host.processes(), int(self._allowed)))


class _Places:
    """
    Places for the coroutines of one event loop at a time.

    :param limit: tells how many there are; it is asked again and again.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._look: asyncio.TimerHandle | None = None

    async def take(self) -> None:
        """Take a place; wait for one when there is none."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            # An earlier loop has ended, and gives nothing back any more.
            self._loop, self._taken, self._look = loop, 0, None
            self._waiting.clear()
        if not self._waiting and self._taken < self._limit():
            self._taken += 1
            return
        place = loop.create_future()
        self._waiting.append(place)
        if self._look is None:
            self._look = loop.call_later(COUNT_EVERY_SECONDS, self._look_again)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():
                self.give_back()
            raise

    def give_back(self) -> None:
        """Give a place that was taken to who waits."""
        self._taken -= 1
        self._hand_on()

    def _hand_on(self) -> None:
        while self._waiting and (self._waiting[0].done() or self._taken < self._limit()):
            place = self._waiting.popleft()
            if not place.done():
                self._taken += 1
                place.set_result(None)

    def _look_again(self) -> None:
        """Take up what other processes have left, though no place of this one was given back."""
        self._look = None
        self._hand_on()
        if self._waiting and self._loop is not None:
            self._look = self._loop.call_later(COUNT_EVERY_SECONDS, self._look_again)


class _Place(AbstractAsyncContextManager[None]):
    """
    A place, held. Two for each refund: a class of its own, because a generator as a context manager costs each of them ten times as much.

    :param places: where it is taken.
    :param ready: waited for once it is held.
    """

    __slots__ = ("_places", "_ready")

    def __init__(self, places: _Places, ready: Callable[[], Awaitable[None]]) -> None:
        self._places = places
        self._ready = ready

    async def __aenter__(self) -> None:
        await self._places.take()
        try:
            await self._ready()
        except BaseException:
            self._places.give_back()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._places.give_back()


class _Host:
    """What the processes of the host share."""

    def __init__(self, folder: Path | None, account: str, in_flight: int, per_second: float | None) -> None:
        self._folder = folder
        self._account = account
        self._interval = 1 / per_second if per_second else 0.0
        # What lies further ahead was written before the host started anew, when its clock began anew as well.
        self._horizon = MAX_PAUSE_SECONDS + 10 * in_flight * self._interval
        self._pid = 0
        self._own: tuple[Path, int] | None = None
        self._shared: int | None = None
        self._alone = {_FREE_AT: 0.0, _PAUSED_UNTIL: 0.0}
        self._count = 1
        self._counted_at = 0.0

    def __del__(self) -> None:
        self.leave()

    def processes(self) -> int:
        """Return how many processes of the host send, this one included."""
        now = time.monotonic()
        # Each looks at each other's file: the more there are, the less often.
        if (
            now - self._counted_at < COUNT_EVERY_SECONDS * max(1, self._count / 2)
            and self._pid == os.getpid()
        ):
            return self._count
        self._join()
        if self._own is not None and self._folder is not None:
            self._counted_at = now
            self._count = 1 + sum(
                _alive(path)
                for path in self._folder.glob(f"{self._account}-*.sending")
                if path != self._own[0]
            )
        return self._count

    async def ready(self) -> None:
        """Wait for the next moment that the limit per second allows and no pause forbids."""
        while True:
            if self._interval:
                await asyncio.sleep(await self._reserve())
            if self.pause_left() == 0:
                return
            await self.pause_over()

    async def pause_over(self) -> None:
        """Wait until no pause forbids to talk to Payroc."""
        while pause := self.pause_left():
            await asyncio.sleep(pause)

    def pause_left(self) -> float:
        """Return the seconds for which no turn may begin."""
        return max(0.0, self._get(_PAUSED_UNTIL) - time.monotonic())

    def pause(self, seconds: float) -> None:
        """Let no turn begin for a while."""
        self._set(_PAUSED_UNTIL, max(self._get(_PAUSED_UNTIL), time.monotonic() + seconds))

    def leave(self) -> None:
        """Let go of the files; a forked process leaves what is its parent's."""
        if self._own is not None:
            path, handle = self._own
            if self._pid == os.getpid():
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            os.close(handle)
        if self._shared is not None:
            os.close(self._shared)
        self._own, self._shared, self._pid = None, None, 0

    async def _reserve(self) -> float:
        """Take the next free moment, and return the seconds until then."""
        ends = time.monotonic() + LOCK_SECONDS
        while not self._lock() and time.monotonic() < ends:
            await asyncio.sleep(0.001)
        now = time.monotonic()
        begin = max(self._get(_FREE_AT), now - CATCH_UP_SECONDS)
        self._set(_FREE_AT, begin + self._interval)
        if self._shared is not None:
            fcntl.flock(self._shared, fcntl.LOCK_UN)
        return max(0.0, begin - now)

    def _lock(self) -> bool:
        self._join()
        if self._shared is None:
            return True
        try:
            fcntl.flock(self._shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _get(self, place: int) -> float:
        self._join()
        content = b"" if self._shared is None else os.pread(self._shared, _TIME.size, place)
        moment = _TIME.unpack(content)[0] if len(content) == _TIME.size else self._alone[place]
        return moment if moment - time.monotonic() <= self._horizon else 0.0

    def _set(self, place: int, moment: float) -> None:
        self._alone[place] = moment
        if self._shared is not None:
            try:
                os.pwrite(self._shared, _TIME.pack(moment), place)
            except OSError as error:
                self._give_up(error.strerror or "unknown")

    def _join(self) -> None:
        """Become one of the host's processes, once; anew in a forked process."""
        if self._pid == os.getpid():
            return
        self.leave()
        self._pid = os.getpid()
        self._counted_at = 0.0
        self._count = 1
        # It may be another one's since another process looked at it.
        if self._folder is None or usable(self._folder) is None:
            return
        try:
            self._own = _locked_file(self._folder, self._account)
            self._shared = _open(self._folder / f"{self._account}.pace")
        except OSError as error:
            self._give_up(error.strerror or "unknown")

    def _give_up(self, why: str) -> None:
        log.warning("The limits hold for this process alone, not for the host: %s in %s.", why, self._folder)
        self.leave()
        self._pid = os.getpid()
        self._count = 1


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _locked_file(folder: Path, account: str) -> tuple[Path, int]:
    """Return a file of our own, locked for as long as this process lives."""
    while True:
        path = folder / f"{account}-{uuid4().hex}.sending"
        handle = _open(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                return path, handle
        except BlockingIOError:
            pass
        # Another process looked in between, and took it for one that a dead process has left.
        os.close(handle)
        path.unlink(missing_ok=True)


def _alive(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    else:
        # Left by a dead process; on a file system that has become read-only it stays.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return False
    finally:
        os.close(handle)
