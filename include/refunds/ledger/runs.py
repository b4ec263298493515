"""A run's candidates, its approval, and the release: the one gate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from include.refunds.approval import Question
from include.refunds.case import DecisionRefused
from include.refunds.classify import EVERYTHING
from include.refunds.ledger.connection import Connection, Row, as_array
from include.refunds.ledger.continuity import Continuity
from include.refunds.ledger.database import LedgerError
from include.refunds.ledger.gate import Gate
from include.refunds.ledger.pauses import NOT_PAUSED
from include.refunds.ledger.rows import IDS, NEVER_POSTED, OF_MANY, lock
from include.refunds.limits import (
    AtTheGate,
    GateDecision,
    Limits,
    Totals,
    day_start,
    decide_at_gate,
    totals,
    who_to_ask,
)
from include.refunds.people import same_person
from include.refunds.printable import printable
from include.refunds.states import Status

# A release is good for so long; what was not sent by then has to pass the gate again.
RELEASE_VALID = timedelta(hours=24)

# A refund in doubt whose wait ends within this time is worth waiting for inside a run.
DUE_WITHIN = timedelta(minutes=5)

# True of a refund that replaces none, or of whose chain none was paid, or none is any more: a refund that turned out to be
# paid after all must not be paid again by a reissue.
REPLACED_STANDS = "(replaces IS NULL OR refund_ledger.ended_unpaid(replaces))"


@dataclass(frozen=True, slots=True)
class Selection:
    """
    Which refunds of the ledger's queue a run is about; ``None`` or empty means all.

    :param limit: at most so many, oldest approval first.
    :param source_refs: only these.
    :param processing_terminal_id: only this terminal's.
    :param approved_before: only those approved before this instant.
    """

    limit: int | None = None
    source_refs: tuple[str, ...] = ()
    processing_terminal_id: str | None = None
    approved_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A refund that a run would release; ``replaces`` is the id of the refund that it is a reissue of."""

    id: int
    source_ref: str
    processing_terminal_id: str
    order_id: str
    amount: int
    currency: str
    payee_last4: str | None
    attempts: int
    replaces: int | None = None


def hash_of_ids(ids: Iterable[int]) -> str:
    """Return the hash under which exactly these refunds are approved and released."""
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()


class Runs(Gate, Continuity):
    """What a run reads and writes before and after the sending."""

    async def return_stale_releases(self) -> int:
        """
        Return released refunds that nobody sent in time to ``approved``, and their number.

        Before that, what a worker claimed and never sent, because it was killed, is released again: the source
        may have withdrawn it since.
        """
        unsent = "status = 'sending' AND first_sent_at IS NULL AND lease_until <= :now"
        unused = "status = 'released' AND released_at <= :oldest"
        which = f"SELECT id FROM refund_ledger.refunds WHERE source = :source AND ({unsent} OR {unused})"
        take_back = f"""
            WITH released AS (
                UPDATE refund_ledger.refund_states
                SET status = 'released', reason = 'It was claimed and not sent: its worker was stopped.',
                    lease_until = NULL, next_attempt_at = NULL, updated_at = :now
                WHERE refund_id {OF_MANY} AND {unsent}
                RETURNING refund_id
            )
            UPDATE refund_ledger.refund_attempts AS a SET finished_at = :now, outcome = 'not_sent'
            FROM released WHERE a.refund_id = released.refund_id AND {NEVER_POSTED}"""
        update = f"""
            UPDATE refund_ledger.refund_states
            SET status = 'approved', reason = 'The release was not used in time.', updated_at = :now
            WHERE refund_id {OF_MANY} AND {unused}"""
        async with self._database.transaction() as (connection, now):
            values = {"source": self._database.settings.source, "now": now, "oldest": now - RELEASE_VALID}
            ids = (await connection.execute(which, values)).scalars()
            await lock(connection, ids)
            values["ids"] = as_array(ids)
            await connection.execute(take_back, values)
            return await connection.change(update, values)

    async def candidates(
        self, selection: Selection, *, standing: Sequence[str] | None = None, ids: Sequence[int] | None = None
    ) -> list[Candidate]:
        """
        Return the refunds that are approved, or released and not yet sent, oldest approval first.

        What is paused is left out, so that it takes no place of those that can go.

        :param standing: only those of these source_refs, by which the source stands. A reissue has no row in the source: two people
            approved it in the ledger, so it stands by itself.
        :param ids: only those of these ids.
        """
        query = f"""
            SELECT {", ".join(Candidate.__slots__)} FROM refund_ledger.refunds
            WHERE source = :source AND status IN ('approved', 'released') AND payroc_refund_id IS NULL
              AND {NOT_PAUSED} AND {REPLACED_STANDS}
              AND (CAST(:standing AS text[]) IS NULL OR source_ref = ANY(CAST(:standing AS text[])) OR replaces IS NOT NULL)
              AND (CAST(:ids AS text) IS NULL OR id {OF_MANY})
              AND (CAST(:refs AS text[]) IS NULL OR source_ref = ANY(CAST(:refs AS text[])))
              AND (CAST(:terminal AS text) IS NULL OR processing_terminal_id = :terminal)
              AND (CAST(:before AS timestamptz) IS NULL OR approved_at < :before)
            ORDER BY approved_at, id LIMIT :limit"""
        values = {
            "source": self._database.settings.source,
            "standing": None if standing is None else list(standing),
            "ids": None if ids is None else as_array(ids),
            "refs": list(selection.source_refs) or None,
            "terminal": selection.processing_terminal_id,
            "before": selection.approved_before,
            "limit": selection.limit,
        }
        async with self._database.transaction() as (connection, _):
            return [Candidate(**row) for row in (await connection.execute(query, values))]

    async def due(self) -> list[int]:
        """
        Return the ids of unknown refunds, and of those sent without a record, whose wait has ended, or ends soon
        enough to be waited for.
        """
        query = """
            SELECT id FROM refund_ledger.refunds
            WHERE source = :source AND status IN ('sending', 'unknown') AND first_sent_at IS NOT NULL
              AND lease_until <= :soon AND next_attempt_at <= :soon
            ORDER BY approved_at, id"""
        async with self._database.transaction() as (connection, now):
            values = {"source": self._database.settings.source, "soon": now + DUE_WITHIN}
            return list((await connection.execute(query, values)).scalars())

    async def begin_run(
        self,
        run_id: str,
        params: dict[str, Any],
        candidates: Sequence[Candidate],
        findings: dict[str, Any],
        at: datetime,
    ) -> None:
        """
        Note what a run is about. A pull that is repeated starts the run's row anew and takes its approval back.

        :param params: the run's params, as JSON.
        :param candidates: the refunds it would release.
        :param findings: what the report has to name, as JSON.
        :param at: when the run's pull began.
        """
        upsert = """
            INSERT INTO refund_ledger.refund_runs
                (run_id, params, candidates, candidate_ids, candidate_totals, candidates_hash, approval_basis,
                findings, started_at)
            VALUES (:run_id, CAST(:params AS jsonb), :candidates, :ids, CAST(:totals AS jsonb), :hash,
                CAST(:basis AS jsonb), CAST(:findings AS jsonb), :at)
            ON CONFLICT (run_id) DO UPDATE SET params = EXCLUDED.params, candidates = EXCLUDED.candidates,
                candidate_ids = EXCLUDED.candidate_ids,
                candidate_totals = EXCLUDED.candidate_totals, candidates_hash = EXCLUDED.candidates_hash,
                candidates_at = EXCLUDED.candidates_at,
                approval_basis = EXCLUDED.approval_basis, findings = EXCLUDED.findings, started_at = EXCLUDED.started_at,
                finished_at = NULL, approval_needed = NULL, asked_hash = NULL, approved_by = NULL, approved_at = NULL,
                approved_hash = NULL, rejected_by = NULL, rejected_at = NULL,
                released = NULL, released_totals = NULL"""
        async with self._database.transaction() as (connection, _):
            ids = [item.id for item in candidates]
            await connection.execute(
                upsert,
                {
                    "run_id": run_id,
                    "params": json.dumps(params),
                    "candidates": len(candidates),
                    "ids": ids,
                    "totals": json.dumps(totals((item.currency, item.amount) for item in candidates)),
                    "hash": hash_of_ids(ids),
                    "basis": json.dumps(await _approval_basis(connection, ids)),
                    "findings": json.dumps(findings),
                    "at": at,
                },
            )

    async def ask_approval(self, run_id: str) -> Question | None:
        """
        Find out whether a person has to approve a run, and note the answer.

        :returns: ``None`` when nobody has to be asked: the run stays under the thresholds, or a person approved exactly these candidates.
        :raises LedgerError: when no pull of this run stored its candidates, or the run asked about something else before.
        """
        unasked = "UPDATE refund_ledger.refund_runs SET approval_needed = false, approved_hash = candidates_hash WHERE run_id = :run_id"
        ask = """
            UPDATE refund_ledger.refund_runs SET approval_needed = true, asked_hash = candidates_hash, question = :question,
                approved_by = NULL, approved_at = NULL, approved_hash = NULL, rejected_by = NULL, rejected_at = NULL
            WHERE run_id = :run_id"""
        async with self._database.transaction() as (connection, now):
            run = await self._run(connection, run_id)
            if run.approved_by is not None and run.approved_hash == run.candidates_hash:
                return None
            today = await self._released_without_a_person(connection, run, now)
            why = await _why_ask(connection, await self._limits(connection), today, run)
            if why is None:
                await connection.execute(unasked, {"run_id": run_id})
                return None
            question = Question(why, run.candidates_hash, run.approval_basis, today)
            body = question.body(run_id)
            if run.question not in (None, body):
                # Airflow goes on showing the first question of a task, whatever is asked after it was cleared.
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
            run = await self._run(connection, run_id)
            if await connection.change(update, {"run_id": run_id, "by": by, "now": now}) == 0:
                raise LedgerError(
                    f"Run {printable(run_id)} has other candidates than those that {printable(by)} was asked about, "
                    "so the answer counts for nothing: trigger a new run, which asks about what is approved now."
                )
            if also is not None:
                await lock(connection, run.candidate_ids)
                await connection.execute(also, {"ids": as_array(run.candidate_ids), "by": by})

    async def at_the_gate(self, ids: Sequence[int]) -> GateDecision:
        """Return what the gate would do with refunds now, in a run of their own. Nothing is changed."""
        async with self._database.transaction() as (connection, now):
            control = await self._control(connection)
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

        What is paused stays as it is. What breaks a limit by itself is held, what finds no room under a cap of the run or the day waits.

        :param run_id: the run that releases. Its row has to hold an approval of exactly these candidates.
        :param candidate_ids: ids of the run's candidates.
        :param standing_ids: the candidates that were looked up in the source, and that it stands by. No other one is released: one that
            was paused then has not been looked up, though the pause may have ended since.
        :param withdrawn: candidates that the source no longer stands by, each with what was found: they are not released,
            and a release that they already had is taken back.
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
            await self._lock_gate(connection)
            run = await self._run(connection, run_id)
            await lock(connection, candidate_ids)
            # A list may have been read while the refund was being pulled, so that neither saw the other.
            await self._set_aside_paid(connection, now, "i.id = ANY(:ids)", {"ids": list(candidate_ids)})
            control = await self._control(connection)
            await self._check_approval(connection, run, candidate_ids, control.limits, now)
            for refund_id, finding in withdrawn.items():
                await connection.execute(take_back, {"id": refund_id, "reason": finding, "now": now})
            ids = sorted({*standing_ids} & {*candidate_ids})
            by_this_run = await _first_released(connection, "run = :run_id", {"run_id": run_id})
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

    async def _control(self, connection: Connection) -> _State:
        query = "SELECT DISTINCT scope FROM refund_ledger.pauses WHERE ended_at IS NULL"
        paused = set((await connection.execute(query)).scalars())
        return _State(paused, await self._limits(connection))

    async def _run(self, connection: Connection, run_id: str) -> Row:
        query = """
            SELECT run_id, candidate_ids, candidates_hash, approved_hash, approved_by, approval_basis, question, candidates_at
            FROM refund_ledger.refund_runs WHERE run_id = :run_id FOR UPDATE"""
        run = (await connection.execute(query, {"run_id": run_id})).one_or_none()
        # An earlier version noted less of a run.
        if run is None or not run.approval_basis:
            raise _no_run(run_id)
        return run

    async def _check_approval(
        self, connection: Connection, run: Row, candidate_ids: Sequence[int], limits: Limits, now: datetime
    ) -> None:
        if run.approved_hash != hash_of_ids(candidate_ids):
            raise LedgerError(
                f"Run {printable(run.run_id)} holds no approval of exactly these {len(candidate_ids)} refunds, so none is released: "
                "clear pull_approved and let the run go on from there."
            )
        if run.approved_by is None:
            # Another run may have passed the gate since nobody had to be asked.
            today = await self._released_without_a_person(connection, run, now)
            if why := await _why_ask(connection, limits, today, run):
                raise LedgerError(
                    f"{why} That was not so when run {printable(run.run_id)} was let pass: clear approve_run, and it asks a person."
                )

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
        today = await _first_released(connection, "at >= :day", {"day": self._day(now)})
        return decide_at_gate(rows, control.limits, run=by_this_run, day=today, earlier=before, now=now)

    async def _released_without_a_person(
        self, connection: Connection, run: Row, now: datetime
    ) -> dict[str, dict[str, int]]:
        """Return what other runs released today without a person, and this one before it was pulled anew."""
        condition = """run = :run_id AND at < :candidates_at
            OR run IS DISTINCT FROM :run_id AND approver IS NULL AND at >= :day"""
        values = {"run_id": run.run_id, "candidates_at": run.candidates_at, "day": self._day(now)}
        return await _first_released(connection, condition, values)

    def _day(self, now: datetime) -> datetime:
        return day_start(now, self._database.settings.timezone)

    async def terminals(self, refund_ids: Sequence[int]) -> set[str]:
        """Return the processing terminals of refunds."""
        query = f"SELECT DISTINCT processing_terminal_id FROM refund_ledger.refund_instructions WHERE id = ANY({IDS})"
        async with self._database.transaction() as (connection, _):
            return set((await connection.execute(query, {"ids": as_array(refund_ids)})).scalars())

    async def note(self, run_id: str, findings: dict[str, Any]) -> None:
        """Add to what a run's report has to name; nothing happens when there is no such run."""
        update = "UPDATE refund_ledger.refund_runs SET findings = findings || CAST(:findings AS jsonb) WHERE run_id = :run_id"
        async with self._database.transaction() as (connection, _):
            await connection.execute(update, {"run_id": run_id, "findings": json.dumps(findings)})

    async def finish_run(self, run_id: str) -> None:
        """Note that a run has been reported."""
        update = "UPDATE refund_ledger.refund_runs SET finished_at = :now WHERE run_id = :run_id"
        async with self._database.transaction() as (connection, now):
            await connection.execute(update, {"run_id": run_id, "now": now})


@dataclass(frozen=True, slots=True)
class _State:
    """The paused scopes and the limits."""

    paused: set[str]
    limits: Limits


def _no_run(run_id: str) -> LedgerError:
    return LedgerError(
        f"The ledger holds no candidates of run {printable(run_id)}: clear pull_approved and let the run go on from there."
    )


async def _why_ask(connection: Connection, limits: Limits, today: Totals, run: Row) -> str | None:
    # Counted now and not when the run was pulled: another run with these refunds may have been rejected since.
    rejected = f"SELECT count(run_rejected_by) FROM refund_ledger.refund_states WHERE refund_id {OF_MANY}"
    count = (await connection.execute(rejected, {"ids": as_array(run.candidate_ids)})).scalar_one()
    return who_to_ask(limits, today=today, run=run.approval_basis["totals"], rejected=count)


async def _approval_basis(connection: Connection, ids: Sequence[int]) -> dict[str, Any]:
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


async def _first_released(
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
