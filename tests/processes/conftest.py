"""A merchant's world whose refunds are sent by worker processes, over a line that can be spoilt, to a Payroc whose tokens end soon."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL

from include.refunds.settings import get_settings
from tests.conftest import SCRATCH, NewDatabase, Sandbox, running_sandbox
from tests.dags.conftest import airflow_connection
from tests.processes.line import Line, running
from tests.processes.scheduler import Scheduler
from tests.processes.worker import Try
from tests.refunds.conftest import World

# The lease of a worker that died ends so long after its claim: the token's life and the shortest margin.
LEASE_MARGIN_SECONDS = 5


@pytest.fixture(scope="module")
def token_seconds() -> int:
    """
    How long tokens live: soon ended, so that leases are, and longer than an exchange with Payroc may take after a
    worker has waited for its turn.
    """
    return 15


@pytest.fixture(scope="module")
def sandbox(token_seconds: int, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A local Payroc that holds hanging requests no longer than a test can wait."""
    options = ("--token-seconds", str(token_seconds), "--hang-seconds", "3")
    with running_sandbox(SCRATCH / f"sandbox-of-{request.module.__name__}.log", *options) as sandbox:
        yield sandbox


@pytest.fixture
def line(sandbox: Sandbox) -> Iterator[Line]:
    sandbox.post("/_sandbox/reset")
    with running(sandbox.url) as line:
        yield line


@pytest.fixture
def ledger_url(new_ledger: NewDatabase) -> URL:
    return new_ledger()


@pytest.fixture
def source_url(new_source: NewDatabase) -> URL:
    return new_source()


@pytest.fixture
def timeout_seconds() -> float:
    """How long workers wait for an answer."""
    return 1.5


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Folder of the tokens that workers share."""
    return tmp_path / "tokens"


@pytest.fixture
def connection_extra() -> dict[str, Any]:
    return {}


@pytest.fixture
def world(
    ledger_url: URL,
    source_url: URL,
    sandbox: Sandbox,
    line: Line,
    tokens: Path,
    timeout_seconds: float,
    connection_extra: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    """The world of the ledger's tests; workers find it by the same environment."""
    extra = {"identity_url": line.url, **connection_extra}
    connection = {"conn_type": "payroc", "password": "sandbox-key", "host": f"{line.url}/v1", "extra": extra}
    settings = {
        "TOKEN_CACHE_DIR": tokens,
        "HTTP_TIMEOUT_SECONDS": timeout_seconds,
        "LEASE_MARGIN_SECONDS": max(LEASE_MARGIN_SECONDS, int(3 * timeout_seconds)),
        "UNKNOWN_WAIT_SECONDS": 1,
        "RETRY_DELAY_SECONDS": 1,
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"PAYROC_REFUNDS_{name}", str(value))
    monkeypatch.setenv("AIRFLOW_CONN_PAYROC_DEFAULT", json.dumps(connection))
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", airflow_connection(ledger_url))
    get_settings.cache_clear()
    world = World(ledger_url, source_url, sandbox)
    yield world
    world.ledger_engine.dispose()
    world.source_engine.dispose()


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(slots=4, log=SCRATCH / f"workers-{os.getpid()}.log")


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Tell what a test has measured: it stands at the end of pytest's output, and in the JUnit report."""

    def tell(what: str, **measured: object) -> None:
        text = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in measured.items())
        record_property(what, text)

    return tell


def in_lists(run_id: str, refund_ids: Sequence[int], *sizes: int) -> list[Try]:
    """Return the first tries of a run's send tasks, with so many refunds, in turn."""
    rest, sizes_in_turn, tries = iter(refund_ids), itertools.cycle(sizes), []
    while ids := tuple(itertools.islice(rest, next(sizes_in_turn))):
        tries.append(Try(run_id, len(tries), ids))
    return tries


def open_run(world: World, run_id: str) -> list[int]:
    """Do what a run does before it sends, and return the ids that it may send: new ones, and what earlier runs left in doubt."""
    world.pull()
    return [*world.release(run_id), *world.run(world.ledger.runs.due())]


def bring_to_an_end(world: World, scheduler: Scheduler, each: int = 1) -> None:
    """
    Let undisturbed runs follow each other until nothing is left to send; then follow up and write back.

    :param each: how many refunds a task has.
    """
    for number in range(1, 10):
        run_id = f"undisturbed-{number}"
        refund_ids = open_run(world, run_id)
        if not refund_ids:
            break
        scheduler.run(in_lists(run_id, refund_ids, each))
        paid = world.sandbox.get("/_sandbox/refunds")["refundsPerOrder"]
        assert set(paid.values()) <= {1}, (
            f"paid more than once: {[order_id for order_id, times in paid.items() if times > 1]}"
        )
    assert not open_run(world, "nothing-left"), "runs follow each other and do not end"
    world.follow_up()
    world.write_back()
