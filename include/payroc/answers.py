"""
Payroc's answers, from bytes: the only place where an answer becomes an object.

Pydantic's parser gives up a whole text for one odd character in it, takes the last of two members of one
name, and reads ``NaN``. So a page is first cut at the brackets of its refunds, without recursion, and each
refund is held against bounds and parsed by itself: one that can't be understood costs itself alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from include.payroc.models import Link, PageFrame, Refund, explain

MAX_DEPTH: Final = 32
"""Levels of nesting in one object; a refund has 4."""

MAX_DIGITS: Final = 40
"""Characters of a number; an int64 has up to 20."""

MAX_OBJECT_BYTES: Final = 64 * 1024
"""Size of one object; a refund has about 1 kB. The transport bounds the answer as a whole."""

MAX_OBJECTS: Final = 1000
"""Objects on one page; we ask for 100 at most."""

Model = TypeVar("Model", bound=BaseModel)

_STRING: Final = rb'"(?:[^"\\]++|\\.)*+"'
# What lies before the next bracket outside of strings; the first group is the last string there.
_TO_BRACKET: Final = re.compile(rb'(?:[^"\[\]{}]++|(' + _STRING + rb"))*+([\[\]{}])", re.DOTALL)
_SCALAR: Final = re.compile(_STRING + rb'|[^,\[\]{}"]++', re.DOTALL)
_SEPARATORS: Final = re.compile(rb"[ \t\r\n,]*+")
_CLOSED_BY: Final = {b"{": b"}", b"[": b"]"}

# What stood between us and Payroc, by the first bytes of the answer. RFC 8259 lets a reader ignore a byte
# order mark; Payroc sends none, so something touched this answer on its way, and no answer may prove more
# than it did before.
_NOT_JSON: Final = (
    (b"\xef\xbb\xbf", "it begins with a byte order mark"),
    (b"\x1f\x8b", "it is compressed, which was not asked for"),
    (b"<", "it is a web page or XML"),
)

# By these an object is named in messages: short words without room for free text.
_REFUND_ID: Final = re.compile(rb'"refundId"[ \t\r\n]*+:[ \t\r\n]*+"([A-Za-z0-9_-]{10})"')
_ORDER_ID: Final = re.compile(rb'"orderId"[ \t\r\n]*+:[ \t\r\n]*+"([A-Za-z0-9._/#-]{1,24})"')


class NotUnderstood(ValueError):
    """An answer is not what its operation returns; the message says why, without any value of the answer."""


@dataclass(frozen=True, slots=True)
class Page:
    """
    One page of a list.

    :param refunds: the refunds that are understood.
    :param not_understood: names of the others, such as ``refund CD3HN88U9F``, ``order SO-1041`` or ``object 3
        of page 2``.
    :param has_more: whether the list has another page.
    :param links: links to the pages next to it.
    """

    refunds: tuple[Refund, ...]
    not_understood: tuple[str, ...]
    has_more: bool
    links: tuple[Link, ...]


def read(model: type[Model], text: bytes) -> Model:
    """
    Read one object.

    :param model: what the text has to be.
    :raises NotUnderstood: it is something else, or beyond the bounds of this module.
    """
    _check_format(text)
    return _parse(model, text)


def _parse(model: type[Model], text: bytes) -> Model:
    _check_bounds(text)
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        fields = ", ".join(sorted(name or "the whole" for name in explain(error))[:5])
    raise NotUnderstood(f"see {fields}")


def read_page(body: bytes, number: int) -> Page:
    """
    Read a page of refunds, object by object.

    :param number: number of the page in its list, from 1; it names the objects of which nothing else can be
        read.
    :raises NotUnderstood: the frame around the objects can't be read, so nothing of the page is certain.
    """
    _check_format(body)
    cuts = _cut(body)
    # In the frame each object is a zero: so its grammar is checked, and what is inside an object does not
    # matter.
    starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(body)]
    frame = _parse(PageFrame, b"0".join(body[start:end] for start, end in zip(starts, ends, strict=True)))
    if len(frame.data) != len(cuts):
        raise NotUnderstood("its refunds can't be told from its other members")
    refunds: list[Refund] = []
    not_understood: list[str] = []
    for place, (start, end) in enumerate(cuts, 1):
        text = body[start:end]
        try:
            refunds.append(_parse(Refund, text))
        except NotUnderstood:
            not_understood.append(_name(text) or f"object {place} of page {number}")
    return Page(tuple(refunds), tuple(not_understood), frame.has_more, frame.links)


def _cut(body: bytes) -> list[tuple[int, int]]:
    """Return where the elements of ``data`` begin and end; the parser of the frame checks all around them."""
    cuts: list[tuple[int, int]] = []
    opened = _TO_BRACKET.match(body)
    place = opened.end() if opened else len(body)
    while (match := _TO_BRACKET.match(body, place)) and match[2] in _CLOSED_BY:
        start = match.start(2)
        if match[2] == b"[" and match[1] == b'"data"' and body[match.end(1) : start].strip() == b":":
            place = start + 1
            while (element := _next_element(body, place)) is not None:
                if len(cuts) == MAX_OBJECTS:
                    raise NotUnderstood(f"it lists more than {MAX_OBJECTS} objects")
                cuts.append(element)
                place = element[1]
            place = _skip_separators(body, place) + 1
        else:
            place, _ = _end_of(body, start)
    return cuts


def _next_element(body: bytes, place: int) -> tuple[int, int] | None:
    """Return where the next element of a list begins and ends: whatever lies between two commas."""
    start = end = _skip_separators(body, place)
    while end < len(body) and body[end] not in b",]}":
        if body[end] in b"{[":
            end, _ = _end_of(body, end)
        elif scalar := _SCALAR.match(body, end):
            end = scalar.end()
        else:
            raise NotUnderstood("it ends inside a string")
    return (start, end) if end > start else None


def _skip_separators(body: bytes, place: int) -> int:
    found = _SEPARATORS.match(body, place)
    return found.end() if found else place


def _end_of(body: bytes, start: int) -> tuple[int, int]:
    """
    Return the end of the object or list that begins at a place, and how deep it nests.

    :raises NotUnderstood: its strings or brackets don't match.
    """
    closers: list[bytes] = []
    place, depth = start, 0
    while match := _TO_BRACKET.match(body, place):
        place, bracket = match.end(), match[2]
        if bracket in _CLOSED_BY:
            closers.append(_CLOSED_BY[bracket])
            depth = max(depth, len(closers))
        elif not closers or closers.pop() != bracket:
            break
        if not closers:
            return place, depth
    raise NotUnderstood("its strings or brackets don't match")


def _check_format(text: bytes) -> None:
    begin = text[:64].lstrip()
    for sign, what in _NOT_JSON:
        if begin.startswith(sign):
            raise NotUnderstood(what)


def _check_bounds(text: bytes) -> None:
    if len(text) > MAX_OBJECT_BYTES:
        raise NotUnderstood(f"it is larger than {MAX_OBJECT_BYTES // 1024} KiB")
    # Nothing nests deeper than it has brackets; counting these is quick.
    brackets = text.count(b"{") + text.count(b"[")
    if brackets > MAX_DEPTH and _end_of(text, 0)[1] > MAX_DEPTH:
        raise NotUnderstood(f"it nests deeper than {MAX_DEPTH} levels")
    try:
        _STRICT.decode(text.decode())
    except ValueError as error:
        if isinstance(error, NotUnderstood):
            raise
        raise NotUnderstood("it is not JSON") from None


def _no_name_twice(members: list[tuple[str, Any]]) -> None:
    # Of two members of one name each reader takes another one.
    if len({name for name, _ in members}) != len(members):
        raise NotUnderstood("it has two members of one name")


def _number(text: str) -> None:
    if len(text) > MAX_DIGITS:
        raise NotUnderstood(f"it has a number of more than {MAX_DIGITS} characters")


def _no_number(text: str) -> NoReturn:
    raise NotUnderstood("it is not JSON")


# Pydantic's parser is the one that is believed. This one only looks for what that one lets pass, and throws
# its values away.
_STRICT: Final = json.JSONDecoder(
    object_pairs_hook=_no_name_twice, parse_int=_number, parse_float=_number, parse_constant=_no_number
)


def _name(text: bytes) -> str | None:
    """Name an object by its refund id, else by its order id, if it has just one that is a plain word."""
    for kind, member, word in (("refund", b'"refundId"', _REFUND_ID), ("order", b'"orderId"', _ORDER_ID)):
        if text.count(member) == 1 and (found := word.search(text)):
            return f"{kind} {found[1].decode()}"
    return None
