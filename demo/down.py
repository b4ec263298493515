"""`make down` and `make reset`. Of this project's packages nothing is imported before it is needed: `.venv` may be gone already."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from demo.errors import DemoError
from demo.state import State

# `make up` first asks its processes to end and kills them after a while.
_PATIENCE_SECONDS = 120


def down(folder: Path) -> int:
    """Stop a running demo from another terminal, or what a killed one left over."""
    state = State(folder)
    stopped = _stop_holder(state)
    stopped = _stop_left_overs(state) or stopped
    _say("Everything has been stopped." if stopped else "Nothing of this demo is running.")
    return 0


def reset(folder: Path) -> int:
    """Stop the demo and remove its data."""
    state = State(folder)
    if _stop_holder(state):
        _say("A running demo has been stopped.")
    if not state.exists():
        _say("The demo has no data.")
        return 0
    _stop_left_overs(state)
    state.remove()
    _say(f"Removed the demo's databases, keys and logs: {folder}")
    return 0


def _stop_holder(state: State) -> bool:
    holder = state.holder()
    if holder is None:
        return False
    pid, what = holder
    _say(f"Stopping `{what}` (process {pid}) …")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while state.is_locked():
        if time.monotonic() > deadline:
            raise DemoError(
                f"Process {pid} has not ended within {_PATIENCE_SECONDS} seconds. End it with `kill -9 {pid}`, then try again."
            )
        time.sleep(0.2)
    return True


def _stop_left_overs(state: State) -> bool:
    if (
        not state.exists()
        or importlib.util.find_spec("psutil") is None
        or importlib.util.find_spec("psycopg") is None
    ):
        return False
    from demo import processes
    from demo.postgres import PostgresServer

    count = processes.end_all(processes.orphans(str(state.folder)))
    return PostgresServer(state.postgres).end_left_over() or count > 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
