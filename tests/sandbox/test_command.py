from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import requests

from include.sandbox.__main__ import main
from tests.patience import PATIENCE_SECONDS, eventually
from tests.sandbox.running import (
    REPO,
    USUAL_HANG_SECONDS,
    Client,
    RunningSandbox,
    body,
    new_key,
    running_sandbox,
)


def test_it_prints_how_to_point_a_connection_to_it() -> None:
    with running_sandbox() as sandbox:
        assert sandbox.output[1] == f"  page with its refunds: {sandbox.url}/\n"
        export, assignment = shlex.split(sandbox.output[4])
        name, _, value = assignment.partition("=")
        assert (export, name) == ("export", "AIRFLOW_CONN_PAYROC_DEFAULT")
        connection = json.loads(value)
        assert connection == {
            "conn_type": "payroc",
            "password": "sandbox-key",
            "host": f"{sandbox.url}/v1",
            "extra": {"identity_url": sandbox.url},
        }
        assert Client(connection["extra"]["identity_url"], connection["password"]).list().status_code == 200


def test_a_port_in_use_is_one_sentence_and_exit_code_2(process: RunningSandbox) -> None:
    port = process.url.rpartition(":")[2]
    failed = subprocess.run(
        [sys.executable, "-m", "include.sandbox", "--port", port],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 2
    assert (
        failed.stderr
        == f"Port {port} on 127.0.0.1 is in use: stop what runs there, or choose another with --port.\n"
    )
    assert failed.stdout == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "payroc.example", "::"])
def test_a_host_that_others_can_reach_is_refused(capsys: pytest.CaptureFixture[str], host: str) -> None:
    assert main(["--host", host, "--port", "0"]) == 2
    assert "--allow-remote" in capsys.readouterr().err


def test_a_host_that_does_not_exist_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--host", "does-not-exist.invalid", "--port", "0", "--allow-remote"]) == 2
    assert capsys.readouterr().err.startswith("Cannot listen on does-not-exist.invalid, port 0: ")


def test_allow_remote_listens_on_all_addresses() -> None:
    with running_sandbox("--host", "0.0.0.0", "--allow-remote") as sandbox:
        assert Client(sandbox.url.replace("0.0.0.0", "127.0.0.1")).list().status_code == 200


@pytest.mark.parametrize(
    "arguments", [["--port", "70000"], ["--token-seconds", "0"], ["--hang-seconds", "-1"]]
)
def test_unusable_numbers_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    assert "must be" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_promptly_while_a_request_hangs(how: signal.Signals) -> None:
    with running_sandbox() as sandbox:
        payroc = sandbox.client()
        payroc.list()

        def hang() -> None:
            with suppress(requests.ConnectionError):
                payroc.create_ending_in("9003", key=new_key(), timeout=PATIENCE_SECONDS)

        hanging = threading.Thread(target=hang)
        hanging.start()
        eventually(sandbox.refunds, "the request hangs", pause=0.01)
        started = time.monotonic()
        sandbox.process.send_signal(how)
        sandbox.process.wait()
        hanging.join()
        assert time.monotonic() - started < USUAL_HANG_SECONDS / 2
        assert sandbox.errors() == ""


def test_hang_seconds_limit_how_long_a_request_hangs() -> None:
    with running_sandbox("--hang-seconds", "0.2") as sandbox:
        started = time.monotonic()
        with pytest.raises(requests.ConnectionError):
            sandbox.client().create_ending_in("9004")
        assert time.monotonic() - started < USUAL_HANG_SECONDS


def test_schema_only_accepts_a_create_without_sec_code() -> None:
    with running_sandbox("--schema-only") as sandbox:
        answer = sandbox.client().create(body(refundMethod__secCode=...))
        assert answer.status_code == 201
        assert "secCode" not in answer.json()["bankAccount"]


def test_it_serves_hundreds_of_creates_per_second(sandbox: RunningSandbox, payroc: Client) -> None:
    process = psutil.Process(sandbox.process.pid)

    def seconds_at_work() -> float:
        times = process.cpu_times()
        return times.user + times.system

    begun = seconds_at_work()
    for _ in range(300):
        payroc.create()
    # The processor's seconds, and not those of the clock, which a busy machine stretches.
    assert seconds_at_work() - begun < 5
