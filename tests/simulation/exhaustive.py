"""
Everything that can happen to one attempt of one refund, or of two in one list: every point × what happens there × everything Payroc may do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.simulation.engine import HOUR, Actor, Violation
from tests.simulation.history import History
from tests.simulation.merchant import remembered_rows
from tests.simulation.payroc import FAULT_NAMES, Temper

ACTIONS = ("die", "fail", "freeze 100", "freeze 4500", "freeze 691200")

# What happened to the attempt before, when the second one is tried.
EARLIER = ("lost after", "lost before", "500 before", "401")

_TEMPERS = (
    Temper(racy=True),
    Temper(errors_are_saved=True, list_lag=HOUR),
)


@dataclass(frozen=True, slots=True)
class Case:
    """
    One thing that happens.

    :param earlier: what Payroc did to the first attempt, when this is about the second; empty for the first.
    :param fault: what Payroc does to this attempt; empty for nothing unusual.
    :param action: what happens to the worker.
    :param point: at which of its points, from 0.
    :param temper: which of the two Payrocs.
    :param refunds: how many there are, sent side by side; Payroc does it to the first that it gets.
    """

    earlier: str
    fault: str
    action: str
    point: int
    temper: int
    refunds: int


class OneList(History):
    """The history of a case; ``reached`` tells whether its point was."""

    def __init__(self, case: Case) -> None:
        super().__init__(0, temper=_TEMPERS[case.temper])
        self.people_decide = False
        self.case = case
        self.reached = False
        self._points = 0
        self._try = " try 2" if case.earlier else " try 1"

    def play(self) -> None:
        """Let it happen, and see it end well."""
        for number in range(1, self.case.refunds + 1):
            self.merchant.approve(number)
        self.host.planned = [
            fault for fault in (self.case.earlier, self.case.fault) if fault or self.case.earlier
        ]
        self.engine.script = self._script
        self.airflow.run(batch_size=self.case.refunds)
        self.engine.run(until=3 * HOUR)
        self.engine.script = None
        self.end()

    def _script(self, actor: Actor, label: str) -> str | None:
        if "send[" not in actor.name or not actor.name.endswith(self._try):
            return None
        self._points += 1
        if self._points != self.case.point + 1:
            return None
        self.reached = True
        return self.case.action


def every_case() -> Iterator[tuple[str, str, str, int, int]]:
    """Yield what is tried at each point: earlier, fault, action, temper, refunds."""
    for fault in ("", *FAULT_NAMES):
        for action in ACTIONS:
            for temper in range(len(_TEMPERS)):
                for earlier in ("", *EARLIER):
                    yield earlier, fault, action, temper, 1
                yield "", fault, action, temper, 2


def try_every_point(
    earlier: str, fault: str, action: str, temper: int, refunds: int
) -> tuple[int, list[tuple[Case, str]]]:
    """Play the case at each point in turn, until the worker has no more; return how many, and what broke."""
    broken = []
    point = 0
    while True:
        case = Case(earlier, fault, action, point, temper, refunds)
        history = OneList(case)
        try:
            with remembered_rows():
                history.play()
        except Violation as violation:
            broken.append((case, str(violation)))
        if not history.reached:
            return point, broken
        point += 1
