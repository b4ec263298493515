"""Console blocks of a document: what they promise, and a shell in which they are executed as they stand there."""

from __future__ import annotations

import difflib
import os
import re
import secrets
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.patience import PATIENCE_SECONDS

ANYTHING = "…"

_FENCE = re.compile(r"^( *)```(\w*)$")
_HEADING = re.compile(r"^## (.+)$")
# An Airflow command imports for seconds, and a run that is waited for may meet a busy machine.


@dataclass(frozen=True)
class Command:
    """
    A command of a document, with what it prints there.

    :param line: number of its line in the document.
    :param text: what people type, continuation lines included.
    :param expected: the lines that follow. ``…`` stands for anything within a line, alone on a line for any number of lines.
    """

    line: int
    text: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """
    A fenced block of a document.

    :param section: the heading that it stands under.
    :param language: word after the fence.
    :param line: number of its first line.
    :param lines: what is in it.
    """

    section: str
    language: str
    line: int
    lines: tuple[str, ...]

    @property
    def commands(self) -> list[Command]:
        """
        The commands of a console block.

        :raises ValueError: when it begins with something else, of which nothing would be checked.
        """
        found: list[Command] = []
        expected: list[str] = []
        continues = False
        for number, line in enumerate(self.lines, self.line):
            if continues:
                found[-1] = Command(found[-1].line, f"{found[-1].text}\n{line}", ())
            elif line.startswith("$ "):
                expected = []
                found.append(Command(number, line.removeprefix("$ "), ()))
            elif not found:
                raise ValueError(f"line {number} is the output of no command: {line}")
            else:
                expected.append(line)
                found[-1] = Command(found[-1].line, found[-1].text, tuple(expected))
            continues = line.endswith("\\") and not expected
        return found


def blocks_of(document: Path) -> list[Block]:
    """Return the fenced blocks of a document, each with the heading above it."""
    found: list[Block] = []
    section, indent, language, begin = "", "", "", 0
    lines = document.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if begin:
            if fence:
                content = tuple(line.removeprefix(indent) for line in lines[begin : number - 1])
                found.append(Block(section, language, begin + 1, content))
                begin = 0
        elif fence:
            indent, language, begin = fence[1], fence[2], number
        elif heading := _HEADING.match(line):
            section = heading[1]
    assert not begin, f"{document.name}: the block that begins at line {begin} has no end"
    return found


def difference(expected: tuple[str, ...], printed: str) -> str | None:
    """Return what differs between what was expected and what was printed, line by line; ``None`` when they agree."""
    # Blank lines around it are nobody's message.
    lines = [line.rstrip() for line in printed.strip("\n").rstrip().splitlines()]
    whole = "".join(
        r"(?:.*\n)*?" if line.strip() == ANYTHING else f"{_pattern(line)}\\n" for line in expected
    )
    if re.fullmatch(whole, "".join(f"{line}\n" for line in lines)):
        return None
    # What agrees with an expected line is shown as that line, so that the rest stands out.
    alike = [
        next(
            (wanted for wanted in expected if wanted != ANYTHING and re.fullmatch(_pattern(wanted), line)),
            line,
        )
        for line in lines
    ]
    return (
        "\n".join(difflib.unified_diff(expected, alike, "in the document", "printed", lineterm="", n=99))
        or "(only the order differs)"
    )


def _pattern(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.rstrip().split(ANYTHING))


class Shell:
    """
    A bash that runs one command after the other, so that what one of them sets is there for the next.

    :param env: its whole environment.
    :param cwd: its working folder.
    """

    def __init__(self, env: Mapping[str, str], cwd: Path) -> None:
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._mark = f"--{secrets.token_hex(8)}--"

    def run(self, command: str) -> str:
        """Run a command and return what it prints, both streams together. ``$?`` is there for the next one."""
        assert self._process.stdin is not None
        # It must not read the commands that follow.
        wrapped = f"{{ {command}\n}} </dev/null; status=$?; printf '%s\\n' {self._mark}; (exit $status)\n"
        self._process.stdin.write(wrapped.encode())
        self._process.stdin.flush()
        return self._output_of(command)

    def close(self) -> None:
        """End the shell, and what a command left running."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _output_of(self, command: str) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        printed = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while self._mark.encode() not in printed:
                assert selector.select(max(0, deadline - time.monotonic())), (
                    f"after {PATIENCE_SECONDS} s still at {command}: {printed!r}"
                )
                read = os.read(self._process.stdout.fileno(), 65536)
                assert read, f"the shell ended in {command}:\n{printed!r}"
                printed += read
        return printed.decode().partition(self._mark)[0]


class Section:
    """
    The console blocks under one heading, executed one after the other.

    :param document: where they stand.
    :param heading: the heading.
    :param shell: what executes them.

    ``left`` are the blocks that were not executed yet; ``failed`` tells whether one printed something else.
    """

    def __init__(self, document: Path, heading: str, shell: Shell) -> None:
        self._document = document
        self._shell = shell
        self.failed = False
        self.left = [
            block for block in blocks_of(document) if (block.section, block.language) == (heading, "console")
        ]

    def step(self) -> None:
        """
        Execute the next block.

        :raises AssertionError: when a command prints something else than the document says, with the difference.
        """
        for command in self.left.pop(0).commands:
            printed = self._shell.run(command.text)
            found = difference(command.expected, printed)
            self.failed = found is not None
            assert not self.failed, (
                f"{self._document.name}:{command.line}: $ {command.text}\n{found}\n\nIt printed:\n{printed}"
            )

    def rest(self) -> None:
        """Execute all blocks that are left."""
        while self.left:
            self.step()
