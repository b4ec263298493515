"""A source in MySQL, here Debian's MariaDB, through the Airflow connection ``refunds_source``."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from sqlalchemy import URL, create_engine, text

from include.refunds.ledger import WriteBack
from include.refunds.source import COLUMNS
from payroc_airflow.databases import source_of
from tests.support.mariadb import AirflowMySql

TABLE = """
CREATE TABLE refund_requests (
    source_ref             varchar(64) PRIMARY KEY,
    processing_terminal_id varchar(32) NOT NULL,
    order_id               varchar(64),
    description            text,
    amount                 bigint NOT NULL,
    currency               char(3) NOT NULL,
    name_on_account        varchar(255),
    account_type           varchar(16),
    sec_code               varchar(8),
    routing_number         varchar(16),
    account_number         varchar(32),
    secure_token           varchar(64),
    email                  varchar(255),
    requested_by           varchar(255) NOT NULL,
    approved_by            varchar(255),
    approved_at            datetime(6),
    withdrawn_at           datetime(6),
    status                 varchar(16),
    payroc_refund_id       varchar(32),
    payroc_status          varchar(16),
    reason                 varchar(255),
    updated_at             datetime(6)
)"""


@pytest.fixture
def table(mysql_url: URL, mysql_source: AirflowMySql) -> URL:
    with create_engine(mysql_url).begin() as connection:
        connection.execute(text(TABLE))
    return mysql_url


def test_approved_refunds_are_read(table: URL) -> None:
    with create_engine(table).begin() as connection:
        connection.execute(
            text(
                "INSERT INTO refund_requests (source_ref, processing_terminal_id, amount, currency, name_on_account, "
                "requested_by, approved_by, approved_at) VALUES "
                "('RF-1', '7701001', 4999, 'USD', 'José 😀', 'ann', 'bob', '2026-11-02 09:30:00')"
            )
        )
    (row,) = asyncio.run(source_of().select_approved())
    assert set(row) == set(COLUMNS)
    assert (row["amount"], row["name_on_account"]) == (4999, "José 😀")


def test_outcomes_are_written_back_and_a_missing_row_is_named(table: URL) -> None:
    with create_engine(table).begin() as connection:
        connection.execute(
            text(
                "INSERT INTO refund_requests (source_ref, processing_terminal_id, amount, currency, requested_by) "
                "VALUES ('RF-1', '7701001', 4999, 'USD', 'ann')"
            )
        )
    at = datetime(2026, 11, 2, 14, 30, tzinfo=UTC)
    rows = [
        WriteBack(
            source_ref=ref,
            status="accepted",
            payroc_refund_id="JD80BRUT1T",
            payroc_status="ready",
            reason=None,
            updated_at=at,
        )
        for ref in ("RF-1", "RF-2")
    ]
    assert asyncio.run(source_of().write_back(rows)) == ["RF-2"]
    with create_engine(table).connect() as connection:
        written = connection.execute(text("SELECT status, updated_at FROM refund_requests")).one()
    assert written == ("accepted", at.replace(tzinfo=None))
