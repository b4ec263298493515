"""What both scripts share: the two statements, the request and the answer, the command line."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

APPROVED = """
    SELECT source_ref, processing_terminal_id, order_id, description, amount, currency, name_on_account, account_type, sec_code,
        routing_number, account_number
    FROM refund_requests WHERE approved_at IS NOT NULL AND withdrawn_at IS NULL AND status IS NULL
    ORDER BY approved_at, source_ref LIMIT $1"""

PAID = """
    UPDATE refund_requests SET status = 'accepted', payroc_refund_id = $2, payroc_status = $3, updated_at = now() WHERE source_ref = $1"""


class _Model(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class Order(_Model):
    """What is refunded."""

    order_id: str = Field(min_length=1, max_length=24)
    description: str = Field(max_length=256)
    amount: int = Field(gt=0)
    currency: str = Field(min_length=3, max_length=3)


class RefundMethod(_Model):
    """The payee's account."""

    type: Literal["ach"] = "ach"
    name_on_account: str = Field(max_length=50)
    account_type: Literal["checking", "savings"]
    sec_code: Literal["ppd", "ccd"]
    routing_number: str = Field(pattern=r"^\d{9}$")
    account_number: str = Field(pattern=r"^\d{4,17}$")


class RefundRequest(_Model):
    """The body of the POST."""

    processing_terminal_id: str
    order: Order
    refund_method: RefundMethod


class TransactionResult(_Model):
    """What became of it."""

    status: str
    response_code: str
    authorized_amount: int


class RefundAnswer(_Model):
    """A refund that exists."""

    refund_id: str
    processing_terminal_id: str
    order: Order
    transaction_result: TransactionResult


class AccessToken(BaseModel):
    """A bearer token."""

    access_token: str
    expires_in: int


def key_of(source_ref: str) -> str:
    """Return the idempotency key of a refund, the same each time."""
    return str(uuid.UUID(bytes=hashlib.sha256(source_ref.encode()).digest()[:16], version=4))


def body_of(row: Mapping[str, Any]) -> bytes:
    """Return the body of the POST for a row."""
    request = RefundRequest(
        processing_terminal_id=row["processing_terminal_id"],
        order=Order(
            order_id=row["order_id"],
            description=row["description"],
            amount=row["amount"],
            currency=row["currency"],
        ),
        refund_method=RefundMethod(
            name_on_account=row["name_on_account"],
            account_type=row["account_type"],
            sec_code=row["sec_code"],
            routing_number=row["routing_number"],
            account_number=row["account_number"],
        ),
    )
    return request.model_dump_json(by_alias=True).encode()


def command(description: str | None, pay: Callable[..., Awaitable[dict[str, float]]]) -> None:
    """Pay what the command line asks for, and print how many refunds that were and how long it took."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--database", required=True)
    parser.add_argument("--payroc", required=True)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--limit", type=int, required=True)

    async def paid() -> dict[str, float]:
        return await pay(**vars(parser.parse_args()))

    print(json.dumps(asyncio.run(paid())))
