"""The approval of a run: whether an approver has to be asked, and the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from include.refunds.approval import Question
from include.refunds.case import DecisionRefused
from include.refunds.ledger.connection import Connection, Row, as_array
from include.refunds.ledger.database import LedgerError, Part
from include.refunds.ledger.limits import read_limits
from include.refunds.ledger.rows import OF_MANY, lock
from include.refunds.limits import Limits, Totals, day_start, who_to_ask
from include.refunds.people import same_person
from include.refunds.printable import printable


class Approvals(Part):
    """The columns of ``refund_runs`` that say who was asked, about what, and who answered."""

    async def ask_approval(self, run_id: str) -> Question | None:
        """
        Find out whether a person has to approve a run, and note the answer.

        :returns: ``None`` when nobody has to be asked: the run stays under the thresholds, or a person
            approved exactly these candidates.
        :raises LedgerError: when no pull of this run stored its candidates, or the run asked about something
            else before.
        """
        unasked = "UPDATE refund_ledger.refund_runs SET approval_needed = false, approved_hash = candidates_hash WHERE run_id = :run_id"
        ask = """
            UPDATE refund_ledger.refund_runs SET approval_needed = true, asked_hash = candidates_hash, question = :question,
                approved_by = NULL, approved_at = NULL, approved_hash = NULL, rejected_by = NULL, rejected_at = NULL
            WHERE run_id = :run_id"""
        async with self._database.transaction() as (connection, now):
            run = await lock_run(connection, run_id)
            if run.approved_by is not None and run.approved_hash == run.candidates_hash:
                return None
            day = day_start(now, self._database.settings.timezone)
            today = await _released_without_a_person(connection, run, day)
            why = await _why_ask(connection, await read_limits(connection), today, run)
            if why is None:
                await connection.execute(unasked, {"run_id": run_id})
                return None
            question = Question(why, run.candidates_hash, run.approval_basis, today)
            body = question.body(run_id)
            if run.question not in (None, body):
                # Airflow goes on showing the first question of a task, whatever is asked after it was
                # cleared.
                raise LedgerError(
                    f"Run {printable(run_id)} asked a person about something else before, and Airflow would show that question again: "
                    "trigger a new run, which asks about what is approved now."
                )
            await connection.execute(ask, {"run_id": run_id, "question": body})
            return question

    async def record_approval(self, run_id: str, *, by: str, triggered_by: str | None) -> None:
        """
        Note that a person approved exactly the candidates that were asked about.

        :param by: who approved.
        :param triggered_by: who triggered the run, ``None`` when the schedule did.
        :raises DecisionRefused: when it is the same person.
        :raises LedgerError: when the run has other candidates by now.
        """
        if triggered_by is not None and same_person(by, triggered_by):
            raise DecisionRefused(
                f"{printable(by)} triggered run {printable(run_id)} and can't approve it, so nothing is sent: "
                "clear approve_run, and let another person answer."
            )
        update = """
            UPDATE refund_ledger.refund_runs SET approved_by = :by, approved_at = :now, approved_hash = candidates_hash,
                rejected_by = NULL, rejected_at = NULL
            WHERE run_id = :run_id AND asked_hash = candidates_hash"""
        await self._answered(run_id, update, by)

    async def record_rejection(self, run_id: str, *, by: str) -> None:
        """
        Note that a person rejected a run: none of its candidates is released.

        :raises LedgerError: when the run has other candidates by now.
        """
        update = """
            UPDATE refund_ledger.refund_runs SET rejected_by = :by, rejected_at = :now,
                approved_by = NULL, approved_at = NULL, approved_hash = NULL
            WHERE run_id = :run_id AND asked_hash = candidates_hash"""
        # The next run must not let pass by itself what a person has refused.
        mark = f"""
            UPDATE refund_ledger.refund_states SET run_rejected_by = :by
            WHERE status IN ('approved', 'released') AND refund_id {OF_MANY}"""
        await self._answered(run_id, update, by, mark)

    async def _answered(self, run_id: str, update: str, by: str, also: str | None = None) -> None:
        async with self._database.transaction() as (connection, now):
            run = await lock_run(connection, run_id)
            if await connection.change(update, {"run_id": run_id, "by": by, "now": now}) == 0:
                raise LedgerError(
                    f"Run {printable(run_id)} has other candidates than those that {printable(by)} was asked about, "
                    "so the answer counts for nothing: trigger a new run, which asks about what is approved now."
                )
            if also is not None:
                await lock(connection, run.candidate_ids)
                await connection.execute(also, {"ids": as_array(run.candidate_ids), "by": by})


def hash_of_ids(ids: Iterable[int]) -> str:
    """Return the hash under which exactly these refunds are approved and released."""
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()


async def lock_run(connection: Connection, run_id: str) -> Row:
    """
    Return the row of a run, locked until the end of the transaction.

    :raises LedgerError: when no pull of this run stored its candidates.
    """
    query = """
        SELECT run_id, candidate_ids, candidates_hash, approved_hash, approved_by, approval_basis, question, candidates_at
        FROM refund_ledger.refund_runs WHERE run_id = :run_id FOR UPDATE"""
    run = (await connection.execute(query, {"run_id": run_id})).one_or_none()
    # An earlier version noted less of a run.
    if run is None or not run.approval_basis:
        raise _no_run(run_id)
    return run


def _no_run(run_id: str) -> LedgerError:
    return LedgerError(
        f"The ledger holds no candidates of run {printable(run_id)}: clear pull_approved and let the run go on from there."
    )


async def check_approval(
    connection: Connection, run: Row, candidate_ids: Sequence[int], limits: Limits, day: datetime
) -> None:
    """
    Make sure that a run may release exactly these candidates now.

    :param day: when the day began.
    :raises LedgerError: when the run holds no answer about its approval, or one about other candidates.
    """
    if run.approved_hash != hash_of_ids(candidate_ids):
        raise LedgerError(
            f"Run {printable(run.run_id)} holds no approval of exactly these {len(candidate_ids)} refunds, so none is released: "
            "clear pull_approved and let the run go on from there."
        )
    if run.approved_by is None:
        # Another run may have passed the gate since nobody had to be asked.
        today = await _released_without_a_person(connection, run, day)
        if why := await _why_ask(connection, limits, today, run):
            raise LedgerError(
                f"{why} That was not so when run {printable(run.run_id)} was let pass: clear approve_run, and it asks a person."
            )


async def _released_without_a_person(
    connection: Connection, run: Row, day: datetime
) -> dict[str, dict[str, int]]:
    """Return what other runs released today without a person, and this one before it was pulled anew."""
    condition = """run = :run_id AND at < :candidates_at
        OR run IS DISTINCT FROM :run_id AND approver IS NULL AND at >= :day"""
    values = {"run_id": run.run_id, "candidates_at": run.candidates_at, "day": day}
    return await first_released(connection, condition, values)


async def _why_ask(connection: Connection, limits: Limits, today: Totals, run: Row) -> str | None:
    # Counted now and not when the run was pulled: another run with these refunds may have been rejected
    # since.
    rejected = f"SELECT count(run_rejected_by) FROM refund_ledger.refund_states WHERE refund_id {OF_MANY}"
    count = (await connection.execute(rejected, {"ids": as_array(run.candidate_ids)})).scalar_one()
    return who_to_ask(limits, today=today, run=run.approval_basis["totals"], rejected=count)


async def approval_basis(connection: Connection, ids: Sequence[int]) -> dict[str, Any]:
    """Return what a run would release for the first time, to how many new payees, and how many again."""
    sums = f"""
        SELECT currency, count(*) AS count, sum(amount) AS amount, max(amount) AS largest
        FROM refund_ledger.refunds WHERE id {OF_MANY} AND first_released_at IS NULL GROUP BY currency"""
    payees = f"""
        SELECT count(DISTINCT payee_fingerprint) FROM refund_ledger.refunds AS r
        WHERE id {OF_MANY} AND first_released_at IS NULL AND NOT EXISTS (
            SELECT FROM refund_ledger.first_releases AS before
            WHERE before.payee_fingerprint = r.payee_fingerprint)"""
    others = f"""
        SELECT count(*) FILTER (WHERE first_released_at IS NOT NULL) AS again
        FROM refund_ledger.refunds WHERE id {OF_MANY}"""
    values = {"ids": as_array(ids)}
    return {
        "totals": await _sums(connection, sums, values),
        **(await connection.execute(others, values)).one(),
        "new_payees": (await connection.execute(payees, values)).scalar_one(),
    }


async def first_released(
    connection: Connection, condition: str, values: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """Return the sums of what passed the gate for the first time, per currency."""
    query = f"""
        SELECT currency, count(*) AS count, sum(amount) AS amount FROM refund_ledger.first_releases
        WHERE {condition} GROUP BY currency"""
    return await _sums(connection, query, values)


async def _sums(connection: Connection, query: str, values: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return the figures of each row by its currency. A sum is numeric, so that none overflows."""
    rows = await connection.execute(query, values)
    return {
        row["currency"]: {name: int(value) for name, value in row.items() if name != "currency"}
        for row in rows
    }
