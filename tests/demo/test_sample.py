"""The refunds of `make demo`."""

from __future__ import annotations

import csv
from collections import Counter
from datetime import datetime

import pytest
from sqlalchemy import URL

from demo.stack import SAMPLE
from demo.unchecked import UNCHECKED
from include.refunds.csv_lines import read_lines
from include.refunds.demo_source import import_lines
from include.refunds.settings import get_settings
from include.refunds.source import COLUMNS

# What the sample must show: a declined and a refused refund, and everything that may happen to a request on its way.
SHOWN = ("9001", "9002", "9003", "9004", "9005", "9006", "9008", "9009", "9011", "9020")
# These leave a refund for people to look at; a first demo ends clean.
LEFT_OUT = ("9007", "9013", "9014", "9018", "9019", "9021")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    found = []
    for path in (SAMPLE, UNCHECKED):
        with path.open(newline="") as file:
            found += csv.DictReader(file)
    return found


def test_the_import_takes_every_line_of_the_sample_and_none_of_the_unchecked_ones(source_url: URL) -> None:
    sample, unchecked = (
        import_lines(source_url, read_lines(path.read_bytes()), get_settings(), advance=lambda: None)
        for path in (SAMPLE, UNCHECKED)
    )
    assert (sample.imported, sample.errors) == (34, {})
    assert (unchecked.imported, len(unchecked.errors)) == (0, 2)


def checksum_is_right(routing_number: str) -> bool:
    return (
        len(routing_number) == 9
        and sum(int(d) * w for d, w in zip(routing_number, (3, 7, 1) * 3, strict=True)) % 10 == 0
    )


def test_the_columns_are_those_of_the_source(rows: list[dict[str, str]]) -> None:
    assert tuple(rows[0]) == COLUMNS


def test_there_are_enough_to_look_real(rows: list[dict[str, str]]) -> None:
    assert len(rows) >= 30
    assert len({row["processing_terminal_id"] for row in rows}) in (2, 3)


@pytest.mark.parametrize("column", ["source_ref", "order_id"])
def test_names_are_not_used_twice(rows: list[dict[str, str]], column: str) -> None:
    assert [name for name, count in Counter(row[column] for row in rows).items() if count > 1] == []


@pytest.mark.parametrize("digits", SHOWN)
def test_every_behaviour_is_there(rows: list[dict[str, str]], digits: str) -> None:
    assert any(row["account_number"].endswith(digits) for row in rows)


@pytest.mark.parametrize("digits", LEFT_OUT)
def test_nothing_leaves_work_for_people(rows: list[dict[str, str]], digits: str) -> None:
    assert not any((row["account_number"] or row["secure_token"]).endswith(digits) for row in rows)


def test_exactly_two_rows_are_no_refunds_one_by_its_routing_number_one_by_its_sec_code(
    rows: list[dict[str, str]],
) -> None:
    mistyped = [row for row in rows if row["routing_number"] and not checksum_is_right(row["routing_number"])]
    by_telephone = [row for row in rows if row["sec_code"] == "tel"]
    assert len(mistyped) == len(by_telephone) == 1
    assert mistyped != by_telephone


def test_a_row_has_a_bank_account_or_a_token(rows: list[dict[str, str]]) -> None:
    assert all(bool(row["account_number"]) != bool(row["secure_token"]) for row in rows)
    assert sum(bool(row["secure_token"]) for row in rows) == 1
    assert all(12 <= len(row["secure_token"]) <= 19 for row in rows if row["secure_token"])


def test_businesses_get_ccd_and_people_ppd(rows: list[dict[str, str]]) -> None:
    assert {row["sec_code"] for row in rows} == {"ppd", "ccd", "tel"}
    assert all(
        (row["sec_code"] == "ccd") == row["name_on_account"].endswith((" LLC", " Inc", " LP")) for row in rows
    )


def test_the_times_of_approval_have_a_zone(rows: list[dict[str, str]]) -> None:
    assert all(datetime.fromisoformat(row["approved_at"]).tzinfo for row in rows)


def test_the_addresses_are_of_domains_that_nobody_owns(rows: list[dict[str, str]]) -> None:
    addresses = [
        row[column] for row in rows for column in ("email", "requested_by", "approved_by") if row[column]
    ]
    assert all(address.endswith("example.com") for address in addresses)
