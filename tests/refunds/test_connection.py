"""Connections to the ledger's database."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import asyncpg
import pytest
from sqlalchemy import URL

from include.refunds.ledger.connection import LedgerEngine, as_array

T = TypeVar("T")

_PID = "SELECT pg_backend_pid()"


def with_engine(url: URL, work: Any, **options: Any) -> Any:
    async def run() -> Any:
        engine = LedgerEngine(url, **options)
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    return asyncio.run(run())


async def pid(engine: LedgerEngine, purpose: str = "") -> int:
    async with engine.connect(purpose) as connection:
        return int((await connection.execute(_PID)).scalar_one())


async def all_of(*work: Coroutine[Any, Any, T]) -> list[T]:
    return list(await asyncio.gather(*work))


def test_a_value_is_given_by_its_name_as_often_as_it_stands_there_and_a_cast_is_none(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> Any:
        async with engine.connect() as connection:
            statement = (
                "SELECT :first::text || :sha256 || :first AS joined, ':' AS colon, CAST(:json AS jsonb) AS json, :at::timestamptz AS at"
            )
            values = {"first": "a", "sha256": "b", "json": '{"c": [1]}', "at": datetime(2026, 1, 2, tzinfo=UTC), "unused": 1}
            return (await connection.execute(statement, values)).one()

    row = with_engine(ledger_url, work)
    assert (row.joined, row.colon, row.json, row.at) == ("aba", ":", {"c": [1]}, datetime(2026, 1, 2, tzinfo=UTC))
    with pytest.raises(AttributeError, match="missing"):
        _ = row.missing


def test_numbers_go_in_as_the_text_of_an_array(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> Any:
        async with engine.connect() as connection:
            return (await connection.execute("SELECT unnest(CAST(CAST(:ids AS text) AS bigint[]))", {"ids": as_array([3, 1])})).scalars()

    assert with_engine(ledger_url, work) == [3, 1]


def test_a_connection_is_kept_for_the_next_and_there_are_never_more_than_so_many(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> tuple[int, int]:
        one_after_the_other = {await pid(engine) for _ in range(3)}
        at_once = set(await all_of(*(pid(engine) for _ in range(12))))
        return len(one_after_the_other), len(at_once)

    assert with_engine(ledger_url, work, pool_size=2) == (1, 2)


def test_who_comes_again_for_the_same_gets_the_same_connection_and_who_comes_anew_any_that_is_free(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> tuple[int, ...]:
        async with engine.connect("claim") as claims, engine.connect("record") as records:
            of_claims, of_records = [(await each.execute(_PID)).scalar_one() for each in (claims, records)]
        again = [await pid(engine, purpose) for purpose in ("record", "claim", "record")]
        assert again == [of_records, of_claims, of_records]
        return of_claims, of_records, await pid(engine, "last check")

    of_claims, of_records, of_another = with_engine(ledger_url, work)
    assert of_claims != of_records
    assert of_another in (of_claims, of_records)


def test_without_a_pool_no_connection_is_used_twice(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> int:
        return len({await pid(engine) for _ in range(3)})

    assert with_engine(ledger_url, work, pool_size=0) == 3


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
def test_a_connection_that_an_error_has_passed_through_is_not_used_again(ledger_url: URL, error: type[BaseException]) -> None:
    async def work(engine: LedgerEngine) -> tuple[int, int]:
        with suppress(error):
            async with engine.begin() as connection:
                first = (await connection.execute(_PID)).scalar_one()
                raise error
        return first, await pid(engine)

    first, second = with_engine(ledger_url, work)
    assert first != second


def test_a_connection_that_the_server_has_ended_is_not_handed_out(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> tuple[int, int]:
        first = await pid(engine)
        other = LedgerEngine(engine.url, pool_size=0)
        async with other.connect() as connection:
            await connection.execute("SELECT pg_terminate_backend(:pid, 5000)", {"pid": first})
        await asyncio.sleep(0.1)
        return first, await pid(engine)

    first, second = with_engine(ledger_url, work)
    assert first != second


def test_what_an_error_leaves_is_rolled_back_and_a_savepoint_alone_by_itself(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> list[int]:
        async with engine.begin() as connection:
            await connection.execute("CREATE TEMPORARY TABLE kept (number integer)")
            await connection.execute("INSERT INTO kept VALUES (1)")
            with suppress(asyncpg.DivisionByZeroError):
                async with connection.transaction():
                    await connection.execute("INSERT INTO kept VALUES (2)")
                    await connection.execute("SELECT 1 / 0")
            async with connection.rolled_back():
                assert await connection.change("INSERT INTO kept VALUES (3), (4)") == 2
            return (await connection.execute("SELECT number FROM kept")).scalars()

    assert with_engine(ledger_url, work) == [1]


def test_the_parameters_of_the_url_reach_the_server(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> Any:
        async with engine.connect() as connection:
            names = "current_setting('application_name'), current_setting('work_mem')"
            return tuple((await connection.execute(f"SELECT {names}")).one())

    query = {"application_name": "refunds", "options": "-c work_mem=7MB", "connect_timeout": "3", "sslmode": "prefer"}
    assert with_engine(ledger_url.update_query_dict(query), work) == ("refunds", "7MB")


def test_a_server_that_accepts_and_says_nothing_is_an_error_after_the_timeout(ledger_url: URL) -> None:
    async def run() -> None:
        async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(5)
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = ledger_url.set(port=server.sockets[0].getsockname()[1]).update_query_dict({"connect_timeout": "1"})
        with pytest.raises(TimeoutError):
            await pid(LedgerEngine(url))
        server.close()

    asyncio.run(run())
