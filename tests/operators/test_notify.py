"""Who is told by which notifier, and that no mistake in it disturbs a run."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.configuration import conf
from airflow.sdk import BaseNotifier
from airflow.sdk.log import redact

from include.refunds.report import Report, Total
from include.refunds.settings import get_settings
from payroc_airflow.links import question_url, run_url
from payroc_airflow.notify import ALL_SECONDS, EACH_SECONDS, REPORT, DeadlineMissed, RunEnded, mistakes
from tests.dags.conftest import Runner
from tests.dags.conftest import run_dag as run_dag
from tests.receivers import Mailbox, Refusing, body_of
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world

SMTP = "airflow.providers.smtp.notifications.smtp.SmtpNotifier"
HERE = __name__
# So long does a notifier hang that nobody leaves behind.
HANGS_SECONDS = 60


class Chat(BaseNotifier):
    """A notifier with an argument of another name, which remembers what it was given."""

    template_fields = ("text", "channel")
    said: list[tuple[str, str]] = []  # noqa: RUF012 - all instances say it here

    def __init__(self, *, channel: str, text: str = "a text of its own", **more: Any) -> None:
        super().__init__(**more)
        self.channel = channel
        self.text = text

    def notify(self, context: Any) -> None:
        self.said.append((self.channel, self.text))


class Broken(BaseNotifier):
    """A notifier whose service is down; its error quotes what is secret."""

    def notify(self, context: Any) -> None:
        raise OSError("https://chat.example/hook/s3cret-t0ken refused")


class Mistaken(BaseNotifier):
    """A notifier whose constructor quotes what it was given."""

    def __init__(self, *, to: str) -> None:
        raise ValueError(f"{to} is not usable")


class Files(Chat):
    """A notifier that takes texts from files."""

    template_ext = (".txt",)


class Hanging(BaseNotifier):
    """A notifier whose service takes the connection and never answers."""

    def notify(self, context: Any) -> None:
        threading.Event().wait(HANGS_SECONDS)


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mailbox]:
    with Mailbox() as mailbox:
        monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", mailbox.connection)
        yield mailbox


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    Chat.said.clear()


def configure(monkeypatch: pytest.MonkeyPatch, *entries: dict[str, Any]) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_NOTIFIERS", json.dumps(entries))
    get_settings.cache_clear()


def ended(
    report: Report | None, *, failed: bool, error: BaseException | None = None, dry_run: bool = False
) -> None:
    """Call the notifier as Airflow does at the end of the task report."""
    ti = SimpleNamespace(dag_id="payroc_refunds", run_id="run-1")
    context: Any = {"ti": ti, "run_id": "run-1", "params": {"dry_run": dry_run}, "exception": error}
    if report is not None:
        context[REPORT] = report
    RunEnded(failed=failed)(context)


def red(**more: Any) -> Report:
    totals = [Total("held", "USD", 1, 700000), Total("review", "USD", 2, 9998)]
    return Report(
        "Refund run run-1", totals=totals, unfinished=["2 in review: <people> have to look."], **more
    )


def test_every_notifier_of_the_setting_is_told_once(
    monkeypatch: pytest.MonkeyPatch, mailbox: Mailbox
) -> None:
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example/merchant")
    configure(
        monkeypatch,
        {"notifier": SMTP, "to": ["finance@example.com", "ops@example.com"]},
        {
            "notifier": f"{HERE}.Chat",
            "channel": "#refunds",
            "text": "{{ refunds.subject }} {{ refunds.url }}",
        },
        {"notifier": f"{HERE}.Chat", "channel": "#all"},
    )
    ended(red(), failed=True)
    subject = "Payroc refunds: run failed, 2 in review, 1 held"
    (mail,) = mailbox.mails
    assert (mail["subject"], mail["to"]) == (subject, "finance@example.com, ops@example.com")
    assert "2 in review: &lt;people&gt; have to look." in body_of(mail)
    (short, whole) = Chat.said
    assert short == ("#refunds", f"{subject} https://airflow.example/merchant/dags/payroc_refunds/runs/run-1")
    assert whole[0] == "#all"
    assert "held            1        7,000.00 USD" in whole[1]


def test_a_mail_and_a_chat_show_foreign_text_in_its_line_and_without_markup(
    monkeypatch: pytest.MonkeyPatch, mailbox: Mailbox
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", "postgres://refunds@127.0.0.1:9/refunds")
    configure(
        monkeypatch, {"notifier": SMTP, "to": "a@example.com"}, {"notifier": f"{HERE}.Chat", "channel": "a"}
    )
    run_id = "run\r\nBcc: eve@example.com\r\n\r\nTotals:\u202e <!channel> @here <b>x</b> `x` [x](https://x.example)"
    context: Any = {"ti": SimpleNamespace(dag_id="payroc_refunds"), "run_id": run_id, "params": {}}
    RunEnded(failed=True)(context)
    shown = "run⟨U+000D⟩⟨U+000A⟩Bcc: eve@example.com⟨U+000D⟩⟨U+000A⟩⟨U+000D⟩⟨U+000A⟩Totals:⟨U+202E⟩ ‹!channel› ＠here ‹b›x‹/b› "
    shown += "‵x‵ ⟦x⟧(https∶//x.example)"
    (mail,) = mailbox.mails
    assert (mail["bcc"], mail["subject"]) == (None, "Payroc refunds: run failed")
    assert f"Refund run {shown}<" in body_of(mail)
    ((_, text),) = Chat.said
    assert text.split("\n")[0] == f"Refund run {shown}"


@pytest.mark.parametrize(
    ("report", "subject"),
    [
        (Report("x", totals=[Total("accepted", "USD", 3, 1)], notes=["One note."]), None),
        (Report("x", totals=[Total("held", "USD", 3, 1), Total("held", "EUR", 1, 1)]), "4 held"),
        (Report("x", rejected=True), "run rejected"),
        (Report("x", waiting=True), "refunds wait for room"),
    ],
)
def test_of_a_green_run_people_are_told_only_when_something_waits_for_them(
    monkeypatch: pytest.MonkeyPatch, report: Report, subject: str | None
) -> None:
    configure(monkeypatch, {"notifier": f"{HERE}.Chat", "channel": "a", "text": "{{ refunds.subject }}"})
    ended(report, failed=False)
    assert Chat.said == ([("a", f"Payroc refunds: {subject}")] if subject else [])
    Chat.said.clear()
    ended(report, failed=False, dry_run=True)
    assert Chat.said == []


def test_of_many_notes_a_message_has_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, {"notifier": f"{HERE}.Chat", "channel": "a"})
    ended(red(notes=[f"Source row {number} changed." for number in range(60)]), failed=True)
    ((_, text),) = Chat.said
    assert text.count("Source row") == 10
    assert "Note: 50 more notes stand in the log of the task report." in text


MISTAKES = {
    "no JSON": (
        "finance@example.com",
        "PAYROC_REFUNDS_NOTIFIERS is not usable, so nobody is told: it has to be a JSON list such as",
    ),
    "no list": ('{"notifier": "a.B"}', "it has to be a JSON list such as"),
    "no path": ('[{"to": "x"}]', "it has to be a JSON list such as"),
    "no such module": (
        '[{"notifier": "no.such.Thing", "to": "x"}]',
        "entry 1: no.such.Thing can't be imported (ModuleNotFoundError)",
    ),
    "no such class": (
        '[{"notifier": "json.Thing"}]',
        "entry 1: json.Thing can't be imported (AttributeError): correct the path",
    ),
    "no dots": ('[{"notifier": "Smtp"}]', "entry 1: Smtp can't be imported (ValueError)"),
    "no notifier": ('[{"notifier": "json.JSONDecoder"}]', "entry 1: json.JSONDecoder is no notifier"),
    "a missing argument": (
        f'[{{"notifier": "{SMTP}"}}]',
        "entry 1: SmtpNotifier does not take these arguments",
    ),
    "an unknown argument": (
        f'[{{"notifier": "{SMTP}", "to": "x@example.com", "tto": "s3cret"}}]',
        "unexpected keyword argument 'tto'",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_setting_is_one_sentence_that_quotes_no_value(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    value, sentence = MISTAKES[case]
    monkeypatch.setenv("PAYROC_REFUNDS_NOTIFIERS", value)
    get_settings.cache_clear()
    (told,) = mistakes()
    assert sentence in told
    assert "s3cret" not in told
    ended(red(), failed=True)
    assert sentence in caplog.text
    assert "Traceback" not in caplog.text


def test_a_notifier_that_fails_is_one_sentence_without_its_text_and_the_others_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    configure(
        monkeypatch,
        {"notifier": f"{HERE}.Broken"},
        {"notifier": "no.such.Thing"},
        {"notifier": f"{HERE}.Chat", "channel": "a"},
    )
    ended(red(), failed=True)
    assert "Broken failed (OSError), so a message was not sent: Payroc refunds: run failed" in caplog.text
    assert "s3cret" not in caplog.text
    assert len(Chat.said) == 1


def test_at_level_debug_the_log_has_the_way_to_an_error_and_not_its_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="payroc_airflow.notify")
    configure(monkeypatch, {"notifier": f"{HERE}.Broken"})
    ended(red(), failed=True)
    assert re.search(r"test_notify\.py, line \d+, in notify", caplog.text)
    assert "s3cret" not in caplog.text


# What a template of the setting may look like that can't be rendered, and holds a secret.
TEMPLATES = {
    "a name that does not exist": "{{ refunds.nosuch }} https://chat.example/s3cret-t0ken",
    "an expression that is not closed": "https://chat.example/s3cret-t0ken {{ refunds.subject",
    "an error in an expression": "https://chat.example/s3cret-t0ken {{ 1 / 0 }}",
    "a filter that does not exist": "{{ 's3cret-t0ken' | nosuch }}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_of_a_template_that_cannot_be_rendered_only_the_field_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    caplog.set_level("DEBUG")
    configure(
        monkeypatch,
        {"notifier": f"{HERE}.Chat", "channel": TEMPLATES[case]},
        {"notifier": SMTP, "to": TEMPLATES[case]},
        {"notifier": f"{HERE}.Chat", "channel": ["a", {"b": TEMPLATES[case]}]},
        {"notifier": f"{HERE}.Chat", "channel": "told"},
    )
    ended(red(), failed=True)
    assert caplog.text.count("the argument `channel` of Chat can't be rendered (") == 2
    assert "the argument `to` of SmtpNotifier can't be rendered (" in caplog.text
    assert "s3cret" not in caplog.text
    assert [channel for channel, _ in Chat.said] == ["told"]


def test_a_file_of_a_template_that_is_missing_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    configure(monkeypatch, {"notifier": f"{HERE}.Files", "channel": ["s3cret-t0ken.txt"]})
    ended(red(), failed=True)
    assert "s3cret" not in caplog.text


def test_a_constructor_that_quotes_a_secret_is_logged_by_the_name_of_its_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    configure(monkeypatch, {"notifier": f"{HERE}.Mistaken", "to": "https://chat.example/s3cret-t0ken"})
    ended(red(), failed=True)
    assert "Mistaken does not take these arguments (ValueError)" in caplog.text
    assert "s3cret" not in caplog.text


def test_airflow_masks_the_secret_part_of_an_address_that_a_service_quotes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with Refusing() as service:
        monkeypatch.setenv("AIRFLOW_CONN_HTTP_DEFAULT", service.url)
        http = "airflow.providers.http.notifications.http.HttpNotifier"
        configure(monkeypatch, {"notifier": http, "endpoint": "hooks/s3cret-t0ken?to={{ refunds.subject }}"})
        ended(red(), failed=True)
    assert "POST /hooks/s3cret-t0ken" in caplog.text
    assert "s3cret" not in redact(caplog.text)


def test_a_notifier_that_hangs_is_left_behind_and_the_others_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("payroc_airflow.notify.EACH_SECONDS", 1.0)
    monkeypatch.setattr("payroc_airflow.notify.ALL_SECONDS", 1.5)
    configure(
        monkeypatch, *[{"notifier": f"{HERE}.Hanging"}] * 3, {"notifier": f"{HERE}.Chat", "channel": "a"}
    )
    begin = time.monotonic()
    ended(red(), failed=True)
    assert 1 < time.monotonic() - begin < HANGS_SECONDS
    assert caplog.text.count("Hanging has not ended after") == 3
    assert [channel for channel, _ in Chat.said] == ["a"]


def test_the_time_for_notifiers_is_shorter_than_the_one_that_airflow_gives_a_task_after_its_end() -> None:
    assert EACH_SECONDS <= ALL_SECONDS < conf.getint("core", "task_success_overtime")


def test_what_stays_open_is_told_by_the_first_follow_up_of_a_day_and_what_is_new_by_each(
    world: World, run_dag: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, {"notifier": f"{HERE}.Chat", "channel": "a"})

    def told() -> int:
        Chat.said.clear()
        assert run_dag("payroc_refunds_followup").state == "failed"
        return len(Chat.said)

    # At any moment these two zones have another day.
    monkeypatch.setenv("PAYROC_REFUNDS_TIMEZONE", "Pacific/Pago_Pago")
    world.run(world.ledger.pauses.pause("*", "the bank called"))
    assert [told(), told()] == [1, 0]
    world.run(world.ledger.pauses.pause("7701009", "a terminal of trouble"))
    assert told() == 1
    monkeypatch.setenv("PAYROC_REFUNDS_TIMEZONE", "Pacific/Kiritimati")
    assert told() == 1


def test_another_refund_in_review_is_news_though_as_many_are(
    world: World, run_dag: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, {"notifier": f"{HERE}.Chat", "channel": "a"})
    first, second = world.released("9013"), world.released("9013")
    for refund_id, solved in ((first, None), (second, first)):
        world.send(refund_id)
        if solved is not None:
            with world.ledger_engine.begin() as connection:
                connection.exec_driver_sql(
                    f"UPDATE refund_ledger.refund_states SET status = 'rejected' WHERE refund_id = {solved}"
                )
        assert run_dag("payroc_refunds_followup").state == "failed"
    (before, after) = [text for _, text in Chat.said]
    assert "1 in review" in before
    assert "1 in review" in after


def test_a_run_with_broken_notifiers_ends_as_it_would_and_its_report_names_the_mistake(
    world: World, run_dag: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_NOTIFIERS", '[{"notifier": "no.such.Thing"}]')
    ref = world.approve()
    run = run_dag()
    assert (run.state, world.row(ref)["status"]) == ("success", "accepted")
    (note,) = run.result["notes"]
    assert note.startswith("PAYROC_REFUNDS_NOTIFIERS, entry 1: no.such.Thing can't be imported")
    configure(monkeypatch, {"notifier": f"{HERE}.Broken"})
    world.approve("9013")
    run = run_dag()
    assert (run.state, run.tasks["report"]) == ("failed", "failed")
    assert "Broken failed (OSError)" in run.log
    assert "s3cret" not in run.log


def test_when_the_ledger_cannot_be_read_the_message_says_so(
    monkeypatch: pytest.MonkeyPatch, run_dag: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    configure(monkeypatch, {"notifier": f"{HERE}.Chat", "channel": "a"})
    monkeypatch.setenv(
        "AIRFLOW_CONN_REFUNDS_LEDGER", "postgres://refunds:s3cret-password@127.0.0.1:9/refunds"
    )
    run = run_dag()
    assert run.state == "failed"
    ((_, text),) = Chat.said
    assert "The task report failed: The ledger database at 127.0.0.1:9 can't be used" in text
    assert "So this message has no counts." in text
    assert "s3cret" not in text


def test_an_error_that_is_not_ours_is_told_by_its_name_alone(
    world: World, run_dag: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, {"notifier": f"{HERE}.Chat", "channel": "a"})
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", "postgres://refunds@127.0.0.1:9/refunds")
    ended(None, failed=True, error=RuntimeError("password=s3cret"))
    ((_, text),) = Chat.said
    assert "The task report failed: RuntimeError" in text
    assert "s3cret" not in text


@pytest.mark.parametrize(("state", "told"), [("running", 1), ("queued", 1), ("failed", 0), ("success", 0)])
def test_a_missed_deadline_is_told_of_a_run_that_has_not_ended(
    monkeypatch: pytest.MonkeyPatch, state: str, told: int
) -> None:
    configure(monkeypatch, {"notifier": f"{HERE}.Chat", "channel": "a", "text": "{{ refunds.text }}"})
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", "postgres://refunds@127.0.0.1:9/refunds")
    run = {
        "state": state,
        "dag_id": "payroc_refunds",
        "dag_run_id": "run-1",
        "logical_date": None,
        "run_after": "2026-11-20T12:00:00Z",
    }
    DeadlineMissed()({"dag_run": run})
    assert len(Chat.said) == told
    assert all(
        "It was due to begin" in text and "The ledger could not be read." in text for _, text in Chat.said
    )


def test_links_need_to_know_where_airflow_is_and_keep_a_run_id_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("AIRFLOW__API__BASE_URL", raising=False)
    assert run_url("payroc_refunds", "run-1") == ""
    assert question_url("payroc_refunds", "run-1", "approve_run") == ""
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example/")
    assert (
        question_url("payroc_refunds", "manual__2026-11-23T12:00:00+00:00/1", "approve_run")
        == "https://airflow.example/dags/payroc_refunds/runs/manual__2026-11-23T12%3A00%3A00%2B00%3A00%2F1/tasks/approve_run/required_actions"
    )
