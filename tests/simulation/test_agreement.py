"""The ledger in memory and the one in Postgres follow the same rules: the same histories on both, compared after every call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from include.refunds.case import DecisionRefused
from include.refunds.cipher import Sealed
from include.refunds.classify import Outcome, Sighting, Verdict
from include.refunds.ledger import Selection, Task
from include.refunds.settings import Settings
from include.refunds.states import Status
from include.refunds.text import fold
from tests.conftest import NewDatabase
from tests.simulation.conformance import PROTOCOLS, methods_of
from tests.simulation.engine import HOUR, MINUTE, Engine, Violation, at_once
from tests.simulation.history import SETTINGS, Counts, History
from tests.simulation.ledger import MemoryLedger
from tests.simulation.merchant import TERMINALS
from tests.simulation.payroc import HOST, TOKEN_SECONDS, Temper
from tests.simulation.twins import PostgresLedger, Twins

_SHORT, _LONG = 25, 1500


@pytest.mark.timeout(3600)
def test_both_ledgers_agree_after_every_call_of_the_same_histories(
    new_ledger: NewDatabase, long: bool, record_property: Callable[[str, object], None]
) -> None:
    url, counts, calls = new_ledger(), Counts(), 0

    def twins(settings: Settings, engine: Engine) -> Twins:
        return Twins(PostgresLedger(url, settings, engine.ledger_time), settings, engine)

    called: set[str] = set()
    for seed in range(_LONG if long else _SHORT):
        history = History(seed, new_ledger=twins)
        try:
            counts.add(history.run())
            at_once(_what_no_history_does(history.ledger))
            assert history.ledger.postgres.audit() == []
        finally:
            history.ledger.postgres.close()
        calls += history.ledger.calls
        called |= history.ledger.called
    line = f"{counts.histories:,} histories on both ledgers: {calls:,} calls compared, {counts.posts:,} POSTs, {counts.deaths:,} deaths"
    record_property("agreement", line)
    assert calls > 50 * counts.histories
    # The steps call nothing that was not compared.
    assert {name for protocol in PROTOCOLS for name in methods_of(protocol)} <= called


async def _what_no_history_does(ledger: Twins) -> None:
    """What few histories or none call: those of dry runs, rotations and reversals, and what is read seldom."""
    async with ledger.rehearsal():
        candidates = await ledger.candidates(Selection())
        await ledger.begin_run("dry run", {}, candidates, {}, await ledger.now())
        await ledger.at_the_gate([item.id for item in candidates])
        await ledger.note("dry run", {"lists": []})
    if ledger.memory.turn is not None:
        await ledger.end_turn(ledger.memory.turn[0])
    async with ledger.write_back_turn():
        assert not await ledger.take_turn("another")
    await ledger.take_turn("another")
    await ledger.foreign_keys([row.key for row in ledger.memory.rows.values()])
    await ledger.spelled([fold("elsewhere"), *(row.source_ref_folded for row in ledger.memory.rows.values())])
    kept = await ledger.requests_to_rotate("new key", after=0, limit=100)
    await ledger.store_rotated([(item, Sealed(item.request, "new key")) for item in kept[1:]])
    await ledger.note_rotation("new key", len(kept))
    for refund_id in ledger.memory.rows:
        with suppress(DecisionRefused):
            await ledger.intend_reverse(refund_id, "A test reverses it.")


def test_a_ledger_in_memory_that_follows_another_rule_is_found(
    new_ledger: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_ledger()
    monkeypatch.setattr(MemoryLedger, "due", _nothing_due)

    def twins(settings: Settings, engine: Engine) -> Twins:
        return Twins(PostgresLedger(url, settings, engine.ledger_time), settings, engine)

    def play(seed: int) -> None:
        history = History(seed, new_ledger=twins)
        try:
            history.run()
        finally:
            history.ledger.postgres.close()

    def play_many() -> None:
        for seed in range(50):
            play(seed)

    with pytest.raises(Violation, match="After due the memory has"):
        play_many()


def test_calls_that_share_a_transaction_do_what_they_do_one_after_the_other(new_ledger: NewDatabase) -> None:
    url = new_ledger()

    def twins(settings: Settings, engine: Engine) -> Twins:
        return Twins(PostgresLedger(url, settings, engine.ledger_time), settings, engine)

    history = History(0, temper=Temper(), new_ledger=twins)
    ledger, engine = history.ledger, history.engine
    for number in range(1, 13):
        history.merchant.approve(number, processing_terminal_id=TERMINALS[number % 2])
    # The run gets as far as its list, and stands still there.
    engine.script = lambda actor, label: "die" if label == "payroc: queue" else None
    history.airflow.run(batch_size=12)
    engine.run(until=MINUTE)
    assert {row.status for row in ledger.memory.rows.values()} == {Status.RELEASED}

    claim = {"environment": HOST, "sent_with": f"{HOST} key-1", "token_seconds": TOKEN_SECONDS}
    refund_ids = [*ledger.memory.rows]
    for verdicts in _ROUNDS:
        for scope in at_once(ledger.reasons()):
            at_once(ledger.resume(scope, "A test resumes it."))
        claims = ledger.together(
            "claim", [((refund_id, Task("run-1", 0, 1)), claim) for refund_id in (*refund_ids, 999)]
        )
        held = [item for item in claims if item is not None]
        assert held
        at_once(ledger.pause(TERMINALS[0], "A test pauses it."))
        permissions = ledger.together("may_post", [((item, 60.0), {}) for item in held])
        assert len(set(permissions)) == 2
        ledger.together(
            "record",
            [
                ((item.refund.id, verdict if may_post else _NOT_SENT, item.attempt), {})
                for item, verdict, may_post in zip(held, verdicts, permissions, strict=False)
            ],
        )
        ledger.together("read", [((refund_id,), {}) for refund_id in (*refund_ids, 999)])
        # Nobody's record, that of an attempt which is not the last, and one about no refund at all.
        accepted = Verdict(
            Outcome.ACCEPTED, "A test found it.", sighting=Sighting("P000000001", "ready", Status.ACCEPTED)
        )
        others = [
            (refund_ids[0], accepted, None),
            (refund_ids[1], accepted, 7),
            (999, accepted, None),
            (refund_ids[2], _UNKNOWN, 1),
        ]
        ledger.together("record", [(arguments, {}) for arguments in others])
        engine.time += 2 * HOUR
    assert len({row.status for row in ledger.memory.rows.values()}) >= 5
    ledger.postgres.close()


async def _nothing_due(self: MemoryLedger) -> list[int]:
    return []


_UNKNOWN = Verdict(Outcome.UNKNOWN, "No answer came.")
_NOT_SENT = Verdict(Outcome.NOT_SENT, "The last check refused it.")


def _accepted(payroc_refund_id: str) -> Verdict:
    return Verdict(
        Outcome.ACCEPTED, "Accepted.", 201, sighting=Sighting(payroc_refund_id, "ready", Status.ACCEPTED)
    )


# What the attempts of a list come to: the same verdict twice, each other one once, one refund of Payroc's for two, a pause in the middle.
_ROUNDS = (
    (
        _accepted("P000000001"),
        _UNKNOWN,
        Verdict(Outcome.REJECTED, "Declined.", 400, "bad-request"),
        _UNKNOWN,
        _accepted("P000000001"),
        Verdict(Outcome.NOT_SENT, "Paused."),
        Verdict(Outcome.CONFIGURATION, "Refused.", 403, "forbidden", pause=TERMINALS[1]),
        Verdict(Outcome.REVIEW, "Strange."),
        Verdict(Outcome.UNKNOWN, "Refused.", 401, "not-authorized"),
        _accepted("P000000002"),
        Verdict(Outcome.UNKNOWN, "In use.", 409, "idempotency-key-in-use"),
    ),
    (
        _accepted("P000000003"),
        Verdict(Outcome.REJECTED, "Declined.", 400, "bad-request"),
        _accepted("P000000002"),
        _UNKNOWN,
    ),
)


def test_the_simulated_ledger_has_every_setting_of_the_real_one() -> None:
    assert SETTINGS.key_window_days == Settings().key_window_days
    assert SETTINGS.unknown_wait_seconds == Settings().unknown_wait_seconds
    assert SETTINGS.lease_margin_seconds == Settings().lease_margin_seconds
