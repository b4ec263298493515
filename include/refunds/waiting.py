"""For how long approved refunds have been waiting."""

from __future__ import annotations

from include.refunds.ledger.connection import LedgerEngine


async def oldest_approved_age(engine: LedgerEngine, source: str) -> float:
    """Return for how many seconds the refund that was approved first, and is not released or held, has been waiting; 0 without one."""
    query = """
        SELECT COALESCE(extract(epoch FROM refund_ledger.now() - min(approved_at)), 0) FROM refund_ledger.refunds
        WHERE source = :source AND status = 'approved'"""
    async with engine.connect() as connection:
        return float((await connection.execute(query, {"source": source})).scalar_one())
