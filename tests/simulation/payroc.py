"""
Payroc, as its reference says and as badly as it does not exclude.

What the reference leaves open is drawn per history: whether error answers are saved under a key, whether a key belongs to one API key,
whether two requests with one key that overlap are both processed, how late a list shows what exists, whether it repeats objects or
drops their custom fields. What the protocol relies on holds in every world: a saved answer is replayed for 7 days, an expired token is
refused, a list shows an object within a day, and a request has been processed 80 seconds after it left its worker.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from include.payroc import models, problems
from include.payroc.errors import (
    PayrocError,
    PayrocIncompleteList,
    PayrocNoAnswer,
    PayrocProblem,
    PayrocUnexpectedAnswer,
)
from tests.simulation.engine import DAY, EPOCH, Engine, Strand

# Bodies come again in every attempt, and in every history.
_parsed = lru_cache(maxsize=1000)(json.loads)

TOKEN_SECONDS = 3600
KEY_KEPT = 7 * DAY
CLIENT_TIMEOUT = 60.0
# How many refunds of a process may be under way to Payroc at a time; twice as many may be claimed.
TURNS = (1, 2, 3, 32)

HOST = "https://api.payroc.example/v1"
OTHER_HOST = "https://api.uat.payroc.example/v1"

# What may happen to one POST, with how often. ``before``: Payroc did not act; ``after``: it did, and only the answer differs.
FAULTS: tuple[tuple[str, int], ...] = (
    ("lost before", 6),
    ("lost after", 10),
    ("late", 6),
    ("refused connection", 4),
    ("500 before", 5),
    ("500 after", 6),
    ("500 sticky before", 2),
    ("500 sticky after", 2),
    ("502 html before", 3),
    ("502 html after", 3),
    ("408", 3),
    ("429", 4),
    ("401", 5),
    ("garbage after", 4),
    ("empty after", 3),
    ("redirect", 1),
    ("wrong body", 1),
    ("400", 6),
    ("403 terminal", 4),
    ("403 proxy", 3),
    ("409 key", 2),
    ("409 exists", 4),
    ("slow", 4),
)
FAULT_NAMES = tuple(name for name, _ in FAULTS)
ANYTHING = tuple(name for name, weight in FAULTS for _ in range(weight))
# Faults that end with people soon, and faults that look like a wrong configuration.
MURKY = ("409 exists", "409 exists", "409 key", "400", "lost after", "wrong body", "500 after")
MISCONFIGURED = ("403 terminal", "403 proxy", "401", "lost after", "500 after", "403 terminal")

# Faults after which even a perfect protocol may have to ask people.
ASKS_PEOPLE = {
    "500 sticky before",
    "500 sticky after",
    "wrong body",
    "400",
    "409 key",
    "409 exists",
    "403 proxy",
}


@dataclass(slots=True)
class Temper:
    """What this history's Payroc is like where the reference says nothing."""

    racy: bool = False
    errors_are_saved: bool = False
    key_per_api_key: bool = False
    list_lag: float = 0.0
    list_duplicates: bool = False
    drops_custom_fields: bool = False
    faults: float = 0.0
    which: tuple[str, ...] = ANYTHING
    list_faults: float = 0.0
    token_faults: float = 0.0
    odd_objects: float = 0.0


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token, as the protocol uses it: it looks at its life only."""

    text: str
    expires_in: int = TOKEN_SECONDS


@dataclass(frozen=True, slots=True)
class ShownOrder:
    """What of ``order`` the protocol looks at."""

    order_id: str
    amount: int
    currency: str
    date_time: datetime


@dataclass(frozen=True, slots=True)
class ShownResult:
    """What of ``transactionResult`` the protocol looks at."""

    status: str
    response_code: str
    authorized_amount: int | None


@dataclass(frozen=True, slots=True)
class Shown:
    """
    A refund as Payroc shows it. Not :class:`include.payroc.models.Refund`, which takes longer to make than most steps of a history:
    how Payroc's JSON becomes that is tested elsewhere, and the protocol only reads these.
    """

    refund_id: str
    processing_terminal_id: str
    order: ShownOrder
    transaction_result: ShownResult
    custom_fields: dict[str, str] | None
    last4: str | None
    refund_key: str | None


@dataclass(slots=True)
class Existing:
    """A refund that exists at Payroc."""

    refund_id: str
    key: str
    body: dict[str, Any]
    amount: int
    word: str
    created: float
    listed_from: float
    custom_fields: bool
    api_key: str = ""
    # It stands on a list in a form that nobody understands.
    odd: bool = False
    shown: Shown | None = None
    # Came back, and was paid out again: nobody can know before Payroc says so.
    paid_again: bool = False

    @property
    def terminal(self) -> str:
        return str(self.body["processingTerminalId"])

    @property
    def declined(self) -> bool:
        return self.word == "declined"


@dataclass(slots=True)
class Post:
    """A request on its way: what was sent, by which attempt, and what came back."""

    key: str
    body: bytes
    token: str
    api_key: str
    attempt: tuple[int, int] | None
    fault: str
    sent_at: float
    answer: Shown | PayrocError | None = None
    processed: bool = False


@dataclass(slots=True)
class Saved:
    """The first answer to a key."""

    body: bytes
    answer: str | PayrocError
    at: float


@dataclass(slots=True)
class Watch:
    """Who is told of what happens at Payroc: the invariants."""

    sent: Callable[[Post], None] = field(default=lambda post: None)
    processing: Callable[[Post], None] = field(default=lambda post: None)
    created: Callable[[Post, Existing], None] = field(default=lambda post, existing: None)


class Payroc:
    """
    The far side.

    :param engine: time and chance.
    :param temper: what it is like in this history.
    """

    def __init__(self, engine: Engine, temper: Temper) -> None:
        self.engine = engine
        self.temper = temper
        self.watch = Watch()
        self.tokens: dict[str, tuple[float, str]] = {}
        self.tokens_issued = 0
        self.posts = 0
        # Those of which another refund of the same list was under way.
        self.posts_beside = 0
        self.faults_met: dict[str, int] = {}
        self.refunds: dict[str, Existing] = {}
        self.by_key: dict[str, list[Existing]] = {}
        self.saved: dict[tuple[str, str], Saved] = {}
        self.in_process: dict[tuple[str, str], int] = {}
        # What Payroc thinks of single refunds, by order id: declined by the bank, refused, flagged.
        self.opinions: dict[str, str] = {}
        self.number = 0

    # -- tokens ----------------------------------------------------------------------------------------------------

    def authorize(self, api_key: str, environment: str) -> Token:
        # An API key is good for one environment.
        if api_key.startswith("wrong") or environment != HOST:
            raise PayrocProblem(
                "get token", "not-authorized", http_status=401, problem_type=problems.NOT_AUTHORIZED
            )
        self.tokens_issued += 1
        token = f"token-{self.tokens_issued}"
        self.tokens[token] = (self.engine.time + TOKEN_SECONDS, api_key)
        return Token(token)

    def revoke_all(self) -> None:
        """Take all tokens back, as a restart of the identity service does."""
        self.tokens.clear()

    def _is_live(self, token: str) -> bool:
        known = self.tokens.get(token)
        return known is not None and known[0] > self.engine.time

    # -- create ----------------------------------------------------------------------------------------------------

    def send(self, post: Post) -> float:
        """Put a request on its way; return the seconds until the worker has its answer, or gives up."""
        self.posts += 1
        engine, fault = self.engine, post.fault
        chance = engine.chance
        self.watch.sent(post)
        if fault in ("lost before", "refused connection"):
            post.answer = PayrocNoAnswer("create refund", "no answer came")
            return CLIENT_TIMEOUT if fault == "lost before" else 0.1
        if fault == "late":
            # It reaches Payroc when the worker has given up.
            travel, work = CLIENT_TIMEOUT - 5.0 * chance(), 1.0 + 15.0 * chance()
        elif fault == "slow":
            travel, work = 1.0, 20.0 + 35.0 * chance()
        else:
            travel, work = 0.02 + 0.1 * chance(), 0.05 + chance()
        engine.after(travel, lambda: self._begin(post, work))
        if fault in ("lost after", "late"):
            return CLIENT_TIMEOUT
        return travel + work + 0.05

    def _begin(self, post: Post, work: float) -> None:
        if not self._is_live(post.token):
            post.answer = _problem(401, problems.NOT_AUTHORIZED)
            return
        refusal = _refusal_before(post.fault, _parsed(post.body)["processingTerminalId"])
        if post.fault == "401":
            self.tokens.pop(post.token, None)
        if post.fault == "500 sticky before":
            self._save(post, _problem(500, problems.API_ERROR))
        if refusal is not None:
            post.answer = refusal
            if refusal.http_status == 400 and self.temper.errors_are_saved:
                self._save(post, refusal)
            return
        scope = self._scope(post)
        saved = self._saved(scope)
        if saved is not None:
            self.watch.processing(post)
            self._replay(post, saved)
            return
        if self.in_process.get(scope) and not self.temper.racy:
            post.answer = _problem(409, problems.IDEMPOTENCY_KEY_IN_USE)
            return
        self.watch.processing(post)
        self.in_process[scope] = self.in_process.get(scope, 0) + 1
        self.engine.after(work, lambda: self._finish(post, scope))

    def _finish(self, post: Post, scope: tuple[str, str]) -> None:
        self.in_process[scope] -= 1
        body = _parsed(post.body)
        opinion = self.opinions.get(body["order"]["orderId"])
        post.processed = True
        if opinion == "refuse":
            post.answer = _problem(400, problems.BAD_REQUEST, ("refundMethod.accountNumber",))
            if self.temper.errors_are_saved:
                self._save(post, post.answer)
            return
        amount = body["order"]["amount"] + (1 if post.fault == "wrong body" else 0)
        self.number += 1
        existing = Existing(
            refund_id=f"P{self.number:09d}",
            key=post.key,
            body=body,
            amount=amount,
            word={"decline": "declined", "flag": "admin", "hold": "pending"}.get(opinion or "", "ready"),
            created=self.engine.time,
            listed_from=self.engine.time + self.temper.list_lag * self.engine.chance(),
            custom_fields=not self.temper.drops_custom_fields,
            api_key=post.api_key,
            odd=bool(self.temper.odd_objects) and self.engine.chance() < self.temper.odd_objects,
        )
        self.refunds[existing.refund_id] = existing
        self.by_key.setdefault(post.key, []).append(existing)
        self.engine.tell(
            f"Payroc: {existing.refund_id} exists now, for order {body['order']['orderId']}, {existing.word}"
        )
        self.watch.created(post, existing)
        if post.fault == "500 sticky after":
            self._save(post, _problem(500, problems.API_ERROR))
        else:
            self._save(post, existing.refund_id)
        post.answer = _answer_after(post.fault) or self.show(existing)

    def _replay(self, post: Post, saved: Saved) -> None:
        post.processed = True
        if saved.body != post.body:
            post.answer = _problem(409, problems.IDEMPOTENCY_KEY_IN_USE)
        elif isinstance(saved.answer, str):
            post.answer = _answer_after(post.fault) or self.show(self.refunds[saved.answer])
        else:
            post.answer = saved.answer

    def _scope(self, post: Post) -> tuple[str, str]:
        return post.api_key if self.temper.key_per_api_key else "", post.key

    def _saved(self, scope: tuple[str, str]) -> Saved | None:
        saved = self.saved.get(scope)
        return saved if saved is not None and self.engine.time - saved.at < KEY_KEPT else None

    def _save(self, post: Post, answer: str | PayrocError) -> None:
        scope = self._scope(post)
        if self._saved(scope) is None:
            self.saved[scope] = Saved(post.body, answer, self.engine.time)

    # -- objects ---------------------------------------------------------------------------------------------------

    def change(self, existing: Existing, word: str) -> None:
        """Payroc's word for a refund changes: its batch closes, the bank returns it, somebody flags it."""
        existing.word = word
        existing.shown = _as_model(existing)
        self.engine.tell(f"Payroc: {existing.refund_id} is {word}")

    def add_foreign(self, terminal: str, order_id: str, amount: int, now: float) -> None:
        """A refund that somebody made in Payroc's portal, under an order id that we use."""
        self.number += 1
        body = {
            "processingTerminalId": terminal,
            "order": {"orderId": order_id, "amount": amount, "currency": "USD"},
            "refundMethod": {"type": "ach", "accountNumber": "99990000"},
            "customFields": [{"name": "who", "value": "somebody in the portal"}],
        }
        existing = Existing(f"F{self.number:09d}", "", body, amount, "ready", now, now, True)
        self.refunds[existing.refund_id] = existing

    def list(
        self,
        terminal: str,
        order_id: str | None,
        date_from: datetime | None,
        date_to: datetime | None = None,
    ) -> tuple[list[Shown], list[str]]:
        """Return what the list shows now, and the names of what nobody understands of it."""
        listed = [
            existing
            for existing in self.refunds.values()
            if existing.listed_from <= self.engine.time
            and existing.terminal == terminal
            and (order_id is None or existing.body["order"]["orderId"] == order_id)
            and (date_from is None or EPOCH + timedelta(seconds=existing.created) >= date_from)
            and (date_to is None or EPOCH + timedelta(seconds=existing.created) < date_to)
        ]
        found = [self.show(existing) for existing in listed if not existing.odd]
        if self.temper.list_duplicates and found:
            found.append(found[0])
        return found, [f"refund {existing.refund_id}" for existing in listed if existing.odd]

    def show(self, existing: Existing) -> Shown:
        """Return the object as Payroc shows it now."""
        if existing.shown is None:
            existing.shown = _as_model(existing)
        return existing.shown


class Places:
    """
    Places for the refunds of a list.

    :param count: how many there are.
    """

    def __init__(self, engine: Engine, count: int) -> None:
        self.count = count
        self._engine = engine
        self.taken = 0
        self._waiting: list[Strand] = []

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Strand]:
        """Hold a place; entering waits for one, and tells whose it is."""
        strand = self._engine.current
        assert strand is not None
        while self.taken >= self.count:
            self._waiting.append(strand)
            await self._engine.park()
        self.taken += 1
        try:
            yield strand
        finally:
            self.give_back()

    def give_back(self) -> None:
        """Give a place back, and wake one who waits for it."""
        self.taken -= 1
        if self._waiting:
            # In production the first one is next; the protocol does not rely on it.
            self._engine.wake(self._waiting.pop(int(self._engine.chance() * len(self._waiting))))


class SimulatedGateway:
    """
    One task's way to Payroc: it reads the connection once, and shares the tokens of its host.

    :param host: where the task runs.
    """

    def __init__(self, payroc: Payroc, host: Host) -> None:
        self._payroc = payroc
        self._host = host
        self._engine = payroc.engine
        self._api_key = host.api_key
        self.connection = "the connection to the simulated Payroc"
        self.environment = host.environment
        self.sent_with = f"{host.environment} {host.api_key}"
        turns = TURNS[int(self._engine.chance() * len(TURNS))]
        self._queue, self._turns = Places(self._engine, 2 * turns), Places(self._engine, turns)

    @asynccontextmanager
    async def queue(self) -> AsyncIterator[None]:
        await self._engine.point("payroc: queue")
        async with self._queue.one() as strand:
            strand.actor.most_claimed = self._queue.count
            strand.is_queued = True
            try:
                yield
            finally:
                strand.is_queued = False

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        await self._engine.point("payroc: turn")
        async with self._turns.one() as strand:
            strand.has_turn = True
            try:
                yield
            finally:
                strand.has_turn = strand.waits_for_answer = False

    async def token(self, *, younger_than: float | None = None) -> Token:
        host, engine = self._host, self._engine
        now = engine.time + engine.host_skew
        cached = host.tokens.get(self.sent_with)
        if cached is not None:
            token, received = cached
            age = now - received
            if age < token.expires_in - 120 and (younger_than is None or age < younger_than):
                return token
        await engine.point("payroc: token")
        if engine.chance() < self._payroc.temper.token_faults:
            raise PayrocNoAnswer("get token", "no answer came")
        token = self._payroc.authorize(self._api_key, self.environment)
        host.tokens[self.sent_with] = (token, now)
        return token

    async def create_refund(self, token: Token, idempotency_key: str, body: bytes) -> Shown:
        engine, payroc = self._engine, self._payroc
        await engine.point("payroc: about to POST")
        fault = ""
        if self._host.planned:
            fault = self._host.planned.pop(0)
        elif engine.chance() < payroc.temper.faults:
            fault = payroc.temper.which[int(engine.chance() * len(payroc.temper.which))]
        strand = engine.current
        assert strand is not None
        if self._queue.taken > 1:
            payroc.posts_beside += 1
        post = Post(idempotency_key, body, token.text, self._api_key, strand.attempt, fault, engine.time)
        if post.fault:
            payroc.faults_met[post.fault] = payroc.faults_met.get(post.fault, 0) + 1
        if engine.telling:
            engine.tell(f"POST {'with ' + post.fault if post.fault else ''} for attempt {post.attempt}")
        await engine.sleep(payroc.send(post))
        await engine.point("payroc: answered")
        answer = post.answer
        if post.fault in ("lost after", "late") or answer is None:
            raise PayrocNoAnswer("create refund", "no answer came")
        if isinstance(answer, PayrocError):
            if engine.telling:
                engine.tell(f"answer: {answer} {answer.problem_type or ''}")
            self._evict_refused(token, answer)
            raise answer
        return answer

    async def list_refunds(
        self,
        token: Token,
        *,
        processing_terminal_id: str,
        order_id: str | None = None,
        date_from: datetime | None = None,
        date_to: datetime | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[Shown]:
        engine, payroc = self._engine, self._payroc
        await engine.point("payroc: list")
        drawn = engine.chance()
        if drawn < payroc.temper.list_faults:
            raise (
                PayrocNoAnswer("list refunds", "no answer came")
                if drawn * 2 < payroc.temper.list_faults
                else _problem(500, "api-error")
            )
        if not payroc._is_live(token.text):
            error = _problem(401, problems.NOT_AUTHORIZED)
            self._evict_refused(token, error)
            raise error
        found, odd = payroc.list(processing_terminal_id, order_id, date_from, date_to)
        if engine.telling:
            engine.tell(
                f"list {order_id or processing_terminal_id}: {', '.join(item.refund_id for item in found) or 'nothing'}"
            )
        for item in found[:limit]:
            yield item
        if odd and limit is None:
            raise PayrocIncompleteList("list refunds", len(odd), odd)

    async def get_refund(self, token: Token, refund_id: str) -> Shown:
        await self._engine.point("payroc: get")
        if self._engine.chance() < self._payroc.temper.list_faults:
            raise PayrocNoAnswer("get refund", "no answer came")
        if not self._payroc._is_live(token.text):
            raise _problem(401, problems.NOT_AUTHORIZED)
        if refund_id not in self._payroc.refunds:
            raise _problem(404, "not-found")
        return self._payroc.show(self._payroc.refunds[refund_id])

    def _evict_refused(self, token: Token, error: PayrocError) -> None:
        if error.http_status == 401:
            self._host.evict(token)


@dataclass(slots=True)
class Host:
    """A worker host: its connection, and the tokens that its tasks share."""

    api_key: str = "key-1"
    environment: str = HOST
    tokens: dict[str, tuple[Token, float]] = field(default_factory=dict)
    # What happens to the next POSTs, instead of chance: for tests that try every behaviour in turn.
    planned: list[str] = field(default_factory=list)

    def evict(self, token: Token) -> None:
        """Forget a token that Payroc refused, and no other."""
        for name, (cached, _) in list(self.tokens.items()):
            if cached is token:
                del self.tokens[name]


def _problem(status: int, kind: str, parameters: tuple[str, ...] = (), **more: Any) -> PayrocProblem:
    return PayrocProblem(
        "create refund", kind, http_status=status, problem_type=kind, parameters=parameters, **more
    )


def _refusal_before(fault: str, terminal: str) -> PayrocError | None:
    match fault:
        case "500 before" | "500 sticky before":
            return _problem(500, problems.API_ERROR)
        case "502 html before":
            return PayrocUnexpectedAnswer("create refund", "not JSON", http_status=502)
        case "408":
            return PayrocUnexpectedAnswer("create refund", "not JSON", http_status=408)
        case "429":
            return _problem(429, "too-many-requests", retry_after=30.0)
        case "401":
            return _problem(401, problems.NOT_AUTHORIZED)
        case "redirect":
            return PayrocUnexpectedAnswer("create refund", "a redirect", http_status=302)
        case "400":
            return _problem(400, problems.BAD_REQUEST, ("order.description",))
        case "403 terminal":
            return _problem(403, problems.FORBIDDEN, resource=terminal)
        case "403 proxy":
            return PayrocUnexpectedAnswer("create refund", "not JSON", http_status=403)
        case "409 key":
            return _problem(409, problems.IDEMPOTENCY_KEY_IN_USE)
    return None


def _answer_after(fault: str) -> PayrocError | None:
    match fault:
        case "500 after" | "500 sticky after":
            return _problem(500, problems.API_ERROR)
        case "502 html after":
            return PayrocUnexpectedAnswer("create refund", "not JSON", http_status=502)
        case "garbage after" | "empty after":
            return PayrocUnexpectedAnswer("create refund", "not a refund", http_status=201)
        case "409 exists":
            return _problem(409, problems.RESOURCE_ALREADY_EXISTS)
    return None


def _as_model(existing: Existing) -> Shown:
    order, method = existing.body["order"], existing.body["refundMethod"]
    account = method.get("accountNumber")
    fields = (
        {item["name"]: item["value"] for item in existing.body.get("customFields", ())}
        if existing.custom_fields
        else {}
    )
    return Shown(
        existing.refund_id,
        existing.body["processingTerminalId"],
        ShownOrder(
            order["orderId"], existing.amount, order["currency"], EPOCH + timedelta(seconds=existing.created)
        ),
        ShownResult(
            existing.word, "D" if existing.declined else "A", None if existing.declined else -existing.amount
        ),
        fields or None,
        account[-4:] if account else None,
        fields.get(models.REFUND_KEY_FIELD),
    )
