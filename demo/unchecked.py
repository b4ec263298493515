"""Two refunds with mistakes, written past the import: a shop's own application checks less."""

from __future__ import annotations

import csv
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier, Placeholder

from demo.state import ROOT

UNCHECKED = ROOT / "demo" / "unchecked_refunds.csv"


def write_unchecked(source: psycopg.Connection[Any]) -> None:
    """Insert them into ``public.refund_requests``; those that are there stay as they are."""
    with UNCHECKED.open(newline="") as opened:
        rows = [{name: cell or None for name, cell in row.items()} for row in csv.DictReader(opened)]
    insert = SQL("INSERT INTO public.refund_requests ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
        SQL(", ").join(map(Identifier, rows[0])), SQL(", ").join(map(Placeholder, rows[0]))
    )
    with source.cursor() as cursor:
        cursor.executemany(insert, rows)
