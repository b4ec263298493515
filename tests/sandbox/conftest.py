from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sandbox.running import Client, RunningSandbox, running_sandbox


@pytest.fixture(scope="package")
def process() -> Iterator[RunningSandbox]:
    with running_sandbox() as sandbox:
        yield sandbox
        sandbox.stop()
        # A sandbox that works has nothing to say: a line here is a traceback, or something that must not be logged.
        assert sandbox.errors() == ""


@pytest.fixture
def sandbox(process: RunningSandbox) -> RunningSandbox:
    """The sandbox of these tests, empty."""
    process.admin("POST", "reset")
    return process


@pytest.fixture
def payroc(sandbox: RunningSandbox) -> Iterator[Client]:
    client = sandbox.client()
    with client.session:
        yield client
