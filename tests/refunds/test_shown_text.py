"""Foreign text in every column of a ledger forges, styles and alarms nothing in any output."""

from __future__ import annotations

import ast
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from rich.console import Console
from sqlalchemy import URL
from typer.testing import CliRunner

from demo.postgres import PostgresServer
from demo.result import compare_with_payroc, read_rows, table_of, totals_of
from include.refunds.approval import Question
from include.refunds.cli import _compared, app
from include.refunds.message import Message, approval_needed, deadline_missed, run_ended
from include.refunds.printable import visible
from include.refunds.report import Report, follow_up_report, run_report, status_report
from include.refunds.summary import as_message, read_summary
from include.refunds.verify import Comparison, Difference
from tests.conftest import ROOT, NewDatabase
from tests.refunds.conftest import World
from tests.refunds.test_cli import cli

# An overwritten amount, forged lines of a report, a turned direction of writing, and the markup of each output.
CANARY = (
    "\x1b[2K\rPaid 12.00\r\nTotals:\nAudit trail: 1 events\x85Note: x\u2028Unfinished: x\v\f\u202e"
    "[/bold][red]<!channel><@U123><b>x</b>"
    "@everyone @here `x` **x** ~~x~~ ||x|| {{ 1 }} &#8238; :fire: ::group::x https://x.example "
    "[x](https://x.example)    5.00 USD  \ufeff"
)
MARKUP = (
    "[/",
    "[red]",
    "<!channel",
    "<@",
    "<b>",
    "@everyone",
    "@here",
    "`x`",
    "**",
    "~~",
    "||",
    "{{",
    "&#8238",
    "https://x",
    "::group::",
    ":fire:",
)
# Columns with words and hashes of our own, of which the programs make decisions.
OURS = {
    "status",
    "from_status",
    "to_status",
    "event",
    "outcome",
    "currency",
    "source",
    "scope",
    "hash",
    "request_sha256",
    "request_key",
    "payee_fingerprint",
    "fingerprint_check",
    "environment",
    "version_num",
}
BASIS = ("approval_basis", "candidate_totals", "released_totals")
RUN = f"run {CANARY}"


@pytest.fixture
def ledger_url(new_ledger: NewDatabase) -> URL:
    """A ledger of its own, from which a test may take the checks: older rows did not know them."""
    return new_ledger()


@pytest.fixture
def spoilt(world: World, postgres: PostgresServer) -> World:
    """A world whose ledger has refunds of several statuses, and the canary in every text."""
    world.limit(largest_refund=100_000)
    for ending, columns in (("4321", {}), ("9013", {}), ("9002", {}), ("4321", {"amount": 100_001})):
        refund_id = world.released(ending, **columns)
        if not columns:
            world.send(refund_id)
    world.approve(routing_number="123456789")
    world.pull()
    world.release(RUN)
    world.run(world.ledger.pauses.pause("*", "x"))
    world.run(world.ledger.pauses.pause("7701009", "x"))
    with postgres.connect(str(world.ledger.engine.url.database)) as connection:
        _fill(connection)
    return world


def _fill(connection: psycopg.Connection) -> None:
    connection.execute("SET session_replication_role = replica")
    connection.execute("DELETE FROM refund_ledger.refund_runs WHERE run_id <> %s", [RUN])
    checks = """
        SELECT conrelid::regclass::text, conname FROM pg_constraint
        WHERE contype = 'c' AND connamespace = 'refund_ledger'::regnamespace"""
    for table, check in connection.execute(checks).fetchall():
        connection.execute(f'ALTER TABLE {table} DROP CONSTRAINT "{check}"')
    columns = """
        SELECT c.table_name, c.column_name, c.data_type FROM information_schema.columns AS c
        JOIN information_schema.tables AS t USING (table_schema, table_name)
        WHERE c.table_schema = 'refund_ledger' AND t.table_type = 'BASE TABLE' AND c.is_generated = 'NEVER'"""
    values = {
        "text": "%(canary)s::text || ctid",
        "ARRAY": "ARRAY[%(canary)s::text]",
        "jsonb": "jsonb_build_object(%(canary)s::text, %(canary)s::text)",
    }
    for table, column, kind in connection.execute(columns).fetchall():
        of_ours = column in OURS or column in BASIS or column.endswith(("_hash", "_ids"))
        if kind in values and not of_ours:
            connection.execute(
                f"UPDATE refund_ledger.{table} SET {column} = {values[kind]}", {"canary": CANARY}
            )
    connection.execute("UPDATE refund_ledger.pauses SET scope = %s WHERE scope <> '*'", [CANARY])
    findings = {
        "changed": {CANARY: [CANARY]},
        "withdrawn": {CANARY: CANARY},
        "waiting": {CANARY: {"USD": {"count": 1, "amount": 1, "largest": 1}}},
        "warnings": {CANARY: [CANARY]},
        "untouched": [CANARY],
    }
    connection.execute(
        "UPDATE refund_ledger.refund_runs SET findings = %s, run_id = %s", [json.dumps(findings), RUN]
    )


def is_clean(text: str, *, report: bool = False) -> None:
    """Nothing of the canary does anything to a line, and no line is forged."""
    lines = text.split("\n")
    assert [line for line in lines if visible(line) != line] == []
    assert [markup for markup in MARKUP if markup in text] == []
    assert "  5.00 USD" not in text
    forged = (
        ("Totals:", "Audit trail:") if report else ("Totals:", "Audit trail:", "Note: x", "Unfinished: x")
    )
    for start in forged:
        assert sum(line.startswith(start) for line in lines) <= report
    assert "Paid 12.00" in text


def printed(*arguments: str, exit_code: int = 0) -> str:
    # So wide that no table folds a cell: a fold puts blanks before what follows it.
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "5000"})
    assert done.exit_code == exit_code, (done.output, done.exception)
    return done.output


@pytest.fixture
def ledger(spoilt: World, monkeypatch: pytest.MonkeyPatch) -> None:
    url = spoilt.ledger.engine.url
    monkeypatch.setenv("PAYROC_REFUNDS_LEDGER_URL", url.render_as_string(hide_password=False))
    # Wide enough that no cell is folded.
    monkeypatch.setenv("COLUMNS", "5000")


def test_the_commands_show_foreign_text_in_its_line_and_without_markup(spoilt: World, ledger: None) -> None:
    is_clean(printed("status", exit_code=1), report=True)
    ids = [row["id"] for row in spoilt.rows("SELECT id FROM refund_ledger.refunds ORDER BY id")]
    for refund_id in ids:
        is_clean(printed("show", str(refund_id)))


def test_a_comparison_with_payroc_shows_a_difference_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    now = datetime.now(UTC)
    _compared(Comparison(now, now, differences=[Difference(f"Refund 1 (order {CANARY}) differs.")]))
    lines = capsys.readouterr().out.split("\n")
    assert [line for line in lines if visible(line) != line] == []
    assert [line for line in lines if line.startswith(("Totals:", "Audit trail:"))] == []


def test_what_is_printed_as_json_is_faithful_and_of_ascii(spoilt: World, ledger: None) -> None:
    shown = printed("show", "1", "--json")
    assert shown.isascii()
    assert len(shown.splitlines()) == 1
    assert json.loads(shown)["description"].startswith(CANARY)
    assert printed("status", "--json", exit_code=1).isascii()


def test_a_sentence_on_stderr_is_one_line_without_what_was_typed(spoilt: World) -> None:
    url = spoilt.ledger.engine.url
    for arguments in (
        ("show", CANARY),
        ("verify-audit", "--head", CANARY),
        ("resume", "--terminal", f"77{CANARY}", "--by", CANARY, "--reason", CANARY),
    ):
        failed = cli(*arguments, ledger=url)
        assert failed.returncode == 2
        assert len(failed.stderr.splitlines()) == 1
        assert visible(failed.stderr.rstrip("\n")) == failed.stderr.rstrip("\n")


def test_reports_show_foreign_text_in_its_line_and_without_markup(spoilt: World) -> None:
    engine, source = spoilt.ledger.engine, spoilt.settings.source
    for report in (
        spoilt.run(run_report(engine, source, RUN)),
        spoilt.run(status_report(engine, source)),
        spoilt.run(follow_up_report(engine, source)),
    ):
        is_clean(str(report), report=True)
        # As the exception that ends the task, which Airflow logs.
        is_clean(" ".join(report.unfinished))


def messages_of(world: World) -> list[Message]:
    engine, source = world.ledger.engine, world.settings.source
    report: Report = world.run(run_report(engine, source, RUN))
    now = datetime.now(UTC)
    since = now - timedelta(days=1)
    summary = world.run(read_summary(engine, source, since=since, until=now, timezone="America/New_York"))
    question = Question("Why.", "0" * 64, {"totals": {}, "new_payees": 0, "again": 1}, {})
    found = run_ended(report, what="run", failed=True, url="")
    assert found is not None
    return [
        found,
        approval_needed(question, RUN, ""),
        deadline_missed(report, RUN, due=since, now=now, url=""),
        as_message(summary, url=""),
    ]


def test_messages_show_foreign_text_in_its_line_and_without_markup(spoilt: World) -> None:
    for message in messages_of(spoilt):
        is_clean(message.text)
        assert visible(message.subject) == message.subject
        assert [markup for markup in MARKUP if markup in message.html] == []
        assert "Paid 12.00" in message.html
        assert all(visible(line) == line for line in message.html.split("\n"))


def test_the_approval_question_shows_a_run_id_without_markup() -> None:
    question = Question("Why.", "0" * 64, {"totals": {}, "new_payees": 0, "again": 1}, {})
    body = question.body(RUN)
    assert "Paid 12.00" in body
    assert [markup for markup in MARKUP if markup in body.replace("**0**", "")] == []
    assert all(visible(line) == line for line in body.split("\n"))


def test_the_demos_result_shows_foreign_text_without_markup(spoilt: World, postgres: PostgresServer) -> None:
    with postgres.connect(str(spoilt.ledger.engine.url.database)) as connection:
        rows = read_rows(connection)
    console = Console(width=5000)
    with console.capture() as capture:
        console.print(table_of(rows))
        console.print(totals_of(rows))
    is_clean(capture.get())
    is_clean("\n".join(compare_with_payroc(rows, [])))


def test_the_command_line_prints_by_its_helpers_alone() -> None:
    helpers = {"_say", "_json", "_print", "_add", "_fail"}
    module = ast.parse(Path(ROOT, "include", "refunds", "cli.py").read_text())
    others = [node for node in module.body if getattr(node, "name", None) not in helpers]
    calls = [
        ast.unparse(node.func) for other in others for node in ast.walk(other) if isinstance(node, ast.Call)
    ]
    ways = ("print", "echo", "secho", "add_row", "write", "rule", "log")
    assert [call for call in calls if call.rpartition(".")[2] in ways] == []
