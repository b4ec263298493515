"""Amounts as people write them."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

# ISO 4217: currencies whose minor unit is not a hundredth.
_DECIMALS = dict.fromkeys(
    (
        "BIF",
        "CLP",
        "DJF",
        "GNF",
        "ISK",
        "JPY",
        "KMF",
        "KRW",
        "PYG",
        "RWF",
        "UGX",
        "UYI",
        "VND",
        "VUV",
        "XAF",
        "XOF",
        "XPF",
    ),
    0,
) | dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3)


def decimals_of(currency: str) -> int:
    """Return how many decimal places amounts of a currency have; 2 for one that is unknown."""
    return _DECIMALS.get(currency, 2)


def money(amount: int, currency: str) -> str:
    """Return an amount in minor units as people write it; currencies without minor units are shown as they are."""
    decimals = decimals_of(currency)
    # Exact, also for sums that a float can't hold.
    return f"{Decimal(amount).scaleb(-decimals):,.{decimals}f} {currency}"


def sums(totals: Mapping[str, Mapping[str, int]]) -> str:
    """Return counts and sums per currency in words, such as ``12 refunds, 3,456.00 USD``."""
    parts = [
        f"{_refunds(entry['count'])}, {money(entry['amount'], currency)}"
        for currency, entry in sorted(totals.items())
    ]
    return "; ".join(parts) or "no refunds"


def _refunds(count: int) -> str:
    return "1 refund" if count == 1 else f"{count:,} refunds"
