"""A cluster of the compose file's profile ``celery``, and a merchant with approved refunds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from sqlalchemy import URL

from demo.postgres import HOST
from include.refunds.settings import get_settings
from tests.cluster.cluster import Cluster
from tests.conftest import ROOT, SCRATCH, running_sandbox
from tests.deployment.compose import read, read_env_file
from tests.deployment.conftest import make_env
from tests.deployment.native import NativeDeployment
from tests.refunds.conftest import World
from tests.scheduler.conftest import measured as measured

# A token's life and the margin make the lease: the time for which a refund waits whose worker was killed.
# Longer than two time-outs, without which no POST is begun.
TOKEN_SECONDS = 40
# What a person may write into .env.
SETTINGS = {
    "AIRFLOW_EXECUTOR": "CeleryExecutor",
    "AIRFLOW__CELERY__WORKER_CONCURRENCY": "2",
    "PAYROC_REFUNDS_UNKNOWN_WAIT_SECONDS": "6",
    # Long enough to find and kill the worker whose create Payroc has received; the margin is thrice that.
    "PAYROC_REFUNDS_HTTP_TIMEOUT_SECONDS": "15",
    "PAYROC_REFUNDS_LEASE_MARGIN_SECONDS": "45",
    "PAYROC_REFUNDS_RETRY_DELAY_SECONDS": "2",
    "PAYROC_REFUNDS_RETRIES": "6",
    "PAYROC_REFUNDS_SCHEDULE": "",
    "PAYROC_REFUNDS_FOLLOWUP_SCHEDULE": "",
    "PAYROC_REFUNDS_SUMMARY_SCHEDULE": "",
}
# What an override file may add: a killed worker is noticed while the test waits, and a task that it had reserved is handed out anew.
OVERRIDES = {
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "10",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "40",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """API server, scheduler, DAG processor, triggerer, broker and two workers, beside a local Payroc whose tokens live shortly."""
    folder = SCRATCH / "cluster"
    folder.mkdir(mode=0o711)
    assert make_env(folder / "env").returncode == 0
    with running_sandbox(folder / "sandbox.log", "--token-seconds", str(TOKEN_SECONDS)) as sandbox:
        connection = {
            "conn_type": "payroc",
            "password": "sandbox-key",
            "host": sandbox.api_url,
            "extra": {"identity_url": sandbox.url},
        }
        variables = (
            read_env_file(folder / "env") | SETTINGS | {"AIRFLOW_CONN_PAYROC_DEFAULT": json.dumps(connection)}
        )
        services = read(ROOT / "docker-compose.yaml", variables)
        with NativeDeployment(
            folder / "compose", services, profiles={"celery"}, overrides=OVERRIDES, scale={"worker": 2}
        ) as deployment:
            cluster = Cluster(deployment, sandbox, variables)
            cluster.wait_until_ready()
            yield cluster
            cluster.client.close()


@pytest.fixture(scope="module")
def world(cluster: Cluster) -> Iterator[World]:
    """The merchant, with all rights on ledger and source."""
    deployment, variables = cluster.deployment, cluster.variables
    url = URL.create(
        "postgresql+psycopg",
        "postgres",
        variables["POSTGRES_PASSWORD"],
        HOST,
        deployment.postgres.port,
        "refunds",
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AIRFLOW_CONN_PAYROC_DEFAULT", variables["AIRFLOW_CONN_PAYROC_DEFAULT"])
        get_settings.cache_clear()
        world = World(url, url, cluster.sandbox)
    yield world
    world.ledger_engine.dispose()
    world.source_engine.dispose()
