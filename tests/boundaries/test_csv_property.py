"""Whatever a file holds, its lines are imported as they are or named, or the file is refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from include.refunds import csv_lines, demo_source
from include.refunds.csv_lines import CsvError, CsvLine, read_lines
from include.refunds.source import COLUMNS
from tests.boundaries.test_csv import GOOD, Shop
from tests.boundaries.test_csv import lines as as_csv
from tests.conftest import NewDatabase

# What a file can't hold is no text of a cell.
CHARACTERS = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from("\",;\t\r\n'0195.-:TZ@ _\u2028\x85\x0c"),
)
CELL = st.one_of(
    st.text(CHARACTERS, max_size=20),
    st.sampled_from(
        ["", "0", "1_000", "49.99", "1000000000001", "now", "infinity", "2026-11-20", "RF-2", "rf-1"]
    ),
    st.integers().map(str),
    st.decimals().map(str),
    st.datetimes().map(str),
    st.datetimes().map(lambda at: f"{at.isoformat()}Z"),
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(COLUMNS), CELL, min_size=1, max_size=3), min_size=3, max_size=12
)
FORM = st.tuples(
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
GOOD_FILE = as_csv({}, {"description": "Größe"}).encode()
BYTES = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.integers(0, len(GOOD_FILE)), st.binary(max_size=4)).map(
        lambda piece: GOOD_FILE[: piece[0]] + piece[1] + GOOD_FILE[piece[0] :]
    ),
    st.integers(0, len(GOOD_FILE)).map(lambda end: GOOD_FILE[:end]),
    st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "utf-7"]).map(
        lambda encoding: GOOD_FILE.decode().encode(encoding)
    ),
    st.sampled_from(
        [b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xff\xfe\x00", b'"', b"\r", b",", b"sep=;\n"]
    ),
)
SMALL = settings(max_examples=settings.default.max_examples // 4)


@pytest.fixture(scope="module")
def own(new_source: NewDatabase) -> Shop:
    return Shop(new_source())


def lines_come_through_or_are_named(
    shop: Shop, odd: list[dict[str, str]], form: tuple[str, str, str]
) -> None:
    """Import odd lines between good ones: each is stored as it is or named; the good ones are stored."""
    delimiter, end, encoding = form
    first, last = {"source_ref": "first"}, {"source_ref": "last"}
    content = as_csv(first, *odd, last, delimiter=delimiter, end=end, quoting=csv.QUOTE_ALL)
    empty_table(shop)
    imported = shop.load(content.encode(encoding))
    stored = shop.rows()
    assert {"first", "last"} <= set(stored)
    assert imported.imported == len(stored)
    assert imported.imported + imported.known + len(imported.errors) == len(odd) + 2
    begins = lines_at_which_records_begin(content)
    assert set(imported.errors) <= set(begins.values())
    for number, change in enumerate(odd, start=2):
        row = GOOD | {"source_ref": f"RF-{number}"} | change
        if begins[number] in imported.errors:
            assert imported.errors[begins[number]].isprintable()
            continue
        held = stored[row["source_ref"]]
        for column in COLUMNS:
            cell = row.get(column, "")
            assert cell == cell.strip()
            if column == "amount":
                assert re.fullmatch("[0-9]+", cell)
                assert held[column] == int(cell) <= 10**12
            elif column == "approved_at":
                assert held[column] == (datetime.fromisoformat(cell) if cell else None)
                assert not cell or datetime.fromisoformat(cell).tzinfo
            else:
                assert (held[column] or "") == cell


def lines_at_which_records_begin(content: str) -> dict[int, int]:
    """Return the first line of each record, as an editor counts: a line ends with CR, LF or both."""
    begins, line, record, quoted = {}, 1, 0, False
    begin = 1
    for physical in io.StringIO(content, newline=""):
        quoted ^= physical.count('"') % 2 == 1
        line += 1
        if not quoted:
            begins[record] = begin
            record, begin = record + 1, line
    return begins


def empty_table(shop: Shop) -> None:
    engine = create_engine(shop.url)
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE refund_requests"))
    engine.dispose()


@given(odd=ROWS, form=FORM)
@SMALL
@example(
    odd=[{"description": 'a "b"\r\n\r\nc'}, {"amount": "1_000"}, {"source_ref": "first"}],
    form=(";", "\r\n", "utf-16"),
)
@example(odd=[{"description": "a\rb"}, {"amount": "-"}, {"email": "n/a"}], form=("\t", "\n", "utf-8"))
def test_a_line_of_any_cells_comes_through_or_is_named(
    own: Shop, odd: list[dict[str, str]], form: tuple[str, str, str]
) -> None:
    lines_come_through_or_are_named(own, odd, form)


@given(content=BYTES)
def test_a_file_of_any_bytes_is_read_or_refused(content: bytes) -> None:
    read_or_refused(content)


def read_or_refused(content: bytes) -> None:
    """A file is refused in one sentence, or its lines have numbers of their own and unchanged cells."""
    try:
        lines = read_lines(content)
    except CsvError as error:
        sentence = str(error)
    else:
        is_what_the_file_says(lines, content)
        return
    assert sentence.isprintable()
    assert sentence.endswith(".")


def is_what_the_file_says(lines: Sequence[CsvLine], content: bytes) -> None:
    numbers = [line.number for line in lines]
    assert numbers == sorted(set(numbers))
    written = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    for line in lines:
        assert line.error is not None or set(line.row) == set(COLUMNS)
        for column, cell in line.row.items():
            if isinstance(cell, str) and column not in ("amount", "approved_at"):
                assert cell.replace('"', '""') in written or cell in written


# -- planted mistakes ------------------------------------------------------------------------------

_records = csv_lines._records


def numbered_by_record(texts: list[str]) -> Iterator[Any]:
    return (dataclasses.replace(record, number=number) for number, record in enumerate(_records(texts), 1))


# What is broken, and a line that shows it.
PLANTED: dict[str, tuple[tuple[Any, str, Any], dict[str, str]]] = {
    "an amount as Python writes it": ((csv_lines, "_number", int), {"amount": "1_000"}),
    "a date and time in UTC": (
        (csv_lines, "_instant", lambda cell: cell and datetime.fromisoformat(cell).astimezone(UTC)),
        {"approved_at": "2026-11-20T09:00:00"},
    ),
    "no rules for rows": ((demo_source, "_problem", lambda line, settings: None), {"order_id": "SO-1 "}),
    "numbers of records": ((csv_lines, "_records", numbered_by_record), {"description": "a\nb"}),
    "commas only": ((csv_lines, "_separator", lambda header: ","), {}),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_the_property_of_lines_finds_a_planted_mistake(own: Shop, mistake: str) -> None:
    patched, shown_by = PLANTED[mistake]

    @given(odd=ROWS, form=FORM)
    @settings(SMALL, database=None, report_multiple_bugs=False)
    @example(odd=[{"email": "n/a"}, shown_by, {"email": "n/a"}], form=(";", "\n", "utf-8"))
    def again(odd: list[dict[str, str]], form: tuple[str, str, str]) -> None:
        lines_come_through_or_are_named(own, odd, form)

    with patch.object(*patched), pytest.raises((AssertionError, CsvError)):
        again()
