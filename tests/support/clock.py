"""The ledger's clock in tests: its function ``refund_ledger.now()``, replaced in the test's own database."""

from __future__ import annotations

from include.refunds.ledger import CLOCK


def clock(body: str = CLOCK) -> str:
    """Return the statement that replaces the ledger's clock; without an argument, that brings the real one back."""
    return (
        "CREATE OR REPLACE FUNCTION refund_ledger.now() RETURNS timestamptz LANGUAGE sql VOLATILE "
        f"AS $clock${body}$clock$"
    )


def ahead(hours: float) -> str:
    """Return the statement that lets the ledger's clock run ahead of the real one."""
    return clock(f"{CLOCK} + interval '{hours} hours'") if hours else clock()
