"""A merchant's world for the tests of the ledger: a real source, a real ledger, and the local Payroc behind the real hook."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from sqlalchemy import URL, create_engine, text

from include.refunds.cipher import Cipher
from include.refunds.follow_up import follow_up
from include.refunds.gateway import Gateway
from include.refunds.ledger import Ledger, LedgerEngine, Selection, Task
from include.refunds.pull import Pulled, pull
from include.refunds.release import release
from include.refunds.send import Result, send_refunds
from include.refunds.settings import get_settings
from include.refunds.source import COLUMNS, SqlSource
from include.refunds.write_back import write_back
from payroc_airflow.gateway import HookGateway
from payroc_airflow.hooks.payroc import PayrocHook
from tests.conftest import Sandbox
from tests.support.clock import ahead
from tests.support.refunds import LISTS, REFUNDS, TABLES, TRAIL

T = TypeVar("T")
_numbers = itertools.count(1)
_terminals = itertools.count(1)

# What a source row says of a refund that has nothing special about it.
PLAIN: dict[str, Any] = {
    "processing_terminal_id": "7701001",
    "amount": 4999,
    "currency": "USD",
    "name_on_account": "Sarah Hopper",
    "account_type": "checking",
    "sec_code": "ppd",
    "routing_number": "053200983",
}


class World:
    """
    One merchant with a source, a ledger and a connection to the local Payroc.
    """

    def __init__(self, ledger_url: URL, source_url: URL, sandbox: Sandbox) -> None:
        self.settings = get_settings()
        # Payroc remembers what other tests paid, and the ledger reads its list.
        self.terminal = f"75{next(_terminals):05}"
        self.cipher = Cipher(self.settings)
        self.sandbox = sandbox
        self._hours_ahead = 0.0
        self.ledger_engine = create_engine(ledger_url)
        self.source_engine = create_engine(source_url)
        self.ledger = Ledger(
            LedgerEngine(ledger_url, pool_size=0),
            self.settings,
            actor="test",
        )
        self.source = SqlSource(self.source_engine)
        self._hook_gateway = HookGateway(PayrocHook())
        self.gateway: Gateway = self._hook_gateway

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(work)

    @property
    def hours_ahead(self) -> float:
        """How far the ledger's clock runs ahead of the real one; tests move it."""
        return self._hours_ahead

    @hours_ahead.setter
    def hours_ahead(self, hours: float) -> None:
        self._hours_ahead = hours
        with self.ledger_engine.begin() as connection:
            connection.exec_driver_sql(ahead(hours))

    def close(self) -> None:
        # Its share of what may be under way from this host is another test's now.
        self.run(self._hook_gateway.close())
        self.ledger_engine.dispose()
        self.source_engine.dispose()

    # -- what people do ------------------------------------------------------------------------------------------

    def approve(self, ending: str = "4321", **columns: Any) -> str:
        """Put an approved refund into the source and return its source_ref; the ending of its account triggers the sandbox."""
        number = next(_numbers)
        row = dict.fromkeys(COLUMNS) | {
            "source_ref": f"ref-{number}",
            **PLAIN,
            "processing_terminal_id": self.terminal,
            "order_id": f"T{number}-{id(self) % 100_000}",
            "account_number": f"55667{number:06d}{ending}",
            "requested_by": "ann@example.com",
            "approved_by": "bob@example.com",
            "approved_at": datetime.now(UTC) - timedelta(hours=2) + timedelta(seconds=number),
        }
        row |= columns
        values = ", ".join(f":{name}" for name in COLUMNS)
        with self.source_engine.begin() as connection:
            connection.execute(
                text(f"INSERT INTO refund_requests ({', '.join(COLUMNS)}) VALUES ({values})"), row
            )
        return str(row["source_ref"])

    def change_source(self, source_ref: str, assignment: str) -> None:
        with self.source_engine.begin() as connection:
            connection.execute(
                text(f"UPDATE refund_requests SET {assignment} WHERE source_ref = :ref"), {"ref": source_ref}
            )

    def limit(self, **limits: int | None) -> None:
        """Set limits, in the order given."""
        for name, value in limits.items():
            self.run(self.ledger.limits.set_limit(name, value, "A test sets it."))

    def fault(self, refund_id: int | None, kind: str, operation: str = "create", **more: Any) -> None:
        """Queue a failure at the local Payroc, for this refund's order or for the next request of all."""
        about = {"orderId": self.row(refund_id)["order_id"]} if refund_id is not None else {}
        self.sandbox.post("/_sandbox/faults", {"operation": operation, "kind": kind, **about, **more})

    # -- what a run does -----------------------------------------------------------------------------------------

    def pull(self) -> Pulled:
        return self.run(pull(self.source, self.ledger, self.cipher, self.settings))

    def release(self, run_id: str = "run-1", selection: Selection | None = None) -> list[int]:
        async def work() -> list[int]:
            candidates = await self.ledger.runs.candidates(selection or Selection())
            await self.ledger.runs.begin_run(run_id, {}, candidates, {}, datetime.now(UTC))
            await self.ledger.approvals.ask_approval(run_id)
            return await self.release_only(run_id, [item.id for item in candidates])

        return self.run(work())

    async def release_only(self, run_id: str, candidate_ids: list[int]) -> list[int]:
        return await release(
            run_id,
            candidate_ids,
            [],
            source=self.source,
            ledger=self.ledger,
            gateway=self.gateway,
            cipher=self.cipher,
            settings=self.settings,
        )

    def send(self, refund_id: int, gateway: Gateway | None = None) -> Result:
        return self.run(self.sending(refund_id, gateway))

    async def sending(self, refund_id: int, gateway: Gateway | None = None) -> Result:
        (result,) = await send_refunds(
            [refund_id],
            Task("run-1", 0, 1),
            ledger=self.ledger,
            gateway=gateway or self.gateway,
            cipher=self.cipher,
            settings=self.settings,
        )
        return result

    def released(self, ending: str = "4321", **columns: Any) -> int:
        """Approve, pull and release one refund, and return its id."""
        source_ref = self.approve(ending, **columns)
        self.pull()
        self.release(selection=Selection(source_refs=(source_ref,)))
        return int(self.row(source_ref)["id"])

    def follow_up(self) -> dict[str, int]:
        return dict(self.run(follow_up(self.ledger, self.gateway, self.settings)).counts)

    def write_back(self) -> tuple[int, list[str]]:
        """Write back, and return how many rows were written, and the source_refs of those that were not."""
        done = self.run(write_back(self.source, self.ledger.write_backs))
        done.raise_trouble()
        return done.written, sorted(done.not_written)

    # -- what can be seen ----------------------------------------------------------------------------------------

    def rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        with self.ledger_engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def row(self, which: str | int) -> dict[str, Any]:
        """Return a refund's row, by source_ref or id."""
        column = "id" if isinstance(which, int) else "source_ref"
        return self.rows(f"SELECT * FROM {REFUNDS} WHERE {column} = :which", which=which)[0]

    def source_row(self, source_ref: str) -> dict[str, Any]:
        with self.source_engine.connect() as connection:
            query = text("SELECT * FROM refund_requests WHERE source_ref = :ref")
            return dict(connection.execute(query, {"ref": source_ref}).mappings().one())

    def attempts(self, refund_id: int) -> list[str | None]:
        rows = self.rows(
            "SELECT outcome FROM refund_ledger.refund_attempts WHERE refund_id = :id ORDER BY attempt",
            id=refund_id,
        )
        return [row["outcome"] for row in rows]

    def paused(self) -> dict[str, str]:
        return self.run(self.ledger.pauses.reasons())

    def lose_the_ledger(self) -> None:
        """What the ledger knew is gone, as after its loss."""
        tables = ", ".join(f"refund_ledger.{name}" for name in (*TABLES, *LISTS, *TRAIL))
        with self.ledger_engine.begin() as connection:
            connection.exec_driver_sql("SET session_replication_role = replica")
            connection.exec_driver_sql(f"TRUNCATE {tables} RESTART IDENTITY")

    def posts(self, refund_id: int) -> int:
        """Return how many times Payroc was asked to create this refund."""
        order_id = self.row(refund_id)["order_id"]
        return int(self.sandbox.get(f"/_sandbox/requests?operation=create&orderId={order_id}")["count"])

    def paid(self, refund_id: int) -> int:
        """Return how many refunds Payroc holds for this order."""
        order_id = self.row(refund_id)["order_id"]
        return int(self.sandbox.get("/_sandbox/refunds")["refundsPerOrder"].get(order_id, 0))


@pytest.fixture
def world(
    ledger_url: URL, source_url: URL, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    connection = {
        "conn_type": "payroc",
        "password": "sandbox-key",
        "host": sandbox.api_url,
        "extra": {"identity_url": sandbox.url},
    }
    monkeypatch.setenv("AIRFLOW_CONN_PAYROC_DEFAULT", json.dumps(connection))
    monkeypatch.setenv("PAYROC_REFUNDS_HTTP_TIMEOUT_SECONDS", "60")
    get_settings.cache_clear()
    world = World(ledger_url, source_url, sandbox)
    yield world
    world.close()


class Intercepted:
    """
    The gateway with something in the way of the POST.

    :param before: called before the POST leaves.
    :param after: called when Payroc has answered, before the answer is handed on.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        before: Callable[[], Any] | None = None,
        after: Callable[[], Any] | None = None,
    ) -> None:
        self._gateway = gateway
        self._before = before
        self._after = after
        self.environment = gateway.environment
        self.sent_with = gateway.sent_with

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gateway, name)

    async def create_refund(self, token: Any, idempotency_key: str, body: bytes) -> Any:
        if self._before is not None:
            await _maybe_await(self._before())
        answer = await self._gateway.create_refund(token, idempotency_key, body)
        if self._after is not None:
            await _maybe_await(self._after())
        return answer


async def _maybe_await(value: Any) -> None:
    if asyncio.iscoroutine(value):
        await value


class Death(BaseException):
    """The worker dies here."""


def die() -> None:
    raise Death
