"""An event loop in a thread of its own, for synchronous code: it may be called from any thread, also from one that runs a loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _OwnLoop:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="payroc", daemon=True).start()
            return self._loop

    def forget(self) -> None:
        # Neither stopped nor closed: a forked process shares the loop's descriptors with its parent, which goes on using them.
        self._lock = threading.Lock()
        self._loop = None


_own = _OwnLoop()
os.register_at_fork(after_in_child=_own.forget)


def run(work: Coroutine[Any, Any, T]) -> T:
    """
    Run a coroutine on the process's own loop, and wait for it.

    :raises Exception: what the coroutine raises. An exception that ends the waiting, such as a time-out by signal, cancels it.
    """
    future = asyncio.run_coroutine_threadsafe(work, _own.running())
    try:
        return future.result()
    finally:
        future.cancel()
