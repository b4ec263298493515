"""
Under a real scheduler people get one mail for a run that needs them and none for one that does not, and other DAGs and metrics follow.

The mails are Airflow's own: its SmtpNotifier sends them, and a mail server of the tests receives them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from typing import Any
from uuid import uuid4

import psutil
import pytest

from demo.postgres import PostgresServer
from tests.canary.payees import WORD_LENGTH, Mint
from tests.canary.scanner import Scanner, texts
from tests.conftest import ROOT, SCRATCH, NewDatabase, running_sandbox
from tests.patience import PATIENCE_SECONDS, eventually
from tests.receivers import Mailbox, StatsD, body_of, receivers
from tests.scheduler.conftest import Merchant
from tests.scheduler.deployment import DAG, TOKEN_SECONDS, Deployment

# The same DAG, whose tasks are not tried again.
FRAIL_DAG = "payroc_refunds_frail"
SUMMARY_DAG = "payroc_refunds_summary"
FOLLOWUP_DAG = "payroc_refunds_followup"
FOLLOWER_DAG = "follower"

# What is replaced in the DAG's code to make it.
_FRAIL = ('"retries": settings.retries', '"retries": 0')
# As docs/notifications.md shows it.
FOLLOWER = (ROOT / "docs" / "notifications.md").read_text().partition("```python\n")[2].partition("```")[0]

SMTP = "airflow.providers.smtp.notifications.smtp.SmtpNotifier"


class TellingDeployment(Deployment):
    """An Airflow that mails to a mailbox, sends its metrics to a StatsD server, and has all DAGs."""

    def __init__(self, *arguments: Any, mailbox: Mailbox, statsd: StatsD) -> None:
        super().__init__(*arguments)
        self.mailbox, self.statsd = mailbox, statsd
        self._env |= statsd.environment | {
            "AIRFLOW_CONN_SMTP_DEFAULT": mailbox.connection,
            "PAYROC_REFUNDS_NOTIFIERS": json.dumps([{"notifier": SMTP, "to": "finance@merchant.example"}]),
            "PAYROC_REFUNDS_SUMMARY_SCHEDULE": "",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "10",
        }
        dags = self.folder / "dags"
        code = (dags / f"{DAG}.py").read_text()
        for old, new in ((f'    "{DAG}",\n', f'    "{FRAIL_DAG}",\n'), _FRAIL):
            assert code.count(old) == 1, f"the DAG has no single {old!r} to replace any more"
            code = code.replace(old, new)
        (dags / f"{FRAIL_DAG}.py").write_text(code)
        for dag_id in (SUMMARY_DAG, FOLLOWUP_DAG):
            (dags / f"{dag_id}.py").write_text((ROOT / "dags" / f"{dag_id}.py").read_text())
        (dags / f"{FOLLOWER_DAG}.py").write_text(FOLLOWER)

    def start(self) -> None:
        super().start()
        self._wait_for(lambda: self.client.is_ready(FRAIL_DAG, SUMMARY_DAG, FOLLOWUP_DAG, FOLLOWER_DAG))


@pytest.fixture(scope="module")
def airflow(
    postgres: PostgresServer, new_ledger: NewDatabase, new_source: NewDatabase
) -> Iterator[TellingDeployment]:
    folder = SCRATCH / "notifications"
    folder.mkdir(mode=0o711)
    with (
        running_sandbox(folder / "sandbox.log", "--token-seconds", str(TOKEN_SECONDS)) as sandbox,
        receivers() as (mailbox, statsd),
    ):
        deployment = TellingDeployment(
            folder, postgres, new_ledger(), new_source(), sandbox, mailbox=mailbox, statsd=statsd
        )
        try:
            deployment.start()
            yield deployment
        finally:
            deployment.stop()


@pytest.fixture
def mailbox(airflow: TellingDeployment) -> Mailbox:
    return airflow.mailbox


@pytest.fixture(autouse=True)
def as_before(merchant: Merchant) -> Iterator[None]:
    """What one test holds, pauses or limits must not be in another's mail."""
    yield
    merchant.run(merchant.ledger.pauses.resume("*", "the test is over"))
    for name in ("largest_refund", "approval_count"):
        merchant.run(merchant.ledger.limits.set_limit(name, None, "the test is over"))
    with merchant.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql(
            "UPDATE refund_ledger.refund_states SET status = 'cancelled' WHERE status NOT IN ('accepted', 'rejected')"
        )


def the_mail(mailbox: Mailbox, run_id: str) -> EmailMessage:
    """Return the one mail about a run."""
    (mail,) = eventually(lambda: mailbox.about(run_id))
    return mail


def trigger_dated(merchant: Merchant, dag_id: str = DAG) -> str:
    """Trigger a run with a logical date, as the web interface does: a deadline counts from there, and runs have one before."""
    run_id = f"dated-{uuid4()}"
    body = {"dag_run_id": run_id, "logical_date": datetime.now(UTC).isoformat()}
    merchant.airflow.client._request("POST", f"/dags/{dag_id}/dagRuns", json=body)
    return run_id


def let_its_deadline_pass(merchant: Merchant, postgres: PostgresServer, run_id: str) -> None:
    """Move the deadline of a run into the past, and wait until Airflow has called back."""
    run = "FROM dag_run AS r WHERE r.id = d.dagrun_id AND r.run_id = %s"
    with postgres.connect(merchant.airflow.metadata_database) as metadata:
        moved = metadata.execute(f"UPDATE deadline AS d SET deadline_time = now() {run}", [run_id]).rowcount
        metadata.commit()
        assert moved == 1, "the run has no deadline"
        states = f"SELECT c.state FROM callback AS c JOIN deadline AS d ON d.callback_id = c.id, {run.removeprefix('FROM ')}"
        merchant.wait_until(
            lambda: metadata.execute(states, [run_id]).fetchall() == [("success",)],
            "Airflow calls back",
            pause=0.3,
        )


def url_of(merchant: Merchant, dag_id: str, run_id: str) -> str:
    return f"{merchant.airflow.client._http.base_url}/dags/{dag_id}/runs/{run_id}".replace("//dags", "/dags")


def is_over(merchant: Merchant) -> bool:
    """Tell whether no run is open and no process works for one any more, so that whoever wants to be told has been."""
    return not merchant.airflow.client.has_open_runs() and not merchant.airflow.task_processes()


def test_a_green_run_tells_no_people_but_metrics_and_other_dags_which_a_dry_run_does_not(
    merchant: Merchant, airflow: TellingDeployment, mailbox: Mailbox
) -> None:
    client, statsd = airflow.client, airflow.statsd

    def followed() -> list[Any]:
        runs = client._request("GET", f"/dags/{FOLLOWER_DAG}/dagRuns").json()["dag_runs"]
        ended = [run["dag_run_id"] for run in runs if run["state"] == "success"]
        return [event for run_id in ended for event in client.xcom(FOLLOWER_DAG, run_id, "book")]

    for ending in ("4321", "4321", "9001", "9005"):
        merchant.approve(ending, currency="USD")
    dry = client.trigger(DAG, dry_run=True)
    client.wait_for_run(DAG, dry, "success")
    statsd.lines.clear()
    run_id = client.trigger(DAG)
    client.wait_for_run(DAG, run_id, "success")

    eventually(lambda: sum(statsd.values("accepted")) == 3)
    assert sum(statsd.values("amount.USD")) == 3 * 4999
    assert (sum(statsd.values("rejected")), sum(statsd.values("unknown"))) == (1, 1)
    # The one that was unknown took two.
    assert sum(statsd.values("sent")) == sum(statsd.values("attempts")) == 5
    assert len(statsd.values("latency.create_refund")) == 5
    assert all(0 < milliseconds < 5000 for milliseconds in statsd.values("latency.create_refund"))
    (age,) = statsd.values("oldest_approved_age")
    assert age > 3600

    totals = [
        {"status": status, "currency": "USD", "count": n, "amount": n * 4999}
        for status, n in (("accepted", 3), ("rejected", 1))
    ]
    eventually(lambda: {"dag_id": DAG, "run_id": run_id, "totals": totals} in followed())
    assert dry not in [event["run_id"] for event in followed()]
    assert mailbox.about(run_id) == mailbox.about(dry) == []


def test_a_green_run_that_holds_a_refund_tells_once(merchant: Merchant, mailbox: Mailbox) -> None:
    client = merchant.airflow.client
    merchant.run(merchant.ledger.limits.set_limit("largest_refund", 100_000, "test"))
    merchant.approve(amount=250_000)
    holding = client.trigger(DAG)
    client.wait_for_run(DAG, holding, "success")
    mail = the_mail(mailbox, holding)
    assert (mail["to"], mail["from"]) == ("finance@merchant.example", "airflow@merchant.example")
    assert mail["subject"] == "Payroc refunds: 1 held"
    assert "2,500.00 USD" in body_of(mail)
    assert url_of(merchant, DAG, holding) in body_of(mail)


def test_a_red_run_is_one_mail_with_counts_and_sums_of_all_that_is_wrong_and_no_bank_data(
    merchant: Merchant, mailbox: Mailbox
) -> None:
    client, mint = merchant.airflow.client, Mint(seed=20261123)
    merchant.run(merchant.ledger.limits.set_limit("largest_refund", 100_000, "test"))
    for ending in ("9013", "9013", "9001", "4321"):
        merchant.approve(**mint.payee(ending).columns())
    merchant.approve(amount=250_000, **mint.payee().columns())
    merchant.approve(**(mint.payee().columns() | {"routing_number": "021000022"}))
    run_id = trigger_dated(merchant)
    client.wait_for_run(DAG, run_id, "failed")
    mail = the_mail(mailbox, run_id)
    assert mail["subject"] == "Payroc refunds: run failed, 2 in review, 1 held"
    assert "2 in review: people have to look at them" in body_of(mail)
    for words in ("rejected", "accepted", "49.99 USD", "99.98 USD", "2,500.00 USD"):
        assert words in body_of(mail)
    scanner = Scanner(WORD_LENGTH)
    scanner.add_numbers("account number", mint.account_numbers)
    scanner.add_words("name", mint.names)
    scanner.add_words("e-mail", mint.emails)
    assert scanner.scan(texts({"the mail": mail.as_string() + body_of(mail)})) == []
    assert not any(number in body_of(mail) for number in [*mint.routing_numbers, "021000022"])

    # The run's end is told again when it is cleared, as a new end: once.
    client.clear(DAG, run_id, "report", downstream=False)
    client.wait_for_run(DAG, run_id, "failed")
    eventually(lambda: len(mailbox.about(run_id)) == 2)
    eventually(lambda: is_over(merchant))
    assert len(mailbox.about(run_id)) == 2


def test_while_the_sending_is_paused_each_run_tells_once_and_the_follow_ups_of_a_day_once_and_a_deadline_later_tells_nobody(
    merchant: Merchant, mailbox: Mailbox, postgres: PostgresServer
) -> None:
    client = merchant.airflow.client
    merchant.run(merchant.ledger.pauses.pause("*", "the bank called"))
    run_id = trigger_dated(merchant)
    first, second = trigger_dated(merchant, FOLLOWUP_DAG), trigger_dated(merchant, FOLLOWUP_DAG)
    client.wait_for_run(DAG, run_id, "failed")
    mail = the_mail(mailbox, run_id)
    assert mail["subject"] == "Payroc refunds: run failed, sending paused"
    assert "Sending is paused by test: the bank called" in body_of(mail)
    # Airflow removes the deadline of a run that succeeds, and calls back for one that has failed.
    let_its_deadline_pass(merchant, postgres, run_id)
    assert len(mailbox.about(run_id)) == 1

    for followup in (first, second):
        client.wait_for_run(FOLLOWUP_DAG, followup, "failed")
    assert the_mail(mailbox, first)["subject"] == "Payroc refunds: follow-up failed, sending paused"
    eventually(lambda: is_over(merchant))
    assert mailbox.about(second) == []


def test_a_run_that_waits_for_approval_tells_once_with_a_link_to_the_question_and_a_missed_deadline_is_another_mail(
    merchant: Merchant, mailbox: Mailbox, postgres: PostgresServer
) -> None:
    client = merchant.airflow.client
    merchant.run(merchant.ledger.limits.set_limit("approval_count", 0, "test"))
    merchant.approve()
    merchant.approve(amount=120_000)
    run_id = trigger_dated(merchant)
    client.question(DAG, run_id)
    asking = the_mail(mailbox, run_id)
    assert asking["subject"] == "Payroc refunds: approval needed, 2 refunds, 1,249.99 USD"
    assert "The largest is 1,200.00 USD." in body_of(asking)
    assert f"{url_of(merchant, DAG, run_id)}/tasks/approve_run/required_actions" in body_of(asking)

    let_its_deadline_pass(merchant, postgres, run_id)
    late = mailbox.about(run_id)[1]
    assert late["subject"] == "Payroc refunds: run not finished by its deadline"
    assert url_of(merchant, DAG, run_id) in body_of(late)

    client.fail_open_runs()
    client.wait_for_run(DAG, run_id, "failed")
    eventually(lambda: is_over(merchant))
    assert len(mailbox.about(run_id)) == 2


@contextmanager
def reports_wait(merchant: Merchant) -> Iterator[None]:
    """Keep each report waiting when it notes the end of its run."""
    install = """
        CREATE FUNCTION wait_for_the_test() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END';
        CREATE TRIGGER wait_for_the_test BEFORE UPDATE OF finished_at ON refund_ledger.refund_runs
            FOR EACH ROW EXECUTE FUNCTION wait_for_the_test();"""
    with merchant.ledger_engine.connect() as connection:
        connection.exec_driver_sql(install)
        connection.exec_driver_sql("SELECT pg_advisory_lock(1)")
        connection.commit()
        try:
            yield
        finally:
            connection.exec_driver_sql("SELECT pg_advisory_unlock(1)")
            connection.exec_driver_sql("DROP FUNCTION wait_for_the_test CASCADE")
            connection.commit()


def test_a_report_that_was_killed_is_told_by_the_dag_processor(merchant: Merchant, mailbox: Mailbox) -> None:
    client = merchant.airflow.client
    merchant.approve()
    with reports_wait(merchant):
        run_id = client.trigger(FRAIL_DAG)
        merchant.wait_until(
            lambda: client.task_instances(FRAIL_DAG, run_id)["report", -1].state == "running", "report runs"
        )
        ti = client.task_instances(FRAIL_DAG, run_id)["report", -1]
        killed = [merchant.airflow.supervisor(ti), merchant.airflow.task_process(ti)]
        for process in killed:
            process.kill()
        psutil.wait_procs(killed, timeout=PATIENCE_SECONDS)
    client.wait_for_run(FRAIL_DAG, run_id, "failed")
    # Seen once on a busy machine: two mails about the one dead task, which Airflow may find by its executor and by its missing heartbeat.
    for mail in eventually(lambda: mailbox.about(run_id)):
        assert mail["subject"] == "Payroc refunds: run failed"
        assert "The task report was ended from outside" in body_of(mail)
        assert "49.99 USD" in body_of(mail)


def test_the_summary_is_written_and_mailed(merchant: Merchant, mailbox: Mailbox) -> None:
    client = merchant.airflow.client
    run_id = client.trigger(SUMMARY_DAG)
    client.wait_for_run(SUMMARY_DAG, run_id, "success")
    told = client.xcom(SUMMARY_DAG, run_id, "summary")
    (kept,) = (merchant.airflow.folder / "airflow" / "summaries").iterdir()
    assert told["written_to"].endswith(str(kept))
    mail = the_mail(mailbox, run_id)
    assert mail["subject"] == told["subject"]
    assert "accepted" in mail["subject"]
    assert body_of(mail).strip() == kept.read_text().strip()


def test_a_deadline_makes_no_new_version_of_the_dag_each_time_that_it_is_parsed(merchant: Merchant) -> None:
    client = merchant.airflow.client

    def versions() -> list[dict[str, Any]]:
        return list(client._request("GET", f"/dags/{DAG}/dagVersions").json()["dag_versions"])

    def parsed_later() -> bool:
        last = client._request("GET", f"/dags/{DAG}").json()["last_parsed_time"]
        return datetime.fromisoformat(last) > datetime.fromisoformat(
            versions()[-1]["created_at"]
        ) + timedelta(seconds=5)

    eventually(parsed_later)
    assert [version["version_number"] for version in versions()] == [1]
