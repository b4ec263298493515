"""What the person sees: one line per step, and how long it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

# In a pipe there is no terminal to measure; a build log is wide enough for the table.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def step(doing: str, done: str | None = None) -> Iterator[None]:
    """
    Show that something is being done, then that it is done.

    :param doing: shown while it lasts, such as "Starting the database".
    :param done: shown afterwards; without it ``doing`` stays.
    """
    begin = time.monotonic()
    with console.status(f"{doing} …"):
        yield
    say(f"[green]✓[/] {done or doing} [dim]({time.monotonic() - begin:.1f} s)[/]")


def say(text: str = "") -> None:
    """Print a line of rich markup."""
    # The terminal wraps long lines, not we: a path or command that is copied must come out whole.
    console.print(text, soft_wrap=True)
