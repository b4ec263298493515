"""A run's candidates, its approval, and the release: the one door."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from include.refunds.classify import EVERYTHING
from include.refunds.ledger.base import LedgerBase, LedgerError
from include.refunds.ledger.control import NOT_PAUSED

# A release is good for so long; what was not sent by then has to pass the door again.
RELEASE_VALID = timedelta(hours=24)

# A refund in doubt whose wait ends within this time is worth waiting for inside a run.
DUE_WITHIN = timedelta(minutes=5)

# True of a row r of refunds that replaces none, or of whose chain none was paid, or none is any more: a refund that turned out to be
# paid after all must not be paid again by a reissue.
REPLACED_STANDS = "(r.replaces IS NULL OR refund_ledger.ended_unpaid(r.replaces))"


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


def totals(amounts: Iterable[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Return count and sum per currency, of (currency, amount in minor units) pairs."""
    result: dict[str, dict[str, int]] = {}
    for currency, amount in amounts:
        entry = result.setdefault(currency, {"count": 0, "amount": 0})
        entry["count"] += 1
        entry["amount"] += amount
    return result


def hash_of_ids(ids: Iterable[int]) -> str:
    """Return the hash under which exactly these refunds are approved and released."""
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()


class Runs(LedgerBase):
    """What a run reads and writes before and after the sending."""

    async def return_stale_releases(self) -> int:
        """Return released refunds that nobody sent in time to ``approved``, and their number."""
        update = text("""
            UPDATE refund_ledger.refunds SET status = 'approved', reason = 'The release was not used in time.', updated_at = :now
            WHERE source = :source AND status = 'released' AND released_at <= :oldest""")
        async with self._transaction() as (connection, now):
            values = {"source": self._settings.source, "now": now, "oldest": now - RELEASE_VALID}
            return (await connection.execute(update, values)).rowcount

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
        query = text(f"""
            SELECT {", ".join(Candidate.__slots__)} FROM refund_ledger.refunds AS r
            WHERE source = :source AND status IN ('approved', 'released') AND payroc_refund_id IS NULL
              AND {NOT_PAUSED} AND {REPLACED_STANDS}
              AND (CAST(:standing AS text[]) IS NULL OR source_ref = ANY(CAST(:standing AS text[])) OR replaces IS NOT NULL)
              AND (CAST(:ids AS bigint[]) IS NULL OR id = ANY(CAST(:ids AS bigint[])))
              AND (CAST(:refs AS text[]) IS NULL OR source_ref = ANY(CAST(:refs AS text[])))
              AND (CAST(:terminal AS text) IS NULL OR processing_terminal_id = :terminal)
              AND (CAST(:before AS timestamptz) IS NULL OR approved_at < :before)
            ORDER BY approved_at, id LIMIT :limit""")
        values = {
            "source": self._settings.source,
            "standing": None if standing is None else list(standing),
            "ids": None if ids is None else list(ids),
            "refs": list(selection.source_refs) or None,
            "terminal": selection.processing_terminal_id,
            "before": selection.approved_before,
            "limit": selection.limit,
        }
        async with self._transaction() as (connection, _):
            return [Candidate(**row) for row in (await connection.execute(query, values)).mappings()]

    async def due(self) -> list[int]:
        """Return the ids of refunds in doubt whose wait has ended, or ends soon enough to be waited for."""
        query = text("""
            SELECT id FROM refund_ledger.refunds
            WHERE source = :source AND status IN ('sending', 'unknown') AND lease_until <= :soon AND next_attempt_at <= :soon
            ORDER BY approved_at, id""")
        async with self._transaction() as (connection, now):
            values = {"source": self._settings.source, "soon": now + DUE_WITHIN}
            return list((await connection.execute(query, values)).scalars())

    async def begin_run(
        self, run_id: str, params: dict[str, Any], candidates: Sequence[Candidate], findings: dict[str, Any], at: datetime
    ) -> None:
        """
        Note what a run is about. A pull that is repeated starts the run's row anew and takes its approval back.

        :param params: the run's params, as JSON.
        :param candidates: the refunds it would release.
        :param findings: what the report has to name, as JSON.
        :param at: when the run's pull began.
        """
        upsert = text("""
            INSERT INTO refund_ledger.refund_runs (run_id, params, candidates, candidate_totals, candidates_hash, findings, started_at)
            VALUES (:run_id, CAST(:params AS jsonb), :candidates, CAST(:totals AS jsonb), :hash, CAST(:findings AS jsonb), :at)
            ON CONFLICT (run_id) DO UPDATE SET params = EXCLUDED.params, candidates = EXCLUDED.candidates,
                candidate_totals = EXCLUDED.candidate_totals, candidates_hash = EXCLUDED.candidates_hash,
                findings = EXCLUDED.findings, started_at = EXCLUDED.started_at, finished_at = NULL,
                approval_needed = NULL, approved_by = NULL, approved_at = NULL, approved_hash = NULL,
                released = NULL, released_totals = NULL""")
        async with self._transaction() as (connection, _):
            await connection.execute(
                upsert,
                {
                    "run_id": run_id,
                    "params": json.dumps(params),
                    "candidates": len(candidates),
                    "totals": json.dumps(totals((item.currency, item.amount) for item in candidates)),
                    "hash": hash_of_ids(item.id for item in candidates),
                    "findings": json.dumps(findings),
                    "at": at,
                },
            )

    async def record_no_approval_needed(self, run_id: str) -> None:
        """
        Note that a run's candidates may be released without asking a person.

        :raises LedgerError: when no pull of this run stored its candidates.
        """
        update = text(
            "UPDATE refund_ledger.refund_runs SET approval_needed = false, approved_hash = candidates_hash WHERE run_id = :run_id"
        )
        async with self._transaction() as (connection, _):
            if (await connection.execute(update, {"run_id": run_id})).rowcount == 0:
                raise _no_run(run_id)

    async def release(self, run_id: str, candidate_ids: Sequence[int], standing_ids: Sequence[int], withdrawn: dict[int, str]) -> list[int]:
        """
        Release refunds for sending: the one door, in one transaction under a lock on ``refund_control``.

        :param run_id: the run that releases. Its row has to hold an approval of exactly these candidates.
        :param candidate_ids: ids of the run's candidates.
        :param standing_ids: the candidates that were looked up in the source, and that it stands by. No other one is released: one that
            was paused then has not been looked up, though the pause may have ended since.
        :param withdrawn: candidates that the source no longer stands by, each with what was found: they are not released,
            and a release that they already had is taken back.
        :returns: ids that may be sent now, oldest approval first; paused terminals' are left out.
        :raises LedgerError: when the run holds no answer about its approval, or one about other candidates.
        """
        # One release at a time: what is counted against a cap or held against a pause stays true until the commit.
        lock = text("SELECT scope, paused_at IS NOT NULL AS paused FROM refund_ledger.refund_control ORDER BY scope FOR UPDATE")
        run_query = text("SELECT approval_needed, approved_hash FROM refund_ledger.refund_runs WHERE run_id = :run_id FOR UPDATE")
        take_back = text("""
            UPDATE refund_ledger.refunds SET status = 'approved', reason = :reason, updated_at = :now
            WHERE id = :id AND status = 'released'""")
        release = text(f"""
            UPDATE refund_ledger.refunds AS r SET status = 'released', reason = NULL,
                released_by = :actor, released_run = :run_id, released_at = :now, updated_at = :now
            WHERE id = ANY(:ids) AND source = :source AND status = 'approved' AND processing_terminal_id <> ALL(:paused)
              AND {REPLACED_STANDS}""")
        query = text(f"""
            SELECT id, amount, currency FROM refund_ledger.refunds AS r
            WHERE id = ANY(:ids) AND source = :source AND status = 'released' AND processing_terminal_id <> ALL(:paused)
              AND {REPLACED_STANDS}
            ORDER BY approved_at, id""")
        note = text("""
            UPDATE refund_ledger.refund_runs SET released = :released, released_totals = CAST(:totals AS jsonb),
                findings = findings || jsonb_build_object('withdrawn', COALESCE(findings -> 'withdrawn', '{}') || CAST(:withdrawn AS jsonb))
            WHERE run_id = :run_id""")
        async with self._transaction() as (connection, now):
            paused = {row.scope for row in await connection.execute(lock) if row.paused}
            run = (await connection.execute(run_query, {"run_id": run_id})).one_or_none()
            if run is None:
                raise _no_run(run_id)
            if run.approved_hash != hash_of_ids(candidate_ids):
                raise LedgerError(
                    f"Run {run_id} holds no approval of exactly these {len(candidate_ids)} refunds, so none is released: "
                    "clear pull_approved and let the run go on from there."
                )
            for refund_id, finding in withdrawn.items():
                await connection.execute(take_back, {"id": refund_id, "reason": finding, "now": now})
            values = {
                "ids": [] if EVERYTHING in paused else sorted({*standing_ids} & {*candidate_ids}),
                "source": self._settings.source,
                "paused": list(paused),
            }
            await connection.execute(release, {**values, "actor": self._actor, "run_id": run_id, "now": now})
            released = (await connection.execute(query, values)).all()
            await connection.execute(
                note,
                {
                    "run_id": run_id,
                    "released": len(released),
                    "totals": json.dumps(totals((row.currency, row.amount) for row in released)),
                    "withdrawn": json.dumps({str(key): value for key, value in withdrawn.items()}),
                },
            )
            return [row.id for row in released]

    async def terminals(self, refund_ids: Sequence[int]) -> set[str]:
        """Return the processing terminals of refunds."""
        query = text("SELECT DISTINCT processing_terminal_id FROM refund_ledger.refunds WHERE id = ANY(:ids)")
        async with self._transaction() as (connection, _):
            return set((await connection.execute(query, {"ids": list(refund_ids)})).scalars())

    async def note(self, run_id: str, findings: dict[str, Any]) -> None:
        """Add to what a run's report has to name; nothing happens when there is no such run."""
        update = text("UPDATE refund_ledger.refund_runs SET findings = findings || CAST(:findings AS jsonb) WHERE run_id = :run_id")
        async with self._transaction() as (connection, _):
            await connection.execute(update, {"run_id": run_id, "findings": json.dumps(findings)})

    async def finish_run(self, run_id: str) -> None:
        """Note that a run has been reported."""
        update = text("UPDATE refund_ledger.refund_runs SET finished_at = :now WHERE run_id = :run_id")
        async with self._transaction() as (connection, now):
            await connection.execute(update, {"run_id": run_id, "now": now})


def _no_run(run_id: str) -> LedgerError:
    return LedgerError(f"The ledger holds no candidates of run {run_id}: clear pull_approved and let the run go on from there.")
