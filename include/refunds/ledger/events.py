"""The events that the database does not write itself, and the reason of those that it does."""

from __future__ import annotations

import json
from typing import Any

from include.refunds.ledger.connection import Connection


async def because(connection: Connection, reason: str) -> None:
    """Give the reason of this transaction's changes to the events that triggers write."""
    await connection.execute("SELECT set_config('refund_ledger.reason', :reason, true)", {"reason": reason})


async def event(
    connection: Connection,
    kind: str,
    *,
    reason: str,
    refund_id: int | None = None,
    detail: dict[str, Any] | None = None,
) -> None:
    """Write an event of the transaction's actor."""
    insert = """
        INSERT INTO refund_ledger.refund_events (event, refund_id, actor, reason, detail)
        VALUES (:event, :refund_id, current_setting('refund_ledger.actor'), :reason, CAST(:detail AS jsonb))"""
    values = {"event": kind, "refund_id": refund_id, "reason": reason}
    await connection.execute(insert, {**values, "detail": json.dumps(detail) if detail else None})
