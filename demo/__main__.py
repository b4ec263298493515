"""The commands behind `make demo`, `make up`, `make down` and `make reset`."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys

from demo.errors import DemoError
from demo.state import State, state_folder

_INTERRUPTED = 130


def main() -> int:
    """Run the command that was asked for, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="pay the sample refunds and show what became of each")
    commands.add_parser("up", help="open the same in Airflow's web interface, until Ctrl-C")
    commands.add_parser("down", help="stop a running demo, or what one left over")
    commands.add_parser("reset", help="stop the demo and remove its data")
    command = parser.parse_args().command

    # A polite kill or a closed terminal ends it like Ctrl-C, with everything stopped. Ctrl-C is named too: a shell that starts
    # a command in the background has it ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    # Files that Airflow and the others create are nobody else's business.
    os.umask(0o077)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows no ✓ shows a ? instead of ending the demo.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _run(command)
    except DemoError as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. Everything that was started has been ended.\n")
        return _INTERRUPTED


def _run(command: str) -> int:
    # Imported one by one: `reset` has to work without the packages that the others need.
    if command == "run":
        from demo.run import run

        return run(State.open())
    if command == "up":
        from demo.up import up

        return up(State.open())
    from demo.down import down, reset

    return down(state_folder()) if command == "down" else reset(state_folder())


if __name__ == "__main__":
    sys.exit(main())
