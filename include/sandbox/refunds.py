"""
A refund as Payroc shows it, and how it changes.

Status words and their meaning are Payroc's. Which change follows which event is published only as text; the sandbox takes ``ready``
(or ``pending``, ``admin``, ``declined``) at creation, ``complete`` when the batch closes on a ready refund, ``reversal`` when a ready or
pending one is reversed, ``returned`` when the bank returns it.
"""

from __future__ import annotations

import copy
import hashlib
from datetime import UTC, datetime
from typing import Any

from include.sandbox.store import Refund
from include.sandbox.triggers import Trigger

REVERSIBLE = ("ready", "pending")
PAYEE = "Sandbox Payee"


def new_refund(
    content: dict[str, Any], *, refund_id: str, created_at: float, idempotency_key: str, trigger: Trigger
) -> Refund:
    """
    Make the refund that a valid request asks for.

    :param content: the parsed body of the create.
    :param created_at: seconds since the epoch.
    """
    order = content["order"]
    account = _bank_account(content["refundMethod"])
    declined = trigger.status == "declined"
    shown: dict[str, Any] = {
        "refundId": refund_id,
        "processingTerminalId": content["processingTerminalId"],
        "order": {
            "orderId": order["orderId"],
            "dateTime": instant(created_at),
            "description": order["description"],
            "amount": order["amount"],
            "currency": order["currency"],
        },
    }
    if "customer" in content:
        shown["customer"] = content["customer"]
    shown["bankAccount"] = account
    shown["transactionResult"] = {
        "type": "unreferencedRefund",
        "status": trigger.status,
        "authorizedAmount": -order["amount"],
        "currency": order["currency"],
        "responseCode": "D" if declined else "A",
        "responseMessage": "Refund Declined" if declined else "NoError",
        "processorResponseCode": "R03" if declined else "0",
    }
    if "customFields" in content:
        shown["customFields"] = content["customFields"]
    return Refund(
        refund_id=refund_id,
        terminal=content["processingTerminalId"],
        order_id=order["orderId"],
        name=account["nameOnAccount"],
        last4=account["accountNumber"][-4:],
        created_at=created_at,
        idempotency_key=idempotency_key,
        digits=trigger.digits,
        object=shown,
    )


def with_wrong_amount(shown: dict[str, Any]) -> dict[str, Any]:
    """Copy a refund object and raise its ``order.amount`` by one minor unit."""
    wrong = copy.deepcopy(shown)
    wrong["order"]["amount"] += 1
    return wrong


def reverse(refund: Refund) -> None:
    """Take a refund out of its open batch."""
    refund.object["transactionResult"]["status"] = "reversal"


def settle(refund: Refund, at: float) -> None:
    """Settle a refund: the batch closed at this instant and the funds moved."""
    refund.object["transactionResult"]["status"] = "complete"
    refund.settled_at = at


def return_by_bank(refund: Refund, return_code: str = "R01") -> None:
    """Mark a refund as returned; the NACHA code shows as the processor's response code, as it does on payments."""
    refund.object["transactionResult"].update(status="returned", processorResponseCode=return_code)


def instant(seconds: float) -> str:
    """Write an instant as Payroc does: ISO 8601 in UTC, whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _bank_account(method: dict[str, Any]) -> dict[str, Any]:
    account: dict[str, Any] = {"type": "ach"}
    if "secCode" in method:
        account["secCode"] = method["secCode"]
    if method["type"] == "ach":
        account["nameOnAccount"] = method["nameOnAccount"]
        account["accountNumber"] = "****" + method["accountNumber"][-4:]
        account["routingNumber"] = "*****" + method["routingNumber"][-4:]
        return account
    # The account behind a token is not the token: its digits are made up, but the same for the same token.
    digits = str(int(hashlib.sha256(method["token"].encode()).hexdigest()[:12], 16)).zfill(8)[-8:]
    account["nameOnAccount"] = PAYEE
    account["accountNumber"] = "****" + digits[:4]
    account["routingNumber"] = "*****" + digits[4:]
    account["secureToken"] = {
        "secureTokenId": "MREF_" + hashlib.sha256(b"id" + method["token"].encode()).hexdigest()[:32],
        "customerName": PAYEE,
        "token": method["token"],
        "status": "bankAccountValidated",
    }
    return account
