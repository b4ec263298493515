"""What must be true at each moment, and at the end. docs/safety.md states each in plain words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from include.refunds.classify import EVERYTHING, Outcome
from include.refunds.ledger import Claim
from include.refunds.ledger.approvals import hash_of_ids
from include.refunds.ledger.write_backs import TURN
from include.refunds.states import PAID, REPLACEABLE, Status
from include.refunds.verify import Difference
from tests.simulation.engine import DAY, EPOCH, HOUR, Engine, Strand, Violation, at_once
from tests.simulation.ledger import MemoryLedger, Row
from tests.simulation.limits import LimitsKept
from tests.simulation.merchant import Approved, Merchant
from tests.simulation.payroc import ASKS_PEOPLE, KEY_KEPT, Existing, Payroc, Post

_MAY_BE_MADE = frozenset({Status.SENDING, Status.UNKNOWN, Status.REVIEW})
_NO_MONEY = frozenset({"declined", "returned", "reversal"})
_ENDED = frozenset({"accepted", "settled", "returned", "reversed", "rejected", "cancelled"})
_STATUS_OF_WORD = {
    "ready": Status.ACCEPTED,
    "pending": Status.ACCEPTED,
    "complete": Status.SETTLED,
    "returned": Status.RETURNED,
    "reversal": Status.REVERSED,
    "declined": Status.REJECTED,
}


class Invariants:
    """
    Watches one history, from Payroc's side and from the ledger's.

    :param fence: whether clocks behave, so that a token's end can fence a late worker off. Where the database's clock jumps only the
        key does.
    """

    def __init__(
        self, engine: Engine, ledger: MemoryLedger, merchant: Merchant, payroc: Payroc, *, fence: bool
    ) -> None:
        self.engine = engine
        self.ledger = ledger
        self.merchant = merchant
        self.payroc = payroc
        self.fence = fence
        self.restored = False
        # Two copies of a ledger are used in turn: each believes that what it wrote last is in the source.
        self.copies = False
        # Refunds with objects that nothing tells from others', all but one declined.
        self.unrecognised: set[str] = set()
        # The refunds that were paid twice in a way that is not protected.
        self.left: set[str] = set()
        # When the API key was changed.
        self.key_changes: list[float] = []
        self.people_asked: dict[str, set[str]] = {}
        self._posted: set[tuple[int, int]] = set()
        self._named: set[str | None] = set()
        self._taken_over: dict[int, str] = {}
        self._paused_since: dict[str, float] = {}
        # Who approved exactly these candidates of a run; nobody, when it passed by itself.
        self._approvals: dict[tuple[str, str], str | None] = {}
        self._asked: dict[str, str] = {}
        self._shown: dict[str, str] = {}
        self._refused: set[str] = set()
        self._held: set[int] = set()
        self.limits = LimitsKept(ledger)
        self._bodies: dict[str, bytes] = {}
        self._first: dict[str, tuple[float, str]] = {}
        self._checks: dict[str, Callable[[tuple[Any, ...], dict[str, Any], Any], None]] = {
            "resolve": self._resolved,
            "reissue": self._reissued,
            "ask_approval": self._passed_or_asked,
            "record_approval": self._approved,
            "record_rejection": self._rejected,
            "unhold": self.limits.hold_released,
            "cancel": self._cancelled,
            "begin_run": self._begun,
            "claim": self._claimed,
            "may_post": self._looked_last,
            "record": self._recorded,
            "release": self._released,
            "take_turn": self._took_turn,
            "mark_written_back": self._marked,
            "end_turn": self._ended_turn,
        }
        # Who has the turn of the write-back, and until when.
        self._turn: tuple[str, datetime] | None = None
        merchant.writer = lambda: self._turn[0] if self._turn else None
        payroc.watch.sent = self.sent
        payroc.watch.processing = self.processing
        payroc.watch.created = self.created

    def ledger_is_restored(self) -> None:
        """From here on the ledger may have forgotten attempts; their numbers come again."""
        self.restored = True
        self.merchant.restored = True
        self._posted.clear()
        # The processes that had it are gone.
        self._turn = None

    @property
    def _strand(self) -> Strand:
        assert self.engine.current is not None
        return self.engine.current

    # -- at Payroc -------------------------------------------------------------------------------------------------

    def sent(self, post: Post) -> None:
        """A POST leaves a worker."""
        item = self.merchant.by_key.get(post.key)
        if item is None:
            raise Violation(
                f"A POST goes out under the key {post.key}, which is derived from no approved refund."
            )
        if post.fault in ASKS_PEOPLE:
            self.excuse(item, post.fault)
        row, attempt, strand = self._row_of(item), post.attempt, self._strand
        if attempt is None or row is None or row.id != attempt[0]:
            raise Violation(f"A POST for {item.source_ref} goes out that no claim stands behind.")
        if not strand.has_turn:
            raise Violation(f"A POST for {item.source_ref} goes out when it is not its turn.")
        if strand.checked != attempt:
            raise Violation(
                f"A POST for {item.source_ref} goes out without a last look of its own at the ledger."
            )
        if len(self.ledger.attempts[row.id]) < attempt[1]:
            raise Violation(
                f"A POST for {item.source_ref} goes out before its attempt {attempt[1]} is in the ledger."
            )
        if self.ledger.attempts[row.id][attempt[1] - 1].posting_at is None:
            raise Violation(f"A POST for {item.source_ref} goes out before its last check is in the ledger.")
        if attempt in self._posted:
            raise Violation(f"Attempt {attempt[1]} of {item.source_ref} sends a second POST.")
        self._posted.add(attempt)
        self._check_pause(item, row)
        self._check_fence(item, post)
        if self._bodies.setdefault(post.key, post.body) != post.body and not self.restored:
            raise Violation(f"A POST for {item.source_ref} has other bytes than the first one under its key.")

    def _check_pause(self, item: Approved, row: Row) -> None:
        for scope in (EVERYTHING, row.processing_terminal_id):
            if self._strand.looked_at > self._paused_since.get(scope, self.engine.time):
                raise Violation(
                    f"A POST for {item.source_ref} goes out after its worker could see that sending is paused."
                )

    def _check_fence(self, item: Approved, post: Post) -> None:
        if not self.fence or post.token not in self.payroc.tokens:
            return
        lease_until = self._strand.lease_until
        assert lease_until is not None
        token_ends = self.engine.ledger_time() + timedelta(
            seconds=self.payroc.tokens[post.token][0] - self.engine.time
        )
        if token_ends > lease_until:
            raise Violation(f"A POST for {item.source_ref} goes out with a token that outlives its lease.")

    def processing(self, post: Post) -> None:
        """Payroc has let a POST in: its token was good."""
        item = self.merchant.by_key[post.key]
        first_at, first_key = self._first.setdefault(post.key, (self.engine.time, post.api_key))
        if self.restored:
            return
        if self.engine.time - first_at >= KEY_KEPT:
            raise Violation(
                f"A POST for {item.source_ref} is processed when Payroc may have forgotten its key."
            )
        if post.api_key != first_key:
            raise Violation(
                f"A POST for {item.source_ref} is processed under another API key than the first."
            )
        assert post.attempt is not None
        refund_id, number = post.attempt
        attempts = self.ledger.attempts[refund_id]
        if attempts[number - 1].outcome is Outcome.NOT_SENT:
            raise Violation(
                f"Payroc processes attempt {number} of {item.source_ref}, which the ledger calls not sent."
            )
        if self.fence and len(attempts) > number and attempts[number - 1].outcome is None:
            raise Violation(
                f"Payroc processes attempt {number} of {item.source_ref}, which told nothing, when attempt {len(attempts)} has begun."
            )

    def created(self, post: Post, existing: Existing) -> None:
        """Payroc has made a refund."""
        item = self.merchant.by_key[post.key]
        objects = self.payroc.by_key[post.key]
        paying = [
            found for found in self._of_chain(item) if found.word not in _NO_MONEY and not found.paid_again
        ]
        if len(objects) > 1 and self._is_left(objects[0], existing):
            self.left.add(item.source_ref)
            return
        if self.restored and not existing.custom_fields and all(found.declined for found in objects[:-1]):
            # Nothing tells that an object is ours, and the bank has declined it.
            objects = objects[-1:]
            self.unrecognised.add(item.source_ref)
        if len(objects) > 1 or len(paying) > 1:
            ids = " and ".join(found.refund_id for found in (objects if len(objects) > 1 else paying))
            raise Violation(f"PAID TWICE: {item.source_ref} exists at Payroc as {ids}.")
        order, method = existing.body["order"], existing.body["refundMethod"]
        payee = method.get("token") or method.get("accountNumber")
        version = (order["orderId"], order["amount"], existing.body["processingTerminalId"], payee)
        if version not in item.versions:
            raise Violation(
                f"Payroc makes a refund for {item.source_ref} that nobody approved: {version[0]}, {version[1]}."
            )
        row = self._row_of(item)
        for replaced in (
            at_once(self.ledger.replaced(row.id)) if row is not None and row.replaces is not None else ()
        ):
            if replaced.status not in REPLACEABLE:
                raise Violation(
                    f"PAID TWICE: Payroc makes {item.source_ref}, and {replaced.source_ref}, which it replaces, is {replaced.status}."
                )
        if not self.restored and (row is None or row.status not in _MAY_BE_MADE):
            raise Violation(
                f"Payroc makes a refund for {item.source_ref}, which is {row.status if row else 'not'} in the ledger."
            )

    def _is_left(self, first: Existing, second: Existing) -> bool:
        """
        Tell whether a second refund is of a kind that docs/safety.md says is not protected.

        The ledger was restored, and either the API key changed within a day after the first payment, before
        the list showed it; or the source names another terminal by now, and Payroc did not give the list of
        the one that paid.
        """
        changed = any(first.created < at < first.created + DAY for at in self.key_changes)
        paid_through = self.ledger.terminal_rows.get(first.terminal)
        unread = (
            first.terminal != second.terminal
            and paid_through is not None
            and paid_through.failed_at is not None
        )
        return self.restored and (unread or (changed and first.api_key != second.api_key))

    def _check_named(self, item: Approved, objects: list[Existing]) -> None:
        for found in objects:
            # Without custom fields a refund that is in no ledger looks like one that was made elsewhere.
            if found.custom_fields and found.refund_id not in self._named:
                raise Violation(
                    f"LOST: the restored ledger has forgotten {item.source_ref}, and `verify` does not name {found.refund_id}."
                )

    def _of_chain(self, item: Approved) -> list[Existing]:
        first = item.first or item
        chain = [first, *(other for other in self.merchant.reissues.values() if other.first is first)]
        return [found for member in chain for found in self.payroc.by_key.get(member.key, [])]

    # -- at the ledger ---------------------------------------------------------------------------------------------

    def called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A worker's call of the ledger has had its effect."""
        check = self._checks.get(name)
        if check is not None:
            check(args, kwargs, result)
        if self.ledger.paused or self._paused_since:
            self._paused_since = {
                scope: self._paused_since.get(scope, self.engine.time) for scope in self.ledger.paused
            }
        if self.engine.current is not None:
            self.engine.current.looked_at = self.engine.time

    def _resolved(self, args: tuple[Any, ...], kwargs: dict[str, Any], done: bool) -> None:
        case, resolution = args[0], args[1]
        if done and resolution.sighting is not None:
            # What people took over counts as the refund's own from here on.
            self._taken_over[case.refund.id] = resolution.sighting.payroc_refund_id
        self._check_record(self.ledger.rows[case.refund.id])

    def _reissued(self, args: tuple[Any, ...], kwargs: dict[str, Any], new: int | None) -> None:
        if new is not None:
            row = self.ledger.rows[new]
            if row.requested_by == row.approved_by:
                raise Violation(f"{row.source_ref} is approved anew by {row.approved_by} alone.")
            self.merchant.reissued(row.source_ref, row.order_id)

    def _passed_or_asked(self, args: tuple[Any, ...], kwargs: dict[str, Any], question: Any) -> None:
        run_id, candidates = args[0], self.ledger.run_rows[args[0]].candidates_hash
        if question is None:
            refused = any(
                self.ledger.rows[item].source_ref in self._refused
                for item in self.ledger.run_rows[run_id].candidate_ids
            )
            if refused and self._approvals.get((run_id, candidates)) is None:
                raise Violation(f"{run_id} passes by itself with refunds that a person rejected.")
            self._approvals.setdefault((run_id, candidates), None)
        else:
            self._asked[run_id] = candidates
            # Airflow shows the first question of a task for ever.
            if self._shown.setdefault(run_id, question.body(run_id)) != question.body(run_id):
                raise Violation(f"{run_id} asks, and what Airflow shows is the question of before.")
            self._approvals.pop((run_id, candidates), None)

    def _approved(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: None) -> None:
        if kwargs["by"] == kwargs["triggered_by"]:
            raise Violation(f"{kwargs['by']} triggered {args[0]} and approves it.")
        # What a person saw is what was asked about, whatever the run is about by now.
        self._approvals[args[0], self._asked[args[0]]] = kwargs["by"]

    def _rejected(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: None) -> None:
        self._approvals.pop((args[0], self._asked[args[0]]), None)
        waiting = [self.ledger.rows[item] for item in self.ledger.run_rows[args[0]].candidate_ids]
        self._refused |= {
            row.source_ref for row in waiting if row.status in (Status.APPROVED, Status.RELEASED)
        }

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: None) -> None:
        # A pull that is repeated takes the run's approval back.
        self._approvals = {key: by for key, by in self._approvals.items() if key[0] != args[0]}

    def _cancelled(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: None) -> None:
        row = self.ledger.rows[args[0]]
        if self.payroc.by_key.get(row.key):
            raise Violation(f"{row.source_ref} is cancelled, and Payroc holds it.")

    def _claimed(self, args: tuple[Any, ...], kwargs: dict[str, Any], claim: Claim | None) -> None:
        strand = self._strand
        strand.attempt = (claim.refund.id, claim.attempt) if claim is not None else None
        strand.lease_until = None
        strand.checked = None
        strand.waits_for_answer = claim is not None
        if claim is not None and not strand.is_queued:
            raise Violation(f"{claim.refund.source_ref} is claimed without a place in the queue.")
        if sum(other.waits_for_answer for other in strand.actor.strands) > strand.actor.most_claimed:
            raise Violation(f"{strand.actor.name} claims more refunds ahead than the queue has places.")
        if claim is not None and not self.ledger.paused.keys().isdisjoint(
            (EVERYTHING, claim.refund.processing_terminal_id)
        ):
            raise Violation(f"{claim.refund.source_ref} is claimed while sending is paused.")
        if claim is not None and self.ledger.restored_to is not None:
            raise Violation(
                f"{claim.refund.source_ref} is claimed before the restored ledger was compared with Payroc."
            )

    def _took_turn(self, args: tuple[Any, ...], kwargs: dict[str, Any], taken: bool) -> None:
        now = self.ledger.clock()
        if taken:
            if self._turn is not None and self._turn[1] > now:
                raise Violation(f"{args[0]} takes the turn that {self._turn[0]} has.")
            self._turn = args[0], now + TURN

    def _marked(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: None) -> None:
        if self._turn is None or self._turn[0] != args[0]:
            raise Violation(f"{args[0]} notes what it wrote and has no turn.")
        self._turn = args[0], self.ledger.clock() + TURN

    def _ended_turn(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: None) -> None:
        if self._turn is not None and self._turn[0] == args[0]:
            self._turn = None

    def _looked_last(self, args: tuple[Any, ...], kwargs: dict[str, Any], may_post: bool) -> None:
        claim: Claim = args[0]
        self._strand.checked = (claim.refund.id, claim.attempt) if may_post else None
        self._strand.lease_until = self.ledger.rows[claim.refund.id].lease_until if may_post else None

    def _recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        row, attempt = self.ledger.rows[args[0]], (args[2] if len(args) > 2 else None)
        if attempt is not None and self._strand.attempt != (row.id, attempt):
            raise Violation(
                f"{row.source_ref} is recorded under attempt {attempt}, which is not its worker's."
            )
        self._check_record(row)
        last = self.ledger.events[-1] if self.ledger.events else None
        if (
            last is not None
            and (last.event, last.refund_id, last.at) == ("recovered", row.id, self.ledger.clock())
            and EVERYTHING not in self.ledger.paused
        ):
            raise Violation(
                f"{row.source_ref} was sent by a ledger that has forgotten it, and nothing is paused."
            )

    def _check_record(self, row: Row) -> None:
        attempts = self.ledger.attempts[row.id]
        if row.status in (Status.UNKNOWN, Status.RELEASED) and attempts and attempts[-1].outcome is None:
            raise Violation(
                f"{row.source_ref} is {row.status} while attempt {len(attempts)} of it may be under way."
            )
        held = [found for found in self.payroc.by_key.get(row.key, []) if not found.declined]
        if row.status in (Status.REJECTED, Status.RELEASED) and held and not self.restored:
            raise Violation(
                f"LOST: {row.source_ref} is called {row.status}, and Payroc holds {held[0].refund_id} for it."
            )

    def _released(self, args: tuple[Any, ...], kwargs: dict[str, Any], refund_ids: list[int]) -> None:
        run_id, candidate_ids = args[0], args[1]
        approval = (run_id, hash_of_ids(candidate_ids))
        if approval not in self._approvals:
            raise Violation(f"{run_id} releases refunds that approve_run did not approve.")
        if not self.restored:
            self.limits.released(run_id, refund_ids, by=self._approvals[approval])
            for refund_id in candidate_ids:
                if self.ledger.rows[refund_id].status is Status.HELD and refund_id not in self._held:
                    self.limits.held(self.ledger.rows[refund_id])
        self._refused -= {self.ledger.rows[item].source_ref for item in refund_ids}
        self._held = {row.id for row in self.ledger.rows.values() if row.status is Status.HELD}
        for refund_id in refund_ids:
            row = self.ledger.rows[refund_id]
            if row.replaces is not None:
                continue
            source = (self._strand.seen_source or {}).get(row.source_ref)
            if source is None:
                raise Violation(f"{row.source_ref} is released though its source row was withdrawn before.")
            if (source["amount"], source["processing_terminal_id"]) != (
                row.amount,
                row.processing_terminal_id,
            ):
                raise Violation(f"{row.source_ref} is released though its source row was changed before.")

    # -- at the end ------------------------------------------------------------------------------------------------

    def at_the_end(self, verified: Sequence[Difference]) -> None:
        """
        Nothing goes on any more, and all trouble is over: every refund has come to its end, and everybody knows it.

        :param verified: what `verify` found after the ledger was restored.
        """
        self._named = {difference.payroc_refund_id for difference in verified}
        for item in self.merchant.refunds.values():
            row = self._row_of(item)
            objects = self.payroc.by_key.get(item.key, [])
            if item.source_ref in self.merchant.invalid:
                # One that was approved only now is found invalid by the next run.
                if row is not None or item.status not in ("invalid", None):
                    raise Violation(f"{item.source_ref} is invalid, and the source says {item.status}.")
                continue
            if row is None:
                # A restored ledger pulls again what the source still stands by; the rest is for `verify` to find.
                ended = self.restored and (item.withdrawn or item.status in _ENDED)
                if ended:
                    self._check_named(item, objects)
                elif objects or not item.withdrawn:
                    raise Violation(f"LOST: {item.source_ref} was approved and is not in the ledger.")
                continue
            self._check_end(item, row, objects)
            newest = self._newest_of_chain(row)
            newer = self.restored and item.updated_at is not None and item.updated_at > newest.updated_at
            unseen = item.reset and item.withdrawn
            # The write-back that overtook a newer one died before it could say so.
            overtaken = item.is_overtaken and newest.written_back_at == newest.updated_at
            if (item.status, item.updated_at) != (
                newest.status.value,
                newest.updated_at,
            ) and not newer | unseen | overtaken | self.copies:
                raise Violation(
                    f"{item.source_ref} is {newest.status} in the ledger, and the source says {item.status}."
                )
        for item in self.merchant.reissues.values():
            row = self._row_of(item)
            if row is not None:
                self._check_end(item, row, self.payroc.by_key.get(item.key, []))

    def _check_end(self, item: Approved, row: Row, objects: list[Existing]) -> None:
        ref = item.source_ref
        if ref in self.left | self.unrecognised:
            return
        if self.restored and len(objects) > 1:
            objects = [found for found in objects if found.custom_fields or not found.declined]
        if row.status is Status.REVIEW:
            if not self._asked_with_reason(item, row, objects):
                raise Violation(f"{ref} asks people without need: {row.reason}")
        elif row.status in PAID and row.id in self._taken_over:
            # People saw an object that differs, or that somebody made by hand, and called it this refund.
            if (
                row.payroc_refund_id != self._taken_over[row.id]
                or row.payroc_refund_id not in self.payroc.refunds
            ):
                raise Violation(
                    f"{ref} is {row.status} as {row.payroc_refund_id}, and people resolved it otherwise."
                )
        elif row.status in PAID:
            if [row.payroc_refund_id] != [found.refund_id for found in objects]:
                raise Violation(
                    f"{ref} is {row.status} as {row.payroc_refund_id}, and Payroc holds {len(objects)} refunds for it."
                )
            if objects[0].amount != row.amount:
                raise Violation(
                    f"{ref} is {row.status} with {row.amount}, and Payroc pays {objects[0].amount}."
                )
            # A row that was approved again after it was paid is followed from then on; a report names it as
            # not looked at.
            older = self.restored and EPOCH + timedelta(seconds=objects[0].created) < row.approved_at
            if _STATUS_OF_WORD.get(objects[0].word) is not row.status and not older:
                raise Violation(f"{ref} is {row.status}, and Payroc says {objects[0].word}.")
        elif row.status is Status.CANCELLED:
            if objects:
                raise Violation(f"{ref} is cancelled, and Payroc holds {objects[0].refund_id} for it.")
        elif row.status is Status.REJECTED:
            if any(not found.declined for found in objects):
                raise Violation(f"LOST: {ref} is rejected, and Payroc holds {objects[0].refund_id} for it.")
        elif row.status is Status.APPROVED:
            # What a restored ledger has forgotten and its source no longer returns, `verify` finds.
            forgotten = self.restored and (item.withdrawn or item.status in _ENDED or len(item.versions) > 1)
            if forgotten:
                self._check_named(item, objects)
            elif objects:
                raise Violation(
                    f"LOST: {ref} waits to be sent, and Payroc holds {objects[0].refund_id} for it."
                )
            waits = any(
                replaced.status not in REPLACEABLE for replaced in at_once(self.ledger.replaced(row.id))
            )
            if not item.withdrawn and len(item.versions) == 1 and not forgotten and not waits:
                raise Violation(f"LOST: {ref} was approved and is not sent: {row.reason}")
        else:
            raise Violation(f"{ref} is {row.status} and comes to no end: {row.reason}")

    def _newest_of_chain(self, row: Row) -> Row:
        for other in self.ledger.rows.values():
            if other.replaces == row.id and other.status is not Status.CANCELLED:
                return self._newest_of_chain(other)
        return row

    def excuse(self, item: Approved, why: str) -> None:
        """Something happened to a refund after which even a perfect protocol may have to ask people."""
        self.people_asked.setdefault(item.source_ref, set()).add(why)

    def _asked_with_reason(self, item: Approved, row: Row, objects: list[Existing]) -> bool:
        late = row.first_sent_at is not None and row.updated_at - row.first_sent_at >= timedelta(
            days=self.ledger.settings.key_window_days
        )
        strange = any(found.word not in _STATUS_OF_WORD for found in objects)
        return bool(
            item.source_ref in self.people_asked or late or strange or self.key_changes or self.restored
        )

    def _row_of(self, item: Approved) -> Row | None:
        return self.ledger.by_ref.get(item.source_ref)


# A list may lag for so long, and not longer: what the follow-up and the look-up rely on.
LONGEST_LAG = 20 * HOUR
