"""Processes of the demo end when they have to, with everything that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from demo import processes
from tests.conftest import ROOT
from tests.patience import PATIENCE_SECONDS, eventually

OWNER = "a demo of these tests"

# A process that ignores the polite signal, as does its child, which left its session as Airflow's task processes do.
_STUBBORN = textwrap.dedent("""
    import os, signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
    print(os.getpid(), flush=True)
    time.sleep(60)
""")


def pids_in(log: Path, count: int) -> list[int]:
    eventually(lambda: log.exists() and len(log.read_text().split()) == count, "it has said its numbers")
    return [int(pid) for pid in log.read_text().split()]


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_stop_ends_what_ignores_a_signal_and_what_left_the_session(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = processes.start([sys.executable, "-c", _STUBBORN], env=os.environ, log=log)
    pids = pids_in(log, 2)
    processes.stop(process, patience=0.5)
    assert [pid for pid in pids if is_running(pid)] == []


def test_stop_returns_as_soon_as_the_process_has_ended(tmp_path: Path) -> None:
    process = processes.start(["sleep", "60"], env=os.environ, log=tmp_path / "log")
    # With so much patience a stop that waits for more than the end would hang.
    processes.stop(process, patience=10 * PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGTERM


def test_orphans_are_found_by_their_owner_and_by_nothing_else(tmp_path: Path) -> None:
    env = {**os.environ, processes.OWNER_VARIABLE: OWNER}
    log = tmp_path / "log"
    process = processes.start([sys.executable, "-c", _STUBBORN], env=env, log=log)
    stranger = subprocess.Popen(["sleep", "60"], env={**os.environ, processes.OWNER_VARIABLE: "another demo"})
    try:
        pids = pids_in(log, 2)
        found = processes.orphans(OWNER)
        assert sorted(each.pid for each in found) == sorted(pids)
        assert processes.end_all(found, patience=0.5) == 2
        assert [pid for pid in pids if is_running(pid)] == []
        assert stranger.poll() is None
    finally:
        processes.stop(process)
        stranger.kill()
        stranger.wait()


def test_this_process_is_no_orphan() -> None:
    code = f"from demo import processes; print(processes.orphans({OWNER!r}))"
    env = {**os.environ, processes.OWNER_VARIABLE: OWNER}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent has died"
)
def test_a_process_dies_with_a_demo_that_is_killed(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import os, time
        from pathlib import Path
        from demo import processes
        print(processes.start(["sleep", "60"], env=os.environ, log=Path({str(tmp_path / "log")!r})).pid, flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as demo:
        assert demo.stdout is not None
        pid = int(demo.stdout.readline())
        assert is_running(pid)
        demo.kill()
    eventually(lambda: not is_running(pid), "it has ended")
