"""
What docker-compose.yaml starts works: here natively, with the commands, the environment and the health checks read out of the file.

One deployment with the profile ``demo``, from `make env` to the sample that is paid.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from demo.postgres import HOST
from tests.conftest import ROOT, SCRATCH, Sandbox
from tests.deployment.client import FreshClient
from tests.deployment.compose import read
from tests.deployment.native import NativeDeployment
from tests.patience import eventually

DAG = "payroc_refunds"
# Settings that a person may write into .env: short times, so that what takes minutes in earnest happens while a test waits.
SHORT = {
    "PAYROC_REFUNDS_UNKNOWN_WAIT_SECONDS": "3",
    "PAYROC_REFUNDS_RETRY_DELAY_SECONDS": "2",
    "PAYROC_REFUNDS_HTTP_TIMEOUT_SECONDS": "2",
    "PAYROC_REFUNDS_LEASE_MARGIN_SECONDS": "6",
    # Nothing runs but what the test triggers.
    "PAYROC_REFUNDS_SCHEDULE": "",
    "PAYROC_REFUNDS_FOLLOWUP_SCHEDULE": "",
    "PAYROC_REFUNDS_SUMMARY_SCHEDULE": "",
}


@pytest.fixture(scope="module")
def deployment(variables: dict[str, str]) -> Iterator[NativeDeployment]:
    services = read(ROOT / "docker-compose.yaml", variables | SHORT)
    with NativeDeployment(SCRATCH / "parity", services, profiles={"demo"}) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def airflow(deployment: NativeDeployment, variables: dict[str, str]) -> Iterator[FreshClient]:
    """The REST API, as the user that init has made."""
    client = FreshClient(deployment, variables["AIRFLOW_ADMIN_PASSWORD"])
    # The DAG processor is healthy before it has read the first DAG.
    eventually(lambda: client.is_ready(DAG), "Airflow knows the DAG")
    yield client
    client.close()


@pytest.fixture(scope="module")
def ledger(deployment: NativeDeployment, variables: dict[str, str]) -> Iterator[psycopg.Connection]:
    with deployment.connect(
        "refunds", user="postgres", password=variables["POSTGRES_PASSWORD"]
    ) as connection:
        yield connection


def test_every_service_becomes_healthy_by_its_own_check(
    deployment: NativeDeployment, record_property: Callable[..., None]
) -> None:
    took = {
        each.service.name: each.healthy_after
        for each in deployment.running.values()
        if not each.service.is_one_shot
    }
    assert set(took) == {"postgres", "api-server", "scheduler", "dag-processor", "triggerer", "sandbox"}
    assert None not in took.values()
    record_property(
        "services healthy after seconds",
        ", ".join(f"{name} {seconds:.0f}" for name, seconds in took.items() if seconds),
    )


def test_init_has_made_the_pool_and_the_web_interface_knows_the_connection_type(airflow: FreshClient) -> None:
    assert airflow.pool_slots("payroc_api") == 4
    form = airflow.connection_form("payroc")
    assert {"environment", "identity_url"} <= set(form["extra_fields"])


def test_the_sample_is_paid_with_the_payers_rights_once_a_person_has_unpaused_the_dag(
    deployment: NativeDeployment,
    airflow: FreshClient,
    ledger: psycopg.Connection,
    record_property: Callable[..., None],
) -> None:
    assert airflow.is_paused(DAG)
    begin = time.monotonic()
    airflow.unpause(DAG)
    run_id = airflow.trigger(DAG, batch_size=12)
    airflow.wait_for_run(DAG, run_id, "success")
    record_property("the run of the sample, seconds", round(time.monotonic() - begin))

    rows = ledger.execute(
        "SELECT source_ref, status, payroc_refund_id, amount FROM refund_ledger.refunds"
    ).fetchall()
    assert Counter(status for _, status, _, _ in rows) == {"accepted": 32, "rejected": 2}
    theirs = Sandbox(deployment.address("sandbox", 8089)).get("/_sandbox/refunds")["refunds"]
    paid = {(each["refundId"], each["amount"]) for each in theirs}
    assert {(refund_id, amount) for _, status, refund_id, amount in rows if status == "accepted"} <= paid
    assert len(theirs) == len({each["orderId"] for each in theirs}), "a refund exists twice at Payroc"
    source = ledger.execute("SELECT status, count(*) FROM public.refund_requests GROUP BY status").fetchall()
    assert dict(source) == {"accepted": 32, "rejected": 2}

    # The migrations write events as well, as the owner; none of them is about a refund.
    logins = ledger.execute(
        "SELECT DISTINCT login FROM refund_ledger.refund_events WHERE refund_id IS NOT NULL"
    ).fetchall()
    assert logins == [("airflow_payer",)]


@pytest.mark.parametrize(
    ("login", "variable", "database", "refused"),
    [
        ("airflow", "AIRFLOW_DATABASE_PASSWORD", "refunds", None),
        ("celery", "CELERY_DATABASE_PASSWORD", "airflow", None),
        ("airflow_payer", "REFUNDS_PAYER_PASSWORD", "airflow", None),
        (
            "airflow_payer",
            "REFUNDS_PAYER_PASSWORD",
            "refunds",
            "UPDATE refund_ledger.refund_limits SET largest_refund = 1",
        ),
        (
            "airflow_payer",
            "REFUNDS_PAYER_PASSWORD",
            "refunds",
            "UPDATE public.refund_requests SET amount = 1",
        ),
        (
            "refunds_operations",
            "REFUNDS_OPERATOR_PASSWORD",
            "refunds",
            "UPDATE refund_ledger.refund_instructions SET amount = 1",
        ),
        ("refunds_operations", "REFUNDS_OPERATOR_PASSWORD", "celery", None),
        ("airflow_payer", "REFUNDS_PAYER_PASSWORD", "postgres", None),
        ("airflow", "AIRFLOW_DATABASE_PASSWORD", "template1", None),
    ],
)
def test_each_login_is_refused_what_is_not_its_own(
    deployment: NativeDeployment,
    variables: dict[str, str],
    login: str,
    variable: str,
    database: str,
    refused: str | None,
) -> None:
    if refused is None:
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            deployment.connect(database, user=login, password=variables[variable])
        return
    connection = deployment.connect(database, user=login, password=variables[variable])
    with connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(refused)


def test_the_ledgers_owner_can_neither_pay_nor_release_once_the_logins_are_there(
    ledger: psycopg.Connection,
) -> None:
    roles = ("refunds_payer", "refunds_operator", "refunds_key_rotator")
    held = ledger.execute(
        "SELECT role FROM unnest(%s::text[]) AS role WHERE pg_has_role('refunds_owner', role, 'USAGE')",
        [list(roles)],
    )
    assert held.fetchall() == []


def test_peoples_commands_work_with_the_operators_rights_and_reach_payroc(
    deployment: NativeDeployment,
) -> None:
    today = datetime.now(UTC).date()
    yesterday, tomorrow = str(today - timedelta(days=1)), str(today + timedelta(days=1))
    for command in (
        ["limit", "largest_refund", "500000", "--by", "ann", "--reason", "a test"],
        ["verify", "--from", yesterday, "--to", tomorrow],
    ):
        done = deployment.run("refunds", *command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_init_can_run_again_and_sets_passwords_that_were_changed_and_makes_no_user_where_there_are_some(
    deployment: NativeDeployment, airflow: FreshClient, variables: dict[str, str]
) -> None:
    changed = (
        variables | SHORT | {"REFUNDS_OPERATOR_PASSWORD": "another", "AIRFLOW_ADMIN_PASSWORD": "not used"}
    )
    deployment.use(read(ROOT / "docker-compose.yaml", changed))
    with deployment.connect(
        "airflow", user="airflow", password=variables["AIRFLOW_DATABASE_PASSWORD"]
    ) as connection:
        # As if people had made their own users and deleted the first one.
        connection.execute("UPDATE ab_user SET username = 'fiona'")
        again = deployment.run("init")
        assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
        assert connection.execute("SELECT username FROM ab_user").fetchall() == [("fiona",)]
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        deployment.connect(
            "refunds", user="refunds_operations", password=variables["REFUNDS_OPERATOR_PASSWORD"]
        )
    with deployment.connect("refunds", user="refunds_operations", password="another") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert airflow.pool_slots("payroc_api") == 4


def test_a_ledger_whose_database_was_lost_is_restored_as_the_page_says(
    deployment: NativeDeployment, variables: dict[str, str], tmp_path: Path
) -> None:
    at = datetime.now(UTC)
    server = deployment.postgres

    def program(name: str, *arguments: str) -> None:
        options = ["--host", HOST, "--port", str(server.port), "--username", "postgres"]
        env = {"PGPASSWORD": variables["POSTGRES_PASSWORD"]}
        subprocess.run([str(server.program(name)), *options, *arguments], check=True, env=env)

    dump = str(tmp_path / "refunds.dump")
    program("pg_dump", "--format=custom", "--file", dump, "refunds")
    with deployment.connect(
        "postgres", user="postgres", password=variables["POSTGRES_PASSWORD"]
    ) as connection:
        connection.execute("DROP DATABASE refunds WITH (FORCE)")
    again = deployment.run("init")
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    program("pg_restore", "--clean", "--if-exists", "--single-transaction", "--dbname", "refunds", dump)

    ledger = f"postgres://postgres:{variables['POSTGRES_PASSWORD']}@postgres:5432/refunds"
    connections = {"AIRFLOW_CONN_REFUNDS_LEDGER": ledger, "AIRFLOW_CONN_REFUNDS_SOURCE": ledger}
    for command in (
        ["pause", "--by", "ann", "--reason", "restored from a backup"],
        [
            "restored",
            "--backup-at",
            at.isoformat(timespec="seconds"),
            "--by",
            "ann",
            "--reason",
            "the disk was lost",
        ],
        ["resume", "--by", "bob", "--reason", "compared"],
        ["verify", "--from", str(at.date() - timedelta(days=1)), "--to", str(at.date() + timedelta(days=1))],
    ):
        done = deployment.run("refunds", *command, environment=connections)
        assert done.returncode == 0, done.stdout + done.stderr
