"""
No bank data, token or key gets into what Airflow, the ledger or the commands write down, while a thousand payees are paid.

Each payee exists in this run only, by unique numbers and words. A real Airflow pays them at level DEBUG, from a local Payroc at which
everything goes wrong that can. Then everything that was written down anywhere is searched; only the merchant's own database is not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from demo.postgres import PostgresServer
from include.sandbox.triggers import TRIGGERS
from tests.canary.deployment import TalkativeDeployment
from tests.canary.payees import WORD_LENGTH, Mint
from tests.canary.rows import LISTED
from tests.canary.scanner import Artefact, Leak, Scanner, files, tables, texts
from tests.canary.story import Story, keep_tokens
from tests.conftest import SCRATCH, NewDatabase, running_sandbox
from tests.processes.line import running

Measured = Callable[[str, object], None]

# So short that many tokens are issued.
TOKEN_SECONDS = 15
PLACES = ("files", "Airflow's database", "ledger", "commands", "API answers")


@pytest.fixture(scope="module")
def story(postgres: PostgresServer, new_ledger: NewDatabase, new_source: NewDatabase) -> Iterator[Story]:
    """The canary run, after its end."""
    folder, merchants_own = SCRATCH / "canary", SCRATCH / "canary-merchant"
    for made in (folder, merchants_own):
        made.mkdir(mode=0o711)
    with (
        running_sandbox(
            folder / "sandbox.log", "--token-seconds", str(TOKEN_SECONDS), "--hang-seconds", "2"
        ) as sandbox,
        running(sandbox.url) as line,
    ):
        airflow = TalkativeDeployment(folder, postgres, new_ledger(), new_source(), sandbox, line.url)
        story = Story(airflow, postgres, Mint(seed=20260101), merchants_own, keep_tokens(line))
        try:
            story.play()
        finally:
            airflow.stop()
        yield story


@pytest.fixture(scope="module")
def artefacts(story: Story) -> dict[str, list[Artefact]]:
    """Everything that was written down, by where."""
    return {
        "files": list(files(story.airflow.folder)),
        "Airflow's database": list(tables(story.airflow.metadata)),
        "ledger": list(tables(story.airflow.ledger)),
        "commands": list(texts(story.outputs)),
        "API answers": list(texts({path: answer.text for path, answer in story.answers.items()})),
    }


@pytest.fixture(scope="module")
def scanner(story: Story) -> Scanner:
    """The scanner, which knows every payee, token and key."""
    mint, env = story.mint, story.airflow.env
    scanner = Scanner(WORD_LENGTH)
    scanner.add_numbers("account number", mint.account_numbers)
    scanner.add_numbers("secure token", mint.secure_tokens)
    for form in ("{}/{}", "{}{}", "{}:{}", "{} {}"):
        scanner.add_digests("routing and account number", [form.format(*pair) for pair in mint.accounts])
    scanner.add_words("name", mint.names)
    scanner.add_words("e-mail", mint.emails)
    scanner.add_secrets("bearer token", story.tokens)
    scanner.add_secrets("API key", [story.airflow.connections["payroc_default"]["password"]])
    scanner.add_secrets("encryption key", env["PAYROC_REFUNDS_ENCRYPTION_KEYS"].split(","))
    scanner.add_secrets("fingerprint key", [env["PAYROC_REFUNDS_FINGERPRINT_KEY"]])
    scanner.add_secrets("database password", [str(story.airflow.ledger.password)])
    for name in ("AIRFLOW__CORE__FERNET_KEY", "AIRFLOW__API_AUTH__JWT_SECRET", "AIRFLOW__API__SECRET_KEY"):
        scanner.add_secrets(name, [env[name]])
    return scanner


def told(leaks: list[Leak]) -> str:
    """Return what was found where, without the values."""
    by_place = Counter((leak.needle.kind, leak.artefact) for leak in leaks)
    first = {(leak.needle.kind, leak.artefact): leak for leak in reversed(leaks)}
    lines = [
        f"{count} x {kind} in {artefact}, such as {first[kind, artefact]}"
        for (kind, artefact), count in by_place.most_common(30)
    ]
    return "\n".join([f"{len(leaks)} leaks:", *lines])


# -- the run was what it should be -----------------------------------------------------------------------------------------


def test_a_thousand_payees_were_paid_in_runs_that_tried_again(
    story: Story, record_property: Measured
) -> None:
    with story.postgres.connect(str(story.airflow.ledger.database)) as ledger:
        statuses = dict(
            ledger.execute("SELECT status, count(*) FROM refund_ledger.refunds GROUP BY status").fetchall()
        )
        [(attempts, retried)] = ledger.execute(
            "SELECT count(*), count(*) FILTER (WHERE attempt > 1) FROM refund_ledger.refund_attempts"
        ).fetchall()
        [(invalid,)] = ledger.execute("SELECT count(*) FROM refund_ledger.invalid_rows").fetchall()
    with story.postgres.connect(str(story.airflow.metadata.database)) as metadata:
        [(tasks, tasks_retried)] = metadata.execute(
            "SELECT count(*), count(*) FILTER (WHERE try_number > 1) FROM task_instance"
        ).fetchall()
    record_property(
        "canary refunds by status",
        ", ".join(f"{status} {count}" for status, count in sorted(statuses.items())),
    )
    record_property(
        "canary attempts",
        f"{attempts}, {retried} of them not the first; {tasks_retried} of {tasks} tasks tried again",
    )
    record_property("canary invalid rows", invalid)
    assert sum(statuses.values()) > LISTED
    assert statuses["accepted"] > 0.95 * LISTED
    assert {"held", "rejected", "review", "settled", "returned"} <= set(statuses)
    assert invalid > 20
    assert retried > 30
    assert tasks_retried > 5


def test_every_behaviour_of_the_local_payroc_was_met(story: Story) -> None:
    met = Counter(entry["behaviour"] for entry in story.journal)
    assert {trigger.digits for trigger in TRIGGERS} <= set(met)


def test_every_queued_fault_was_met(story: Story, record_property: Measured) -> None:
    assert story.faults_left == []
    hit = Counter(entry["operation"] for entry in story.journal if entry["behaviour"] == "queued")
    record_property(
        "canary faults met", ", ".join(f"{operation} {count}" for operation, count in sorted(hit.items()))
    )
    assert sum(hit.values()) == story.faults


def test_all_loggers_spoke_at_debug(artefacts: dict[str, list[Artefact]], record_property: Measured) -> None:
    logs = b"\n".join(artefact.data for artefact in artefacts["files"] if artefact.name.endswith(".log"))
    said = Counter(re.findall(rb'"level":"debug".{1,400000}?"logger":"([a-z0-9_]+)', logs))
    record_property(
        "canary debug lines", ", ".join(f"{logger.decode()} {count}" for logger, count in said.most_common(8))
    )
    assert {b"airflow", b"asyncio", b"httpx", b"sqlalchemy", b"urllib3"} <= set(said)
    assert b"[httpcore.http11]" in logs
    # What http.client prints.
    assert b"send: b'GET" in logs


def test_the_api_was_asked_about_everything(story: Story, record_property: Measured) -> None:
    answered = [path for path, answer in story.answers.items() if answer.is_success]
    record_property("canary API answers", f"{len(answered)} of {len(story.answers)} with success")
    parts = (
        "/logs/1",
        "/logs/2",
        "/xcomEntries/return_value",
        "/connections/payroc_default",
        "/approve_run/-1/hitlDetails",
        "/ui/grid/",
    )
    for part in (*parts, "/eventLogs", "/dagRuns/"):
        assert any(part in path for path in answered), f"nothing about {part}"


def test_the_databases_are_full_of_what_is_searched(artefacts: dict[str, list[Artefact]]) -> None:
    airflows = (
        "connection",
        "dag_run",
        "hitl_detail",
        "log",
        "rendered_task_instance_fields",
        "task_instance",
        "xcom",
    )
    ledgers = (
        "first_releases",
        "frozen_requests",
        "invalid_rows",
        "pauses",
        "refund_attempts",
        "refund_events",
        "refund_instructions",
        "refund_runs",
        "refund_states",
    )
    full = {artefact.name for several in artefacts.values() for artefact in several if artefact.data}
    assert {f"table public.{name}" for name in airflows} | {
        f"table refund_ledger.{name}" for name in ledgers
    } <= full


def test_the_commands_were_run_and_some_refused(story: Story) -> None:
    codes = Counter(said.splitlines()[0] for said in story.outputs.values())
    assert codes["exit code 0"] > 3
    assert codes["exit code 1"] > 1


def test_the_scanner_knows_every_payee_of_the_merchants_own_database(story: Story, scanner: Scanner) -> None:
    found = {leak.needle for leak in scanner.scan(tables(story.airflow.source))}
    by_kind = Counter(needle.kind for needle in found)
    assert by_kind["account number"] + by_kind["secure token"] > LISTED
    assert by_kind["name"] > LISTED
    assert by_kind["e-mail"] > LISTED
    assert len(story.tokens) > 3


# -- nothing leaked --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", PLACES)
def test_nothing_leaked_into(
    where: str, artefacts: dict[str, list[Artefact]], scanner: Scanner, record_property: Measured
) -> None:
    searched = artefacts[where]
    size = sum(len(artefact.data) for artefact in searched) / 1e6
    record_property(f"canary searched in {where}", f"{len(searched)} artefacts, {size:.1f} MB")
    assert searched
    leaks = scanner.scan(searched)
    assert not leaks, told(leaks)


def test_no_routing_number_stands_anywhere(story: Story, artefacts: dict[str, list[Artefact]]) -> None:
    known = {number.encode() for number in story.mint.routing_numbers}
    seen = [
        f"{artefact.name}, {artefact.place_of(number)}"
        for several in artefacts.values()
        for artefact in several
        for number in known & set(re.findall(rb"(?<![0-9])[0-9]{9}(?![0-9])", artefact.data))
    ]
    assert not seen, f"routing numbers, {len(seen)} times: {seen[:20]}"
