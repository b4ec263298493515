"""
Hypothesis looks for a sequence of acts that breaks an invariant, on the real Postgres beside the ledger in memory.

Where the seeds draw whole histories, this one chooses each act (approve, run, step, kill, clear, edit, tick, …) and shrinks what it finds
to the few acts that matter.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import URL

from include.refunds.settings import Settings
from tests.conftest import NewDatabase
from tests.simulation.engine import DAY, FREEZES, HOUR, MINUTE, Actor, Engine
from tests.simulation.history import History
from tests.simulation.merchant import remembered_rows
from tests.simulation.payroc import FAULT_NAMES, Temper
from tests.simulation.twins import PostgresLedger, Twins

_SHORT, _LONG = 12, 400

_tempers = st.builds(
    Temper,
    racy=st.booleans(),
    errors_are_saved=st.booleans(),
    key_per_api_key=st.booleans(),
    list_lag=st.sampled_from((0.0, HOUR)),
    list_duplicates=st.booleans(),
)


class Machine(RuleBasedStateMachine):
    """One merchant's world, whose next event is Hypothesis's choice."""

    url: URL

    def __init__(self) -> None:
        super().__init__()
        self.rows = remembered_rows()
        self.rows.__enter__()
        self.planned: dict[str, str] = {}

    @initialize(temper=_tempers)
    def begin(self, temper: Temper) -> None:
        self.history = History(0, temper=temper, new_ledger=self._twins)
        self.engine = self.history.engine
        self.engine.script = self._script
        self.history._approve(1)

    def _twins(self, settings: Settings, engine: Engine) -> Twins:
        return Twins(PostgresLedger(self.url, settings, engine.ledger_time), settings, engine)

    def _script(self, actor: Actor, label: str) -> str | None:
        return self.planned.pop(label, None)

    @precondition(lambda self: len(self.history.merchant.refunds) < 3)
    @rule()
    def approve(self) -> None:
        self.history._approve_another()

    @precondition(lambda self: self.history.airflow.runs < 4)
    @rule(batch_size=st.sampled_from((1, 3)))
    def a_run_begins_whatever_else_runs(self, batch_size: int) -> None:
        self.history.airflow.run(batch_size=batch_size)

    @rule()
    def follow_up(self) -> None:
        self.history.airflow.follow_up()

    @rule(steps=st.integers(1, 60))
    def step(self, steps: int) -> None:
        self.engine.take(steps)

    @rule(seconds=st.sampled_from((MINUTE, 100.0, 20 * MINUTE, 75 * MINUTE, DAY)))
    def tick(self, seconds: float) -> None:
        self.engine.run(until=self.engine.time + seconds)

    @rule(fault=st.sampled_from(FAULT_NAMES))
    def payroc_does_this_to_the_next_post(self, fault: str) -> None:
        self.history.host.planned.append(fault)
        for item in self.history.merchant.refunds.values():
            self.history.invariants.excuse(item, "a fault")

    @rule(
        what=st.sampled_from(("claim", "may_post", "record", "release", "store")),
        side=st.sampled_from(("before", "after")),
    )
    def the_next_call_fails(self, what: str, side: str) -> None:
        self.planned[f"ledger: {side} {what}"] = "fail"

    @rule(
        what=st.sampled_from(
            ("ledger: after claim", "payroc: about to POST", "payroc: answered", "ledger: before record")
        )
    )
    def the_next_worker_dies(self, what: str) -> None:
        self.planned[what] = "die"

    @rule(
        what=st.sampled_from(("ledger: after claim", "payroc: about to POST", "payroc: answered")),
        seconds=st.sampled_from(FREEZES),
    )
    def the_next_worker_stands_still(self, what: str, seconds: float) -> None:
        self.planned[what] = f"freeze {seconds}"

    @precondition(lambda self: self.engine.actors)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        self.engine.kill(data.draw(_one_of(self.engine.actors)))

    @precondition(lambda self: self.history.airflow.tasks)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        data.draw(_one_of(self.history.airflow.tasks)).clear()

    @precondition(lambda self: self.history.airflow.tasks)
    @rule(data=st.data())
    def mark_success(self, data: st.DataObject) -> None:
        data.draw(_one_of(self.history.airflow.tasks)).mark_success()

    @rule()
    def edit(self) -> None:
        self.history._edit()

    @rule()
    def withdraw_or_bring_back(self) -> None:
        self.history._withdraw()

    @rule()
    def resume(self) -> None:
        self.history._resume()

    @rule()
    def time_passes_at_payroc(self) -> None:
        self.history._payroc_moves()

    def teardown(self) -> None:
        try:
            self.engine.script = None
            self.history.host.planned.clear()
            self.history.end()
        finally:
            self.history.ledger.postgres.close()
            self.rows.__exit__(None, None, None)


def _one_of(things: list[Any]) -> st.SearchStrategy[Any]:
    # By number: the things themselves have no words that a shrunk example could show.
    return st.integers(0, len(things) - 1).map(lambda number: things[number])


@pytest.mark.timeout(3600)
def test_no_sequence_of_acts_pays_a_refund_twice_or_loses_it(new_ledger: NewDatabase, long: bool) -> None:
    Machine.url = new_ledger()
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=_LONG if long else _SHORT,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
