"""Whether the pool exists, asked the way a task asks it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from payroc_airflow.pools import pool_exists
from tests.patience import PATIENCE_SECONDS, eventually

ROOT = Path(__file__).parents[2]
PATH = "/payroc-refunds/pools/payroc_api"


@pytest.fixture
def api_server(payroc, monkeypatch):
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", f"{payroc.url}/execution/")
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", f"{payroc.url}/other")
    return payroc


@pytest.mark.parametrize("exists", [True, False])
def test_the_server_of_the_tasks_api_is_asked_first(api_server, reply, exists) -> None:
    api_server.on("GET", PATH, reply(200, {"pool": "payroc_api", "exists": exists}))
    assert pool_exists("payroc_api") is exists
    assert len(api_server.seen) == 1


def test_the_other_server_is_asked_when_that_one_has_no_plugins(api_server, reply) -> None:
    api_server.on("GET", f"/other{PATH}", reply(200, {"pool": "payroc_api", "exists": True}))
    assert pool_exists("payroc_api") is True


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>Airflow</html>"),
        (200, {"pool": "payroc_api"}),
        (200, {"pool": "payroc_api", "exists": "yes"}),
        (200, {"pool": "another", "exists": True}),
        (200, []),
        (401, {"pool": "payroc_api", "exists": True}),
        (302, b""),
        (500, b""),
    ],
)
def test_only_the_plugins_own_words_count(api_server, reply, status, body) -> None:
    api_server.on("GET", PATH, reply(status, body, {"Location": f"{api_server.url}/x"}))
    assert pool_exists("payroc_api") is None


def test_without_an_api_server_it_can_not_be_told(monkeypatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", "http://127.0.0.1:9/execution/")
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "http://127.0.0.1:9")
    assert pool_exists("payroc_api") is None


def test_under_airflow_dags_test_nobody_is_asked(api_server, reply, monkeypatch) -> None:
    from airflow.sdk.execution_time import task_runner
    from airflow.sdk.execution_time.supervisor import InProcessSupervisorComms

    api_server.on("GET", PATH, reply(200, {"pool": "payroc_api", "exists": False}))
    monkeypatch.setattr(
        task_runner, "SUPERVISOR_COMMS", InProcessSupervisorComms(supervisor=None), raising=False
    )
    assert pool_exists("payroc_api") is None
    assert api_server.seen == []


def test_a_real_api_server_tells_whether_the_pool_exists(tmp_path, monkeypatch) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    database = tmp_path / "airflow.db"
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'plugins'}",
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{database}",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__BASE_URL": base,
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{base}/execution/",
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }
    monkeypatch.setenv(
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL", env["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"]
    )
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", base)
    airflow = str(Path(sys.executable).with_name("airflow"))
    subprocess.run([airflow, "db", "migrate"], env=env, check=True, capture_output=True)
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [airflow, "api-server"], env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        eventually(lambda: pool_exists("payroc_api") is not None or server.poll() is not None, pause=0.2)
        assert pool_exists("payroc_api") is False, (tmp_path / "server.log").read_text()
        with sqlite3.connect(database) as connection:
            connection.execute(
                "INSERT INTO slot_pool (pool, slots, include_deferred) VALUES ('payroc_api', 4, 0)"
            )
        assert pool_exists("payroc_api") is True
        # Nothing else is told to whoever asks without a login.
        assert pool_exists("default_pool") is None
        assert requests.post(f"{base}{PATH}", timeout=PATIENCE_SECONDS).status_code == 404
        # Airflow can describe the plugin, which its UI does.
        plugins = requests.get(
            f"{base}/api/v2/plugins", headers=_login(base), timeout=PATIENCE_SECONDS
        ).json()["plugins"]
        assert "payroc_refunds" in {plugin["name"] for plugin in plugins}
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _login(base: str) -> dict[str, str]:
    token = requests.get(f"{base}/auth/token", timeout=PATIENCE_SECONDS).json()["access_token"]
    return {"Authorization": f"Bearer {token}"}
