"""
The admin endpoints below ``/_sandbox``: the sandbox's own record, and its behaviour on demand.

They have no authentication: the sandbox is a tool for the loopback interface and holds nothing but made-up data.
"""

from __future__ import annotations

import os
from collections import Counter
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from include.sandbox.faults import OperationName, QueuedFault
from include.sandbox.pipeline import Sandbox
from include.sandbox.refunds import instant, return_by_bank, settle
from include.sandbox.store import Condition, Refund


class _Body(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")


class SettingsChange(_Body):
    """Settings to change; what is absent stays."""

    list_lag_seconds: float | None = Field(None, ge=0)
    list_duplicates: bool | None = None
    retry_after_seconds: int | None = Field(None, ge=0)


class TerminalChange(_Body):
    """What a terminal may do."""

    mode: Literal["enabled", "not-enabled", "no-ach"]


class ClockChange(_Body):
    """How far to advance the sandbox's clock."""

    advance_seconds: float = Field(ge=0)


class RefundChange(_Body):
    """A new status of a refund; any word is allowed, so that a client can meet one that it does not know."""

    status: str = Field(min_length=1, max_length=50)
    response_code: str | None = None
    processor_response_code: str | None = None


def admin_routes(sandbox: Sandbox) -> APIRouter:
    """Make the routes below ``/_sandbox``."""
    router = APIRouter(prefix="/_sandbox")
    store = sandbox.store

    @router.get("/health")
    async def health() -> dict[str, Any]:
        # The process id tells whoever started a sandbox that it is this one which has the port.
        return {
            "status": "ok",
            "now": _exact(store.now()),
            "refunds": store.count_refunds(),
            "pid": os.getpid(),
        }

    @router.get("/refunds")
    async def refunds(orderId: str | None = None) -> dict[str, Any]:
        found = store.refunds(
            [] if orderId is None else [Condition("order_id = ?", (orderId,))], newest_first=False
        )
        return {
            "count": len(found),
            "refundsPerOrder": Counter(refund.order_id for refund in found),
            "refunds": [_shown(refund) for refund in found],
        }

    @router.patch("/refunds/{refundId}")
    async def change_refund(refundId: str, change: RefundChange) -> dict[str, Any]:
        refund = store.refund(refundId)
        if refund is None:
            raise HTTPException(404)
        result = refund.object["transactionResult"]
        match change.status:
            case "complete":
                settle(refund, store.now())
            case "returned":
                return_by_bank(refund)
            case _:
                result["status"] = change.status
        if change.response_code is not None:
            result["responseCode"] = change.response_code
        if change.processor_response_code is not None:
            result["processorResponseCode"] = change.processor_response_code
        store.change_refund(refund)
        return _shown(refund)

    @router.get("/requests")
    async def requests(
        operation: OperationName | None = None, orderId: str | None = None, idempotencyKey: str | None = None
    ) -> dict[str, Any]:
        wanted = {"operation = ?": operation, "order_id = ?": orderId, "idempotency_key = ?": idempotencyKey}
        entries = store.journal(
            [Condition(sql, (value,)) for sql, value in wanted.items() if value is not None]
        )
        return {
            "count": len(entries),
            "tokensIssued": store.tokens_issued(),
            "requests": [
                {
                    "n": number,
                    "at": _exact(entry.at),
                    "operation": entry.operation,
                    "idempotencyKey": entry.idempotency_key,
                    "orderId": entry.order_id,
                    "refundId": entry.refund_id,
                    "status": entry.status,
                    "created": entry.created,
                    "replayed": entry.replayed,
                    "behaviour": entry.behaviour,
                    "token": entry.token,
                }
                for number, entry in entries
            ],
        }

    @router.get("/faults")
    async def faults() -> dict[str, Any]:
        return {"faults": sandbox.faults.waiting()}

    @router.post("/faults", status_code=201)
    async def add_fault(fault: QueuedFault) -> dict[str, Any]:
        return {"id": sandbox.faults.add(fault)}

    @router.delete("/faults", status_code=204)
    async def clear_faults(orderId: str | None = None) -> None:
        sandbox.faults.clear(orderId)

    @router.get("/settings")
    async def settings() -> dict[str, Any]:
        return {to_camel(name): value for name, value in vars(store.settings).items()}

    @router.patch("/settings")
    async def change_settings(change: SettingsChange) -> dict[str, Any]:
        store.change_settings(**change.model_dump(exclude_none=True))
        return await settings()

    @router.get("/terminals")
    async def terminals() -> dict[str, Any]:
        return {"terminals": store.terminals()}

    @router.put("/terminals/{processingTerminalId}")
    async def set_terminal(processingTerminalId: str, change: TerminalChange) -> dict[str, Any]:
        store.set_terminal_mode(processingTerminalId, change.mode)
        return await terminals()

    @router.post("/clock")
    async def advance_clock(change: ClockChange) -> dict[str, Any]:
        store.change_settings(
            clock_offset_seconds=store.settings.clock_offset_seconds + change.advance_seconds
        )
        return {"now": _exact(store.now())}

    @router.post("/tokens/revoke")
    async def revoke_tokens() -> dict[str, Any]:
        return {"revoked": store.revoke_tokens()}

    @router.post("/reset", status_code=204)
    async def reset() -> None:
        store.reset()
        sandbox.faults.clear()

    return router


def _shown(refund: Refund) -> dict[str, Any]:
    result = refund.object["transactionResult"]
    return {
        "refundId": refund.refund_id,
        "processingTerminalId": refund.terminal,
        "orderId": refund.order_id,
        "amount": refund.amount,
        "currency": refund.currency,
        "last4": refund.last4,
        "status": refund.status,
        "responseCode": result["responseCode"],
        "processorResponseCode": result["processorResponseCode"],
        "idempotencyKey": refund.idempotency_key,
        "createdAt": _exact(refund.created_at),
        "settledAt": None if refund.settled_at is None else instant(refund.settled_at),
    }


def _exact(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
