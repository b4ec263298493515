"""
A reader of docker-compose.yaml: what Compose makes of the file and its ``.env``, as far as our file goes.

It knows ``.env`` files, interpolation, profiles, and the order of starts. What it does not know it refuses, so that a test never passes
because something was not looked at.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

# ${NAME}, ${NAME:-default} or ${NAME:?message}; a default may hold others. $$ is a dollar sign.
_NAME = re.compile(r"(?<!\$)\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<rule>:-|:\?)?")
_STARTS = {
    "image",
    "build",
    "entrypoint",
    "command",
    "environment",
    "depends_on",
    "profiles",
    "healthcheck",
    "restart",
}
_SURROUNDINGS = {"expose", "ports", "volumes", "shm_size", "stop_grace_period", "cap_drop", "security_opt"}
_KNOWN_KEYS = _STARTS | _SURROUNDINGS


class NotSet(Exception):
    """The file demands a variable that is not set; Compose refuses to start."""


@dataclass(frozen=True)
class Dependency:
    """What a service waits for: another one's ``service_started``, ``service_healthy`` or ``service_completed_successfully``."""

    service: str
    condition: str
    required: bool


@dataclass(frozen=True)
class Service:
    """A service, everything in it filled in."""

    name: str
    image: str
    built: bool
    entrypoint: tuple[str, ...] | None
    command: tuple[str, ...]
    environment: Mapping[str, str]
    exposed: tuple[int, ...]
    ports: tuple[str, ...]
    profiles: frozenset[str]
    depends_on: tuple[Dependency, ...]
    health: tuple[str, ...]
    restart: str
    volumes: Mapping[str, str]

    @property
    def is_ours(self) -> bool:
        """Whether it runs the project's image, whichever service builds that."""
        return self.image.startswith("payroc-refunds:")

    @property
    def is_one_shot(self) -> bool:
        """Whether it does its work and ends."""
        return self.restart == "no"


def read_env_file(path: Path) -> dict[str, str]:
    """Return the variables of a ``.env`` file. Ours has plain values and values in single quotes, which Compose takes as they are."""
    found = {}
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, separator, value = line.partition("=")
        assert separator, "a line of a .env file without an equals sign"
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name), f"no name of a variable: {name}"
        quoted = len(value) > 1 and value[0] == value[-1] == "'"
        assert quoted or not re.search(r"""["'$#\s]""", value), f"{name} needs single quotes in a .env file"
        found[name] = value[1:-1] if quoted else value
    return found


def load(path: Path) -> dict[str, Any]:
    """Return the file as YAML has it, nothing filled in."""
    return dict(yaml.safe_load(path.read_text()))


def demanded(text: str) -> set[str]:
    """Return the variables that a file does not work without."""
    return {match["name"] for match in _NAME.finditer(text) if match["rule"] != ":-"}


def read(path: Path, variables: Mapping[str, str]) -> dict[str, Service]:
    """
    Return the services, by name.

    :param variables: what ``.env`` holds.
    :raises NotSet: when a variable is missing that the file demands.
    """
    described = load(path)["services"]
    return {name: _service(name, body, variables) for name, body in described.items()}


def in_order(services: Mapping[str, Service], profiles: frozenset[str] | set[str]) -> list[Service]:
    """Return the services that ``up`` with these profiles starts, each after those that it depends on."""
    active = {name: each for name, each in services.items() if not each.profiles or each.profiles & profiles}
    for each in active.values():
        missing = [
            other.service for other in each.depends_on if other.required and other.service not in active
        ]
        assert not missing, f"{each.name} depends on {missing}, which no active profile has"
    graph = {
        name: [other.service for other in each.depends_on if other.service in active]
        for name, each in active.items()
    }
    return [active[name] for name in TopologicalSorter(graph).static_order()]


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """
    Fill variables in as Compose does.

    :raises NotSet: when one is missing that is demanded.
    """
    return "".join(_pieces(text, variables))


def _pieces(text: str, variables: Mapping[str, str]) -> Iterator[str]:
    position = 0
    while position < len(text):
        if text.startswith("$$", position):
            yield "$"
            position += 2
        elif match := _NAME.match(text, position):
            end = _closing_brace(text, match.end())
            value = variables.get(match["name"], "")
            if value:
                yield value
            elif match["rule"] == ":-":
                yield interpolate(text[match.end() : end], variables)
            else:
                raise NotSet(f"{match['name']}: {text[match.end() : end]}")
            position = end + 1
        else:
            assert text[position] != "$", f"a dollar sign that this reader does not understand: {text}"
            yield text[position]
            position += 1


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise AssertionError(f"a brace is not closed: {text}")


def _service(name: str, body: dict[str, Any], variables: Mapping[str, str]) -> Service:
    assert set(body) <= _KNOWN_KEYS, f"this reader does not know {set(body) - _KNOWN_KEYS} of {name}"

    def filled(value: Any) -> Any:
        match value:
            case str():
                return interpolate(value, variables)
            case list():
                return [filled(each) for each in value]
            case dict():
                return {key: filled(each) for key, each in value.items()}
            case _:
                return value

    body = filled(body)
    # A name without a value is taken from .env; when it is not there either, the process does not get it.
    environment = {
        key: variables.get(key) if value is None else str(value)
        for key, value in body.get("environment", {}).items()
    }
    volumes = dict(each.split(":") for each in body.get("volumes", []))
    return Service(
        name=name,
        image=body["image"],
        built="build" in body,
        entrypoint=_words(body["entrypoint"]) if "entrypoint" in body else None,
        command=_words(body.get("command", [])),
        environment={key: value for key, value in environment.items() if value is not None},
        exposed=tuple(int(port) for port in body.get("expose", [])),
        ports=tuple(body.get("ports", [])),
        profiles=frozenset(body.get("profiles", [])),
        depends_on=tuple(
            Dependency(other, how["condition"], how.get("required", True))
            for other, how in body.get("depends_on", {}).items()
        ),
        health=_words(body.get("healthcheck", {}).get("test", [])),
        restart=body.get("restart", "no"),
        volumes={folder: volume for volume, folder in volumes.items()},
    )


def _words(command: str | list[str]) -> tuple[str, ...]:
    return tuple(shlex.split(command) if isinstance(command, str) else command)
