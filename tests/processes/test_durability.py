"""What the ledger has acknowledged survives a crash of its server, whatever the login or the database says about commits."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator

import psutil
import pytest
from sqlalchemy import URL

from demo import processes
from demo.postgres import PostgresServer
from include.refunds.classify import Outcome, Verdict
from include.refunds.ledger import Ledger, LedgerEngine, LedgerError, Task
from include.refunds.migrations import MigrationRefused, migrate
from include.refunds.roles import PAYER
from tests.conftest import SCRATCH
from tests.patience import eventually
from tests.refunds.conftest import World

_servers = itertools.count(1)


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server whose WAL writer sleeps: what a commit does not flush itself is lost in a crash."""
    with PostgresServer(SCRATCH / f"postgres-that-crashes-{next(_servers)}") as server:
        with server.connect() as connection:
            connection.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
            connection.execute("SELECT pg_reload_conf()")
        yield server


@pytest.fixture
def ledger_url(server: PostgresServer) -> URL:
    server.create_database("ledger")
    migrate(server.url("ledger"))
    with server.connect() as connection:
        connection.execute(f"CREATE ROLE airflow_payer LOGIN PASSWORD 'secret' IN ROLE {PAYER}")
        connection.execute("GRANT CONNECT ON DATABASE ledger TO airflow_payer")
    return server.url("ledger")


def crash(server: PostgresServer) -> None:
    postmaster = psutil.Process(server.pid)
    processes.end_all([postmaster, *postmaster.children(recursive=True)], first=signal.SIGKILL)
    server.stop()
    server.start()


@pytest.mark.parametrize(
    "weakened",
    [
        "ALTER ROLE airflow_payer SET synchronous_commit = off",
        "ALTER DATABASE ledger SET synchronous_commit = off",
        "ALTER SYSTEM SET synchronous_commit = off",
    ],
)
def test_an_acknowledged_claim_record_and_pause_survive_a_crash(
    world: World, server: PostgresServer, ledger_url: URL, weakened: str
) -> None:
    claimed, recorded = world.released(), world.released()
    with server.connect() as connection:
        connection.execute(weakened)
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("CHECKPOINT")
    payer = LedgerEngine(ledger_url.set(username="airflow_payer", password="secret"), pool_size=0)
    ledger = Ledger(payer, world.settings, actor="test")
    environment, sent_with = world.gateway.environment, world.gateway.sent_with

    async def work() -> None:
        for refund_id in (claimed, recorded):
            assert await ledger.claims.claim(
                refund_id, Task("run-1", 0, 1), environment=environment, sent_with=sent_with, token_seconds=60
            )
        await ledger.records.record(recorded, Verdict(Outcome.REJECTED, "Declined.", 400, "bad-request"), 1)
        await ledger.pauses.pause("*", "The bank called.")

    world.run(work())
    world.ledger_engine.dispose()
    crash(server)
    assert world.row(claimed)["status"] == "sending"
    assert world.row(recorded)["status"] == "rejected"
    assert list(world.paused()) == ["*"]


def test_a_server_that_does_not_write_to_the_disk_is_neither_migrated_nor_used(
    world: World, server: PostgresServer
) -> None:
    server.create_database("another")
    with server.connect() as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
        eventually(
            lambda: connection.execute("SHOW fsync").fetchone() == ("off",),
            "the server has read its settings",
        )
    with pytest.raises(MigrationRefused, match="runs with `fsync = off`"):
        migrate(server.url("another"))
    with pytest.raises(LedgerError, match="runs with `fsync = off`"):
        world.run(world.ledger.check())
