"""Start processes that do not outlive the demo, and stop them for sure."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

# Set in the environment of everything that the demo starts, and inherited by what that starts. After the demo was
# killed with no chance to clean up, the next start finds its orphans by it.
OWNER_VARIABLE = "PAYROC_REFUNDS_DEMO_OWNER"

# What a person or the system sends to end a command: Ctrl-C, a polite kill, a closed terminal.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1


def start(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    log: Path,
    cwd: Path | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
    account: tuple[int, int] | None = None,
) -> subprocess.Popen[bytes]:
    """
    Start a process in a session of its own, so that Ctrl-C reaches the demo only and the demo decides the order of the end.

    Call it from the main thread: Linux sends the death signal when the *thread* that started the process ends.

    :param command: program and arguments.
    :param env: its whole environment.
    :param log: file that gets its output, appended.
    :param cwd: its working folder.
    :param death_signal: what the kernel sends it when the demo dies without saying so. Linux only; elsewhere the next start cleans up.
    :param account: user id and group id to run as; only root may give it.
    """
    user, group = account or (None, None)
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(part) for part in command],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
            user=user,
            group=group,
            extra_groups=[] if account else None,
            # It runs after the change of user, which would clear the signal.
            preexec_fn=_die_with_parent(death_signal),
        )


def stop(
    process: subprocess.Popen[bytes], *, first: signal.Signals = signal.SIGTERM, patience: float = 15
) -> None:
    """
    End a process that :func:`start` started, and everything in its session or below it.

    :param first: the polite signal.
    :param patience: seconds until what is left is killed.
    """
    family = _family(process.pid)
    if not has_ended(process):
        os.kill(process.pid, first)
        wait_until(lambda: has_ended(process), seconds=patience, pause=0.05)
    end_all({*family, *_family(process.pid)}, first=signal.SIGKILL)
    wait_until(lambda: has_ended(process), seconds=patience, pause=0.05)


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """
    Return whether the process has ended, and take note of its exit code.

    Ctrl-C waits for a moment: in the middle of ``poll`` it would leave a lock behind, and every later ``wait`` would hang.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        return process.poll() is not None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def end_all(
    processes: Iterable[psutil.Process], *, first: signal.Signals = signal.SIGTERM, patience: float = 10
) -> int:
    """Ask processes to end, wait, kill what is left, and return how many there were."""
    alive = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(first)
            alive.append(process)
    _, stubborn = psutil.wait_procs(alive, timeout=patience)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=10)
    return len(alive)


def orphans(owner: str) -> list[psutil.Process]:
    """Return the running processes that a demo with this owner name started, this process and its parents excepted."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        if process.pid in own:
            continue
        # A process may end, or belong to someone else, while it is looked at: then it is not ours to stop.
        with suppress(psutil.Error, OSError):
            if process.environ().get(OWNER_VARIABLE) == owner and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], *, seconds: float, pause: float = 0.1) -> bool:
    """Return whether the condition became true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def _die_with_parent(death_signal: signal.Signals) -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    # Loaded before the fork: in the child only the call itself is left to do.
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def ask_for_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGKILL)

    return ask_for_signal


def _family(leader: int) -> list[psutil.Process]:
    """Return what runs in the leader's session or below it: some of Airflow's processes leave one, some the other."""
    found = set()
    with suppress(psutil.Error):
        found.update(psutil.Process(leader).children(recursive=True))
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return list(found)
