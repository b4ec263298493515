"""Debian's pgbouncer in front of the tests' Postgres: a pooler whose transactions run in any session."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import URL

from demo import processes
from demo.postgres import ACCOUNT_FOR_ROOT, HOST, USER, PostgresServer, free_port
from tests.conftest import SCRATCH

_START_SECONDS = 30
_PORT_TRIES = 5


@contextmanager
def pooled(postgres: PostgresServer, folder: Path, mode: str = "transaction") -> Iterator[int]:
    """
    Yield the port of a pooler with one session for all clients.

    :param mode: ``transaction`` or ``session``.
    """
    folder.mkdir(mode=0o700)
    (folder / "users.txt").write_text(f'"{USER}" "{postgres.password}"\n')
    account = None
    if os.geteuid() == 0:
        # It refuses to run as root, as Postgres does.
        entry = pwd.getpwnam(ACCOUNT_FOR_ROOT)
        account = (entry.pw_uid, entry.pw_gid)
    for attempt in range(_PORT_TRIES):
        port = free_port()
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={HOST} port={postgres.port}\n"
            f"[pgbouncer]\nlisten_addr={HOST}\nlisten_port={port}\nunix_socket_dir=\n"
            f"auth_type=scram-sha-256\nauth_file={folder / 'users.txt'}\n"
            f"pool_mode={mode}\ndefault_pool_size=1\nmax_client_conn=50\n"
        )
        if account:
            for path in (folder, *folder.iterdir()):
                os.chown(path, *account)
        log = folder.with_suffix(f".{attempt}.log")
        process = processes.start(
            ["pgbouncer", folder / "pgbouncer.ini"],
            env={"PATH": os.environ["PATH"]},
            log=log,
            account=account,
        )
        processes.wait_until(
            lambda process=process, port=port: processes.has_ended(process) or _listens(port),
            seconds=_START_SECONDS,
            pause=0.02,
        )
        if not processes.has_ended(process):
            try:
                yield port
            finally:
                processes.stop(process)
            return
    raise RuntimeError(f"pgbouncer did not start; its log says:\n{log.read_text()[-2000:]}")


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


@pytest.fixture(scope="session")
def transaction_pool(postgres: PostgresServer) -> Iterator[int]:
    """The port of a pooler in transaction mode in front of the tests' Postgres."""
    if not shutil.which("pgbouncer"):
        pytest.skip("pgbouncer is not installed: `apt-get install pgbouncer`")
    with pooled(postgres, SCRATCH / "pgbouncer") as port:
        yield port


@pytest.fixture
def pooled_source(source_url: URL, transaction_pool: int) -> URL:
    """The empty source, through the pooler."""
    return source_url.set(port=transaction_pool)
