"""What the image has in it, read out of the Dockerfile: the folder /opt/airflow and the environment."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.conftest import ROOT

# Facts of the official image.
HOME = "/opt/airflow"
_OFFICIAL_ENVIRONMENT = {"AIRFLOW_HOME": HOME}
_KNOWN = {"ARG", "FROM", "ENV", "COPY", "RUN"}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile with their arguments, each on one line."""
    lines = [
        line
        for line in dockerfile.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    found = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]
    assert {name for name, _ in found} <= _KNOWN, f"instructions that these tests do not know: {found}"
    return found


def lay_out(folder: Path) -> dict[str, str]:
    """
    Make a folder as the Dockerfile makes /opt/airflow, and return the environment that it sets, which still names /opt/airflow.

    Packages are not installed: that the tests' own have the same versions is the business of the constraints.
    """
    folder.mkdir(parents=True)
    environment = dict(_OFFICIAL_ENVIRONMENT)
    for name, argument in instructions((ROOT / "Dockerfile").read_text()):
        if name == "ENV":
            key, _, value = argument.partition("=")
            environment[key] = value
        elif name == "COPY":
            *sources, target = [word for word in argument.split() if not word.startswith("--")]
            for source in sources:
                _copy(
                    ROOT / source, folder / target.removeprefix(HOME).lstrip("/"), into=target.endswith("/")
                )
        elif name == "RUN" and "mkdir -p" in argument:
            for made in argument.split("mkdir -p")[1].split():
                (folder / made).mkdir()
    return environment


def _copy(source: Path, target: Path, *, into: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    else:
        target = target / source.name if into else target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
