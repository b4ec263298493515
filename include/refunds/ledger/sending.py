"""Sending one refund: claim, last checks, record; and what the follow-up reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from include.refunds.classify import Outcome, Verdict
from include.refunds.ledger.control import NOT_PAUSED, Control
from include.refunds.ledger.rows import COLUMNS, as_refund, select_history, select_refund, stands_elsewhere
from include.refunds.ledger.runs import RELEASE_VALID, REPLACED_STANDS
from include.refunds.refund import History, Refund
from include.refunds.states import IN_DOUBT, Status
from include.refunds.transitions import Change, decide


@dataclass(frozen=True, slots=True)
class Task:
    """
    Who sends: the Airflow task instance behind an attempt, for the attempt's row.

    :param run_id: Airflow's run id.
    :param map_index: index of the mapped task instance, ``None`` when it is not mapped.
    :param try_number: Airflow's try number, from 1.
    """

    run_id: str
    map_index: int | None = None
    try_number: int | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A refund that this attempt, and no other, may send now."""

    refund: Refund
    history: History

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return self.refund.attempts


class Sending(Control):
    """What a send task and the follow-up read and write."""

    async def labels(self, refund_ids: Sequence[int]) -> list[str]:
        """Return the order ids of refunds, in the order given."""
        query = text("SELECT id, order_id FROM refund_ledger.refunds WHERE id = ANY(:ids)")
        async with self._transaction() as (connection, _):
            found = {row.id: row.order_id for row in await connection.execute(query, {"ids": list(refund_ids)})}
        return [found.get(refund_id, f"no refund {refund_id}") for refund_id in refund_ids]

    async def read(self, refund_id: int) -> tuple[Refund, History, datetime]:
        """
        Return a refund, what its attempts left behind, and the ledger's time.

        :raises NoSuchRefund: when there is none.
        """
        async with self._transaction() as (connection, now):
            refund = await select_refund(connection, refund_id)
            return refund, await select_history(connection, refund_id, before=refund.attempts + 1), now

    async def claim(self, refund_id: int, task: Task, *, environment: str, sent_with: str, token_expires_at: datetime) -> Claim | None:
        """
        Claim a refund for one POST: the intent, committed before anything is sent.

        The lease outlives the token, so when another worker may claim, Payroc refuses whatever this one still sends.

        :param environment: Payroc's API base URL, which has to be the ledger's.
        :param sent_with: hash of API URL and key, which has to be that of the first attempt.
        :param token_expires_at: end of the token's life, in the ledger's time.
        :returns: ``None`` when the refund may not be sent now.
        """
        update = text(f"""
            UPDATE refund_ledger.refunds AS r
            SET status = 'sending', attempts = attempts + 1, reason = NULL, lease_until = :lease_until, next_attempt_at = :lease_until,
                first_sent_at = COALESCE(first_sent_at, :now), sent_with = COALESCE(sent_with, :sent_with), updated_at = :now
            WHERE id = :id AND source = :source AND request IS NOT NULL AND payroc_refund_id IS NULL
              AND EXISTS (SELECT FROM refund_ledger.refund_control WHERE scope = '*' AND environment = :environment)
              AND {NOT_PAUSED} AND {REPLACED_STANDS}
              AND (first_sent_at IS NULL OR (first_sent_at > :window_start AND sent_with = :sent_with))
              AND (status = 'released' AND released_at > :oldest_release
                   OR status IN ('unknown', 'sending') AND lease_until <= :now AND next_attempt_at <= :now)
            RETURNING {COLUMNS}""")
        attempt = text("""
            INSERT INTO refund_ledger.refund_attempts (refund_id, attempt, run_id, map_index, try_number, started_at)
            VALUES (:id, :attempt, :run_id, :map_index, :try_number, :now)""")
        async with self._transaction() as (connection, now):
            values = {
                "id": refund_id,
                "source": self._settings.source,
                "environment": environment,
                "sent_with": sent_with,
                "now": now,
                "lease_until": token_expires_at + timedelta(seconds=self._settings.lease_margin_seconds),
                "window_start": now - timedelta(days=self._settings.key_window_days),
                "oldest_release": now - RELEASE_VALID,
            }
            row = (await connection.execute(update, values)).mappings().one_or_none()
            if row is None:
                return None
            refund = as_refund(row)
            await connection.execute(
                attempt,
                {
                    "id": refund_id,
                    "attempt": refund.attempts,
                    "run_id": task.run_id,
                    "map_index": task.map_index,
                    "try_number": task.try_number,
                    "now": now,
                },
            )
            return Claim(refund, await select_history(connection, refund_id, before=refund.attempts))

    async def may_post(self, claim: Claim, seconds: float) -> bool:
        """
        Tell, right before the POST, whether it may still go.

        :param seconds: how long the POST may take; the lease has to last that long.
        """
        query = text(f"""
            SELECT attempts = :attempt AND status = 'sending' AND lease_until > :until AND {NOT_PAUSED} AND {REPLACED_STANDS}
            FROM refund_ledger.refunds AS r WHERE id = :id""")
        async with self._transaction() as (connection, now):
            values = {"id": claim.refund.id, "attempt": claim.attempt, "until": now + timedelta(seconds=seconds)}
            return bool((await connection.execute(query, values)).scalar_one())

    async def record(
        self, refund_id: int, verdict: Verdict, attempt: int | None = None, *, restored: bool = False
    ) -> tuple[Refund, datetime]:
        """
        Record what an attempt, a look-up or the follow-up found.

        :param attempt: the attempt it comes from. ``None``: from no attempt; then anything but a Payroc object counts
            only while nobody holds the refund.
        :param restored: take over what Payroc has of a refund that waits (see :func:`~include.refunds.transitions.decide`).
        :returns: the refund as it is afterwards, and the ledger's time.
        """
        async with self._transaction() as (connection, now):
            refund = await select_refund(connection, refund_id, for_update=True)
            if attempt is not None:
                await _finish_attempt(connection, refund_id, attempt, verdict, now)
                current = refund.status is Status.SENDING and refund.attempts == attempt
            else:
                current = refund.status in IN_DOUBT and refund.lease_until is not None and refund.lease_until <= now
            found = verdict.sighting.payroc_refund_id if verdict.sighting else None
            change = decide(
                refund,
                verdict,
                await select_history(connection, refund_id, before=attempt or refund.attempts + 1),
                current=current,
                foreign_id=found is not None and await stands_elsewhere(connection, refund_id, found),
                told=found is not None and await _is_told(connection, refund_id, found),
                now=now,
                unknown_wait=timedelta(seconds=self._settings.unknown_wait_seconds),
                restored=restored,
            )
            # The lease is the attempt's: it ends with the attempt's own record, and stands when somebody else's record takes the
            # refund to people, who must not decide while a POST may still be on its way.
            holds = refund.attempts == attempt
            if change is not None:
                await self._apply(connection, refund, change, now, ends_lease=holds)
            if holds and refund.status is Status.REVIEW:
                await connection.execute(text("UPDATE refund_ledger.refunds SET lease_until = NULL WHERE id = :id"), {"id": refund_id})
            return await select_refund(connection, refund_id), now

    async def _apply(self, connection: AsyncConnection, refund: Refund, change: Change, now: datetime, *, ends_lease: bool) -> None:
        update = text("""
            UPDATE refund_ledger.refunds SET
                status = :status, reason = COALESCE(CAST(:reason AS text), reason), updated_at = :now,
                lease_until = CASE WHEN :keeps_lease THEN lease_until ELSE CAST(:wait_until AS timestamptz) END,
                next_attempt_at = CAST(:wait_until AS timestamptz),
                first_sent_at = CASE WHEN :never_sent THEN NULL ELSE first_sent_at END,
                sent_with = CASE WHEN :never_sent THEN NULL ELSE sent_with END,
                payroc_refund_id = COALESCE(payroc_refund_id, CAST(:payroc_refund_id AS text)),
                payroc_status = COALESCE(CAST(:payroc_status AS text), payroc_status),
                payroc_seen_at = CASE WHEN CAST(:payroc_status AS text) IS NULL THEN payroc_seen_at ELSE :now END
            WHERE id = :id""")
        seen = text("""
            UPDATE refund_ledger.refunds SET
                payroc_refund_id = COALESCE(payroc_refund_id, :payroc_refund_id), payroc_status = :payroc_status, payroc_seen_at = :now,
                updated_at = CASE WHEN payroc_refund_id = :payroc_refund_id AND payroc_status = :payroc_status THEN updated_at ELSE :now END
            WHERE id = :id""")
        sighting = change.sighting
        values = {
            "id": refund.id,
            "now": now,
            "payroc_refund_id": sighting.payroc_refund_id if sighting else None,
            "payroc_status": sighting.payroc_status if sighting else None,
        }
        for status in change.steps:
            await connection.execute(
                update,
                {
                    **values,
                    "status": status.value,
                    "reason": change.reason,
                    "wait_until": change.wait_until,
                    "keeps_lease": status is Status.REVIEW and not ends_lease,
                    "never_sent": change.never_sent,
                },
            )
        if sighting and not change.steps:
            await connection.execute(seen, values)
        if change.contradiction:
            detail = {"payroc_refund_id": change.contradicting_id} if change.contradicting_id else None
            await self._event(connection, now, "contradiction", refund_id=refund.id, reason=change.contradiction, detail=detail)
        if change.pause:
            await self._pause(connection, change.pause, change.reason or "", now)

    async def mark_seen(self, refund_ids: Sequence[int]) -> None:
        """Note that Payroc's list showed these refunds, without news."""
        update = text("UPDATE refund_ledger.refunds SET payroc_seen_at = :now WHERE id = ANY(:ids)")
        async with self._transaction() as (connection, now):
            await connection.execute(update, {"ids": list(refund_ids), "now": now})

    async def in_doubt(self) -> list[Refund]:
        """Return all refunds that are sending or unknown."""
        return await self._refunds("r.status IN ('sending', 'unknown')", {})

    async def not_sent(self) -> list[Refund]:
        """Return all refunds that wait to be sent: approved, held or released."""
        return await self._refunds("r.status IN ('approved', 'held', 'released')", {})

    async def followed(self, changed_within: timedelta) -> dict[str, datetime]:
        """
        Return the terminals of the refunds whose further way Payroc still has to tell, each with the oldest approval of them.

        These are the accepted ones, those in review, and those that changed not long ago. A restored ledger may have forgotten when it
        first sent a refund, but it was never before its approval.

        :param changed_within: how long any other refund is followed: a bank may return one that settled, and Payroc may list one
            that ended here without a payment.
        """
        query = text("""
            SELECT processing_terminal_id, min(LEAST(approved_at, created_at)) AS since FROM (
                SELECT processing_terminal_id, approved_at, created_at FROM refund_ledger.refunds
                WHERE source = :source AND status IN ('accepted', 'review')
                UNION ALL
                SELECT processing_terminal_id, approved_at, created_at FROM refund_ledger.refunds
                WHERE source = :source AND updated_at > :since
            ) AS followed
            GROUP BY processing_terminal_id ORDER BY processing_terminal_id""")
        async with self._transaction() as (connection, now):
            result = await connection.execute(query, {"source": self._settings.source, "since": now - changed_within})
            return {row.processing_terminal_id: row.since for row in result}

    async def known(self, keys: Sequence[str], payroc_refund_ids: Sequence[str], order_ids: Sequence[str] = ()) -> list[Refund]:
        """Return the refunds with one of these idempotency keys, of these refund ids of Payroc's, or of these order ids."""
        condition = """r.idempotency_key = ANY(CAST(:keys AS uuid[])) OR r.payroc_refund_id = ANY(:payroc_refund_ids)
            OR r.order_id = ANY(:order_ids)"""
        values = {"keys": list(keys), "payroc_refund_ids": list(payroc_refund_ids), "order_ids": list(order_ids)}
        return await self._refunds(condition, values)

    async def sent_between(self, start: datetime, end: datetime, *, after: int, limit: int) -> list[Refund]:
        """
        Return refunds that were first sent from ``start`` up to ``end``, ordered by id.

        :param after: only those with a greater id.
        :param limit: at most so many.
        """
        condition = "r.first_sent_at >= :start AND r.first_sent_at < :end AND r.id > :after"
        return await self._refunds(condition, {"start": start, "end": end, "after": after}, limit=limit)

    async def all_terminals(self) -> list[str]:
        """Return the processing terminals of all refunds, sorted."""
        query = text("SELECT DISTINCT processing_terminal_id FROM refund_ledger.refunds WHERE source = :source ORDER BY 1")
        async with self._transaction() as (connection, _):
            return list((await connection.execute(query, {"source": self._settings.source})).scalars())

    async def replaced(self, refund_id: int) -> list[Refund]:
        """Return what a refund replaces: the one before it, the one before that, to the first of the chain."""
        query = text(f"""
            WITH RECURSIVE chain AS (
                SELECT replaces AS id, 1 AS place FROM refund_ledger.refunds WHERE id = :id
                UNION ALL
                SELECT r.replaces, place + 1 FROM refund_ledger.refunds AS r JOIN chain ON r.id = chain.id
            )
            SELECT {COLUMNS} FROM chain JOIN refund_ledger.refunds AS r ON r.id = chain.id ORDER BY place""")
        async with self._transaction() as (connection, _):
            return [as_refund(row) for row in (await connection.execute(query, {"id": refund_id})).mappings()]

    async def _refunds(self, condition: str, values: dict[str, Any], limit: int | None = None) -> list[Refund]:
        query = text(f"SELECT {COLUMNS} FROM refund_ledger.refunds AS r WHERE source = :source AND ({condition}) ORDER BY id LIMIT :limit")
        async with self._transaction() as (connection, _):
            result = await connection.execute(query, {**values, "source": self._settings.source, "limit": limit})
            return [as_refund(row) for row in result.mappings()]


async def _is_told(connection: AsyncConnection, refund_id: int, payroc_refund_id: str) -> bool:
    query = text("""
        SELECT EXISTS (SELECT FROM refund_ledger.refund_events
                       WHERE refund_id = :id AND event = 'contradiction' AND detail ->> 'payroc_refund_id' = :payroc_refund_id)""")
    return bool((await connection.execute(query, {"id": refund_id, "payroc_refund_id": payroc_refund_id})).scalar_one())


async def _finish_attempt(connection: AsyncConnection, refund_id: int, attempt: int, verdict: Verdict, now: datetime) -> None:
    update = text("""
        UPDATE refund_ledger.refund_attempts
        SET finished_at = :now, http_status = :http_status, problem_type = :problem_type, outcome = :outcome
        WHERE refund_id = :id AND attempt = :attempt""")
    # Not proven to be without effect is unresolved for the attempts that follow, whatever else it is.
    unproven = verdict.outcome is Outcome.CONFIGURATION and not verdict.not_processed
    outcome = Outcome.UNKNOWN if unproven else verdict.outcome
    values = {"id": refund_id, "attempt": attempt, "now": now, "outcome": outcome.value}
    await connection.execute(update, {**values, "http_status": verdict.http_status, "problem_type": verdict.problem_type})
