"""The way to Payroc for many requests at a time: connections, event loops, threads, and how it ends. Against a real server."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from include.payroc.errors import PayrocNoAnswer, PayrocProblem
from include.payroc.models import AccessToken
from payroc_airflow.gateway import HookGateway
from payroc_airflow.gateway import connect as connect_gateway
from payroc_airflow.hooks.payroc import PayrocHook
from payroc_airflow.transport import IDLE_SECONDS
from tests.patience import PATIENCE_SECONDS, eventually

PATH = "/v1/bank-transfer-refunds"
BODY = b'{"a": 1}'
NOT_AUTHORIZED = {
    "type": "https://docs.payroc.com/api/errors#not-authorized",
    "title": "t",
    "status": 401,
    "detail": "d",
}


@pytest.fixture
def gateway(hook) -> HookGateway:
    return HookGateway(hook)


class Talkative:
    """A server for raw bytes: it keeps every request that arrives, and answers each as a function of the connection tells."""

    def __init__(self, answer) -> None:
        self.requests = 0
        self.connections = 0
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while connection.recv(65536):
                    self.requests += 1
                    self._answer(connection)
            except OSError:
                return

    def close(self) -> None:
        self._listener.close()
        for connection in self._connections:
            connection.close()


@contextmanager
def talking(answer) -> Iterator[Talkative]:
    server = Talkative(answer)
    try:
        yield server
    finally:
        server.close()


def answer_of(content: bytes = b"", status: str = "404 Not Found", more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (status.encode(), len(content), more, content)


@pytest.fixture
def reach(connect):
    """Return a hook that reaches a server."""

    def hook_to(server: Talkative, timeout_seconds: float = 60) -> PayrocHook:
        connect(host=f"{server.url}/v1", extra={"identity_url": server.url})
        return PayrocHook(timeout_seconds=timeout_seconds)

    return hook_to


def lost(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# --- connections ----------------------------------------------------------------------------------------------------------


def test_64_refunds_at_once_use_64_connections_and_the_next_64_use_them_again(
    gateway, payroc, reply, token, key
) -> None:
    together = threading.Barrier(64, timeout=PATIENCE_SECONDS)

    def answer(handler) -> None:
        together.wait()
        handler.send_response(201)
        content = b"{}"
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = False

    payroc.on("POST", PATH, reply(raw=answer))

    async def work() -> list[object]:
        async with gateway:
            posts = [gateway.create_refund(token, key, BODY) for _ in range(128)]
            first = await asyncio.gather(*posts[:64], return_exceptions=True)
            return first + await asyncio.gather(*posts[64:], return_exceptions=True)

    ended = asyncio.run(work())
    assert {getattr(error, "http_status", error) for error in ended} == {201}
    assert len(payroc.seen) == 128
    assert len({request.client for request in payroc.seen}) == 64


def test_a_connection_that_was_idle_is_not_used_for_a_post(
    gateway, payroc, reply, refund_body, token, key
) -> None:
    payroc.on("POST", PATH, reply(201, refund_body))

    async def work() -> None:
        async with gateway:
            for wait in (0, 0.1, IDLE_SECONDS + 0.3):
                await asyncio.sleep(wait)
                await gateway.create_refund(token, key, BODY)

    asyncio.run(work())
    first, second, third = (request.client for request in payroc.seen)
    assert first == second != third


def test_a_connection_that_the_server_has_closed_meanwhile_is_not_used_again(reach, token, key) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(answer_of())
        time.sleep(0.1)
        connection.shutdown(socket.SHUT_RDWR)

    with talking(answer) as server:
        hook = reach(server)
        for _ in range(3):
            with pytest.raises(Exception, match="HTTP 404"):
                hook.create_refund(BODY, idempotency_key=key, token=token)
            time.sleep(0.3)
        assert (server.requests, server.connections) == (3, 3)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_is_sent_again_when_a_connection_that_was_used_before_is_lost(
    reach, token, key, method
) -> None:
    def answer(connection: socket.socket) -> None:
        if server.requests == 1:
            connection.sendall(answer_of())
        else:
            lost(connection)

    with talking(answer) as server:
        hook = reach(server)

        def call() -> None:
            if method == "GET":
                hook.get_refund("CD3HN88U9F", token=token)
            else:
                hook.create_refund(BODY, idempotency_key=key, token=token)

        with pytest.raises(Exception, match="HTTP 404"):
            call()
        with pytest.raises(PayrocNoAnswer, match="connection closed without an answer"):
            call()
        time.sleep(0.2)
        assert (server.requests, server.connections) == (2, 1)


def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next_requests(
    reach, refund_body, token, key
) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(answer_of())
        if server.requests == 1:
            time.sleep(0.1)
            connection.sendall(answer_of(status="408 Request Timeout"))

    with talking(answer) as server:
        hook = reach(server)
        for wait in (0.4, 0):
            with pytest.raises(Exception, match="HTTP 404"):
                hook.create_refund(BODY, idempotency_key=key, token=token)
            time.sleep(wait)


# --- answers that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"X-Long: " + b"a" * 100_000,
        b"\r\n".join(b"X-%d: %s" % (number, b"a" * 1000) for number in range(2000)),
        b"Broken header",
    ],
    ids=["one long header", "many headers", "a broken header"],
)
def test_a_head_that_is_too_large_or_broken_is_no_answer(reach, token, key, head) -> None:
    with talking(lambda connection: connection.sendall(answer_of(more=head + b"\r\n"))) as server:
        with pytest.raises(PayrocNoAnswer, match="not HTTP, or its head is too large"):
            reach(server).create_refund(BODY, idempotency_key=key, token=token)
        assert server.requests == 1


@pytest.mark.parametrize("chunk", [b"zz\r\n", b"5\r\nab"], ids=["broken", "cut off"])
def test_a_chunked_body_that_is_broken_is_no_answer(reach, token, key, chunk) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
        time.sleep(0.1)
        connection.close()

    with talking(answer) as server, pytest.raises(PayrocNoAnswer):
        reach(server).create_refund(BODY, idempotency_key=key, token=token)


def test_a_connection_that_is_not_taken_is_left_after_the_timeout(connect, token, key) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        url = "http://{}:{}".format(*full.getsockname())
        connect(host=f"{url}/v1", extra={"identity_url": url})
        with pytest.raises(PayrocNoAnswer, match=r"no connection within 0.3 s"):
            PayrocHook(timeout_seconds=0.3).create_refund(BODY, idempotency_key=key, token=token)
        for each in waiting:
            each.close()


@pytest.mark.parametrize(
    "broken",
    [lambda connection: connection.sendall(answer_of(status="403 Forbidden")), lost],
    ids=["refuses", "resets"],
)
def test_a_proxy_that_gives_no_way_through_is_no_answer(connect, token, key, broken) -> None:
    with talking(broken) as proxy:
        connect(extra={"proxy": proxy.url})
        with pytest.raises(PayrocNoAnswer):
            PayrocHook(timeout_seconds=60).create_refund(BODY, idempotency_key=key, token=token)
        assert proxy.requests == 1


def test_what_is_raised_carries_no_exception_of_the_library(reach, token, key) -> None:
    with talking(lost) as server, pytest.raises(PayrocNoAnswer) as caught:
        reach(server).create_refund(BODY, idempotency_key=key, token=token)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


# --- loops, threads, processes --------------------------------------------------------------------------------------------


def test_a_gateway_serves_one_event_loop_after_the_other(
    gateway, payroc, reply, refund_body, token, key
) -> None:
    payroc.on("POST", PATH, reply(201, refund_body))
    for _ in range(3):
        assert asyncio.run(gateway.create_refund(token, key, BODY)).refund_id == "CD3HN88U9F"
    assert len({request.client for request in payroc.seen}) == 3


def test_a_hook_is_called_in_threads_and_inside_a_running_loop_over_one_session(
    hook, payroc, reply, refund_body, token
) -> None:
    payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(200, refund_body))

    async def inside() -> str:
        return hook.get_refund("CD3HN88U9F", token=token).refund_id

    assert asyncio.run(inside()) == "CD3HN88U9F"
    for _ in range(3):
        thread = threading.Thread(target=hook.get_refund, args=["CD3HN88U9F"], kwargs={"token": token})
        thread.start()
        thread.join()
    assert len(payroc.seen) == 4
    assert len({request.client for request in payroc.seen}) == 1


def get_in_a_process(hook, token, results) -> None:
    results.put(hook.get_refund("CD3HN88U9F", token=token).refund_id)


def test_a_forked_process_has_connections_of_its_own_and_leaves_its_parents_alone(
    hook, payroc, reply, refund_body, token
) -> None:
    payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(200, refund_body))
    hook.get_refund("CD3HN88U9F", token=token)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=get_in_a_process, args=(hook, token, results), daemon=True)
    process.start()
    try:
        assert results.get(timeout=PATIENCE_SECONDS) == "CD3HN88U9F"
        process.join(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    hook.get_refund("CD3HN88U9F", token=token)
    assert process.exitcode == 0
    assert len(payroc.seen) == 3
    assert payroc.seen[0].client != payroc.seen[1].client


def functions_of(thread: threading.Thread) -> list[str]:
    """Return the names of the functions that a thread is in."""
    frame = sys._current_frames().get(thread.ident or 0)
    return [entry.name for entry in traceback.extract_stack(frame)]


def test_a_time_out_of_the_caller_ends_the_request(hook, payroc, reply, token, key) -> None:
    def alarm(*args: object) -> None:
        raise TimeoutError("the task's time is over")

    left = threading.Event()

    def answer(handler) -> None:
        # The request may be here before the caller waits for its answer.
        eventually(lambda: "result" in functions_of(threading.main_thread()), "the hook waits for its answer")
        os.kill(os.getpid(), signal.SIGALRM)
        if handler.connection.recv(1) == b"":
            left.set()

    payroc.on("POST", PATH, reply(raw=answer))
    before = signal.signal(signal.SIGALRM, alarm)
    try:
        with pytest.raises(TimeoutError, match="the task's time is over"):
            hook.create_refund(BODY, idempotency_key=key, token=token)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert left.wait(PATIENCE_SECONDS)


def test_a_request_that_is_cancelled_is_not_taken_for_one_without_an_answer(
    gateway, payroc, reply, token, key
) -> None:
    payroc.on("POST", PATH, reply(raw=lambda handler: payroc.stopped.wait()))

    async def work() -> None:
        post = asyncio.create_task(gateway.create_refund(token, key, BODY))
        await asyncio.sleep(0.2)
        post.cancel()
        await post

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work())


# --- tokens of many requests ----------------------------------------------------------------------------------------------


def test_64_refused_at_once_cost_one_new_token(gateway, payroc, reply, key) -> None:
    payroc.on("POST", PATH, reply(401, NOT_AUTHORIZED))

    async def refused(token: AccessToken) -> None:
        with pytest.raises(PayrocProblem):
            await gateway.create_refund(token, key, BODY)

    async def tokens() -> list[AccessToken]:
        return await asyncio.gather(*[gateway.token() for _ in range(64)])

    async def work() -> set[str]:
        await asyncio.gather(*[refused(token) for token in await tokens()])
        return {token.access_token.get_secret_value() for token in await tokens()}

    assert asyncio.run(work()) == {"canary-token-2"}
    assert len(payroc.of("/authorize")) == 2


# --- how it ends ----------------------------------------------------------------------------------------------------------

ENDS = {
    "a hook": """
hook = PayrocHook()
hook.get_token()
PayrocHook().get_token(younger_than=0)""",
    "a gateway that is closed": """
async def work():
    async with connect("payroc_default") as gateway:
        await gateway.token()
asyncio.run(work())""",
    "a gateway that nobody closes": """
gateway = connect("payroc_default")
asyncio.run(gateway.token())
asyncio.run(gateway.token(younger_than=0))""",
    "both, forgotten in a running loop": """
async def work():
    gateway, hook = connect("payroc_default"), PayrocHook()
    await gateway.token()
    hook.get_token()
    del gateway, hook
    await asyncio.sleep(0.1)
asyncio.run(work())""",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_nothing_is_left_open_and_nothing_is_said_of_it(hook, payroc, end) -> None:
    program = (
        "import asyncio\nfrom payroc_airflow.gateway import connect\nfrom payroc_airflow.hooks.payroc import PayrocHook\n"
        + end
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", program],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if "nclosed" in line or "destroyed" in line or "retrieved" in line
    ]
    assert said == []
    assert payroc.tokens >= 1


def test_a_gateway_can_be_used_after_it_was_closed(hook, payroc) -> None:
    async def work() -> list[str]:
        gateway = connect_gateway("payroc_default")
        tokens = []
        for _ in range(2):
            async with gateway, gateway.turn():
                tokens.append((await gateway.token()).access_token.get_secret_value())
        return tokens

    assert asyncio.run(work()) == ["canary-token-1"] * 2


def test_a_list_is_read_to_its_end_by_the_gateway(gateway, payroc, reply, refund_body, token) -> None:
    page = {
        "limit": 100,
        "count": 1,
        "hasMore": True,
        "links": [{"rel": "next", "method": "get", "href": f"{PATH}?after=a"}],
    }
    payroc.on(
        "GET",
        PATH,
        reply(200, page | {"data": [refund_body]}),
        reply(200, page | {"data": [refund_body], "hasMore": False}),
    )

    async def work() -> int:
        listed: AsyncIterator[object] = gateway.list_refunds(token, processing_terminal_id="1234001")
        return len([refund async for refund in listed])

    assert asyncio.run(work()) == 2
