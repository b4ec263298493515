"""CSV files: bytes become numbered lines with cells of the source's types. Nothing is guessed."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from include.refunds.source import COLUMNS

_SEPARATORS: Final = (",", ";", "\t")
_ENCODINGS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

# As many digits as no amount has; Python refuses to read thousands of them.
_WHOLE: Final = re.compile(r"-?\d{1,30}", re.ASCII)
_WITH_DECIMALS: Final = re.compile(r"-?\d{1,30}\.\d{1,30}", re.ASCII)
_INSTANT: Final = re.compile(
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d(:?\d\d)?)?", re.ASCII
)


_UNREADABLE: Final = (
    f"has text after a closing quote, or a cell of more than {csv.field_size_limit():,} characters; "
    "quote the whole cell"
)


class CsvError(Exception):
    """A file can't be read as CSV; the message says what is wrong and what to do, without its content."""


@dataclass(frozen=True, slots=True)
class CsvLine:
    """
    One record of a CSV file.

    :param number: the line of the file on which it begins, from 1; a line break in quotes begins a new one.
    :param row: values by column, as a driver would return them; ``None`` for an empty cell.
    :param errors: what is wrong with cells whatever the rules for rows say, by column.
    :param error: what is wrong with the whole line, which then has no row.
    """

    number: int
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)
    errors: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None


def read_lines(content: bytes) -> list[CsvLine]:
    """
    Return the records of a CSV file.

    :param content: UTF-8 with or without a byte order mark, or UTF-16 with one. A header names all of
        :data:`~include.refunds.source.COLUMNS` in any order, separated by commas, semicolons or tabs.
    :returns: the records in their order; those without any content are left out.
    :raises CsvError: when the file can't be read: its encoding, its header, or a quote that is not closed.
    """
    # A line ends as the file says, and keeps its end: within quotes it belongs to the cell.
    texts = list(io.StringIO(_decoded(content), newline=""))
    if not texts:
        raise CsvError("The CSV file is empty: add a header and lines.")
    records = _records(texts)
    first = next(records)
    header = _header(first.cells or [])
    return [
        _line(record, header)
        for record in records
        if record.cells is None or any(map(str.strip, record.cells))
    ]


@dataclass(frozen=True, slots=True)
class _Record:
    """The cells between two separators of lines, ``None`` when they can't be told apart."""

    number: int
    cells: list[str] | None


def _decoded(content: bytes) -> str:
    encoding = next((name for mark, name in _ENCODINGS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, errors="ignore").count("\n") + 1
        name = encoding.upper().removesuffix("-SIG")
        raise CsvError(
            f"Line {line} of the CSV file has bytes that are not {name}, such as an umlaut in Windows-1252: "
            'save the file in UTF-8, which Excel calls "CSV UTF-8".'
        ) from None
    # A single one is a mistake of its cell.
    if text.count("\x00") > len(text) // 4:
        raise CsvError(
            "The CSV file has NUL characters, as UTF-16 has without a byte order mark: save it in UTF-8."
        )
    return text


def _records(texts: Sequence[str]) -> Iterator[_Record]:
    """
    Yield the records of a file.

    :raises CsvError: when a quote is not closed, so that nobody knows where the record ends.
    """
    reader = csv.reader(iter(texts), delimiter=_separator(texts[0]), strict=True)
    ended = 0
    while ended < len(texts):
        try:
            yield _Record(ended + 1, next(reader))
        except csv.Error:
            # What stands on one line with each quote closed ends with it, whatever is wrong within.
            if reader.line_num != ended + 1 or texts[ended].count('"') % 2:
                raise CsvError(
                    f"A quote that begins in line {ended + 1} of the CSV file is not closed: close it, "
                    "and write a quote within a cell twice."
                ) from None
            yield _Record(ended + 1, None)
        ended = reader.line_num


def _separator(header: str) -> str:
    """Return what separates the names of a header: that at which it falls apart into names of columns."""
    found = [mark for mark in _SEPARATORS if len(_known(header, mark)) > 1]
    if len(found) > 1:
        raise CsvError(
            "The header of the CSV file has more than one separator: use commas, semicolons or tabs."
        )
    return found[0] if found else ","


def _known(header: str, separator: str) -> set[str]:
    return {name.strip().strip('"') for name in header.split(separator)} & set(COLUMNS)


def _header(cells: Sequence[str]) -> list[str]:
    """Return the names of the columns, each of which is there once."""
    names = [name.strip() for name in cells]
    while names and not names[-1]:
        names.pop()
    if not set(names) & set(COLUMNS):
        # The first line may be a payee, and is not repeated.
        raise CsvError(
            "The first line of the CSV file names none of the columns of include/sql/select_approved.sql: "
            "add a header."
        )
    counts = Counter(_shown(name) for name in names)
    problems = {
        "missing": [name for name in COLUMNS if name not in names],
        "unknown": sorted({_shown(name) for name in names if name not in COLUMNS}),
        "given twice": sorted(name for name, count in counts.items() if count > 1 and name in COLUMNS),
    }
    if any(problems.values()):
        said = "; ".join(f"{what} {', '.join(columns)}" for what, columns in problems.items() if columns)
        raise CsvError(
            f"The header of the CSV file does not fit: {said}. "
            "Use each of the columns of include/sql/select_approved.sql once."
        )
    return names


def _shown(name: str) -> str:
    # A value that slipped into the header is not repeated.
    return name if re.fullmatch(r"[A-Za-z_]{1,30}", name) else "a name that is none"


def _line(record: _Record, header: Sequence[str]) -> CsvLine:
    if record.cells is None:
        return CsvLine(record.number, error=_UNREADABLE)
    cells, beyond = record.cells[: len(header)], record.cells[len(header) :]
    if len(cells) < len(header) or any(map(str.strip, beyond)):
        return CsvLine(record.number, error=f"has {len(record.cells)} fields, the header has {len(header)}")
    row: dict[str, Any] = {name: cell or None for name, cell in zip(header, cells, strict=True)}
    errors = {}
    row["amount"] = _number(row["amount"])
    row["approved_at"] = at = _instant(row["approved_at"])
    if isinstance(at, datetime) and at.tzinfo is None:
        errors["approved_at"] = "has no time zone; give a date and time such as 2026-11-23T09:30:00-05:00"
    return CsvLine(record.number, row, errors)


def _number(cell: str | None) -> int | Decimal | str | None:
    if cell is not None and _WHOLE.fullmatch(cell):
        return int(cell)
    return Decimal(cell) if cell is not None and _WITH_DECIMALS.fullmatch(cell) else cell


def _instant(cell: str | None) -> datetime | str | None:
    try:
        return datetime.fromisoformat(cell) if cell is not None and _INSTANT.fullmatch(cell) else cell
    except ValueError:
        return cell
