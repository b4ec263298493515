"""`make demo` itself, killed in the middle and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest

from demo import processes
from demo.postgres import PostgresServer
from demo.result import count_by_status
from demo.stack import LEDGER_DATABASE
from demo.state import FOLDER_VARIABLE, State
from tests.conftest import ROOT, SCRATCH
from tests.patience import eventually

FOLDER = SCRATCH / "demo"
REFUSED_BY_PAYROC = "SO-104309"
COMMAND = [sys.executable, "-m", "demo"]


@pytest.fixture
def env() -> Iterator[dict[str, str]]:
    demo = {**os.environ, FOLDER_VARIABLE: str(FOLDER)}
    yield demo
    subprocess.run([*COMMAND, "reset"], cwd=ROOT, env=demo, check=True)


def test_on_the_data_of_a_version_before_1_0_it_names_make_reset(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(FOLDER))
    with PostgresServer(State.open().postgres) as server:
        server.create_database(LEDGER_DATABASE)
        with server.connect(LEDGER_DATABASE) as ledger:
            ledger.execute("CREATE SCHEMA refund_ledger")
            ledger.execute("CREATE TABLE refund_ledger.schema_version AS SELECT '0013' AS version_num")
    demo = [*COMMAND, "run"]
    refused = subprocess.run(demo, cwd=ROOT, env=env, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.endswith("for the demo run `make reset`.\n")


def kill_everything(demo: subprocess.Popen[bytes], server: PostgresServer) -> None:
    """As a machine that loses its power: nobody gets a chance to tidy up."""
    postmaster = psutil.Process(int((server.folder / "data" / "postmaster.pid").read_text().splitlines()[0]))
    everything = [
        psutil.Process(demo.pid),
        *processes.orphans(str(FOLDER)),
        postmaster,
        *postmaster.children(recursive=True),
    ]
    for process in everything:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    demo.wait()


def kill_while_it_sends(demo: subprocess.Popen[bytes], server: PostgresServer) -> None:
    """
    Kill the demo if it sends a refund at this moment, other than the one of the sample that Payroc refuses.

    That one, killed between its request and its answer, rightly goes to people: it was refused after an attempt whose outcome is not known.
    The lock on its row keeps it from being claimed meanwhile.
    """
    with suppress(FileNotFoundError, ValueError, psycopg.Error):
        server.port = int((server.folder / "port").read_text())
        with server.connect(LEDGER_DATABASE) as ledger, ledger.transaction():
            refused = (
                "SELECT status FROM refund_ledger.refund_states WHERE refund_id = "
                "(SELECT id FROM refund_ledger.refunds WHERE order_id = %s) FOR UPDATE"
            )
            if ledger.execute(refused, [REFUSED_BY_PAYROC]).fetchone() != ("sending",) and count_by_status(
                ledger
            ).get("sending", 0):
                kill_everything(demo, server)


def test_a_demo_that_was_killed_while_it_sent_is_finished_by_the_next_and_pays_nothing_twice(
    env: dict[str, str], tmp_path: Path
) -> None:
    server = PostgresServer(FOLDER / "postgres")
    with (tmp_path / "first").open("wb") as output:
        first = subprocess.Popen([*COMMAND, "run"], cwd=ROOT, env=env, stdout=output, stderr=output)

        def ended() -> bool:
            kill_while_it_sends(first, server)
            return first.poll() is not None

        eventually(ended, "the demo has ended", pause=0.02)
    assert first.returncode == -signal.SIGKILL, (tmp_path / "first").read_text()

    second = subprocess.run([*COMMAND, "run"], cwd=ROOT, env=env, capture_output=True, text=True)

    assert second.returncode == 0, second.stdout + second.stderr
    assert "32 refunds exist at Payroc (1 of them declined), none twice." in second.stdout
    assert processes.orphans(str(FOLDER)) == []
