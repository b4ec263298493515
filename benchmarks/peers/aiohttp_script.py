"""
Pay approved refunds with asyncio, aiohttp and asyncpg: about the fastest that plain Python does.

It reads the approved rows, POSTs up to so many at a time, and commits each result as it comes. It has no claim, no attempts and no look-up:
killed between the POST and the commit it sends a refund again, under the same key.
"""

from __future__ import annotations

import asyncio
import time

import aiohttp
import asyncpg

from benchmarks.peers.models import APPROVED, PAID, AccessToken, RefundAnswer, body_of, command, key_of


async def pay(database: str, payroc: str, concurrency: int, limit: int) -> dict[str, float]:
    """Pay at most so many approved refunds."""
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with (
        asyncpg.create_pool(database, min_size=8, max_size=16) as pool,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        began = time.perf_counter()
        async with session.post(f"{payroc}/authorize", headers={"x-api-key": "key"}) as answer:
            token = AccessToken.model_validate_json(await answer.read())
        rows = await pool.fetch(APPROVED, limit)
        turn = asyncio.Semaphore(concurrency)

        async def pay_one(row: asyncpg.Record) -> None:
            headers = {
                "Authorization": f"Bearer {token.access_token}",
                "Idempotency-Key": key_of(row["source_ref"]),
                "Content-Type": "application/json",
            }
            async with turn:
                async with session.post(
                    f"{payroc}/v1/bank-transfer-refunds", data=body_of(row), headers=headers
                ) as answer:
                    answer.raise_for_status()
                    refund = RefundAnswer.model_validate_json(await answer.read())
                await pool.execute(
                    PAID, row["source_ref"], refund.refund_id, refund.transaction_result.status
                )

        async with asyncio.TaskGroup() as tasks:
            for row in rows:
                tasks.create_task(pay_one(row))
        return {"refunds": len(rows), "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    command(__doc__, pay)
