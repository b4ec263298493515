"""What people decide about single refunds: the end of a review, a reissue, a reversal."""

from __future__ import annotations

from datetime import datetime

from include.refunds.case import Case, DecisionRefused, Proposal, is_confirmed
from include.refunds.hold import check_hold, way_to_cancelled
from include.refunds.ledger.connection import Connection
from include.refunds.ledger.database import Part
from include.refunds.ledger.events import event
from include.refunds.ledger.rows import lock, lock_refund, select_refund, standing_elsewhere
from include.refunds.people import person
from include.refunds.printable import printable
from include.refunds.refund import Refund
from include.refunds.reissue import Reissue, check_replaceable
from include.refunds.resolve import Resolution, check_case
from include.refunds.states import Status
from include.refunds.text import fold

# True when operators have database logins of their own: some login may act as an operator here that neither
# owns the ledger nor is a superuser. Then two people have two logins; the names given with --by prove
# nothing.
OPERATORS_HAVE_LOGINS = """EXISTS (
    SELECT FROM pg_catalog.pg_roles AS login
    WHERE login.rolcanlogin AND NOT login.rolsuper AND pg_has_role(login.oid, 'refunds_operator', 'MEMBER')
      AND NOT pg_has_role(login.oid, 'refunds_migrator', 'MEMBER')
      AND has_database_privilege(login.oid, current_database(), 'CONNECT'))"""


class Decisions(Part):
    """
    Decisions, each checked again and carried out under the row's lock. The ledger's actor is the person who
    decides.
    """

    async def case(self, refund_id: int) -> Case:
        """
        Return what a decision about a refund rests on.

        :raises NoSuchRefund: when there is none.
        """
        async with self._database.transaction() as (connection, now):
            return await self._case(connection, refund_id, now)

    async def resolve(self, read: Case, resolution: Resolution, reason: str) -> bool:
        """
        End a refund's review, or store the proposal to when it takes a second person.

        It takes two when money may have moved.

        :param read: the case that the resolution rests on.
        :returns: whether the review has ended.
        :raises DecisionRefused: when it may not, or the refund has changed since it was read.
        """
        end = """
            SELECT FROM refund_ledger.note_sighting(:id, :status, :reason, CAST(:payroc_refund_id AS text),
                CAST(:payroc_status AS text), :now)"""
        async with self._database.transaction() as (connection, now):
            case = await self._unchanged(connection, read, now)
            check_case(case, Status.REJECTED if resolution.status is Status.REJECTED else Status.ACCEPTED)
            found = resolution.sighting
            if found is not None and await standing_elsewhere(
                connection, {case.refund.id: found.payroc_refund_id}
            ):
                raise DecisionRefused(
                    f"Payroc's refund {printable(found.payroc_refund_id)} stands at another refund of the ledger."
                )
            confirmed = is_confirmed(case, resolution.decision, self._database.actor)
            if case.may_have_moved and not confirmed:
                await event(
                    connection,
                    "proposal",
                    refund_id=case.refund.id,
                    reason=reason,
                    detail=resolution.decision,
                )
                return False
            who = (
                f"{case.proposal.by} and {self._database.actor}"
                if confirmed and case.proposal
                else self._database.actor
            )
            values = {
                "id": case.refund.id,
                "status": resolution.status.value,
                "reason": " ".join(
                    part for part in (f"Resolved by {who}: {reason}", resolution.note) if part
                ),
                "payroc_refund_id": found.payroc_refund_id if found else None,
                "payroc_status": found.payroc_status if found else None,
                "now": now,
            }
            await connection.execute(end, values)
            return True

    async def reissue(self, read: Case, new: Reissue, reason: str) -> int | None:
        """
        Store a refund that replaces another one, or the proposal to: that always takes two people.

        :param read: the case that the reissue rests on.
        :returns: the new refund's id, ``None`` when a second person is waited for.
        :raises DecisionRefused: when it may not be replaced, or has changed since it was read.
        """
        insert = """
            WITH stored AS (
                INSERT INTO refund_ledger.refund_instructions (source, source_ref, source_ref_folded,
                    processing_terminal_id, order_id, description, amount, currency, payee_last4,
                    payee_fingerprint, request_sha256, requested_by, requested_by_folded,
                    approved_by, approved_by_folded, approved_at, idempotency_key, replaces, reissue_reason,
                    created_at)
                SELECT source, :source_ref, :source_ref_folded, processing_terminal_id, :order_id, description,
                    amount, currency, payee_last4, payee_fingerprint, :request_sha256,
                    :requested_by, :requested_by_folded, :approved_by, :approved_by_folded, :now, :key, id,
                    :reason, :now
                FROM refund_ledger.refund_instructions WHERE id = :id
                ON CONFLICT DO NOTHING
                RETURNING id
            )
            INSERT INTO refund_ledger.frozen_requests (refund_id, request, request_key)
            SELECT id, :request, :request_key FROM stored
            RETURNING refund_id"""
        async with self._database.transaction() as (connection, now):
            case = await self._unchanged(connection, read, now)
            check_replaceable(case)
            confirmed = is_confirmed(case, new.decision, self._database.actor)
            if not confirmed or case.proposal is None:
                await event(
                    connection, "proposal", refund_id=case.refund.id, reason=reason, detail=new.decision
                )
                return None
            values = {
                "id": case.refund.id,
                "source_ref": new.source_ref,
                "source_ref_folded": fold(new.source_ref),
                "order_id": new.order_id,
                "request": new.request.token,
                "request_key": new.request.key_id,
                "request_sha256": new.request_sha256,
                "requested_by": case.proposal.by,
                "requested_by_folded": person(case.proposal.by),
                "approved_by": self._database.actor,
                "approved_by_folded": person(self._database.actor),
                "key": new.idempotency_key,
                "reason": f"Reissue of refund {case.refund.id}: {reason}",
                "now": now,
            }
            stored: int | None = (await connection.execute(insert, values)).scalar_one_or_none()
            if stored is None:
                raise DecisionRefused(
                    f"The ledger holds a refund {printable(new.source_ref)} that the source made itself: "
                    "pay this one anew there."
                )
            return stored

    async def unhold(self, refund_id: int, reason: str) -> None:
        """
        Lift the hold of a refund: the next run will send it, and the same limits do not hold it again.

        :raises DecisionRefused: when it is not held, or the same person requested it.
        """
        update = """
            UPDATE refund_ledger.refund_states SET status = 'approved', reason = :reason, updated_at = :now,
                released_holds = released_holds || holds, holds = '{}'
            WHERE refund_id = :id"""
        async with self._database.transaction() as (connection, now):
            refund = await lock_refund(connection, refund_id)
            query = f"""
                SELECT requested_by, CASE WHEN {OPERATORS_HAVE_LOGINS} THEN session_user END AS login
                FROM refund_ledger.refund_instructions WHERE id = :id"""
            found = (await connection.execute(query, {"id": refund_id})).one()
            check_hold(refund, found.requested_by, self._database.actor, found.login)
            await connection.execute(
                update, {"id": refund_id, "reason": f"Unheld by {self._database.actor}: {reason}", "now": now}
            )

    async def cancel(self, refund_id: int, reason: str) -> None:
        """
        Cancel a refund that was never sent. It ends, and its source_ref is never paid.

        :raises DecisionRefused: when it may have been sent, or has ended.
        """
        update = """
            UPDATE refund_ledger.refund_states SET status = :status, reason = :reason, updated_at = :now
            WHERE refund_id = :id"""
        # The source has one row for a refund and its reissues; now it shows the one before again.
        touch = "UPDATE refund_ledger.refund_states SET updated_at = :now WHERE refund_id = :id"
        async with self._database.transaction() as (connection, now):
            refund = await select_refund(connection, refund_id)
            # What it replaces changes with it, and both are locked before either changes.
            await lock(connection, (item for item in (refund.replaces, refund_id) if item is not None))
            refund = await select_refund(connection, refund_id)
            for status in way_to_cancelled(refund):
                values = {
                    "id": refund_id,
                    "status": status.value,
                    "reason": f"Cancelled by {self._database.actor}: {reason}",
                    "now": now,
                }
                await connection.execute(update, values)
            if refund.replaces is not None:
                await connection.execute(touch, {"id": refund.replaces, "now": now})

    async def intend_reverse(self, refund_id: int, reason: str) -> Refund:
        """
        Store the intent to reverse a refund, before Payroc is asked, and return the refund.

        :raises DecisionRefused: when it is not accepted.
        """
        async with self._database.transaction() as (connection, _):
            refund = await lock_refund(connection, refund_id)
            if refund.status is not Status.ACCEPTED:
                raise DecisionRefused(
                    f"Refund {refund_id} is {refund.status}; only an accepted one, in the open batch, can be reversed."
                )
            await event(connection, "reverse", refund_id=refund_id, reason=reason)
            return refund

    async def _unchanged(self, connection: Connection, read: Case, now: datetime) -> Case:
        await lock(connection, [read.refund.id])
        case = await self._case(connection, read.refund.id, now)
        if case.refund != read.refund:
            raise DecisionRefused(
                f"Refund {read.refund.id} has changed while Payroc was asked; look at it again with `show`."
            )
        return case

    async def _case(self, connection: Connection, refund_id: int, now: datetime) -> Case:
        refund = await select_refund(connection, refund_id)
        # An attempt is without effect when it was never sent, when Payroc refused it, or never processed it;
        # a contradiction means that Payroc showed an object.
        query = """
            SELECT (SELECT GREATEST(max(started_at), max(posting_at), max(finished_at))
                    FROM refund_ledger.refund_attempts WHERE refund_id = :id) AS last_attempt_at,
                   refund_ledger.ended_unpaid(:id) AS chain_unpaid,
                   EXISTS (SELECT FROM refund_ledger.refund_attempts WHERE refund_id = :id
                           AND (posting_at IS NOT NULL OR outcome IS NOT NULL)
                           AND COALESCE(outcome, 'unknown') NOT IN ('rejected', 'configuration', 'not_sent'))
                       AS unproven,
                   EXISTS (SELECT FROM refund_ledger.refund_events WHERE refund_id = :id AND event = 'contradiction') AS contradicted,
                   (SELECT id FROM refund_ledger.refund_instructions WHERE replaces = :id) AS reissue,
                   refund_ledger.first_source_ref(:id) AS first_source_ref"""
        # The database wrote the login itself.
        proposal = f"""
            SELECT actor, at, detail,
                   login = session_user AND {OPERATORS_HAVE_LOGINS} AS same_login
            FROM refund_ledger.refund_events AS e
            WHERE refund_id = :id AND event = 'proposal'
              AND NOT EXISTS (SELECT FROM refund_ledger.refund_events AS later
                              WHERE later.refund_id = :id AND later.event = 'status' AND later.id > e.id)
            ORDER BY id DESC LIMIT 1"""
        row = (await connection.execute(query, {"id": refund_id})).one()
        found = (await connection.execute(proposal, {"id": refund_id})).one_or_none()
        return Case(
            refund=refund,
            may_have_moved=row.unproven or row.contradicted or refund.payroc_refund_id is not None,
            # An attempt that recorded nothing may have sent its POST as long as its lease lived.
            last_attempt_at=max(
                (at for at in (row.last_attempt_at, refund.lease_until) if at is not None), default=None
            ),
            chain_unpaid=row.chain_unpaid,
            proposal=Proposal(found.detail, found.actor, found.at, found.same_login) if found else None,
            reissue=row.reissue,
            first_source_ref=row.first_source_ref,
            now=now,
        )
