"""One seed: a world, what happens in it, and its end."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from pydantic import SecretStr

from include.payroc.errors import PayrocNoAnswer
from include.refunds.cipher import Cipher, Sealed, UnreadableRequest
from include.refunds.classify import EVERYTHING
from include.refunds.ledger import LedgerUnavailable
from include.refunds.ledger.write_backs import ENDED
from include.refunds.settings import Settings
from include.refunds.source import SourceUnavailable
from include.refunds.states import Status
from include.refunds.verify import Difference, verify
from tests.simulation.airflow import HEARTBEAT_TIMEOUT, Airflow, Deployment
from tests.simulation.engine import (
    AROUND_THE_POST,
    AT_THE_GATE,
    DAY,
    EPOCH,
    FREEZES,
    HOUR,
    IN_A_WRITE_BACK,
    MINUTE,
    Actor,
    Engine,
    Trouble,
    Violation,
    at_once,
)
from tests.simulation.invariants import LONGEST_LAG, Invariants
from tests.simulation.ledger import MemoryLedger
from tests.simulation.merchant import ALL_TERMINALS, TERMINALS, Merchant, SimulatedSource, remembered_rows
from tests.simulation.payroc import HOST, MISCONFIGURED, MURKY, OTHER_HOST, Host, Payroc, Temper
from tests.simulation.people import People
from tests.simulation.worker import SteppedLedger

_SOURCE = "simulated"
_MOST_CALM_DAYS = 9

SETTINGS = Settings(
    source=_SOURCE,
    terminals=ALL_TERMINALS,
    encryption_keys=(SecretStr("unused"),),
    fingerprint_key=SecretStr("unused in the simulation, which checks hashes of its own"),
)


# One refund per task, and lists that are sent side by side.
_BATCH_SIZES = (1, 3, 10, 10)

_WAITING = (Status.HELD, Status.RELEASED, Status.SENDING, Status.UNKNOWN)
_THEMES = (
    "",
    "",
    "",
    "people",
    "configuration",
    "write-backs",
    "reissues",
    "late workers",
    "lists",
    "lists",
    "the gate",
    "limits",
    "limits",
    "limits",
    "approval",
    "approval",
    "continuity",
    "continuity",
    "continuity",
    "continuity",
)
_WHERE_OF_THEME = {
    "write-backs": IN_A_WRITE_BACK,
    "late workers": AROUND_THE_POST,
    "the gate": AT_THE_GATE,
    "limits": AT_THE_GATE,
}
_FAULTS_OF_THEME = {"people": MURKY, "configuration": MISCONFIGURED}


class PlainCipher(Cipher):
    """Encrypts nothing, because a simulated ledger has nothing to hide, and still proves that a body is the one that was stored."""

    def __init__(self) -> None:
        pass

    @property
    def fingerprint_check(self) -> str:
        return "plain"

    def seal(self, body: bytes) -> Sealed:
        return Sealed(body, "plain")

    def open(
        self, sealed: bytes, expected_sha256: str, refund_id: int, sealed_with: str | None = None
    ) -> bytes:
        if self.sha256(sealed) != expected_sha256:
            raise UnreadableRequest(f"The request of refund {refund_id} was changed.")
        return sealed

    def sha256(self, body: bytes) -> str:
        return hashlib.sha256(body).hexdigest()

    def fingerprint(self, payee: str) -> str:
        return hashlib.sha256(payee.encode()).hexdigest()


@dataclass(slots=True)
class Counts:
    """What happened in a history, or in many."""

    histories: int = 0
    refunds: int = 0
    runs: int = 0
    steps: int = 0
    posts: int = 0
    posts_beside: int = 0
    with_lists: int = 0
    paid: int = 0
    asked_people: int = 0
    decisions: int = 0
    deaths: int = 0
    freezes: int = 0
    failures: int = 0
    events: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        """Add what happened elsewhere."""
        for name in (
            "histories",
            "refunds",
            "runs",
            "steps",
            "posts",
            "posts_beside",
            "with_lists",
            "paid",
            "asked_people",
            "decisions",
            "deaths",
            "freezes",
            "failures",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.events, other.events), (self.faults, other.faults)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count


NewLedger = Callable[[Settings, Engine], Any]


def _in_memory(settings: Settings, engine: Engine) -> MemoryLedger:
    return MemoryLedger(settings, engine.ledger_time)


class History:
    """
    A world with one merchant, one Airflow and one Payroc.

    :param seed: everything that happens follows from it.
    :param temper: what Payroc is like; drawn unless given.
    :param new_ledger: makes the ledger; its ``memory`` (or itself) is what the invariants look at.
    :param tell: gets the history line by line.
    """

    def __init__(
        self,
        seed: int,
        *,
        temper: Temper | None = None,
        new_ledger: NewLedger = _in_memory,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.engine = engine = Engine(rng, tell)
        engine.failure = _failure
        engine.on_freeze = self._heartbeat_stops
        self.settings = SETTINGS
        # Either Payroc processes overlapping requests with one key twice, or the database's clock jumps: against both at once
        # nothing would be left to stand on.
        self.jumpy = temper is None and rng.random() < 0.25
        self.payroc = Payroc(engine, temper or self._temper())
        self.merchant = Merchant(engine, _SOURCE)
        self.host = Host()
        self.ledger = new_ledger(self.settings, engine)
        self.memory: MemoryLedger = getattr(self.ledger, "memory", self.ledger)
        self.invariants = Invariants(engine, self.memory, self.merchant, self.payroc, fence=not self.jumpy)
        stepped = SteppedLedger(self.ledger, engine, self.invariants.called)
        source = SimulatedSource(self.merchant)
        self.airflow = Airflow(
            Deployment(engine, stepped, self.payroc, self.host, source, PlainCipher(), self.settings)
        )
        self.people = People(self.airflow.deployment, self.memory, rng)
        # Whether people decide everything in the end, or leave it for the invariants to look at.
        self.large = True
        self.people_decide = rng.random() < 0.4
        self.counts = Counts(histories=1)
        # Some histories are about anything; the others keep to one kind of trouble, which would else be too rare.
        self.theme = rng.choice(_THEMES) if temper is None else ""
        if self.theme in _FAULTS_OF_THEME:
            self.payroc.temper.which, self.payroc.temper.faults = _FAULTS_OF_THEME[self.theme], 0.6
        if self.theme in ("people", "configuration"):
            self.payroc.temper.list_lag = rng.choice((HOUR, LONGEST_LAG))
        if self.theme == "continuity":
            # A restored ledger rests on the key, which stands only where clocks behave and requests do not
            # overlap.
            self.payroc.temper.racy = False
        # What people set and release is forgotten with a restored ledger: docs/safety.md says what to do first.
        self._may_restore = (
            temper is None
            and self.theme not in _THEMES_OF_LIMITS
            and not self.jumpy
            and not self.payroc.temper.racy
            and (rng.random() < 0.4 or self.theme == "continuity")
        )
        # A ledger that was lost altogether is one restored from before its first day.
        self._backup = self.ledger.backup() if self._may_restore else None
        self._backup_at = engine.ledger_time()
        self._backups = [(self._backup, self._backup_at)]
        # The other of two copies of a ledger that are used in turn.
        self._clone: Any = None

    def run(self) -> Counts:
        """
        Let it happen, and see it end well.

        :raises Violation: when an invariant does not hold.
        """
        with remembered_rows():
            try:
                if self.theme == "continuity" and self._may_restore:
                    self._begin_continuity()
                else:
                    self._begin()
                return self.end()
            except Violation:
                self.engine.abandon()
                raise

    def _begin(self) -> None:
        rng, engine = self.rng, self.engine
        # Most histories are small ones: what breaks, mostly breaks in one of those, and they are soon over.
        self.large = large = rng.random() < 0.3
        for number in range(1, rng.choice((2, 3, 4, 8) if large else (1, 2, 3, 3)) + 1):
            self._approve(number)
        for _ in range(rng.choice(_MORE_OF_THEME.get(self.theme, (0,)))):
            self._approve_another()
        if self.theme in _THEMES_OF_LIMITS:
            for _ in range(rng.choice((1, 2, 3))):
                self._limit()
            self.payroc.temper.faults = min(self.payroc.temper.faults, 0.2)
        # A ledger may have been lost for longer than Payroc knows its keys.
        horizon = rng.choice(
            (3 * HOUR, 1 * DAY, 8 * DAY, 8 * DAY)
            if self._may_restore
            else (20 * MINUTE, 3 * HOUR, 3 * HOUR, 1 * DAY, 8 * DAY)
        )
        engine.trouble = Trouble(
            die=rng.choice((0.0, 0.003, 0.012)),
            fail=rng.choice((0.0, 0.003, 0.012)),
            freeze=rng.choice((0.0, 0.003, 0.012)),
            critical=rng.choice((1.0, 5.0, 15.0)),
            where=_WHERE_OF_THEME.get(self.theme, AROUND_THE_POST | IN_A_WRITE_BACK),
        )
        if self.theme in _WHERE_OF_THEME and (self.theme != "limits" or rng.random() < 0.5):
            # Nothing but processes that stand still, at the points of the theme.
            engine.trouble = Trouble(freeze=0.02, critical=15.0, where=_WHERE_OF_THEME[self.theme])
        if self.theme == "lists":
            engine.trouble = rng.choice(_TROUBLE_WITH_LISTS)
        for act, times in _EVENTS_OF_THEME.get(self.theme, ()):
            for _ in range(times):
                self._at(min(horizon, 20 * MINUTE) * rng.random(), partial(act, self))
        self.merchant.guarded = rng.random() < 0.5
        self.merchant.read_only = rng.random() < (0.4 if self._may_restore else 0.1)
        self.airflow.skips = rng.choice((0.0, 0.0, 0.05))
        self._at(0.0, self._new_run)
        for _ in range(rng.choice((0, 1, 2) if large else (0, 0, 1))):
            self._at(horizon * rng.random() ** 2, self._new_run)
        if rng.random() < (0.5 if large else 0.2):
            self._at(horizon * rng.random(), self.airflow.follow_up)
        if self._may_restore:
            self._at(horizon * rng.random() ** 2, self._make_backup)
            self._at(horizon * (1 - 0.5 * rng.random() ** 2), self._restore)
        for _ in range(rng.choice((0, 1, 2))):
            self._at(horizon * rng.random(), self._resume)
        for _ in range(rng.choice((0, 1, 2, 3) if large else (0, 1))):
            self._at(horizon * rng.random(), self._people_decide)
        for _ in range(rng.choice((1, 2, 4, 7) if large else (0, 1, 2))):
            self._at(horizon * rng.random(), self._something_happens)
        engine.run(until=horizon)

    def _begin_continuity(self) -> None:
        """Days and weeks of runs and follow-ups, with ledgers restored, lost, cloned, asleep, and rows approved again."""
        rng, engine = self.rng, self.engine
        for number in range(1, rng.choice((1, 2, 3, 5)) + 1):
            self._approve(number)
        days = rng.choice((5, 9, 9, 14, 22))
        engine.trouble = Trouble(
            die=rng.choice((0.0, 0.003)),
            fail=rng.choice((0.0, 0.003)),
            freeze=rng.choice((0.0, 0.0, 0.003)),
            critical=rng.choice((1.0, 5.0)),
            where=AROUND_THE_POST | IN_A_WRITE_BACK,
        )
        self.payroc.temper.faults = min(self.payroc.temper.faults, 0.2)
        runs, follow_ups = rng.choice((0.5, 0.9)), rng.choice((0.0, 0.3, 0.9))
        asleep = rng.randrange(days) if rng.random() < 0.4 else days
        for day in range(days):
            if asleep <= day < asleep + 7:
                continue
            if rng.random() < runs:
                self._at(DAY * (day + 0.1 * rng.random()), self._new_run)
            if rng.random() < follow_ups:
                self._at(DAY * (day + rng.random()), self.airflow.follow_up)
            if rng.random() < 0.3:
                self._at(DAY * (day + rng.random()), self._make_backup)
            if rng.random() < 0.6:
                self._at(DAY * (day + rng.random()), self._resume)
            if rng.random() < 0.3:
                self._at(DAY * (day + rng.random()), self._approve_another)
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = DAY * (days - 1) * rng.random()
            if rng.random() < 0.3:
                # At any point of a run.
                self._at(at, self._new_run)
                at += rng.choice((1.0, 10.0, 100.0)) * rng.random()
            self._at(at, self._disaster)
            if rng.random() < 0.8:
                # What was forgotten is approved again, and paid again if nobody notices.
                again = at + DAY * rng.choice((0.0, 0.5, 3.0)) * rng.random()
                self._at(again, self._approve_again)
                self._at(again + HOUR * rng.random(), self._new_run)
        if rng.random() < 0.3:
            self.payroc.temper.list_faults = 0.6
        if rng.random() < 0.2:
            self.payroc.temper.odd_objects = 0.5
        if rng.random() < 0.5:
            rng.choice((self._restore_and_change_the_key, self._restore_before_the_list_shows_it))(
                DAY * (days - 4) * rng.random()
            )
        for _ in range(rng.choice((0, 1, 2))):
            self._at(DAY * days * rng.random(), self._approve_again)
        for _ in range(rng.choice((0, 0, 1, 2))):
            self._at(DAY * days * rng.random(), self._change_api_key)
        self._at(0.0, self._new_run)
        engine.run(until=DAY * days)

    def _restore_and_change_the_key(self, at: float) -> None:
        """A day or two after a run comes another API key, and the ledger is what it was before the run."""
        self._at(at, self._approve_another)
        self._at(at + 1.0, self._keep_backup)
        self._at(at + HOUR, self._new_run)
        at += DAY * (1.1 + self.rng.random())
        self._at(at, self._change_api_key)
        self._at(at + MINUTE, self._go_back)
        self._at(at + HOUR, self._approve_again)
        self._at(at + 2 * HOUR, self._new_run)

    def _restore_before_the_list_shows_it(self, at: float) -> None:
        """The ledger is what it was before a run, reads the list before that shows the payment, and meets its row a week later."""
        self.payroc.temper.list_lag = LONGEST_LAG
        self._at(at, self._approve_another)
        self._at(at + 1.0, self._keep_backup)
        self._at(at + HOUR, self._new_run)
        self._at(at + 2 * HOUR, self._go_back)
        self._at(at + 2.5 * HOUR, self.airflow.follow_up)
        self._at(at + 8 * DAY, self._approve_again)
        self._at(at + 8 * DAY + HOUR, self._new_run)

    def end(self) -> Counts:
        """Let all trouble end, and see that everything ends well."""
        self._calm_down()
        self._count()
        return self.counts

    # -- the world -------------------------------------------------------------------------------------------------

    def _temper(self) -> Temper:
        chance, choice = self.rng.random, self.rng.choice
        return Temper(
            racy=not self.jumpy and chance() < 0.5,
            errors_are_saved=chance() < 0.5,
            key_per_api_key=chance() < 0.5,
            list_lag=choice((0.0, 0.0, 60.0, HOUR, LONGEST_LAG)),
            list_duplicates=chance() < 0.2,
            drops_custom_fields=chance() < 0.1,
            faults=choice((0.0, 0.2, 0.5, 0.9)),
            list_faults=choice((0.0, 0.0, 0.1, 0.5)),
            token_faults=choice((0.0, 0.0, 0.1)),
        )

    def _approve(self, number: int) -> None:
        rng = self.rng
        columns: dict[str, Any] = {"processing_terminal_id": TERMINALS[rng.random() < 0.25]}
        kind = rng.random()
        if kind < 0.15:
            columns |= dict.fromkeys(("routing_number", "account_number", "name_on_account")) | {
                "secure_token": f"29675312345{number}"
            }
        elif kind < 0.25:
            columns["order_id"] = None
        elif kind < 0.3:
            columns["amount"] = 0
        if self.theme in _THEMES_OF_LIMITS and number > 1 and kind >= 0.3 and rng.random() < 0.5:
            # The payee of the first one, and sometimes its amount.
            columns |= {"account_number": "5566700001", "amount": rng.choice((1001, 1000 + number))}
        item = self.merchant.approve(number, **columns)
        if columns.get("amount") == 0:
            self.merchant.invalid.add(item.source_ref)
        opinion = rng.random()
        if opinion < 0.15:
            self.payroc.opinions[item.order_id] = rng.choice(("decline", "refuse", "flag", "hold"))
            if self.payroc.opinions[item.order_id] in ("refuse", "flag"):
                self.invariants.excuse(item, "opinion")

    def _at(self, seconds: float, act: Callable[[], None]) -> None:
        self.engine.after(seconds, act)

    def _new_run(self) -> None:
        self.counts.runs += 1
        self.engine.tell("a run starts")
        self.airflow.run(batch_size=10 if self.theme == "lists" else self.rng.choice(_BATCH_SIZES))

    def _heartbeat_stops(self, actor: Actor, seconds: float) -> None:
        if seconds > HEARTBEAT_TIMEOUT:
            for task in self.airflow.tasks:
                if task.actor is actor:
                    self._at(HEARTBEAT_TIMEOUT, task.lose_heartbeat)

    # -- what people and machines do ---------------------------------------------------------------------------------

    def _something_happens(self) -> None:
        names = tuple(name for name in _EVENTS if self._is_possible(name))
        name = self.rng.choice(names)
        self._happens(name)
        _EVENTS[name](self)

    def _happens(self, name: str) -> None:
        self.counts.events[name] = self.counts.events.get(name, 0) + 1
        self.engine.tell(f"— {name} —")

    def _is_possible(self, name: str) -> bool:
        if name == "the database's clock jumps":
            return self.jumpy
        # A restored ledger has forgotten under which API key it sent, and what people decided: docs/safety.md says so.
        return not (name in _FORGOTTEN and self._may_restore)

    def _clear(self) -> None:
        if self.airflow.tasks:
            self.rng.choice(self.airflow.tasks).clear(downstream=self.rng.random() < 0.3)

    def _clear_a_pull(self) -> None:
        pulls = [task for task in self.airflow.tasks if "pull" in task.name]
        if pulls:
            self.rng.choice(pulls).clear(downstream=True)

    def _mark_success(self) -> None:
        if self.airflow.tasks:
            self.rng.choice(self.airflow.tasks).mark_success()

    def _kill(self) -> None:
        if self.engine.actors:
            self.engine.kill(self.rng.choice(self.engine.actors))

    def _freeze(self) -> None:
        if self.engine.actors:
            self.engine.freeze(self.rng.choice(self.engine.actors), self.rng.choice(FREEZES))

    def _edit(self) -> None:
        item = self.rng.choice(list(self.merchant.refunds.values()))
        if item.source_ref not in self.merchant.invalid:
            self.merchant.edit(item, amount=item.row["amount"] + 100)

    def _withdraw(self) -> None:
        item = self.rng.choice(list(self.merchant.refunds.values()))
        self.merchant.withdraw(item, withdrawn=not item.withdrawn)

    def _reset(self) -> None:
        # Once for each: a ledger writes such a row again once a week.
        ended = [
            item
            for item in self.merchant.refunds.values()
            if item.status in ENDED and not item.withdrawn and not item.reset
        ]
        if ended:
            self.merchant.reset(self.rng.choice(ended))

    def _approve_again(self) -> None:
        """Everything that has ended is approved again, some of it under another order id, terminal or amount."""
        rng = self.rng
        for item in list(self.merchant.refunds.values()):
            if item.status not in ENDED or item.reset or rng.random() < 0.3:
                continue
            self._happens("an ended source row is approved again")
            columns: dict[str, Any] = {"approved_at": EPOCH + timedelta(seconds=self.engine.time)}
            if rng.random() < 0.4:
                columns["order_id"] = f"new-{item.source_ref}"
            # Without custom fields nothing but terminal, amount and last four digits tells of a payment.
            told_by_key = not self.payroc.temper.drops_custom_fields
            if told_by_key and rng.random() < 0.3:
                columns["processing_terminal_id"] = rng.choice(ALL_TERMINALS)
            if told_by_key and rng.random() < 0.1:
                columns["amount"] = item.row["amount"] + 100
            if item.row["secure_token"] and not told_by_key:
                columns.pop("order_id", None)
            self.merchant.edit(item, **columns)
            self.merchant.reset(item)

    def _disaster(self) -> None:
        """The ledger in use becomes another one: a backup, an empty one, or a copy that was made earlier."""
        rng = self.rng
        self._stop_everything()
        kind = rng.random()
        if kind < 0.35 and self._clone is None:
            # From here on two copies are used in turn.
            self._happens("the ledger is cloned")
            self._clone = self.ledger.backup()
            self._at(DAY * rng.choice((0.5, 4.0, 8.0)) * rng.random(), self._disaster)
            return
        self.invariants.ledger_is_restored()
        if kind < 0.5 and self._clone is not None:
            self._happens("the other copy of the ledger is used")
            self.invariants.copies = True
            in_use = self.ledger.backup()
            self.ledger.restore(self._clone)
            self._clone = in_use
            return
        lost = rng.random() < 0.25
        self._happens("the ledger is lost" if lost else "the ledger is restored")
        backup, at = self._backups[0] if lost else rng.choice(self._backups[-4:])
        self._backup_at = at
        self.ledger.restore(backup)
        if rng.random() < 0.25:
            self.people.compare_restored(at)

    def _approve_another(self) -> None:
        self._approve(len(self.merchant.refunds) + 1)

    def _pause(self) -> None:
        scope = self.rng.choice(("*", *TERMINALS))
        at_once(self.ledger.pause(scope, "A person paused it."))
        self._at(self.rng.choice((MINUTE, HOUR)), lambda: self._resume_one(scope))

    def _people_decide(self) -> None:
        # A restored ledger may have forgotten a reissue, which then no look-up finds: docs/safety.md says what to do first.
        if not self._may_restore:
            self.people.decide()

    def _pause_for_a_moment(self) -> None:
        scope = self.rng.choice(TERMINALS)
        at_once(self.ledger.pause(scope, "A person paused it."))
        self._at(200.0 * self.rng.random(), lambda: self._resume_one(scope))

    def _limit(self) -> None:
        name = self.rng.choice(_THRESHOLDS if self.theme == "approval" else tuple(_LIMITS))
        if name in ("payee_total", "payee_count"):
            days = self.memory.limited.payee_days or self.rng.choice((1, 3))
            at_once(self.ledger.set_limit("payee_days", days, "The simulation sets it."))
        value = self.rng.choice(_LIMITS[name])
        self.engine.tell(f"the limit {name} is {value}")
        at_once(self.ledger.set_limit(name, value, "The simulation sets it."))

    def _people_look_at_holds(self) -> None:
        for row in self.memory.rows.values():
            if row.status is Status.HELD and self.rng.random() < 0.7:
                self.people.unhold(row.id)
                self._limit()

    def _cancel_one(self) -> None:
        if self.memory.rows:
            self.people.cancel(self.rng.choice(list(self.memory.rows)))

    def _follow_up(self) -> None:
        self.airflow.follow_up()

    def _resume(self) -> None:
        for scope in list(self.memory.paused):
            self._resume_one(scope)

    def _resume_one(self, scope: str) -> None:
        if scope == EVERYTHING and self.memory.restored_to is not None:
            # It would be refused.
            self.people.compare_restored(self._backup_at)
            return
        at_once(self.ledger.resume(scope, "A person resumed it."))

    def _change_api_key(self) -> None:
        self.invariants.key_changes.append(self.engine.time)
        if self.theme == "continuity":
            # A former key that comes back within days of a restore is not protected: docs/safety.md says so.
            self._happens("another API key")
            self.host.api_key = f"key-{len(self.invariants.key_changes) + 1}"
        else:
            self.host.api_key = "key-2" if self.host.api_key == "key-1" else "key-1"

    def _wrong_api_key(self) -> None:
        good, self.host.api_key = self.host.api_key, "wrong key"
        self._at(HOUR, lambda: self._set_api_key(good))

    def _set_api_key(self, api_key: str) -> None:
        self.host.api_key = api_key

    def _wrong_host(self) -> None:
        good = self.host.environment
        self.host.environment = OTHER_HOST
        self._at(HOUR, lambda: self._set_host(good))

    def _set_host(self, environment: str) -> None:
        self.host.environment = environment

    def _revoke(self) -> None:
        self.payroc.revoke_all()

    def _host_clock(self) -> None:
        self.engine.host_skew += self.rng.choice(
            (-9 * DAY, -HOUR, -50 * MINUTE, 30 * MINUTE, 2 * HOUR, 9 * DAY)
        )

    def _ledger_clock(self) -> None:
        # Back by less than the day that lies between our key window and Payroc's; forward by anything.
        self.engine.ledger_skew += self.rng.choice(
            (-10 * HOUR, -50 * MINUTE, 15 * MINUTE, 2 * HOUR, 5 * HOUR)
        )
        self.engine.ledger_skew = max(-10 * HOUR, min(10 * HOUR, self.engine.ledger_skew))

    def _make_backup(self) -> None:
        if self.rng.random() < 0.7:
            self._keep_backup()

    def _keep_backup(self) -> None:
        self._happens("a backup is made")
        self._backup, self._backup_at = self.ledger.backup(), self.engine.ledger_time()
        self._backups.append((self._backup, self._backup_at))

    def _go_back(self) -> None:
        """The ledger is restored from the newest backup."""
        self._happens("the ledger is restored")
        self._stop_everything()
        self.invariants.ledger_is_restored()
        self.ledger.restore(self._backup)

    def _restore(self) -> None:
        self._go_back()
        # Whoever forgets the command, or never heard of it, pays nothing twice either.
        if self.rng.random() < 0.7:
            self.people.compare_restored(self._backup_at)

    def _stop_everything(self) -> None:
        # Whoever restores a database stops what works with it first; what is on the wire arrives all the
        # same.
        for actor in list(self.engine.actors):
            actor.ended = None
            self.engine.kill(actor)

    def _payroc_moves(self) -> None:
        for existing in self.payroc.refunds.values():
            self._move(existing)

    def _move(self, existing: Any) -> None:
        chance = self.rng.random()
        if existing.word in ("ready", "pending"):
            if chance < (0.6 if self.theme == "reissues" else 0.1):
                words = (
                    ("reversal",) if self.theme == "reissues" else ("admin", "reversal", "declined", "novel")
                )
                word = self.rng.choice(words)
                if word == "declined" and existing.key:
                    # An answer that says otherwise may still be on its way to a worker that stands still.
                    self.invariants.excuse(self.merchant.by_key[existing.key], "declined later")
                self.payroc.change(existing, word)
            elif chance < 0.7:
                self.payroc.change(existing, "complete")
        elif existing.word == "complete" and chance < 0.3 and self.engine.time - existing.created < 8 * DAY:
            self.payroc.change(existing, "returned")
        elif existing.word == "reversal" and chance < 0.4 and existing.key:
            existing.paid_again = True
            self.invariants.excuse(self.merchant.by_key[existing.key], "paid again")
            self.payroc.change(existing, "complete")

    def _foreign(self) -> None:
        item = self.rng.choice(list(self.merchant.refunds.values()))
        terminal = item.row["processing_terminal_id"]
        self.payroc.add_foreign(terminal, item.order_id, item.row["amount"], self.engine.time)
        self.invariants.excuse(item, "foreign")

    # -- the end ---------------------------------------------------------------------------------------------------

    def _calm_down(self) -> None:
        """All trouble ends; what stands still wakes up; daily runs go on until nothing is left to do."""
        engine, temper = self.engine, self.payroc.temper
        engine.tell("═══ from here on all is calm ═══")
        engine.trouble = Trouble()
        self.merchant.read_only, self.airflow.skips, self.airflow.calm = False, 0.0, True
        temper.faults = temper.list_faults = temper.token_faults = temper.odd_objects = 0.0
        for existing in self.payroc.refunds.values():
            existing.odd = False
        engine.run()
        self.host.environment = HOST
        if self.host.api_key == "wrong key":
            self.host.api_key = "key-1"
        # A restored ledger is given two days to find out what it has forgotten.
        at_least = 2 if self.invariants.restored else 0
        for day in range(_MOST_CALM_DAYS):
            if day >= at_least and self._is_quiet():
                break
            engine.time += DAY
            if self.memory.restored_to is not None:
                self._resume()
                engine.run()
            self._resume()
            self._let_pass()
            self._new_run()
            engine.run()
        if self.people_decide and not self._may_restore:
            self._decide_everything()
        if (
            self.large
            or self.rng.random() < 0.4
            or any(found.word != "ready" for found in self.payroc.refunds.values())
        ):
            self._payroc_moves()
            self._follow_up_a_day_later()
        else:
            self.airflow.write_back()
            engine.run()
        self.invariants.at_the_end(self._verified() if self.invariants.restored else [])

    def _let_pass(self) -> None:
        """No limit is left, and people release what is held, or end it."""
        for name in (*_LIMITS, "payee_days"):
            if getattr(self.memory.limited, name) is not None:
                at_once(self.ledger.set_limit(name, None, "All is calm."))
        for row in list(self.memory.rows.values()):
            if row.status is Status.HELD:
                (self.people.unhold if self.rng.random() < 0.8 else self.people.cancel)(row.id)
        self.engine.run()

    def _decide_everything(self) -> None:
        """People look at all that waits for them, and what they approved anew is sent."""
        before = self.people.decisions
        self._payroc_moves()
        self._follow_up_a_day_later()
        self.people.decide()
        self.engine.run()
        if self.people.decisions > before:
            if self.rng.random() < 0.5:
                self._payroc_moves()
                self._follow_up_a_day_later()
            self._resume()
            self._let_pass()
            self._new_run()
            self.engine.run()

    def _follow_up_a_day_later(self) -> None:
        self.engine.time += DAY
        self.airflow.follow_up()
        self.engine.run()

    def _verified(self) -> list[Difference]:
        """Return what `verify` finds, run over the whole time."""
        deployment, found = self.airflow.deployment, []

        async def work() -> None:
            start, end = EPOCH - timedelta(days=1), EPOCH + timedelta(days=365)
            found.extend(
                (
                    await verify(
                        start,
                        end,
                        terminals=ALL_TERMINALS,
                        ledger=deployment.ledger,
                        gateway=deployment.connect(),
                    )
                ).differences
            )

        # Its first token may be one that ended long ago; then it says so, and is run again.
        for _ in range(2):
            verifying = self.engine.start("verify", work())
            self.engine.run()
            if verifying.error is None:
                break
        return found

    def _is_quiet(self) -> bool:
        if self.memory.paused or any(row.status in _WAITING for row in self.memory.rows.values()):
            return False
        if any(
            item.status is None and not item.withdrawn
            for item in self.merchant.refunds.values()
            if item.reset
        ):
            return False
        # What the source still stands by has been sent; what it does not stand by will not be.
        rows = {row["source_ref"]: row for row in self.merchant.rows()}
        known = self.memory.by_ref
        return all(ref in known or ref in self.merchant.invalid for ref in rows) and not any(
            row.status is Status.APPROVED
            and (row.replaces is not None or rows.get(row.source_ref, {}).get("amount") == row.amount)
            for row in known.values()
        )

    def _count(self) -> None:
        counts, engine = self.counts, self.engine
        counts.refunds, counts.steps = len(self.merchant.refunds), engine.steps
        counts.posts, counts.faults = self.payroc.posts, self.payroc.faults_met
        counts.posts_beside, counts.with_lists = self.payroc.posts_beside, int(self.payroc.posts_beside > 0)
        counts.deaths, counts.freezes, counts.failures = engine.deaths, engine.freezes, engine.failures
        counts.paid = sum(row.payroc_refund_id is not None for row in self.memory.rows.values())
        counts.decisions = self.people.decisions
        counts.asked_people = sum(row.status is Status.REVIEW for row in self.memory.rows.values())


def _failure(label: str) -> Exception:
    if label.startswith("ledger"):
        return LedgerUnavailable("The ledger database went away.")
    if label.startswith("source"):
        return SourceUnavailable("The source's database went away.")
    return PayrocNoAnswer("call", "no answer came")


_EVENTS: dict[str, Callable[[History], None]] = {
    "a task is cleared": History._clear,
    "a task is marked a success": History._mark_success,
    "a process is killed": History._kill,
    "a process stands still": History._freeze,
    "a source row is edited": History._edit,
    "a source row is withdrawn or brought back": History._withdraw,
    "an ended source row loses its status": History._reset,
    "another refund is approved": History._approve_another,
    "a person pauses": History._pause,
    "a person resumes": History._resume,
    "people decide what waits for them": History._people_decide,
    "people look at what is held": History._people_look_at_holds,
    "a person cancels a refund": History._cancel_one,
    "a person sets a limit": History._limit,
    "another API key": History._change_api_key,
    "a wrong API key for an hour": History._wrong_api_key,
    "another Payroc for an hour": History._wrong_host,
    "Payroc takes all tokens back": History._revoke,
    "a worker host's clock jumps": History._host_clock,
    "the database's clock jumps": History._ledger_clock,
    "time passes at Payroc": History._payroc_moves,
    "somebody uses our order id": History._foreign,
}


_FORGOTTEN = (
    "an ended source row loses its status",
    "another API key",
    "people look at what is held",
    "a person cancels a refund",
    "a person sets a limit",
)

# The limits that people set, in amounts of which the refunds of a history make one to a few.
_LIMITS: dict[str, tuple[int | None, ...]] = {
    "largest_refund": (1001, 1002, 5000, None),
    "run_total": (1002, 2005, 3010, None),
    "run_count": (1, 2, None),
    "day_total": (1002, 2005, 3010, None),
    "day_count": (1, 2, 3, None),
    "payee_total": (1001, 2002, 3010, None),
    "payee_count": (1, 2, None),
    "duplicate_days": (1, 5, None),
    "approval_total": (0, 1001, 2005, None),
    "approval_count": (0, 1, 2, None),
}

_THRESHOLDS = ("approval_total", "approval_count")
_TROUBLE_WITH_LISTS = (
    Trouble(fail=0.02, critical=5.0, where=AROUND_THE_POST),
    Trouble(freeze=0.02, critical=5.0, where=AROUND_THE_POST),
)
_THEMES_OF_LIMITS = ("limits", "approval")
_MORE_OF_THEME = {"limits": (1, 2, 3), "approval": (1, 2, 3), "lists": (2, 4, 6)}

_EVENTS_OF_THEME: dict[str, tuple[tuple[Callable[[History], None], int], ...]] = {
    "limits": (
        (History._new_run, 3),
        (History._limit, 3),
        (History._people_look_at_holds, 4),
        (History._approve_another, 2),
        (History._mark_success, 4),
    ),
    "approval": (
        (History._new_run, 3),
        (History._approve_another, 3),
        (History._clear, 2),
        (History._clear_a_pull, 2),
    ),
    "the gate": ((History._new_run, 2), (History._pause_for_a_moment, 8), (History._edit, 4)),
    "write-backs": ((History._payroc_moves, 2), (History._follow_up, 1)),
}


def tell(seed: int, **options: Any) -> list[str]:
    """Return a history line by line; the last line is its violation, if there is one."""
    lines: list[str] = []
    try:
        History(seed, tell=lines.append, **options).run()
    except Violation as violation:
        lines.append(f"VIOLATION: {violation}")
    return lines
