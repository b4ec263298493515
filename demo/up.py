"""`make up`: a local Airflow with its web interface on the demo's data, until Ctrl-C."""

from __future__ import annotations

import json
import secrets
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.markup import escape

from demo import processes
from demo.console import say, step
from demo.errors import DemoError
from demo.files import write_private
from demo.postgres import HOST, claimed_port
from demo.result import count_by_status, money
from demo.stack import AIRFLOW_DATABASE, WITHOUT_PROXY, Stack, telling_lines
from demo.state import State

DAGS = ("payroc_refunds", "payroc_refunds_followup")
# Who can log in, with their roles. Both may trigger a run and approve one; nobody may do both with the same.
USERS = {"olivia": "op", "fiona": "user"}
# In minor units: a run that passes it asks.
THRESHOLD = 100_000

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
    with state.locked("make up"), Stack(state) as stack, claimed_port(_USUAL_PORT) as port:
        address = f"http://{HOST}:{port}"
        passwords = _passwords(state)
        env = _environment(stack, address, port)
        with step(
            "Storing the three connections in Airflow",
            "Connections are in Airflow: payroc_default, refunds_ledger, refunds_source",
        ):
            _store_connections(stack)
        with step(
            "Setting a threshold in the ledger",
            f"A day's refunds over {money(THRESHOLD, 'USD')} wait for a second person's yes",
        ):
            _set_threshold(stack)
        with _components(stack, env) as components:
            with step(
                "Starting Airflow: scheduler, triggerer, DAG processor, API server", "Airflow is running"
            ):
                _wait_until_ready(stack, components, address)
            _welcome(stack, address, passwords)
            try:
                _watch(stack, components)
            except KeyboardInterrupt:
                say("\nStopping Airflow, the local Payroc and the database …")
    say(
        "[green]✓[/] Everything has been stopped. The data stays; `make up` goes on with it, `make reset` removes it."
    )
    return 0


def _passwords(state: State) -> dict[str, str]:
    """Return the users' passwords, each drawn once, and keep them where Airflow looks for them."""
    file = _passwords_file(state)
    known = json.loads(file.read_text()) if file.exists() else {}
    passwords = {user: known.get(user) or secrets.token_urlsafe(9) for user in USERS}
    write_private(file, json.dumps(passwords))
    return passwords


def _passwords_file(state: State) -> Path:
    return state.airflow / "passwords.json"


def _environment(stack: Stack, address: str, port: int) -> dict[str, str]:
    return stack.environment(connections_in_environment=False) | {
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": address,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(
            f"{user}:{role}" for user, role in USERS.items()
        ),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(_passwords_file(stack.state)),
        "PAYROC_REFUNDS_APPROVERS": ",".join(USERS),
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


def _set_threshold(stack: Stack) -> None:
    reason = "A second person looks at what a day releases above it."
    stack.run(
        "limit",
        "include.refunds",
        "limit",
        "approval_total",
        str(THRESHOLD),
        "--reason",
        reason,
        "--by",
        "make up",
    )


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
            raise DemoError(
                f"Airflow did not become ready within {_READY_SECONDS} seconds. Its logs are in {stack.state.logs}."
            )
        time.sleep(0.5)


def _healthy(address: str) -> bool:
    with (
        suppress(OSError, ValueError),
        WITHOUT_PROXY.open(f"{address}/api/v2/monitor/health", timeout=5) as answer,
    ):
        health: dict[str, Any] = json.load(answer)
        return all(
            health[part]["status"] == "healthy"
            for part in ("metadatabase", "scheduler", "triggerer", "dag_processor")
        )
    return False


def _dags_are_known(stack: Stack) -> bool:
    with stack.postgres.connect(AIRFLOW_DATABASE) as connection:
        row = connection.execute(
            "SELECT count(*) FROM dag WHERE dag_id = ANY(%s) AND NOT is_stale", [list(DAGS)]
        ).fetchone()
        errors = connection.execute("SELECT filename, stacktrace FROM import_error").fetchone()
    if errors:
        raise DemoError(f"Airflow cannot read {errors[0]}:\n{errors[1]}")
    return bool(row and row[0] == len(DAGS))


def _check_alive(stack: Stack, components: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, process in components.items():
        if processes.has_ended(process):
            log = stack.log(f"airflow-{name}")
            raise DemoError(
                f"Airflow's {name} has ended by itself. From its log ({log}):\n{telling_lines(log)}"
            )


def _watch(stack: Stack, components: dict[str, subprocess.Popen[bytes]]) -> None:
    while True:
        _check_alive(stack, components)
        time.sleep(1)


def _welcome(stack: Stack, address: str, passwords: dict[str, str]) -> None:
    variables = stack.state.folder / "demo.env"
    names = (
        "PAYROC_REFUNDS_LEDGER_URL",
        "PAYROC_REFUNDS_SOURCE_URL",
        "PAYROC_REFUNDS_ENCRYPTION_KEYS",
        "PAYROC_REFUNDS_FINGERPRINT_KEY",
    )
    env = stack.environment()
    write_private(variables, "".join(f"export {name}={shlex.quote(env[name])}\n" for name in names))
    one, other = USERS
    say()
    say(f"  Airflow           [bold]{address}[/]")
    for user, password in passwords.items():
        say(f"  Login             [bold]{user}[/]  password [bold]{password}[/]")
    say(f"  Local Payroc      {stack.sandbox_url}  (a page with the refunds that exist there)")
    say(f"  Logs              {escape(str(stack.state.logs))}")
    say()
    say("[bold]What to do[/]")
    say(f"  1. Open {address}/dags/{DAGS[0]} and log in as {one}.")
    say(
        "  2. Press Trigger. With dry_run on, the run only reports what it would send; without it, it pays the sample refunds."
    )
    say(
        f"  3. Above {money(THRESHOLD, 'USD')} the run waits at approve_run. Who triggered it can't approve it: log in as {other}"
    )
    say(f"     in a private window, open {address}/required_actions and answer.")
    say(
        "  4. Open the run, and in it the task send_refund: one row per refund, named by its order. The task report sums up."
    )
    say(
        f"  5. Look into the ledger from another terminal:  . {variables} && .venv/bin/python -m include.refunds status"
    )
    say()
    if hint := _nothing_to_send(stack):
        say(hint)
    say(
        "Nothing runs by itself here: both DAGs have no schedule. Ctrl-C stops everything, and so does `make down`."
    )


def _nothing_to_send(stack: Stack) -> str | None:
    """Return what can be done to see a run that is about something, when the next one would be about nothing."""
    with stack.ledger() as ledger:
        counts = count_by_status(ledger)
        held = ledger.execute("SELECT min(id) FROM refund_ledger.refunds WHERE status = 'held'").fetchone()
    if not counts or "approved" in counts:
        return None
    if held and held[0]:
        return f"All but the held refunds have been sent: with `unhold {held[0]} --reason …` in place of `status`, a run has one to send."
    return "The sample refunds have been sent, so a run is about nothing. `make reset` removes the data, and then it starts afresh."
