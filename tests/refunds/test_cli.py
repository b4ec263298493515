"""The commands of ``python -m include.refunds``, run as people run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from sqlalchemy import URL
from typer.testing import CliRunner

from include.refunds.cipher import Cipher
from include.refunds.cli import app
from include.refunds.connect import NoGateway, connect
from include.refunds.settings import Settings
from tests.conftest import ROOT, NewDatabase
from tests.refunds.conftest import World
from tests.refunds.test_ledger_rules import force


def cli(
    *arguments: str, ledger: URL | None = None, source: URL | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ) | environment
    if ledger is not None:
        env["PAYROC_REFUNDS_LEDGER_URL"] = ledger.render_as_string(hide_password=False)
    if source is not None:
        env["PAYROC_REFUNDS_SOURCE_URL"] = source.render_as_string(hide_password=False)
    return subprocess.run(
        [sys.executable, "-m", "include.refunds", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_migrate_makes_a_ledger_and_may_be_run_again(postgres, new_source: NewDatabase) -> None:
    postgres.create_database("fresh_ledger")
    ledger, source = postgres.url("fresh_ledger"), new_source()
    before = cli("status", ledger=ledger)
    assert before.returncode == 2
    assert "run `python -m include.refunds migrate`" in before.stderr
    for _ in range(2):
        done = cli("migrate", "--demo-source", ledger=ledger, source=source)
        assert done.returncode == 0, done.stderr
        assert "The ledger is at revision" in done.stdout
    assert cli("status", ledger=ledger).returncode == 0


@pytest.mark.parametrize("form", ["json", "uri"])
def test_the_ledger_is_found_by_airflows_connection_variable(ledger_url: URL, form: str) -> None:
    url = ledger_url
    fields = {
        "conn_type": "postgres",
        "host": url.host,
        "port": url.port,
        "login": url.username,
        "password": url.password,
    }
    uri = f"postgres://{url.username}:{url.password}@{url.host}:{url.port}/{url.database}"
    value = json.dumps(fields | {"schema": url.database}) if form == "json" else uri
    found = cli("status", AIRFLOW_CONN_REFUNDS_LEDGER=value)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            {},
            "No ledger database: give --ledger-url, or set PAYROC_REFUNDS_LEDGER_URL or AIRFLOW_CONN_REFUNDS_LEDGER.",
        ),
        (
            {"PAYROC_REFUNDS_LEDGER_URL": "sqlite:///x.db"},
            "PAYROC_REFUNDS_LEDGER_URL names no Postgres database",
        ),
        (
            {"PAYROC_REFUNDS_LEDGER_URL": "postgresql://h/x?channel_binding=require"},
            "`channel_binding` can't be used here: remove it",
        ),
        (
            {"PAYROC_REFUNDS_LEDGER_URL": "postgresql://h/x?connect_timeout=soon"},
            "`connect_timeout` is no whole number: give seconds",
        ),
        ({"PAYROC_REFUNDS_LEDGER_URL": "no url"}, "PAYROC_REFUNDS_LEDGER_URL is not a database URL"),
        ({"PAYROC_REFUNDS_LEDGER_URL": "postgresql://u:hunter2@127.0.0.1:1/x"}, "127.0.0.1:1 can't be used"),
        (
            {"PAYROC_REFUNDS_LEDGER_URL": "postgresql://127.0.0.1/x", "PAYROC_REFUNDS_RETRIES": "many"},
            "PAYROC_REFUNDS_RETRIES is not usable",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence_without_a_password(
    environment: dict[str, str], sentence: str
) -> None:
    failed = cli("status", **environment)
    assert failed.returncode == 2
    assert sentence in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "hunter2" not in failed.stderr


def test_import_names_bad_lines_and_may_be_repeated(source_url: URL, tmp_path: Path) -> None:
    sample = (ROOT / "demo" / "sample_refunds.csv").read_text().splitlines()
    broken = sample[2].split(",")
    broken[0], broken[sample[0].split(",").index("amount")] = "BROKEN", "12.50"
    file = tmp_path / "refunds.csv"
    file.write_text("\n".join([*sample[:4], ",".join(broken)]) + "\n")
    first = cli("import", str(file), source=source_url)
    assert first.returncode == 1
    assert "Line 5: `amount` is 12.50; give whole cents, such as 1250 for USD 12.50." in first.stdout
    assert "3 imported, 0 there already, 1 with errors." in first.stdout
    assert "0 imported, 3 there already, 1 with errors." in cli("import", str(file), source=source_url).stdout


def test_import_refuses_a_file_with_other_columns(source_url: URL, tmp_path: Path) -> None:
    file = tmp_path / "refunds.csv"
    file.write_text("source_ref,total\nA,1\n")
    refused = cli("import", str(file), source=source_url)
    assert refused.returncode == 2
    assert "unknown total" in refused.stderr


def test_status_and_show_tell_what_became_of_a_refund_and_no_bank_data(world: World, ledger_url: URL) -> None:
    refund_id = world.released(
        account_number="556677889911", routing_number="053200983", name_on_account="Zebulon Quartermain"
    )
    world.send(refund_id)
    status, shown = cli("status", ledger=ledger_url), cli("show", str(refund_id), ledger=ledger_url)
    assert status.returncode == shown.returncode == 0, status.stderr + shown.stderr
    assert "accepted" in status.stdout
    assert world.row(refund_id)["payroc_refund_id"] in shown.stdout
    as_json = cli("show", str(refund_id), "--json", ledger=ledger_url)
    found = json.loads(as_json.stdout)
    assert [attempt["outcome"] for attempt in found["attempts"]] == ["accepted"]
    assert [event["to_status"] for event in found["events"] if event["event"] == "status"] == [
        "approved",
        "released",
        "sending",
        "accepted",
    ]
    for output in (status, shown, as_json):
        for secret in ("556677889911", "053200983", "Zebulon"):
            assert secret not in output.stdout + output.stderr


def test_status_exits_with_1_when_something_needs_people(world: World, ledger_url: URL) -> None:
    world.send(world.released("9013"))
    status = cli("status", "--json", ledger=ledger_url)
    assert status.returncode == 1
    assert "1 in review" in json.loads(status.stdout)["unfinished"][0]


def test_show_of_an_unknown_refund_says_so(ledger_url: URL) -> None:
    missing = cli("show", "no-such", ledger=ledger_url)
    assert missing.returncode == 2
    assert "The ledger holds no refund no-such: give" in missing.stderr


@pytest.mark.parametrize("arguments", [("show", "SO-\udcff"), ("pause", "--by", "ann", "--reason", "\udcff")])
def test_an_argument_that_is_no_text_is_refused_in_one_sentence(
    arguments: tuple[str, ...], ledger_url: URL
) -> None:
    refused = cli(*arguments, ledger=ledger_url)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "An argument holds bytes that are no text in UTF-8: write it anew.\n"


# What is given to `show` of the first refund, and where the second one has the same.
AMBIGUOUS = {
    "an id that is also an order id": ("id", "order_id"),
    "an id that is also a source_ref": ("id", "source_ref"),
    "a source_ref that is also an order id": ("source_ref", "order_id"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_show_names_the_refunds_that_may_be_meant(case: str, world: World, ledger_url: URL) -> None:
    given, elsewhere = AMBIGUOUS[case]
    ids = first, second = world.released(), world.released(processing_terminal_id="7701002")
    which = str(world.row(first)[given])
    derived = f", idempotency_key = refund_ledger.refund_key(source, '{which}')"
    force(world, second, f"{elsewhere} = '{which}'{derived if elsewhere == 'source_ref' else ''}")
    shown = show(which, url=ledger_url, exit_code=2)
    for row in map(world.row, ids):
        place = (str(row["id"]), row["order_id"], row["source_ref"], row["processing_terminal_id"])
        assert re.search(r"\s+".join((*place, "49.99 USD", "released")), shown)
    assert f"{which} may be 2 refunds: give the ledger's id of one of them, as `show ID --id`." in shown
    for refund_id in ids:
        assert f"Refund {refund_id} " in show(str(refund_id), "--id", url=ledger_url)


def test_show_names_the_terminals_of_an_order_id_that_two_have(world: World, ledger_url: URL) -> None:
    first, second = (
        world.released(order_id="SO-1", processing_terminal_id=terminal)
        for terminal in ("7701001", "7701002")
    )
    shown = show("SO-1", url=ledger_url, exit_code=2)
    assert "7701001" in shown
    assert "7701002" in shown
    matches = json.loads(show("SO-1", "--json", url=ledger_url, exit_code=2).splitlines()[0])["matches"]
    assert [match["id"] for match in matches] == [first, second]
    assert "no refund SO-1" in show("SO-1", "--id", url=ledger_url, exit_code=2)


def show(*arguments: str, url: URL, exit_code: int = 0) -> str:
    """Run the command in this process, and return what it printed on both streams."""
    environment = {"COLUMNS": "200", "PAYROC_REFUNDS_LEDGER_URL": url.render_as_string(hide_password=False)}
    done = CliRunner().invoke(app, ["show", *arguments], env=environment)
    assert done.exit_code == exit_code, (done.output, done.exception)
    return done.output


def test_pause_and_resume_stop_the_sending_and_let_it_go_on(world: World, ledger_url: URL) -> None:
    assert cli("pause", "--reason", "the bank called", "--by", "erin", ledger=ledger_url).returncode == 0
    assert "paused by erin: the bank called" in cli("status", ledger=ledger_url).stdout
    assert cli("resume", "--reason", "all clear", "--by", "erin", ledger=ledger_url).returncode == 0
    assert cli("resume", "--reason", "again", "--by", "erin", ledger=ledger_url).returncode == 2
    events = world.rows("SELECT event, actor, reason FROM refund_ledger.refund_events ORDER BY id")
    assert [tuple(event.values()) for event in events] == [
        ("pause", "erin", "the bank called"),
        ("resume", "erin", "all clear"),
    ]


WHO = {who: ("--by", who, "--reason", "seen") for who in ("ann", "bob")}


def test_resolve_asks_payroc_and_a_second_person(world: World, ledger_url: URL) -> None:
    refund_id = world.released("9013")
    world.send(refund_id)
    arguments = ("resolve", str(refund_id), "--as", "accepted")
    first = cli(*arguments, *WHO["ann"], ledger=ledger_url)
    assert (first.returncode, first.stderr) == (1, "")
    command = f"`python -m include.refunds resolve {refund_id} --as accepted --by … --reason …`"
    assert first.stdout == f"Proposed. It takes two: a different person has to run {command}.\n"
    same = cli(*arguments, *WHO["ann"], ledger=ledger_url)
    assert (same.returncode, same.stdout) == (2, "")
    assert "a different person has to run the same command" in same.stderr
    second = cli(*arguments, *WHO["bob"], ledger=ledger_url)
    assert (second.returncode, second.stdout, second.stderr) == (0, f"Refund {refund_id} is accepted.\n", "")


def test_reverse_then_reissue(world: World, ledger_url: URL) -> None:
    refund_id = world.released()
    world.send(refund_id)
    undone = cli("reverse", str(refund_id), *WHO["ann"], ledger=ledger_url)
    assert (undone.returncode, undone.stderr) == (0, "")
    assert undone.stdout.startswith(f"Refund {refund_id} is reversed")
    assert cli("reissue", str(refund_id), *WHO["ann"], ledger=ledger_url).returncode == 1
    done = cli("reissue", str(refund_id), *WHO["bob"], ledger=ledger_url)
    assert done.returncode == 0, done.stderr
    assert f"replaces refund {refund_id}; the next run of payroc_refunds sends it." in done.stdout
    shown = cli("show", str(refund_id), ledger=ledger_url).stdout
    assert "proposal" in shown
    assert "reverse" in shown


def test_a_decision_about_no_refund_and_one_without_a_reason_are_refused(
    world: World, ledger_url: URL
) -> None:
    missing = cli("reissue", "77", *WHO["ann"], ledger=ledger_url)
    assert (missing.returncode, missing.stderr) == (2, "The ledger holds no refund 77.\n")
    blank = cli("reissue", "77", "--by", "ann", "--reason", "  ", ledger=ledger_url)
    assert blank.returncode == 2
    assert "must not be blank" in blank.stderr
    rejected = cli(
        "resolve",
        "77",
        "--as",
        "rejected",
        "--payroc-refund-id",
        "ABCDEFGHIJ",
        *WHO["ann"],
        ledger=ledger_url,
    )
    assert "goes with --as accepted" in rejected.stderr


def test_verify_prints_json_and_nothing_else(world: World, ledger_url: URL) -> None:
    world.send(world.released(processing_terminal_id="7701777"))
    world.hours_ahead = 0
    today = f"{world.run(world.ledger.now()):%Y-%m-%d}"
    found = cli("verify", "--from", today, "--to", today, "--json", ledger=ledger_url)
    assert (found.returncode, found.stderr) == (0, "")
    (total,) = json.loads(found.stdout)["totals"]
    assert (total["status"], total["ledger_count"], total["payroc_count"]) == ("accepted", 1, 1)
    assert (
        "The ledger and Payroc agree."
        in cli("verify", "--from", today, "--to", today, ledger=ledger_url).stdout
    )
    bad = cli("verify", "--from", "2026-11-23T09:00", "--to", today, ledger=ledger_url)
    assert bad.returncode == 2
    assert "nor an instant with its zone" in bad.stderr


def test_a_command_that_can_not_reach_payroc_says_what_is_wrong_in_one_sentence(
    world: World, ledger_url: URL
) -> None:
    undefined = cli("reverse", "1", *WHO["ann"], "--payroc-conn-id", "payroc_other", ledger=ledger_url)
    assert undefined.returncode == 2
    assert undefined.stderr.startswith("Airflow connection 'payroc_other' is not defined")
    connection = json.loads(os.environ["AIRFLOW_CONN_PAYROC_DEFAULT"]) | {"host": "http://127.0.0.1:1/v1"}
    connection["extra"] = {"identity_url": "http://127.0.0.1:1"}
    world.send(world.released())
    dead = cli(
        "reverse", "1", *WHO["ann"], ledger=ledger_url, AIRFLOW_CONN_PAYROC_DEFAULT=json.dumps(connection)
    )
    assert dead.returncode == 2
    assert "This ledger belongs to Payroc at" in dead.stderr


def test_without_the_installed_package_a_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("include.refunds.connect.entry_points", lambda group: [])
    with pytest.raises(
        NoGateway,
        match=r"Nothing that knows Airflow is installed .*: run `pip install --no-deps --editable \.`",
    ):
        connect("payroc_default")


def test_a_package_that_can_not_be_imported_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = EntryPoint("airflow", "no_such_package.gateway:connect", "payroc_refunds.gateway")
    monkeypatch.setattr("include.refunds.connect.entry_points", lambda group: [missing])
    with pytest.raises(NoGateway, match=r"can't be imported .*no_such_package.*: run `pip install"):
        connect("payroc_default")


def test_a_connection_in_airflows_own_database_is_found(
    world: World, ledger_url: URL, airflow_database: None
) -> None:
    fields = json.loads(os.environ["AIRFLOW_CONN_PAYROC_DEFAULT"])
    added = subprocess.run(
        [
            sys.executable,
            "-m",
            "airflow",
            "connections",
            "add",
            "payroc_stored",
            "--conn-json",
            json.dumps(fields),
        ],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert added.returncode == 0, added.stderr
    refund_id = world.released()
    world.send(refund_id)
    undone = cli(
        "reverse", str(refund_id), *WHO["ann"], "--payroc-conn-id", "payroc_stored", ledger=ledger_url
    )
    assert (undone.returncode, undone.stderr) == (0, "")


def test_generated_keys_are_usable() -> None:
    printed = cli("generate-keys").stdout
    keys = dict(line.split("=", 1) for line in printed.splitlines())
    cipher = Cipher(
        Settings(
            encryption_keys=keys["PAYROC_REFUNDS_ENCRYPTION_KEYS"],
            fingerprint_key=keys["PAYROC_REFUNDS_FINGERPRINT_KEY"],
        )
    )
    assert cipher.open(cipher.seal(b"body").token, cipher.sha256(b"body"), 1) == b"body"


COMMANDS = (
    "migrate",
    "import",
    "status",
    "show",
    "pause",
    "resume",
    "limits",
    "limit",
    "unhold",
    "cancel",
    "resolve",
    "reissue",
    "reverse",
    "verify",
    "verify-audit",
    "rotate-keys",
    "generate-keys",
)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_of_every_command_can_be_read(command: list[str]) -> None:
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    assert "Usage:" in shown.stdout
