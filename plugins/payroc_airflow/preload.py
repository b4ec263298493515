"""
Imports what tasks need in the processes that fork them, where a task then finds it for nothing.

A task is a process of its own, forked from the scheduler (LocalExecutor) or from a Celery worker; a DAG file is parsed in a process forked
from the DAG processor. What such a process imports itself, it imports each time anew: for one refund that is more work than all the rest.
Airflow loads this module by the entry point ``airflow.policy`` when each of its processes starts. It must never keep one from starting.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module

log = logging.getLogger(__name__)

_FORKING = (["scheduler"], ["celery", "worker"], ["dag-processor"])

MODULES = (
    # Of Airflow what our DAG files and tasks take, directly or by a connection's type.
    "airflow.dag_processing.bundles.local",
    "airflow.providers.postgres.hooks.postgres",
    "airflow.providers.standard.decorators.python",
    "airflow.providers.standard.operators.empty",
    "airflow.sdk.bases.sensor",
    "airflow.sdk.definitions.decorators",
    "airflow.sdk.execution_time.cache",
    "airflow.sdk.execution_time.timeout",
    "jinja2.ext",
    # What dags/ imports.
    "payroc_airflow.assets",
    "payroc_airflow.deadline",
    "payroc_airflow.notify",
    "payroc_airflow.operators.approval",
    "payroc_airflow.operators.refund",
    "payroc_airflow.pools",
    "payroc_airflow.schedule",
    # What their tasks import when they run.
    "include.refunds.follow_up",
    "include.refunds.message",
    "include.refunds.pull",
    "include.refunds.quiet",
    "include.refunds.rehearse",
    "include.refunds.release",
    "include.refunds.report",
    "include.refunds.send",
    "include.refunds.unwritten",
    "include.refunds.write_back",
    "payroc_airflow.gateway",
    "payroc_airflow.keys",
    "payroc_airflow.refund_metrics",
    "payroc_airflow.source_connection",
    "uvloop",
)


def forks() -> bool:
    """Return whether this process is one of Airflow's that fork others; in any other the imports would be in vain."""
    return any(sys.argv[1 : 1 + len(command)] == command for command in _FORKING)


def preload() -> None:
    """Import what the DAGs and their tasks need, read the settings, and do once what is slow only the first time."""
    for module in MODULES:
        import_module(module)
    _warm()
    from include.refunds.settings import SettingsError, get_settings

    try:
        get_settings()
    except SettingsError as error:
        # People are told where the DAGs are parsed.
        log.debug("%s", error)


def _warm() -> None:
    """Fill the caches of Jinja, by which a task renders its label, and of OpenSSL, by which it opens the shared token and the request."""
    from jinja2.sandbox import SandboxedEnvironment

    from payroc_airflow.token_cache import seal

    SandboxedEnvironment().from_string("{{ refund_label }}").render()
    fernet = seal("warm", "warm")
    fernet.decrypt(fernet.encrypt(b"warm"))


if forks():
    try:
        preload()
    except Exception as error:  # noqa: BLE001 - whatever it is, people are told where the DAGs are parsed
        log.warning(
            "Each task imports what it needs itself, which takes longer (%s: %s).",
            type(error).__name__,
            error,
        )
