"""
Figures about the refunds, by Airflow's own metrics: StatsD or OpenTelemetry, as ``[metrics]`` says.

Where no metrics are configured, nothing is computed. What goes wrong here disturbs no refund.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

log = logging.getLogger(__name__)

_PREFIX = "payroc_refunds"


@cache
def are_on() -> bool:
    """Return whether Airflow sends metrics anywhere; its configuration is read once per process (``are_on.cache_clear()`` forgets it)."""
    from airflow.sdk.configuration import conf
    from airflow.sdk.exceptions import AirflowConfigException

    try:
        return any(
            conf.getboolean("metrics", name, fallback=False)
            for name in ("statsd_on", "statsd_datadog_enabled", "otel_on")
        )
    except AirflowConfigException:
        # Neither yes nor no: Airflow's own processes do not even start with it, and a command has money to move.
        return False


def count(name: str, by: int = 1) -> None:
    """Add to a counter."""
    _emit(lambda stats: stats.incr(f"{_PREFIX}.{name}", by))


def gauge(name: str, value: float) -> None:
    """Set a gauge."""
    _emit(lambda stats: stats.gauge(f"{_PREFIX}.{name}", value))


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Measure how long something takes, whether it succeeds or not."""
    if not are_on():
        yield
        return
    begin = time.perf_counter()
    try:
        yield
    finally:
        milliseconds = (time.perf_counter() - begin) * 1000
        _emit(lambda stats: stats.timing(f"{_PREFIX}.{name}", milliseconds))


def _emit(send: Callable[[Any], None]) -> None:
    if not are_on():
        return
    try:
        from airflow.sdk.observability import stats

        send(stats)
    except Exception as error:  # noqa: BLE001 - a backend may raise anything, and no figure is worth a refund
        log.warning("A metric was not sent (%s).", type(error).__name__)
