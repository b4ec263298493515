"""What an attempt, a look-up or the follow-up found, written into the ledger."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from include.refunds.classify import Outcome, Verdict
from include.refunds.ledger.connection import Connection, Rows, as_array
from include.refunds.ledger.database import LedgerDatabase, NoSuchRefund, Part
from include.refunds.ledger.events import event
from include.refunds.ledger.grouping import Grouped
from include.refunds.ledger.pauses import pause
from include.refunds.ledger.rows import (
    IDS,
    STATE,
    changed,
    lock,
    select_histories,
    select_refunds,
    standing_elsewhere,
)
from include.refunds.refund import Refund
from include.refunds.states import IN_DOUBT, Status
from include.refunds.transitions import Change, decide


@dataclass(frozen=True, slots=True)
class _Finding:
    """A call of :meth:`Records.record`."""

    refund_id: int
    verdict: Verdict
    attempt: int | None
    restored: bool

    def holds(self, refunds: Mapping[int, Refund]) -> bool:
        """Whether it comes from the refund's last attempt."""
        return refunds[self.refund_id].attempts == self.attempt

    def is_current(self, refund: Refund, now: datetime) -> bool:
        """
        Whether more than a Payroc object counts: it comes from the attempt that holds the refund, or nobody
        holds it.
        """
        if self.attempt is not None:
            return refund.status is Status.SENDING and refund.attempts == self.attempt
        return refund.status in IN_DOUBT and refund.lease_until is not None and refund.lease_until <= now


@dataclass(frozen=True, slots=True)
class _Changing:
    """
    A refund and what changes of it.

    :param attempt: the attempt that it comes from, ``None`` when it comes from none.
    """

    refund: Refund
    change: Change
    attempt: int | None

    @property
    def ends_lease(self) -> bool:
        """Whether it comes from the attempt that the lease belongs to."""
        return self.refund.attempts == self.attempt

    @property
    def is_shown(self) -> bool:
        """Whether Payroc shows it outside an attempt: operators find that out too."""
        return self.attempt is None and self.change.sighting is not None


OnRecord = Callable[[Refund, Refund], None]
"""Called with a refund before and after each record that was committed."""


class Records(Part):
    """
    Recording, the outcome of an attempt committed.

    :param on_record: called after each record.
    """

    def __init__(self, database: LedgerDatabase, on_record: OnRecord | None = None) -> None:
        super().__init__(database)
        self._on_record = on_record
        self._records = Grouped(self._record)

    async def record(
        self, refund_id: int, verdict: Verdict, attempt: int | None = None, *, restored: bool = False
    ) -> tuple[Refund, datetime]:
        """
        Record what an attempt, a look-up or the follow-up found.

        :param attempt: the attempt it comes from. ``None``: from no attempt; then anything but a Payroc
            object counts only while nobody holds the refund.
        :param restored: take over what Payroc has of a refund that waits (see
            :func:`~include.refunds.transitions.decide`).
        :returns: the refund as it is afterwards, and the ledger's time.
        :raises NoSuchRefund: when there is none.
        """
        before, after, now = await self._records(refund_id, _Finding(refund_id, verdict, attempt, restored))
        if self._on_record is not None:
            self._on_record(before, after)
        return after, now

    async def mark_seen(self, refund_ids: Sequence[int]) -> None:
        """Note that Payroc's list showed these refunds, without news."""
        update = f"UPDATE refund_ledger.refund_states SET payroc_seen_at = :now WHERE refund_id = ANY({IDS})"
        async with self._database.transaction() as (connection, now):
            await lock(connection, refund_ids)
            await connection.execute(update, {"ids": as_array(refund_ids), "now": now})

    async def _record(self, findings: Sequence[_Finding]) -> list[tuple[Refund, Refund, datetime]]:
        async with self._database.transaction("record") as (connection, now):
            ids = [finding.refund_id for finding in findings]
            await lock(connection, ids)
            refunds = await select_refunds(connection, ids)
            for refund_id in ids:
                if refund_id not in refunds:
                    raise NoSuchRefund(f"The ledger holds no refund {refund_id}.")
            await _finish_attempts(connection, findings, now)
            changes = await self._decide(connection, findings, refunds, now)
            after = await self._apply(connection, refunds, changes, now)
            # The lease is the attempt's: it ends with the attempt's own record, and stands when somebody
            # else's record takes the refund to people, who must not decide while a POST may still be on its
            # way.
            ended = [
                item.refund_id
                for item in findings
                if item.holds(refunds) and refunds[item.refund_id].status is Status.REVIEW
            ]
            if ended:
                update = f"""
                    UPDATE refund_ledger.refund_states AS s SET lease_until = NULL
                    WHERE refund_id = ANY({IDS}) RETURNING {STATE}"""
                after |= changed(after, await connection.execute(update, {"ids": as_array(ended)}))
            return [(refunds[refund_id], after[refund_id], now) for refund_id in ids]

    async def _decide(
        self,
        connection: Connection,
        findings: Sequence[_Finding],
        refunds: Mapping[int, Refund],
        now: datetime,
    ) -> list[_Changing]:
        histories = await select_histories(
            connection,
            {item.refund_id: item.attempt or refunds[item.refund_id].attempts + 1 for item in findings},
        )
        sightings = {
            item.refund_id: item.verdict.sighting.payroc_refund_id
            for item in findings
            if item.verdict.sighting
        }
        foreign = await standing_elsewhere(connection, sightings)
        changes = []
        for item in findings:
            refund, found = refunds[item.refund_id], sightings.get(item.refund_id)
            astray = found is not None and (
                refund.id in foreign or refund.payroc_refund_id not in (None, found)
            )
            change = decide(
                refund,
                item.verdict,
                histories[refund.id],
                current=item.is_current(refund, now),
                foreign_id=refund.id in foreign,
                told=astray and await _is_told(connection, refund.id, sightings[refund.id]),
                now=now,
                unknown_wait=timedelta(seconds=self._database.settings.unknown_wait_seconds),
                restored=item.restored,
            )
            if change is not None:
                changes.append(_Changing(refund, change, item.attempt))
        return changes

    async def _apply(
        self,
        connection: Connection,
        refunds: Mapping[int, Refund],
        changes: Sequence[_Changing],
        now: datetime,
    ) -> dict[int, Refund]:
        after = dict(refunds)
        for number in range(max((len(item.change.steps) for item in changes), default=0)):
            taking = [item for item in changes if len(item.change.steps) > number]
            tried = [item for item in taking if not item.is_shown]
            after |= changed(after, await _take_step(connection, tried, number, now))
            shown = [item for item in taking if item.is_shown]
            after |= changed(after, await _note_sightings(connection, shown, number, now))
        staying = [item for item in changes if item.change.sighting and not item.change.steps]
        after |= changed(after, await _note_sightings(connection, staying, None, now))
        for item in changes:
            change = item.change
            if change.contradiction:
                detail = {"payroc_refund_id": change.contradicting_id} if change.contradicting_id else None
                await event(
                    connection,
                    "contradiction",
                    refund_id=item.refund.id,
                    reason=change.contradiction,
                    detail=detail,
                )
            if change.recovered and change.sighting:
                await event(
                    connection,
                    "recovered",
                    refund_id=item.refund.id,
                    reason=change.reason or "",
                    detail={"payroc_refund_id": change.sighting.payroc_refund_id},
                )
            if change.pause:
                await pause(connection, change.pause, change.pause_reason or change.reason or "")
        return after


async def _is_told(connection: Connection, refund_id: int, payroc_refund_id: str) -> bool:
    query = """
        SELECT EXISTS (SELECT FROM refund_ledger.refund_events
                       WHERE refund_id = :id AND event = 'contradiction' AND detail ->> 'payroc_refund_id' = :payroc_refund_id)"""
    return bool(
        (
            await connection.execute(query, {"id": refund_id, "payroc_refund_id": payroc_refund_id})
        ).scalar_one()
    )


async def _finish_attempts(connection: Connection, findings: Sequence[_Finding], now: datetime) -> None:
    of_attempts = [item for item in findings if item.attempt is not None]
    if not of_attempts:
        return
    update = f"""
        UPDATE refund_ledger.refund_attempts AS a
        SET finished_at = :now, http_status = found.http_status, problem_type = found.problem_type, outcome = found.outcome
        FROM json_to_recordset(CAST(:found AS json))
             AS found (refund_id bigint, attempt integer, http_status integer, problem_type text, outcome text)
        WHERE a.refund_id = ANY({IDS}) AND a.refund_id = found.refund_id AND a.attempt = found.attempt"""
    found = [
        {
            "refund_id": item.refund_id,
            "attempt": item.attempt,
            "http_status": item.verdict.http_status,
            "problem_type": item.verdict.problem_type,
            "outcome": _outcome(item.verdict).value,
        }
        for item in of_attempts
    ]
    ids = as_array(item.refund_id for item in of_attempts)
    await connection.execute(update, {"found": json.dumps(found), "ids": ids, "now": now})


def _outcome(verdict: Verdict) -> Outcome:
    # Not proven to be without effect is unresolved for the attempts that follow, whatever else it is.
    return (
        Outcome.UNKNOWN
        if verdict.outcome is Outcome.CONFIGURATION and not verdict.not_processed
        else verdict.outcome
    )


async def _take_step(
    connection: Connection, changes: Sequence[_Changing], number: int, now: datetime
) -> Rows:
    """Bring refunds to the status that their change names at this place."""
    update = f"""
        UPDATE refund_ledger.refund_states AS s SET
            status = step.status, reason = COALESCE(step.reason, s.reason), updated_at = :now,
            lease_until = CASE WHEN step.keeps_lease THEN s.lease_until ELSE step.wait_until END,
            next_attempt_at = step.wait_until,
            first_sent_at = CASE WHEN step.never_sent THEN NULL ELSE s.first_sent_at END,
            sent_with = CASE WHEN step.never_sent THEN NULL ELSE s.sent_with END,
            payroc_refund_id = COALESCE(s.payroc_refund_id, step.payroc_refund_id),
            payroc_status = COALESCE(step.payroc_status, s.payroc_status),
            payroc_seen_at = CASE WHEN step.payroc_status IS NULL THEN s.payroc_seen_at ELSE :now END
        FROM json_to_recordset(CAST(:steps AS json))
             AS step (id bigint, status text, reason text, keeps_lease boolean, wait_until timestamptz,
                      never_sent boolean, payroc_refund_id text, payroc_status text)
        WHERE s.refund_id = ANY({IDS}) AND s.refund_id = step.id
        RETURNING {STATE}"""
    if not changes:
        return Rows()
    steps = json.dumps([_step(item, item.change.steps[number]) for item in changes])
    values = {"steps": steps, "ids": as_array(item.refund.id for item in changes), "now": now}
    return await connection.execute(update, values)


def _step(item: _Changing, status: Status | None) -> dict[str, Any]:
    change, sighting = item.change, item.change.sighting
    return {
        "id": item.refund.id,
        "status": status,
        "reason": change.reason,
        "keeps_lease": status is Status.REVIEW and not item.ends_lease,
        "wait_until": change.wait_until.isoformat() if change.wait_until else None,
        "never_sent": change.never_sent,
        "payroc_refund_id": sighting.payroc_refund_id if sighting else None,
        "payroc_status": sighting.payroc_status if sighting else None,
    }


async def _note_sightings(
    connection: Connection, changes: Sequence[_Changing], number: int | None, now: datetime
) -> Rows:
    """
    Keep what Payroc shows of refunds that go to the status at this place, or stay where they are
    (``None``).
    """
    note = f"""
        SELECT {STATE} FROM json_to_recordset(CAST(:shown AS json))
            AS shown (id bigint, status text, reason text, payroc_refund_id text, payroc_status text),
        LATERAL refund_ledger.note_sighting(id, shown.status, shown.reason, shown.payroc_refund_id,
            shown.payroc_status, :now) AS s"""
    if not changes:
        return Rows()
    shown = [_step(item, item.change.steps[number] if number is not None else None) for item in changes]
    return await connection.execute(note, {"shown": json.dumps(shown), "now": now})
