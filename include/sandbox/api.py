"""
Payroc's API: create, list, retrieve and reverse bank transfer refunds, close a batch.

Assumptions, since Payroc does not say:

- Every terminal id of 4 to 50 characters exists and has ACH. A terminal that the admin endpoints set to ``not-enabled`` answers a create
  with 403 ``forbidden``, one set to ``no-ach`` with 400 ``capabilities-missing``; its other operations work.
- A second refund with the same order id is accepted: the sandbox never protects a client from paying twice, it shows it.
- A refund that is not ``ready`` or ``pending`` cannot be reversed: 400 ``bad-request``, saved under the key.
- A refund id that does not have 10 characters is 400 ``bad-request``; an unknown one is 404.
- Closing a batch settles at once, although ACH takes days.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from include.sandbox.answers import Answer, Refusal
from include.sandbox.listing import list_page, shown_refunds
from include.sandbox.pipeline import Call, Operation, Sandbox, answer_of, serve
from include.sandbox.problems import problem
from include.sandbox.refunds import REVERSIBLE, new_refund, return_by_bank, reverse, settle, with_wrong_amount
from include.sandbox.store import Condition, Refund
from include.sandbox.triggers import RETURNING, Trigger, trigger_for
from include.sandbox.validation import create_errors, invalid

CREATE = Operation("create", success=201, key=True, body=True)
LIST = Operation("list")
GET = Operation("get")
REVERSE = Operation("reverse", key=True)
CLOSE_BATCH = Operation("close-batch", success=202, key=True)

REFUND_ID_LENGTH = 10


def api_routes(sandbox: Sandbox) -> APIRouter:
    """Make the routes below ``/v1``."""
    router = APIRouter(prefix="/v1")
    store = sandbox.store

    def create_refund(call: Call) -> Answer:
        if not call.is_json:
            raise Refusal(
                problem(
                    "bad-request",
                    errors=[{"detail": "Invalid format", "message": "The body is not valid JSON"}],
                )
            )
        errors = create_errors(call.content, demand_sec_code=sandbox.options.demand_sec_code)
        if errors:
            raise Refusal(problem("bad-request", errors=errors))
        _check_terminal(store.terminal_mode(call.content["processingTerminalId"]), str(call.request.url))
        method = call.content["refundMethod"]
        trigger = trigger_for(method["accountNumber"] if method["type"] == "ach" else method["token"])
        _pull(sandbox, call, trigger)
        refund = new_refund(
            call.content,
            refund_id=store.new_refund_id(),
            created_at=store.now(),
            idempotency_key=call.key,
            trigger=trigger,
        )
        store.add_refund(refund)
        call.entry.refund_id = refund.refund_id
        call.entry.created = True
        shown = with_wrong_amount(refund.object) if trigger.wrong_amount else refund.object
        return Answer(
            201,
            json.dumps(shown),
            headers={"Location": f"{call.base_url}/bank-transfer-refunds/{refund.refund_id}"},
        )

    def list_refunds(call: Call) -> Answer:
        return list_page(store, call.request.query_params, f"{call.base_url}/bank-transfer-refunds")

    def get_refund(call: Call) -> Answer:
        return Answer(200, json.dumps(_refund(sandbox, call).object))

    def reverse_refund(call: Call) -> Answer:
        refund = _refund(sandbox, call)
        if refund.status not in REVERSIBLE:
            raise Refusal(
                problem(
                    "bad-request",
                    detail=f"Bank transfer with status {refund.status.upper()} can not be reversed",
                )
            )
        reverse(refund)
        store.change_refund(refund)
        return Answer(200, json.dumps(refund.object))

    def close_batch(call: Call) -> Answer:
        terminal = call.request.path_params["processingTerminalId"]
        if not 4 <= len(terminal) <= 50:
            raise Refusal(problem("bad-request", errors=[invalid("processingTerminalId")]))
        close_batch_of(sandbox, terminal)
        cut_off = datetime.fromtimestamp(store.now(), UTC).strftime("%H:%M")
        return Answer(202, json.dumps({"cutOffTime": cut_off, "timezone": "Etc/UTC"}))

    @router.post("/bank-transfer-refunds")
    async def create(request: Request) -> Response:
        return await serve(sandbox, request, CREATE, create_refund)

    @router.get("/bank-transfer-refunds")
    async def list_(request: Request) -> Response:
        return await serve(sandbox, request, LIST, list_refunds, order_id=request.query_params.get("orderId"))

    @router.get("/bank-transfer-refunds/{refundId}")
    async def get(request: Request) -> Response:
        return await serve(sandbox, request, GET, get_refund, order_id=_order_id(sandbox, request))

    @router.post("/bank-transfer-refunds/{refundId}/reverse")
    async def reverse_(request: Request) -> Response:
        return await serve(sandbox, request, REVERSE, reverse_refund, order_id=_order_id(sandbox, request))

    @router.post("/processing-terminals/{processingTerminalId}/close-batch")
    async def close(request: Request) -> Response:
        return await serve(sandbox, request, CLOSE_BATCH, close_batch)

    return router


def close_batch_of(sandbox: Sandbox, terminal: str) -> None:
    """Close the open batch of a terminal: ready refunds settle, and what the bank returns is returned one batch after it settled."""
    store = sandbox.store
    in_terminal = Condition("terminal = ?", (terminal,))
    marks = ",".join("?" * len(RETURNING))
    returned = store.refunds(
        [in_terminal, Condition("status = 'complete'"), Condition(f"digits IN ({marks})", RETURNING)]
    )
    for refund in store.refunds([in_terminal, Condition("status = 'ready'")]):
        settle(refund, store.now())
        store.change_refund(refund)
    for refund in returned:
        return_by_bank(refund)
        store.change_refund(refund)


def _pull(sandbox: Sandbox, call: Call, trigger: Trigger) -> None:
    """Let a trigger act: refuse now, or leave its fault for the answer after the commit."""
    fault = trigger.fault
    if trigger.once and sandbox.store.has_triggered(call.key, trigger.digits):
        return
    if trigger.digits:
        call.entry.behaviour = trigger.digits
    if fault is None:
        return
    if fault.when == "before":
        raise Refusal(answer_of(sandbox, fault, CREATE.success))
    # A queued fault was asked for explicitly: it wins.
    call.late = call.late or fault


def _check_terminal(mode: str, instance: str) -> None:
    if mode == "not-enabled":
        raise Refusal(problem("forbidden", instance=instance, resource="processingTerminal"))
    if mode == "no-ach":
        message = "Processing terminal does not support bank transfers"
        raise Refusal(
            problem(
                "capabilities-missing", errors=[{"parameter": "processingTerminalId", "message": message}]
            )
        )


def _refund(sandbox: Sandbox, call: Call) -> Refund:
    refund_id = call.request.path_params["refundId"]
    if len(refund_id) != REFUND_ID_LENGTH:
        raise Refusal(problem("bad-request", errors=[invalid("refundId")]))
    found = sandbox.store.refunds([Condition("refund_id = ?", (refund_id,)), shown_refunds(sandbox.store)])
    if not found:
        raise Refusal(problem("not-found", resource="bankTransferRefund"))
    call.entry.refund_id = refund_id
    return found[0]


def _order_id(sandbox: Sandbox, request: Request) -> str | None:
    refund = sandbox.store.refund(request.path_params["refundId"])
    return None if refund is None else refund.order_id
