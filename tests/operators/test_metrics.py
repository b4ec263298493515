"""What is told in metrics, by Airflow's own statistics to a real StatsD listener; and that no figure disturbs a refund."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from airflow.sdk.observability import stats
from airflow.sdk.observability.metrics import stats_utils

from include.refunds.classify import Outcome, Sighting, Verdict
from include.refunds.ledger import Ledger, LedgerEngine
from include.refunds.states import Status
from payroc_airflow import metrics
from payroc_airflow.refund_metrics import count_outcome, report_oldest
from tests.patience import eventually
from tests.receivers import StatsD
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world


@pytest.fixture(autouse=True)
def fresh_configuration() -> Iterator[None]:
    """Whether metrics are on is read once per process."""
    metrics.are_on.cache_clear()
    yield
    metrics.are_on.cache_clear()


@pytest.fixture
def statsd(monkeypatch: pytest.MonkeyPatch) -> Iterator[StatsD]:
    with StatsD() as statsd:
        for name, value in statsd.environment.items():
            monkeypatch.setenv(name, value)
        # As each task process does.
        stats.initialize(factory=stats_utils.get_stats_factory(), export_legacy_names=True)
        yield statsd
    monkeypatch.undo()
    stats.initialize(factory=stats_utils.get_stats_factory(), export_legacy_names=True)


@pytest.fixture
def metered(world: World) -> World:
    """The world, with the ledger as the DAGs use it."""
    world.ledger = Ledger(
        LedgerEngine(world.ledger_engine.url, pool_size=0),
        world.settings,
        actor="test",
        on_record=count_outcome,
    )
    return world


def test_the_age_of_the_oldest_approved_refund_is_told_and_zero_without_one(
    metered: World, statsd: StatsD
) -> None:
    def tell() -> float:
        statsd.lines.clear()
        metered.run(report_oldest(metered.ledger.engine, metered.settings.source))
        (age,) = eventually(lambda: statsd.values("oldest_approved_age"))
        return age

    assert tell() == 0
    metered.approve()
    metered.approve(approved_at=datetime.now(UTC) - timedelta(hours=30))
    metered.pull()
    assert 30 * 3600 <= tell() < 30 * 3600 + 60
    metered.release()
    assert tell() == 0


def test_a_setting_of_airflow_that_is_neither_yes_nor_no_counts_as_no(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIRFLOW__METRICS__STATSD_ON", "perhaps")
    assert metrics.are_on() is False


def test_airflows_configuration_is_read_once_for_all_figures_of_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from airflow.sdk.configuration import conf

    asked: list[str] = []
    monkeypatch.setattr(conf, "getboolean", lambda section, name, **more: asked.append(name))
    for _ in range(3):
        metrics.count("sent")
        with metrics.timed("latency.create_refund"):
            metrics.gauge("oldest_approved_age", 1)
    assert asked == ["statsd_on", "statsd_datadog_enabled", "otel_on"]


def told(statsd: StatsD, *names: str) -> dict[str, float]:
    return {name: sum(statsd.values(name)) for name in names}


def test_outcomes_count_once_however_often_a_refund_is_sent_or_seen_again(
    metered: World, statsd: StatsD
) -> None:
    accepted, rejected, odd, in_doubt = (
        metered.released(ending) for ending in ("4321", "9001", "9013", "9005")
    )
    for refund_id in (accepted, rejected, odd, in_doubt, accepted, rejected, odd):
        metered.send(refund_id)
    eventually(lambda: statsd.values("unknown"))
    outcomes = ("accepted", "rejected", "review", "unknown", "amount.USD", "sent", "attempts")
    assert told(statsd, *outcomes) == dict(zip(outcomes, (1, 1, 1, 1, 4999, 4, 2), strict=True))
    # Whoever finds the payment counts it, and nobody counts it again.
    metered.sandbox.patch(
        f"/_sandbox/refunds/{metered.row(accepted)['payroc_refund_id']}", {"status": "complete"}
    )
    for _ in range(2):
        metered.follow_up()
    assert metered.row(accepted)["status"] == "settled"
    metered.sandbox.patch(
        f"/_sandbox/refunds/{metered.row(accepted)['payroc_refund_id']}", {"status": "returned"}
    )
    metered.follow_up()
    eventually(lambda: statsd.values("returned"))
    assert told(statsd, "accepted", "amount.USD", "returned") == {
        "accepted": 1,
        "amount.USD": 4999,
        "returned": 1,
    }
    assert {"latency.create_refund", "latency.list_refunds"} <= {
        line.partition(":")[0].removeprefix("airflow.payroc_refunds.") for line in statsd.lines
    }


def test_a_refund_that_was_sent_before_the_ledger_forgot_it_counts_as_accepted(
    metered: World, statsd: StatsD
) -> None:
    refund_id = metered.released()
    metered.send(refund_id)
    waits = metered.released()
    verdict = Verdict(
        Outcome.ACCEPTED, "Payroc lists it.", sighting=Sighting("SECOND0001", "ready", Status.ACCEPTED)
    )
    metered.run(metered.ledger.records.record(waits, verdict))
    assert metered.row(waits)["status"] == "accepted"
    eventually(lambda: len(statsd.values("accepted")) == 2)
    assert told(statsd, "review", "accepted", "attempts") == {"review": 0, "accepted": 2, "attempts": 1}


@pytest.mark.parametrize("broken", ["the backend", "the query"])
def test_metrics_that_fail_disturb_no_refund(
    metered: World,
    statsd: StatsD,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("no metrics today")

    if broken == "the backend":
        stats.initialize(factory=fail, export_legacy_names=True)
    else:
        monkeypatch.setattr("payroc_airflow.refund_metrics.oldest_approved_age", fail)
    refund_id = metered.released()
    metered.send(refund_id)
    metered.run(report_oldest(metered.ledger.engine, metered.settings.source))
    assert (metered.row(refund_id)["status"], metered.paid(refund_id)) == ("accepted", 1)
    assert ("The age of the oldest approved refund was not told (RuntimeError)." in caplog.text) == (
        broken == "the query"
    )
    assert ("A metric was not sent (RuntimeError)." in caplog.text) == (broken == "the backend")


def test_where_no_metrics_are_configured_nothing_is_read_for_them(
    metered: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def age(engine: Any, source: str) -> float:
        asked.append(source)
        return 0

    monkeypatch.setattr("payroc_airflow.refund_metrics.oldest_approved_age", age)
    metered.run(report_oldest(metered.ledger.engine, metered.settings.source))
    assert asked == []
    monkeypatch.setenv("AIRFLOW__METRICS__OTEL_ON", "True")
    metrics.are_on.cache_clear()
    metered.run(report_oldest(metered.ledger.engine, metered.settings.source))
    assert asked == [metered.settings.source]
