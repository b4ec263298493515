"""What Airflow's processes have imported before they fork a task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

_OURS = ("include", "payroc_airflow")
# What a task would import if it were not there: by its DAG file, then by each function on its way that imports anything.
_RUN = """
import ast, importlib, sys
from pathlib import Path
from sqlalchemy import URL
from airflow.dag_processing.dagbag import BundleDagBag

before = set(sys.modules)
for file in sorted(Path({dags!r}).glob("*.py")):
    bag = BundleDagBag(dag_folder=file, safe_mode=False, load_op_links=False, bundle_path=Path({dags!r}), bundle_name="dags")
    assert not bag.import_errors, bag.import_errors
for file in {run!r}:
    functions = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in (node for function in functions for node in ast.walk(function)):
        if isinstance(node, ast.ImportFrom):
            importlib.import_module(node.module)
        elif isinstance(node, ast.Import):
            [importlib.import_module(name.name) for name in node.names]
from include.refunds.ledger import LedgerEngine
LedgerEngine(URL.create("postgresql"))
told = sorted(set(sys.modules) - before)
"""
_PLUGIN = ROOT / "plugins" / "payroc_airflow"
_RUN_BY_TASKS = [
    *(ROOT / "dags" / f"payroc_refunds{which}.py" for which in ("", "_followup")),
    *(_PLUGIN / "operators").glob("*.py"),
    *(_PLUGIN / f"{name}.py" for name in ("databases", "notify", "retry_policy", "schedule", "task_context")),
]
_LOADED = "import sys; told = sorted(sys.modules)"


def _airflow(
    command: Sequence[str], code: str, home: Path, *, path: Sequence[Path] = (ROOT, ROOT / "plugins")
) -> tuple[Any, str]:
    """Start a process as one of Airflow's, run code in it, and return what it told and what it wrote to its terminal."""
    start = f"import sys; sys.argv = {['airflow', *command]!r}; import airflow\n{code}\nimport json; print('told:' + json.dumps(told))"
    env = os.environ | {
        "AIRFLOW_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    done = subprocess.run(
        [sys.executable, "-c", start],
        env=env,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("told:")[2]), done.stdout + done.stderr


def test_a_process_forked_for_a_task_or_a_dag_file_finds_everything_imported(tmp_path: Path) -> None:
    code = _RUN.format(dags=str(ROOT / "dags"), run=[str(file) for file in _RUN_BY_TASKS])
    told, written = _airflow(["scheduler", "--skip-serve-logs"], code, tmp_path)

    assert "Each task imports what it needs itself" not in written
    heavy = (*_OURS, "aiohttp", "asyncpg", "psycopg", "requests", "sqlalchemy", "uvloop")
    assert [
        name for name in told if name.split(".")[0] in heavy or name.startswith("airflow.providers")
    ] == []


def test_a_celery_worker_and_the_dag_processor_import_it_too(tmp_path: Path) -> None:
    for command in (["celery", "worker"], ["dag-processor"]):
        told, _ = _airflow(command, _LOADED, tmp_path)
        assert "payroc_airflow.operators.refund" in told, command


def test_a_process_that_forks_nothing_imports_nothing_of_ours(tmp_path: Path) -> None:
    for command in (["api-server"], ["triggerer"], ["dags", "list"], ["celery", "flower"]):
        told, _ = _airflow(command, _LOADED, tmp_path)
        assert {name for name in told if name.startswith("include.")} == set(), command


def test_what_can_not_be_imported_keeps_no_process_of_airflow_from_starting(tmp_path: Path) -> None:
    told, written = _airflow(["scheduler"], _LOADED, tmp_path, path=[ROOT / "plugins"])

    assert "payroc_airflow.operators.refund" not in told
    assert "Each task imports what it needs itself" in written


def test_who_only_reads_the_dag_files_imports_neither_a_driver_nor_the_ledger_nor_payrocs_models(
    tmp_path: Path,
) -> None:
    files = [str(file) for file in (ROOT / "dags").glob("*.py")]
    read = f"import runpy, sys\nfor file in {files!r}: runpy.run_path(file)\ntold = sorted(sys.modules)"
    told, _ = _airflow(["dags", "list"], read, tmp_path)

    assert "payroc_airflow.operators.refund" in told
    assert {
        "aiohttp",
        "asyncpg",
        "uvloop",
        "include.refunds.ledger",
        "include.payroc.models",
        "payroc_airflow.client",
    } & set(told) == set()
