"""The merchant's source rows: refunds of a thousand payees, some of each behaviour of the local Payroc, and rows that are invalid."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import psycopg

from include.refunds.source import COLUMNS
from include.sandbox.triggers import TRIGGERS
from tests.canary.payees import Mint

Row = dict[str, Any]

LISTED_TERMINAL = "7701001"
SINGLE_TERMINAL = "7701002"
LISTED = 1000
# One refund is larger than the limit.
LARGEST = 500_000
SINGLE_REFS = [f"S{trigger.digits}" for trigger in TRIGGERS]

KINDS = ("problem", "status", "hang", "close", "garbage", "empty", "slow")
# Everything that can go wrong with one request, with times that fit a time-out of one second.
FAULTS: list[dict[str, Any]] = [
    {"kind": kind, "when": when, **({"seconds": 1.5} if kind in ("hang", "slow") else {})}
    for kind, when in product(KINDS, ("before", "after"))
]

# These pause the sending for their terminal, or never end.
_ALONE = {"9007": "7701007", "9018": "7701018", "9019": "7701019"}


def listed_rows(mint: Mint) -> list[Row]:
    """Return the rows that are paid in lists: every tenth by a token, and every behaviour that ends, by account and by token."""
    endings = [trigger.digits for trigger in TRIGGERS if trigger.digits not in _ALONE]
    rows = [
        _row(f"L{number}", mint.payee(by_token=number % 10 == 0).columns(), LISTED_TERMINAL)
        for number in range(LISTED)
    ]
    # Apart from each other, so that no list has many of them.
    for number, (ending, by_token) in enumerate(product(endings, (False, True))):
        rows[27 * number + 5] |= mint.payee(ending, by_token=by_token).columns()
    rows[7]["amount"] = LARGEST + 1
    # An approval of long ago makes even the first attempt ask Payroc before it sends.
    for row in rows[3::40]:
        row["approved_at"] = datetime.now(UTC) - timedelta(days=2)
    return rows


def single_rows(mint: Mint) -> list[Row]:
    """Return the rows that are paid in small lists: one of each behaviour."""
    digits = [trigger.digits for trigger in TRIGGERS]
    terminals = [_ALONE.get(ending, SINGLE_TERMINAL) for ending in digits]
    return [
        _row(ref, mint.payee(ending).columns(), terminal)
        for ref, ending, terminal in zip(SINGLE_REFS, digits, terminals, strict=True)
    ]


def invalid_rows(mint: Mint) -> list[Row]:
    """Return rows that fail validation, each for a value that must not be quoted."""
    long_name = f"{mint.name()} {mint.name()} {mint.name()}"
    account = mint.account_number
    wrong: list[Row] = [
        {"source_ref": f"{long_name} " * 7},
        {"processing_terminal_id": long_name},
        {"order_id": f"{mint.name()} {account()}"},
        {"description": f"for {account()} of {long_name} " * 5},
        {"amount": -int(account())},
        {"currency": mint.name()},
        {"name_on_account": long_name},
        {"account_type": mint.name()},
        {"sec_code": mint.name()},
        {"routing_number": account()},
        {"routing_number": "123456789"},
        {"routing_number": None},
        {"account_number": f"{account()}X"},
        {"account_number": f"{account()} {account()}"},
        {"account_number": None},
        {"secure_token": mint.secure_token()},
        {"secure_token": account()[:10], "account_number": None, "routing_number": None},
        {
            "secure_token": mint.secure_token() + mint.secure_token(),
            "account_number": None,
            "routing_number": None,
        },
        {"email": f"{mint.name()}.{mint.name()}.{mint.email()}".replace(" ", ".")},
        {"requested_by": f"{long_name} " * 7},
        {"approved_by": f"{long_name} " * 7},
        {"approved_by": "ann@merchant.example"},
        {
            "name_on_account": mint.name() + "\ud7ff\u0001" * 30,
            "account_number": account() + "\u0660",
            "email": mint.email() * 3,
        },
    ]
    return [
        _row(f"X{number}", mint.payee().columns() | columns, LISTED_TERMINAL)
        for number, columns in enumerate(wrong)
    ]


def broken_lines(mint: Mint) -> list[Row]:
    """Return lines of a CSV file that can't be stored at all."""
    wrong: list[Row] = [
        {"source_ref": ""},
        {"amount": mint.account_number() + ".50"},
        {"amount": mint.name()},
        {"amount": mint.account_number() * 3},
        {"approved_at": mint.name()},
        {"approved_at": mint.account_number()},
        {"processing_terminal_id": ""},
        {"currency": ""},
        {"requested_by": ""},
        {"name_on_account": mint.name() + "\x00"},
    ]
    return [
        _row(f"B{number}", mint.payee().columns() | columns, LISTED_TERMINAL)
        for number, columns in enumerate(wrong)
    ]


def write_unchecked(source: psycopg.Connection[Any], rows: Iterable[Row]) -> None:
    """Insert rows past the import; the one whose approver is its requester is refused by the table itself."""
    names, values = ", ".join(COLUMNS), ", ".join(f"%({name})s" for name in COLUMNS)
    for row in rows:
        with suppress(psycopg.errors.CheckViolation):
            source.execute(f"INSERT INTO public.refund_requests ({names}) VALUES ({values})", row)


def write_csv(
    path: Path,
    rows: Iterable[Row],
    *,
    columns: Sequence[str] = COLUMNS,
    header: bool = True,
    encoding: str = "utf-8",
) -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
    return path


def _row(source_ref: str, columns: Row, terminal: str) -> Row:
    return (
        dict.fromkeys(COLUMNS)
        | {
            "source_ref": source_ref,
            "processing_terminal_id": terminal,
            "order_id": f"O{source_ref}",
            "description": "Goods returned",
            "amount": 4999,
            "currency": "USD",
            "account_type": "checking",
            "sec_code": "ppd",
            "requested_by": "ann@merchant.example",
            "approved_by": "bob@merchant.example",
            "approved_at": datetime.now(UTC) - timedelta(minutes=5),
        }
        | columns
    )
