"""The ledger as a worker sees it: every call is a point at which the worker may die, stand still, or lose the database."""

from __future__ import annotations

import types
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any

from include.refunds.ledger import LedgerError, LedgerUnavailable
from tests.simulation.engine import Engine

_LOCK_POLL = 15.0
_LOCK_TIMEOUT = 60.0


class SteppedLedger:
    """
    Asynchronous methods over a ledger whose own methods are not.

    :param ledger: a :class:`~tests.simulation.ledger.MemoryLedger` or one of ``twins``.
    :param actor: who works with it.
    :param watch: told of each call that has had its effect: name, arguments, result.
    """

    def __init__(
        self,
        ledger: Any,
        engine: Engine,
        watch: Callable[[str, tuple[Any, ...], dict[str, Any], Any], None],
        actor: str = "simulation",
    ) -> None:
        self.actor = actor
        self.ledger = ledger
        self.engine = engine
        self.watch = watch

    @asynccontextmanager
    async def write_back_lock(self) -> AsyncIterator[None]:
        # Postgres lets go of an advisory lock when its session dies; so does this when the coroutine is closed.
        give_up = self.engine.time + _LOCK_TIMEOUT
        while self.engine.time < give_up:
            with self.ledger.write_back_lock() as taken:
                if taken:
                    yield
                    return
            await self.engine.sleep(_LOCK_POLL)
        raise LedgerUnavailable("Another write-back holds the lock.")

    @asynccontextmanager
    async def restore_lock(self) -> AsyncIterator[None]:
        with self.ledger.restore_lock() as taken:
            if not taken:
                raise LedgerError("Another `restored` is at work.")
            yield


def _stepped(name: str) -> Callable[..., Any]:
    before_label, after_label = f"ledger: before {name}", f"ledger: after {name}"

    # A coroutine written as a generator: it has no frame between its points and the engine.
    @types.coroutine
    def call(self: SteppedLedger, *args: Any, **kwargs: Any) -> Generator[str, None, Any]:
        engine = self.engine
        # One point for each call, before or after its effect: which of the two is chance, unless every point is tried in turn.
        scripted = engine.script is not None
        before = scripted or engine.chance() < 0.5
        if before:
            yield before_label
        self.ledger.actor = self.actor
        result = getattr(self.ledger, name)(*args, **kwargs)
        self.watch(name, args, kwargs, result)
        if scripted or not before:
            yield after_label
        return result

    call.__name__ = name
    return call


for _name in (
    "now",
    "check_environment",
    "check_source",
    "pause",
    "resume",
    "begin_restore",
    "end_restore",
    "pauses",
    "stored",
    "store",
    "spelled",
    "note_invalid",
    "set_aside",
    "return_stale_releases",
    "candidates",
    "due",
    "begin_run",
    "ask_approval",
    "record_approval",
    "record_rejection",
    "limits",
    "set_limit",
    "check_fingerprint_key",
    "unhold",
    "cancel",
    "empty_requests",
    "release",
    "terminals",
    "note",
    "finish_run",
    "read",
    "claim",
    "may_post",
    "record",
    "mark_seen",
    "in_doubt",
    "not_sent",
    "followed",
    "known",
    "replaced",
    "sent_between",
    "all_terminals",
    "case",
    "resolve",
    "reissue",
    "due_write_backs",
    "mark_written_back",
    "write_again",
):
    setattr(SteppedLedger, _name, _stepped(_name))
