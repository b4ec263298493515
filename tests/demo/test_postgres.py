"""The Postgres server of the demo and the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from demo.errors import DemoError
from demo.postgres import HOST, USER, PostgresServer, free_port, port_is_free
from tests.conftest import ROOT, SCRATCH
from tests.patience import eventually


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with PostgresServer(SCRATCH / "one-server", fast=True) as running:
        yield running


def test_a_wrong_password_is_refused(server: PostgresServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(host=HOST, port=server.port, user=USER, password="postgres", dbname="postgres")


def test_no_password_is_refused(server: PostgresServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(host=HOST, port=server.port, user=USER, dbname="postgres")


def test_the_password_never_travels_in_plain_text(server: PostgresServer) -> None:
    with server.connect() as connection:
        rules = connection.execute("SELECT DISTINCT auth_method FROM pg_hba_file_rules").fetchall()
    assert rules == [("scram-sha-256",)]


def test_it_listens_on_the_loopback_interface_only(server: PostgresServer) -> None:
    postmaster = psutil.Process(server.pid)
    open_sockets = [(kind, each) for kind in ("inet", "unix") for each in postmaster.net_connections(kind)]
    listening = {(kind, each.laddr) for kind, each in open_sockets if each.status == psutil.CONN_LISTEN}
    assert listening == {("inet", (HOST, server.port))}


def test_only_its_owner_reaches_the_data_and_the_password(server: PostgresServer) -> None:
    assert (server.folder / "data").stat().st_mode & 0o077 == 0
    assert (server.folder / "password").stat().st_mode & 0o077 == 0
    assert not list(server.folder.glob("*initdb*"))


def test_data_outlives_a_stop(server: PostgresServer) -> None:
    server.create_database("kept")
    server.stop()
    server.start()
    with server.connect("kept") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_it_starts_again_after_kill_9(server: PostgresServer) -> None:
    server.create_database("survivor")
    os.kill(server.pid, signal.SIGKILL)
    again = PostgresServer(server.folder, fast=True)
    with again, again.connect("survivor") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_it_takes_another_port_when_its_own_is_taken(server: PostgresServer) -> None:
    port = server.port
    server.stop()
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind((HOST, port))
        stranger.listen()
        server.start()
        assert server.port != port


def test_a_process_that_got_the_number_of_a_dead_server_is_left_alone(server: PostgresServer) -> None:
    server.stop()
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        pid_file = server.folder / "data" / "postmaster.pid"
        pid_file.write_text(
            f"{stranger.pid}\n{server.folder / 'data'}\n1\n{server.port}\n\n{HOST}\n\nready\n"
        )
        server.start()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


_START_AND_SLEEP = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from demo.postgres import PostgresServer
    server = PostgresServer(Path(sys.argv[1]), fast=True)
    server.start()
    print(server.pid, flush=True)
    time.sleep(60)
""")


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent has died"
)
def test_it_does_not_outlive_a_killed_demo() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _START_AND_SLEEP, SCRATCH / "left-over"], cwd=ROOT, stdout=subprocess.PIPE
    ) as demo:
        assert demo.stdout is not None
        pid = int(demo.stdout.readline())
        demo.kill()
    eventually(lambda: not psutil.pid_exists(pid), "the server has ended")


def test_a_left_over_server_is_found_by_its_data_and_ended(server: PostgresServer) -> None:
    pid = server.pid
    assert PostgresServer(server.folder).end_left_over()
    eventually(
        lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE,
        "the server has ended",
    )
    assert not PostgresServer(server.folder).end_left_over()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another account")
def test_root_can_run_it_from_a_folder_that_is_closed_to_the_servers_account(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reachable = PostgresServer._can_run
    copied = SCRATCH / "copied"
    monkeypatch.setattr(
        PostgresServer,
        "_can_run",
        lambda self, package: package.is_relative_to(copied) and reachable(self, package),
    )
    with PostgresServer(copied, fast=True) as server, server.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert list(server.folder.glob("programs-*"))


def test_damaged_data_gets_a_sentence(tmp_path: Path) -> None:
    folder = SCRATCH / "damaged"
    (folder / "data").mkdir(parents=True)
    with pytest.raises(DemoError, match="make reset"):
        PostgresServer(folder, fast=True).start()


def test_a_free_port_is_free() -> None:
    port = free_port()
    assert port_is_free(port)
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        assert not port_is_free(port)
