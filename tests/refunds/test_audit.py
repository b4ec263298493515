"""The audit trail: nobody changes, removes or inserts an event unnoticed."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import pytest
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.pool import NullPool

from include.refunds.audit import Audited, Head, verify_audit
from include.refunds.ledger import LedgerEngine
from tests.refunds.conftest import World
from tests.refunds.test_cli import cli
from tests.refunds.test_roles import command, fill


def audit(url: URL, *known: Head) -> Audited:
    return asyncio.run(verify_audit(LedgerEngine(url, pool_size=0), known))


@pytest.fixture
def trail(ledger_url: URL) -> Iterator[Engine]:
    """A ledger with three seals, the last of one event, and with an event that is not sealed yet."""
    engine = create_engine(ledger_url, poolclass=NullPool)
    with engine.begin() as connection:
        fill(connection)
    rolled_back(engine)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for most in (10, 20_000):
            connection.exec_driver_sql(f"SELECT FROM refund_ledger.seal({most})")
        for _ in range(2):
            connection.exec_driver_sql(EVENT)
            connection.exec_driver_sql("SELECT FROM refund_ledger.seal()")
        connection.exec_driver_sql(EVENT)
    yield engine
    engine.dispose()


EVENT = "INSERT INTO refund_ledger.refund_events (event, actor) VALUES ('contradiction', 'ann')"


def rolled_back(engine: Engine) -> None:
    """Leave a number that no event has."""
    with engine.connect() as connection:
        connection.exec_driver_sql(EVENT)
        connection.rollback()


# -- what is found -----------------------------------------------------------------------------------------

COPY = """INSERT INTO refund_ledger.refund_events (id, at, event, refund_id, actor, login)
    VALUES ({}, now(), 'contradiction', 1, 'ann', 'ann')"""
CHANGED = r"Seal 1 \(events 1 to 10\) does not match its hash: one of these events was changed, or the seal\."
HOLE = "(SELECT lower(pending) FROM refund_ledger.event_seals WHERE number = 3)"

# What is done, and the findings.
TAMPERED: dict[str, tuple[str, str]] = {
    **{
        f"{column} of an event": (
            f"UPDATE refund_ledger.refund_events SET {column} = {value} WHERE id = 3",
            CHANGED,
        )
        for column, value in {
            "at": "at + interval '1 microsecond'",
            "event": "'reverse'",
            "refund_id": "2",
            "from_status": "'held'",
            "to_status": "'review'",
            "actor": "'ann'",
            "login": "'ann'",
            "reason": "''",
            "detail": "'{}'",
        }.items()
    },
    "from one column into the next": (
        "UPDATE refund_ledger.refund_events SET actor = actor || left(login, 1), login = substr(login, 2) WHERE id = 3",
        CHANGED,
    ),
    "an event removed": (
        "DELETE FROM refund_ledger.refund_events WHERE id = 3",
        r"Event 3 was removed after seal 1 had sealed it\.",
    ),
    "two events removed": (
        "DELETE FROM refund_ledger.refund_events WHERE id IN (3, 4)",
        r"Events 3 to 4 were removed after seal 1 had sealed them\..*",
    ),
    "another id": (
        COPY.format(1_000_000) + "; DELETE FROM refund_ledger.refund_events WHERE id = 3",
        r"Event 3 was removed after seal 1 had sealed it\. Event 1000000 was inserted next to the trail: .*",
    ),
    "inserted with a number that was not drawn": (
        COPY.format(1_000_000),
        r"Event 1000000 was inserted next to the trail: no seal holds it, and none will\.",
    ),
    "inserted with a number before the first": (
        COPY.format(-1),
        r"Event -1 was inserted next to the trail: .*",
    ),
    "inserted with a number that was given up": (
        COPY.format(HOLE),
        r"Event \d+ was inserted next to the trail: no seal holds it, and none will\.",
    ),
    "the first seal removed": (
        "DELETE FROM refund_ledger.event_seals WHERE number = 1",
        r"Seal 1 was removed\.",
    ),
    "two seals removed": (
        "DELETE FROM refund_ledger.event_seals WHERE number IN (2, 3)",
        r"Seals 2 to 3 were removed\.",
    ),
    "a seal removed and the others renumbered": (
        "DELETE FROM refund_ledger.event_seals WHERE number = 2; "
        "UPDATE refund_ledger.event_seals SET number = number - 1 WHERE number > 2",
        r"Seal 2 \(events .*\) does not match its hash: .* Seal 2 does not follow from the seal before it\..*",
    ),
    **{
        f"{column} of a seal": (
            f"UPDATE refund_ledger.event_seals SET {column} = {value} WHERE number = 2",
            r"Seal 2 \(events .*\) does not match its hash: .*",
        )
        for column, value in {
            "position": "position + 1",
            "events": "events - '{[12,13)}'",
            "pending": "'{[1,2)}'",
            "next_event": "next_event + 1",
            "pending_until": "'1'",
            "cluster": "1",
            "sealed_at": "sealed_at - interval '1 second'",
            "hash": "sha256('')",
        }.items()
    },
    "an event moved to another seal": (
        "UPDATE refund_ledger.event_seals SET events = events - '{[10,11)}' WHERE number = 1; "
        "UPDATE refund_ledger.event_seals SET events = events + '{[10,11)}' WHERE number = 2",
        r"Seal 1 \(events 1 to 9\) does not match its hash: .*",
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
    statements, finding = TAMPERED[what]
    tamper(trail, statements)
    found = audit(trail.url).findings
    # The replay may find something of the same event.
    assert re.match(finding, " ".join(found)), found


def no_seal(head: Head) -> str:
    return f"No seal ends with the head {head}: events up to this one were removed, or sealed again."


def seal_again(engine: Engine, first: int) -> None:
    """Take the seals from one on away and seal their events again, as somebody could who owns the database."""
    tamper(engine, f"DELETE FROM refund_ledger.event_seals WHERE number >= {first}")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for most in (10, 20_000, 1):
            connection.exec_driver_sql(f"SELECT FROM refund_ledger.seal({most})")


def test_seals_that_were_made_again_are_found_by_a_head_that_was_kept(trail: Engine) -> None:
    kept = audit(trail.url).head
    assert kept is not None
    shown = command(trail.url, "verify-audit", "--head", str(kept))
    assert shown == f"{kept.position} events, head {kept}, 1 more not sealed yet: intact.\n"

    tamper(trail, "UPDATE refund_ledger.refund_events SET actor = 'somebody else' WHERE id = 3")
    seal_again(trail, 1)
    # By themselves they fit; that is why heads are kept elsewhere.
    assert audit(trail.url).findings == []
    found = command(trail.url, "verify-audit", "--head", str(kept), "--json", exit_code=1)
    assert json.loads(found)["findings"] == [no_seal(kept)]
    # One of them may end at the same event.
    ends = audit(trail.url).head
    assert ends is not None
    other = Head(ends.position, kept.hash)
    assert audit(trail.url, other).findings == [no_seal(other)]


def test_a_trail_whose_end_was_cut_off_is_found_by_a_head_that_was_kept(trail: Engine) -> None:
    kept = audit(trail.url).head
    assert kept is not None
    # The last events of the trail are no refund's.
    tamper(
        trail,
        "DELETE FROM refund_ledger.event_seals WHERE number = 4",
        "DELETE FROM refund_ledger.refund_events WHERE id >= "
        "(SELECT next_event FROM refund_ledger.event_seals WHERE number = 3)",
    )
    assert audit(trail.url).findings == []
    assert audit(trail.url, kept).findings == [no_seal(kept)]


def test_what_is_no_head_is_refused_with_a_sentence(trail: Engine) -> None:
    refused = cli("verify-audit", "--head", "12:xyz", ledger=trail.url)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "'12:xyz' is no head of the audit trail" in refused.stderr


# -- the untouched trail -----------------------------------------------------------------------------------


def test_a_large_trail_is_read_in_batches(trail: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = audit(trail.url)
    monkeypatch.setattr("include.refunds.audit._EVENTS_AT_ONCE", 1)
    monkeypatch.setattr("include.refunds.audit._SEALS_AT_ONCE", 2)
    assert audit(trail.url) == whole


def test_reports_show_the_head_of_the_trail(world: World, ledger_url: URL) -> None:
    world.send(world.released())
    world.run(world.ledger.seals.seal())
    head = audit(ledger_url).head
    assert head is not None
    assert f"Audit trail: {head.position} events, head {head}" in command(ledger_url, "status")
