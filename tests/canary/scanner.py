"""
Searches logs, files and databases for values that must not be there.

An artefact is cut into pieces without white space and punctuation. A piece that was seen before is not looked at again, for logs
repeat themselves. A new one is looked at as it is and as what it decodes to: URL-encoded, JSON-escaped, hexadecimal or base64 at any
offset, also one inside the other. A value is found wherever it stands in a piece, whatever touches it on either side.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

import psycopg
from psycopg.sql import SQL, Identifier
from sqlalchemy import URL

# Of a secret its first characters are enough: a shortened one is a leak as well.
_SECRET_LENGTH = 16
_DEEPEST = 3

_PIECES = re.compile(rb"[A-Za-z0-9+/=_%\\@-]{10,}")
_DIGITS = re.compile(rb"[0-9]{10,}")
_LETTERS = re.compile(rb"[a-z]{10,}")
_SECRET = re.compile(rb"[A-Za-z0-9_-]{16,}")
_DIGESTS = re.compile(rb"(?<![0-9a-f])(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64})(?![0-9a-f])")
_ESCAPED = re.compile(rb"\\+(?:u00|x)([0-9a-fA-F]{2})")
_HEX = re.compile(rb"(?:[0-9a-fA-F]{2}){10,}[0-9a-fA-F]?")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{14,}")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True, order=True)
class Needle:
    """A value that is searched for, by its kind and number: the value itself must not stand in a test's message either."""

    kind: str
    number: int


@dataclass(frozen=True)
class Leak:
    """
    A value that was found.

    :param place: where in the artefact it stands, as one of the places if it stands in several.
    """

    needle: Needle
    artefact: str
    place: str

    def __str__(self) -> str:
        return f"{self.needle.kind} {self.needle.number} in {self.artefact}, {self.place}"


def _line(data: bytes, offset: int) -> str:
    return f"line {_lines_before(data, offset) + 1}"


def _lines_before(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset)


@dataclass(frozen=True)
class Artefact:
    """
    Something that is searched.

    :param place: says in words where an offset is.
    """

    name: str
    data: bytes = field(repr=False)
    place: Callable[[bytes, int], str] = _line

    def place_of(self, found: bytes) -> str:
        return self.place(self.data, self.data.index(found))


def texts(named: Mapping[str, str]) -> Iterator[Artefact]:
    """Yield texts by name."""
    for name, text in named.items():
        yield Artefact(name, text.encode())


def files(folder: Path) -> Iterator[Artefact]:
    """Yield all files below a folder, packed ones unpacked, and the list of their names."""
    paths = sorted(folder.rglob("*"))
    yield Artefact("the names of files", "\n".join(str(path.relative_to(folder)) for path in paths).encode())
    for path in paths:
        if path.is_file():
            data = path.read_bytes()
            yield Artefact(
                str(path.relative_to(folder)), gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
            )


def tables(url: URL) -> Iterator[Artefact]:
    """Yield all tables of all schemas of a database, as Postgres writes them as text: bytes in hex, JSON as it is."""
    query = """
        SELECT table_schema, table_name, array_agg(column_name::text ORDER BY ordinal_position) FROM information_schema.columns
        JOIN information_schema.tables USING (table_schema, table_name)
        WHERE table_type = 'BASE TABLE' AND table_schema NOT IN ('pg_catalog', 'information_schema')
        GROUP BY table_schema, table_name ORDER BY table_schema, table_name"""
    with psycopg.connect(
        url.set(drivername="postgresql").render_as_string(hide_password=False)
    ) as connection:
        for schema, table, columns in connection.execute(query).fetchall():
            with connection.cursor().copy(
                SQL("COPY (SELECT * FROM {}) TO STDOUT").format(Identifier(schema, table))
            ) as rows:
                yield Artefact(
                    f"table {schema}.{table}", b"".join(map(bytes, rows)), _RowAndColumn(tuple(columns))
                )


@dataclass(frozen=True)
class _RowAndColumn:
    columns: tuple[str, ...]

    def __call__(self, data: bytes, offset: int) -> str:
        column = data.count(b"\t", data.rfind(b"\n", 0, offset) + 1, offset)
        return f"row {_lines_before(data, offset) + 1}, column {self.columns[column]}"


class Scanner:
    """
    Knows what to search for.

    :param word_length: the length of all words that it will know, so that they can be looked up wherever they stand.
    """

    def __init__(self, word_length: int) -> None:
        self._numbers: dict[bytes, Needle] = {}
        self._words: dict[bytes, Needle] = {}
        self._secrets: dict[bytes, Needle] = {}
        self._digests: dict[bytes, Needle] = {}
        self._number_lengths: set[int] = set()
        self._word_length = word_length
        self._clean: set[bytes] = set()

    def add_numbers(self, kind: str, values: Iterable[str]) -> None:
        """Search for numbers of at least 10 digits, and for their unkeyed hashes, from which such a number can be found by trying."""
        values = list(values)
        self._numbers |= {value.encode(): Needle(kind, number) for number, value in enumerate(values)}
        self._number_lengths |= {len(value) for value in values}
        self.add_digests(kind, values)

    def add_digests(self, kind: str, values: Iterable[str]) -> None:
        """Search for the unkeyed hashes of texts."""
        self._digests |= {
            hashlib.new(name, value.encode()).hexdigest().encode(): Needle(f"{name} of {kind}", number)
            for number, value in enumerate(values)
            for name in ("md5", "sha1", "sha256")
        }

    def add_words(self, kind: str, values: Iterable[str]) -> None:
        """Search for any of the words in each value, in small and capital letters."""
        for number, value in enumerate(values):
            words = [
                word
                for word in re.findall(rb"[a-z]+", value.lower().encode())
                if len(word) == self._word_length
            ]
            assert words, f"{kind} {number} has no word of {self._word_length} letters"
            self._words |= dict.fromkeys(words, Needle(kind, number))

    def add_secrets(self, kind: str, values: Iterable[str]) -> None:
        """Search for keys, passwords and tokens; of a token in parts for the last one, which alone is secret."""
        for number, value in enumerate(values):
            secret = value.rpartition(".")[2].encode()
            assert _SECRET.match(secret), (
                f"{kind} {number} is too short, or has characters that are not looked for"
            )
            self._secrets[secret[:_SECRET_LENGTH]] = Needle(kind, number)

    def scan(self, artefacts: Iterable[Artefact]) -> list[Leak]:
        """Search artefacts; each value is told once per artefact, with one place."""
        return [leak for artefact in artefacts for leak in self._scan(artefact)]

    def _scan(self, artefact: Artefact) -> Iterator[Leak]:
        told: set[Needle] = set()
        for piece in set(_PIECES.findall(artefact.data)) - self._clean:
            found = set(self._needles_of(piece, _DEEPEST))
            if not found:
                self._clean.add(piece)
            for needle in found - told:
                yield Leak(needle, artefact.name, artefact.place_of(piece))
            told |= found

    def _needles_of(self, text: bytes, depth: int) -> Iterator[Needle]:
        yield from self._needles_in(text)
        if depth:
            for piece in _PIECES.findall(text):
                for decoded in _decoded(piece):
                    yield from self._needles_of(decoded, depth - 1)

    def _needles_in(self, text: bytes) -> Iterator[Needle]:
        for run in _DIGITS.findall(text):
            for length in self._number_lengths:
                yield from _lookups(run, length, self._numbers)
        small = text.lower()
        for run in _LETTERS.findall(small):
            yield from _lookups(run, self._word_length, self._words)
        for run in _SECRET.findall(text):
            yield from _lookups(run, _SECRET_LENGTH, self._secrets)
        for digest in _DIGESTS.findall(small):
            if digest in self._digests:
                yield self._digests[digest]


def _lookups(run: bytes, length: int, known: dict[bytes, Needle]) -> Iterator[Needle]:
    for start in range(len(run) - length + 1):
        if (needle := known.get(run[start : start + length])) is not None:
            yield needle


def _decoded(piece: bytes) -> Iterator[bytes]:
    if b"%" in piece:
        yield unquote_to_bytes(piece)
    if b"\\" in piece:
        yield _ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode()), piece)
    for run in _HEX.findall(piece):
        for shift in (0, 1):
            digits = run[shift:].decode()
            yield bytes.fromhex(digits[: len(digits) // 2 * 2])
    for run in _BASE64.findall(piece):
        if _HEX.fullmatch(run):
            continue
        standard = run.translate(_URL_SAFE)
        for shift in range(4):
            shifted = standard[shift:]
            yield base64.b64decode(shifted[: len(shifted) // 4 * 4] + _rest(shifted))


def _rest(text: bytes) -> bytes:
    """Return what is left over from the last group of four, padded; a single character carries no byte."""
    left = text[len(text) // 4 * 4 :]
    return left + b"=" * (4 - len(left)) if len(left) > 1 else b""
