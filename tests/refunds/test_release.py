"""The one gate between an approved refund and a POST."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from include.refunds.ledger import Ledger, LedgerError, Selection
from include.refunds.release import PreflightFailed, PreflightRefused
from include.refunds.settings import Settings
from include.refunds.source import SourceError, SqlSource
from include.refunds.write_back import write_back
from tests.refunds.conftest import Intercepted, World


def test_releases_the_candidates_oldest_approval_first(world: World) -> None:
    late = world.approve(approved_at="2026-11-21T09:00:00Z")
    early = world.approve(approved_at="2026-11-19T09:00:00Z")
    world.pull()
    ids = world.release()
    assert ids == [world.row(early)["id"], world.row(late)["id"]]
    assert {world.row(ref)["status"] for ref in (early, late)} == {"released"}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(limit=1), ["a"]),
        (Selection(source_refs=("b",)), ["b"]),
        (Selection(processing_terminal_id="7701002"), ["c"]),
        (Selection(), ["a", "b", "c"]),
    ],
)
def test_a_run_is_about_what_its_params_select(
    world: World, selection: Selection, expected: list[str]
) -> None:
    world.approve(source_ref="a")
    world.approve(source_ref="b")
    world.approve(source_ref="c", processing_terminal_id="7701002")
    world.pull()
    ids = world.release(selection=selection)
    assert [world.row(refund_id)["source_ref"] for refund_id in ids] == expected


def test_a_row_withdrawn_after_the_pull_is_not_released(world: World) -> None:
    kept, withdrawn = world.approve(), world.approve()
    world.pull()
    world.change_source(withdrawn, "withdrawn_at = now()")
    assert world.release() == [world.row(kept)["id"]]
    assert world.row(withdrawn)["status"] == "approved"
    findings = world.rows("SELECT findings FROM refund_ledger.refund_runs")[0]["findings"]
    assert findings["withdrawn"] == {str(world.row(withdrawn)["id"]): "Its source row is no longer approved."}


def test_what_was_paused_when_the_source_was_read_is_not_released_though_the_pause_has_ended_since(
    world: World,
) -> None:
    other, paused = world.approve(processing_terminal_id="7701002"), world.approve()
    world.pull()
    world.change_source(paused, "withdrawn_at = now()")
    ids = [world.row(ref)["id"] for ref in (other, paused)]
    read = world.source.select_approved

    async def select_while_the_pause_ends() -> Any:
        rows = await read()
        await world.ledger.pauses.resume(world.terminal, "It was mended.")
        return rows

    async def work() -> list[int]:
        candidates = await world.ledger.runs.candidates(Selection())
        await world.ledger.runs.begin_run("run-1", {}, candidates, {}, datetime.now(UTC))
        await world.ledger.approvals.ask_approval("run-1")
        await world.ledger.pauses.pause(world.terminal, "Something is wrong with it.")
        world.source.select_approved = select_while_the_pause_ends  # type: ignore[method-assign]
        return await world.release_only("run-1", ids)

    assert world.run(work()) == [ids[0]]
    assert world.row(paused)["status"] == "approved"


def test_a_row_changed_after_the_pull_is_not_released(world: World) -> None:
    ref = world.approve()
    world.pull()
    world.change_source(ref, "amount = 1")
    assert world.release() == []
    assert world.row(ref)["status"] == "approved"


def test_a_release_that_a_dead_run_left_over_is_taken_back_when_the_row_was_withdrawn(world: World) -> None:
    ref = world.approve()
    world.pull()
    world.release()
    world.change_source(ref, "withdrawn_at = now()")
    assert world.release("run-2") == []
    assert world.row(ref)["status"] == "approved"


def test_a_release_that_a_dead_run_left_over_is_taken_up_by_the_next_run(world: World) -> None:
    ref = world.approve()
    world.pull()
    assert world.release() == world.release("run-2") == [world.row(ref)["id"]]


def test_without_an_approval_of_exactly_these_candidates_nothing_is_released(world: World) -> None:
    one, other = world.approve(), world.approve()
    world.pull()
    ids = [world.row(ref)["id"] for ref in (one, other)]

    async def edited() -> None:
        candidates = await world.ledger.runs.candidates(Selection(source_refs=(one,)))
        await world.ledger.runs.begin_run("run-1", {}, candidates, {}, datetime.now(UTC))
        await world.ledger.approvals.ask_approval("run-1")
        await world.release_only("run-1", ids)

    with pytest.raises(LedgerError, match="holds no approval of exactly these 2 refunds"):
        world.run(edited())
    assert {world.row(ref)["status"] for ref in (one, other)} == {"approved"}


def test_an_approval_that_was_skipped_releases_nothing(world: World) -> None:
    world.approve()
    world.pull()

    async def marked_success() -> None:
        candidates = await world.ledger.runs.candidates(Selection())
        await world.ledger.runs.begin_run("run-1", {}, candidates, {}, datetime.now(UTC))
        await world.release_only("run-1", [item.id for item in candidates])

    with pytest.raises(LedgerError, match="holds no approval"):
        world.run(marked_success())


def test_a_paused_terminal_is_left_out_and_the_others_go_on(world: World) -> None:
    paused, open_ = world.approve(processing_terminal_id="7701002"), world.approve()
    world.pull()
    world.run(world.ledger.pauses.pause("7701002", "the bank called"))
    assert world.release() == [world.row(open_)["id"]]
    assert world.row(paused)["status"] == "approved"


def test_paused_everything_releases_nothing(world: World) -> None:
    world.approve()
    world.pull()
    world.run(world.ledger.pauses.pause("*", "the bank called"))
    assert world.release() == []


@pytest.mark.parametrize(
    "problem",
    [
        {"problem": "forbidden", "resource": "processingTerminal"},
        {"problem": "capabilities-missing", "parameter": "processingTerminalId"},
        {"problem": "bad-request", "parameter": "processingTerminalId"},
    ],
)
def test_a_terminal_that_payroc_refuses_is_paused_before_any_post_and_the_others_go_on(
    world: World, problem: dict[str, str]
) -> None:
    refused, fine = (
        world.approve(processing_terminal_id="7701001"),
        world.approve(processing_terminal_id="7701002"),
    )
    world.pull()
    # Terminals are asked in their order, so the fault meets the first.
    world.fault(None, "problem", "list", **problem)
    assert world.release() == [world.row(fine)["id"]]
    assert list(world.paused()) == ["7701001"]
    assert {world.row(ref)["attempts"] for ref in (refused, fine)} == {0}


def test_a_refusal_that_is_about_no_terminal_pauses_everything(world: World) -> None:
    world.approve()
    world.pull()
    world.fault(None, "problem", "list", problem="forbidden")
    with pytest.raises(PreflightRefused, match="sending is paused and nothing was released"):
        world.release()
    assert list(world.paused()) == ["*"]


def test_when_payroc_does_not_answer_nothing_is_released_and_nothing_is_paused(world: World) -> None:
    ref = world.approve()
    world.pull()
    world.fault(None, "status", "list", status=503)
    with pytest.raises(PreflightFailed, match="nothing was released, try again later"):
        world.release()
    assert world.row(ref)["status"] == "approved"
    assert world.paused() == {}


def test_a_ledger_belongs_to_one_payroc(world: World) -> None:
    world.approve()
    world.pull()
    world.release()
    other = Intercepted(world.gateway)
    other.environment = "https://api.payroc.com/v1"
    world.gateway = other
    with pytest.raises(
        LedgerError, match=r"belongs to Payroc at http://127.*points to https://api.payroc.com/v1"
    ):
        world.release("run-2")


def test_two_releases_at_a_time_release_each_refund_once(world: World) -> None:
    for _ in range(5):
        world.approve()
    world.pull()

    async def both() -> None:
        for run_id in ("run-1", "run-2"):
            candidates = await world.ledger.runs.candidates(Selection())
            await world.ledger.runs.begin_run(run_id, {}, candidates, {}, datetime.now(UTC))
            await world.ledger.approvals.ask_approval(run_id)
        ids = [item.id for item in candidates]
        await asyncio.gather(world.release_only("run-1", ids), world.release_only("run-2", ids))

    world.run(both())
    events = world.rows("SELECT refund_id FROM refund_ledger.refund_events WHERE to_status = 'released'")
    assert len(events) == 5


def test_what_became_of_a_refund_is_written_back_once(world: World) -> None:
    ref = world.approve()
    world.pull()
    world.send(world.release()[0])
    assert world.write_back() == (1, [])
    row = world.source_row(ref)
    assert (row["status"], row["payroc_status"], row["reason"]) == (
        "accepted",
        "ready",
        "Accepted by Payroc.",
    )
    assert row["payroc_refund_id"] == world.row(ref)["payroc_refund_id"]
    assert world.write_back() == (0, [])


def test_the_errors_of_an_invalid_row_are_written_back(world: World) -> None:
    ref = world.approve(routing_number="123456789")
    world.pull()
    world.write_back()
    row = world.source_row(ref)
    assert row["status"] == "invalid"
    assert row["reason"].startswith("`routing_number` is not a valid ABA routing number")


def test_a_write_back_that_touches_no_row_is_reported_and_stays_due(world: World) -> None:
    ref = world.approve()
    world.pull()
    with world.source_engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM refund_requests")
    assert world.write_back() == (0, [ref])
    assert world.write_back() == (0, [ref])


def test_a_change_that_comes_while_the_source_is_written_stays_due(world: World) -> None:
    ref = world.approve()
    world.pull()
    refund_id = world.release()[0]
    source = world.source

    class Slow:
        async def write_back(self, rows):
            await world.sending(refund_id)
            return await source.write_back(rows)

    world.run(write_back(Slow(), world.ledger.write_backs))
    assert world.source_row(ref)["status"] == "released"
    world.write_back()
    assert world.source_row(ref)["status"] == "accepted"


def test_write_backs_run_one_at_a_time(world: World) -> None:
    world.approve()
    world.pull()
    at_work = 0
    source = world.source

    class Counting:
        async def write_back(self, rows):
            nonlocal at_work
            at_work += 1
            assert at_work == 1
            await asyncio.sleep(0.05)
            at_work -= 1
            return await source.write_back(rows)

    async def three() -> None:
        await asyncio.gather(*(write_back(Counting(), world.ledger.write_backs) for _ in range(3)))

    world.run(three())


def test_a_token_that_payroc_took_back_does_not_stop_a_release(world: World) -> None:
    world.approve()
    world.pull()
    world.run(world.gateway.token())
    world.sandbox.post("/_sandbox/tokens/revoke")
    assert len(world.release()) == 1


def test_an_api_key_that_may_not_read_is_a_refusal_and_pauses_nothing(world: World) -> None:
    world.approve()
    world.pull()
    world.fault(None, "problem", "list", problem="not-authorized", times=2)
    with pytest.raises(
        PreflightRefused, match="with a new token too; nothing was released: check the API key"
    ):
        world.release()
    assert world.paused() == {}


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        (
            "UPDATE refund_requests SET status = :state WHERE source_ref = :source_ref",
            r"unknown parameter :state: it may use",
        ),
        ("UPDATE refund_requests SET status = :status", "does not use the parameter :source_ref"),
        (
            "UPDATE refund_requests SET no_such = :status WHERE source_ref = :source_ref",
            "a column does not exist: no_such",
        ),
    ],
)
def test_an_unusable_write_back_is_told_and_loses_nothing(
    world: World, tmp_path: Path, update: str, sentence: str
) -> None:
    world.approve()
    world.pull()
    file = tmp_path / "write_back.sql"
    file.write_text(update)
    good, world.source = world.source, SqlSource(world.source_engine, write_back=file)
    with pytest.raises(SourceError, match=sentence):
        world.write_back()
    world.source = good
    assert world.write_back() == (1, [])


def test_a_write_back_may_leave_parameters_out_and_use_them_anywhere(world: World, tmp_path: Path) -> None:
    ref = world.approve()
    world.pull()
    file = tmp_path / "write_back.sql"
    file.write_text(
        "UPDATE refund_requests SET reason = concat_ws('/', :status, :reason) WHERE source_ref = :source_ref"
    )
    world.source = SqlSource(world.source_engine, write_back=file)
    assert world.write_back() == (1, [])
    assert world.source_row(ref)["reason"] == "approved"


PRODUCTION = "https://api.payroc.com/v1"


def in_production(world: World) -> Intercepted:
    """Return the gateway to the local Payroc as if it led to production."""
    gateway = Intercepted(world.gateway)
    gateway.environment = PRODUCTION
    return gateway


def test_what_was_pulled_under_the_default_name_is_not_released_to_production(world: World) -> None:
    ref = world.approve()
    world.pull()
    world.gateway = in_production(world)  # type: ignore[assignment]  # it delegates what it lacks
    with pytest.raises(LedgerError, match="PAYROC_REFUNDS_SOURCE is refund_requests, its default"):
        world.release()
    assert world.row(ref)["status"] == "approved"


def test_what_was_released_under_the_default_name_is_not_sent_to_production(world: World) -> None:
    refund_id = world.released()
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET session_replication_role = replica")
        connection.exec_driver_sql("DELETE FROM refund_ledger.bindings WHERE name = 'environment'")
    with pytest.raises(LedgerError, match="set a name of your own, such as acme_refunds"):
        world.send(refund_id, in_production(world))  # type: ignore[arg-type]  # it delegates what it lacks
    assert (world.row(refund_id)["attempts"], world.posts(refund_id)) == (0, 0)


def test_a_source_name_of_ones_own_is_for_production(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_SOURCE", "acme_refunds")
    ledger = Ledger(world.ledger.engine, Settings(), actor="test")
    world.run(ledger.bindings.check_environment(PRODUCTION))
