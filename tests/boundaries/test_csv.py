"""CSV files as spreadsheets write them: read, or refused with the cause and the number of the line."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, text

from include.refunds.csv_lines import CsvError, read_lines
from include.refunds.demo_source import Imported, import_lines
from include.refunds.settings import get_settings
from include.refunds.source import COLUMNS

GOOD = {
    "source_ref": "RF-1",
    "processing_terminal_id": "7701001",
    "description": "Returned",
    "amount": "4999",
    "currency": "USD",
    "name_on_account": "Sarah Hopper",
    "account_type": "checking",
    "sec_code": "ppd",
    "routing_number": "053200983",
    "account_number": "556677889911",
    "requested_by": "ann@example.com",
    "approved_by": "bob@example.com",
    "approved_at": "2026-11-20T09:00:00-05:00",
}


def lines(
    *rows: dict[str, str], delimiter: str = ",", end: str = "\n", quoting: Any = csv.QUOTE_MINIMAL
) -> str:
    """Return a CSV file with these changes of a good line, each a line with a source_ref of its own."""
    written = io.StringIO()
    writer = csv.DictWriter(written, COLUMNS, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writeheader()
    for number, row in enumerate(rows, start=1):
        writer.writerow(GOOD | {"source_ref": f"RF-{number}"} | row)
    return written.getvalue()


class Shop:
    """A source with our own table, to import files into."""

    def __init__(self, url: URL) -> None:
        self.url = url

    def load(self, content: str | bytes) -> Imported:
        """Import a file as the command does."""
        read = read_lines(content.encode() if isinstance(content, str) else content)
        return import_lines(self.url, read, get_settings(), advance=lambda: None)

    def rows(self) -> dict[str, dict[str, object]]:
        engine = create_engine(self.url)
        with engine.connect() as connection:
            found = connection.execute(text("SELECT * FROM refund_requests ORDER BY source_ref")).mappings()
            rows = {row["source_ref"]: dict(row) for row in found}
        engine.dispose()
        return rows


@pytest.fixture
def shop(source_url: URL) -> Shop:
    return Shop(source_url)


@pytest.mark.parametrize(
    "content",
    [
        lines({"description": "Größe"}).encode(),
        lines({"description": "Größe"}).encode("utf-8-sig"),
        lines({"description": "Größe"}).encode("utf-16"),
        lines({"description": "Größe"}).encode("utf-16-be").join([b"\xfe\xff", b""]),
        lines({"description": "Größe"}, delimiter=";", end="\r\n").encode(),
        lines({"description": "Größe"}, delimiter="\t").encode("utf-16"),
        (lines({"description": "Größe"}) + ",,,,,,,,,,,,,,,\n,,,,,,,,,,,,,,,\n\n").encode(),
    ],
    ids=["UTF-8", "BOM", "UTF-16", "big-endian", "semicolons", "tabs", "empty lines"],
)
def test_a_file_as_spreadsheets_write_it_is_read(shop: Shop, content: bytes) -> None:
    assert shop.load(content) == Imported(imported=1)
    assert shop.rows()["RF-1"]["description"] == "Größe"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            lines({}, {"description": "Größe"}).encode("cp1252"),
            "Line 3 of the CSV file has bytes that are not UTF-8",
        ),
        (lines({}).encode("utf-16-le"), "has NUL characters, as UTF-16 has without a byte order mark"),
        (b"\xff\xfe" + lines({}).encode("utf-16-le") + b"\x00", "has bytes that are not UTF-16"),
        (b"", "The CSV file is empty"),
        (lines({}).replace("amount", "amount,amount", 1), "given twice amount"),
        (lines({}).replace("amount", "amount,account_number", 1), "given twice account_number"),
        (lines({}).replace("email", "e-mail", 1), "missing email; unknown a name that is none"),
        (
            lines({}, {}).replace("RF-2", '"RF-2', 1),
            "A quote that begins in line 3 of the CSV file is not closed",
        ),
        ("amount,email,;currency;order_id;\n", "has more than one separator"),
        (lines({}).partition("\n")[2], "names none of the columns"),
    ],
)
def test_a_file_that_can_not_be_read_is_refused_with_the_cause(
    shop: Shop, content: str | bytes, what: str
) -> None:
    with pytest.raises(CsvError) as caught:
        shop.load(content)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("column", "cell", "what"),
    [
        ("amount", "1_000", "`amount` is text; give whole cents, such as 5000 for USD 50.00."),
        ("amount", "1,000", "`amount` is text; give whole cents, such as 5000 for USD 50.00."),
        ("amount", "49.99", "`amount` is 49.99; give whole cents, such as 4999 for USD 49.99."),
        ("amount", "50.00", "`amount` is 50.00; give whole cents, such as 5000 for USD 50.00."),
        ("amount", "5e3", "`amount` is text; give whole cents, such as 5000 for USD 50.00."),
        (
            "amount",
            "\u0665\u0660\u0660\u0660",
            "`amount` is text; give whole cents, such as 5000 for USD 50.00.",
        ),
        ("amount", "", "`amount` is missing."),
        (
            "approved_at",
            "now",
            "`approved_at` is no date and time; give one such as 2026-11-23T09:30:00-05:00.",
        ),
        (
            "approved_at",
            "12.11.2026",
            "`approved_at` is no date and time; give one such as 2026-11-23T09:30:00-05:00.",
        ),
        ("approved_at", "2026-11-12 09:30:00", "`approved_at` has no time zone;"),
        ("approved_at", "2026-11-12", "`approved_at` is no date and time;"),
        ("approved_at", "infinity", "`approved_at` is no date and time;"),
        ("approved_at", "1999-11-12T09:30:00Z", "`approved_at` is before 2000-01-01."),
        (
            "approved_by",
            "ANN@example.com",
            "`approved_by` is the same person as requested_by; a refund needs two.",
        ),
        ("requested_by", "", "`requested_by` is missing."),
        ("source_ref", "RF-2 ", "`source_ref` has a blank at an end; remove it."),
        ("source_ref", "rf-1", "`source_ref` is that of line 2."),
        ("routing_number", "53200983", "`routing_number` must be 9 digits."),
        ("sec_code", "tel", "`sec_code` is tel, which is for debits only"),
        (
            "description",
            "a\u202eb",
            "`description` has the character U+202E, which can't be printed; remove it.",
        ),
        (
            "name_on_account",
            "Sarah\x00Hopper",
            "`name_on_account` has the character U+0000, which can't be printed; remove it.",
        ),
        ("order_id", "A" * 25, "`order_id` must have at most 24 characters."),
        ("processing_terminal_id", "770", "`processing_terminal_id` must have at least 4 characters."),
    ],
)
def test_a_cell_that_breaks_a_rule_is_named_with_its_line(
    shop: Shop, column: str, cell: str, what: str
) -> None:
    [(number, problem)] = shop.load(lines({}, {column: cell}, {})).errors.items()
    assert number == 3
    assert problem.startswith(what)
    assert list(shop.rows()) == ["RF-1", "RF-3"]


def test_a_line_break_in_quotes_leaves_the_numbers_of_lines_right(shop: Shop) -> None:
    content = lines({"description": "Two\nlines"}, {"amount": "1_000"}, {"email": "n/a\r\n\r\n"}, {})
    assert list(shop.load(content).errors) == [2, 4, 5]
    assert list(shop.rows()) == ["RF-4"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("RF-2,7701001", "It has 2 fields, the header has 16."),
        ("x" + "," * 20 + "x", "It has 21 fields, the header has 16."),
        ('"RF"-2,7701001', "It has text after a closing quote"),
        (
            "RF-2" + "x" * 200_000,
            "It has text after a closing quote, or a cell of more than 131,072 characters",
        ),
    ],
)
def test_a_line_of_another_shape_is_named_and_its_neighbours_are_read(
    shop: Shop, line: str, what: str
) -> None:
    first, second, third = lines({}, {}).splitlines()
    [(number, problem)] = shop.load("\n".join([first, second, line, third])).errors.items()
    assert number == 3
    assert problem.startswith(what)
    assert list(shop.rows()) == ["RF-1", "RF-2"]


def test_a_request_that_waits_for_its_approval_is_imported(shop: Shop) -> None:
    imported = shop.load(lines({"approved_by": "", "approved_at": ""}, {"approved_by": ""}))
    assert imported.errors == {3: "`approved_by` is missing."}
    assert list(shop.rows()) == ["RF-1"]
