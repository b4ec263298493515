"""Rows of the source that can't be written: each is named and costs itself alone, in real databases."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import URL, create_engine, text

from demo.postgres import PostgresServer
from include.refunds import source_update
from include.refunds.ledger import WriteBack
from include.refunds.message import run_ended
from include.refunds.report import follow_up_report, run_report, status_report
from include.refunds.source import SourceError, SourceUnavailable, SqlSource
from include.refunds.source_update import PARAMETERS, Updated, run_update
from include.refunds.sql_files import read_sql
from include.refunds.summary import as_message, read_summary
from include.refunds.write_back import WrittenBack, write_back
from payroc_airflow.databases import source_of
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world
from tests.refunds.test_cli import cli
from tests.support.mariadb import AirflowMySql, MariaDbServer

# The words of a trigger, which nothing may repeat.
WORDS = "O''Brien, account 55667788, is closed"


def due(world: World, count: int) -> list[str]:
    """Approve and pull refunds, and return their source_refs in the order in which they are written back."""
    refs = [world.approve() for _ in range(count)]
    world.pull()
    return sorted(refs)


def change(world: World, *statements: str) -> None:
    with world.source_engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def written_back(world: World) -> WrittenBack:
    return world.run(write_back(world.source, world.ledger.write_backs))


def written_refs(world: World) -> list[str]:
    with world.source_engine.connect() as connection:
        query = text("SELECT source_ref FROM refund_requests WHERE status IS NOT NULL ORDER BY source_ref")
        return list(connection.execute(query).scalars())


def due_refs(world: World) -> list[str]:
    return [
        item.source_ref
        for failed_before in (False, True)
        for item in world.run(world.ledger.write_backs.due_write_backs(1000, failed_before=failed_before))
    ]


def notes(world: World) -> dict[str, str]:
    rows = world.rows(
        "SELECT source_ref, problem FROM refund_ledger.write_back_notes WHERE problem IS NOT NULL"
    )
    return {row["source_ref"]: row["problem"] for row in rows}


def trigger(body: str, when: str = "BEFORE UPDATE") -> str:
    return (
        "CREATE OR REPLACE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN {body} RETURN NEW; END $$;"
        f"CREATE TRIGGER odd {when} ON refund_requests FOR EACH ROW EXECUTE FUNCTION odd()"
    )


# -- counted row by row -------------------------------------------------------------------------------------


def test_two_rows_touched_for_one_refund_do_not_make_up_for_none_of_another(
    world: World, tmp_path: Path
) -> None:
    first, second, *_ = due(world, 5)
    change(
        world,
        "ALTER TABLE refund_requests ADD COLUMN number text",
        "UPDATE refund_requests SET number = source_ref",
        f"UPDATE refund_requests SET number = '{first}' WHERE source_ref = '{second}'",
    )
    file = tmp_path / "write_back.sql"
    file.write_text("UPDATE refund_requests SET status = :status WHERE number = :source_ref")
    world.source = SqlSource(world.source_engine, write_back=file)
    done = written_back(world)
    assert (done.written, done.doubled, list(done.not_written)) == (4, {first: 2}, [second])
    assert due_refs(world) == [second]
    assert notes(world) == {second: "write_back.sql touched no row: it is gone, or newer."}
    assert f"Source row {first}: the UPDATE of write_back.sql touched 2 rows" in "\n".join(done.sentences())


def test_a_trigger_that_swallows_the_update_of_a_row_leaves_it_due(world: World) -> None:
    refs = due(world, 3)
    change(world, trigger(f"IF NEW.source_ref = '{refs[1]}' THEN RETURN NULL; END IF;"))
    assert list(written_back(world).not_written) == [refs[1]]
    assert due_refs(world) == [refs[1]]


def test_each_row_is_counted_however_many_sources_a_process_has_had(tmp_path: Path) -> None:
    path = tmp_path / "shop.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE refund_requests (source_ref TEXT, status TEXT)")
        connection.execute("INSERT INTO refund_requests VALUES ('a', NULL), ('b', NULL)")
        connection.commit()
    update = tmp_path / "write_back.sql"
    update.write_text("UPDATE refund_requests SET status = :status WHERE source_ref = :source_ref")
    rows = [
        WriteBack(ref, "accepted", None, None, None, datetime(2026, 11, 30, 12, tzinfo=UTC)) for ref in "ab"
    ]
    # A new engine may have the place in memory of one that is gone.
    for _ in range(2000):
        statement = read_sql(update, "sqlite", PARAMETERS)
        engine = create_engine(f"sqlite:///{path}").execution_options()
        assert run_update(engine, statement, rows).written == rows
        engine.dispose()


UPDATED_AT = {
    "whole seconds": "ALTER TABLE refund_requests ALTER COLUMN updated_at TYPE timestamptz(0)",
    "set by a trigger": trigger("NEW.updated_at := clock_timestamp();"),
    "without a zone": "ALTER TABLE refund_requests ALTER COLUMN updated_at TYPE timestamp(0)",
}


@pytest.mark.parametrize("statement", UPDATED_AT.values(), ids=UPDATED_AT)
def test_only_the_row_that_is_gone_is_named_and_the_others_may_be_written_again(
    world: World, statement: str
) -> None:
    refs = due(world, 5)
    change(world, statement, f"DELETE FROM refund_requests WHERE source_ref = '{refs[2]}'")
    # As a write-back that was killed between the commit in the source and the note in the ledger.
    world.run(world.source.write_back(world.run(world.ledger.write_backs.due_write_backs(10))))
    assert written_refs(world) == [ref for ref in refs if ref != refs[2]]
    assert list(written_back(world).not_written) == [refs[2]]
    assert due_refs(world) == [refs[2]]


def test_two_changes_within_a_second_reach_a_column_of_whole_seconds(world: World) -> None:
    change(world, UPDATED_AT["whole seconds"])
    (ref,) = due(world, 1)
    rows = [
        WriteBack(ref, status, None, None, None, datetime(2026, 11, 30, 12, 0, 0, microsecond, tzinfo=UTC))
        for status, microsecond in (("released", 600_000), ("accepted", 900_000))
    ]
    for row in rows:
        assert world.run(world.source.write_back([row])).not_written == []
    assert world.source_row(ref)["status"] == "accepted"


# -- refused rows -------------------------------------------------------------------------------------------

REFUSED = {
    "a trigger": (
        trigger(f"IF NEW.source_ref = '{{ref}}' THEN RAISE EXCEPTION '{WORDS}'; END IF;"),
        "a trigger or function refuses the row (RaiseException, SQLSTATE P0001)",
    ),
    "a trigger that names another error": (
        trigger(
            f"IF NEW.source_ref = '{{ref}}' THEN RAISE EXCEPTION '{WORDS}' USING ERRCODE = '42703'; END IF;"
        ),
        "a column does not exist (UndefinedColumn, SQLSTATE 42703)",
    ),
    "a CHECK": (
        "ALTER TABLE refund_requests ADD CONSTRAINT closed "
        "CHECK (source_ref <> '{ref}' OR status IS NULL) NOT VALID",
        "a constraint refuses the row: closed (CheckViolation, SQLSTATE 23514)",
    ),
    "a short column": (
        "ALTER TABLE refund_requests ADD COLUMN short varchar(4);"
        + trigger("NEW.short := CASE NEW.source_ref WHEN '{ref}' THEN '55667788' END;"),
        "a value is too long for its column (StringDataRightTruncation, SQLSTATE 22001)",
    ),
    "an enum": (
        "CREATE TYPE state AS ENUM ('open'); ALTER TABLE refund_requests ADD COLUMN state state;"
        + trigger("NEW.state := CASE NEW.source_ref WHEN '{ref}' THEN NEW.status END;"),
        "a value does not fit (InvalidTextRepresentation, SQLSTATE 22P02)",
    ),
    "a constraint that is checked at the commit": (
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN IF NEW.source_ref = '{{ref}}' THEN RAISE EXCEPTION '{WORDS}'; END IF; RETURN NEW; END $$; "
        "CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON refund_requests DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION late()",
        "a trigger or function refuses the row (RaiseException, SQLSTATE P0001)",
    ),
    "a policy of rows": (
        "ALTER TABLE refund_requests ENABLE ROW LEVEL SECURITY;"
        "ALTER TABLE refund_requests FORCE ROW LEVEL SECURITY;"
        "CREATE POLICY reads ON refund_requests USING (true) WITH CHECK (source_ref <> '{ref}');"
        "DROP ROLE IF EXISTS shop_clerk; CREATE ROLE shop_clerk LOGIN PASSWORD 'shop_clerk';"
        "GRANT USAGE ON SCHEMA public TO shop_clerk; GRANT SELECT, UPDATE ON refund_requests TO shop_clerk",
        "the login lacks a right (InsufficientPrivilege, SQLSTATE 42501)",
    ),
}


@pytest.fixture
def clerk(world: World) -> Iterator[Callable[[], None]]:
    """A function that lets a login use the source that policies hold for; a superuser is above them."""
    engine = world.source_engine

    def use() -> None:
        world.source = SqlSource(create_engine(engine.url.set(username="shop_clerk", password="shop_clerk")))

    yield use
    with engine.begin() as connection:
        if connection.exec_driver_sql("SELECT FROM pg_roles WHERE rolname = 'shop_clerk'").first():
            connection.exec_driver_sql("DROP OWNED BY shop_clerk; DROP ROLE shop_clerk")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_row_alone_is_not_written_is_named_and_is_written_once_it_may_be(
    world: World, kind: str, clerk: Callable[[], None]
) -> None:
    statement, reason = REFUSED[kind]
    refs = due(world, 5)
    bad = refs[2]
    change(world, statement.replace("{ref}", bad))
    if kind == "a policy of rows":
        clerk()
    done = written_back(world)
    assert (done.written, list(done.not_written), done.trouble) == (4, [bad], None)
    assert written_refs(world) == [ref for ref in refs if ref != bad]
    assert due_refs(world) == [bad]
    assert notes(world) == {bad: f"write_back.sql: {reason}"}
    assert "55667788" not in "\n".join(done.sentences())

    change(
        world,
        "DROP TRIGGER IF EXISTS odd ON refund_requests; DROP TRIGGER IF EXISTS late ON refund_requests;"
        "DROP POLICY IF EXISTS reads ON refund_requests;"
        "ALTER TABLE refund_requests DROP CONSTRAINT IF EXISTS closed;"
        "ALTER TABLE refund_requests DISABLE ROW LEVEL SECURITY",
    )
    assert written_back(world).written == 1
    assert (due_refs(world), notes(world)) == ([], {})


def test_rows_that_are_refused_every_time_keep_no_new_row_from_being_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("include.refunds.write_back._BATCH", 2)
    refused = due(world, 4)
    change(
        world,
        "ALTER TABLE refund_requests ADD CONSTRAINT closed "
        "CHECK (approved_by <> 'bob@example.com' OR status IS NULL) NOT VALID",
    )
    assert list(written_back(world).not_written) == refused
    new = world.approve(approved_by="carla@example.com")
    world.pull()
    assert written_back(world).written == 1
    assert world.source_row(new)["status"] == "approved"


def test_a_statement_that_fails_for_every_row_is_trouble_that_names_the_column(
    world: World,
) -> None:
    refs = due(world, 3)
    change(world, "ALTER TABLE refund_requests DROP COLUMN payroc_status")
    trouble = written_back(world).trouble
    assert isinstance(trouble, SourceError)
    assert not isinstance(trouble, SourceUnavailable)
    assert str(trouble).startswith(
        "write_back.sql failed on the connection refunds_source: a column does not exist: payroc_status "
        "(UndefinedColumn"
    )
    assert due_refs(world) == refs


# -- locks, and a database that goes away -------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PATIENCE", "_SHORT_PATIENCE"):
        monkeypatch.setattr(source_update, name, 0.01)


@contextmanager
def held(world: World, statement: str) -> Iterator[None]:
    """Another session's open transaction."""
    with world.source_engine.connect() as connection:
        connection.exec_driver_sql(statement)
        yield
        connection.rollback()


@contextmanager
def only_reads(postgres: PostgresServer, world: World) -> Iterator[None]:
    """The source as it is for a minute after a failover."""
    change = f"ALTER DATABASE {world.source_engine.url.database} SET default_transaction_read_only"
    with postgres.connect() as connection:
        connection.execute(f"{change} = on")
        world.source_engine.dispose()
        try:
            yield
        finally:
            connection.execute(f"{change} TO DEFAULT")
            world.source_engine.dispose()


@pytest.mark.usefixtures("impatient")
def test_a_locked_row_is_waited_for_briefly_and_the_others_are_written(world: World) -> None:
    refs = due(world, 5)
    with held(world, f"SELECT FROM refund_requests WHERE source_ref = '{refs[1]}' FOR UPDATE"):
        done = written_back(world)
    assert isinstance(done.trouble, SourceUnavailable)
    assert str(done.trouble) == (
        "1 row is not written yet on the connection refunds_source, all others are. "
        f"{refs[1]}: write_back.sql: another session holds a lock (LockNotAvailable, SQLSTATE 55P03)."
    )
    assert written_refs(world) == [ref for ref in refs if ref != refs[1]]
    assert written_back(world).written == 1


@pytest.mark.usefixtures("impatient")
def test_a_locked_table_is_not_tried_row_by_row_to_the_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_update, "_MOST_LOCKED", 2)
    refs = due(world, 5)
    with held(world, "LOCK TABLE refund_requests IN SHARE MODE"):
        done = written_back(world)
    assert isinstance(done.trouble, SourceUnavailable)
    assert list(done.not_written) == refs[:2]
    assert written_back(world).written == 5


def test_a_source_that_only_reads_for_now_is_tried_again(world: World, postgres: PostgresServer) -> None:
    due(world, 3)
    with only_reads(postgres, world):
        done = written_back(world)
    assert isinstance(done.trouble, SourceUnavailable)
    assert (done.written, notes(world)) == (0, {})
    assert written_back(world).written == 3


def test_a_database_that_dies_in_the_middle_costs_no_row(world: World) -> None:
    refs = due(world, 8)
    # A refused row, so that the batch is split; then the end of the session, after the first half.
    change(
        world,
        "CREATE SEQUENCE tries",
        trigger(
            f"IF NEW.source_ref = '{refs[6]}' THEN RAISE EXCEPTION 'no'; END IF;"
            f"IF NEW.source_ref = '{refs[4]}' AND nextval('tries') = 2 THEN "
            "PERFORM pg_terminate_backend(pg_backend_pid()); END IF;"
        ),
    )
    done = written_back(world)
    assert isinstance(done.trouble, SourceUnavailable)
    assert written_refs(world) == refs[:4]
    assert due_refs(world) == refs[4:]
    assert list(written_back(world).not_written) == [refs[6]]
    assert due_refs(world) == [refs[6]]


# -- MariaDB and SQLite -------------------------------------------------------------------------------------

ROWS = [
    WriteBack(
        f"RF-{number}",
        "accepted",
        "JD80BRUT1T",
        "ready",
        None,
        datetime(2026, 11, 2, 14, 30, 0, 700_000, tzinfo=UTC),
    )
    for number in range(1, 6)
]
COLUMNS = (
    "source_ref varchar(64) PRIMARY KEY, status varchar(16), payroc_refund_id varchar(32), "
    "payroc_status varchar(16), reason varchar(255)"
)


def outcome(updated: Updated) -> tuple[list[str], dict[str, str]]:
    return [item.source_ref for item in updated.written], {
        item.source_ref: item.reason for item in updated.not_written
    }


@pytest.fixture
def mysql_table(mysql_url: URL, mysql_source: AirflowMySql) -> URL:
    with create_engine(mysql_url).begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE refund_requests ({COLUMNS}, updated_at datetime)")
        for row in ROWS:
            connection.exec_driver_sql(
                f"INSERT INTO refund_requests (source_ref) VALUES ('{row.source_ref}')"
            )
    return mysql_url


def test_mariadb_leaves_out_a_refused_row_and_one_that_is_gone(mysql_table: URL) -> None:
    with create_engine(mysql_table).begin() as connection:
        connection.exec_driver_sql("DELETE FROM refund_requests WHERE source_ref = 'RF-4'")
        connection.exec_driver_sql(
            "CREATE TRIGGER odd BEFORE UPDATE ON refund_requests FOR EACH ROW BEGIN "
            "IF NEW.source_ref = 'RF-2' THEN "
            f"SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = '{WORDS}'; END IF; END"
        )
    source = source_of()
    refused = "write_back.sql: a trigger refuses the row (OperationalError, error 1644)"
    gone = "write_back.sql touched no row: it is gone, or newer."
    for _ in range(2):
        # The second time nothing changes, and the rows are found all the same.
        written, not_written = outcome(asyncio.run(source.write_back(ROWS)))
        assert written == ["RF-1", "RF-3", "RF-5"]
        assert not_written == {"RF-2": refused, "RF-4": gone}


def test_mariadb_waits_briefly_for_a_locked_row(
    mysql_table: URL, mariadb: MariaDbServer, impatient: None
) -> None:
    with mariadb.connect(str(mysql_table.database)) as clerk:
        clerk.autocommit(False)
        clerk.query("UPDATE refund_requests SET reason = 'x' WHERE source_ref = 'RF-3'")
        updated = asyncio.run(source_of().write_back(ROWS))
        clerk.rollback()
    assert outcome(updated) == (
        ["RF-1", "RF-2", "RF-4", "RF-5"],
        {"RF-3": "write_back.sql: another session holds a lock (OperationalError, error 1205)"},
    )
    assert updated.not_written[0].is_transient


@pytest.fixture
def sqlite_source(tmp_path: Path) -> SqlSource:
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            f"CREATE TABLE refund_requests ({COLUMNS}, updated_at text, "
            "CHECK (source_ref <> 'RF-2' OR status IS NULL))"
        )
        connection.executemany(
            "INSERT INTO refund_requests (source_ref) VALUES (?)", [(row.source_ref,) for row in ROWS]
        )
    return SqlSource(create_engine(f"sqlite:///{path}"))


def test_sqlite_leaves_out_a_refused_row(sqlite_source: SqlSource) -> None:
    assert outcome(asyncio.run(sqlite_source.write_back(ROWS))) == (
        ["RF-1", "RF-3", "RF-4", "RF-5"],
        {"RF-2": "write_back.sql: a constraint refuses the row (IntegrityError, SQLITE_CONSTRAINT_CHECK)"},
    )


@pytest.mark.usefixtures("impatient")
def test_a_locked_sqlite_is_trouble_that_passes(sqlite_source: SqlSource) -> None:
    with closing(sqlite3.connect(str(sqlite_source._engine.url.database))) as other:
        other.execute("BEGIN IMMEDIATE")
        updated = asyncio.run(sqlite_source.write_back(ROWS))
    assert updated.written == []
    assert all(item.is_transient for item in updated.not_written)
    assert len(asyncio.run(sqlite_source.write_back(ROWS)).written) == 4


# -- rows that are offered again ----------------------------------------------------------------------------


def ended(world: World, ending: str = "9002") -> str:
    """Return the source_ref of a refund that was rejected, or accepted, and written back."""
    refund_id = world.released(ending)
    world.send(refund_id)
    world.write_back()
    return str(world.row(refund_id)["source_ref"])


@pytest.mark.parametrize("ending", ["9002", "4321"], ids=["rejected", "accepted"])
def test_a_row_that_is_offered_again_after_its_refund_ended_is_written_again(
    world: World, ending: str
) -> None:
    ref = ended(world, ending)
    status = world.source_row(ref)["status"]
    world.change_source(ref, "status = NULL")
    pulled = world.pull()
    assert (pulled.written_again, pulled.still_offered) == (1, 0)
    assert world.write_back() == (1, [])
    assert world.source_row(ref)["status"] == status
    assert world.pull().written_again == 0


def test_a_row_that_is_offered_again_and_is_invalid_now_is_written_again(world: World) -> None:
    ref = ended(world)
    world.change_source(ref, "status = NULL, routing_number = NULL, account_number = NULL")
    assert world.pull().written_again == 1
    assert world.write_back() == (1, [])
    assert world.source_row(ref)["status"] == "rejected"


def test_a_row_whose_refund_was_reissued_shows_the_reissue_again(world: World) -> None:
    ref = ended(world)
    first = world.row(ref)["id"]
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET session_replication_role = replica")
        connection.execute(
            text("""
                WITH reissue AS (
                    INSERT INTO refund_ledger.refund_instructions (source, source_ref, source_ref_folded,
                        processing_terminal_id, order_id, description, amount, currency, payee_fingerprint,
                        request_sha256, requested_by, requested_by_folded, approved_by, approved_by_folded,
                        approved_at, idempotency_key, replaces, reissue_reason, created_at)
                    SELECT source, source_ref || '/1', source_ref_folded || '/1', processing_terminal_id,
                        order_id || '/1', description, amount, currency, payee_fingerprint, repeat('d', 64),
                        requested_by, requested_by_folded, approved_by, approved_by_folded,
                        approved_at, refund_ledger.refund_key(source, source_ref || '/1'), id, 'x', created_at
                    FROM refund_ledger.refund_instructions WHERE id = :id RETURNING id, replaces
                )
                INSERT INTO refund_ledger.refund_states
                    (refund_id, status, payroc_refund_id, updated_at, written_back_at)
                SELECT id, 'accepted', 'ABCDEFGHIJ', updated_at, updated_at
                FROM reissue JOIN refund_ledger.refund_states ON refund_id = replaces"""),
            {"id": first},
        )
    world.change_source(ref, "status = NULL")
    assert world.pull().written_again == 1
    assert world.write_back() == (1, [])
    assert world.source_row(ref)["status"] == "accepted"


def test_a_source_that_offers_ended_refunds_all_the_time_is_written_once_a_week(world: World) -> None:
    ref = ended(world)
    for days, expected in ((0, (1, 0)), (1, (0, 1)), (2, (0, 1)), (8, (1, 0))):
        world.hours_ahead = 24 * days
        world.change_source(ref, "status = NULL")
        pulled = world.pull()
        assert (pulled.written_again, pulled.still_offered) == expected
        world.write_back()


# -- what people see ----------------------------------------------------------------------------------------


def test_a_row_that_is_not_written_is_in_status_report_message_and_summary(
    world: World, ledger_url: URL
) -> None:
    ref = ended(world)
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET session_replication_role = replica")
        connection.exec_driver_sql("UPDATE refund_ledger.refund_states SET written_back_at = NULL")
    change(world, "DELETE FROM refund_requests")
    assert written_back(world).written == 0
    since = world.rows("SELECT problem_since FROM refund_ledger.write_back_notes")[0][
        "problem_since"
    ].astimezone(UTC)
    sentence = (
        f"Source row {ref} has not been written back since {since:%-d %b %Y %H:%M} UTC: "
        "write_back.sql touched no row: it is gone, or newer."
    )
    for report in (
        world.run(status_report(world.ledger.engine, world.settings.source)),
        world.run(follow_up_report(world.ledger.engine, world.settings.source)),
        world.run(run_report(world.ledger.engine, world.settings.source, "run-1")),
    ):
        assert sentence in report.unfinished
        assert report.as_dict()["unwritten_rows"] == 1
        message = run_ended(report, what="run", failed=True, url="")
        assert message is not None
        assert "1 not written back" in message.subject
        assert sentence in message.text
    done = cli("status", ledger=ledger_url)
    assert (done.returncode, sentence in done.stdout) == (1, True)
    summary = world.run(
        read_summary(
            world.ledger.engine,
            world.settings.source,
            since=since - timedelta(days=1),
            until=since + timedelta(minutes=1),
            timezone="America/New_York",
        )
    )
    message = as_message(summary, url="")
    assert "1 not written back" in message.subject
    local = since.astimezone(ZoneInfo("America/New_York"))
    for shown in (message.text, message.html):
        assert f"Source row {ref} has not been written back since {local:%-d %b %Y %H:%M %Z}" in shown


def test_of_many_rows_that_are_not_written_ten_are_named(world: World) -> None:
    refs = due(world, 12)
    change(world, "DELETE FROM refund_requests")
    written_back(world)
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET session_replication_role = replica")
        connection.exec_driver_sql(
            "UPDATE refund_ledger.refund_states "
            "SET status = 'rejected', attempts = 1, first_sent_at = now(), sent_with = 'x'"
        )
    report = world.run(status_report(world.ledger.engine, world.settings.source))
    named = [sentence for sentence in report.unfinished if "has not been written back" in sentence]
    assert len(named) == 10
    assert all(ref in sentence for ref, sentence in zip(refs, named, strict=False))
    assert "2 more source rows have not been written back." in report.unfinished
    assert report.unwritten == 12


@pytest.mark.parametrize("columns", [{}, {"routing_number": "123456789"}], ids=["approved", "invalid"])
def test_a_deleted_row_of_which_nothing_was_sent_is_a_note_and_makes_no_run_red(
    world: World, columns: dict[str, str]
) -> None:
    ref = world.approve(**columns)
    world.pull()
    change(world, "DELETE FROM refund_requests")
    assert written_back(world).not_written
    report = world.run(status_report(world.ledger.engine, world.settings.source))
    assert (report.unfinished, report.unwritten) == ([], 0)
    assert any(f"Source row {ref} has not been written back" in note for note in report.notes)
