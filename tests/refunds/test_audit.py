"""The audit trail: nobody changes, removes or inserts an event unnoticed."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import URL, Engine, create_engine, text
from sqlalchemy.pool import NullPool

from include.refunds.audit import Audited, Head, event_hash, verify_audit
from include.refunds.ledger import LedgerEngine
from tests.refunds.conftest import World
from tests.refunds.test_cli import cli
from tests.refunds.test_roles import IDS, command, fill

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def audit(url: URL, *known: Head) -> Audited:
    return asyncio.run(verify_audit(LedgerEngine(url, pool_size=0), known))


@pytest.fixture
def trail(ledger_url: URL) -> Iterator[Engine]:
    """A ledger with some events."""
    engine = create_engine(ledger_url, poolclass=NullPool)
    with engine.begin() as connection:
        fill(connection)
    yield engine
    engine.dispose()


# -- the hash --------------------------------------------------------------------------------------------------------------

# Postgres has no text with NUL in it, and takes no half of a surrogate pair.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
instants = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - the zone follows
details = st.none() | st.dictionaries(
    texts, texts | st.integers() | st.none() | st.booleans() | st.lists(texts, max_size=2), max_size=3
)


@settings(deadline=None, max_examples=100)
@given(
    previous=st.just("") | st.binary(min_size=32, max_size=32).map(bytes.hex),
    event_id=st.integers(1, 2**63 - 1),
    at=instants,
    refund_id=st.none() | st.integers(1, 2**63 - 1),
    words=st.tuples(*[texts | st.none()] * 6),
    detail=details,
)
def test_python_and_the_database_compute_the_same_hash(
    shared_ledger: URL,
    previous: str,
    event_id: int,
    at: datetime,
    refund_id: int | None,
    words: tuple[str | None, ...],
    detail: dict[str, object] | None,
) -> None:
    event, from_status, to_status, actor, login, reason = words
    query = text("""
        SELECT refund_ledger.event_hash(:previous, e), (e).detail::text
        FROM (SELECT ROW(:id, :at, :event, :refund_id, :from_status, :to_status, :actor, :reason, CAST(:detail AS jsonb), :login)
              ::refund_ledger.refund_events AS e) AS events""")
    values = {
        "previous": previous,
        "id": event_id,
        "at": at,
        "event": event,
        "refund_id": refund_id,
        "from_status": from_status,
    }
    values |= {
        "to_status": to_status,
        "actor": actor,
        "reason": reason,
        "login": login,
        "detail": None if detail is None else json.dumps(detail),
    }
    with engine_of(shared_ledger).connect() as connection:
        found, detail_text = connection.execute(query, values).one()
    microseconds = (at - EPOCH) // timedelta(microseconds=1)
    numbers = (str(event_id), str(microseconds), str(refund_id) if refund_id else None)
    fields = [
        numbers[0],
        numbers[1],
        event,
        numbers[2],
        from_status,
        to_status,
        actor,
        login,
        reason,
        detail_text,
    ]
    assert event_hash(previous, fields) == found


_engines: dict[URL, Engine] = {}


def engine_of(url: URL) -> Engine:
    return _engines.setdefault(url, create_engine(url))


# -- what is found ---------------------------------------------------------------------------------------------------------

LAST = "(SELECT max(id) FROM refund_ledger.refund_events)"
COPY = """INSERT INTO refund_ledger.refund_events (id, at, event, refund_id, actor, login) OVERRIDING SYSTEM VALUE
    VALUES ({id}, now(), 'contradiction', 1, 'ann', 'ann')"""

CHANGED = r"Event 3 of the trail \(id 3\) was changed or inserted\."

# What is done, and the findings. After one that was swapped or moved, those next to it do not fit either.
TAMPERED: dict[str, tuple[str, str]] = {
    "at": ("UPDATE refund_ledger.refund_events SET at = at + interval '1 microsecond' WHERE id = 3", CHANGED),
    "event": ("UPDATE refund_ledger.refund_events SET event = 'reverse' WHERE id = 3", CHANGED),
    "refund_id": ("UPDATE refund_ledger.refund_events SET refund_id = 2 WHERE id = 3", CHANGED),
    "from_status": ("UPDATE refund_ledger.refund_events SET from_status = 'held' WHERE id = 3", CHANGED),
    "to_status": ("UPDATE refund_ledger.refund_events SET to_status = 'held' WHERE id = 3", CHANGED),
    "actor": ("UPDATE refund_ledger.refund_events SET actor = 'ann' WHERE id = 3", CHANGED),
    "login": ("UPDATE refund_ledger.refund_events SET login = 'ann' WHERE id = 3", CHANGED),
    "no login": ("UPDATE refund_ledger.refund_events SET login = NULL WHERE id = 3", CHANGED),
    "reason": ("UPDATE refund_ledger.refund_events SET reason = '' WHERE id = 3", CHANGED),
    "detail": ("UPDATE refund_ledger.refund_events SET detail = '{}' WHERE id = 3", CHANGED),
    "from one field into the next": (
        "UPDATE refund_ledger.refund_events SET actor = actor || left(login, 1), login = substr(login, 2) WHERE id = 3",
        CHANGED,
    ),
    "another id": (
        COPY.format(id=1_000_000) + "; DELETE FROM refund_ledger.refund_events WHERE id = 3",
        r"Event 3 of the trail \(id 3\) was removed\. Event with the id 1000000 was inserted beside the trail\.",
    ),
    "removed": (
        "DELETE FROM refund_ledger.refund_events WHERE id = 3",
        r"Event 3 of the trail \(id 3\) was removed\.",
    ),
    "removed with its hash": (
        "DELETE FROM refund_ledger.refund_event_chain WHERE event_id = 3; DELETE FROM refund_ledger.refund_events WHERE id = 3",
        r"Event 3 of the trail was removed\.",
    ),
    "several removed with their hashes": (
        "DELETE FROM refund_ledger.refund_event_chain WHERE event_id IN (3, 4); DELETE FROM refund_ledger.refund_events WHERE id IN (3, 4)",
        r"Events 3 to 4 of the trail were removed\. Refund 3 is held, and its last event says nothing\.",
    ),
    "removed and renumbered": (
        "DELETE FROM refund_ledger.refund_event_chain WHERE event_id = 3; DELETE FROM refund_ledger.refund_events WHERE id = 3; "
        "UPDATE refund_ledger.refund_event_chain SET position = position + 1000000 WHERE position > 3; "
        "UPDATE refund_ledger.refund_event_chain SET position = position - 1000001 WHERE position > 1000000",
        r"Event 3 of the trail \(id 4\) was changed or inserted\..*",
    ),
    "inserted": (COPY.format(id=1_000_000), r"Event with the id 1000000 was inserted beside the trail\."),
    "inserted with a hash": (
        COPY.format(id=1_000_000)
        + "; INSERT INTO refund_ledger.refund_event_chain SELECT max(position) + 1, 1000000, repeat('0', 64) "
        "FROM refund_ledger.refund_event_chain",
        r"Event \d+ of the trail \(id 1000000\) was changed or inserted\..*",
    ),
    "inserted into the middle": (
        "UPDATE refund_ledger.refund_event_chain SET position = position + 1000000 WHERE position > 3; "
        "UPDATE refund_ledger.refund_event_chain SET position = position - 999999 WHERE position > 1000000; "
        + COPY.format(id=1_000_000)
        + "; INSERT INTO refund_ledger.refund_event_chain SELECT 4, 1000000, refund_ledger.event_hash(chain.hash, e) "
        "FROM refund_ledger.refund_event_chain AS chain, refund_ledger.refund_events AS e WHERE chain.position = 3 AND e.id = 1000000",
        r"Event 5 of the trail \(id 4\) was changed or inserted\..*",
    ),
    "swapped": (
        "UPDATE refund_ledger.refund_event_chain SET position = position + 1000000 WHERE position IN (3, 4); "
        "UPDATE refund_ledger.refund_event_chain SET position = 1000007 - position WHERE position > 1000000",
        r"Event 3 of the trail \(id 4\) was changed or inserted\. Event 4 of the trail \(id 3\) was changed .*",
    ),
    "a hash": (
        "UPDATE refund_ledger.refund_event_chain SET hash = repeat('0', 64) WHERE position = 3",
        rf"{CHANGED} Event 4 of the trail \(id 4\) was changed or inserted\.",
    ),
    "a status without its event": (
        "UPDATE refund_ledger.refunds SET status = 'cancelled' WHERE id = 1",
        "Refund 1 is cancelled, and its last event says approved.",
    ),
    "the last events of a refund": (
        "DELETE FROM refund_ledger.refund_event_chain WHERE position >= (SELECT min(position) FROM refund_ledger.refund_event_chain "
        "JOIN refund_ledger.refund_events AS e ON e.id = event_id WHERE e.refund_id = {review} AND to_status = 'review'); "
        "DELETE FROM refund_ledger.refund_events WHERE NOT EXISTS (SELECT FROM refund_ledger.refund_event_chain WHERE event_id = id)",
        "Refund {review} is review, and its last event says sending.",
    ),
}


def tamper(engine: Engine, *statements: str) -> None:
    """As whoever owns the database: past all triggers."""
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        for statement in statements:
            connection.exec_driver_sql(statement)


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_tampered_with_is_found(trail: Engine, what: str) -> None:
    assert audit(trail.url).findings == []
    statements, finding = (part.replace("{review}", str(IDS["review"])) for part in TAMPERED[what])
    tamper(trail, statements)
    found = audit(trail.url).findings
    assert re.fullmatch(finding, " ".join(found)), found


def rewrite_the_chain(engine: Engine) -> None:
    """Make the hashes fit again, as somebody could who owns the database and knows how."""
    with engine.connect() as connection:
        rows = (
            connection.exec_driver_sql(
                "SELECT position FROM refund_ledger.refund_event_chain ORDER BY position"
            )
            .scalars()
            .all()
        )
    tamper(
        engine,
        *(
            "UPDATE refund_ledger.refund_event_chain AS chain SET hash = refund_ledger.event_hash(COALESCE((SELECT hash FROM "
            f"refund_ledger.refund_event_chain WHERE position = {position - 1}), ''), e) FROM refund_ledger.refund_events AS e "
            f"WHERE e.id = chain.event_id AND position = {position}"
            for position in rows
        ),
    )


def test_a_trail_that_was_written_anew_is_found_by_a_head_that_was_kept(trail: Engine) -> None:
    kept = str(audit(trail.url).head)
    with trail.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.refunds SET status = 'cancelled' WHERE id = {IDS['approved']}"
        )
    position = int(kept.split(":")[0])
    shown = command(trail.url, "verify-audit", "--head", kept)
    assert shown == f"{position + 1} events, head {audit(trail.url).head}: intact.\n"

    tamper(trail, "UPDATE refund_ledger.refund_events SET actor = 'somebody else' WHERE id = 3")
    rewrite_the_chain(trail)
    # By itself it fits; that is why heads are kept elsewhere.
    assert audit(trail.url).findings == []
    found = command(trail.url, "verify-audit", "--head", kept, "--json", exit_code=1)
    assert json.loads(found)["findings"] == [
        f"Event {position} of the trail has another hash than the one that was kept of it."
    ]


def test_a_trail_whose_end_was_cut_off_is_found_by_a_head_that_was_kept(trail: Engine) -> None:
    kept = audit(trail.url).head
    assert kept is not None
    # The last events of the trail are no refund's: a pause, a limit, what the ledger is bound to.
    tamper(
        trail,
        f"DELETE FROM refund_ledger.refund_event_chain WHERE position = {kept.position}",
        f"DELETE FROM refund_ledger.refund_events WHERE id = {LAST}",
    )
    assert audit(trail.url).findings == []
    sentence = (
        f"The trail ends before event {kept.position}, which was its end once: later events were removed."
    )
    assert audit(trail.url, kept).findings == [sentence]


def test_what_is_no_head_is_refused_with_a_sentence(trail: Engine) -> None:
    refused = cli("verify-audit", "--head", "12:xyz", ledger=trail.url)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "'12:xyz' is no head of the audit trail" in refused.stderr


# -- the untouched trail -----------------------------------------------------------------------------------------------------------


def test_events_of_one_transaction_and_of_its_savepoints_are_all_chained_and_those_rolled_back_are_not(
    trail: Engine,
) -> None:
    before = audit(trail.url).head
    event = "INSERT INTO refund_ledger.refund_events (at, event, actor, reason) VALUES (now(), 'resume', 'ann', '{}')"
    with trail.begin() as connection:
        connection.exec_driver_sql(event.format("first"))
        with connection.begin_nested():
            connection.exec_driver_sql(event.format("in a savepoint"))
        with suppress(ZeroDivisionError), connection.begin_nested():
            connection.exec_driver_sql(event.format("rolled back"))
            raise ZeroDivisionError
        connection.exec_driver_sql(event.format("last"))
    audited = audit(trail.url)
    assert audited.findings == []
    assert before is not None
    assert audited.head is not None
    assert audited.head.position == before.position + 3


def test_many_writers_at_once_leave_one_trail_without_gap_and_never_wait_for_one_another_in_a_circle(
    trail: Engine,
) -> None:
    # One row's lock per transaction, taken before, between or after its events, so that only the trail could close a circle.
    locks = [f"SELECT FROM refund_ledger.refunds WHERE id = {number} FOR UPDATE" for number in IDS.values()]
    locks += ["SELECT FROM refund_ledger.refund_control FOR UPDATE"]
    an_event = "INSERT INTO refund_ledger.refund_events (at, event, actor, reason) VALUES (now(), 'contradiction', 'ann', 'x')"
    before = audit(trail.url).events
    conninfo = trail.url.set(drivername="postgresql").render_as_string(hide_password=False)

    def write(seed: int) -> int:
        rng, written = random.Random(seed), 0
        with psycopg.connect(conninfo) as connection:
            for _ in range(50):
                events = rng.randint(1, 4)
                statements = [an_event] * events
                statements.insert(rng.randint(0, events), rng.choice(locks))
                for statement in statements:
                    connection.execute(statement)
                if rng.random() < 0.2:
                    connection.rollback()
                else:
                    connection.commit()
                    written += events
        return written

    with ThreadPoolExecutor(8) as pool:
        written = sum(pool.map(write, range(8)))
    found = audit(trail.url)
    assert (found.events, found.findings) == (before + written, [])
    assert found.head is not None
    assert found.head.position == found.events


def test_reports_show_the_head_of_the_trail(world: World, ledger_url: URL) -> None:
    world.send(world.released())
    head = audit(ledger_url).head
    assert head is not None
    assert f"Audit trail: {head.position} events, head {head}" in command(ledger_url, "status")
