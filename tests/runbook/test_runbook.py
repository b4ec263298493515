"""
Each command of docs/running.md and docs/operations.md prints what stands there.

A test has the name of a section. It makes the section's situation real and then executes its console blocks as they stand, in a shell
that has what the documents tell to set. What happens between two blocks, the test lets happen between two steps.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from demo.postgres import PostgresServer
from payroc_airflow.gateway import HookGateway
from payroc_airflow.hooks.payroc import PayrocHook
from tests.conftest import ROOT, Login
from tests.runbook.conftest import DOCUMENTS, Shop, find_section, name_of_test, use_ledger
from tests.runbook.console import ANYTHING, Section, Shell, blocks_of, difference
from tests.scheduler.deployment import DAG

# A command of Airflow's imports for seconds, and the machine may be busy.

# -- running.md ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged_in(shell: Shell) -> None:
    """Execute the first section, whose variables the others use."""
    find_section("test_log_in", shell).rest()


def test_log_in(section: Section) -> None:
    section.rest()


def test_see_what_would_be_sent(shop: Shop, logged_in: None, section: Section) -> None:
    shop.approve_sample()
    section.rest()
    assert shop.rows("SELECT FROM refund_ledger.refunds") == []


def test_a_bad_value_is_refused(logged_in: None, section: Section) -> None:
    section.rest()


def test_pay_with_another_person_s_approval(shop: Shop, logged_in: None, section: Section) -> None:
    shop.approve_sample()
    shop.limit(approval_total=100_000)
    section.step()
    shop.airflow.client.question(DAG, "pay")
    # Airflow loses an answer that comes sooner; people are not that quick.
    asking = shop.airflow.client.task_instances(DAG, "pay")["approve_run", -1]
    shop.wait_until(lambda: shop.airflow.knows_the_end_of(asking), "the asking process has ended", pause=0.3)
    section.rest()
    shop.assert_paid_once("RF-2201", "RF-2202", "RF-2203", "RF-2204")


def test_from_the_command_line(shop: Shop, section: Section) -> None:
    shop.approve_sample()
    section.step()
    shop.wait_for_runs()
    section.rest()
    shop.assert_paid_once("RF-2208", "RF-2216")


# -- operations.md: what a report shows ------------------------------------------------------------------------------------


def test_first_look(shop: Shop, section: Section) -> None:
    shop.approve_sample("RF-2201", "RF-2202", "RF-2205")
    shop.pay()
    section.rest()


def test_a_refund_is_unknown(shop: Shop, section: Section) -> None:
    shop.approve_sample("RF-2201", "RF-2207")
    shop.pay()
    section.step()
    section.step()
    shop.wait_for_runs()
    section.rest()
    shop.assert_paid_once("RF-2201", "RF-2207")


def test_a_refund_is_in_review(shop: Shop, section: Section) -> None:
    shop.approve_sample("RF-2219", "RF-2221")
    kept, lost = "RF-2219", "RF-2221"
    # Eight days ago neither got an answer. Payroc had created one, and looks at that one itself.
    shop.hours_ahead = -8 * 24
    shop.trouble(kept, "close", when="after")
    shop.pay()
    (theirs,) = shop.refunds_at_payroc(kept)
    shop.sandbox.patch(f"/_sandbox/refunds/{theirs['refundId']}", {"status": "admin"})
    shop.hours_ahead = 0
    for ref in (kept, lost):
        shop.send(shop.row(ref)["id"])
    shop.write_back()
    section.step()
    section.step()
    shop.sandbox.patch(f"/_sandbox/refunds/{theirs['refundId']}", {"status": "ready"})
    section.rest()
    assert [shop.row(ref)["status"] for ref in (kept, lost)] == ["accepted", "rejected"]
    assert len(shop.creates(lost)) == 1


def test_a_refund_is_held(shop: Shop, section: Section) -> None:
    shop.approve_sample("RF-2201", "RF-2209", "RF-2227", "RF-2228")
    shop.limit(largest_refund=500_000, duplicate_days=7)
    shop.pay()
    section.rest()
    assert [shop.row(ref)["status"] for ref in ("RF-2209", "RF-2228")] == ["approved", "cancelled"]
    shop.pay()
    shop.assert_paid_once("RF-2201", "RF-2209", "RF-2227")


def test_the_report_says_that_sending_is_paused(shop: Shop, section: Section) -> None:
    shop.sandbox_terminal("2201003", "not-enabled")
    shop.approve_sample("RF-2201", "RF-2222")
    shop.pay()
    assert list(shop.paused()) == ["2201003"]
    section.step()
    shop.sandbox_terminal("2201003", "enabled")
    section.rest()
    assert shop.paused() == {}
    shop.pay()
    shop.assert_paid_once("RF-2201", "RF-2222")


def test_a_row_is_not_written_back(shop: Shop, section: Section) -> None:
    shop.approve_sample("RF-2201", "RF-2202")
    with shop.source_engine.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE refund_requests ADD CONSTRAINT only_open "
            "CHECK (source_ref <> 'RF-2202' OR status IS NULL)"
        )
    shop.pay()
    section.step()
    with shop.source_engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE refund_requests DROP CONSTRAINT only_open")
    section.step()
    shop.wait_for_runs()
    section.rest()
    assert shop.source_row("RF-2202")["status"] == "accepted"


def test_payroc_is_down(shop: Shop, section: Section) -> None:
    shop.approve_sample("RF-2201", "RF-2202")
    shop.pull()
    ids = shop.release()
    shop.sandbox.post(
        "/_sandbox/faults", {"operation": "create", "kind": "status", "status": 503, "times": 99}
    )
    shop.send(ids[0])
    shop.write_back()
    shop.sandbox.post(
        "/_sandbox/faults", {"operation": "authorize", "kind": "status", "status": 503, "times": 99}
    )
    section.rest()
    shop.sandbox.delete("/_sandbox/faults")
    time.sleep(shop.settings.unknown_wait_seconds)
    for refund_id in ids:
        shop.send(refund_id)
    shop.assert_sent_once("RF-2201", "RF-2202")


def test_payroc_refuses_the_api_key(shop: Shop, shell: Shell, section: Section) -> None:
    shell.run(f"export AIRFLOW_CONN_PAYROC_DEFAULT='{shop.connection(password='wrong-key')}'")
    section.step()
    shell.run(f"export AIRFLOW_CONN_PAYROC_DEFAULT='{shop.connection()}'")
    section.rest()


# -- operations.md: what people do -----------------------------------------------------------------------------------------


def test_payroc_s_api_key_was_rotated(
    shop: Shop, shell: Shell, section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.approve_sample("RF-2201", "RF-2207", "RF-2221")
    shop.pull()
    ids = shop.release()
    for refund_id in ids[1:]:
        shop.send(refund_id)
    shop.write_back()
    section.step()
    monkeypatch.setenv("AIRFLOW_CONN_PAYROC_DEFAULT", shop.connection(password="another-key"))
    shell.run(f"export AIRFLOW_CONN_PAYROC_DEFAULT='{shop.connection(password='another-key')}'")
    section.step()
    shop.gateway = HookGateway(PayrocHook())
    time.sleep(shop.settings.unknown_wait_seconds)
    # The release reads Payroc's list with the new key.
    shop.release("run-2")
    for refund_id in ids:
        shop.send(refund_id)
    section.rest()
    assert [len(shop.creates(ref)) for ref in ("RF-2201", "RF-2207", "RF-2221")] == [1, 1, 1]


def test_the_encryption_keys_are_rotated(shop: Shop, shell: Shell, section: Section) -> None:
    shop.approve_sample()
    shop.pull()
    shell.run(
        f'export PAYROC_REFUNDS_ENCRYPTION_KEYS="{Fernet.generate_key().decode()},$PAYROC_REFUNDS_ENCRYPTION_KEYS"'
    )
    section.rest()


def test_the_ledger_is_backed_up(shop: Shop, section: Section, tmp_path: Path) -> None:
    shop.approve_sample("RF-2201")
    shop.pay()
    section.rest()
    assert len(list(tmp_path.glob("refunds-*.dump"))) == 1


def test_the_ledger_was_restored_from_a_backup(shop: Shop, shell: Shell, section: Section) -> None:
    shop.approve_sample("RF-2201", "RF-2202", "RF-2203")
    shop.pull()
    shop.pay("RF-2201")
    find_section("test_the_ledger_is_backed_up", shell).rest()
    # All of this the backup does not know.
    shop.approve_sample("RF-2204")
    shop.pay("RF-2202", "RF-2204")
    shop.limit(largest_refund=500_000)
    shell.run(f"export HEAD={shop.audit_head()}")
    shop.ledger_engine.dispose()
    section.step()
    section.step()
    shop.change_source("RF-2204", "status = NULL")
    section.rest()
    assert shop.paused() == {}
    shop.pay()
    shop.assert_sent_once("RF-2201", "RF-2202", "RF-2203", "RF-2204")


def test_the_project_is_upgraded(
    shell: Shell, section: Section, postgres: PostgresServer, login: Login
) -> None:
    # There is no earlier revision yet; a database that was never migrated takes the same commands. An earlier
    # migration would have taken this right from PUBLIC.
    postgres.create_database("ledger_of_yesterday")
    with postgres.connect() as connection:
        connection.execute("REVOKE CONNECT, TEMPORARY ON DATABASE ledger_of_yesterday FROM PUBLIC")
    use_ledger(shell, postgres.url("ledger_of_yesterday"), login)
    section.rest()


def test_airflow_is_upgraded(shop: Shop, section: Section) -> None:
    shop.approve_sample()
    section.rest()


# -- the documents themselves ----------------------------------------------------------------------------------------------

# Blocks in `sh` are not executed, each for its reason. By the words they begin with.
NOT_EXECUTED = {
    "export AIRFLOW=": "address and passwords are the reader's; the tests set their own",
    "export PAYROC_REFUNDS_LEDGER_URL=": "the ledger is the reader's; the tests set their own",
    "export HEAD=": "the head is that of the reader's last report; the test sets the one of its own",
    "docker compose stop": "it takes Docker; in the tests nothing is at work on the ledger then",
    "make lock": "the tests would run themselves",
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_is_executed_or_has_its_reason(document: Path) -> None:
    blocks = blocks_of(document)
    without_test = {
        block.section
        for block in blocks
        if block.language == "console" and name_of_test(block.section) not in globals()
    }
    assert without_test == set()
    says_nothing = [
        c.text
        for b in blocks
        if b.language == "console"
        for c in b.commands
        if c.expected and set(c.expected) == {ANYTHING}
    ]
    assert says_nothing == []
    # A block in any other language could hold commands that nothing has tried.
    others = [block for block in blocks if block.language != "console"]
    without_reason = [
        block.lines[0]
        for block in others
        if not any(block.lines[0].startswith(words) for words in NOT_EXECUTED)
    ]
    assert without_reason == []


def test_every_test_of_a_section_has_its_section_and_every_reason_its_block() -> None:
    blocks = [block for document in DOCUMENTS for block in blocks_of(document)]
    first_lines = [block.lines[0] for block in blocks if block.language != "console"]
    assert [words for words in NOT_EXECUTED if not any(line.startswith(words) for line in first_lines)] == []


def test_the_sentences_that_lead_to_a_section_are_those_of_the_reports() -> None:
    code = "".join(
        path.read_text() for folder in ("include/refunds", "dags") for path in (ROOT / folder).rglob("*.py")
    )
    document = ROOT / "docs" / "operations.md"
    rows = re.findall(
        r"^\| (.+?) \|",
        document.read_text().partition("What the report or the message says")[2].partition("\n\n")[0],
        re.M,
    )
    pieces = [
        piece.strip()
        for row in rows[1:]
        for sentence in row.split(" / ")
        for piece in sentence.split("…")
        if piece.strip()
    ]
    assert len(pieces) > 12
    assert [piece for piece in pieces if piece not in code] == []


# -- the reader of the documents -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "printed", "agree"),
    [
        (("one", "two"), "one\ntwo\n\n", True),
        (("one", "two"), "one\n", False),
        (("one",), "one\ntwo\n", False),
        (("one",), "One\n", False),
        (("a … c",), "a b c\n", True),
        (("a … c",), "a b\nc\n", False),
        (("a (…)",), "a (b)\n", True),
        (("…", "last"), "1\n2\nlast\n", True),
        (("…", "last"), "last\n", True),
        (("…", "last"), "last\nmore\n", False),
        (("…",), "", True),
        ((), "", True),
        ((), "something\n", False),
    ],
)
def test_what_is_printed_has_to_be_what_stands_there(
    expected: tuple[str, ...], printed: str, agree: bool
) -> None:
    assert (difference(expected, printed) is None) is agree


def test_a_difference_is_shown_line_by_line() -> None:
    assert (
        difference(("1 of …", "two"), "1 of 9\n2\n")
        == "--- in the document\n+++ printed\n@@ -1,2 +1,2 @@\n 1 of …\n-two\n+2"
    )


def test_a_command_that_prints_something_else_fails_and_names_its_line(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("## Count\n\n```console\n$ N=2\n$ echo \\\n    $N\n3\n```\n")
    assert [command.expected for block in blocks_of(document) for command in block.commands] == [(), ("3",)]
    shell = Shell(os.environ, tmp_path)
    section = Section(document, "Count", shell)
    with pytest.raises(AssertionError, match=r"document\.md:5: \$ echo"):
        section.rest()
    shell.close()
