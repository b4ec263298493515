"""What a run is about: its candidates, and its row from the pull to the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from include.refunds.ledger.approvals import approval_basis, hash_of_ids
from include.refunds.ledger.conditions import NOT_PAUSED, RELEASE_VALID, REPLACED_STANDS
from include.refunds.ledger.connection import as_array
from include.refunds.ledger.database import Part
from include.refunds.ledger.rows import NEVER_POSTED, OF_MANY, lock
from include.refunds.limits import totals

# A refund in doubt whose wait ends within this time is worth waiting for inside a run.
DUE_WITHIN = timedelta(minutes=5)


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


class Runs(Part):
    """The rows of ``refund_runs``, and the refunds that a run is about."""

    async def return_stale_releases(self) -> int:
        """
        Return released refunds that nobody sent in time to ``approved``, and their number.

        Before that, what a worker claimed and never sent, because it was killed, is released again: the
        source may have withdrawn it since.
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

        :param standing: only those of these source_refs, by which the source stands. A reissue has no row in
            the source: two people approved it in the ledger, so it stands by itself.
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
        rows = await self._execute(
            query,
            standing=None if standing is None else list(standing),
            ids=None if ids is None else as_array(ids),
            refs=list(selection.source_refs) or None,
            terminal=selection.processing_terminal_id,
            before=selection.approved_before,
            limit=selection.limit,
        )
        return [Candidate(**row) for row in rows]

    async def due(self) -> list[int]:
        """
        Return the ids of unknown refunds, and of those sent without a record, whose wait has ended, or ends
        soon enough to be waited for.
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
        Note what a run is about. A pull that is repeated starts the run's row anew and takes its approval
        back.

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
                    "basis": json.dumps(await approval_basis(connection, ids)),
                    "findings": json.dumps(findings),
                    "at": at,
                },
            )

    async def note(self, run_id: str, findings: dict[str, Any]) -> None:
        """Add to what a run's report has to name; nothing happens when there is no such run."""
        update = "UPDATE refund_ledger.refund_runs SET findings = findings || CAST(:findings AS jsonb) WHERE run_id = :run_id"
        await self._execute(update, run_id=run_id, findings=json.dumps(findings))

    async def finish_run(self, run_id: str) -> None:
        """Note that a run has been reported."""
        update = "UPDATE refund_ledger.refund_runs SET finished_at = :now WHERE run_id = :run_id"
        await self._execute(update, run_id=run_id)
