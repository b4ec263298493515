"""The release: the one gate between an approved refund and Payroc."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from include.refunds.classify import EVERYTHING
from include.refunds.ledger.approvals import check_approval, first_released, lock_run
from include.refunds.ledger.conditions import REPLACED_STANDS
from include.refunds.ledger.connection import Connection, Row, as_array
from include.refunds.ledger.database import Part
from include.refunds.ledger.foreign import set_aside_paid
from include.refunds.ledger.limits import lock_gate, read_limits
from include.refunds.ledger.rows import OF_MANY, lock
from include.refunds.limits import AtTheGate, GateDecision, Limits, Totals, day_start, decide_at_gate, totals
from include.refunds.states import Status


@dataclass(frozen=True, slots=True)
class _State:
    """The paused scopes and the limits."""

    paused: set[str]
    limits: Limits


class Gate(Part):
    """What passes the gate, decided and noted under its lock."""

    async def at_the_gate(self, ids: Sequence[int]) -> GateDecision:
        """Return what the gate would do with refunds now, in a run of their own. Nothing is changed."""
        async with self._database.transaction() as (connection, now):
            control = await _control(connection)
            return await self._decide_at_gate(connection, control, ids, {}, now)

    async def release(
        self,
        run_id: str,
        candidate_ids: Sequence[int],
        standing_ids: Sequence[int],
        withdrawn: dict[int, str],
    ) -> list[int]:
        """
        Release refunds for sending: the one gate, in one transaction under a lock of its own.

        What is paused stays as it is. What breaks a limit by itself is held, what finds no room under a cap
        of the run or the day waits.

        :param run_id: the run that releases. Its row has to hold an approval of exactly these candidates.
        :param candidate_ids: ids of the run's candidates.
        :param standing_ids: the candidates that were looked up in the source, and that it stands by. No other
            one is released: one that was paused then has not been looked up, though the pause may have ended
            since.
        :param withdrawn: candidates that the source no longer stands by, each with what was found: they are
            not released, and a release that they already had is taken back.
        :returns: ids that may be sent now, oldest approval first; paused terminals' are left out.
        :raises LedgerError: when the run holds no answer about its approval, or one about other candidates.
        """
        take_back = """
            UPDATE refund_ledger.refund_states SET status = 'approved', reason = :reason, updated_at = :now
            WHERE refund_id = :id AND status = 'released'"""
        release = f"""
            UPDATE refund_ledger.refund_states SET status = 'released', reason = NULL, holds = '{{}}',
                run_rejected_by = NULL,
                released_by = :actor, released_run = :run_id, released_at = :now, updated_at = :now
            WHERE refund_id {OF_MANY} AND status = 'approved'"""
        hold = """
            UPDATE refund_ledger.refund_states
            SET status = 'held', holds = :holds, reason = :reason, updated_at = :now
            WHERE refund_id = :id AND status IN ('approved', 'released')"""
        query = f"""
            SELECT id, amount, currency FROM refund_ledger.refunds
            WHERE id {OF_MANY} AND status = 'released' ORDER BY approved_at, id"""
        note = """
            UPDATE refund_ledger.refund_runs SET released = :released, released_totals = CAST(:totals AS jsonb),
                findings = findings || CAST(:findings AS jsonb)
                || jsonb_build_object('withdrawn', COALESCE(findings -> 'withdrawn', '{}') || CAST(:withdrawn AS jsonb))
            WHERE run_id = :run_id"""
        async with self._database.transaction() as (connection, now):
            # One release at a time: what is counted against a cap stays true until the commit.
            await lock_gate(connection, self._database.lock_seconds)
            run = await lock_run(connection, run_id)
            await lock(connection, candidate_ids)
            # A list may have been read while the refund was being pulled, so that neither saw the other.
            await set_aside_paid(connection, now, "i.id = ANY(:ids)", {"ids": list(candidate_ids)})
            control = await _control(connection)
            await check_approval(connection, run, candidate_ids, control.limits, self._day(now))
            for refund_id, finding in withdrawn.items():
                await connection.execute(take_back, {"id": refund_id, "reason": finding, "now": now})
            ids = sorted({*standing_ids} & {*candidate_ids})
            by_this_run = await first_released(connection, "run = :run_id", {"run_id": run_id})
            decision = await self._decide_at_gate(connection, control, ids, by_this_run, now)
            await connection.execute(
                release,
                {
                    "ids": as_array(decision.released),
                    "actor": self._database.actor,
                    "run_id": run_id,
                    "now": now,
                },
            )
            for refund_id, held in decision.held.items():
                await connection.execute(
                    hold, {"id": refund_id, "holds": list(held.names), "reason": held.reason, "now": now}
                )
            released = await connection.execute(query, {"ids": as_array(decision.released)})
            await connection.execute(
                note,
                {
                    "run_id": run_id,
                    "released": len(released),
                    "totals": json.dumps(totals((row.currency, row.amount) for row in released)),
                    "findings": json.dumps({"waiting": await _waiting(connection, decision.waiting)}),
                    "withdrawn": json.dumps({str(key): value for key, value in withdrawn.items()}),
                },
            )
            return [row.id for row in released]

    async def _decide_at_gate(
        self, connection: Connection, control: _State, ids: Sequence[int], by_this_run: Totals, now: datetime
    ) -> GateDecision:
        columns = """id, order_id, amount, currency, payee_fingerprint AS payee, status, released_holds, first_released_at"""
        asking = f"""
            SELECT {columns} FROM refund_ledger.refunds
            WHERE id {OF_MANY} AND source = :source AND status IN ('approved', 'released')
              AND processing_terminal_id <> ALL(:paused) AND {REPLACED_STANDS}
            ORDER BY approved_at, id"""
        earlier = f"""
            SELECT {columns} FROM refund_ledger.refunds WHERE id IN (
                SELECT refund_id FROM refund_ledger.first_releases
                WHERE payee_fingerprint = ANY(:payees) AND at > :since)"""
        source = self._database.settings.source
        wanted = [] if EVERYTHING in control.paused else list(ids)
        rows = _at_the_gate(
            await connection.execute(
                asking, {"ids": as_array(wanted), "source": source, "paused": list(control.paused)}
            )
        )
        before: list[AtTheGate] = []
        if control.limits.looks_back:
            since, payees = now - control.limits.looks_back, list({row.payee for row in rows})
            before = _at_the_gate(await connection.execute(earlier, {"payees": payees, "since": since}))
        today = await first_released(connection, "at >= :day", {"day": self._day(now)})
        return decide_at_gate(rows, control.limits, run=by_this_run, day=today, earlier=before, now=now)

    def _day(self, now: datetime) -> datetime:
        return day_start(now, self._database.settings.timezone)


async def _control(connection: Connection) -> _State:
    query = "SELECT DISTINCT scope FROM refund_ledger.pauses WHERE ended_at IS NULL"
    paused = set((await connection.execute(query)).scalars())
    return _State(paused, await read_limits(connection))


async def _waiting(connection: Connection, waiting: dict[int, str]) -> dict[str, dict[str, dict[str, int]]]:
    """Return counts and sums per cap and currency of what waits for room."""
    query = f"SELECT id, currency, amount FROM refund_ledger.refund_instructions WHERE id {OF_MANY}"
    by_cap: dict[str, list[tuple[str, int]]] = {}
    for row in await connection.execute(query, {"ids": as_array(waiting)}):
        by_cap.setdefault(waiting[row.id], []).append((row.currency, row.amount))
    return {cap: totals(amounts) for cap, amounts in by_cap.items()}


def _at_the_gate(rows: Iterable[Row]) -> list[AtTheGate]:
    return [
        AtTheGate(**{**row, "status": Status(row.status), "released_holds": tuple(row.released_holds)})
        for row in rows
    ]
