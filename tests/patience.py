"""How long tests wait for an event: so long that only something that hangs takes longer, on any machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Half of pytest's own limit for a test, so that a test that waits in vain can say for what.
PATIENCE_SECONDS = 600


def eventually(condition: Callable[[], T], what: str = "what was expected", *, pause: float = 0.1) -> T:
    """
    Wait until something is true, and return it.

    :param what: what is waited for, for the message.
    :param pause: seconds between two looks.
    :raises AssertionError: when it does not become true.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_SECONDS} s"
        time.sleep(pause)
    return found
