"""The sandbox as its users meet it: a process of its own on a free port, spoken to over HTTP."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import requests

from tests.patience import PATIENCE_SECONDS

# How long a request hangs when nothing else is said.
USUAL_HANG_SECONDS = 60
REPO = Path(__file__).resolve().parents[2]

# Payroc's own sample request; its account number ends in none of the triggers.
BODY: dict[str, Any] = {
    "processingTerminalId": "1234001",
    "order": {
        "orderId": "OrderRef6543",
        "description": "Refund for order OrderRef6543",
        "amount": 4999,
        "currency": "USD",
    },
    "customer": {
        "notificationLanguage": "en",
        "contactMethods": [{"type": "email", "value": "sarah.hopper@example.com"}],
    },
    "refundMethod": {
        "type": "ach",
        "secCode": "web",
        "accountType": "checking",
        "nameOnAccount": "Sarah Hazel Hopper",
        "accountNumber": "1234567890",
        "routingNumber": "123456789",
    },
    "customFields": [{"name": "yourCustomField", "value": "abc123"}],
}


def new_session() -> requests.Session:
    """A session that no proxy of the environment leads away from this machine."""
    session = requests.Session()
    session.trust_env = False
    return session


def new_key() -> str:
    return str(uuid.uuid4())


def body(**changes: Any) -> dict[str, Any]:
    """The sample request with changes by path, `__` for the dot: ``body(order__amount=0)``. ``...`` removes a property."""
    changed = copy.deepcopy(BODY)
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = changed
        for parent in parents:
            target = target[parent]
        if value is ...:
            del target[name]
        else:
            target[name] = value
    return changed


class RunningSandbox:
    """A sandbox process; ``output`` is what it printed when it started."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.process = process
        self._errors = errors
        assert process.stdout is not None
        self.output = [process.stdout.readline()]
        assert self.output[0], f"The sandbox did not start: {self.errors()}"
        self.output += [process.stdout.readline() for _ in range(4)]
        self.url = self.output[0].split()[-1]
        self._session = new_session()

    def text(self, path: str) -> str:
        """The body of what is at a path of the sandbox."""
        response = self._session.get(self.url + path, timeout=PATIENCE_SECONDS)
        response.raise_for_status()
        return response.text

    def admin(self, method: str, path: str, **content: Any) -> Any:
        response = self._session.request(
            method, f"{self.url}/_sandbox/{path}", json=content or None, timeout=PATIENCE_SECONDS
        )
        response.raise_for_status()
        return response.json() if response.content else None

    def fault(self, operation: str, kind: str, when: str = "before", **more: Any) -> None:
        self.admin("POST", "faults", operation=operation, kind=kind, when=when, **more)

    def advance(self, seconds: float) -> None:
        self.admin("POST", "clock", advanceSeconds=seconds)

    def refunds(self) -> list[dict[str, Any]]:
        return list(self.admin("GET", "refunds")["refunds"])

    def journal(self, query: str = "") -> list[dict[str, Any]]:
        return list(self.admin("GET", f"requests?{query}")["requests"])

    def client(self) -> Client:
        return Client(self.url)

    def errors(self) -> str:
        """What the process wrote to standard error."""
        self._errors.flush()
        self._errors.seek(0)
        return self._errors.read()

    def stop(self) -> None:
        self._session.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)


class Client:
    """A client of Payroc's API with one token, and nothing clever."""

    def __init__(self, url: str, api_key: str = "sandbox-key") -> None:
        self.url = url
        self.api = f"{url}/v1"
        self.session = new_session()
        self.token = self.authorize(api_key).json()["access_token"]

    def authorize(self, api_key: str) -> requests.Response:
        return self.session.post(
            f"{self.url}/authorize", headers={"x-api-key": api_key}, timeout=PATIENCE_SECONDS
        )

    def send(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, Any] | None = None,
        timeout: float = PATIENCE_SECONDS,
        **more: Any,
    ) -> requests.Response:
        """Send with the token; a header of None is left out."""
        url = path if path.startswith("http") else self.api + path
        with_token = {"Authorization": f"Bearer {self.token}", **(headers or {})}
        return self.session.request(method, url, headers=with_token, timeout=timeout, **more)

    def create(
        self,
        content: dict[str, Any] | None = None,
        *,
        key: str | None = None,
        timeout: float = PATIENCE_SECONDS,
    ) -> requests.Response:
        content = BODY if content is None else content
        return self.send(
            "POST",
            "/bank-transfer-refunds",
            json=content,
            headers={"Idempotency-Key": key or new_key()},
            timeout=timeout,
        )

    def create_ending_in(
        self, digits: str, *, key: str | None = None, timeout: float = PATIENCE_SECONDS
    ) -> requests.Response:
        return self.create(body(refundMethod__accountNumber=f"123456{digits}"), key=key, timeout=timeout)

    def get(self, refund_id: str) -> requests.Response:
        return self.send("GET", f"/bank-transfer-refunds/{refund_id}")

    def list(self, **query: Any) -> requests.Response:
        return self.send("GET", "/bank-transfer-refunds", params={"processingTerminalId": "1234001", **query})

    def reverse(self, refund_id: str, *, key: str | None = None) -> requests.Response:
        return self.send(
            "POST",
            f"/bank-transfer-refunds/{refund_id}/reverse",
            headers={"Idempotency-Key": key or new_key()},
        )

    def close_batch(self, terminal: str = "1234001", *, key: str | None = None) -> requests.Response:
        return self.send(
            "POST",
            f"/processing-terminals/{terminal}/close-batch",
            headers={"Idempotency-Key": key or new_key()},
        )

    def status(self, refund_id: str) -> str:
        return str(self.get(refund_id).json()["transactionResult"]["status"])


@contextmanager
def running_sandbox(*arguments: str) -> Iterator[RunningSandbox]:
    """Start a sandbox on a free port with further command line arguments, and stop it at the end."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "include.sandbox", "--port", "0", *arguments],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            sandbox = RunningSandbox(process, errors)
            try:
                yield sandbox
            finally:
                sandbox.stop()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(PATIENCE_SECONDS)
            if process.stdout is not None:
                process.stdout.close()


def problem_type(response: requests.Response) -> str:
    """The fragment of a problem document's type, after checking its shape."""
    assert response.headers["Content-Type"] == "application/problem+json"
    document = response.json()
    assert document["status"] == response.status_code
    assert document["title"]
    assert document["detail"]
    base, _, fragment = document["type"].partition("#")
    assert base == "https://docs.payroc.com/api/errors"
    return str(fragment)


def parameters(response: requests.Response) -> list[str]:
    """The parameters that the errors of a problem document name."""
    return [error.get("parameter", "") for error in response.json()["errors"]]
