"""What the demo says when something it started has failed."""

from __future__ import annotations

from pathlib import Path

from demo.stack import telling_lines


def test_of_a_long_log_the_errors_are_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = [
        "2026-11-23T05:54:44Z [info     ] Filling up the DagBag",
        "2026-11-23T05:54:45Z [error    ] LEASE_MARGIN_SECONDS is too small",
    ]
    log.write_text("\n".join(lines + ["  File somewhere, line 1"] * 50))
    assert telling_lines(log) == lines[1]


def test_of_a_log_without_errors_the_end_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n\n".join(str(number) for number in range(100)))
    assert telling_lines(log).split() == [str(number) for number in range(85, 100)]


def test_a_log_that_is_not_there_is_no_second_failure(tmp_path: Path) -> None:
    assert telling_lines(tmp_path / "log") == "(it is empty)"
