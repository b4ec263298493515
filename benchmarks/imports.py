"""
How long the DAG file takes to parse, and the operator's module to import, beside the same imports of Airflow alone.

The same imports are: each module ``airflow…`` that our file loads, directly or not, with what they load in turn; what is left is our own
modules and what these alone need. Every measurement is a process of its own. One clock starts before the first import, as on the command
line; another one after ``airflow.sdk``, which the process that parses DAG files has imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.figure import Figure, figure_of
from demo.state import ROOT

GOAL = 1.2
DAG_FILE = ROOT / "dags" / "payroc_refunds.py"
OPERATOR = "payroc_airflow.operators.refund"

_ROUNDS, _QUICK_ROUNDS = 11, 3
_EMPTY_DAG = """
from airflow.sdk import DAG, task

with DAG("empty") as dag:

    @task
    def empty() -> None: ...

    empty()
"""
# CPU time: in a process that waits for nobody it is the time, and a busy machine stretches it least.
_MEASURE = """
import json, runpy, sys, time
begin = time.process_time()
from airflow.sdk import DAG, task
before, imported = set(sys.modules), time.process_time()
runpy.run_path(sys.argv[1])
end = time.process_time()
print(json.dumps([end - begin, end - imported, [name for name in sys.modules if name.startswith("airflow.") and name not in before]]))
"""


def measure(quick: bool) -> list[Figure]:
    """
    Measure, each round one after the other.

    :param quick: fewer rounds.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        operator = folder / "operator.py"
        operator.write_text(f"import {OPERATOR}\n")
        return [
            *_figures("DAG file parse", DAG_FILE, folder, quick),
            *_figures("import of the operator's module", operator, folder, quick),
        ]


def _figures(name: str, ours: Path, folder: Path, quick: bool) -> Iterator[Figure]:
    # The first of each also leaves compiled files behind for the others.
    *_, modules = _seconds(ours, folder)
    theirs = folder / "empty.py"
    theirs.write_text("".join(f"import {module}\n" for module in modules) + _EMPTY_DAG)
    _seconds(theirs, folder)
    pairs = [
        (_seconds(ours, folder), _seconds(theirs, folder)) for _ in range(_QUICK_ROUNDS if quick else _ROUNDS)
    ]
    name = f"{name} ÷ empty DAG file"
    whole = [(one[0], other[0]) for one, other in pairs]
    yield figure_of(
        name,
        f"≤ {GOAL} ×",
        _ratios(whole),
        "×",
        {**_medians(whole), "imports": modules},
        lambda value: value <= GOAL,
    )
    # Told: what is left of both is so little that six tasks weigh more in it than all imports.
    warm = [(one[1], other[1]) for one, other in pairs]
    yield figure_of(f"{name}, airflow.sdk imported before", "told", _ratios(warm), "×", _medians(warm))


def _ratios(pairs: Sequence[tuple[float, float]]) -> list[float]:
    return [one / other for one, other in pairs]


def _medians(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    return {
        "seconds": median(one for one, _ in pairs),
        "seconds of the empty file": median(other for _, other in pairs),
    }


def _seconds(file: Path, home: Path) -> tuple[float, float, list[str]]:
    """Return the seconds from the first import on, those from ``airflow.sdk`` on, and the modules of Airflow loaded after it."""
    command = [sys.executable, "-c", _MEASURE, str(file)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "PAYROC"))}
    env = {
        **kept,
        "AIRFLOW_HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")]),
    }
    printed = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    whole, warm, modules = json.loads(printed.splitlines()[-1])
    return float(whole), float(warm), list(modules)


if __name__ == "__main__":
    print(
        json.dumps(
            [asdict(figure) for figure in measure("--quick" in sys.argv)], indent=1, ensure_ascii=False
        )
    )
