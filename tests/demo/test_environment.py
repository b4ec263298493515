"""What the processes of the demo find in their environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from demo.environment import DEMO_SETTINGS, HANG_SECONDS, environment
from demo.state import Keys, State
from include.refunds.ledger_url import ledger_url, source_url
from include.refunds.settings import get_settings

SERVER = URL.create("postgresql+psycopg", "postgres", "p@ss/word", "127.0.0.1", 5433)


def demo_environment(tmp_path: Path, *, connections_in_environment: bool = True) -> dict[str, str]:
    databases = {
        "airflow": SERVER.set(database="airflow"),
        "ledger": SERVER.set(database="refunds"),
        "source": SERVER.set(database="shop"),
    }
    return environment(
        State(tmp_path),
        Keys.draw(),
        **databases,
        sandbox="http://127.0.0.1:8089",
        connections_in_environment=connections_in_environment,
    )


@pytest.mark.parametrize(
    "name",
    [
        "AIRFLOW_CONN_PAYROC_PRODUCTION",
        "AIRFLOW__CORE__PLUGINS",
        "PAYROC_REFUNDS_SOURCE",
        "PGPASSWORD",
        "PGHOST",
        "PYTHONSTARTUP",
    ],
)
def test_nothing_of_the_callers_airflow_ledger_or_payroc_gets_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "of the caller")
    assert name not in demo_environment(tmp_path)


def test_the_connections_lead_to_this_machine_only(tmp_path: Path) -> None:
    env = demo_environment(tmp_path)
    found = {name: json.loads(value) for name, value in env.items() if name.startswith("AIRFLOW_CONN_")}
    assert set(found) == {
        "AIRFLOW_CONN_PAYROC_DEFAULT",
        "AIRFLOW_CONN_REFUNDS_LEDGER",
        "AIRFLOW_CONN_REFUNDS_SOURCE",
    }
    assert found["AIRFLOW_CONN_PAYROC_DEFAULT"]["host"] == "http://127.0.0.1:8089/v1"
    assert {each["host"] for name, each in found.items() if name != "AIRFLOW_CONN_PAYROC_DEFAULT"} == {
        "127.0.0.1"
    }
    assert not any(
        name.startswith("AIRFLOW_CONN_")
        for name in demo_environment(tmp_path, connections_in_environment=False)
    )


def test_airflow_and_the_command_line_find_the_same_databases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = demo_environment(tmp_path)
    for name in [name for name in env if name.startswith(("AIRFLOW_CONN_", "PAYROC_REFUNDS_"))]:
        monkeypatch.setenv(name, env[name])
    by_variable = ledger_url(), source_url()
    monkeypatch.delenv("PAYROC_REFUNDS_LEDGER_URL")
    monkeypatch.delenv("PAYROC_REFUNDS_SOURCE_URL")
    assert (
        (ledger_url(), source_url())
        == by_variable
        == (SERVER.set(database="refunds"), SERVER.set(database="shop"))
    )


def test_calls_to_this_machine_never_go_through_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet.example.com")
    assert demo_environment(tmp_path)["NO_PROXY"] == "intranet.example.com,127.0.0.1,localhost"


def test_the_settings_of_the_demo_fit_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in DEMO_SETTINGS.items():
        monkeypatch.setenv(name, value)
    settings = get_settings()
    assert (settings.schedule, settings.followup_schedule) == ("", "")
    # Otherwise nothing would ever look like a time-out.
    assert settings.http_timeout_seconds < HANG_SECONDS
