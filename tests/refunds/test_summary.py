"""What the daily summary tells, from the real ledger."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import URL

from include.refunds.ledger import LedgerEngine
from include.refunds.message import Message
from include.refunds.roles import AUDITOR, PAYER
from include.refunds.settings import get_settings
from include.refunds.summary import CHART_DAYS, Day, Run, Summary, as_message, read_summary
from payroc_airflow.summary import tells_since, write
from tests.conftest import Login
from tests.dags.conftest import Runner
from tests.dags.conftest import run_dag as run_dag
from tests.receivers import Mailbox, body_of
from tests.refunds.conftest import World

TIMEZONE = "America/New_York"


def summary_of(world: World, *, hours: float = 24, url: URL | None = None) -> Summary:
    until = datetime.now(UTC)

    async def read() -> Summary:
        engine = world.ledger.engine if url is None else LedgerEngine(url)
        try:
            since = until - timedelta(hours=hours)
            return await read_summary(
                engine, world.settings.source, since=since, until=until, timezone=TIMEZONE
            )
        finally:
            await engine.dispose()

    return world.run(read())


def happened(world: World, refund_id: int, ago: str) -> None:
    """Move what has happened to a refund into the past, past the triggers."""
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.refund_events SET at = at - interval '{ago}' WHERE refund_id = {refund_id}"
        )
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.refund_states SET updated_at = updated_at - interval '{ago}' WHERE refund_id = {refund_id}"
        )


def html_of(summary: Summary) -> str:
    return as_message(summary, url="https://airflow.example/dags/payroc_refunds_summary").html


def a_day(world: World) -> dict[str, int]:
    """Let happen what a day has."""
    made = {}
    for name, ending in {"paid": "4321", "tried twice": "9005", "declined": "9001", "odd": "9013"}.items():
        made[name] = world.released(ending)
        world.send(made[name])
    world.hours_ahead = 1
    world.send(made["tried twice"])
    world.hours_ahead = 0
    world.limit(largest_refund=100_000)
    world.approve(amount=250_000)
    world.pull()
    world.release("run-2")
    return made


def test_a_summary_counts_each_refund_once_by_what_it_became_and_by_what_it_waits_as(world: World) -> None:
    a_day(world)
    summary = summary_of(world, hours=24)
    assert [(total.status, total.count, total.amount) for total in summary.outcomes] == [
        ("accepted", 1, 4999),
        ("rejected", 1, 4999),
    ]
    assert [(total.status, total.count, total.amount) for total in summary.waiting] == [
        ("held", 1, 250_000),
        ("review", 1, 4999),
    ]
    assert [(run.run_id, run.released) for run in summary.runs] == [
        ("run-1", "1 refund, 49.99 USD"),
        ("run-2", "no refunds"),
    ]
    assert len(summary.days) == CHART_DAYS
    assert (summary.days[-1].paid, summary.days[-1].unpaid, summary.days[-1].amounts) == (1, 1, {"USD": 4999})
    assert summary.oldest is not None
    assert timedelta(hours=1) < summary.until - summary.oldest < timedelta(hours=3)


def test_what_happened_before_is_in_the_chart_and_not_in_the_day(world: World) -> None:
    earlier, long_ago = world.released(), world.released("4321", amount=2000)
    for refund_id, ago in ((earlier, "3 days"), (long_ago, "20 days")):
        world.send(refund_id)
        happened(world, refund_id, ago)
    summary = summary_of(world)
    assert summary.outcomes == []
    assert {CHART_DAYS - 1 - number: day.paid for number, day in enumerate(summary.days) if day.paid} == {
        3: 1
    }
    assert [(total.count, total.amount) for total in summary.totals] == [(2, 6999)]


@pytest.mark.parametrize("role", [PAYER, AUDITOR])
def test_the_rights_of_the_payer_and_of_the_auditor_are_enough(
    world: World, ledger_url: URL, login: Login, role: str
) -> None:
    a_day(world)
    as_owner, as_role = summary_of(world), summary_of(world, url=login(ledger_url, role))
    assert (as_role.outcomes, as_role.waiting, as_role.days, as_role.runs) == (
        as_owner.outcomes,
        as_owner.waiting,
        as_owner.days,
        as_owner.runs,
    )


def test_the_page_shows_all_of_it_without_a_script_a_picture_or_anything_to_load(world: World) -> None:
    a_day(world)
    world.run(world.ledger.pauses.pause("7701009", "a <terminal> of trouble"))
    summary = summary_of(world)
    summary.runs[0] = Run("run-1", summary.runs[0].started_at, "1 refund, 49.99 USD", "failed")
    html = html_of(summary)
    for words in ("2,500.00 USD", "review", "a limit holds them", "a ‹terminal› of trouble", "failed"):
        assert words in html
    assert re.findall(r"<(?:script|img|svg|link|iframe)|url\(|@import", html) == []
    assert set(re.findall(r'(?:src|href)="([^"]+)"', html)) == {
        "https://airflow.example/dags/payroc_refunds_summary"
    }
    assert not any(secret in html for secret in ("Hopper", "053200983", "55667"))


def test_bars_are_as_long_as_the_day_with_most_refunds_allows() -> None:
    now = datetime(2026, 11, 23, 18, tzinfo=ZoneInfo(TIMEZONE))
    days = [
        Day(now.date() - timedelta(days=2), 3, 1, {"USD": 10}),
        Day(now.date() - timedelta(days=1), 0, 0, {}),
        Day(now.date(), 1, 0, {}),
    ]
    html = html_of(Summary(now - timedelta(days=1), now, days=days))
    assert re.findall(r'width="([0-9.]+)%" height', html) == ["75.0", "25.0", "25.0"]


def test_an_empty_ledger_has_a_summary_too(world: World) -> None:
    summary = summary_of(world)
    message = as_message(summary, url="")
    assert re.fullmatch(r"Payroc refunds: \w{3} \d\d \w{3}, no refunds accepted", message.subject)
    assert "Nothing waits." in message.html
    assert "href" not in message.html


def test_the_subject_and_the_text_say_what_matters(world: World) -> None:
    a_day(world)
    message: Message = as_message(summary_of(world), url="https://airflow.example")
    assert message.subject.endswith(", 1 refund, 49.99 USD accepted, 1 held, 1 review")
    assert "  held            1        2,500.00 USD" in message.text
    assert "Runs: 2, failed: 0" in message.text


@pytest.mark.parametrize(
    ("schedule", "now", "since"),
    [
        # Monday tells of the weekend; made again in the evening it tells the same.
        ("0 18 * * 1-5", "2026-11-23 18:00", "2026-11-20 18:00"),
        ("0 18 * * 1-5", "2026-11-23 21:30", "2026-11-20 18:00"),
        ("0 18 * * 1-5", "2026-11-24 09:00", "2026-11-23 18:00"),
        # Over the change of the clocks.
        ("@daily", "2026-11-02 12:00", "2026-11-01 00:00"),
        ("0 9 1 * *", "2026-11-23 18:00", "2026-11-16 00:00"),
        ("", "2026-11-23 18:00", "2026-11-22 18:00"),
    ],
)
def test_the_first_summary_tells_since_one_was_due_on_an_earlier_day(
    monkeypatch: pytest.MonkeyPatch, schedule: str, now: str, since: str
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_SUMMARY_SCHEDULE", schedule)
    get_settings.cache_clear()

    def at(instant: str) -> datetime:
        return datetime.fromisoformat(instant).replace(tzinfo=ZoneInfo(TIMEZONE))

    assert tells_since(get_settings(), at(now), None) == at(since)


def test_a_summary_tells_since_the_last_one_that_was_made_on_an_earlier_day() -> None:
    zone = ZoneInfo(TIMEZONE)
    friday, thursday = datetime(2026, 11, 20, 18, 40, tzinfo=zone), datetime(2026, 11, 19, 18, tzinfo=zone)
    before = {"since": thursday.isoformat(), "until": friday.isoformat()}
    # Made late on Friday, and on no day since.
    assert tells_since(get_settings(), datetime(2026, 12, 2, 18, tzinfo=zone), before) == friday
    assert tells_since(get_settings(), friday + timedelta(hours=1), before) == thursday


def test_the_dag_goes_by_the_summary_before_and_not_by_when_one_was_due(
    world: World, run_dag: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_SUMMARY_FOLDER", f"file://{tmp_path}")

    def since(schedule: str) -> str:
        monkeypatch.setenv("PAYROC_REFUNDS_SUMMARY_SCHEDULE", schedule)
        return str(run_dag("payroc_refunds_summary", last_task="summary").result["since"])

    # Both are made on one day.
    assert since("0 18 * * *") == since("0 6 * * *")


def test_a_folder_that_cannot_be_written_loses_no_mail(
    world: World, run_dag: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("PAYROC_REFUNDS_SUMMARY_FOLDER", f"file://{tmp_path}/a file")
    notifier = {
        "notifier": "airflow.providers.smtp.notifications.smtp.SmtpNotifier",
        "to": "finance@example.com",
    }
    monkeypatch.setenv("PAYROC_REFUNDS_NOTIFIERS", json.dumps([notifier]))
    with Mailbox() as mailbox:
        monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", mailbox.connection)
        run = run_dag("payroc_refunds_summary", last_task="summary")
    assert run.state == "failed"
    # It was tried again, and told once.
    subjects = [mail["subject"] for mail in mailbox.mails]
    assert len(subjects) == 2
    assert subjects[0].endswith("no refunds accepted")
    assert subjects[1] == "Payroc refunds: summary failed"
    assert "see that PAYROC_REFUNDS_SUMMARY_FOLDER is right" in body_of(mailbox.mails[1])


def test_the_dag_writes_one_file_a_day_where_the_setting_says(
    world: World, run_dag: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_SUMMARY_FOLDER", f"file://{tmp_path}/deep/summaries")
    world.approve()
    run_dag()
    for _ in range(2):
        run = run_dag("payroc_refunds_summary", last_task="summary")
        assert (run.state, run.result["mistakes"]) == ("success", [])
    today = datetime.now(ZoneInfo(TIMEZONE)).date()
    (file,) = (tmp_path / "deep" / "summaries").iterdir()
    assert file.name == f"{today:%Y-%m-%d}.html"
    # Airflow's word for the run, which the ledger does not know.
    assert re.search(r">success</td>", file.read_text())


def test_without_a_setting_summaries_are_kept_in_airflows_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    assert str(write(get_settings(), "2026-11-23.html", "<p>")).endswith(
        f"{tmp_path}/summaries/2026-11-23.html"
    )
    assert (tmp_path / "summaries" / "2026-11-23.html").read_text() == "<p>"
