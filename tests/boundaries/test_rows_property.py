"""Whatever a driver returns for a column, the row comes out of the ledger as it was, or is refused."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from include.refunds import pull as pulling
from include.refunds import rows as rules
from include.refunds import text as texts
from include.refunds.ledger import LedgerError
from include.refunds.source import COLUMNS
from include.refunds.text import fold
from tests.boundaries.books import GOOD, Books
from tests.conftest import NewDatabase

# Characters that lie at the edge of a rule are rare among all.
ODD = (
    "\x00\x1f \x7f\x85\xa0\xad\u0130\u0131\u0301\u0307\u034f\u061c\u0660\u2028\u200b"
    "\u202e\u2060\u3000\u3164\ud800\udfff\ue000\ufb01\ufdfa\ufe0f\ufeff\uff21\uffff\U0001f600\U000e0041"
    "\U0010ffff"
)
TEXT = st.text(
    st.one_of(st.characters(codec=None), st.sampled_from(ODD), st.sampled_from("aA1-/(@.")), max_size=30
)
ZONES = st.sampled_from([None, UTC, *(timezone(timedelta(hours=hours)) for hours in (-12, 5, 14))])
NEAR = st.integers(-3, 3).map(lambda hours: datetime.now(UTC) + timedelta(days=1, hours=hours))
BEFORE = rules.EARLIEST - timedelta(microseconds=1)
WHEN = st.one_of(st.datetimes(timezones=ZONES), NEAR, st.sampled_from([rules.EARLIEST, BEFORE]))
NUMBER = st.one_of(
    st.integers(),
    st.integers(rules.MAX_AMOUNT - 2, rules.MAX_AMOUNT + 2),
    st.integers(0, 3),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 10**4000, -(10**4000)]),
    st.floats(),
    st.booleans(),
    st.decimals(),
    st.integers(-(10**9), 10**9).map(lambda exponent: Decimal((0, (5,), exponent))),
    st.decimals(0, 10**13, places=2),
)
ANYTHING = st.one_of(
    st.none(),
    TEXT,
    NUMBER,
    WHEN,
    WHEN.map(str),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.uuids(),
    st.uuids().map(lambda value: str(value).upper()),
    st.binary(max_size=20),
    st.binary(max_size=20).map(bytearray),
    st.binary(max_size=20).map(memoryview),
    st.dictionaries(TEXT, st.integers(), max_size=2),
    st.lists(TEXT, max_size=2),
    st.just(object()),
    st.sampled_from(
        ["infinity", "", " ", "ref", "BEFORE", "ann@example.com", "ANN@EXAMPLE.COM", "(row 1)", "JPY"]
    ),
)
# One column of a row is odd, or two that may stand in each other's way.
CHANGES = st.dictionaries(st.sampled_from(COLUMNS), ANYTHING, min_size=1, max_size=2)


@pytest.fixture(scope="module")
def own(new_ledger: NewDatabase) -> Iterator[Books]:
    books = Books(new_ledger())
    yield books
    books.close()


def comes_through_or_is_named(books: Books, changes: list[dict[str, Any]]) -> None:
    """Pull odd rows between good ones: each comes out as it was or is named; the good ones come through."""
    with books.engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(
            text(
                "TRUNCATE refund_ledger.refund_instructions, refund_ledger.refund_states, "
                "refund_ledger.refund_events, refund_ledger.invalid_rows CASCADE"
            )
        )
    books.now = datetime.now(UTC)
    odd = [GOOD | {"source_ref": f"odd-{number}"} | change for number, change in enumerate(changes)]
    rows = [GOOD | {"source_ref": "before"}, *odd, GOOD | {"source_ref": "after"}]
    pulled = books.pull(rows)
    refunds = books.refunds()
    assert {"before", "after"} <= set(refunds)
    assert {"before", "after"}.isdisjoint(pulled.invalid)
    for number, row in enumerate(odd, start=2):
        ref = row["source_ref"]
        names = {f"(row {number})", *([str(ref)] if isinstance(ref, (str, rules.UUID)) else [])}
        if refund := next((refunds[name] for name in names if name in refunds), None):
            is_as_it_was(books, row, refund)
        else:
            assert names & set(pulled.invalid), row
    forms = [refund["source_ref_folded"] for refund in refunds.values()]
    assert len(forms) == len(set(forms))
    for errors in pulled.invalid.values():
        assert set(errors) <= {*COLUMNS, "refund_method"}
        assert all(what and what.isprintable() and not what.endswith(".") for what in errors.values())
    # The next pull finds all as it was.
    again = books.pull(rows)
    assert (again.new, again.changed, again.invalid) == (0, {}, pulled.invalid)


def is_as_it_was(books: Books, row: dict[str, Any], refund: dict[str, Any]) -> None:
    """A refund holds the values of its row, within the bounds, and so does its body."""
    body = json.loads(books.cipher.open(bytes(refund["request"]), refund["request_sha256"], refund["id"]))
    ref = str(row["source_ref"])
    assert (refund["source_ref"], refund["source_ref_folded"]) == (ref, fold(ref))
    assert 1 <= refund["amount"] <= 10**12
    assert (refund["amount"], body["order"]["amount"]) == (row["amount"], row["amount"])
    assert not isinstance(row["amount"], (bool, float))
    assert not isinstance(row["amount"], Decimal) or row["amount"].as_tuple().exponent >= 0
    at = row["approved_at"]
    at = datetime.fromisoformat(at) if isinstance(at, str) else at
    assert refund["approved_at"] == (at if at.tzinfo else at.replace(tzinfo=UTC))
    assert datetime(2000, 1, 1, tzinfo=UTC) <= refund["approved_at"] <= books.now + timedelta(days=1)
    people = (refund["requested_by"], refund["approved_by"])
    assert people == (row["requested_by"], row["approved_by"])
    assert fold(people[0]) != fold(people[1])
    for column in ("processing_terminal_id", "description", "order_id", "currency"):
        assert row[column] in (refund[column], None, "")
    held = [
        refund[name]
        for name in (
            "source_ref",
            "processing_terminal_id",
            "order_id",
            "description",
            *("requested_by", "approved_by"),
        )
    ]
    for value in [*held, *(str(value) for value in body["refundMethod"].values())]:
        assert value == value.strip() != ""
        assert not any(
            unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in value
        )
    assert refund["order_id"].isascii()
    assert unicodedata.is_normalized("NFC", ref)


# Many rows to an example: most of an example's time is the ledger's, and it costs hardly more for thirty rows
# than for one.
MANY = st.lists(CHANGES, min_size=20, max_size=30)
SMALL = settings(max_examples=settings.default.max_examples // 4)


@given(changes=MANY)
@SMALL
@example(
    changes=[
        {"amount": Decimal("1E+999999999")},
        {"amount": Decimal("1E-999999999")},
        {"amount": Decimal("sNaN")},
    ]
)
@example(
    changes=[
        {"source_ref": "\ufdfa" * 200},
        {"requested_by": "\ufdfa" * 200},
        {"source_ref": "\U0001f600" * 200},
    ]
)
@example(
    changes=[{"source_ref": "BEFORE"}, {"source_ref": "x"}, {"source_ref": "X"}, {"source_ref": "(row 2)"}]
)
@example(
    changes=[
        {"approved_at": datetime.max.replace(tzinfo=UTC)},
        {"approved_at": date.max},
        {"approved_at": time.max},
    ]
)
@example(changes=[{"order_id": "one"}, {"order_id": "one"}])
def test_a_row_of_any_values_comes_through_or_is_named(own: Books, changes: list[dict[str, Any]]) -> None:
    comes_through_or_is_named(own, changes)


@given(name=TEXT, other=TEXT)
def test_the_form_of_a_name_is_the_same_for_its_other_spellings(name: str, other: str) -> None:
    form = fold(name)
    assert fold(form) == form
    spellings = (
        name.upper(),
        name.lower(),
        name.title(),
        f"  {name}\t",
        unicodedata.normalize("NFD", name),
        f"\u200b{name}\ufeff",
    )
    # Python's own changes of case leave what they do not know.
    assert {fold(spelling) for spelling in spellings[3:]} == {form}
    if name.isascii():
        assert {fold(spelling) for spelling in spellings} == {form}
    assert (fold(other) == form) == (fold(fold(other)) == form)


# -- planted mistakes ------------------------------------------------------------------------------

# What is broken, and rows that show it.
PLANTED: dict[str, tuple[tuple[Any, str, Any], list[dict[str, Any]]]] = {
    "the largest amount": ((rules, "MAX_AMOUNT", 2**63 - 1), [{"amount": 10**12 + 1}]),
    "decimal places": (
        (rules, "_amount", lambda value, currency: int(value)),
        [{"amount": Decimal("50.00")}],
    ),
    "the earliest date": (
        (rules, "EARLIEST", datetime(1, 1, 2, tzinfo=UTC)),
        [{"approved_at": datetime(1999, 1, 1, tzinfo=UTC)}],
    ),
    "the latest date": (
        (rules, "AHEAD", timedelta(days=2)),
        [{"approved_at": datetime.now(UTC) + timedelta(hours=36)}],
    ),
    "characters that can't be printed": (
        (texts, "_UNPRINTABLE", re.compile("\x00")),
        [{"name_on_account": "Sarah\u202eHopper"}],
    ),
    "text of another type": (
        (rules, "text_error", lambda value, longest=None: None),
        [{"description": " blank "}],
    ),
    "the form of people's names": (
        (rules, "same_person", lambda one, other: one.lower() == other.lower()),
        [{"requested_by": "\uff41nn", "approved_by": "ann"}],
    ),
    "the form of source_refs": (
        (pulling, "fold", lambda ref: ref),
        [{"source_ref": "x"}, {"source_ref": "X"}],
    ),
    "the canonical source_ref": (
        (rules, "source_ref_error", lambda ref: None),
        [{"source_ref": "Re\u0301f"}],
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_the_property_of_rows_finds_a_planted_mistake(own: Books, mistake: str) -> None:
    patched, shown_by = PLANTED[mistake]

    @given(changes=MANY)
    @settings(SMALL, database=None, report_multiple_bugs=False)
    @example(changes=shown_by)
    def again(changes: list[dict[str, Any]]) -> None:
        comes_through_or_is_named(own, changes)

    with patch.object(*patched), pytest.raises((AssertionError, LedgerError)):
        again()
