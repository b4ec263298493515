"""The deployment of the scheduler's tests, made to say as much as it can."""

from __future__ import annotations

import json
from pathlib import Path

from sqlalchemy import URL, make_url

from demo.postgres import PostgresServer
from tests.conftest import ROOT, Sandbox
from tests.patience import eventually
from tests.scheduler.deployment import DAG, Deployment

FOLLOW_UP_DAG = "payroc_refunds_followup"
# The DAG that pays, with loggers that Airflow silences otherwise.
LOUD_DAG = "payroc_refunds_loud"

_TALKATIVE = {
    "AIRFLOW__LOGGING__LOGGING_LEVEL": "DEBUG",
    "AIRFLOW__LOGGING__UVICORN_LOGGING_LEVEL": "DEBUG",
    "AIRFLOW__API__EXPOSE_STACKTRACE": "True",
    "AIRFLOW__API__MAXIMUM_PAGE_LIMIT": "10000",
    "AIRFLOW__API__EXPOSE_CONFIG": "non-sensitive-only",
    # Airflow masks what carries these names. Bank data must not even get to where it would have to.
    "AIRFLOW__CORE__SENSITIVE_VAR_CONN_NAMES": "",
}
# Short times, as far as the settings allow it.
_SETTINGS = {
    "PAYROC_REFUNDS_UNKNOWN_WAIT_SECONDS": "1",
    "PAYROC_REFUNDS_HTTP_TIMEOUT_SECONDS": "1",
    # As many as a sandbox with the loudest loggers answers in that time, beside whatever else the machine does.
    "PAYROC_REFUNDS_REQUESTS_IN_FLIGHT": "16",
    "PAYROC_REFUNDS_LEASE_MARGIN_SECONDS": "5",
    "PAYROC_REFUNDS_RETRY_DELAY_SECONDS": "1",
    # More than the faults that one task meets, so that each list comes to its end.
    "PAYROC_REFUNDS_RETRIES": "8",
    # It has to be quick at nothing: no task is killed, and no DAG changes.
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "300",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.4",
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "600",
}
# http.client prints what it sends and receives.
_PRINT_HTTP = """
import http.client

http.client.HTTPConnection.debuglevel = 1
"""
# SQLAlchemy logs statements, their parameters and the rows that they return. Airflow silences it when it sets up a task, so the DAG
# itself has to make it speak.
_LOUD_LOGGERS = """
for _name in ("sqlalchemy.engine", "sqlalchemy.engine.Engine", "sqlalchemy.pool", "httpx"):
    logging.getLogger(_name).setLevel(logging.DEBUG)
    logging.getLogger(_name).debug("It speaks.")
"""


class TalkativeDeployment(Deployment):
    """
    A running Airflow at level DEBUG, with its connections in its own database.

    :param identity_url: where it gets its bearer tokens.
    """

    def __init__(
        self,
        folder: Path,
        postgres: PostgresServer,
        ledger: URL,
        source: URL,
        sandbox: Sandbox,
        identity_url: str,
    ) -> None:
        super().__init__(folder, postgres, ledger, source, sandbox)
        (folder / "tmp").mkdir()
        self._env |= _TALKATIVE | _SETTINGS | {"TMPDIR": str(folder / "tmp")}
        self.connections = {
            name.removeprefix("AIRFLOW_CONN_").lower(): json.loads(self._env.pop(name))
            for name in list(self._env)
            if name.startswith("AIRFLOW_CONN_")
        }
        self.connections["payroc_default"]["extra"]["identity_url"] = identity_url
        dags = folder / "dags"
        (dags / f"{FOLLOW_UP_DAG}.py").write_text((ROOT / "dags" / f"{FOLLOW_UP_DAG}.py").read_text())
        code = (dags / f"{DAG}.py").read_text()
        (dags / f"{LOUD_DAG}.py").write_text(code.replace(f'"{DAG}"', f'"{LOUD_DAG}"') + _LOUD_LOGGERS)
        with (folder / "airflow" / "config" / "airflow_local_settings.py").open("a") as local_settings:
            local_settings.write(_PRINT_HTTP)

    def start(self) -> None:
        """Start everything, and create the connections in Airflow's database, as people do."""
        super().start()
        eventually(lambda: self.client.is_ready(FOLLOW_UP_DAG, LOUD_DAG), "all DAGs are there")
        for conn_id, fields in self.connections.items():
            extra = {"extra": json.dumps(fields["extra"])} if "extra" in fields else {}
            self.client._request("POST", "/connections", json={"connection_id": conn_id} | fields | extra)

    @property
    def env(self) -> dict[str, str]:
        """The environment of its processes."""
        return self._env

    @property
    def metadata(self) -> URL:
        """Airflow's own database."""
        return make_url(self._env["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
