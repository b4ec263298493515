"""
Whatever goes wrong on the wire between a worker and Payroc, the refund ends paid once, and the worker's memory stays bounded.

Each fault hits a create that Payroc has accepted already wherever it can, then a worker that has no token yet.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import shutil
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.conftest import SCRATCH, Sandbox, running_sandbox
from tests.processes.books import check_books
from tests.processes.conftest import bring_to_an_end, open_run
from tests.processes.line import Fault, Handler, Line, running
from tests.processes.scheduler import Scheduler
from tests.processes.worker import Ending, Try
from tests.refunds.conftest import World

Answer = Callable[[], bytes | None]
Wrong = Callable[[Line, Path], AbstractContextManager[None]]

MEGABYTE = 1024 * 1024
# What a worker may hold more than one that meets no fault. The hook reads 1 MiB at most.
BOUND_MB = 20


def certificate(folder: Path) -> Path:
    """Make a certificate for 127.0.0.1 that vouches for itself, and return the file that holds it and its key."""
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + dt.timedelta(days=1)
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "certificate.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return pem


@pytest.fixture
def trusted(tmp_path: Path) -> Path:
    return certificate(tmp_path / "trusted")


@pytest.fixture
def connection_extra(trusted: Path) -> dict[str, Any]:
    return {"ca_bundle": str(trusted)}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """A local Payroc whose tokens outlive a test: a worker finds the one that the release has left."""
    with running_sandbox(SCRATCH / "sandbox-of-wire-faults.log", "--hang-seconds", "3") as sandbox:
        yield sandbox


@pytest.fixture
def timeout_seconds() -> float:
    return 2.0


@pytest.fixture
def line(sandbox: Sandbox, trusted: Path) -> Iterator[Line]:
    """A line that speaks TLS, as Payroc does."""
    sandbox.post("/_sandbox/reset")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted)
    with running(sandbox.url, context) as line:
        yield line


# --- What goes wrong ------------------------------------------------------------------------------------------------------


@contextmanager
def refused(line: Line, _: Path) -> Iterator[None]:
    line.close()
    before = len(line.requests)
    yield
    assert len(line.requests) == before
    line.open()


@contextmanager
def untrusted_certificate(line: Line, folder: Path) -> Iterator[None]:
    assert line.tls is not None
    line.tls.load_cert_chain(certificate(folder / "untrusted"))
    before = len(line.requests)
    yield
    # No token, no key and no body went to somebody who could not prove to be Payroc.
    assert len(line.requests) == before
    line.tls.load_cert_chain(folder / "trusted" / "certificate.pem")


@contextmanager
def redirect_to_another_host(line: Line, _: Path) -> Iterator[None]:
    with running(line.target.geturl()) as other:

        def redirect(handler: Handler, _: Answer) -> None:
            location = f"http://localhost:{other.port}{handler.path}"
            handler.wfile.write(
                f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
            )

        line.fault = redirect
        yield
        line.fault = None
        assert other.requests == []


def reset_in_the_middle(handler: Handler, answer: Answer) -> None:
    whole = answer() or b""
    handler.wfile.write(whole[: len(whole) - 100])
    # The worker is in the middle of the body by then, or loses all of it. This way of closing is a reset.
    time.sleep(0.2)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def one_byte_at_a_time(handler: Handler, answer: Answer) -> None:
    for byte in answer() or b"":
        handler.wfile.write(bytes([byte]))
        time.sleep(0.02)


def silence(handler: Handler, answer: Answer) -> None:
    answer()
    # Until the worker leaves.
    handler.rfile.read(1)


def html(handler: Handler, answer: Answer) -> None:
    answer()
    page = b"<!doctype html><title>Welcome</title>"
    handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(page) + page
    )


def body_of_100_mb(handler: Handler, answer: Answer) -> None:
    answer()
    handler.wfile.write(
        b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % (100 * MEGABYTE)
    )
    for _ in range(100):
        handler.wfile.write(b" " * MEGABYTE)


def spoilt_by(fault: Fault) -> Wrong:
    @contextmanager
    def spoilt(line: Line, _: Path) -> Iterator[None]:
        line.fault = fault
        yield
        line.fault = None

    return spoilt


@pytest.mark.parametrize(
    ("wrong", "accepted", "outcome"),
    [
        pytest.param(refused, False, "RefundsInDoubt", id="connection refused"),
        pytest.param(untrusted_certificate, False, "RefundsInDoubt", id="untrusted certificate"),
        pytest.param(redirect_to_another_host, False, "RefundsStopped", id="redirect to another host"),
        pytest.param(
            spoilt_by(reset_in_the_middle), True, "RefundsInDoubt", id="reset in the middle of the answer"
        ),
        pytest.param(spoilt_by(one_byte_at_a_time), True, "RefundsInDoubt", id="one byte at a time"),
        pytest.param(spoilt_by(silence), True, "RefundsInDoubt", id="no byte at all"),
        pytest.param(spoilt_by(html), True, "RefundsInDoubt", id="HTML instead of JSON"),
        pytest.param(spoilt_by(body_of_100_mb), True, "RefundsInDoubt", id="body of 100 MB"),
    ],
)
def test_a_refund_ends_paid_once_and_memory_stays_bounded_whatever_goes_wrong_on_the_wire(
    world: World,
    line: Line,
    scheduler: Scheduler,
    figures: Callable[..., None],
    tokens: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    wrong: Wrong,
    accepted: bool,
    outcome: str,
) -> None:
    def try_once(refund_id: int, number: int) -> Ending:
        [(_, ending)] = scheduler.run([Try("run-1", refund_id, (refund_id,), number)], retries=0)
        return ending

    began = time.monotonic()
    usual = try_once(world.released(), 1)
    assert usual.outcome == "success", usual

    refund_id = world.released()
    with wrong(line, tmp_path):
        # The release has left a token for the first try, so the fault hits the create; the second try gets none.
        first = try_once(refund_id, 1)
        assert (first.outcome, world.paid(refund_id)) == (outcome, int(accepted)), first
        shutil.rmtree(tokens)
        second = try_once(refund_id, 2)
        assert (second.outcome, second.retried) == ("RefundsInDoubt", True), second
    row = world.row(refund_id)
    assert (row["status"], row["attempts"]) == ("unknown", 1)

    if outcome == "RefundsStopped":
        assert "*" in world.paused()
        world.run(world.ledger.pauses.resume("*", "the redirect is gone"))
    bring_to_an_end(world, scheduler)
    peak_mb = max(first.peak_mb, second.peak_mb)
    assert peak_mb < usual.peak_mb + BOUND_MB
    figures(
        f"Wire fault, {request.node.callspec.id}",
        POSTs_for_2_refunds=check_books(world, line),
        MB_at_most=round(peak_mb, 1),
        MB_without_the_fault=round(usual.peak_mb, 1),
        seconds=round(time.monotonic() - began, 1),
    )


# Long enough for the refunds of a list that meet no fault.
@pytest.mark.parametrize("timeout_seconds", [5.0])
def test_what_goes_wrong_on_the_wire_for_some_refunds_of_a_list_keeps_no_other_from_being_paid(
    world: World, line: Line, scheduler: Scheduler, figures: Callable[..., None]
) -> None:
    began = time.monotonic()
    faults: list[Fault | None] = [
        reset_in_the_middle,
        one_byte_at_a_time,
        silence,
        html,
        None,
        None,
        None,
        None,
    ]
    for _ in faults * 3:
        world.approve()
    refund_ids = open_run(world, "run-1")
    keys = [str(world.row(refund_id)["idempotency_key"]) for refund_id in refund_ids]
    faulty = {key: fault for key, fault in zip(keys, faults * 3, strict=True) if fault is not None}

    def spoil_some(handler: Handler, answer: Answer) -> None:
        fault = faulty.get(handler.headers.get("Idempotency-Key", ""))
        if fault is None:
            handler.wfile.write(answer() or b"")
        else:
            fault(handler, answer)

    line.fault = spoil_some
    [(_, ending)] = scheduler.run([Try("run-1", 0, tuple(refund_ids))], retries=0)
    assert ending.outcome == "RefundsInDoubt", ending
    statuses = {str(row["idempotency_key"]): row["status"] for row in map(world.row, refund_ids)}
    assert statuses == {key: "unknown" if key in faulty else "accepted" for key in keys}

    line.fault = None
    bring_to_an_end(world, scheduler)
    figures(
        "Wire faults inside a list",
        refunds=len(refund_ids),
        of_them_with_a_fault=len(faulty),
        POSTs=check_books(world, line),
        seconds=round(time.monotonic() - began, 1),
    )
