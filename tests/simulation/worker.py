"""The ledger as a worker sees it: every call is a point at which the worker may die, stand still, or lose the database."""

from __future__ import annotations

import itertools
import types
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, suppress
from typing import Any

from include.refunds.ledger import LedgerError, LedgerUnavailable
from tests.simulation.engine import Engine

_LOOK_AGAIN_SECONDS = 15.0
_WAIT_SECONDS = 60.0

_write_backs = itertools.count(1)


class SteppedLedger:
    """
    A ledger whose calls take time. It is each of its own parts.

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
    async def write_back_turn(self) -> AsyncIterator[str]:
        holder = f"write-back {next(_write_backs)}"
        give_up = self.engine.time + _WAIT_SECONDS
        while not await self.take_turn(holder):
            if self.engine.time >= give_up:
                raise LedgerUnavailable("Another write-back has the turn.")
            await self.engine.sleep(_LOOK_AGAIN_SECONDS)
        assert self.engine.current is not None
        self.engine.current.write_back = holder
        try:
            yield holder
        except GeneratorExit:
            # The process was killed: its turn ends by itself.
            raise
        except BaseException:
            await self._end_turn(holder)
            raise
        else:
            await self._end_turn(holder)

    async def _end_turn(self, holder: str) -> None:
        with suppress(LedgerError):
            await self.end_turn(holder)


def _itself(ledger: SteppedLedger) -> SteppedLedger:
    return ledger


for _part in (
    "approvals",
    "bindings",
    "claims",
    "decisions",
    "gate",
    "intake",
    "limits",
    "lists",
    "pauses",
    "records",
    "refunds",
    "requests",
    "runs",
    "write_backs",
):
    setattr(SteppedLedger, _part, property(_itself))


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
        result = yield from getattr(self.ledger, name)(*args, **kwargs)
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
    "reasons",
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
    "current",
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
    "terminal_lists",
    "note_terminals",
    "list_read",
    "list_failed",
    "keep_foreign",
    "foreign_keys",
    "case",
    "resolve",
    "reissue",
    "take_turn",
    "end_turn",
    "due_write_backs",
    "mark_written_back",
    "write_again",
):
    setattr(SteppedLedger, _name, _stepped(_name))
