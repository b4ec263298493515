"""
The ledger in Postgres. Each method is one transaction; together they are the only code that writes to it.

The database's clock is the clock: every transaction reads it once and uses that instant throughout. A simulation may
give a clock of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import URL, RowMapping, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from include.refunds.classify import EVERYTHING, Outcome, Verdict
from include.refunds.refund import History, Refund
from include.refunds.revision import REVISION, VERSION_TABLE
from include.refunds.settings import Settings
from include.refunds.states import IN_DOUBT, Status
from include.refunds.transitions import Change, decide

# A release is good for so long; what was not sent by then has to pass the door again.
RELEASE_VALID = timedelta(hours=24)

# A refund in doubt whose wait ends within this time is worth waiting for inside a run.
DUE_WITHIN = timedelta(minutes=5)

_COLUMNS = ", ".join(f"r.{name}" for name in Refund.__slots__)


class LedgerError(Exception):
    """The ledger can't be used; the message says what is wrong and what to run."""


class LedgerUnavailable(LedgerError):
    """The ledger's database does not answer; it may a little later."""


class NoSuchRefund(LedgerError):
    """The ledger holds no refund with this id."""


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


@dataclass(frozen=True, slots=True)
class NewRefund:
    """A validated source row, ready to be stored: the columns of ``refund_ledger.refunds`` that never change."""

    source_ref: str
    processing_terminal_id: str
    order_id: str
    description: str
    amount: int
    currency: str
    payee_last4: str | None
    payee_fingerprint: str
    request_sha256: str
    requested_by: str
    approved_by: str
    approved_at: datetime
    idempotency_key: str


# The columns of NewRefund that a changed source row may differ in, with the words that people know them by.
_COMPARED = {
    "processing_terminal_id": "processing_terminal_id",
    "order_id": "order_id",
    "description": "description",
    "amount": "amount",
    "currency": "currency",
    "payee_fingerprint": "payee's account",
    "requested_by": "requested_by",
    "approved_by": "approved_by",
}


def differences(row: NewRefund, stored: RowMapping) -> list[str]:
    """Return the names of what differs between a source row and the refund it once became."""
    found = [word for column, word in _COMPARED.items() if getattr(row, column) != stored[column]]
    if not found and row.request_sha256 != stored["request_sha256"]:
        found = ["payee's details"]
    return found


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
    """A refund that a run would release."""

    id: int
    source_ref: str
    processing_terminal_id: str
    order_id: str
    amount: int
    currency: str
    payee_last4: str | None
    attempts: int


@dataclass(frozen=True, slots=True)
class WriteBack:
    """One line for the source: what became of a refund, or why its row is invalid."""

    source_ref: str
    status: str
    payroc_refund_id: str | None
    payroc_status: str | None
    reason: str | None
    updated_at: datetime


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


class Ledger:
    """
    The refund ledger.

    :param engine: an async engine on the ledger's database (driver ``postgresql+psycopg``).
    :param settings: source, waits, key window.
    :param actor: who changes something, as the events name it.
    :param clock: the time to use instead of the database's, for simulations.
    """

    def __init__(self, engine: AsyncEngine, settings: Settings, *, actor: str, clock: Callable[[], datetime] | None = None) -> None:
        self.engine = engine
        self._settings = settings
        self._actor = actor
        self._clock = clock
        self._rehearsal: AsyncConnection | None = None

    # -- the frame of every method ------------------------------------------------------------------------------

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[tuple[AsyncConnection, datetime]]:
        """Yield a connection in a transaction, and the instant that counts as now in it."""
        if self._rehearsal is not None:
            async with self._rehearsal.begin_nested():
                yield self._rehearsal, await self._begin(self._rehearsal)
        else:
            async with self.engine.begin() as connection:
                yield connection, await self._begin(connection)

    async def _begin(self, connection: AsyncConnection) -> datetime:
        statement = text("SELECT set_config('refund_ledger.actor', :actor, true), clock_timestamp()")
        row = (await connection.execute(statement, {"actor": self._actor})).one()
        return self._clock() if self._clock is not None else row[1]

    @asynccontextmanager
    async def rehearsal(self) -> AsyncIterator[Ledger]:
        """Yield a ledger whose every change is rolled back at the end."""
        async with self.engine.connect() as connection, connection.begin() as transaction:
            ledger = Ledger(self.engine, self._settings, actor=self._actor, clock=self._clock)
            ledger._rehearsal = connection
            try:
                yield ledger
            finally:
                await transaction.rollback()

    async def now(self) -> datetime:
        """Return the ledger's time."""
        async with self._transaction() as (_, now):
            return now

    async def check(self) -> None:
        """
        Make sure that the ledger can be reached and has this version's schema.

        :raises LedgerUnavailable: when it can't be reached.
        :raises LedgerError: when it was never migrated, or is at another revision.
        """
        query = text(f"SELECT version_num FROM refund_ledger.{VERSION_TABLE}")
        try:
            async with self.engine.connect() as connection:
                found = (await connection.execute(query)).scalar_one_or_none()
        except ProgrammingError:
            found = None
        except (DBAPIError, OSError) as error:
            cause = type(getattr(error, "orig", None) or error).__name__
            raise LedgerUnavailable(
                f"The ledger database at {self.engine.url.host}:{self.engine.url.port} can't be used ({cause}): "
                "check the connection refunds_ledger."
            ) from None
        if found != REVISION:
            raise LedgerError(
                f"The ledger is at revision {found or 'none'}, this version needs {REVISION}: run `python -m include.refunds migrate`."
            )

    # -- the queue: pull, runs, release -------------------------------------------------------------------------

    async def stored(self, source_refs: Sequence[str]) -> dict[str, RowMapping]:
        """Return what the ledger already holds of these source rows, by source_ref."""
        query = text(
            "SELECT source_ref, id, status, request_sha256, "
            + ", ".join(_COMPARED)
            + " FROM refund_ledger.refunds WHERE source = :source AND source_ref = ANY(:refs)"
        )
        async with self._transaction() as (connection, _):
            result = await connection.execute(query, {"source": self._settings.source, "refs": list(source_refs)})
            return {row["source_ref"]: row for row in result.mappings()}

    async def store(self, rows: Sequence[tuple[NewRefund, bytes]], invalid: dict[str, dict[str, str]], valid: Sequence[str]) -> set[str]:
        """
        Store new refunds and the errors of invalid source rows. A row that exists already is left as it is.

        :param rows: validated rows, each with its encrypted request.
        :param invalid: errors by source_ref and field.
        :param valid: source_refs of all rows that validate now; their old errors are forgotten.
        :returns: the source_refs of ``rows`` that were stored; one that is missing collides with another refund.
        """
        insert = text("""
            INSERT INTO refund_ledger.refunds (source, source_ref, processing_terminal_id, order_id, description, amount, currency,
                payee_last4, payee_fingerprint, request, request_sha256, requested_by, approved_by, approved_at,
                idempotency_key, created_at, updated_at)
            SELECT :source, source_ref, processing_terminal_id, order_id, description, amount, currency,
                payee_last4, payee_fingerprint, convert_to(request, 'UTF8'), request_sha256, requested_by, approved_by, approved_at,
                idempotency_key, :now, :now
            FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS row (source_ref text, processing_terminal_id text, order_id text,
                description text, amount bigint, currency text, payee_last4 text, payee_fingerprint text, request text,
                request_sha256 text, requested_by text, approved_by text, approved_at timestamptz, idempotency_key uuid)
            ON CONFLICT DO NOTHING
            RETURNING source_ref""")
        note = text("""
            INSERT INTO refund_ledger.invalid_rows AS known (source, source_ref, errors, first_seen_at, last_seen_at, updated_at)
            SELECT :source, key, value, :now, :now, :now FROM jsonb_each(CAST(:invalid AS jsonb))
            ON CONFLICT (source, source_ref) DO UPDATE SET last_seen_at = :now, errors = EXCLUDED.errors,
                updated_at = CASE WHEN known.errors = EXCLUDED.errors THEN known.updated_at ELSE :now END""")
        mended = text("DELETE FROM refund_ledger.invalid_rows WHERE source = :source AND source_ref = ANY(:refs)")
        async with self._transaction() as (connection, now):
            common = {"source": self._settings.source, "now": now}
            found = set((await connection.execute(insert, {**common, "rows": _as_json(rows)})).scalars())
            await connection.execute(note, {**common, "invalid": json.dumps(invalid)})
            await connection.execute(mended, {**common, "refs": list(valid)})
            return found

    async def return_stale_releases(self) -> int:
        """Return released refunds that nobody sent in time to ``approved``, and their number."""
        update = text("""
            UPDATE refund_ledger.refunds SET status = 'approved', reason = 'The release was not used in time.', updated_at = :now
            WHERE source = :source AND status = 'released' AND released_at <= :oldest""")
        async with self._transaction() as (connection, now):
            values = {"source": self._settings.source, "now": now, "oldest": now - RELEASE_VALID}
            return (await connection.execute(update, values)).rowcount

    async def candidates(self, selection: Selection, ids: Sequence[int] | None = None) -> list[Candidate]:
        """
        Return the refunds that are approved, or released and not yet sent, oldest approval first.

        :param ids: only those of these ids.
        """
        query = text(f"""
            SELECT {", ".join(Candidate.__slots__)} FROM refund_ledger.refunds
            WHERE source = :source AND status IN ('approved', 'released')
              AND (CAST(:ids AS bigint[]) IS NULL OR id = ANY(CAST(:ids AS bigint[])))
              AND (CAST(:refs AS text[]) IS NULL OR source_ref = ANY(CAST(:refs AS text[])))
              AND (CAST(:terminal AS text) IS NULL OR processing_terminal_id = :terminal)
              AND (CAST(:before AS timestamptz) IS NULL OR approved_at < :before)
            ORDER BY approved_at, id LIMIT :limit""")
        values = {
            "source": self._settings.source,
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

    async def begin_run(self, run_id: str, params: dict[str, Any], candidates: Sequence[Candidate], findings: dict[str, Any]) -> None:
        """
        Note what a run is about. A pull that is repeated starts the run's row anew and takes its approval back.

        :param params: the run's params, as JSON.
        :param candidates: the refunds it would release.
        :param findings: what the report has to name, as JSON.
        """
        upsert = text("""
            INSERT INTO refund_ledger.refund_runs (run_id, params, candidates, candidate_totals, candidates_hash, findings, started_at)
            VALUES (:run_id, CAST(:params AS jsonb), :candidates, CAST(:totals AS jsonb), :hash, CAST(:findings AS jsonb), :now)
            ON CONFLICT (run_id) DO UPDATE SET params = EXCLUDED.params, candidates = EXCLUDED.candidates,
                candidate_totals = EXCLUDED.candidate_totals, candidates_hash = EXCLUDED.candidates_hash,
                findings = EXCLUDED.findings, approval_needed = NULL, approved_by = NULL, approved_at = NULL, approved_hash = NULL,
                finished_at = NULL""")
        async with self._transaction() as (connection, now):
            await connection.execute(
                upsert,
                {
                    "run_id": run_id,
                    "params": json.dumps(params),
                    "candidates": len(candidates),
                    "totals": json.dumps(totals((item.currency, item.amount) for item in candidates)),
                    "hash": hash_of_ids(item.id for item in candidates),
                    "findings": json.dumps(findings),
                    "now": now,
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

    async def release(self, run_id: str, candidate_ids: Sequence[int], withdrawn: dict[int, str]) -> list[int]:
        """
        Release refunds for sending: the one door, in one transaction under a lock on ``refund_control``.

        :param run_id: the run that releases. Its row has to hold an approval of exactly these candidates.
        :param candidate_ids: ids of the run's candidates.
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
        release = text("""
            UPDATE refund_ledger.refunds SET status = 'released', reason = NULL,
                released_by = :actor, released_run = :run_id, released_at = :now, updated_at = :now
            WHERE id = ANY(:ids) AND source = :source AND status = 'approved' AND processing_terminal_id <> ALL(:paused)""")
        query = text("""
            SELECT id, amount, currency FROM refund_ledger.refunds
            WHERE id = ANY(:ids) AND source = :source AND status = 'released' AND processing_terminal_id <> ALL(:paused)
            ORDER BY approved_at, id""")
        note = text("""
            UPDATE refund_ledger.refund_runs SET released = :released, released_totals = CAST(:totals AS jsonb),
                findings = findings || CAST(:findings AS jsonb) WHERE run_id = :run_id""")
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
                "ids": [] if EVERYTHING in paused else [item for item in candidate_ids if item not in withdrawn],
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
                    "findings": json.dumps({"withdrawn": {str(key): value for key, value in withdrawn.items()}}),
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

    # -- sending ------------------------------------------------------------------------------------------------

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
            refund = await _select(connection, refund_id)
            return refund, await _history(connection, refund_id, before=refund.attempts + 1), now

    async def bind_environment(self, environment: str) -> None:
        """
        Make sure that the ledger belongs to this Payroc; a ledger that belongs to none yet now belongs to it.

        :param environment: Payroc's API base URL.
        :raises LedgerError: when the ledger belongs to another one.
        """
        lock = text("SELECT environment FROM refund_ledger.refund_control WHERE scope = '*' FOR UPDATE")
        bind = text("UPDATE refund_ledger.refund_control SET environment = :environment WHERE scope = '*'")
        async with self._transaction() as (connection, now):
            found = (await connection.execute(lock)).scalar_one()
            if found is None:
                await connection.execute(bind, {"environment": environment})
                await self._event(connection, now, "environment", reason=environment)
            elif found != environment:
                raise LedgerError(
                    f"This ledger belongs to Payroc at {found}, the connection points to {environment}: "
                    "use the connection it belongs to, or a ledger of its own."
                )

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
              AND NOT EXISTS (SELECT FROM refund_ledger.refund_control
                              WHERE paused_at IS NOT NULL AND scope IN ('*', r.processing_terminal_id))
              AND (first_sent_at IS NULL OR (first_sent_at > :window_start AND sent_with = :sent_with))
              AND (status = 'released' AND released_at > :oldest_release
                   OR status IN ('unknown', 'sending') AND lease_until <= :now AND next_attempt_at <= :now)
            RETURNING {_COLUMNS}""")
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
            refund = _refund(row)
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
            return Claim(refund, await _history(connection, refund_id, before=refund.attempts))

    async def may_post(self, claim: Claim, seconds: float) -> bool:
        """
        Tell, right before the POST, whether it may still go.

        :param seconds: how long the POST may take; the lease has to last that long.
        """
        query = text("""
            SELECT attempts = :attempt AND status = 'sending' AND lease_until > :until
               AND NOT EXISTS (SELECT FROM refund_ledger.refund_control
                               WHERE paused_at IS NOT NULL AND scope IN ('*', processing_terminal_id))
            FROM refund_ledger.refunds WHERE id = :id""")
        async with self._transaction() as (connection, now):
            values = {"id": claim.refund.id, "attempt": claim.attempt, "until": now + timedelta(seconds=seconds)}
            return bool((await connection.execute(query, values)).scalar_one())

    async def record(self, refund_id: int, verdict: Verdict, attempt: int | None = None) -> Refund:
        """
        Record what an attempt, a look-up or the follow-up found.

        :param attempt: the attempt it comes from. ``None``: from no attempt; then anything but a Payroc object counts
            only while nobody holds the refund.
        :returns: the refund as it is afterwards.
        """
        async with self._transaction() as (connection, now):
            refund = await _select(connection, refund_id, for_update=True)
            if attempt is not None:
                await _finish_attempt(connection, refund_id, attempt, verdict, now)
                current = refund.status is Status.SENDING and refund.attempts == attempt
            else:
                current = refund.status in IN_DOUBT and refund.lease_until is not None and refund.lease_until <= now
            change = decide(
                refund,
                verdict,
                await _history(connection, refund_id, before=attempt or refund.attempts + 1),
                current=current,
                foreign_id=await _is_foreign(connection, refund_id, verdict),
                now=now,
                unknown_wait=timedelta(seconds=self._settings.unknown_wait_seconds),
            )
            if change is not None:
                await self._apply(connection, refund, change, now)
            return await _select(connection, refund_id)

    async def _apply(self, connection: AsyncConnection, refund: Refund, change: Change, now: datetime) -> None:
        update = text("""
            UPDATE refund_ledger.refunds SET
                status = :status, reason = COALESCE(CAST(:reason AS text), reason), updated_at = :now,
                lease_until = CAST(:wait_until AS timestamptz), next_attempt_at = CAST(:wait_until AS timestamptz),
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
                    "never_sent": change.never_sent,
                },
            )
        if sighting and not change.steps:
            await connection.execute(seen, values)
        if change.contradiction:
            await self._event(connection, now, "contradiction", refund_id=refund.id, reason=change.contradiction)
        if change.pause:
            await self._pause(connection, change.pause, change.reason or "", now)

    # -- pause --------------------------------------------------------------------------------------------------

    async def pause(self, scope: str, reason: str) -> None:
        """
        Pause the sending. What is paused already keeps its first reason.

        :param scope: a processing terminal id, or ``*`` for everything.
        """
        async with self._transaction() as (connection, now):
            await self._pause(connection, scope, reason, now)

    async def resume(self, scope: str, reason: str) -> bool:
        """Let the sending go on; ``False`` when it was not paused for this scope."""
        update = text("""
            UPDATE refund_ledger.refund_control SET paused_at = NULL, paused_by = NULL, pause_reason = NULL
            WHERE scope = :scope AND paused_at IS NOT NULL""")
        async with self._transaction() as (connection, now):
            if (await connection.execute(update, {"scope": scope})).rowcount == 0:
                return False
            await self._event(connection, now, "resume", reason=reason, detail={"scope": scope})
            return True

    async def pauses(self) -> dict[str, str]:
        """Return the reason of each pause, by scope."""
        query = text("SELECT scope, pause_reason FROM refund_ledger.refund_control WHERE paused_at IS NOT NULL ORDER BY scope")
        async with self._transaction() as (connection, _):
            return {row.scope: row.pause_reason for row in await connection.execute(query)}

    async def _pause(self, connection: AsyncConnection, scope: str, reason: str, now: datetime) -> None:
        upsert = text("""
            INSERT INTO refund_ledger.refund_control AS control (scope, paused_at, paused_by, pause_reason)
            VALUES (:scope, :now, :actor, :reason)
            ON CONFLICT (scope) DO UPDATE SET paused_at = :now, paused_by = :actor, pause_reason = :reason
            WHERE control.paused_at IS NULL""")
        values = {"scope": scope, "now": now, "actor": self._actor, "reason": reason}
        if (await connection.execute(upsert, values)).rowcount:
            await self._event(connection, now, "pause", reason=reason, detail={"scope": scope})

    async def _event(
        self,
        connection: AsyncConnection,
        now: datetime,
        event: str,
        *,
        reason: str,
        refund_id: int | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        insert = text("""
            INSERT INTO refund_ledger.refund_events (at, event, refund_id, actor, reason, detail)
            VALUES (:now, :event, :refund_id, :actor, :reason, CAST(:detail AS jsonb))""")
        values = {"now": now, "event": event, "refund_id": refund_id, "actor": self._actor, "reason": reason}
        await connection.execute(insert, {**values, "detail": json.dumps(detail) if detail else None})

    # -- follow-up ----------------------------------------------------------------------------------------------

    async def in_doubt(self) -> list[Refund]:
        """Return all refunds that are sending or unknown."""
        return await self._refunds("r.status IN ('sending', 'unknown')", {})

    async def followed(self, settled_since: timedelta) -> list[Refund]:
        """
        Return the refunds whose further way Payroc still has to tell: accepted, or settled not long ago.

        :param settled_since: how long a settled refund is followed, since a bank may return it after it settled.
        """
        now = await self.now()
        return await self._refunds(
            "r.status = 'accepted' OR (r.status = 'settled' AND r.updated_at > :since)", {"since": now - settled_since}
        )

    async def _refunds(self, condition: str, values: dict[str, Any]) -> list[Refund]:
        query = text(f"SELECT {_COLUMNS} FROM refund_ledger.refunds AS r WHERE source = :source AND ({condition}) ORDER BY id")
        async with self._transaction() as (connection, _):
            result = await connection.execute(query, {**values, "source": self._settings.source})
            return [_refund(row) for row in result.mappings()]

    # -- write-back ---------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def write_back_lock(self) -> AsyncIterator[None]:
        """Hold the lock that lets write-backs run one at a time, so that an older one never overtakes a newer one."""
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT pg_advisory_lock(hashtext('refund_ledger.write_back'))"))
            await connection.commit()
            try:
                yield
            finally:
                await connection.execute(text("SELECT pg_advisory_unlock(hashtext('refund_ledger.write_back'))"))

    async def due_write_backs(self, limit: int, after: str = "") -> list[WriteBack]:
        """
        Return changes that the source does not have yet, ordered by source_ref.

        :param limit: at most so many.
        :param after: only those with a greater source_ref.
        """
        query = text("""
            SELECT * FROM (
                SELECT source_ref, status, payroc_refund_id, payroc_status, reason, updated_at FROM refund_ledger.refunds
                WHERE source = :source AND written_back_at IS DISTINCT FROM updated_at
                UNION ALL
                SELECT source_ref, 'invalid', NULL, NULL,
                       (SELECT string_agg(key || ': ' || value, '; ' ORDER BY key) FROM jsonb_each_text(errors)), updated_at
                FROM refund_ledger.invalid_rows AS invalid
                WHERE source = :source AND written_back_at IS DISTINCT FROM updated_at
                  AND NOT EXISTS (SELECT FROM refund_ledger.refunds AS r
                                  WHERE r.source = invalid.source AND r.source_ref = invalid.source_ref)
            ) AS due WHERE source_ref > :after ORDER BY source_ref LIMIT :limit""")
        async with self._transaction() as (connection, _):
            result = await connection.execute(query, {"source": self._settings.source, "after": after, "limit": limit})
            return [WriteBack(**row) for row in result.mappings()]

    async def mark_written_back(self, written: Sequence[WriteBack]) -> None:
        """Note what the source has now: the very ``updated_at`` that was read, so a later change stays due."""
        rows = json.dumps([{"source_ref": item.source_ref, "updated_at": item.updated_at.isoformat()} for item in written])
        async with self._transaction() as (connection, _):
            for table in ("refunds", "invalid_rows"):
                update = text(f"""
                    UPDATE refund_ledger.{table} AS target SET written_back_at = row.updated_at
                    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS row (source_ref text, updated_at timestamptz)
                    WHERE target.source = :source AND target.source_ref = row.source_ref AND target.updated_at = row.updated_at""")
                await connection.execute(update, {"rows": rows, "source": self._settings.source})


def create_ledger_engine(url: URL, **options: Any) -> AsyncEngine:
    """Return an async engine for the ledger, with a connect timeout so that a dead host is an error and not a wait."""
    return create_async_engine(url, connect_args={"connect_timeout": 10}, pool_pre_ping=True, hide_parameters=True, **options)


def _no_run(run_id: str) -> LedgerError:
    return LedgerError(f"The ledger holds no candidates of run {run_id}: clear pull_approved and let the run go on from there.")


def _refund(row: RowMapping) -> Refund:
    return Refund(**{**row, "status": Status(row["status"])})


async def _select(connection: AsyncConnection, refund_id: int, *, for_update: bool = False) -> Refund:
    query = text(f"SELECT {_COLUMNS} FROM refund_ledger.refunds AS r WHERE id = :id" + (" FOR UPDATE" if for_update else ""))
    row = (await connection.execute(query, {"id": refund_id})).mappings().one_or_none()
    if row is None:
        raise NoSuchRefund(f"The ledger holds no refund {refund_id}.")
    return _refund(row)


async def _history(connection: AsyncConnection, refund_id: int, *, before: int) -> History:
    query = text("""
        SELECT COALESCE(bool_or(outcome IS NULL OR outcome = 'unknown'), false) AS unresolved,
               COALESCE(bool_or(problem_type = 'idempotency-key-in-use'), false) AS key_in_use,
               max(finished_at) FILTER (WHERE http_status = 401) AS unauthorized_at
        FROM refund_ledger.refund_attempts WHERE refund_id = :id AND attempt < :before""")
    return History(**(await connection.execute(query, {"id": refund_id, "before": before})).mappings().one())


async def _is_foreign(connection: AsyncConnection, refund_id: int, verdict: Verdict) -> bool:
    if verdict.sighting is None:
        return False
    query = text("SELECT EXISTS (SELECT FROM refund_ledger.refunds WHERE payroc_refund_id = :payroc_refund_id AND id <> :id)")
    values = {"payroc_refund_id": verdict.sighting.payroc_refund_id, "id": refund_id}
    return bool((await connection.execute(query, values)).scalar_one())


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


def _as_json(rows: Sequence[tuple[NewRefund, bytes]]) -> str:
    return json.dumps(
        [
            {
                **{name: getattr(row, name) for name in NewRefund.__slots__},
                "approved_at": row.approved_at.isoformat(),
                "request": request.decode("ascii"),
            }
            for row, request in rows
        ]
    )
