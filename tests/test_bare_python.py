"""`make env`, `make down`, `make reset` and `make clean` need Python and nothing else: no package, no venv module."""

from __future__ import annotations

import ast
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = (
    "docker/env.py",
    *(f"demo/{name}.py" for name in ("__init__", "__main__", "down", "errors", "files", "state")),
)
OLDEST = (3, 9)


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A Python as Debian installs it: without packages, and without what makes virtual environments."""
    without = tmp_path / "without"
    without.mkdir()
    for name in ("venv", "ensurepip"):
        (without / f"{name}.py").write_text(f"raise ImportError('No module named {name}')\n")
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={without} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone in which nothing was made yet."""
    folder = tmp_path / "checkout"
    for name in ("demo", "docker"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "docker-compose.yaml"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(checkout: Path, python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", f"CANDIDATES={python}", *arguments]
    env = {"PATH": os.environ["PATH"], "PAYROC_REFUNDS_DEMO_STATE": str(checkout / "state")}
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=60)


def test_make_env_works_without_the_modules_for_virtual_environments(
    checkout: Path, bare_python: Path
) -> None:
    done = make(checkout, bare_python, "env")
    assert (done.returncode, done.stdout) == (
        0,
        "Wrote .env with fresh secrets. Keep a copy of it in a safe place.\n",
    ), done.stderr
    assert stat.S_IMODE((checkout / ".env").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("down", "Nothing of this demo is running."),
        ("reset", "The demo has no data."),
        ("clean", "The demo has no data."),
    ],
)
def test_the_demo_is_stopped_and_removed_without_them(
    checkout: Path, bare_python: Path, command: str, said: str
) -> None:
    done = make(checkout, bare_python, command)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.parametrize(("command", "keeps_venv"), [("reset", True), ("clean", False)])
def test_make_reset_removes_the_data_alone_and_make_clean_the_venv_as_well(
    checkout: Path, bare_python: Path, command: str, keeps_venv: bool
) -> None:
    # What State.open leaves.
    (checkout / "state" / "postgres").mkdir(parents=True)
    (checkout / "state" / "lock").touch()
    (checkout / ".venv").mkdir()
    done = make(checkout, bare_python, command)
    assert done.returncode == 0, done.stderr
    assert not (checkout / "state").exists()
    assert (checkout / ".venv").exists() is keeps_venv


def test_what_needs_a_virtual_environment_still_says_what_to_install(
    checkout: Path, bare_python: Path
) -> None:
    for name in ("requirements.txt", "requirements-image.txt", "requirements-dev.txt", "constraints.txt"):
        (checkout / name).touch()
    (checkout / "pyproject.toml").touch()
    done = make(checkout, bare_python, ".venv")
    assert done.returncode == 2
    assert "On Debian and Ubuntu: sudo apt install python3-venv" in done.stderr


def test_without_any_python_one_sentence_says_what_is_needed(checkout: Path) -> None:
    done = make(checkout, checkout / "no-python", "env")
    assert done.returncode == 2
    assert "This needs Python 3.9 or newer, and none was found." in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_for_any_python_is_read_by_the_oldest(script: str) -> None:
    tree = ast.parse((ROOT / script).read_text(), feature_version=OLDEST)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Match)]


# -- a .env that is there already ----------------------------------------------------------------------------------------


def test_make_env_names_what_compose_hands_on_to_nobody(checkout: Path, bare_python: Path) -> None:
    text = (
        "\ufeff# PAYROC_REFUNDS_COMMENT=1\r\nPAYROC_REFUNDS_RETRYS=3\r\nexport PAYROC_REFUNDS_SOURCE=shop\r\n"
    )
    (checkout / ".env").write_bytes(text.encode())
    done = make(checkout, bare_python, "env")
    assert done.returncode == 2
    assert (
        "PAYROC_REFUNDS_RETRYS in .env is handed on to nobody; the nearest is PAYROC_REFUNDS_RETRIES."
        in done.stderr
    )
    assert ".env has line ends of Windows" in done.stderr
    assert "COMMENT" not in done.stderr
    assert "SOURCE" not in done.stderr
    assert (checkout / ".env").read_bytes() == text.encode()


def test_make_env_has_nothing_to_say_about_what_it_wrote_itself(checkout: Path, bare_python: Path) -> None:
    make(checkout, bare_python, "env")
    done = make(checkout, bare_python, "env")
    assert "nothing was written" in done.stderr
    assert "handed on" not in done.stderr
    assert "Windows" not in done.stderr


def test_make_env_says_where_it_can_not_write(checkout: Path, bare_python: Path) -> None:
    done = make(checkout, bare_python, "env", "ENV_FILE=/proc/nowhere/.env")
    assert done.returncode == 2
    assert "/proc/nowhere/.env can't be written (No such file or directory)" in done.stderr
    assert "Traceback" not in done.stderr
