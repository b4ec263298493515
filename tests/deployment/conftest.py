"""The ``.env`` that `make env` writes, and what a test adds to it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, SCRATCH
from tests.deployment.compose import read_env_file


def make_env(file: Path) -> subprocess.CompletedProcess[str]:
    """Run `make env` for another file than the checkout's ``.env``, which may be a person's."""
    command = ["make", "--no-print-directory", "--directory", str(ROOT), "env", f"ENV_FILE={file}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def variables() -> dict[str, str]:
    """What `make env` has written."""
    file = SCRATCH / "compose.env"
    done = make_env(file)
    assert done.returncode == 0, done.stderr
    return read_env_file(file)
