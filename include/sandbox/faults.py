"""Failures on demand: what can go wrong with one request, and the queue that the admin endpoints fill."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from http import HTTPStatus
from typing import Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from include.sandbox.answers import HTML, Answer
from include.sandbox.problems import problem

OperationName = Literal["authorize", "create", "list", "get", "reverse", "close-batch"]


class Fault(BaseModel):
    """
    One failure.

    ``before`` happens before the request is processed: nothing is created and no idempotency key is taken. ``after`` happens when
    the outcome is committed and saved under the key: only the answer is lost or spoilt. A ``slow`` request holds its key while it
    waits before processing.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")

    kind: Literal["problem", "status", "hang", "close", "garbage", "empty", "body", "slow"]
    when: Literal["before", "after"] = "before"
    problem: str = Field("api-error", description="problem: fragment of the problem type.")
    parameter: str | None = Field(None, description="problem: the parameter that errors[] names.")
    resource: str | None = Field(None, description="problem: the resource member, as on a 403.")
    content: Base64Bytes | None = Field(None, description="body: the bytes of the answer, in base64.")
    status: int | None = Field(None, ge=200, le=599, description="HTTP status; status and problem only.")
    retry_after_seconds: int | None = Field(
        None, ge=0, description="Retry-After header; a 429 has one anyway."
    )
    seconds: float | None = Field(
        None, ge=0, description="hang and slow: how long. Default of hang: --hang-seconds; of slow: 1."
    )

    def answer(self, *, normal_status: int, hang_seconds: float, retry_after_seconds: int) -> Answer:
        """
        Give the answer that the client gets instead of the normal one.

        :param normal_status: HTTP status of the answer that this one replaces; garbage, empty and body keep
            it.
        :param hang_seconds: how long a hang lasts when the fault does not say it.
        :param retry_after_seconds: Retry-After of a 429 when the fault does not say it.
        """
        retry_after = self.retry_after_seconds
        if retry_after is None and self.status == HTTPStatus.TOO_MANY_REQUESTS:
            retry_after = retry_after_seconds
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        match self.kind:
            case "problem":
                members = {} if self.resource is None else {"resource": self.resource}
                errors = None
                if self.parameter is not None:
                    errors = [
                        {
                            "parameter": self.parameter,
                            "detail": "Invalid format",
                            "message": f"'{self.parameter}' is not valid",
                        }
                    ]
                return problem(self.problem, status=self.status, errors=errors, headers=headers, **members)
            case "status":
                status = self.status or 503
                return Answer(status, _html(f"{status} {_phrase(status)}"), HTML, headers)
            case "hang":
                return Answer(None, hold_seconds=hang_seconds if self.seconds is None else self.seconds)
            case "close":
                return Answer(None)
            case "garbage":
                return Answer(normal_status, _html("Welcome"), HTML, headers)
            case "empty":
                return Answer(normal_status, headers=headers)
            case "body":
                return Answer(normal_status, self.content or b"", headers=headers)
            case "slow":
                raise ValueError("A slow request gets its normal answer.")

    @property
    def delay_seconds(self) -> float:
        """Seconds by which a slow request is delayed."""
        return 1.0 if self.seconds is None else self.seconds


class QueuedFault(Fault):
    """A fault that waits for its requests."""

    operation: OperationName = Field(description="The operation that it hits.")
    order_id: str | None = Field(None, description="Hit only requests about this order id.")
    times: int = Field(1, ge=1, description="How many requests it hits.")


class FaultQueue:
    """Queued faults, in memory only: a restarted sandbox starts without any."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._queued: dict[int, tuple[QueuedFault, int]] = {}
        self._delayed: dict[asyncio.Event, str | None] = {}

    def add(self, fault: QueuedFault) -> int:
        """Queue a fault and return its number."""
        number = next(self._ids)
        self._queued[number] = (fault, fault.times)
        return number

    def take(self, operation: str, order_id: str | None) -> Fault | None:
        """
        Take the oldest fault that matches a request; it counts as used.

        :param order_id: the order id that the request is about, None when it names none.
        """
        for number, (fault, left) in self._queued.items():
            if fault.operation == operation and fault.order_id in (None, order_id):
                if left > 1:
                    self._queued[number] = (fault, left - 1)
                else:
                    del self._queued[number]
                return fault
        return None

    def waiting(self) -> list[dict[str, object]]:
        """List the faults that still wait, oldest first, each with its number and the times that are left."""
        return [
            {"id": number, "left": left, **fault.model_dump(by_alias=True, exclude_none=True)}
            for number, (fault, left) in self._queued.items()
        ]

    async def delay(self, fault: Fault, order_id: str | None) -> None:
        """
        Delay a slow request, until its fault is cleared at the latest.

        :param order_id: the order id that the request is about, None when it names none.
        """
        cleared = asyncio.Event()
        self._delayed[cleared] = order_id
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(cleared.wait(), fault.delay_seconds)
        finally:
            del self._delayed[cleared]

    def clear(self, order_id: str | None = None) -> None:
        """
        Forget queued faults, and let delayed requests continue.

        :param order_id: only those about this order id, None for all.
        """
        for number, (fault, _) in list(self._queued.items()):
            if order_id in (None, fault.order_id):
                del self._queued[number]
        for cleared, about in self._delayed.items():
            if order_id in (None, about):
                cleared.set()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def _html(title: str) -> str:
    return f"<!doctype html><html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
