"""Two demos at once: each has ports, a server and a local Payroc of its own."""

from __future__ import annotations

import multiprocessing
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from demo import processes
from demo.errors import DemoError
from demo.postgres import HOST, PostgresServer, claimed_port, free_port, port_is_free
from demo.stack import WITHOUT_PROXY, Stack
from demo.state import FOLDER_VARIABLE, State
from tests.conftest import running_sandbox
from tests.patience import PATIENCE_SECONDS


class Demo:
    """The part of a demo that pays: its state and its local Payroc, on the databases of the tests."""

    def __init__(self, state: State, postgres: PostgresServer) -> None:
        self.stack = Stack(state)
        self.stack.postgres = postgres
        self.stack.sandbox_port = self.stack._choose_sandbox_port()

    def start(self) -> None:
        self.stack._start_sandbox()

    def authorize(self, url: str) -> int:
        """Ask a local Payroc for a token with this demo's key, and return its status."""
        connection = self.stack.connections()["payroc_default"]
        request = urllib.request.Request(
            f"{url}/authorize", method="POST", headers={"x-api-key": connection["password"]}
        )
        try:
            with WITHOUT_PROXY.open(request, timeout=PATIENCE_SECONDS) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refused:
            return refused.code

    def stop(self) -> None:
        if self.stack._sandbox is not None:
            processes.stop(self.stack._sandbox)


@pytest.fixture
def demos(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Demo, Demo]]:
    """Two demos of two checkouts, both at the moment before they start their local Payroc."""
    made = []
    for name in ("one", "other"):
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / name))
        made.append(Demo(State.open(), postgres))
    yield made[0], made[1]
    for demo in made:
        demo.stop()


def test_two_demos_that_start_at_once_have_a_local_payroc_each(demos: tuple[Demo, Demo]) -> None:
    one, other = demos
    for demo in demos:
        demo.start()
    pids = [demo.stack.sandbox_get("/_sandbox/health")["pid"] for demo in demos]
    assert pids == [demo.stack._sandbox.pid for demo in demos if demo.stack._sandbox]
    assert [one.authorize(one.stack.sandbox_url), other.authorize(other.stack.sandbox_url)] == [200, 200]


def test_a_local_payroc_sells_no_token_to_another_demo(demos: tuple[Demo, Demo]) -> None:
    one, other = demos
    one.start()
    assert other.authorize(one.stack.sandbox_url) == 401


def test_the_key_of_a_demo_is_not_in_the_list_of_processes(demos: tuple[Demo, Demo]) -> None:
    demo = demos[0]
    demo.start()
    assert demo.stack._sandbox is not None
    assert demo.stack.keys.payroc_api_key not in " ".join(psutil.Process(demo.stack._sandbox.pid).cmdline())


def test_a_server_that_took_the_port_meanwhile_is_not_taken_for_ours(
    demos: tuple[Demo, Demo], tmp_path: Path
) -> None:
    demo = demos[0]
    with (
        running_sandbox(tmp_path / "log", "--port", str(demo.stack.sandbox_port)),
        pytest.raises(DemoError, match="The local Payroc did not start"),
    ):
        demo.start()


def test_a_demo_keeps_its_port_and_says_who_has_it_when_it_is_taken(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "state"))
    port = Demo(State.open(), postgres).stack.sandbox_port
    assert Demo(State.open(), postgres).stack.sandbox_port == port
    with socket.create_server((HOST, port)), pytest.raises(DemoError, match=f"Port {port} is taken by"):
        Demo(State.open(), postgres)


def test_the_usual_port_goes_to_one_of_two_who_ask_at_once() -> None:
    usual = free_port()
    with ExitStack() as both:
        ports = [both.enter_context(claimed_port(usual)) for _ in range(2)]
        assert ports[0] == usual
        assert ports[1] != usual
        assert port_is_free(ports[1])
    with claimed_port(usual) as again:
        assert again == usual


def claim(usual: int, found: Any, until: Any) -> None:
    with claimed_port(usual) as port:
        found.put(port)
        until.wait()


def test_the_claim_of_a_killed_command_is_free_again() -> None:
    usual, spawn = free_port(), multiprocessing.get_context("spawn")
    found, until = spawn.Queue(), spawn.Event()
    other = spawn.Process(target=claim, args=(usual, found, until))
    other.start()
    assert found.get(timeout=PATIENCE_SECONDS) == usual
    with claimed_port(usual) as mine:
        assert mine != usual
    other.kill()
    other.join()
    with claimed_port(usual) as mine:
        assert mine == usual


def test_the_usual_port_of_a_server_that_is_no_demo_is_left_alone() -> None:
    with socket.create_server((HOST, 0)) as server:
        usual = server.getsockname()[1]
        with claimed_port(usual) as port:
            assert port != usual
