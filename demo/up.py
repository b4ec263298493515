"""`make up`: a local Airflow with its web interface on the demo's data, until Ctrl-C."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from demo import processes
from demo.console import say, step
from demo.errors import DemoError
from demo.files import write_private
from demo.postgres import HOST, free_port, port_is_free
from demo.stack import AIRFLOW_DATABASE, WITHOUT_PROXY, Stack, telling_lines
from demo.state import State

DAGS = ("payroc_refunds", "payroc_refunds_followup")
USER = "admin"

_USUAL_PORT = 8080
_READY_SECONDS = 180
# In the order in which they stop: first who hands out work, last who the tasks report to.
_COMPONENTS = {
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
    "api-server": ["api-server"],
}


def up(state: State) -> int:
    """Run a local Airflow until Ctrl-C or `make down`."""
    with state.locked("make up"), Stack(state) as stack:
        port = _USUAL_PORT if port_is_free(_USUAL_PORT) else free_port()
        address = f"http://{HOST}:{port}"
        env = _environment(stack, address, port)
        with step("Storing the three connections in Airflow", "Connections are in Airflow: payroc_default, refunds_ledger, refunds_source"):
            _store_connections(stack)
        with _components(stack, env) as components:
            with step("Starting Airflow: scheduler, triggerer, DAG processor, API server", "Airflow is running"):
                _wait_until_ready(stack, components, address)
            _welcome(stack, address)
            try:
                _watch(stack, components)
            except KeyboardInterrupt:
                say("\nStopping Airflow, the local Payroc and the database …")
    say("[green]✓[/] Everything has been stopped. The data stays; `make up` goes on with it, `make clean` removes it.")
    return 0


def _environment(stack: Stack, address: str, port: int) -> dict[str, str]:
    passwords = stack.state.airflow / "passwords.json"
    write_private(passwords, json.dumps({USER: stack.keys.admin_password}))
    return stack.environment(connections_in_environment=False) | {
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": address,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        # A slot is held for a whole interval when a task ends at the wrong moment: a second is less to wait than five.
        "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
        # A task that was killed is noticed, and tried again, while a person watches.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
    }


def _store_connections(stack: Stack) -> None:
    # In the database rather than in variables, so that the Connections page shows them and their fields.
    file = stack.state.airflow / "connections.json"
    write_private(file, json.dumps(stack.connections()))
    try:
        stack.run("airflow-connections", "airflow", "connections", "import", "--overwrite", file)
    finally:
        file.unlink()


@contextmanager
def _components(stack: Stack, env: dict[str, str]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in reversed(_COMPONENTS):
            started[name] = stack.start(f"airflow-{name}", "airflow", *_COMPONENTS[name], env=env)
        yield started
    finally:
        stack.ignore_signals()
        for name in _COMPONENTS:
            if name in started:
                processes.stop(started[name])


def _wait_until_ready(stack: Stack, components: dict[str, subprocess.Popen[bytes]], address: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not (_healthy(address) and _dags_are_known(stack)):
        _check_alive(stack, components)
        if time.monotonic() > deadline:
            raise DemoError(f"Airflow did not become ready within {_READY_SECONDS} seconds. Its logs are in {stack.state.logs}.")
        time.sleep(0.5)


def _healthy(address: str) -> bool:
    with suppress(OSError, ValueError), WITHOUT_PROXY.open(f"{address}/api/v2/monitor/health", timeout=5) as answer:
        health: dict[str, Any] = json.load(answer)
        return all(health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "triggerer", "dag_processor"))
    return False


def _dags_are_known(stack: Stack) -> bool:
    with stack.postgres.connect(AIRFLOW_DATABASE) as connection:
        row = connection.execute("SELECT count(*) FROM dag WHERE dag_id = ANY(%s) AND NOT is_stale", [list(DAGS)]).fetchone()
        errors = connection.execute("SELECT filename, stacktrace FROM import_error").fetchone()
    if errors:
        raise DemoError(f"Airflow cannot read {errors[0]}:\n{errors[1]}")
    return bool(row and row[0] == len(DAGS))


def _check_alive(stack: Stack, components: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, process in components.items():
        if processes.has_ended(process):
            log = stack.log(f"airflow-{name}")
            raise DemoError(f"Airflow's {name} has ended by itself. From its log ({log}):\n{telling_lines(log)}")


def _watch(stack: Stack, components: dict[str, subprocess.Popen[bytes]]) -> None:
    while True:
        _check_alive(stack, components)
        time.sleep(1)


def _welcome(stack: Stack, address: str) -> None:
    variables = stack.state.folder / "demo.env"
    names = ("PAYROC_REFUNDS_LEDGER_URL", "PAYROC_REFUNDS_SOURCE_URL", "PAYROC_REFUNDS_ENCRYPTION_KEYS", "PAYROC_REFUNDS_FINGERPRINT_KEY")
    env = stack.environment()
    write_private(variables, "".join(f"export {name}={shlex.quote(env[name])}\n" for name in names))
    say()
    say(f"  Airflow           [bold]{address}[/]")
    say(f"  Login             [bold]{USER}[/]  password [bold]{stack.keys.admin_password}[/]")
    say(f"  Local Payroc      {stack.sandbox_url}  (a page with the refunds that exist there)")
    say(f"  Logs              {stack.state.logs}")
    say()
    say("[bold]What to do[/]")
    say(f"  1. Open {address}/dags/{DAGS[0]} and log in.")
    say("  2. Press Trigger. With dry_run on, the run only reports what it would send; without it, it pays the sample refunds.")
    say("  3. Open the run, and in it the task send_refund: one row per refund, named by its order. The task report sums up.")
    say(f"  4. Look into the ledger from another terminal:  . {variables} && .venv/bin/python -m include.refunds status")
    say()
    say("Nothing runs by itself here: both DAGs have no schedule. Ctrl-C stops everything, and so does `make down`.")
