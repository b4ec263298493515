"""
Pay approved refunds with asyncio, httpx and asyncpg: what many would write today, and what a generated SDK does below.

It does the same as :mod:`benchmarks.peers.aiohttp_script`, with the other client.
"""

from __future__ import annotations

import asyncio
import time

import asyncpg
import httpx

from benchmarks.peers.models import APPROVED, PAID, AccessToken, RefundAnswer, body_of, command, key_of


async def pay(database: str, payroc: str, concurrency: int, limit: int) -> dict[str, float]:
    """Pay at most so many approved refunds."""
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with (
        asyncpg.create_pool(database, min_size=8, max_size=16) as pool,
        httpx.AsyncClient(limits=limits, timeout=30) as client,
    ):
        began = time.perf_counter()
        answer = await client.post(f"{payroc}/authorize", headers={"x-api-key": "key"})
        token = AccessToken.model_validate_json(answer.content)
        rows = await pool.fetch(APPROVED, limit)
        turn = asyncio.Semaphore(concurrency)

        async def pay_one(row: asyncpg.Record) -> None:
            headers = {
                "Authorization": f"Bearer {token.access_token}",
                "Idempotency-Key": key_of(row["source_ref"]),
                "Content-Type": "application/json",
            }
            async with turn:
                answer = await client.post(
                    f"{payroc}/v1/bank-transfer-refunds", content=body_of(row), headers=headers
                )
                answer.raise_for_status()
                refund = RefundAnswer.model_validate_json(answer.content)
                await pool.execute(
                    PAID, row["source_ref"], refund.refund_id, refund.transaction_result.status
                )

        async with asyncio.TaskGroup() as tasks:
            for row in rows:
                tasks.create_task(pay_one(row))
        return {"refunds": len(rows), "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    command(__doc__, pay)
