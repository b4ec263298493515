"""What people are told, so that nobody has to look for trouble."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from include.refunds.business_days import business_days_before, business_days_between
from include.refunds.report import Line, Report, follow_up_report, run_report, status_report
from tests.refunds.conftest import World


def age(world: World, refund_id: int, **columns: str) -> None:
    """Move instants of a refund into the past, past the triggers."""
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        changes = ", ".join(f"{name} = now() - interval '{ago}'" for name, ago in columns.items())
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.refund_states SET {changes} WHERE refund_id = {refund_id}"
        )


def status(world: World) -> Report:
    return world.run(status_report(world.ledger.engine, world.settings.source))


@pytest.mark.parametrize(
    ("ending", "columns", "sentence"),
    [
        # At least so many business days, whatever day it is today.
        ("4321", {"first_sent_at": "10 days"}, "has been accepted for more than 5 business days"),
        ("9012", {"first_sent_at": "5 days"}, "has been pending at Payroc for more than 2 business days"),
        ("4321", {"payroc_seen_at": "5 days"}, "has not been looked at for more than 2 business days"),
    ],
)
def test_an_accepted_refund_that_does_not_move_is_named(
    world: World, ending: str, columns: dict[str, str], sentence: str
) -> None:
    late, fresh = world.released(ending), world.released()
    for refund_id in (late, fresh):
        world.send(refund_id)
    age(world, late, **columns)
    world.write_back()
    (found,) = status(world).notes
    assert f"Refund {late} (order {world.row(late)['order_id']}) {sentence}" in found


def test_a_refund_in_doubt_for_more_than_a_day_is_named(world: World) -> None:
    late, fresh = world.released("9005"), world.released("9005")
    for refund_id in (late, fresh):
        world.send(refund_id)
    age(world, late, first_sent_at="25 hours")
    world.write_back()
    (sentence,) = status(world).notes
    assert (
        f"Refund {late} (order {world.row(late)['order_id']}) has been unknown for more than a day"
        in sentence
    )


def test_the_follow_up_reports_what_people_have_to_do_and_not_what_time_will_tell(world: World) -> None:
    in_doubt = world.released("9005")
    world.send(in_doubt)

    def unfinished() -> str:
        return " ".join(world.run(follow_up_report(world.ledger.engine, world.settings.source)).unfinished)

    assert unfinished() == ""
    age(world, in_doubt, first_sent_at="25 hours")
    assert "has been unknown for more than a day" in unfinished()
    world.send(world.released("9013"))
    world.run(world.ledger.pauses.pause("*", "the bank called"))
    assert "1 in review: people have to look at them" in unfinished()
    assert "`python -m include.refunds resolve ID`" in unfinished()
    assert "Sending is paused by test: the bank called" in unfinished()


def test_a_weekend_is_no_business_day() -> None:
    friday, monday = datetime(2026, 11, 20, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC)
    next_monday = datetime(2026, 11, 30, tzinfo=UTC)
    assert business_days_between(friday, monday) == 1
    assert business_days_between(friday, friday) == 0
    assert business_days_between(monday, next_monday) == 5
    assert business_days_before(next_monday, 6) == datetime(2026, 11, 22, tzinfo=UTC)


@pytest.mark.parametrize(
    ("ending", "words"),
    [("9005", "1 unknown: Payroc has not told"), ("9013", "1 in review: people have to look at them")],
)
def test_what_is_unfinished_is_told(world: World, ending: str, words: str) -> None:
    world.send(world.released(ending))
    assert any(what.startswith(words) for what in status(world).unfinished)


def test_news_that_the_source_does_not_have_are_told(world: World) -> None:
    world.send(world.released())
    assert "1 refunds have news that the source does not have yet" in status(world).notes[0]
    world.write_back()
    assert status(world).notes == []


def test_the_report_of_a_run_names_its_refunds_and_every_other_that_needs_people(world: World) -> None:
    earlier, fine_earlier = world.released("9013"), world.released()
    for refund_id in (earlier, fine_earlier):
        world.send(refund_id)
    ref = world.approve()
    world.pull()
    world.release("run-2")
    ours = int(world.row(ref)["id"])
    world.send(ours)
    report = world.run(run_report(world.ledger.engine, world.settings.source, "run-2"))
    assert {line.id for line in report.refunds} == {earlier, ours}


def test_totals_are_per_currency(world: World) -> None:
    for currency, amount in (("USD", 100), ("USD", 250), ("CAD", 700)):
        world.send(world.released(currency=currency, amount=amount))
    found = {(total.status, total.currency): (total.count, total.amount) for total in status(world).totals}
    assert found == {("accepted", "USD"): (2, 350), ("accepted", "CAD"): (1, 700)}


def test_of_a_large_run_only_what_did_not_go_as_expected_is_listed() -> None:
    lines = [
        Line(number, f"ORDER-{number}", 100, "USD", "1234", "accepted", "ABCDEFGHIJ", 1, None)
        for number in range(1000)
    ]
    lines[7] = Line(7, "ORDER-7", 100, "USD", "1234", "rejected", None, 1, "Declined by the bank.")
    text = str(Report("Run", refunds=lines))
    assert "ORDER-7 " in text
    assert "ORDER-8 " not in text
    assert "999 more are not listed" in text
