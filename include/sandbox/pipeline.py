"""
The way of every request: queued fault, identity, headers, idempotency key, work, journal, answer.

Documented: a key is required on every POST and is a UUID v4; the same key with the same URI and body gets the saved first response; with
another URI or body 409 ``idempotency-key-in-use``; keys are kept for 7 days.

Assumptions, since Payroc does not say:

- Bodies are the same when their parsed JSON is equal; a body that is not JSON is compared byte by byte. The URI is method and path.
- A key belongs to the whole sandbox, whatever the terminal or the API key.
- 2xx and 400 ``bad-request`` are saved under the key. Other refusals and 5xx are not: the next request with the key is processed.
- A key whose first request is still being processed answers 409 ``idempotency-key-in-use``.
- After 7 days a key is new, and the same request creates a second refund.
- A malformed key is 400 ``bad-request`` that names ``Idempotency-Key``. Upper and lower case are the same key.
- Identity is checked first, then Accept (it must admit ``application/json``), size (1 MiB), Content-Type, key, body.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from include.sandbox.answers import Answer, Refusal
from include.sandbox.connections import HeldConnections, NoAnswer
from include.sandbox.faults import Fault, FaultQueue, OperationName
from include.sandbox.problems import problem
from include.sandbox.store import JournalEntry, SavedResponse, Store
from include.sandbox.validation import invalid

MAX_BODY_BYTES = 1024 * 1024
MAX_ORDER_ID = 24
UUID4 = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """
    What the command line sets.

    :param api_keys: the accepted keys; empty accepts every key that does not begin with ``wrong``.
    :param token_seconds: lifetime of access tokens.
    :param hang_seconds: how long a hanging request is held.
    :param demand_sec_code: refuse a create without ``secCode``.
    """

    api_keys: frozenset[str] = frozenset()
    token_seconds: int = 3600
    hang_seconds: float = 60.0
    demand_sec_code: bool = True


@dataclass
class Sandbox:
    """One running sandbox. ``in_flight`` holds the keys whose first request is being processed."""

    store: Store
    options: Options = field(default_factory=Options)
    faults: FaultQueue = field(default_factory=FaultQueue)
    held: HeldConnections = field(default_factory=HeldConnections)
    in_flight: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Operation:
    """
    What all requests of one operation have in common.

    :param success: HTTP status when all goes well.
    :param bearer: an access token is required.
    :param key: an idempotency key is required.
    :param body: a JSON body is required.
    """

    name: OperationName
    success: int = 200
    bearer: bool = True
    key: bool = False
    body: bool = False


@dataclass
class Call:
    """
    One request on its way.

    :param content: the parsed body, None when there is none or it is not JSON.
    :param late: what happens to the answer after the commit.
    """

    request: Request
    operation: Operation
    raw: bytes
    content: Any
    is_json: bool
    entry: JournalEntry
    late: Fault | None = None

    @property
    def key(self) -> str:
        """The idempotency key; only for operations that require one."""
        key = self.entry.idempotency_key
        assert key is not None  # noqa: S101 - the pipeline refuses the request before
        return key

    @property
    def base_url(self) -> str:
        """Absolute URL of the API as this client reaches it, without a slash at its end."""
        return f"{self.request.url.scheme}://{self.request.url.netloc}/v1"


Work = Callable[[Call], Answer]


async def serve(
    sandbox: Sandbox, request: Request, operation: Operation, work: Work, *, order_id: str | None = None
) -> Response:
    """
    Answer one request.

    :param work: does what the operation is about, inside a transaction; may raise Refusal.
    :param order_id: the order id that the request is about, when it does not stand in the body.
    """
    try:
        raw = await request.body()
    except ClientDisconnect:
        return NoAnswer(sandbox.held, 0)
    call = _receive(sandbox.store, request, operation, raw, order_id)
    fault = sandbox.faults.take(operation.name, call.entry.order_id)
    early = fault if fault is not None and fault.when == "before" else None
    call.late = fault if fault is not None and fault.when == "after" else None
    if fault is not None:
        call.entry.behaviour = "queued"
    if early is not None and early.kind == "slow":
        return await _process(sandbox, call, work, delay=early)
    if early is not None:
        return _commit(sandbox, call, lambda _: answer_of(sandbox, early, operation.success))
    return await _process(sandbox, call, work)


def answer_of(sandbox: Sandbox, fault: Fault, normal_status: int) -> Answer:
    """Give the answer of a fault with the sandbox's own defaults."""
    return fault.answer(
        normal_status=normal_status,
        hang_seconds=sandbox.options.hang_seconds,
        retry_after_seconds=sandbox.store.settings.retry_after_seconds,
    )


async def _process(sandbox: Sandbox, call: Call, work: Work, *, delay: Fault | None = None) -> Response:
    try:
        _check_headers(sandbox.store, call)
        with _own_key(sandbox, call):
            if delay is not None:
                await sandbox.faults.delay(delay, call.entry.order_id)
            response = _commit(sandbox, call, lambda call: _once_per_key(sandbox.store, call, work))
    except Refusal as refused:
        answer = refused.answer
        return _commit(sandbox, call, lambda _: answer)
    if call.late is not None and call.late.kind == "slow":
        await sandbox.faults.delay(call.late, call.entry.order_id)
    return response


def _commit(sandbox: Sandbox, call: Call, work: Work) -> Response:
    """Work and journal in one transaction; the answer is sent only after it."""
    with sandbox.store.transaction():
        answer = work(call)
        if call.late is not None and call.late.kind != "slow":
            answer = answer_of(sandbox, call.late, answer.status or call.operation.success)
        call.entry.status = answer.status
        sandbox.store.record(call.entry)
    if answer.status is None:
        return NoAnswer(sandbox.held, answer.hold_seconds)
    return Response(answer.body, answer.status, dict(answer.headers), answer.media_type)


def _once_per_key(store: Store, call: Call, work: Work) -> Answer:
    if not call.operation.key:
        return _answer(call, work)
    uri, fingerprint = f"{call.request.method} {call.request.url.path}", _fingerprint(call)
    saved = store.saved_response(call.key)
    if saved is not None:
        if (saved.uri, saved.fingerprint) != (uri, fingerprint):
            return problem("idempotency-key-in-use")
        call.entry.replayed = True
        call.entry.refund_id = saved.refund_id
        return saved.answer
    answer = _answer(call, work)
    if answer.is_verdict:
        store.save_response(call.key, SavedResponse(uri, fingerprint, call.entry.refund_id, answer))
    return answer


def _answer(call: Call, work: Work) -> Answer:
    try:
        return work(call)
    except Refusal as refused:
        return refused.answer


@contextmanager
def _own_key(sandbox: Sandbox, call: Call) -> Iterator[None]:
    if not call.operation.key:
        yield
        return
    if call.key in sandbox.in_flight:
        raise Refusal(problem("idempotency-key-in-use"))
    sandbox.in_flight.add(call.key)
    try:
        yield
    finally:
        sandbox.in_flight.discard(call.key)


def _receive(store: Store, request: Request, operation: Operation, raw: bytes, order_id: str | None) -> Call:
    content, is_json = _parse(raw)
    if order_id is None and isinstance(content, dict) and isinstance(content.get("order"), dict):
        order_id = content["order"].get("orderId")
    if not (isinstance(order_id, str) and len(order_id) <= MAX_ORDER_ID and order_id.isprintable()):
        order_id = None
    key = request.headers.get("Idempotency-Key", "")
    entry = JournalEntry(
        at=store.now(),
        operation=operation.name,
        idempotency_key=key.lower() if UUID4.fullmatch(key) else None,
        order_id=order_id,
    )
    return Call(request, operation, raw, content, is_json, entry)


def _check_headers(store: Store, call: Call) -> None:
    headers = call.request.headers
    if call.operation.bearer:
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        call.entry.token = store.token_serial(token.strip()) if scheme.lower() == "bearer" else None
        if call.entry.token is None:
            raise Refusal(problem("not-authorized"))
    if not _admits_json(headers.get("Accept", "*/*")):
        raise Refusal(problem("not-acceptable"))
    if len(call.raw) > MAX_BODY_BYTES:
        raise Refusal(problem("payload-too-large"))
    has_body = call.operation.body or (call.operation.key and call.raw)
    if has_body and headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(problem("unsupported-media-type"))
    if call.operation.key and call.entry.idempotency_key is None:
        if not headers.get("Idempotency-Key"):
            raise Refusal(problem("idempotency-key-missing"))
        raise Refusal(
            problem("bad-request", errors=[invalid("Idempotency-Key", "'Idempotency-Key' must be a UUID v4")])
        )


def _admits_json(accept: str) -> bool:
    for media_range in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in media_range.split(";"))
        refused = any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
        if media_type in ("*/*", "application/*", "application/json") and not refused:
            return True
    return False


def _parse(raw: bytes) -> tuple[Any, bool]:
    try:
        return json.loads(raw, parse_constant=_no_constant), True
    except (ValueError, RecursionError):
        return None, False


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _fingerprint(call: Call) -> str:
    same = (
        json.dumps(call.content, sort_keys=True, separators=(",", ":")).encode() if call.is_json else call.raw
    )
    return hashlib.sha256(same).hexdigest()
