"""People who resolve reviews and reissue refunds: with good reason, with none, and sometimes against what Payroc holds."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import datetime
from functools import partial
from random import Random
from typing import Any

from include.payroc.errors import PayrocError
from include.refunds.case import DecisionRefused
from include.refunds.ledger import LedgerError
from include.refunds.reissue import reissue
from include.refunds.resolve import resolve
from include.refunds.restored import restored
from include.refunds.source import SourceError
from include.refunds.states import REPLACEABLE, Status
from tests.simulation.airflow import Deployment
from tests.simulation.engine import Actor, Mistake
from tests.simulation.ledger import MemoryLedger
from tests.simulation.merchant import ALL_TERMINALS
from tests.simulation.worker import SteppedLedger

_PEOPLE = ("ann", "bob")


class People:
    """
    Two people with the command line.

    :param memory: what they look at.
    """

    def __init__(self, deployment: Deployment, memory: MemoryLedger, rng: Random) -> None:
        self._deployment = deployment
        self._memory = memory
        self._rng = rng
        self.decisions = 0

    def decide(self) -> None:
        """Decide about everything that waits for people; the second says what the first said, or the opposite."""
        for row in list(self._memory.rows.values()):
            if row.status is Status.REVIEW:
                outcome = self._rng.choice((Status.ACCEPTED, Status.REJECTED, Status.REJECTED))
                for person in _PEOPLE:
                    said = (
                        outcome
                        if self._rng.random() < 0.9
                        else self._rng.choice((Status.ACCEPTED, Status.REJECTED))
                    )
                    self._start(
                        f"{person} resolves {row.source_ref} as {said}",
                        partial(self._resolve, person, row.id, said),
                    )
            elif row.status in REPLACEABLE and self._rng.random() < 0.5:
                first = self._rng.choice(_PEOPLE)
                for person in (first, self._rng.choice(_PEOPLE), self._rng.choice(_PEOPLE)):
                    self._start(f"{person} reissues {row.source_ref}", partial(self._reissue, person, row.id))

    def unhold(self, refund_id: int) -> None:
        """An operator lifts a hold; the requester of the refund tries to as well."""
        person = self._rng.choice(("ann", "bob", "erin", "erin"))
        self._start(
            f"{person} unholds refund {refund_id}", partial(self._decided, person, "unhold", refund_id)
        )

    def cancel(self, refund_id: int) -> None:
        """Somebody cancels a refund, whatever its state."""
        self._start(f"erin cancels refund {refund_id}", partial(self._decided, "erin", "cancel", refund_id))

    def compare_restored(self, backup_at: datetime) -> None:
        """Somebody runs the first command after a restore, or runs it again because it was cut off."""
        self._start("erin runs restored", partial(self._restored, backup_at))

    def _start(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        # One after the other, as people do; whether the second comes before the first has been heard is chance.
        engine = self._deployment.engine
        engine.after(60.0 * self._rng.random(), lambda: engine.tell(what))
        engine.after(60.0 * self._rng.random(), lambda: engine.start(what, work(), self._ended))

    def _ended(self, actor: Actor) -> None:
        if actor.error is not None and not isinstance(actor.error, (LedgerError, PayrocError, SourceError)):
            raise Mistake(
                f"{actor.name} fails in a way that nobody foresaw: {actor.error!r}"
            ) from actor.error

    def _ledger_of(self, person: str) -> SteppedLedger:
        d = self._deployment
        return SteppedLedger(d.ledger.ledger, d.engine, d.ledger.watch, actor=person)

    async def _decided(self, person: str, what: str, refund_id: int) -> None:
        try:
            await getattr(self._ledger_of(person), what)(refund_id, "as the simulation pleases")
        except (DecisionRefused, LedgerError) as refused:
            self._deployment.engine.tell(f"refused: {refused}")

    async def _restored(self, backup_at: datetime) -> None:
        d = self._deployment
        await restored(
            backup_at,
            "as the simulation pleases",
            terminals=ALL_TERMINALS,
            source=d.source,
            ledger=self._ledger_of("erin"),
            gateway=d.connect(),
            cipher=d.cipher,
            settings=d.settings,
        )

    async def _resolve(self, person: str, refund_id: int, outcome: Status) -> None:
        d = self._deployment
        known = self._rng.choice((None, self._found_in_the_portal(refund_id)))
        try:
            _, done = await resolve(
                refund_id,
                outcome,
                "as the simulation pleases",
                payroc_refund_id=known if outcome is Status.ACCEPTED else None,
                ledger=self._ledger_of(person),
                gateway=d.connect(),
            )
        except (DecisionRefused, LedgerError) as refused:
            d.engine.tell(f"refused: {refused}")
            return
        if done:
            self.decisions += 1

    async def _reissue(self, person: str, refund_id: int) -> None:
        d = self._deployment
        try:
            new = await reissue(
                refund_id,
                "as the simulation pleases",
                ledger=self._ledger_of(person),
                gateway=d.connect(),
                cipher=d.cipher,
                source=d.settings.source,
            )
        except (DecisionRefused, LedgerError) as refused:
            d.engine.tell(f"refused: {refused}")
            return
        if new is not None:
            self.decisions += 1
            d.engine.tell(f"refund {new} replaces {refund_id}")

    def _found_in_the_portal(self, refund_id: int) -> str | None:
        order_id = self._memory.rows[refund_id].order_id
        found = [
            item.refund_id
            for item in self._deployment.payroc.refunds.values()
            if item.body["order"]["orderId"] == order_id
        ]
        return self._rng.choice(found) if found else None
