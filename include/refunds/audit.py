"""
Check the audit trail: its heads, its seals, and whether the ledger is what the events say.

A seal holds a hash over a batch of events and over the seal before. The owner of the tables could write all seals
again; so reports show the head, the end of the newest seal, and Airflow's logs keep it where that owner has no
access.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from include.refunds.ledger.connection import Connection, LedgerEngine, Row, Rows
from include.refunds.replay import replay

_SHOWN = 16  # hex digits of a hash that people keep

# One query reads seals of so many events together, or one larger seal; at most so many seals.
_EVENTS_AT_ONCE = 20_000
_SEALS_AT_ONCE = 1_000


class HeadError(Exception):
    """A head of the audit trail can't be read; the message shows a good one."""


@dataclass(frozen=True, slots=True)
class Head:
    """
    The end of a seal.

    :param position: number of events that were sealed by then.
    :param hash: the seal's hash in hex, or the first 16 digits of it.
    """

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
    The result of a check.

    :param events: number of sealed events.
    :param unsealed: number of events that no seal holds yet.
    :param head: the newest seal's end, ``None`` while there is no seal.
    :param findings: what is wrong, one sentence each.
    """

    events: int = 0
    unsealed: int = 0
    head: Head | None = None
    findings: list[str] = field(default_factory=list)


async def head_of(connection: Connection) -> Head | None:
    """Return the end of the newest seal."""
    query = """
        SELECT position, encode(hash, 'hex') AS hash FROM refund_ledger.event_seals
        ORDER BY number DESC LIMIT 1"""
    row = (await connection.execute(query)).one_or_none()
    return Head(row.position, row.hash) if row else None


async def verify_audit(engine: LedgerEngine, known: Iterable[Head] = ()) -> Audited:
    """
    Check the whole trail, in one snapshot. It only reads, and an auditor's rights are enough.

    :param known: heads that were kept; each has to be the end of a seal.
    """
    audited = Audited()
    async with engine.begin("repeatable_read", readonly=True) as connection:
        await _check_seals(connection, audited, {head.position: head for head in known})
        await _check_unsealed(connection, audited)
        audited.findings += [finding async for finding in replay(connection)]
    return audited


# The events of a range of `ids`. The OFFSET keeps the planner from reading the whole table for it.
_OF_RANGE = """(
    SELECT * FROM refund_ledger.refund_events WHERE id >= lower(ids) AND id < upper(ids) OFFSET 0) AS event"""

# A seal, and what it was made from. It has to account for the ids that were pending before it and for those up to its
# `next_event`: each is sealed, stays pending, or is given up because its transaction was rolled back. So a seal
# follows from the one before it, and no check needs more than a batch of events. The columns of events and seals are
# those that refund_ledger.seal() hashes.
_SEALS = f"""
    SELECT seal.number, seal.position, seal.hash, lower(seal.events) AS first, upper(seal.events) - 1 AS last,
           batch.bytes, seal.events - batch.ids AS missing,
           (SELECT record_send(header)
            FROM (SELECT seal.number, seal.position, seal.events, seal.pending, seal.next_event,
                         seal.pending_until, seal.cluster, seal.sealed_at) AS header) AS header,
           seal.events <@ due.ids AND seal.pending <@ (due.ids - seal.events) AND seal.next_event >= due.first
               AND seal.position = COALESCE(before.position, 0)
                   + (SELECT sum(upper(ids) - lower(ids)) FROM unnest(seal.events) AS ids) AS follows,
           ARRAY(SELECT id FROM unnest(due.ids - seal.events - seal.pending) AS ids
                 CROSS JOIN LATERAL {_OF_RANGE} ORDER BY id) AS beside
    FROM (SELECT * FROM refund_ledger.event_seals WHERE number > :after ORDER BY number LIMIT :seals) AS seal
    LEFT JOIN refund_ledger.event_seals AS before ON before.number = seal.number - 1
    CROSS JOIN LATERAL (
        SELECT first, COALESCE(before.pending, '{{}}')
                      + int8multirange(int8range(first, GREATEST(first, seal.next_event))) AS ids
        FROM (SELECT COALESCE(before.next_event, 1)) AS next_due (first)) AS due
    CROSS JOIN LATERAL (
        SELECT COALESCE(range_agg(int8range(id, id + 1)), '{{}}') AS ids,
               COALESCE(string_agg(record_send(sealed), '' ORDER BY id), '') AS bytes
        FROM (SELECT id, at, event, refund_id, from_status, to_status, actor, login, reason, detail
              FROM unnest(seal.events) AS ids CROSS JOIN LATERAL {_OF_RANGE}) AS sealed) AS batch
    WHERE seal.position <= :until OR seal.number = :after + 1
    ORDER BY seal.number"""


async def _check_seals(connection: Connection, audited: Audited, known: dict[int, Head]) -> None:
    number, before = 0, b""

    async def more() -> Rows:
        values = {"after": number, "until": audited.events + _EVENTS_AT_ONCE, "seals": _SEALS_AT_ONCE}
        return await connection.execute(_SEALS, values)

    while rows := await more():
        for row in rows:
            audited.findings += _findings(row, number, before)
            # From here on the seal counts as it is, so that one changed event is one finding.
            number, before = row.number, row.hash
            audited.events, audited.head = row.position, Head(row.position, row.hash.hex())
            if (head := known.get(row.position)) and row.hash.hex().startswith(head.hash):
                del known[row.position]
    audited.findings += [
        f"No seal ends with the head {head}: events up to this one were removed, or sealed again."
        for _, head in sorted(known.items())
    ]


def _findings(row: Row, number: int, before: bytes) -> Iterator[str]:
    """Yield what is wrong with a seal; ``number`` and ``before`` are number and hash of the last one."""
    if row.number != number + 1:
        yield f"{_named('Seal', number + 1, row.number - 1)} removed."
        return
    for ids in row.missing:
        it = "it" if ids.upper == ids.lower + 1 else "them"
        yield f"{_named('Event', ids.lower, ids.upper - 1)} removed after seal {row.number} had sealed {it}."
    if not row.missing and hashlib.sha256(before + row.header + row.bytes).digest() != row.hash:
        yield (
            f"Seal {row.number} (events {row.first} to {row.last}) does not match its hash: "
            "one of these events was changed, or the seal."
        )
    if not row.follows:
        yield f"Seal {row.number} does not follow from the seal before it."
    for event in row.beside:
        yield _BESIDE.format(event)


async def _check_unsealed(connection: Connection, audited: Audited) -> None:
    query = f"""
        SELECT (SELECT count(*) FROM refund_ledger.refund_events
                WHERE id BETWEEN COALESCE(last.next_event, 1) AND numbers.last_value)
               + (SELECT count(*) FROM unnest(last.pending) AS ids CROSS JOIN LATERAL {_OF_RANGE}) AS unsealed,
               ARRAY(SELECT id FROM refund_ledger.refund_events
                     WHERE id < 1 OR id > numbers.last_value ORDER BY id) AS beside
        FROM refund_ledger.event_numbers AS numbers
        LEFT JOIN (SELECT * FROM refund_ledger.event_seals ORDER BY number DESC LIMIT 1) AS last ON true"""
    row = (await connection.execute(query)).one()
    audited.unsealed = row.unsealed
    audited.findings += map(_BESIDE.format, row.beside)


_BESIDE = "Event {} was inserted next to the trail: no seal holds it, and none will."


def _named(what: str, first: int, last: int) -> str:
    return f"{what} {first} was" if first == last else f"{what}s {first} to {last} were"
