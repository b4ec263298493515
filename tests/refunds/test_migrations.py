"""A ledger of an earlier version becomes one of this version, with all that it holds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, Connection, create_engine, text

from demo.postgres import PostgresServer
from include.refunds import migrations
from include.refunds.audit import Audited, verify_audit
from include.refunds.ledger import LedgerEngine
from include.refunds.migrations import migrate
from include.refunds.revision import REVISION
from include.refunds.roles import AUDITOR, MIGRATOR, ROLES, RolesMissing
from tests.conftest import SCRATCH, Login
from tests.refunds.test_cli import cli

A_REFUND = """
    INSERT INTO refund_ledger.refunds (source, source_ref, processing_terminal_id, order_id, description, amount, currency, payee_last4,
        payee_fingerprint, request, request_sha256, requested_by, approved_by, approved_at, idempotency_key,
        created_at, updated_at{})
    VALUES ('shop', :ref, '7701001', :ref, 'Refund', 4999, 'USD', '4321', repeat('a', 64), 'sealed', repeat(md5(:ref), 2), 'ann', 'bob',
        now(), gen_random_uuid(), now(), now(){})"""
FOLDED = (", source_ref_folded, requested_by_folded, approved_by_folded", ", :ref, 'ann', 'bob'")
# What a refund goes through, statement by statement.
_UPDATE = "UPDATE refund_ledger.refunds SET {} WHERE source_ref = '{}'"
WAYS = {
    "approved": (),
    "held": (_UPDATE.format("status = 'held'", "held"),),
    "paid": (
        _UPDATE.format(
            "status = 'released', released_by = 'x', released_run = 'run-1', released_at = now()", "paid"
        ),
        _UPDATE.format(
            "status = 'sending', attempts = 1, first_sent_at = now(), sent_with = 'x', lease_until = now(), next_attempt_at = now()",
            "paid",
        ),
        "INSERT INTO refund_ledger.refund_attempts SELECT id, 1, 'run-1', 0, 1, now(), now(), 201, NULL, 'accepted' "
        "FROM refund_ledger.refunds WHERE source_ref = 'paid'",
        _UPDATE.format(
            "status = 'accepted', payroc_refund_id = 'ABCDEFGHIJ', payroc_status = 'ready'", "paid"
        ),
    ),
}
REVISIONS = tuple(f"{number:04}" for number in range(1, int(REVISION)))
TABLES = ("refunds", "refund_attempts", "refund_events", "refund_runs", "refund_control", "invalid_rows")


def fill(connection: Connection, revision: str) -> None:
    """Put refunds, an attempt, events, a run and an invalid row into a ledger of any revision."""
    for ref, statements in WAYS.items():
        a_refund = A_REFUND.format(*(FOLDED if revision >= "0013" else ("", "")))
        connection.execute(text(a_refund), {"ref": ref})
        for statement in statements:
            # From then on the ledger knows what a refund is held for.
            known = (
                statement.replace("'held' WHERE", "'held', holds = '{by hand}' WHERE")
                if revision >= "0003"
                else statement
            )
            connection.execute(text(known))
    connection.execute(
        text("""
            INSERT INTO refund_ledger.refund_runs (run_id, params, candidates, candidate_totals, candidates_hash, started_at)
            VALUES ('run-1', '{}', 1, '{}', 'hash', now())""")
    )
    connection.execute(
        text(
            "INSERT INTO refund_ledger.refund_events (at, event, actor, reason) VALUES (now(), 'pause', 'ann', 'a \"reason\"')"
        )
    )
    connection.execute(
        text("INSERT INTO refund_ledger.invalid_rows VALUES ('shop', 'three', '{}', now(), now(), now())")
    )


def audit(url: URL) -> Audited:
    async def work() -> Audited:
        engine = LedgerEngine(url)
        try:
            return await verify_audit(engine)
        finally:
            await engine.dispose()

    return asyncio.run(work())


@pytest.mark.parametrize("old", REVISIONS)
def test_a_ledger_of_an_earlier_revision_is_brought_to_this_one_and_keeps_all_its_rows(
    postgres: PostgresServer, old: str
) -> None:
    postgres.create_database(f"ledger_of_{old}")
    url = postgres.url(f"ledger_of_{old}")
    assert migrate(url, old) == old
    engine = create_engine(url)
    with engine.begin() as connection:
        fill(connection, old)
        columns = {
            table: ", ".join(connection.execute(text(f"SELECT * FROM refund_ledger.{table} LIMIT 0")).keys())
            for table in TABLES
        }

    def everything() -> list[list[tuple[object, ...]]]:
        with engine.connect() as connection:
            queries = [
                text(f"SELECT {names} FROM refund_ledger.{table} ORDER BY 1, 2")
                for table, names in columns.items()
            ]
            return [[tuple(row) for row in connection.execute(query)] for query in queries]

    before = everything()
    assert all(before)
    assert migrate(url) == REVISION
    assert everything() == before
    with engine.connect() as connection:
        released = text(
            "SELECT source_ref, first_released_at = released_at, first_released_run, holds FROM refund_ledger.refunds ORDER BY id"
        )
        assert [tuple(row) for row in connection.execute(released)] == [
            ("approved", None, None, []),
            # Nobody knows what for; people release or cancel it as any other.
            ("held", None, None, ["by hand"]),
            ("paid", True, "run-1", []),
        ]
    audited = audit(url)
    assert (audited.events, audited.findings) == (len(before[TABLES.index("refund_events")]), [])
    assert migrate(url) == REVISION
    engine.dispose()


def test_a_ledger_that_a_later_version_has_migrated_is_refused_and_left_as_it_is(ledger_url: URL) -> None:
    engine = create_engine(ledger_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE refund_ledger.schema_version SET version_num = '9999'"))
    for command in ("status", "migrate"):
        refused = cli(command, ledger=ledger_url)
        said = f"The ledger is at revision 9999, and this version knows {REVISION} at most: install the version that migrated it.\n"
        assert (refused.returncode, refused.stderr) == (2, said)
    with engine.connect() as connection:
        assert (
            connection.execute(text("SELECT version_num FROM refund_ledger.schema_version")).scalar_one()
            == "9999"
        )
    engine.dispose()


# -- who may migrate -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_server() -> Iterator[PostgresServer]:
    """A server without the roles; they belong to a server and not to a database."""
    with PostgresServer(SCRATCH / "bare-postgres", fast=True) as server:
        yield server


def owner(server: PostgresServer, name: str, attributes: str = "") -> URL:
    """Return the URL of a database for the login that owns it."""
    with server.connect() as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{name}' {attributes}")
        connection.execute(f"CREATE DATABASE {name} OWNER {name}")
    return server.url(name).set(username=name, password=name)


def roles(server: PostgresServer) -> int:
    with server.connect() as connection:
        return len(connection.execute("SELECT FROM pg_roles WHERE rolname LIKE 'refunds%'").fetchall())


def test_a_login_without_the_right_is_told_who_can_and_nothing_is_half_done(
    bare_server: PostgresServer,
) -> None:
    url = owner(bare_server, "plain")
    failed = cli("migrate", "--demo-source", ledger=url, source=url)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("The database roles (refunds_requester, ")
    assert "let a login with CREATEROLE run this command once" in failed.stderr
    with bare_server.connect("plain") as connection:
        assert connection.execute("SELECT to_regnamespace('refund_ledger')").fetchone() == (None,)
    assert roles(bare_server) == 0
    stranger = cli(
        "migrate",
        ledger=bare_server.url("plain").set(username="plain", password="plain", database="postgres"),
    )
    assert (stranger.returncode, stranger.stderr.count("\n")) == (2, 1)
    assert "This login may not make or change the schema refund_ledger" in stranger.stderr


def test_a_database_owner_who_may_create_roles_makes_them_and_may_do_all_as_before_and_a_migrator_goes_on_without_that_right(
    bare_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = owner(bare_server, "founder", "CREATEROLE")
    done = cli("migrate", "--demo-source", ledger=url, source=url)
    assert (done.returncode, done.stderr) == (0, "")
    assert roles(bare_server) == len(ROLES)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(A_REFUND.format(*FOLDED)), {"ref": "one"})
        connection.execute(text("UPDATE refund_ledger.refunds SET status = 'cancelled'"))
    engine.dispose()

    # Another database of the server, whose owner was granted the roles instead.
    second = owner(bare_server, "second")
    with bare_server.connect() as connection:
        connection.execute(f"GRANT {', '.join(ROLES)} TO second")
        connection.execute("CREATE ROLE migrating LOGIN PASSWORD 'migrating' IN ROLE refunds_migrator")
    assert migrate(second) == REVISION

    (tmp_path / "later.py").write_text(
        "from alembic import op\nrevision, down_revision = 'later', '" + REVISION + "'\n"
        "def upgrade():\n    op.execute('CREATE TABLE refund_ledger.later (id bigint); ALTER TABLE refund_ledger.refunds ADD later text')\n"
    )
    config = migrations._config()
    config.set_main_option(
        "version_locations", f"{Path(migrations.__file__).parent / 'versions'}{os.pathsep}{tmp_path}"
    )
    config.set_main_option("path_separator", "os")
    monkeypatch.setattr(migrations, "_config", lambda: config)
    assert migrate(url.set(username="migrating", password="migrating")) == "later"
    with bare_server.connect("founder") as connection:
        assert connection.execute(
            "SELECT tableowner FROM pg_tables WHERE tablename = 'later'"
        ).fetchone() == (MIGRATOR,)


def test_a_login_of_another_role_can_not_migrate(ledger_url: URL, login: Login) -> None:
    with pytest.raises(RolesMissing, match="migrate as one that is granted refunds_migrator"):
        migrate(login(ledger_url, AUDITOR))
