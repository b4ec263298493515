"""
A MariaDB server of Debian's for the tests of a source in MySQL: fixtures that start it, and skip where it is
missing.
"""

from __future__ import annotations

import getpass
import importlib.util
import itertools
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL

from demo import processes
from demo.postgres import HOST, free_port
from tests.conftest import SCRATCH
from tests.support.certificates import Authority

USER = "shop"
_START_SECONDS = 60
_PORT_TRIES = 5
_SMALL = {
    "innodb-log-file-size": "8M",
    "innodb-buffer-pool-size": "32M",
    # The data would not survive a crash of the machine, and needs not to.
    "innodb-flush-log-at-trx-commit": "0",
}


class MariaDbServer:
    """
    One server with its data in one folder; it ends with the process that started it.

    :param folder: where data, socket and log live. Created.
    :param options: more of the server's options, without their dashes.
    """

    def __init__(self, folder: Path, options: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.log = folder / "mariadb.log"
        self.socket = folder / "socket"
        self.password = secrets.token_hex(16)
        self.port = 0
        self._options = _SMALL | dict(options or {})
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MariaDbServer:
        self.folder.mkdir(mode=0o700)
        subprocess.run(
            [
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={self.folder / 'data'}",
                f"--user={getpass.getuser()}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                *self._arguments(),
            ],
            check=True,
            capture_output=True,
        )
        self._allow_only(USER)
        for _ in range(_PORT_TRIES):
            self.port = free_port()
            if self._start():
                return self
        raise RuntimeError(f"MariaDB did not start; its log says:\n{self.log.read_text()[-2000:]}")

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start_again(self) -> None:
        """Start the server that was stopped, on its port."""
        assert self._start(), f"MariaDB did not start; its log is {self.log}"

    def stop(self) -> None:
        """End the server, its open connections included."""
        if self._process is not None:
            processes.stop(self._process)
            self._process = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def url(self, database: str) -> URL:
        """Return the URL of a database, with the password."""
        query = {"charset": "utf8mb4"}
        return URL.create("mysql+mysqldb", USER, self.password, HOST, self.port, database, query)

    @contextmanager
    def connect(self, database: str = "") -> Iterator[Any]:
        """Yield a connection of mysqlclient in autocommit mode."""
        import MySQLdb

        connection = MySQLdb.connect(
            host=HOST,
            port=self.port,
            user=USER,
            password=self.password,
            database=database,
            charset="utf8mb4",
            autocommit=True,
            connect_timeout=10,
        )
        try:
            yield connection
        finally:
            connection.close()

    def new_database(self) -> URL:
        """Return the URL of one more database, which is empty."""
        name = f"source_{next(self._numbers)}"
        with self.connect() as connection:
            connection.query(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        return self.url(name)

    def _arguments(self) -> list[str]:
        return [f"--{name}={value}" for name, value in self._options.items()]

    def _allow_only(self, name: str) -> None:
        """Let the server make its one account when it starts: it listens to nobody before."""
        statements = self.folder / "accounts.sql"
        statements.write_text(
            f"CREATE OR REPLACE USER {name}@'%' IDENTIFIED BY '{self.password}';\n"
            f"GRANT ALL ON *.* TO {name}@'%' WITH GRANT OPTION;\n"
            "DROP USER IF EXISTS root@localhost;\n"
        )

    def _start(self) -> bool:
        self._process = processes.start(
            [
                "mariadbd",
                "--no-defaults",
                f"--datadir={self.folder / 'data'}",
                f"--user={getpass.getuser()}",
                f"--socket={self.socket}",
                f"--pid-file={self.folder / 'pid'}",
                f"--bind-address={HOST}",
                f"--port={self.port}",
                f"--init-file={self.folder / 'accounts.sql'}",
                *self._arguments(),
            ],
            # A server's own time zone, with daylight-saving time, must not matter to anyone.
            env={"PATH": os.environ["PATH"], "TZ": "America/New_York"},
            log=self.log,
            cwd=self.folder,
        )
        process = self._process
        processes.wait_until(
            lambda: processes.has_ended(process) or self._answers(), seconds=_START_SECONDS, pause=0.05
        )
        if processes.has_ended(process):
            self._process = None
            return False
        return self._answers()

    def _answers(self) -> bool:
        import MySQLdb

        try:
            with self.connect():
                return True
        except MySQLdb.OperationalError:
            return False


def why_not() -> str | None:
    """Return why this machine can't run the tests with MariaDB, ``None`` when it can."""
    if not shutil.which("mariadbd"):
        return "MariaDB is not installed: `apt-get install mariadb-server`"
    if importlib.util.find_spec("MySQLdb") is None:
        return "requirements-mysql.txt is not installed: it says how"
    return None


@pytest.fixture(scope="session")
def mariadb(authority: Authority) -> Iterator[MariaDbServer]:
    """
    A MariaDB server for the whole session. It takes TLS from who wants it; its certificate is for
    ``localhost`` alone.
    """
    if reason := why_not():
        pytest.skip(reason)
    certificate, key = authority.sign("mariadb-server", "localhost")
    options = {"ssl-ca": authority.file, "ssl-cert": str(certificate), "ssl-key": str(key)}
    with MariaDbServer(SCRATCH / "mariadb", options) as server:
        yield server


@pytest.fixture
def mysql_url(mariadb: MariaDbServer) -> URL:
    """An empty database in MariaDB."""
    return mariadb.new_database()


AirflowMySql = Callable[..., None]


@pytest.fixture
def mysql_source(mysql_url: URL, monkeypatch: pytest.MonkeyPatch) -> AirflowMySql:
    """
    A function that makes ``mysql_url`` the Airflow connection ``refunds_source``, with the extras that it is
    given.
    """

    def connect(**extra: object) -> None:
        fields = {
            "conn_type": "mysql",
            "host": mysql_url.host,
            "port": mysql_url.port,
            "login": mysql_url.username,
            "password": mysql_url.password,
            "schema": mysql_url.database,
            "extra": {"charset": "utf8mb4"} | extra,
        }
        monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_SOURCE", json.dumps(fields))

    connect()
    return connect
