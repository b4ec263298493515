"""Odd values in source rows: the row is named with what is wrong, and its neighbours become refunds."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from include.refunds.case import DecisionRefused
from include.refunds.ledger import Selection
from include.refunds.pull import pull
from include.refunds.report import status_report
from include.refunds.summary import read_summary
from tests.boundaries.books import GOOD, Books, Listed
from tests.conftest import NewDatabase
from tests.refunds.conftest import World

EAST, WEST = timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))

# -- approved_at -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("infinity", "is no date and time"),
        ("-infinity", "is no date and time"),
        ("0044-03-15 09:00:00+00 BC", "is no date and time"),
        ("10000-01-01 00:00:00+00", "is no date and time"),
        ("now", "is no date and time"),
        ("2026-11-20", "is no date and time"),
        ("2026-13-20T09:00:00Z", "is no date and time"),
        (datetime(1, 1, 1, tzinfo=EAST), "is before 2000-01-01"),
        (datetime(1, 1, 1), "is before 2000-01-01"),  # noqa: DTZ001 - as MySQL has it
        (datetime(1999, 12, 31, 23, 59, 59, tzinfo=UTC), "is before 2000-01-01"),
        (datetime.max.replace(tzinfo=WEST), "is more than a day in the future"),
        (datetime(9999, 12, 31, 23), "is more than a day in the future"),  # noqa: DTZ001
        (date(2026, 11, 20), "is a date or time; give a date and time"),
        (1_795_000_000, "is a number; give a date and time"),
    ],
)
def test_an_approval_at_no_possible_time_is_named(books: Books, value: Any, what: str) -> None:
    _, errors = books.pull_beside_good_ones(approved_at=value)
    assert list(errors) == ["approved_at"]
    assert errors["approved_at"].startswith(what)


def test_an_approval_may_lie_a_day_ahead_and_no_more(books: Books) -> None:
    ahead = books.now + timedelta(days=1)
    assert books.pull_beside_good_ones(approved_at=ahead)[1] == {}
    _, errors = books.pull_beside_good_ones(source_ref="later", approved_at=ahead + timedelta(seconds=1))
    assert errors == {"approved_at": "is more than a day in the future"}


def test_the_first_approval_that_counts_is_that_of_2000(books: Books) -> None:
    first = datetime(2000, 1, 1, tzinfo=UTC)
    assert books.pull_beside_good_ones(approved_at=first.astimezone(EAST))[1] == {}
    assert books.refunds()["ref"]["approved_at"] == first


def test_a_worker_that_stood_still_calls_no_newer_approval_invalid(books: Books) -> None:
    class Slow(Listed):
        """A source whose rows were approved while the worker waited for them."""

        async def select_approved(self) -> Any:
            books.now += timedelta(days=8)
            return await super().select_approved()

    approved = books.now + timedelta(days=5)
    rows = Slow([GOOD | {"source_ref": "ref", "approved_at": approved}])
    pulled = asyncio.run(pull(rows, books.ledger, books.cipher, books.settings))
    assert (pulled.new, pulled.invalid) == (1, {})


# -- amounts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "currency", "what"),
    [
        (2**63 - 1, "USD", "is more than 1,000,000,000,000 minor units, the most that a refund may have"),
        (10**12 + 1, "USD", "is more than 1,000,000,000,000 minor units, the most that a refund may have"),
        pytest.param(
            10**6000,
            "USD",
            "is more than 1,000,000,000,000 minor units, the most that a refund may have",
            id="huge",
        ),
        (
            Decimal("1E+40000000"),
            "USD",
            "is more than 1,000,000,000,000 minor units, the most that a refund may have",
        ),
        (Decimal("50.00"), "USD", "is 50.00; give whole cents, such as 5000 for USD 50.00"),
        (Decimal("1299.0"), "USD", "is 1299.0; give whole cents, such as 129900 for USD 1,299.00"),
        (Decimal("50.00"), "JPY", "is 50.00; give a whole number, such as 50 for JPY 50"),
        (Decimal("4.999"), "KWD", "is 4.999; give whole minor units, such as 4999 for KWD 4.999"),
        (Decimal("0.001"), "USD", "has decimal places; give whole cents, such as 5000 for USD 50.00"),
        # It may be an account number that slipped into the column.
        (
            Decimal("556677889911.00"),
            "USD",
            "has decimal places; give whole cents, such as 5000 for USD 50.00",
        ),
        (Decimal("NaN"), "USD", "is not a whole number; give whole cents, such as 5000 for USD 50.00"),
        (50.0, "USD", "is not a whole number; give whole cents, such as 5000 for USD 50.00"),
        (Decimal("-0"), "USD", "is not more than 0"),
    ],
)
def test_an_amount_that_is_none_is_named(books: Books, value: Any, currency: str, what: str) -> None:
    _, errors = books.pull_beside_good_ones(amount=value, currency=currency)
    assert errors == {"amount": what}


def test_the_largest_amount_and_whole_decimals_come_through(books: Books) -> None:
    assert books.pull_beside_good_ones(amount=Decimal(10**12))[1] == {}
    assert books.refunds()["ref"]["amount"] == 10**12


def test_a_large_amount_in_the_source_stops_no_run(world: World) -> None:
    large, small = world.approve(amount=2**63 - 1), world.approve(amount=4999)
    for _ in range(2):
        assert list(world.pull().invalid) == [large]
    assert world.release() == [world.row(small)["id"]]
    world.run(world.ledger.decisions.cancel(world.row(small)["id"], "A test cancels it."))
    assert world.pull().invalid[large]["amount"].startswith("is more than")


def test_sums_over_what_a_bigint_holds_are_reported(new_ledger: NewDatabase) -> None:
    books = Books(new_ledger())
    books.pull([GOOD | {"source_ref": ref} for ref in ("one", "two")])
    with books.engine.begin() as connection:
        # As many refunds as such a sum takes would be millions.
        connection.execute(
            text(
                "ALTER TABLE refund_ledger.refund_instructions DROP CONSTRAINT refund_instructions_amount_check"
            )
        )
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(text(f"UPDATE refund_ledger.refund_instructions SET amount = {2**63 - 1}"))

    async def work() -> None:
        engine, total = books.ledger.engine, 2 * (2**63 - 1)
        report = await status_report(engine, books.settings.source)
        assert [item.amount for item in report.totals] == [total]
        assert f"{total // 100:,}" in str(report)
        span = {"since": books.now - timedelta(days=1), "until": books.now + timedelta(days=1)}
        summary = await read_summary(engine, books.settings.source, timezone="UTC", **span)
        assert [item.amount for item in summary.totals] == [total]
        candidates = await books.ledger.runs.candidates(Selection())
        await books.ledger.runs.begin_run("run-1", {}, candidates, {}, books.now)
        assert await books.ledger.approvals.ask_approval("run-1") is None
        ids = [item.id for item in candidates]
        assert await books.ledger.gate.release("run-1", ids, ids, {}) == ids
        # It counts what the day has released.
        assert (await books.ledger.gate.at_the_gate(ids)).released == ids

    asyncio.run(work())
    books.close()


# -- people ----------------------------------------------------------------------------------------

ONE_PERSON = [
    ("ann lee", "Ann Lee"),
    ("ann lee", "ann  lee"),
    ("ann lee", "ann\u00a0lee"),
    ("Jos\u00e9", "Jose\u0301"),
    ("ann@example.com", "\uff41\uff4e\uff4e@example.com"),
    ("\u039d\u0399\u039a\u039f\u03a3", "\u03bd\u03b9\u03ba\u03bf\u03c3"),
    ("AL\u0130", "ali"),
    ("ALI", "al\u0131"),
    ("Stra\u00dfe", "STRASSE"),
    ("\ufb01nn", "Finn"),
    ("ann\ufe0f", "ann"),
]


@pytest.mark.parametrize(("requested_by", "approved_by"), ONE_PERSON)
def test_two_spellings_of_a_name_are_one_person(books: Books, requested_by: str, approved_by: str) -> None:
    _, errors = books.pull_beside_good_ones(requested_by=requested_by, approved_by=approved_by)
    assert errors == {"approved_by": "is the same person as requested_by; a refund needs two"}


@pytest.mark.parametrize(
    "name", ["ann@example.com\u200b", "ann@example.com\u00ad", "\u202eann@example.com", "ann\r\nlee"]
)
def test_a_name_with_a_character_that_shows_nothing_is_refused(books: Books, name: str) -> None:
    _, errors = books.pull_beside_good_ones(requested_by="ann@example.com", approved_by=name)
    assert "can't be printed" in errors["approved_by"]


@pytest.mark.parametrize("by", ["ANN@example.com", "ann@example.com\u200b", "\uff41nn@example.com"])
def test_a_requester_in_another_spelling_lifts_no_hold(world: World, by: str) -> None:
    world.limit(largest_refund=1)
    ref = world.approve()
    world.pull()
    world.release()
    assert world.row(ref)["status"] == "held"
    world.ledger._database.actor = by
    with pytest.raises(DecisionRefused, match="another operator"):
        world.run(world.ledger.decisions.unhold(world.row(ref)["id"], "It is fine."))


@pytest.mark.parametrize("by", ["CARL", "carl\u200b", "\uff43arl"])
def test_who_triggered_a_run_approves_it_in_no_spelling(world: World, by: str) -> None:
    world.limit(approval_count=0)
    world.approve()
    world.pull()

    async def ask() -> None:
        candidates = await world.ledger.runs.candidates(Selection())
        await world.ledger.runs.begin_run("run-1", {}, candidates, {}, datetime.now(UTC))
        assert await world.ledger.approvals.ask_approval("run-1") is not None
        with pytest.raises(DecisionRefused, match="triggered run"):
            await world.ledger.approvals.record_approval("run-1", by=by, triggered_by="carl")

    world.run(ask())


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("name_on_account", "    ", "is blank"),
        (
            "name_on_account",
            "Sarah \u202eHopper",
            "has the character U+202E, which can't be printed; remove it",
        ),
        ("name_on_account", "Sarah\r\nHopper", "has the character U+000D, which can't be printed; remove it"),
        (
            "name_on_account",
            "Sarah Hopper\u3164",
            "has the character U+3164, which can't be printed; remove it",
        ),
        ("name_on_account", "Sarah\ud83d", "has the character U+D83D, which can't be printed; remove it"),
        ("processing_terminal_id", "    ", "is blank"),
        ("processing_terminal_id", 7701001, "is a number; give text"),
        ("order_id", "SO-1 ", "has a blank at an end; remove it"),
        ("order_id", "SO\u20131", "has other characters than those of ASCII"),
        ("order_id", "SO-1\t2", "has the character U+0009, which can't be printed; remove it"),
        ("order_id", " ", "is blank"),
        ("description", "\x1b[2K\rPaid 12.00", "has the character U+001B, which can't be printed; remove it"),
        ("description", b"Returned", "is bytes; give text"),
        ("currency", None, "is missing"),
        ("account_number", memoryview(b"556677889911"), "is bytes; give text"),
        ("account_number", "\u0665\u0665\u0666\u0667\u0668", "must be 4 to 17 digits"),
        ("routing_number", ["053200983"], "is a list; give text"),
        ("email", "n/a", "is no email address; leave it empty when there is none"),
        ("email", "-", "is no email address; leave it empty when there is none"),
        ("email", "sarah@example", "is no email address; leave it empty when there is none"),
        (
            "email",
            "sarah@example.com, tom@example.com",
            "is no email address; leave it empty when there is none",
        ),
        ("requested_by", "dana\ud83d", "has the character U+D83D, which can't be printed; remove it"),
        ("requested_by", "dana\ue000", "has the character U+E000, which has no agreed meaning; remove it"),
        ("requested_by", {"name": "dana"}, "is JSON; give text"),
    ],
)
def test_a_text_that_is_none_is_named(books: Books, column: str, value: Any, what: str) -> None:
    _, errors = books.pull_beside_good_ones(**{column: value})
    assert errors == {column: what}


@pytest.mark.parametrize("token", [" " * 13, "2967531234 56 ", "296753\u200b123456"])
def test_a_token_that_is_none_is_named(books: Books, token: str) -> None:
    account = dict.fromkeys(("name_on_account", "routing_number", "account_number"))
    _, errors = books.pull_beside_good_ones(secure_token=token, **account)
    assert list(errors) == ["secure_token"]


@pytest.mark.parametrize("column", ["description", "name_on_account"])
def test_letters_of_any_alphabet_and_emoji_are_text(books: Books, column: str) -> None:
    value = "\u00c5sa \u738b \u0627\u0644 \u2764\ufe0f"
    assert books.pull_beside_good_ones(**{column: value})[1] == {}


# -- source_ref ------------------------------------------------------------------------------------

A_UUID = "0b9f6c1e-3d52-4f7a-9c1d-2e8a7b6c5d4e"


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("RF-1        ", "has a blank at an end; remove it"),
        (" RF-1", "has a blank at an end; remove it"),
        ("RF-1\u00a0", "has a blank at an end; remove it"),
        ("Re\u0301f-1", "has an accent apart from its letter; give it in Unicode's form NFC"),
        (A_UUID.upper(), "is a UUID in another form; give it in lower case with hyphens, 8-4-4-4-12"),
        (
            A_UUID.replace("-", ""),
            "is a UUID in another form; give it in lower case with hyphens, 8-4-4-4-12",
        ),
        (f"{{{A_UUID}}}", "is a UUID in another form; give it in lower case with hyphens, 8-4-4-4-12"),
    ],
)
def test_a_source_ref_in_another_form_is_refused_under_its_own_name(
    books: Books, value: str, what: str
) -> None:
    pulled, errors = books.pull_beside_good_ones(source_ref=value)
    assert (list(pulled.invalid), errors) == ([value], {"source_ref": what})


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "is missing"),
        ("", "is blank"),
        ("x" * 201, "must have at most 200 characters"),
        ("RF\x00-1", "has the character U+0000, which can't be printed; remove it"),
        ("RF-1\ud83d", "has the character U+D83D, which can't be printed; remove it"),
        ({"ref": 1}, "is JSON; give text"),
        (bytearray(b"RF-1"), "is bytes; give text"),
        (["RF-1"], "is a list; give text"),
        (17, "is a number; give text"),
        ("(row 7)", "begins with '(row', which names rows without a source_ref; choose another one"),
    ],
)
def test_a_source_ref_that_names_no_row_is_named_by_its_place(books: Books, value: Any, what: str) -> None:
    pulled, errors = books.pull_beside_good_ones(source_ref=value)
    assert (list(pulled.invalid), errors) == (["(row 2)"], {"source_ref": what})


def test_a_uuid_object_is_that_of_its_canonical_text(books: Books) -> None:
    assert books.pull_beside_good_ones(source_ref=UUID(A_UUID))[1] == {}
    assert books.pull_beside_good_ones(source_ref=A_UUID)[0].new == 0


@pytest.mark.parametrize("other", ["rf-1a", "\uff32\uff26-1A", "RF-\u2460A"])
@pytest.mark.parametrize("together", [True, False])
def test_the_later_one_of_two_spellings_of_a_source_ref_is_refused(
    books: Books, other: str, together: bool
) -> None:
    rows = [GOOD | {"source_ref": "RF-1A"}, GOOD | {"source_ref": other}]
    pulled = [books.pull(rows)] if together else [books.pull(rows[:1]), books.pull(rows[::-1])]
    what = "is that of another refund in another spelling; each refund needs its own"
    assert pulled[-1].invalid == {other: {"source_ref": what}}
    assert list(books.refunds()) == ["RF-1A"]


def test_a_padded_source_ref_is_refused_and_the_run_goes_on(world: World) -> None:
    with world.source_engine.begin() as connection:
        connection.execute(text("ALTER TABLE refund_requests ALTER COLUMN source_ref TYPE char(12)"))
    padded, full = world.approve(source_ref="RF-1"), world.approve(source_ref="RF-123456789")
    pulled = world.pull()
    assert (list(pulled.invalid), pulled.new) == ([padded.ljust(12)], 1)
    assert world.row(full)["status"] == "approved"


# -- the same payee --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"account_number": "05566774321"}, {"account_number": "005566774321"}),
        ({"account_number": "05566774321"}, {"account_number": "5566774321"}),
        ({"secure_token": "abcdef123456"}, {"secure_token": "ABCDEF123456"}),
        ({"secure_token": "abcdef123456"}, {"secure_token": "abcdef 123456"}),
    ],
)
def test_a_payee_in_another_spelling_is_a_duplicate(
    world: World, one: dict[str, str], other: dict[str, str]
) -> None:
    world.limit(duplicate_days=7)
    no_account = dict.fromkeys(("name_on_account", "account_number", "routing_number"))
    refs = [
        world.approve(**(no_account if "secure_token" in payee else {}) | payee) for payee in (one, other)
    ]
    world.pull()
    world.release()
    assert [world.row(ref)["status"] for ref in refs] == ["released", "held"]
    body = world.cipher.open(bytes(world.row(refs[1])["request"]), world.row(refs[1])["request_sha256"], 0)
    assert next(iter(other.values())).encode() in body
