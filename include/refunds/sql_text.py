"""
The parts of an SQL statement, as far as it takes to tell parameters from colons that mean something else.

A colon in a literal, a quoted name or a comment is no parameter, and how those begin and end differs between
databases. The rules below are those of their manuals:

- Postgres: https://www.postgresql.org/docs/current/sql-syntax-lexical.html
- MySQL and MariaDB: https://dev.mysql.com/doc/refman/8.4/en/string-literals.html and …/comments.html
- SQLite: https://www.sqlite.org/lang_keywords.html and …/lang_comment.html
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto


class SqlTextError(Exception):
    """A text is not one SQL statement; the message says why, and what to do, as the rest of a sentence."""


class Part(Enum):
    """A part of a statement; in a literal that is :attr:`ESCAPED` a backslash escapes what follows it."""

    CODE = auto()
    COMMENT = auto()
    QUOTED = auto()
    ESCAPED = auto()


@dataclass(frozen=True, slots=True)
class Parameter:
    """
    A parameter of a statement.

    :param at: where its colon is in the text.
    """

    name: str
    at: int


Statement = tuple[str | Parameter, ...]
"""A statement in its order: text that goes to the database as it is, and parameters."""

# Where SQLAlchemy's text() sees a parameter, so that a colon which it leaves alone needs no remedy here; and
# before a cast.
_PARAMETER = re.compile(r"(?<![:\w\\]):(\w+)(?!\w)(?!:(?!:))")

_QUOTES = r"'(?:[^']|'')*+'"
_NAMES = r'"(?:[^"]|"")*+"'
_BACKTICKS = r"`(?:[^`]|``)*+`"
_ESCAPED = r"'(?:[^'\\]|''|\\.)*+'"
_BLOCK = r"/\*.*?\*/"
_NO_NAME_BEFORE = r"(?<![\w$\x80-\U0010ffff])"


@dataclass(frozen=True)
class _Rules:
    """
    How a family of databases writes what holds no parameter: a pattern for each part, and for one that stays
    open.
    """

    comment: str
    quoted: str
    escaped: str = r"(?!)"
    open_quote: str = r"['\"]"
    nested_comments: bool = False

    def pieces(self, sql: str) -> Iterator[tuple[Part, int, int]]:
        """Yield each piece's part, begin and end."""
        pattern = re.compile(
            rf"(?P<COMMENT>{self.comment})|(?P<ESCAPED>{self.escaped})|(?P<QUOTED>{self.quoted})"
            rf"|(?P<open_comment>/\*)|(?P<open_quote>{self.open_quote})",
            re.DOTALL,
        )
        begin = 0
        while found := pattern.search(sql, begin):
            kind, end = str(found.lastgroup), found.end()
            if kind == "open_comment" and self.nested_comments:
                kind, end = "COMMENT", _end_of_nested(sql, found.start())
            if kind.startswith("open_"):
                what = kind.removeprefix("open_")
                raise SqlTextError(
                    f"has a {what} in line {line_of(sql, found.start())} that is never closed: close it"
                )
            yield Part.CODE, begin, found.start()
            yield Part[kind], found.start(), end
            begin = end
        yield Part.CODE, begin, len(sql)


_DOLLAR = rf"{_NO_NAME_BEFORE}\$(?P<tag>(?:[^\W\d]\w*)?)\$"
_POSTGRES = _Rules(
    comment=r"--[^\n]*+",
    # A literal goes on after a line break.
    escaped=rf"{_NO_NAME_BEFORE}[eE]{_ESCAPED}(?:\s*\n\s*{_ESCAPED})*+",
    quoted=rf"{_QUOTES}|{_NAMES}|{_DOLLAR}.*?\$(?P=tag)\$",
    open_quote=rf"['\"]|{_DOLLAR.replace('?P<tag>', '?:')}",
    nested_comments=True,
)
_MYSQL = _Rules(
    comment=rf"(?:--(?=[\x00-\x20]|\Z)|\#)[^\n]*+|{_BLOCK}",
    escaped=r"{}|{}".format(_ESCAPED, _ESCAPED.replace("'", '"')),
    quoted=_BACKTICKS,
    open_quote=r"['\"`]",
)
_SQLITE = _Rules(
    comment=rf"--[^\n]*+|{_BLOCK}",
    quoted=rf"{_QUOTES}|{_NAMES}|{_BACKTICKS}|\[[^\]]*+\]",
    open_quote=r"['\"`\[]",
)
_BY_DIALECT = {"postgresql": _POSTGRES, "mysql": _MYSQL, "mariadb": _MYSQL, "sqlite": _SQLITE}


def read_statement(sql: str, dialect: str) -> Statement:
    r"""
    Return the one statement of a text, without a semicolon at its end.

    A backslash before a colon makes it a plain colon and is taken away, except in literals whose backslashes
    are the database's. A colon before a number is never a parameter: ``tags[:1]``.

    :param dialect: SQLAlchemy's name of the database. One that is not known here may read the text by the
        rules of any of those that are, so they have to agree on it.
    :raises SqlTextError: when it holds no statement, several, a quote or comment that is never closed, or
        characters that are no SQL.
    """
    rules = (_BY_DIALECT[dialect],) if dialect in _BY_DIALECT else (_POSTGRES, _MYSQL, _SQLITE)
    readings: list[Statement] = []
    refusals: list[SqlTextError] = []
    for each in rules:
        try:
            readings.append(_read(sql, each))
        except SqlTextError as error:
            refusals.append(error)
    if not readings:
        raise refusals[0]
    if len(set(readings)) > 1:
        raise SqlTextError(_ambiguous(sql, readings))
    return readings[0]


def line_of(sql: str, at: int) -> int:
    """Return the line of a place in a text, from 1."""
    return sql.count("\n", 0, at) + 1


def _read(sql: str, rules: _Rules) -> Statement:
    pieces = list(rules.pieces(sql))
    pieces = _first_statement(sql, pieces)
    if all(part is Part.COMMENT or not sql[begin:end].strip() for part, begin, end in pieces):
        raise SqlTextError("holds no statement: write one SQL statement into it")
    found: list[str | Parameter] = []
    for part, begin, end in pieces:
        if part is Part.CODE:
            _refuse_invisible(sql, begin, end)
            found += _parameters(sql, begin, end)
        else:
            text = sql[begin:end]
            found.append(text.replace("\\:", ":") if part is Part.QUOTED else text)
    return _joined(found)


def _parameters(sql: str, begin: int, end: int) -> Iterator[str | Parameter]:
    for match in _PARAMETER.finditer(sql, begin, end):
        if not match[1].isdecimal():
            yield sql[begin : match.start()].replace("\\:", ":")
            yield Parameter(match[1], match.start())
            begin = match.end()
    yield sql[begin:end].replace("\\:", ":")


def _joined(pieces: list[str | Parameter]) -> Statement:
    """
    Join what is text next to one another, so that two readings which differ in nothing but their pieces are
    equal.
    """
    joined: list[str | Parameter] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)


def _first_statement(sql: str, pieces: list[tuple[Part, int, int]]) -> list[tuple[Part, int, int]]:
    for number, (part, begin, end) in enumerate(pieces):
        semicolon = sql.find(";", begin, end) if part is Part.CODE else -1
        if semicolon < 0:
            continue
        rest = [(Part.CODE, semicolon, end), *pieces[number + 1 :]]
        for part_behind, first, last in rest:
            behind = sql[first:last].strip("; \t\n\f\v")
            if part_behind is not Part.COMMENT and behind:
                line = line_of(sql, sql.index(behind[0], first))
                raise SqlTextError(f"holds several statements, the second in line {line}: keep one")
        return [*pieces[:number], (part, begin, semicolon)]
    return pieces


def _refuse_invisible(sql: str, begin: int, end: int) -> None:
    for at in range(begin, end):
        if sql[at].isascii():
            continue
        category = unicodedata.category(sql[at])
        if category in ("Cc", "Cf", "Zs", "Zl", "Zp"):
            raise SqlTextError(
                f"has a character in line {line_of(sql, at)} that is no SQL outside of quotes "
                f"(U+{ord(sql[at]):04X}): " + ("write a plain blank" if category == "Zs" else "remove it")
            )


def _ambiguous(sql: str, readings: list[Statement]) -> str:
    found = [piece for reading in readings for piece in reading if isinstance(piece, Parameter)]
    doubtful = {parameter for parameter in found if found.count(parameter) < len(readings)}
    if not doubtful:
        return "has a backslash before a colon that databases read in different ways: take the backslash away"
    first = min(doubtful, key=lambda parameter: parameter.at)
    word = f":{first.name[:40]}"
    return (
        f"has {word} in line {line_of(sql, first.at)}, which is a parameter or part of a literal or comment, "
        f"depending on the database: write `\\{word}` for a colon that is meant as such, or the literal "
        "without backslashes"
    )


def _end_of_nested(sql: str, begin: int) -> int:
    depth = 0
    for mark in re.compile(r"/\*|\*/").finditer(sql, begin):
        depth += 1 if mark[0] == "/*" else -1
        if not depth:
            return mark.end()
    raise SqlTextError(f"has a comment in line {line_of(sql, begin)} that is never closed: close it")
