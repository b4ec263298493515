"""The files of requirements fit together."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

DIRECT = ("requirements.txt", "requirements-image.txt", "requirements-dev.txt", "requirements-mysql.txt")


def requirements(name: str) -> list[Requirement]:
    lines = (line.strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]


@pytest.mark.parametrize("name", [*DIRECT, "constraints.txt"])
def test_every_version_is_exact(name: str) -> None:
    assert [
        str(each) for each in requirements(name) if not re.fullmatch(r"==[0-9][^*,]*", str(each.specifier))
    ] == []


@pytest.mark.parametrize("name", DIRECT)
def test_constraints_hold_the_same_versions(name: str) -> None:
    locked = {(each.name.lower(), str(each.specifier)) for each in requirements("constraints.txt")}
    assert [
        str(each) for each in requirements(name) if (each.name.lower(), str(each.specifier)) not in locked
    ] == []


def test_constraints_name_packages_and_no_places_to_get_them_from() -> None:
    assert not re.search(r"^\s*-|://|@|\[", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
