"""A ledger that was restored from a real backup, before and after `restored`; and without it."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import URL

from demo.postgres import HOST, PostgresServer
from include.refunds.audit import verify_audit
from include.refunds.keys import default_order_id, idempotency_key
from include.refunds.ledger import LedgerError
from include.refunds.report import status_report
from include.refunds.restored import Restored, restored
from include.refunds.verify import RangeError
from tests.refunds.conftest import World
from tests.refunds.test_cli import cli
from tests.refunds.test_follow_up import set_at_payroc
from tests.refunds.test_resolve import direct

TERMINALS = itertools.count(1)


@pytest.fixture(autouse=True)
def terminal(world: World, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give each test a terminal of its own: Payroc remembers what other tests paid."""
    name = f"86{next(TERMINALS):06}"
    approve = world.approve
    monkeypatch.setattr(
        world,
        "approve",
        lambda ending="4321", **columns: approve(ending, processing_terminal_id=name, **columns),
    )
    return name


class Backup:
    """
    A backup of the ledger by ``pg_dump``, and its restore by ``pg_restore``.

    :param at: when it was made.
    """

    def __init__(self, postgres: PostgresServer, url: URL, file: Path) -> None:
        self._postgres = postgres
        self._url = url
        self._file = file
        self.at = datetime.now(UTC)
        self._run("pg_dump", "--format=custom", f"--file={file}", str(url.database))

    def restore(self) -> None:
        self._run("pg_restore", "--clean", "--if-exists", f"--dbname={self._url.database}", str(self._file))

    def _run(self, program: str, *arguments: str) -> None:
        where = [
            f"--host={HOST}",
            f"--port={self._url.port}",
            f"--username={self._url.username}",
            "--no-password",
        ]
        env = {**os.environ, "PGPASSWORD": str(self._url.password)}
        subprocess.run(
            [self._postgres.program(program), *where, *arguments],
            env=env,
            check=True,
            capture_output=True,
        )


@pytest.fixture
def back_up(postgres: PostgresServer, ledger_url: URL, tmp_path: Path) -> Callable[[], Backup]:
    return lambda: Backup(postgres, ledger_url, tmp_path / "backup")


def restore(world: World, backup: Backup) -> None:
    world.ledger_engine.dispose()
    backup.restore()


def restoring(world: World, backup_at: datetime, *, accept: bool = False) -> Coroutine[Any, Any, Restored]:
    return restored(
        backup_at,
        "The disk was lost.",
        source=world.source,
        ledger=world.ledger,
        gateway=world.gateway,
        cipher=world.cipher,
        settings=world.settings,
        accept_not_understood=accept,
    )


def run_restored(world: World, backup_at: datetime, *, accept: bool = False) -> Restored:
    return world.run(restoring(world, backup_at, accept=accept))


class Day:
    """What happened around a backup: three refunds that it knows, in different states, and one that it does not know."""

    def __init__(self, world: World, back_up: Callable[[], Backup]) -> None:
        self.world = world
        self.before = world.released()
        world.send(self.before)
        self.approved = str(world.approve())
        world.pull()
        self.released = world.released()
        self.held = world.released()
        with world.ledger_engine.begin() as connection:
            connection.exec_driver_sql(
                f"UPDATE refund_ledger.refund_states SET status = 'held', holds = '{{by hand}}' WHERE refund_id = {self.held}"
            )
        self.unknown = world.released("9003")
        self.declined = world.released("9001")
        self.backup = back_up()
        self.lost = world.approve()
        world.pull()
        world.run(world.ledger.decisions.unhold(self.held, "A look was taken."))
        world.release("run-2")
        for which in self.sent:
            world.send(int(world.row(which)["id"]))
        self.at_payroc = {which: self._refund_at_payroc(which) for which in self.sent}

    @property
    def sent(self) -> tuple[str | int, ...]:
        """What was sent after the backup; the last one was not even pulled when it was made."""
        return (self.approved, self.released, self.held, self.unknown, self.declined, self.lost)

    def _refund_at_payroc(self, which: str | int) -> str:
        (found,) = self.world.sandbox.get(f"/_sandbox/refunds?orderId={self.world.row(which)['order_id']}")[
            "refunds"
        ]
        return str(found["refundId"])

    def assert_paid_once(self) -> None:
        for which in (self.before, *self.sent):
            assert self.world.paid(int(self.world.row(which)["id"])) == 1


def test_a_restored_ledger_takes_over_what_payroc_has_and_nothing_is_paid_twice(
    world: World, back_up: Callable[[], Backup]
) -> None:
    day = Day(world, back_up)
    restore(world, day.backup)
    assert world.row(day.approved)["status"] == "approved"
    assert world.rows("SELECT FROM refund_ledger.refunds WHERE source_ref = :ref", ref=day.lost) == []

    found = run_restored(world, day.backup.at)
    assert found.pulled.new == 1
    assert {item.after.id for item in found.taken_over} == {world.row(which)["id"] for which in day.sent}
    assert found.comparison.differences == []
    for which in day.sent:
        row = world.row(which)
        expected = "rejected" if which == day.declined else "accepted"
        assert (row["status"], row["payroc_refund_id"]) == (expected, day.at_payroc[which])

    # Nothing goes out before a person says so, and afterwards there is nothing to send.
    assert list(world.paused()) == ["*"]
    assert world.run(world.ledger.pauses.resume("*", "Ledger and Payroc agree."))
    world.pull()
    assert world.release("run-3") == []
    day.assert_paid_once()
    world.write_back()
    assert world.source_row(day.lost)["status"] == "accepted"
    assert world.run(verify_audit(world.ledger.engine)).findings == []


def test_without_that_command_the_run_takes_over_what_payroc_has_and_pauses(
    world: World, back_up: Callable[[], Backup]
) -> None:
    day = Day(world, back_up)
    restore(world, day.backup)
    # The backup was made a few days ago.
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("UPDATE refund_ledger.terminals SET read_to = read_to - interval '3 days'")
    world.pull()
    assert world.release("run-3") == []
    for which in day.sent:
        row = world.row(which)
        expected = "rejected" if which == day.declined else "accepted"
        assert (row["status"], row["payroc_refund_id"]) == (expected, day.at_payroc[which])
    assert list(world.paused()) == ["*"]
    day.assert_paid_once()


def test_without_that_command_the_keys_protect_what_a_backup_of_today_has_forgotten(
    world: World, back_up: Callable[[], Backup]
) -> None:
    day = Day(world, back_up)
    restore(world, day.backup)
    world.pull()
    for refund_id in world.release("run-3"):
        world.send(refund_id)
    for which in (day.approved, day.released, day.unknown, day.lost):
        row = world.row(which)
        assert (row["status"], row["payroc_refund_id"]) == ("accepted", day.at_payroc[which])
    # It waits as it did when the backup was made, until the list is read.
    assert world.row(day.held)["status"] == "held"
    world.follow_up()
    assert world.row(day.held)["status"] == "accepted"
    assert list(world.paused()) == ["*"]
    day.assert_paid_once()


def test_nobody_resumes_before_the_comparison_has_come_to_its_end(
    world: World, back_up: Callable[[], Backup], monkeypatch: pytest.MonkeyPatch
) -> None:
    refund_id = world.released()
    backup = back_up()
    world.send(refund_id)
    restore(world, backup)
    monkeypatch.setattr(type(world.gateway), "list_refunds", property(lambda _: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run_restored(world, backup.at)
    with pytest.raises(
        LedgerError,
        match=r"not compared with Payroc since: run `python -m include\.refunds restored` to its end first",
    ):
        world.run(world.ledger.pauses.resume("*", "It looks fine."))
    monkeypatch.undo()
    # The second time nobody has to remember when the backup was made.
    found = run_restored(world, datetime.now(UTC))
    assert found.since <= backup.at
    assert [item.after.id for item in found.taken_over] == [refund_id]
    assert world.run(world.ledger.pauses.resume("*", "Now it is."))


def test_what_differs_from_the_request_is_not_taken_over_but_goes_to_people(
    world: World, back_up: Callable[[], Backup]
) -> None:
    refund_id = world.released()
    backup = back_up()
    direct(
        world,
        refund_id,
        fields=[{"name": "refundKey", "value": str(world.row(refund_id)["idempotency_key"])}],
        amount=1,
    )
    restore(world, backup)
    found = run_restored(world, backup.at)
    assert world.row(refund_id)["status"] == "review"
    assert any("differs from Payroc's refund" in item.sentence for item in found.comparison.differences)


def test_what_neither_ledger_nor_source_knows_any_more_is_named(
    world: World, back_up: Callable[[], Backup]
) -> None:
    kept = world.released()
    backup = back_up()
    lost = world.released()
    world.send(lost)
    payroc_refund_id, order_id = (world.row(lost)[name] for name in ("payroc_refund_id", "order_id"))
    world.change_source(world.row(lost)["source_ref"], "withdrawn_at = now()")
    restore(world, backup)
    found = run_restored(world, backup.at)
    sentence = f"Payroc's refund {payroc_refund_id} (order {order_id}) carries a key of ours that the ledger does not have."
    assert [item.sentence for item in found.comparison.differences] == [sentence]
    assert world.row(kept)["status"] == "released"


def test_a_later_status_at_payroc_is_taken_over_too(world: World, back_up: Callable[[], Backup]) -> None:
    refund_id = world.released()
    backup = back_up()
    world.send(refund_id)
    set_at_payroc(world, refund_id, "complete")
    restore(world, backup)
    run_restored(world, backup.at)
    assert world.row(refund_id)["status"] == "settled"


def test_what_was_taken_over_counts_for_limits_as_if_it_had_passed_the_gate(
    world: World, back_up: Callable[[], Backup], terminal: str
) -> None:
    account = {"account_number": f"5566{terminal}4321"}
    world.limit(duplicate_days=7, day_total=6000)
    first = world.approve(**account)
    world.pull()
    backup = back_up()
    world.release("run-1")
    world.send(int(world.row(first)["id"]))
    restore(world, backup)
    run_restored(world, backup.at)
    assert world.run(world.ledger.pauses.resume("*", "Compared."))
    duplicate, other = world.approve(**account), world.approve()
    world.pull()
    world.release("run-2")
    # The first took 49.99 of the day's 60.00.
    assert [world.row(ref)["status"] for ref in (duplicate, other)] == ["held", "approved"]
    assert f"possible duplicate of refund {world.row(first)['id']}" in world.row(duplicate)["reason"]


def test_a_refund_whose_reissue_the_ledger_has_forgotten_goes_to_people_instead_of_being_paid_beside_it(
    world: World, back_up: Callable[[], Backup]
) -> None:
    refund_id = world.released()
    backup = back_up()
    row = world.row(refund_id)
    key = str(idempotency_key(world.settings.source, f"{row['source_ref']}/2"))
    reissue = direct(
        world, refund_id, fields=[{"name": "refundKey", "value": key}], orderId=default_order_id(UUID(key))
    )
    restore(world, backup)
    run_restored(world, backup.at)
    row = world.row(refund_id)
    assert (row["status"], world.posts(refund_id)) == ("review", 0)
    assert (
        row["reason"]
        == f"Payroc's refund {reissue} is a reissue of this one, which the ledger has forgotten since its backup."
    )


def test_of_two_at_a_time_only_the_one_that_began_last_ends_the_restore(world: World) -> None:
    backup_at = datetime.now(UTC)
    first = world.run(world.ledger.pauses.begin_restore(backup_at - timedelta(hours=1), "The disk was lost."))
    second = world.run(world.ledger.pauses.begin_restore(backup_at, "It was begun again."))
    assert second.since == first.since
    with pytest.raises(LedgerError, match="Another `restored` was begun after this one"):
        world.run(world.ledger.pauses.end_restore(first.number, "Compared."))
    with pytest.raises(LedgerError, match="not compared with Payroc since"):
        world.run(world.ledger.pauses.resume("*", "Compared."))
    world.run(world.ledger.pauses.end_restore(second.number, "Compared."))
    assert world.run(world.ledger.pauses.resume("*", "Compared."))
    assert world.paused() == {}


def test_a_look_up_that_fails_leaves_the_comparison_open(world: World, back_up: Callable[[], Backup]) -> None:
    # It never reached Payroc, so no list shows it, and it is looked up by itself.
    refund_id = world.released("9004")
    world.send(refund_id)
    backup = back_up()
    restore(world, backup)
    world.fault(refund_id, "status", "list", status=503)
    with pytest.raises(
        LedgerError, match="1 look-ups or lists failed at Payroc, so not everything is known: run it again"
    ):
        run_restored(world, backup.at)
    with pytest.raises(LedgerError, match="not compared with Payroc since"):
        world.run(world.ledger.pauses.resume("*", "It looks fine."))
    run_restored(world, backup.at)
    assert world.run(world.ledger.pauses.resume("*", "Now it is."))


def test_what_was_paused_when_the_backup_was_made_says_so_beside_the_restore(
    world: World, back_up: Callable[[], Backup]
) -> None:
    world.run(world.ledger.pauses.pause("*", "the bank called"))
    backup = back_up()
    restore(world, backup)
    run_restored(world, backup.at)
    assert world.paused() == {"*": "the bank called"}
    report = world.run(status_report(world.ledger.engine, world.settings.source))
    first, second = (sentence for sentence in report.unfinished if "is paused by" in sentence)
    assert "is paused by test: The ledger was restored from a backup of " in first
    assert second.endswith("is paused by test: the bank called")


def test_a_backup_of_the_future_is_a_mistake(world: World) -> None:
    with pytest.raises(RangeError, match="is in the future"):
        run_restored(world, datetime.now(UTC) + timedelta(hours=2))
    assert world.paused() == {}


def test_the_command_says_what_it_did_and_resume_is_refused_until_it_ran(
    world: World, back_up: Callable[[], Backup], ledger_url: URL, source_url: URL
) -> None:
    day = Day(world, back_up)
    restore(world, day.backup)
    arguments = (
        "restored",
        "--backup-at",
        day.backup.at.isoformat(),
        "--by",
        "ann",
        "--reason",
        "the disk was lost",
    )
    connection = source_url.set(drivername="postgres").render_as_string(hide_password=False)
    done = cli(*arguments, ledger=ledger_url, AIRFLOW_CONN_REFUNDS_SOURCE=connection)
    assert done.returncode == 0, done.stderr
    assert "1 refunds were pulled anew; 6 were taken over from Payroc." in done.stdout
    assert f"Refund {day.released} " in done.stdout
    assert "The ledger and Payroc agree." in done.stdout
    resumed = cli("resume", "--by", "bob", "--reason", "compared", ledger=ledger_url)
    assert (resumed.returncode, resumed.stdout) == (0, "Sending has resumed.\n")
