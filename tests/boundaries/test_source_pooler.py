"""
A source behind a transaction pooler: a transaction may run in any session, and a session may be anybody's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import URL, Engine, create_engine, text
from sqlalchemy.pool import NullPool

from include.refunds.ledger import WriteBack
from include.refunds.source_update import Updated
from payroc_airflow.databases import source_of


@pytest.fixture
def engine(pooled_source: URL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The pooled source, which is the Airflow connection refunds_source as well, with 30 rows."""
    fields = {
        "conn_type": "postgres",
        "host": pooled_source.host,
        "port": pooled_source.port,
        "login": pooled_source.username,
        "password": pooled_source.password,
        "schema": pooled_source.database,
    }
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_SOURCE", json.dumps(fields))
    engine = create_engine(pooled_source, poolclass=NullPool, connect_args={"prepare_threshold": None})
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO refund_requests (source_ref, processing_terminal_id, amount, "
                "currency, requested_by, "
                "approved_by, approved_at) SELECT 'RF-' || n, '7701001', 4999, 'USD', 'ann', 'bob', now() "
                "FROM generate_series(1, 30) AS n"
            )
        )
    yield engine
    engine.dispose()


def line(number: int, status: str) -> WriteBack:
    return WriteBack(
        source_ref=f"RF-{number}",
        status=status,
        payroc_refund_id=None,
        payroc_status=None,
        reason=None,
        updated_at=datetime(2026, 11, 2, 14, 30, tzinfo=UTC),
    )


def test_pulls_and_write_backs_take_any_number_of_turns(engine: Engine) -> None:
    source = source_of()
    for status in ("approved", "accepted", "settled"):
        assert len(asyncio.run(source.select_approved())) == (30 if status != "settled" else 0)
        updated = asyncio.run(source.write_back([line(number, status) for number in range(1, 32)]))
        assert [item.source_ref for item in updated.not_written] == ["RF-31"]


def test_write_backs_side_by_side_share_a_session(engine: Engine) -> None:
    async def four() -> list[Updated]:
        lines = [
            [line(number, "accepted") for number in range(1 + 7 * part, 8 + 7 * part)] for part in range(4)
        ]
        return await asyncio.gather(*(source_of().write_back(each) for each in lines for _ in range(2)))

    assert [len(updated.written) for updated in asyncio.run(four())] == [7] * 8


def test_a_session_is_left_as_it_was_found(engine: Engine) -> None:
    asyncio.run(source_of().select_approved())
    with engine.connect() as connection:
        shown = [
            connection.exec_driver_sql(f"SHOW {name}").scalar_one()
            for name in ("lock_timeout", "statement_timeout", "bytea_output")
        ]
        prepared = connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").scalar_one()
    assert (shown, prepared) == (["0", "0", "hex"], 0)
