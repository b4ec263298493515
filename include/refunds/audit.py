"""
The audit trail, checked: whether an event was changed, removed or inserted after it was written.

Each event carries a hash of itself and of the hash before it. Whoever owns the tables could write the whole chain anew; so its head is
shown in every report and kept where the ledger's owner has no hand in it, such as Airflow's logs, and may be checked again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from include.refunds.ledger.connection import Connection, LedgerEngine

_BATCH = 5000
_SHOWN = 16  # hex digits of a hash that people keep


class HeadError(Exception):
    """A head of the audit trail can't be read; the message shows a good one."""


@dataclass(frozen=True, slots=True)
class Head:
    """The end of the trail at some time: the position of its last event and the hash there, or the first digits of it."""

    position: int
    hash: str

    def __str__(self) -> str:
        return f"{self.position}:{self.hash[:_SHOWN]}"

    @classmethod
    def read(cls, given: str) -> Head:
        """
        Return the head that people kept.

        :raises HeadError: when it is none.
        """
        found = re.fullmatch(r"(\d{1,18}):([0-9a-f]{16,64})", given.strip())
        if found is None:
            raise HeadError(
                f"{given!r} is no head of the audit trail, such as 1234:9f86d081884c7d65, as reports show it."
            )
        return cls(int(found[1]), found[2])


@dataclass(slots=True)
class Audited:
    """
    What a check of the trail found.

    :param events: how many it has.
    :param head: its end, ``None`` for a trail without events.
    :param findings: what is wrong, one sentence each.
    """

    events: int = 0
    head: Head | None = None
    findings: list[str] = field(default_factory=list)


async def head_of(connection: Connection) -> Head | None:
    """Return the end of the trail."""
    query = "SELECT position, hash FROM refund_ledger.refund_event_chain ORDER BY position DESC LIMIT 1"
    row = (await connection.execute(query)).one_or_none()
    return Head(row.position, row.hash) if row else None


async def verify_audit(engine: LedgerEngine, known: Iterable[Head] = ()) -> Audited:
    """
    Check the whole trail, in one snapshot. It only reads, and an auditor's rights are enough.

    :param known: heads that were kept; the trail has to have been so then.
    """
    audited = Audited()
    expected = {head.position: head.hash for head in known}
    async with engine.begin("repeatable_read", readonly=True) as connection:
        await _check_chain(connection, audited, expected)
        await _check_the_rest(connection, audited)
    end = audited.head.position if audited.head else 0
    for position in sorted(position for position in expected if position > end):
        audited.findings.append(
            f"The trail ends before event {position}, which was its end once: later events were removed."
        )
    return audited


def event_hash(previous: str, fields: Iterable[str | None]) -> str:
    """Return the hash of an event: SHA-256 over the hash before it and the fields, each with its length so that none runs into the next."""
    text_of = ",".join("-" if value is None else f"{len(value.encode())}:{value}" for value in fields)
    return hashlib.sha256((previous + text_of).encode()).hexdigest()


async def _check_chain(connection: Connection, audited: Audited, expected: dict[int, str]) -> None:
    query = """
        SELECT chain.position, chain.hash, chain.event_id, event.id IS NOT NULL AS there,
               ARRAY[event.id::text, (extract(epoch FROM event.at) * 1000000)::bigint::text, event.event, event.refund_id::text,
                     event.from_status, event.to_status, event.actor, event.login, event.reason, event.detail::text] AS fields
        FROM refund_ledger.refund_event_chain AS chain LEFT JOIN refund_ledger.refund_events AS event ON event.id = chain.event_id
        WHERE chain.position > :after ORDER BY chain.position LIMIT :limit"""
    position, previous = 0, ""
    while rows := await connection.execute(query, {"after": position, "limit": _BATCH}):
        for row in rows:
            audited.findings += _findings(row, position, previous)
            if row.position in expected and not row.hash.startswith(expected[row.position]):
                audited.findings.append(
                    f"Event {row.position} of the trail has another hash than the one that was kept of it."
                )
            # From here on the chain counts as it stands, so that one changed event is one finding.
            position, previous = row.position, row.hash
            audited.events += 1
    if position:
        audited.head = Head(position, previous)


def _findings(row: Any, position: int, previous: str) -> list[str]:
    if row.position != position + 1:
        first, last = position + 1, row.position - 1
        return [
            f"Event {first} of the trail was removed."
            if first == last
            else f"Events {first} to {last} of the trail were removed."
        ]
    if not row.there:
        return [f"Event {row.position} of the trail (id {row.event_id}) was removed."]
    if event_hash(previous, row.fields) != row.hash:
        return [f"Event {row.position} of the trail (id {row.event_id}) was changed or inserted."]
    return []


async def _check_the_rest(connection: Connection, audited: Audited) -> None:
    unchained = """
        SELECT event.id FROM refund_ledger.refund_events AS event
        WHERE NOT EXISTS (SELECT FROM refund_ledger.refund_event_chain AS chain WHERE chain.event_id = event.id) ORDER BY event.id"""
    audited.findings += [
        f"Event with the id {row.id} was inserted beside the trail."
        for row in await connection.execute(unchained)
    ]
    # The end of a chain can be cut off without a trace in it; a refund whose status has no event shows it.
    without_event = """
        SELECT r.id, r.status, last.to_status FROM refund_ledger.refunds_masked AS r
        LEFT JOIN LATERAL (SELECT to_status FROM refund_ledger.refund_events AS event
                           WHERE event.refund_id = r.id AND event.event = 'status' ORDER BY event.id DESC LIMIT 1) AS last ON true
        WHERE last.to_status IS DISTINCT FROM r.status ORDER BY r.id"""
    audited.findings += [
        f"Refund {row.id} is {row.status}, and its last event says {row.to_status or 'nothing'}."
        for row in await connection.execute(without_event)
    ]
