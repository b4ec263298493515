"""The ledger in memory and the one in Postgres follow the same rules: the same histories on both, compared after every call."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from include.refunds.settings import Settings
from tests.conftest import NewDatabase
from tests.simulation.engine import Engine, Violation
from tests.simulation.history import SETTINGS, Counts, History
from tests.simulation.ledger import MemoryLedger
from tests.simulation.twins import PostgresLedger, Twins

_SHORT, _LONG = 25, 1500


@pytest.mark.timeout(3600)
def test_both_ledgers_agree_after_every_call_of_the_same_histories(
    new_ledger: NewDatabase, long: bool, record_property: Callable[[str, object], None]
) -> None:
    url, counts, calls = new_ledger(), Counts(), 0

    def twins(settings: Settings, engine: Engine) -> Twins:
        return Twins(PostgresLedger(url, settings, engine.ledger_time), settings, engine)

    for seed in range(_LONG if long else _SHORT):
        history = History(seed, new_ledger=twins)
        try:
            counts.add(history.run())
        finally:
            history.ledger.postgres.close()
        calls += history.ledger.calls
    line = f"{counts.histories:,} histories on both ledgers: {calls:,} calls compared, {counts.posts:,} POSTs, {counts.deaths:,} deaths"
    record_property("agreement", line)
    assert calls > 50 * counts.histories


def test_a_ledger_in_memory_that_follows_another_rule_is_found(new_ledger: NewDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_ledger()
    monkeypatch.setattr(MemoryLedger, "due", lambda self: [])

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


def test_the_simulated_ledger_has_every_setting_of_the_real_one() -> None:
    assert SETTINGS.key_window_days == Settings().key_window_days
    assert SETTINGS.unknown_wait_seconds == Settings().unknown_wait_seconds
    assert SETTINGS.lease_margin_seconds == Settings().lease_margin_seconds
