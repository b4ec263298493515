"""Connections to the ledger's database."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import asyncpg
import pytest
from sqlalchemy import URL

from include.refunds.ledger.connection import LedgerEngine, as_array
from tests.patience import PATIENCE_SECONDS

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
            statement = """
                SELECT :first::text || :sha256 || :first AS joined, ':' AS colon, CAST(:json AS jsonb) AS json,
                       :at::timestamptz AS at"""
            values = {
                "first": "a",
                "sha256": "b",
                "json": '{"c": [1]}',
                "at": datetime(2026, 1, 2, tzinfo=UTC),
                "unused": 1,
            }
            return (await connection.execute(statement, values)).one()

    row = with_engine(ledger_url, work)
    assert (row.joined, row.colon, row.json, row.at) == (
        "aba",
        ":",
        {"c": [1]},
        datetime(2026, 1, 2, tzinfo=UTC),
    )
    with pytest.raises(AttributeError, match="missing"):
        _ = row.missing


def test_numbers_go_in_as_the_text_of_an_array(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> Any:
        async with engine.connect() as connection:
            return (
                await connection.execute(
                    "SELECT unnest(CAST(CAST(:ids AS text) AS bigint[]))", {"ids": as_array([3, 1])}
                )
            ).scalars()

    assert with_engine(ledger_url, work) == [3, 1]


def test_a_connection_is_kept_for_the_next_and_there_are_never_more_than_so_many(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> tuple[int, int]:
        one_after_the_other = {await pid(engine) for _ in range(3)}
        at_once = set(await all_of(*(pid(engine) for _ in range(12))))
        return len(one_after_the_other), len(at_once)

    assert with_engine(ledger_url, work, pool_size=2) == (1, 2)


def test_who_comes_again_for_the_same_gets_the_same_connection_and_who_comes_anew_any_that_is_free(
    ledger_url: URL,
) -> None:
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
def test_a_connection_that_an_error_has_passed_through_is_not_used_again(
    ledger_url: URL, error: type[BaseException]
) -> None:
    async def work(engine: LedgerEngine) -> tuple[int, int]:
        with suppress(error):
            async with engine.begin() as connection:
                first = (await connection.execute(_PID)).scalar_one()
                raise error
        return first, await pid(engine)

    # With one place: it is given back as well.
    first, second = with_engine(ledger_url, work, pool_size=1)
    assert first != second


def test_who_is_cancelled_in_the_middle_of_a_statement_leaves_its_place_and_no_connection(
    ledger_url: URL,
) -> None:
    async def work(engine: LedgerEngine) -> tuple[int, int]:
        first = await pid(engine)

        async def wait() -> None:
            async with engine.begin() as connection:
                await connection.execute("SELECT pg_sleep(60)")

        waiting = asyncio.create_task(wait())
        async with LedgerEngine(engine.url, pool_size=0).connect() as other:
            query = "SELECT count(*) FROM pg_stat_activity WHERE pid = :pid AND wait_event = 'PgSleep'"
            while not (await other.execute(query, {"pid": first})).scalar_one():
                await asyncio.sleep(0.01)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        return first, await pid(engine)

    first, second = with_engine(ledger_url, work, pool_size=1)
    assert first != second


def test_who_can_not_connect_leaves_its_place(ledger_url: URL) -> None:
    async def work(engine: LedgerEngine) -> int:
        there, engine.url = engine.url, engine.url.set(port=1)
        with pytest.raises(ConnectionRefusedError):
            await pid(engine)
        engine.url = there
        return await pid(engine)

    assert with_engine(ledger_url, work, pool_size=1)


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

    query = {
        "application_name": "refunds",
        "options": "-c work_mem=7MB",
        "connect_timeout": "3",
        "sslmode": "prefer",
    }
    assert with_engine(ledger_url.update_query_dict(query), work) == ("refunds", "7MB")


@pytest.mark.parametrize("in_the_query", [False, True])
def test_a_socket_is_found_by_its_folder_wherever_the_url_names_it(
    ledger_url: URL, in_the_query: bool
) -> None:
    async def relayed(folder: str) -> int:
        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65_536):
                    sink.write(data)
            sink.close()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            theirs, ours = await asyncio.open_connection(ledger_url.host, ledger_url.port)
            await asyncio.gather(pump(reader, ours), pump(theirs, writer))

        server = await asyncio.start_unix_server(relay, f"{folder}/.s.PGSQL.5433")
        url = URL.create(
            "postgresql", ledger_url.username, ledger_url.password, port=5433, database=ledger_url.database
        )
        engine = LedgerEngine(
            url.update_query_dict({"host": folder}) if in_the_query else url.set(host=folder), pool_size=0
        )
        async with server:
            return await pid(engine)

    # The path of a socket may not be long.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        assert asyncio.run(relayed(folder))


def test_a_server_that_says_nothing_to_a_statement_is_not_waited_for_without_end(
    ledger_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("include.refunds.ledger.connection._STATEMENT_SECONDS", 0.5)

    async def work(engine: LedgerEngine) -> None:
        async with engine.connect() as connection:
            await connection.execute("SELECT pg_sleep(60)")

    with pytest.raises(TimeoutError):
        with_engine(ledger_url, work)


def test_a_server_that_accepts_and_says_nothing_is_an_error_after_the_timeout(ledger_url: URL) -> None:
    async def run() -> None:
        async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(PATIENCE_SECONDS)
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = ledger_url.set(port=server.sockets[0].getsockname()[1]).update_query_dict(
            {"connect_timeout": "1"}
        )
        with pytest.raises(TimeoutError):
            await pid(LedgerEngine(url))
        server.close()

    asyncio.run(run())
