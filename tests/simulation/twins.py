"""The real ledger behind the calls of the one in memory, and both side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Any, TypeVar

from sqlalchemy import URL

from include.refunds.audit import verify_audit
from include.refunds.ledger import Ledger, LedgerEngine
from include.refunds.ledger.connection import Connection
from include.refunds.ledger.database import Part
from include.refunds.settings import Settings
from tests.simulation.engine import Engine, Violation, at_once
from tests.simulation.ledger import Attempt, MemoryLedger, Row
from tests.support.clock import clock

_TABLES = (
    "foreign_refunds",
    "terminals",
    "refund_attempts",
    "event_seals",
    "refund_events",
    "refund_runs",
    "invalid_rows",
    "write_back_notes",
    "pauses",
    "refund_limits",
    "bindings",
    "write_back_turn",
    "first_releases",
    "refund_states",
    "frozen_requests",
    "refund_instructions",
)

# What the two are compared by after each call. The events and the runs' reports are the database's own.
_COMPARED = tuple(
    name for name in Row.__slots__ if name not in ("released_by", "request", "as_refund", "key")
)
_RUN_COLUMNS = (
    "candidates_hash",
    "asked_hash",
    "question",
    "approved_hash",
    "approved_by",
    "rejected_by",
    "candidates_at",
    "released",
)
_READS = frozenset(
    {
        "now",
        "reasons",
        "current",
        "stored",
        "spelled",
        "candidates",
        "due",
        "terminals",
        "read",
        "in_doubt",
        "not_sent",
        "followed",
        "due_write_backs",
        "known",
        "replaced",
        "sent_between",
        "all_terminals",
        "terminal_lists",
        "foreign_keys",
        "case",
    }
)


T = TypeVar("T")
Call = tuple[tuple[Any, ...], dict[str, Any]]


class ClockedEngine(LedgerEngine):
    """
    The ledger's database, whose time is the simulation's.

    :param clock: the simulation's clock.
    """

    def __init__(self, url: URL, clock: Callable[[], datetime]) -> None:
        super().__init__(url)
        self._clock = clock

    @asynccontextmanager
    async def connect(self, purpose: str = "") -> AsyncIterator[Connection]:
        async with super().connect(purpose) as connection:
            await connection.execute(f"SET tests.now = '{self._clock().isoformat()}'")
            yield connection


class PostgresLedger:
    """
    The real ledger, each call run to its end.

    :param url: of a migrated ledger, which is emptied.
    """

    def __init__(self, url: URL, settings: Settings, clock: Callable[[], datetime]) -> None:
        self._loop = asyncio.new_event_loop()
        self.engine = ClockedEngine(url, clock)
        self.real = Ledger(self.engine, settings, actor="simulation")
        self._run(self._empty())

    def __getattr__(self, name: str) -> Any:
        method = self._method(name)
        return lambda *args, **kwargs: self._run(method(*args, **kwargs))

    def _method(self, name: str) -> Any:
        """Return a method of the ledger or of one of its parts."""
        parts = (part for part in vars(self.real).values() if isinstance(part, Part))
        return getattr(next((part for part in parts if hasattr(part, name)), self.real), name)

    def together(self, name: str, calls: Sequence[Call]) -> list[Any]:
        """Make calls at the same time, which then share transactions; return what each returns or raises."""

        async def work() -> list[Any]:
            method = self._method(name)
            return await asyncio.gather(
                *(method(*args, **kwargs) for args, kwargs in calls), return_exceptions=True
            )

        return self._run(work())

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Have every call rehearsed."""
        real = self.real
        with self._within(real.rehearsal()) as self.real:
            yield
        self.real = real

    @contextmanager
    def write_back_turn(self) -> Iterator[None]:
        """Have the turn of the write-back."""
        with self._within(self.real.write_backs.write_back_turn()):
            yield

    @contextmanager
    def _within(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        yield self._run(manager.__aenter__())
        self._run(manager.__aexit__(None, None, None))

    def close(self) -> None:
        """Close its connections."""
        self._run(self.engine.dispose())
        self._loop.close()

    def dump(self) -> list[dict[str, Any]]:
        """Return all refunds."""
        query = f"""
            SELECT {", ".join(_COMPARED)} FROM refund_ledger.refunds
            JOIN (SELECT id, source_ref_folded, requested_by_folded, approved_by_folded, request_sha256
                  FROM refund_ledger.refund_instructions) AS i USING (id)
            JOIN (SELECT refund_id AS id, sent_with FROM refund_ledger.refund_states) AS s USING (id)
            ORDER BY id"""
        return self._run(self._rows(query))

    def dump_attempts(self) -> list[dict[str, Any]]:
        """Return all attempts."""
        query = f"SELECT {', '.join(Attempt.__slots__)} FROM refund_ledger.refund_attempts ORDER BY refund_id, attempt"
        return self._run(self._rows(query))

    def dump_runs(self) -> dict[str, dict[str, Any]]:
        """Return what decisions are made from of ``refund_runs``, by run."""
        rows = self._run(
            self._rows(f"SELECT run_id, {', '.join(_RUN_COLUMNS)} FROM refund_ledger.refund_runs")
        )
        return {row.pop("run_id"): row for row in rows}

    def backup(self) -> dict[str, Any]:
        """Return a copy of everything but the seals."""

        async def work() -> dict[str, Any]:
            return {
                name: await self._rows(f"SELECT to_jsonb(t)::text AS row FROM refund_ledger.{name} AS t")
                for name in _TABLES
                if name != "event_seals"
            }

        return self._run(work())

    def audit(self) -> list[str]:
        """Return what the ledger holds and its events do not say."""
        findings: list[str] = self._run(verify_audit(self.engine)).findings
        return findings

    def restore(self, backup: dict[str, Any], **next_ids: int) -> None:
        """
        Go back to a backup.

        :param next_ids: by table, the number that its next row gets.
        """

        async def work() -> None:
            async with self.engine.begin() as connection:
                await _truncate(connection)
                for name, rows in backup.items():
                    insert = (
                        f"INSERT INTO refund_ledger.{name} OVERRIDING SYSTEM VALUE "
                        f"SELECT * FROM jsonb_populate_record(NULL::refund_ledger.{name}, CAST(:row AS jsonb))"
                    )
                    for row in rows:
                        await connection.execute(insert, {"row": row["row"]})
                for name, number in next_ids.items():
                    await connection.execute(
                        f"ALTER TABLE refund_ledger.{name} ALTER COLUMN id RESTART WITH {number}"
                    )
                await connection.execute(
                    "SELECT setval('refund_ledger.event_numbers', max(id)) FROM refund_ledger.refund_events"
                )

        self._run(work())

    async def _empty(self) -> None:
        async with self.engine.begin() as connection:
            await _truncate(connection)
            for table in ("refund_limits", "write_back_turn"):
                await connection.execute(f"INSERT INTO refund_ledger.{table} DEFAULT VALUES")
            await connection.execute(clock("SELECT current_setting('tests.now')::timestamptz"))

    async def _rows(self, query: str) -> list[dict[str, Any]]:
        # The transaction of a rehearsal, while there is one.
        async with self.real._database.statement() as connection:
            return [dict(row) for row in await connection.execute(query)]

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)


class Twins:
    """
    Both ledgers, which have to return the same and hold the same after every call.

    :param postgres: the real one.
    :raises Violation: where they differ.
    """

    def __init__(self, postgres: PostgresLedger, settings: Settings, engine: Engine) -> None:
        self.memory = MemoryLedger(settings, engine.ledger_time)
        self.postgres = postgres
        self.calls = 0
        # Names of what was called.
        self.called: set[str] = set()

    @property
    def actor(self) -> str:
        """Who works with both."""
        return self.memory.actor

    @actor.setter
    def actor(self, actor: str) -> None:
        self.memory.actor = self.postgres.real._database.actor = actor

    @asynccontextmanager
    async def rehearsal(self) -> AsyncIterator[Twins]:
        """Rehearse on both."""
        self.called.add("rehearsal")
        async with self.memory.rehearsal():
            with self.postgres.rehearsal():
                yield self
        self._compare_rows("rehearsal")

    @asynccontextmanager
    async def write_back_turn(self) -> AsyncIterator[None]:
        """Have the turn of the write-back on both."""
        self.called.add("write_back_turn")
        async with self.memory.write_back_turn():
            with self.postgres.write_back_turn():
                yield

    def backup(self) -> tuple[Any, Any]:
        """Return a copy of both."""
        return self.memory.backup(), self.postgres.backup()

    def restore(self, backup: Any) -> None:
        """Go back to a backup of both."""
        self.memory.restore(backup[0])
        self.postgres.restore(
            backup[1], refund_instructions=self.memory.next_id, pauses=self.memory.next_pause
        )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.called.add(name)
            theirs = _result_of(getattr(self.postgres, name), args, kwargs)
            ours = _result_of(self._in_memory(name), args, kwargs)
            self._compare(name, ours, theirs)
            if isinstance(ours, Exception):
                raise ours
            return ours

        return call

    def together(self, name: str, calls: Sequence[Call]) -> list[Any]:
        """Make calls at the same time on the real one, and one after the other on the one in memory."""
        self.calls += len(calls)
        results = self.postgres.together(name, calls)
        for (args, kwargs), theirs in zip(calls, results, strict=True):
            ours = _result_of(self._in_memory(name), args, kwargs)
            self._compare_results(name, ours, theirs)
        self._compare_rows(name)
        return results

    def _in_memory(self, name: str) -> Callable[..., Any]:
        method = getattr(self.memory, name)
        return lambda *args, **kwargs: at_once(method(*args, **kwargs))

    def _compare(self, name: str, ours: Any, theirs: Any) -> None:
        self._compare_results(name, ours, theirs)
        if name not in _READS:
            self._compare_rows(name)

    def _compare_results(self, name: str, ours: Any, theirs: Any) -> None:
        if isinstance(ours, Exception) or isinstance(theirs, Exception):
            if type(ours) is not type(theirs):
                raise Violation(f"{name}: the memory says {ours!r}, Postgres says {theirs!r}.")
        elif name == "stored":
            ours = (
                {ref: {key: row[key] for key in theirs[ref]} for ref, row in ours.items()}
                if set(ours) == set(theirs)
                else ours
            )
            theirs = {ref: dict(row) for ref, row in theirs.items()}
            _same(name, ours, theirs)
        else:
            _same(name, ours, theirs)

    def _compare_rows(self, name: str) -> None:
        rows = [
            {column: getattr(row, column) for column in _COMPARED}
            for _, row in sorted(self.memory.rows.items())
        ]
        _same(f"{name}, then the rows", rows, self.postgres.dump())
        attempts = [
            {column: getattr(item, column) for column in Attempt.__slots__}
            for _, items in sorted(self.memory.attempts.items())
            for item in items
        ]
        _same(f"{name}, then the attempts", attempts, self.postgres.dump_attempts())
        runs = {
            run_id: {column: getattr(run, column) for column in _RUN_COLUMNS}
            for run_id, run in self.memory.run_rows.items()
        }
        _same(f"{name}, then the runs", runs, self.postgres.dump_runs())


def _same(what: str, ours: Any, theirs: Any) -> None:
    ours, theirs = _plain(ours), _plain(theirs)
    if ours != theirs:
        raise Violation(f"After {what} the memory has {ours}, Postgres has {theirs}.")


def _plain(value: Any) -> Any:
    """Return a value without what only one of the two ledgers has: the body, which Postgres holds as bytes of its own."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "request"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value


def _result_of(method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        return method(*args, **kwargs)
    except Violation:
        raise
    except Exception as error:  # noqa: BLE001 - compared, then raised
        return error


async def _truncate(connection: Connection) -> None:
    # The ledger's own triggers refuse to empty it.
    await connection.execute("SET LOCAL session_replication_role = replica")
    await connection.execute(
        f"TRUNCATE {', '.join(f'refund_ledger.{name}' for name in _TABLES)} RESTART IDENTITY CASCADE"
    )
