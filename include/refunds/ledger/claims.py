"""Claiming a refund for one attempt, and the last check right before its POST."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from include.refunds.ledger.bindings import IN_ITS_ENVIRONMENT
from include.refunds.ledger.conditions import (
    ITS_TURN,
    KEY_IS_GOOD,
    KNOWN_FOR,
    NOT_PAUSED,
    RELEASE_VALID,
    REPLACED_STANDS,
    STILL_ITS_TURN,
)
from include.refunds.ledger.connection import as_array
from include.refunds.ledger.database import LedgerDatabase, Part
from include.refunds.ledger.grouping import Grouped
from include.refunds.ledger.rows import (
    COLUMNS,
    IDS,
    NEVER_POSTED,
    by_id,
    lock,
    select_histories,
)
from include.refunds.refund import History, Refund

CLAIM_LEASE = timedelta(minutes=2)
"""
How long a refund is a worker's between its claim and its last check: longer than it waits for its turn, and
no longer than others should wait for the refunds of one that was killed.
"""

PERMISSION_SECONDS = 10.0
"""How long the permission of a last check counts, from before it was asked for."""

# Another refund of the list may go meanwhile, and a later run finds this one.
_LOCK_SECONDS = 5
_ASK_AGAIN_SECONDS = 0.05


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
    """
    A refund that this attempt, and no other, may send now, once its last check has passed.

    :param sent_with: hash of API URL and key, with which it would be sent.
    """

    refund: Refund
    history: History
    sent_with: str

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return self.refund.attempts


@dataclass(frozen=True, slots=True)
class _Claiming:
    """A call of :meth:`Claims.claim`."""

    refund_id: int
    task: Task
    environment: str
    sent_with: str
    token_seconds: float


@dataclass(frozen=True, slots=True)
class _LastCheck:
    """
    What a last check found of a claim.

    :param began: when it began, by the worker's monotonic clock.
    :param was_free: ``False``: another transaction had the refund's row locked, so nothing was checked.
    """

    began: float
    permitted: bool
    was_free: bool


class Claims(Part):
    """The rows of ``refund_attempts``, until their POST leaves."""

    def __init__(self, database: LedgerDatabase) -> None:
        super().__init__(database)
        self._claims = Grouped(self._claim)
        # A refund has its turn meanwhile, which others wait for.
        self._last_checks = Grouped(self._check_last, gather_seconds=0)

    async def claim(
        self, refund_id: int, task: Task, *, environment: str, sent_with: str, token_seconds: float
    ) -> Claim | None:
        """
        Claim a refund for one attempt, for 2 minutes: its last check may extend them to the fence, which
        outlives the token.

        An earlier attempt that never passed its last check is recorded as not sent.

        :param environment: Payroc's API base URL, which has to be the ledger's.
        :param sent_with: hash of API URL and key, which has to be that of the first attempt.
        :param token_seconds: whole life of a token that is here already. Counted from the time of the claim,
            it ends no earlier than the token does.
        :returns: ``None`` when the refund may not be sent now.
        """
        return await self._claims(
            refund_id, _Claiming(refund_id, task, environment, sent_with, token_seconds)
        )

    async def _claim(self, calls: Sequence[_Claiming]) -> list[Claim | None]:
        claim = f"""
            WITH asked AS (
                SELECT * FROM json_to_recordset(CAST(:asked AS json)) AS asked (refund_id bigint,
                    asked_environment text, asked_with text, fence timestamptz, run_id text,
                    map_index integer, try_number integer)
            ), claimed AS (
                UPDATE refund_ledger.refund_states AS s
                SET status = 'sending', attempts = s.attempts + 1, reason = NULL, fence_until = fence,
                    lease_until = LEAST(:lease, fence), next_attempt_at = LEAST(:lease, fence), updated_at = :now
                FROM asked
                JOIN refund_ledger.refund_instructions AS i ON i.id = asked.refund_id
                JOIN refund_ledger.frozen_requests AS q ON q.refund_id = asked.refund_id
                WHERE s.refund_id = ANY({IDS}) AND s.refund_id = asked.refund_id
                  AND source = :source AND request IS NOT NULL AND payroc_refund_id IS NULL
                  AND {IN_ITS_ENVIRONMENT} AND {NOT_PAUSED} AND {REPLACED_STANDS} AND {KEY_IS_GOOD}
                  AND {ITS_TURN}
                RETURNING {COLUMNS}
            ), lapsed AS (
                UPDATE refund_ledger.refund_attempts AS a SET finished_at = :now, outcome = 'not_sent'
                FROM claimed WHERE attempts > 1 AND a.refund_id = id AND a.attempt < attempts AND {NEVER_POSTED}
            ), attempt AS (
                INSERT INTO refund_ledger.refund_attempts (refund_id, attempt, run_id, map_index, try_number, started_at)
                SELECT refund_id, attempts, run_id, map_index, try_number, :now FROM claimed JOIN asked ON refund_id = id
            )
            SELECT * FROM claimed"""
        async with self._database.transaction("claim", lock_seconds=_LOCK_SECONDS) as (connection, now):
            # Not those that another attempt has: the lock would be in the way of its last check. What is not
            # locked is not claimed either.
            locked = await lock(
                connection,
                [call.refund_id for call in calls],
                "(status = 'released' OR lease_until <= :now)",
                now=now,
            )
            # An attempt begins when the one before it has been recorded, which this may have waited for.
            now = max(locked.values(), default=now)
            values = {
                "ids": as_array(locked),
                "asked": json.dumps([self._asked(call, now) for call in calls]),
                "source": self._database.settings.source,
                "now": now,
                "lease": now + CLAIM_LEASE,
                "window_start": self._window_start(now),
                "oldest_release": now - RELEASE_VALID,
                "known_since": now - KNOWN_FOR,
            }
            refunds = by_id(await connection.execute(claim, values))
            histories = await select_histories(
                connection, {refund.id: refund.attempts for refund in refunds.values()}
            )
            return [
                Claim(refunds[call.refund_id], histories[call.refund_id], call.sent_with)
                if call.refund_id in refunds
                else None
                for call in calls
            ]

    def _asked(self, call: _Claiming, now: datetime) -> dict[str, Any]:
        fence = now + timedelta(seconds=call.token_seconds + self._database.settings.lease_margin_seconds)
        return {
            "refund_id": call.refund_id,
            "asked_environment": call.environment,
            "asked_with": call.sent_with,
            "fence": fence.isoformat(),
            "run_id": call.task.run_id,
            "map_index": call.task.map_index,
            "try_number": call.task.try_number,
        }

    def _window_start(self, now: datetime) -> datetime:
        return now - timedelta(days=self._database.settings.key_window_days)

    async def may_post(self, claim: Claim, seconds: float) -> bool:
        """
        Check, right before the POST, whether it may still be sent, and extend the lease to the fence.

        Committed before this returns ``True``. An error, also one that leaves open whether it was committed,
        is no permission. A commit that took long is no permission either: what was checked may be true no
        more, so it is checked again. So is a refund whose row another transaction had locked, for up to 5
        seconds: a worker that tried to claim it, too, has its lock for a moment.

        :param seconds: how long the POST may take; the token has to last that long.
        """
        give_up = self._database.monotonic() + _LOCK_SECONDS
        while True:
            check = await self._last_checks(claim.refund.id, (claim, seconds))
            now = self._database.monotonic()
            if check.permitted and now - check.began <= PERMISSION_SECONDS:
                return True
            if not check.permitted and (check.was_free or now >= give_up):
                return False
            if not check.was_free:
                await asyncio.sleep(_ASK_AGAIN_SECONDS)

    async def _check_last(self, calls: Sequence[tuple[Claim, float]]) -> list[_LastCheck]:
        # A row that another transaction has locked is not waited for: its lock would keep the others of the
        # list from being sent.
        lock_free = f"""
            SELECT refund_id FROM refund_ledger.refund_states WHERE refund_id = ANY({IDS})
            ORDER BY refund_id FOR NO KEY UPDATE SKIP LOCKED"""
        # It stands in no index what this changes of a state, and no trigger fires on it.
        check = f"""
            WITH claimed AS (
                SELECT * FROM json_to_recordset(CAST(:claimed AS json))
                    AS claimed (refund_id bigint, attempt integer, asked_with text, ends timestamptz)
            ), permitted AS (
                UPDATE refund_ledger.refund_states AS s
                SET lease_until = fence_until, first_sent_at = COALESCE(first_sent_at, :now),
                    sent_with = COALESCE(s.sent_with, asked_with)
                FROM claimed JOIN refund_ledger.refund_instructions AS i ON i.id = claimed.refund_id
                WHERE s.refund_id = ANY({IDS}) AND s.refund_id = claimed.refund_id
                  AND {STILL_ITS_TURN}
                  AND {NOT_PAUSED} AND {REPLACED_STANDS} AND {KEY_IS_GOOD}
                RETURNING s.refund_id, attempt
            )
            UPDATE refund_ledger.refund_attempts AS a SET posting_at = :now
            FROM permitted WHERE a.refund_id = permitted.refund_id AND a.attempt = permitted.attempt
            RETURNING a.refund_id"""
        began = self._database.monotonic()
        async with self._database.transaction("last check") as (connection, now):
            ids = as_array(claim.refund.id for claim, _ in calls)
            locked = (await connection.execute(lock_free, {"ids": ids})).scalars()
            values = {
                "ids": as_array(locked),
                "claimed": json.dumps([self._checked(claim, seconds, now) for claim, seconds in calls]),
                "now": now,
                "window_start": self._window_start(now),
                "known_since": now - KNOWN_FOR,
            }
            may = set((await connection.execute(check, values)).scalars())
        return [_LastCheck(began, claim.refund.id in may, claim.refund.id in locked) for claim, _ in calls]

    def _checked(self, claim: Claim, seconds: float, now: datetime) -> dict[str, Any]:
        ends = now + timedelta(seconds=seconds + self._database.settings.lease_margin_seconds)
        return {
            "refund_id": claim.refund.id,
            "attempt": claim.attempt,
            "asked_with": claim.sent_with,
            "ends": ends.isoformat(),
        }
