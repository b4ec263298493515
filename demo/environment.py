"""The environment of everything that the demo starts: nothing of the caller's Airflow, all of the demo's."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from demo.postgres import HOST
from demo.processes import OWNER_VARIABLE
from demo.state import ROOT, Keys, State

# A caller may have a real Airflow, a real ledger or a real Payroc in the environment: the demo must not meet them.
_FOREIGN = ("AIRFLOW", "_AIRFLOW", "PAYROC", "PG", "PYTHON", "OTEL_")

# Short times, so that everything which takes hours in earnest happens while a person watches.
DEMO_SETTINGS = {
    "PAYROC_REFUNDS_UNKNOWN_WAIT_SECONDS": "3",
    "PAYROC_REFUNDS_HTTP_TIMEOUT_SECONDS": "2",
    "PAYROC_REFUNDS_LEASE_MARGIN_SECONDS": "6",
    "PAYROC_REFUNDS_RETRY_DELAY_SECONDS": "2",
    "PAYROC_REFUNDS_RETRIES": "5",
    # Nothing runs by itself: in the demo a person presses the button.
    "PAYROC_REFUNDS_SCHEDULE": "",
    "PAYROC_REFUNDS_FOLLOWUP_SCHEDULE": "",
    "PAYROC_REFUNDS_SUMMARY_SCHEDULE": "",
}
TOKEN_SECONDS = 20
HANG_SECONDS = 8


def connections(keys: Keys, ledger: URL, source: URL, sandbox: str) -> dict[str, dict[str, Any]]:
    """
    Return the three Airflow connections of the project, by id.

    :param sandbox: base URL of the local Payroc, without a path.
    """
    return {
        "payroc_default": {
            "conn_type": "payroc",
            "description": "The local Payroc of the demo",
            "password": keys.payroc_api_key,
            "host": f"{sandbox}/v1",
            # Airflow 3.3.2 tests no connection whose port is empty.
            "port": 0,
            "extra": {"identity_url": sandbox},
        },
        "refunds_ledger": _postgres_connection(ledger, "The refund ledger"),
        "refunds_source": _postgres_connection(source, "The database with the approved refunds"),
    }


def environment(
    state: State,
    keys: Keys,
    *,
    airflow: URL,
    ledger: URL,
    source: URL,
    sandbox: str,
    connections_in_environment: bool = True,
) -> dict[str, str]:
    """
    Return the whole environment for a process of the demo.

    :param connections_in_environment: give Airflow its connections by variables; else they have to be in its database.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    known = connections(keys, ledger, source, sandbox)
    return {
        **kept,
        OWNER_VARIABLE: str(state.folder),
        # setproctitle, which Airflow uses, writes over the environment that is visible from outside, where the owner stands.
        "SPT_NOENV": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")]),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        # A proxy for the internet has no part in calls to this machine.
        "NO_PROXY": ",".join(filter(None, [kept.get("NO_PROXY") or kept.get("no_proxy"), HOST, "localhost"])),
        "no_proxy": ",".join(filter(None, [kept.get("no_proxy") or kept.get("NO_PROXY"), HOST, "localhost"])),
        "AIRFLOW_HOME": str(state.airflow),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__FERNET_KEY": keys.airflow_fernet,
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        # The Test button of the Connections page.
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        # A second wall: bank data should never get to a place where Airflow has to mask it.
        "AIRFLOW__CORE__SENSITIVE_VAR_CONN_NAMES": "account_number,routing_number,secure_token,name_on_account",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": airflow.set(drivername="postgresql+psycopg2").render_as_string(
            hide_password=False
        ),
        "AIRFLOW__API_AUTH__JWT_SECRET": keys.airflow_jwt,
        "AIRFLOW__API__SECRET_KEY": keys.airflow_session,
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(state.logs / "airflow"),
        "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "PAYROC_REFUNDS_ENCRYPTION_KEYS": keys.ledger_encryption,
        "PAYROC_REFUNDS_FINGERPRINT_KEY": keys.ledger_fingerprint,
        "PAYROC_REFUNDS_LEDGER_URL": ledger.set(drivername="postgresql").render_as_string(
            hide_password=False
        ),
        "PAYROC_REFUNDS_SOURCE_URL": source.set(drivername="postgresql").render_as_string(
            hide_password=False
        ),
        "PAYROC_REFUNDS_TOKEN_CACHE_DIR": str(state.folder / "tokens"),
        **DEMO_SETTINGS,
        **(
            {f"AIRFLOW_CONN_{name.upper()}": json.dumps(known[name]) for name in known}
            if connections_in_environment
            else {}
        ),
    }


def _postgres_connection(url: URL, description: str) -> dict[str, Any]:
    return {
        "conn_type": "postgres",
        "description": description,
        "host": url.host,
        "port": url.port,
        "login": url.username,
        "password": url.password,
        "schema": url.database,
    }
