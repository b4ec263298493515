"""Which ledgers `migrate` makes, changes and refuses, and with which rights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import URL, create_engine, text

from demo.postgres import PostgresServer
from include.refunds import migrations
from include.refunds.migrations import MigrationRefused, migrate
from include.refunds.revision import REVISION
from include.refunds.roles import AUDITOR, MIGRATOR, OPERATOR, PAYER, ROLES, RolesMissing
from tests.conftest import SCRATCH, Login
from tests.patience import eventually
from tests.refunds.test_cli import cli
from tests.support.catalog import catalog

A_REFUND = """
    INSERT INTO refund_ledger.refund_instructions (source, source_ref, source_ref_folded,
        processing_terminal_id, order_id, description, amount, currency, payee_last4, payee_fingerprint,
        request_sha256, requested_by, requested_by_folded, approved_by, approved_by_folded, approved_at,
        idempotency_key, created_at)
    VALUES ('shop', 'one', 'one', '7701001', 'one', 'Refund', 4999, 'USD', '4321', repeat('a', 64),
        repeat('b', 64), 'ann', 'ann', 'bob', 'bob', now(), refund_ledger.refund_key('shop', 'one'), now())"""
OLD_REVISIONS = ("0001", "0013")

# -- which ledgers ---------------------------------------------------------------------------------------------------------


def test_a_second_migrate_changes_nothing(postgres: PostgresServer) -> None:
    postgres.create_database("migrated_twice")
    url = postgres.url("migrated_twice")
    assert migrate(url) == REVISION
    with postgres.connect("migrated_twice") as connection:
        connection.execute(A_REFUND)
        before = catalog(connection)
        assert migrate(url) == REVISION
        assert catalog(connection) == before
        assert connection.execute("SELECT source_ref FROM refund_ledger.refunds").fetchall() == [("one",)]


@pytest.mark.parametrize("revision", OLD_REVISIONS)
@pytest.mark.parametrize("command", ["status", "migrate"])
def test_a_ledger_of_a_version_before_1_0_is_refused_in_one_sentence(
    postgres: PostgresServer, revision: str, command: str
) -> None:
    name = f"ledger_of_{revision}_for_{command}"
    postgres.create_database(name)
    with postgres.connect(name) as connection:
        connection.execute("CREATE SCHEMA refund_ledger")
        connection.execute(f"CREATE TABLE refund_ledger.schema_version AS SELECT '{revision}' AS version_num")
        connection.execute("CREATE TABLE refund_ledger.refunds AS SELECT 1 AS id")
        before = catalog(connection)
        refused = cli(command, ledger=postgres.url(name))
        assert (refused.returncode, refused.stdout, refused.stderr) == (
            2,
            "",
            f"The ledger is at revision {revision}, which a version before 1.0 made, and stays as it is: finish its "
            "refunds with that version, and start this one with a new, empty ledger database; for the demo run "
            "`make reset`.\n",
        )
        assert catalog(connection) == before
        assert connection.execute("SELECT version_num FROM refund_ledger.schema_version").fetchall() == [
            (revision,)
        ]


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


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that adds one more migration, called ``later``, which executes a statement."""

    def add(statement: str) -> None:
        (tmp_path / "later.py").write_text(
            f"from alembic import op\nrevision, down_revision = 'later', {REVISION!r}\n"
            f"def upgrade():\n    op.execute({statement!r})\n"
        )
        config = migrations._config()
        config.set_main_option(
            "version_locations", f"{Path(migrations.__file__).parent / 'versions'}{os.pathsep}{tmp_path}"
        )
        config.set_main_option("path_separator", "os")
        monkeypatch.setattr(migrations, "_config", lambda: config)

    return add


def test_a_ledger_whose_refunds_break_a_new_rule_is_left_as_it_is(
    postgres: PostgresServer, later: Callable[[str], None]
) -> None:
    postgres.create_database("ledger_of_large_refunds")
    url = postgres.url("ledger_of_large_refunds")
    migrate(url)
    with postgres.connect("ledger_of_large_refunds") as connection:
        connection.execute(A_REFUND)
        later(
            "ALTER TABLE refund_ledger.refund_instructions ADD CONSTRAINT refunds_are_small CHECK (amount < 100)"
        )
        with pytest.raises(MigrationRefused, match="break the rule refunds_are_small of this version"):
            migrate(url)
        assert connection.execute("SELECT version_num FROM refund_ledger.schema_version").fetchall() == [
            (REVISION,)
        ]


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
    bare_server: PostgresServer, later: Callable[[str], None]
) -> None:
    url = owner(bare_server, "founder", "CREATEROLE")
    done = cli("migrate", "--demo-source", ledger=url, source=url)
    assert (done.returncode, done.stderr) == (0, "")
    assert roles(bare_server) == len(ROLES)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(A_REFUND))
        connection.execute(text("UPDATE refund_ledger.refund_states SET status = 'cancelled'"))
    engine.dispose()

    # Another database of the server, whose owner was granted the roles instead.
    second = owner(bare_server, "second")
    with bare_server.connect() as connection:
        connection.execute(f"GRANT {', '.join(ROLES)} TO second")
        connection.execute("CREATE ROLE migrating LOGIN PASSWORD 'migrating' IN ROLE refunds_migrator")
        connection.execute("GRANT CONNECT ON DATABASE founder TO migrating")
    assert migrate(second) == REVISION

    later(
        "CREATE TABLE refund_ledger.later (id bigint); ALTER TABLE refund_ledger.refund_states ADD later text"
    )
    assert migrate(url.set(username="migrating", password="migrating")) == "later"
    with bare_server.connect("founder") as connection:
        assert connection.execute(
            "SELECT tableowner FROM pg_tables WHERE tablename = 'later'"
        ).fetchone() == (MIGRATOR,)


def test_a_login_of_another_role_can_not_migrate(ledger_url: URL, login: Login) -> None:
    with pytest.raises(RolesMissing, match="migrate as one that is granted refunds_migrator"):
        migrate(login(ledger_url, AUDITOR))


# -- who may connect -------------------------------------------------------------------------------------------------------


def connect(url: URL, statement: str = "SELECT 1") -> None:
    conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(conninfo) as connection:
        connection.execute(statement)


@pytest.mark.parametrize("role", [PAYER, OPERATOR, AUDITOR])
def test_a_login_of_a_ledger_beside_it_can_not_connect(
    postgres: PostgresServer, ledger_url: URL, login: Login, role: str
) -> None:
    name = f"production_without_{role}"
    postgres.create_database(name)
    sentences: list[str] = []
    migrate(postgres.url(name), say=sentences.append)
    assert [sentence.partition(":")[0] for sentence in sentences] == [
        f"Only logins that are granted CONNECT on the database {name} may connect to it from now on"
    ]
    # Roles belong to the server, so this login of the test ledger has the same one here.
    theirs = login(ledger_url, role, f"{role}_of_the_test_ledger").set(database=name)
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        connect(theirs)
    own = login(postgres.url(name), role, f"{role}_of_production")
    connect(own)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        connect(own, "CREATE TEMP TABLE mine (id bigint)")
    migrate(postgres.url(name), say=sentences.append)
    assert len(sentences) == 1


def test_a_database_with_tables_of_others_stays_open_and_migrate_says_what_to_do(
    postgres: PostgresServer, ledger_url: URL, login: Login
) -> None:
    postgres.create_database("shop_with_a_ledger")
    url = postgres.url("shop_with_a_ledger")
    with postgres.connect("shop_with_a_ledger") as connection:
        connection.execute("CREATE TABLE orders (id bigint)")
    migrated = cli("migrate", ledger=url)
    assert "holds other tables too" in migrated.stdout
    assert "`REVOKE CONNECT, TEMPORARY ON DATABASE shop_with_a_ledger FROM PUBLIC`" in migrated.stdout
    connect(login(ledger_url, AUDITOR).set(database="shop_with_a_ledger"))


def test_a_migrator_who_does_not_own_the_database_is_told_who_can_close_it(
    postgres: PostgresServer, login: Login
) -> None:
    postgres.create_database("opened_again")
    migrate(postgres.url("opened_again"))
    with postgres.connect() as connection:
        connection.execute("GRANT CONNECT ON DATABASE opened_again TO PUBLIC")
    sentences: list[str] = []
    migrate(login(postgres.url("opened_again"), MIGRATOR, "later_migrations"), say=sentences.append)
    assert "it belongs to another login" in sentences[0]


def test_two_first_migrations_at_once_both_end_well(postgres: PostgresServer) -> None:
    postgres.create_database("migrated_by_two")
    url = postgres.url("migrated_by_two")
    with (
        postgres.connect("migrated_by_two") as connection,
        postgres.connect() as observer,
        ThreadPoolExecutor(2) as pool,
    ):
        with connection.transaction():
            connection.execute("CREATE SCHEMA refund_ledger")
            both = [pool.submit(cli, "migrate", ledger=url) for _ in range(2)]
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'migrated_by_two' AND wait_event_type = 'Lock'"
            eventually(lambda: observer.execute(waiting).fetchone() == (2,), "both wait for the schema")
            connection.execute("DROP SCHEMA refund_ledger")
        assert [migration.result().returncode for migration in both] == [0, 0]
