"""Runs and follow-ups seal the events that they leave, and show the head of the trail."""

from __future__ import annotations

import pytest
from sqlalchemy import URL

from include.refunds.ledger import LedgerUnavailable
from include.refunds.ledger.seals import Seals
from tests.dags.conftest import Runner
from tests.refunds.conftest import World
from tests.refunds.test_seals import audit

DAGS = ("payroc_refunds", "payroc_refunds_followup")


@pytest.mark.parametrize("dag_id", DAGS)
def test_a_run_seals_all_events_and_shows_the_head(
    world: World, run_dag: Runner, ledger_url: URL, dag_id: str
) -> None:
    world.send(world.released())
    assert audit(ledger_url).unsealed > 0
    run = run_dag(dag_id)
    assert run.state == "success"
    found = audit(ledger_url)
    assert (found.unsealed, found.findings) == (0, [])
    assert run.result["audit_head"] == str(found.head)


@pytest.mark.parametrize("dag_id", DAGS)
def test_a_run_that_cannot_seal_says_so_and_stays_green(
    world: World, run_dag: Runner, monkeypatch: pytest.MonkeyPatch, dag_id: str
) -> None:
    async def seal(self: Seals) -> None:
        raise LedgerUnavailable("The ledger database has gone.")

    monkeypatch.setattr(Seals, "seal", seal)
    world.send(world.released())
    run = run_dag(dag_id)
    assert run.state == "success"
    assert [note for note in run.result["notes"] if "not sealed yet" in note] == [
        "The newest events are not sealed yet; the next run or command seals them. "
        "The ledger database has gone."
    ]
