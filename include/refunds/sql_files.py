"""The two SQL files, ``select_approved.sql`` and ``write_back.sql``: one statement each, in UTF-8."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from include.refunds.source_errors import SourceError
from include.refunds.sql_text import Parameter, SqlTextError, line_of, read_statement

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# What SQLAlchemy's text() takes for a parameter, or for a backslash that it has to take away.
_NOT_AS_IT_IS = re.compile(r"\\:\w*(?![:\w])|(?<![:\w\\]):\w+(?![:\w])")
_NAMED_AT_MOST = 5


@dataclass(frozen=True, slots=True)
class SqlFile:
    """
    A statement that was read from a file.

    :param name: the file's name, for messages.
    :param text: the statement as :func:`sqlalchemy.text` takes it; anything but its parameters reaches the
        database as it is.
    :param parameters: the names of its parameters.
    """

    name: str
    text: str
    parameters: frozenset[str]


def read_sql(
    path: Path, dialect: str, parameters: Sequence[str] = (), *, required: str | None = None
) -> SqlFile:
    """
    Read the statement of a file.

    :param dialect: SQLAlchemy's name of the database, which decides where its literals and comments end.
    :param parameters: the names that it may use.
    :param required: the one among them that it has to use.
    :raises SourceError: when the file can't be read, is not one statement in UTF-8, or uses other parameters.
    """
    try:
        sql = _decoded(path.read_bytes())
        statement = read_statement(sql, dialect)
    except OSError as error:
        raise SourceError(
            f"{path} can't be read ({error.strerror}): check the path and its rights."
        ) from None
    except SqlTextError as error:
        raise SourceError(f"{path.name} {error}.") from None
    used = [piece for piece in statement if isinstance(piece, Parameter)]
    if unknown := [parameter for parameter in used if parameter.name not in parameters]:
        raise SourceError(f"{path.name} {_unknown(sql, unknown, parameters)}.")
    names = frozenset(parameter.name for parameter in used)
    if required is not None and required not in names:
        raise SourceError(
            f"{path.name} does not use the parameter :{required} outside of literals and comments: "
            f"add a condition such as WHERE your_reference = :{required}."
        )
    text = "".join(
        # The blank keeps a cast away from it, `:name ::type`, for text() does not see a parameter before a
        # colon.
        f":{piece.name} " if isinstance(piece, Parameter) else _NOT_AS_IT_IS.sub(r"\\\g<0>", piece)
        for piece in statement
    )
    return SqlFile(path.name, text, names)


def in_words(names: Sequence[str], last: str = "and") -> str:
    """Return names as a sentence lists them."""
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _decoded(raw: bytes) -> str:
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            raise SqlTextError(f"is in {encoding}: save it as UTF-8")
    if raw.count(b"\0") > len(raw) // 4:
        raise SqlTextError("is in UTF-16: save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n?|\n", raw[: error.start])) + 1
        raise SqlTextError(f"is not UTF-8 in line {line}: save it as UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = line_of(text, text.index("\0"))
        raise SqlTextError(f"has a character in line {line} that no SQL holds (U+0000): remove it")
    return text


def _unknown(sql: str, unknown: Sequence[Parameter], known: Sequence[str]) -> str:
    names = list(dict.fromkeys(f":{parameter.name[:40]}" for parameter in unknown))[:_NAMED_AT_MOST]
    remedy = f"`\\{names[0]}` for a colon that is meant as such"
    if not known:
        line = line_of(sql, unknown[0].at)
        return (
            f"names the parameter {names[0]} in line {line}, but it takes none: write the value, or {remedy}"
        )
    parameters = in_words([f":{name}" for name in known])
    plural = "s" if len(names) > 1 else ""
    return f"names the unknown parameter{plural} {in_words(names)}: it may use {parameters}; write {remedy}"
