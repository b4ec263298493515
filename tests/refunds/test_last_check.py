"""A claim is short, and only the last check makes it long: what was never sent is another worker's after two minutes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from include.refunds.ledger import Claim, Ledger, LedgerEngine, LedgerUnavailable, Selection, Task
from include.refunds.ledger import claims as ledger_claims
from include.refunds.ledger.claims import CLAIM_LEASE
from include.refunds.ledger.connection import Connection
from include.refunds.send import Sent
from tests.patience import eventually
from tests.refunds.conftest import Death, Intercepted, World, die
from tests.refunds.test_ledger_rules import force
from tests.refunds.test_reissue import reissued

TOKEN_SECONDS = 3600
MINUTES = 1 / 60


def claim(world: World, refund_id: int) -> Claim | None:
    return world.run(
        world.ledger.claims.claim(
            refund_id,
            Task("run-1", 0, 1),
            environment=world.gateway.environment,
            sent_with=world.gateway.sent_with,
            token_seconds=TOKEN_SECONDS,
        )
    )


def claimed(world: World, refund_id: int) -> Claim:
    found = claim(world, refund_id)
    assert found is not None
    return found


def attempt(world: World, refund_id: int) -> dict[str, Any]:
    return world.rows("SELECT * FROM refund_ledger.refund_attempts WHERE refund_id = :id", id=refund_id)[-1]


def looked_up(world: World, refund_id: int) -> int:
    order_id = world.row(refund_id)["order_id"]
    return int(world.sandbox.get(f"/_sandbox/requests?operation=list&orderId={order_id}")["count"])


# -- how long ----------------------------------------------------------------------------------------------------------


def test_a_claim_takes_two_minutes_and_its_last_check_the_fence(world: World) -> None:
    refund_id = world.released()
    found = claimed(world, refund_id)
    row, began = world.row(refund_id), attempt(world, refund_id)["started_at"]
    assert row["lease_until"] == row["next_attempt_at"] == began + CLAIM_LEASE
    fence = began + timedelta(seconds=TOKEN_SECONDS + world.settings.lease_margin_seconds)
    assert (row["fence_until"], row["first_sent_at"], row["sent_with"]) == (fence, None, None)
    assert attempt(world, refund_id)["posting_at"] is None

    assert world.run(world.ledger.claims.may_post(found, 60.0))
    row, posting_at = world.row(refund_id), attempt(world, refund_id)["posting_at"]
    assert row["lease_until"] == row["fence_until"] == fence
    assert row["first_sent_at"] == posting_at >= began
    assert row["sent_with"] == world.gateway.sent_with


def test_what_was_claimed_and_never_sent_is_another_workers_after_two_minutes(world: World) -> None:
    refund_id = world.released()
    claimed(world, refund_id)
    world.hours_ahead = 1.9 * MINUTES
    assert claim(world, refund_id) is None
    world.hours_ahead = 2.1 * MINUTES
    assert claimed(world, refund_id).attempt == 2


def test_what_may_have_been_sent_is_nobodys_until_its_fence(world: World) -> None:
    refund_id = world.released()
    with pytest.raises(Death):
        world.send(refund_id, Intercepted(world.gateway, before=die))
    world.hours_ahead = 1.1
    assert claim(world, refund_id) is None
    world.hours_ahead = 1.2
    assert claimed(world, refund_id).history.unresolved


def test_a_token_that_ends_sooner_than_two_minutes_ends_the_claim(world: World) -> None:
    refund_id = world.released()
    world.run(
        world.ledger.claims.claim(
            refund_id,
            Task("run-1", 0, 1),
            environment=world.gateway.environment,
            sent_with=world.gateway.sent_with,
            token_seconds=30 - world.settings.lease_margin_seconds,
        )
    )
    row = world.row(refund_id)
    assert row["lease_until"] == row["fence_until"]


# -- what was never sent -----------------------------------------------------------------------------------------------


def test_an_attempt_that_never_passed_its_last_check_counts_for_nothing(world: World) -> None:
    refund_id = world.released()
    claimed(world, refund_id)
    world.hours_ahead = 3 * MINUTES
    history = claimed(world, refund_id).history
    assert (history.posted, history.unresolved) == (False, False)
    assert world.attempts(refund_id) == ["not_sent", None]
    world.hours_ahead = 6 * MINUTES
    # As a first attempt: nothing can be at Payroc, so nothing is looked up.
    assert world.send(refund_id).sent is Sent.ACCEPTED
    assert (world.posts(refund_id), looked_up(world, refund_id)) == (1, 0)


def test_a_worker_whose_refund_was_claimed_by_another_one_sends_nothing(world: World) -> None:
    refund_id = world.released()
    first = claimed(world, refund_id)
    world.hours_ahead = 3 * MINUTES
    second = claimed(world, refund_id)
    assert not world.run(world.ledger.claims.may_post(first, 60.0))
    assert world.run(world.ledger.claims.may_post(second, 60.0))


def test_a_worker_whose_refund_was_taken_back_by_a_run_sends_nothing(world: World) -> None:
    refund_id = world.released()
    found = claimed(world, refund_id)
    world.hours_ahead = 3 * MINUTES
    world.run(world.ledger.runs.return_stale_releases())
    # It has the number of this attempt still, and may be released again by then.
    assert world.row(refund_id)["attempts"] == found.attempt
    assert not world.run(world.ledger.claims.may_post(found, 60.0))


def test_what_was_claimed_and_never_sent_passes_the_gate_again(world: World) -> None:
    stands, withdrawn = world.released(), world.released()
    for refund_id in (stands, withdrawn):
        claimed(world, refund_id)
    world.change_source(world.row(withdrawn)["source_ref"], "withdrawn_at = now()")
    world.hours_ahead = 3 * MINUTES
    assert world.run(world.ledger.runs.due()) == []
    world.run(world.ledger.runs.return_stale_releases())
    assert world.attempts(stands) == ["not_sent"]
    world.pull()
    assert [world.row(item)["status"] for item in (stands, withdrawn)] == ["released", "approved"]
    assert world.release("run-2") == [stands]


def test_a_claim_that_was_never_sent_ends_with_its_release(world: World) -> None:
    refund_id = world.released()
    claimed(world, refund_id)
    world.hours_ahead = 25
    assert claim(world, refund_id) is None
    assert world.run(world.ledger.runs.return_stale_releases()) == 1
    assert world.row(refund_id)["status"] == "approved"


# -- what the claim asks for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "otherwise",
    ["payroc_refund_id = 'ABCDEFGHIJ'", "status = 'accepted', payroc_refund_id = 'ABCDEFGHIJ'"],
    ids=["released", "accepted"],
)
def test_what_payroc_holds_is_never_claimed(world: World, otherwise: str) -> None:
    refund_id = world.released()
    force(world, refund_id, otherwise)
    assert claim(world, refund_id) is None


def test_a_wait_that_is_longer_than_the_lease_is_waited_for(world: World) -> None:
    refund_id = world.released("9003")
    assert world.send(refund_id).sent is Sent.UNKNOWN
    force(world, refund_id, "lease_until = now(), next_attempt_at = now() + interval '1 hour'")
    assert claim(world, refund_id) is None
    world.hours_ahead = 1.1
    assert claimed(world, refund_id).attempt == 2


# -- what the last check asks for --------------------------------------------------------------------------------------


def test_a_last_check_asks_whether_the_token_lasts(world: World) -> None:
    refund_id = world.released()
    found = claimed(world, refund_id)
    # The lease has long ended, and nobody else has come: the token decides.
    world.hours_ahead = 0.9
    assert world.run(world.ledger.claims.may_post(found, 60.0))
    assert not world.run(world.ledger.claims.may_post(found, 600.0))


def test_a_last_check_that_took_long_is_made_again(world: World, ledger_url: Any) -> None:
    refund_id = world.released()
    found = claimed(world, refund_id)
    times = iter((0.0, 11.0, 11.0))

    def monotonic() -> float:
        now = next(times)
        if now and not world.paused():
            world.run(world.ledger.pauses.pause("*", "The bank called."))
        return now

    engine = LedgerEngine(ledger_url, pool_size=0)
    slow = Ledger(engine, world.settings, actor="test", monotonic=ThreadedClock(monotonic))
    assert not world.run(slow.claims.may_post(found, 60.0))
    assert list(times) == []


class ThreadedClock:
    """A clock that works in a thread of its own, where it may use an event loop."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read

    def __call__(self) -> float:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._read).result()


def test_a_last_check_whose_commit_fails_is_no_permission(world: World) -> None:
    refund_id = world.released()
    with world.ledger_engine.begin() as connection:
        connection.execute(
            text("""
                CREATE FUNCTION pg_temp_fail() RETURNS trigger LANGUAGE plpgsql AS
                    $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;
                CREATE CONSTRAINT TRIGGER fails AFTER UPDATE OF posting_at ON refund_ledger.refund_attempts
                    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pg_temp_fail()""")
        )
    try:
        with pytest.raises(LedgerUnavailable):
            world.send(refund_id)
    finally:
        with world.ledger_engine.begin() as connection:
            connection.execute(text("DROP FUNCTION pg_temp_fail() CASCADE"))
    assert world.posts(refund_id) == 0
    assert world.row(refund_id)["status"] == "sending"


# -- while another transaction has the row ------------------------------------------------------------------------------

Begin = Callable[[], Coroutine[Any, Any, object]]


def while_its_row_is_locked(
    world: World, refund_id: int, begin: Begin, meanwhile: Callable[[], object]
) -> object:
    """Return what a call returns that may wait for the refund's row, while something else is committed."""
    lock = f"SELECT FROM refund_ledger.refund_states WHERE refund_id = {refund_id} FOR NO KEY UPDATE"
    waiting = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'"""
    with ThreadPoolExecutor(1) as thread, world.ledger_engine.connect() as other:
        other.exec_driver_sql(lock)
        work = thread.submit(lambda: world.run(begin()))
        with world.ledger_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as looking:
            eventually(lambda: work.done() or looking.exec_driver_sql(waiting).scalar_one(), "it waits")
        meanwhile()
        other.rollback()
        return work.result()


def pause(world: World) -> Callable[[], object]:
    return lambda: world.run(world.ledger.pauses.pause("*", "The bank called."))


def as_one_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the mistake: nothing is locked before the UPDATE, which so waits for the row itself."""
    execute = Connection.execute

    async def without_lock(self: Connection, statement: str, values: Any = None) -> Any:
        return await execute(self, statement.replace("FOR NO KEY UPDATE SKIP LOCKED", ""), values)

    async def no_lock(_: Connection, refund_ids: list[int], *rest: Any, now: datetime) -> dict[int, datetime]:
        return dict.fromkeys(refund_ids, now)

    monkeypatch.setattr(Connection, "execute", without_lock)
    monkeypatch.setattr(ledger_claims, "lock", no_lock)


def test_a_claim_that_waited_for_its_row_sees_the_pause_of_meanwhile(world: World) -> None:
    refund_id = world.released()
    assert while_its_row_is_locked(world, refund_id, claiming(world, refund_id), pause(world)) is None


def test_a_claim_in_one_statement_would_miss_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refund_id = world.released()
    as_one_statement(monkeypatch)
    assert while_its_row_is_locked(world, refund_id, claiming(world, refund_id), pause(world)) is not None


def test_a_claim_that_waited_for_its_row_sees_what_became_of_the_refund_that_it_replaces(
    world: World,
) -> None:
    old = world.released("9002")
    world.send(old)
    new = reissued(world, old)
    world.release("run-2", Selection())

    def turns_out_paid() -> None:
        with world.ledger_engine.begin() as connection:
            connection.exec_driver_sql(
                f"UPDATE refund_ledger.refund_states SET status = 'review' WHERE refund_id = {old}"
            )

    assert while_its_row_is_locked(world, new, claiming(world, new), turns_out_paid) is None


def test_a_last_check_does_not_wait_for_its_row_and_permits_nothing(world: World) -> None:
    refund_id = world.released()
    found = claimed(world, refund_id)
    check = lambda: world.ledger.claims.may_post(found, 60.0)  # noqa: E731 - of the same form as the others
    assert while_its_row_is_locked(world, refund_id, check, lambda: None) is False
    assert attempt(world, refund_id)["posting_at"] is None


@pytest.mark.parametrize("paused", [False, True], ids=["nothing else", "a pause"])
def test_a_last_check_whose_row_was_locked_is_made_again_once_it_is_free(
    world: World, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    refund_id = world.released()
    found = claimed(world, refund_id)
    execute, checks = Connection.execute, Counter[str]()

    async def counted(self: Connection, statement: str, values: Any = None) -> Any:
        checks["made"] += "SKIP LOCKED" in statement
        return await execute(self, statement, values)

    monkeypatch.setattr(Connection, "execute", counted)

    with ThreadPoolExecutor(1) as thread, world.ledger_engine.connect() as other:
        other.exec_driver_sql(
            f"SELECT FROM refund_ledger.refund_states WHERE refund_id = {refund_id} FOR NO KEY UPDATE"
        )
        work = thread.submit(lambda: world.run(world.ledger.claims.may_post(found, 60.0)))
        eventually(lambda: checks["made"] > 1, "it is checked again")
        if paused:
            pause(world)()
        other.rollback()
        assert work.result() is not paused


def test_a_last_check_in_one_statement_would_miss_a_pause(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    refund_id = world.released()
    found = claimed(world, refund_id)
    as_one_statement(monkeypatch)
    check = lambda: world.ledger.claims.may_post(found, 60.0)  # noqa: E731 - of the same form as the others
    assert while_its_row_is_locked(world, refund_id, check, pause(world)) is True


def claiming(world: World, refund_id: int) -> Begin:
    return lambda: world.ledger.claims.claim(
        refund_id,
        Task("run-1", 0, 1),
        environment=world.gateway.environment,
        sent_with=world.gateway.sent_with,
        token_seconds=TOKEN_SECONDS,
    )


# -- what it costs -----------------------------------------------------------------------------------------------------

WRITTEN = ("lease_until", "first_sent_at", "sent_with", "posting_at")


def test_no_index_has_a_column_that_a_last_check_writes(world: World) -> None:
    query = """
        SELECT i.relname, attname FROM pg_depend
        JOIN pg_class AS i ON i.oid = objid AND i.relkind = 'i'
        JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
        WHERE refobjid IN ('refund_ledger.refund_states'::regclass, 'refund_ledger.refund_attempts'::regclass)"""
    indexed = {row["attname"] for row in world.rows(query)}
    assert {"status", "payroc_refund_id", "run_id"} <= indexed
    assert indexed.isdisjoint(WRITTEN)


def test_no_trigger_fires_on_a_last_check(world: World) -> None:
    refund_id = world.released()
    claimed(world, refund_id)
    updates = {
        "refund_states": "lease_until = fence_until, first_sent_at = now(), sent_with = 'x'",
        "refund_attempts": "posting_at = now()",
    }
    for table, assignments in updates.items():
        explain = f"""
            EXPLAIN (ANALYZE, FORMAT JSON)
            UPDATE refund_ledger.{table} SET {assignments} WHERE refund_id = {refund_id}"""
        with world.ledger_engine.begin() as connection:
            [plan] = connection.exec_driver_sql(explain).scalar_one()
        assert plan["Triggers"] == [], table
