"""Text that may come in: which characters it may hold, and when two spellings are the same."""

from __future__ import annotations

import re
import unicodedata
from datetime import date, time
from decimal import Decimal
from uuid import UUID

UNPRINTABLE = (
    "\u0000-\u001f\u007f-\u009f\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160"
    "\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff"
)
"""
Characters that no text may hold, as ranges of a regular expression: control and format characters, line and
paragraph separators, and letters that show nothing, as of Unicode 16. A list, and not a question to Python's
tables, because these differ between versions of Python and from those of Postgres; the ledger's CHECK has the
same list.
"""

_UNPRINTABLE = re.compile(f"[{UNPRINTABLE}\ud800-\udfff]")
# A variation selector asks for another look of the same character, such as an emoji in colour.
_IGNORED = re.compile(f"[{UNPRINTABLE}\ud800-\udfff\ufe00-\ufe0f]")

_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (str, "text"),
    (bool, "true or false"),
    ((int, float, Decimal), "a number"),
    ((bytes, bytearray, memoryview), "bytes"),
    (dict, "JSON"),
    ((list, tuple, set, frozenset), "a list"),
    ((date, time), "a date or time"),
    (UUID, "a UUID"),
)


def kind(value: object) -> str:
    """Return what kind of value a driver has returned, in words, without the value."""
    return next((words for types, words in _KINDS if isinstance(value, types)), "of an unknown type")


def text_error(value: object, *, longest: int | None = None) -> str | None:
    """
    Return what is wrong with a value as text, to follow the column's name; ``None`` when nothing is.

    :param longest: how many characters it may have; ``None`` where another rule says so.
    """
    if value is None:
        return "is missing"
    if not isinstance(value, str):
        return f"is {kind(value)}; give text"
    if found := _UNPRINTABLE.search(value):
        return f"has the character U+{ord(found[0]):04X}, which can't be printed; remove it"
    stripped = value.strip()
    if not stripped:
        return "is blank"
    if stripped != value:
        return "has a blank at an end; remove it"
    return f"must have at most {longest} characters" if longest is not None and len(value) > longest else None


def name_error(value: object, *, longest: int) -> str | None:
    """
    Return what is wrong with a value as a name that is compared with others; ``None`` when nothing is.

    Its characters have to be in the Unicode of this Python: the folded form of others may change with the
    next one.

    :param longest: how many characters it may have, folded or not.
    """
    error = text_error(value, longest=longest)
    if error is not None or not isinstance(value, str) or value.isascii():
        return error
    for character in value:
        if unicodedata.category(character) in ("Cn", "Co"):
            return f"has the character U+{ord(character):04X}, which has no agreed meaning; remove it"
    return (
        None
        if len(fold(value)) <= longest
        else f"has ligatures that stand for more than {longest} characters"
    )


def fold(name: str) -> str:
    """
    Return the form in which two spellings of a name are the same: without case, characters that show nothing,
    and differences that Unicode calls compatible, such as full-width letters; each run of blanks is one.

    It is Unicode's NFKC_Casefold (https://www.unicode.org/reports/tr44/#NFKC_Casefold) with one letter for
    the four that Turkish has for i and I.
    """
    words = " ".join(name.split())
    if words.isascii() and words.isprintable():
        return words.lower()
    folded, before = words, None
    while folded != before:
        before = folded
        folded = unicodedata.normalize("NFKC", _IGNORED.sub("", folded)).casefold()
        folded = unicodedata.normalize("NFKC", folded).replace("i\u0307", "i").replace("\u0131", "i")
        folded = " ".join(folded.split())
    return folded
