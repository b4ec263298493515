"""Source rows become refunds, or are reported with what is wrong."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import create_engine, text

from include.refunds.cipher import Cipher
from include.refunds.keys import default_order_id, idempotency_key
from include.refunds.ledger import Selection
from include.refunds.pull import build, pull
from include.refunds.rows import InvalidRow
from include.refunds.settings import Settings, get_settings
from include.refunds.source import COLUMNS, SQL_FOLDER, SourceError, SqlSource
from tests.refunds.conftest import PLAIN, World

GOOD: dict[str, Any] = dict.fromkeys(COLUMNS) | {
    "source_ref": "ref-a",
    **PLAIN,
    "order_id": "ORDER-A",
    "account_number": "556677889911",
    "requested_by": "ann@example.com",
    "approved_by": "bob@example.com",
    "approved_at": "2026-11-20T09:00:00-05:00",
}
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def built(**changes: Any) -> Any:
    settings = get_settings()
    return build(GOOD | changes, Cipher(settings), settings, NOW)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("amount", 0, "not more than 0"),
        ("amount", -5, "not more than 0"),
        ("amount", None, "is missing"),
        ("amount", 49.99, "is not a whole number; give whole cents, such as 5000 for USD 50.00"),
        ("amount", "4999", "is text; give whole cents"),
        ("amount", True, "is true or false; give whole cents"),
        ("amount", Decimal("49.99"), "is 49.99; give whole cents, such as 4999 for USD 49.99"),
        ("currency", "usd", "ISO 4217"),
        ("currency", None, "is missing"),
        ("routing_number", "123456789", "ABA"),
        ("routing_number", "12345678", "9 digits"),
        ("routing_number", 53200983, "is a number; give text"),
        ("account_number", "12-34567", "digits"),
        ("routing_number", "000000000", "nine zeros"),
        ("sec_code", "xyz", "must be ppd for a consumer or ccd for a business"),
        ("sec_code", " ", "is blank"),
        ("sec_code", 7, "is a number; give text"),
        ("sec_code", "tel", "debits only"),
        ("sec_code", "TEL", "debits only"),
        ("sec_code", "web", "PAYROC_REFUNDS_ALLOW_SEC_WEB"),
        ("account_type", "loan", "'checking' or 'savings'"),
        ("name_on_account", "x" * 51, "1 to 50"),
        ("order_id", "x" * 25, "at most 24"),
        ("description", "x" * 257, "at most 256"),
        ("processing_terminal_id", "12", "at least 4"),
        ("email", "x" * 39 + "@example.com", "at most 50"),
        ("requested_by", None, "is missing"),
        ("approved_by", " ", "is blank"),
        ("approved_by", "ANN@example.com", "same person"),
        ("approved_at", None, "is missing"),
        ("approved_at", "yesterday", "is no date and time"),
        ("secure_token", "296753123456", "together with a bank account"),
    ],
)
def test_a_bad_field_is_named_with_what_is_wrong_and_without_its_value(
    column: str, value: Any, message: str
) -> None:
    with pytest.raises(InvalidRow, match=message) as caught:
        built(**{column: value})
    assert column in caught.value.errors
    if isinstance(value, str) and len(value) > 8:
        assert value not in str(caught.value)


def test_all_errors_of_a_row_are_named_at_once() -> None:
    with pytest.raises(InvalidRow) as caught:
        built(amount=None, currency="???", approved_by="ann@example.com", sec_code="tel")
    assert set(caught.value.errors) == {"amount", "currency", "approved_by", "sec_code"}


def test_neither_token_nor_account_is_an_error() -> None:
    with pytest.raises(InvalidRow, match="secure_token; give one of the two"):
        built(routing_number=None, account_number=None)


def test_a_whole_decimal_is_an_amount() -> None:
    assert built(amount=Decimal("4999"))[0].amount == 4999


def test_the_aba_check_can_be_switched_off_but_nine_zeros_are_refused_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_ABA_CHECKSUM", "false")
    settings = Settings()
    assert build(GOOD | {"routing_number": "123456789"}, Cipher(settings), settings, NOW)
    with pytest.raises(InvalidRow, match="nine zeros"):
        build(GOOD | {"routing_number": "000000000"}, Cipher(settings), settings, NOW)


ACCOUNT = {
    column: GOOD[column] for column in ("name_on_account", "account_type", "routing_number", "account_number")
}
TOKEN = dict.fromkeys(ACCOUNT) | {"account_type": "checking", "secure_token": "296753123456"}


@pytest.mark.parametrize("payee", [ACCOUNT, TOKEN])
@pytest.mark.parametrize(
    ("given", "default", "sent"),
    [
        (None, "ppd", "ppd"),
        ("", "ccd", "ccd"),
        (None, "ccd", "ccd"),
        ("ppd", "ccd", "ppd"),
        ("ccd", "ppd", "ccd"),
        ("CCD", "ppd", "ccd"),
    ],
)
def test_every_body_has_an_sec_code_the_rows_own_or_that_of_the_setting(
    payee: dict[str, Any], given: str | None, default: str, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_SEC_CODE", default)
    settings = Settings()
    _, body = build(GOOD | payee | {"sec_code": given}, Cipher(settings), settings, NOW)
    assert json.loads(body)["refundMethod"]["secCode"] == sent


@pytest.mark.parametrize("payee", [ACCOUNT, TOKEN])
@pytest.mark.parametrize("code", ["tel", "web"])
def test_a_code_that_is_no_code_of_refunds_is_refused_for_accounts_and_tokens_alike(
    payee: dict[str, Any], code: str
) -> None:
    with pytest.raises(InvalidRow) as caught:
        built(**payee, sec_code=code)
    assert list(caught.value.errors) == ["sec_code"]


@pytest.mark.parametrize("payee", [ACCOUNT, TOKEN])
def test_web_is_accepted_when_the_setting_allows_it_and_tel_is_not(
    payee: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_ALLOW_SEC_WEB", "true")
    settings = Settings()
    _, body = build(GOOD | payee | {"sec_code": "web"}, Cipher(settings), settings, NOW)
    assert json.loads(body)["refundMethod"]["secCode"] == "web"
    with pytest.raises(InvalidRow, match="debits only"):
        build(GOOD | payee | {"sec_code": "tel"}, Cipher(settings), settings, NOW)


def test_the_body_of_a_row_that_names_its_code_is_the_same_bytes_for_ever() -> None:
    assert built()[1] == (
        b'{"processingTerminalId":"7701001","order":{"orderId":"ORDER-A","description":"Refund ORDER-A","amount":4999,"currency":"USD"},'
        b'"refundMethod":{"type":"ach","secCode":"ppd","accountType":"checking","nameOnAccount":"Sarah Hopper",'
        b'"accountNumber":"556677889911","routingNumber":"053200983"},'
        b'"customFields":[{"name":"refundKey","value":"df81ed10-8bc3-4eab-92e6-59fd05c56b4f"}]}'
    )
    assert built(**TOKEN)[1] == (
        b'{"processingTerminalId":"7701001","order":{"orderId":"ORDER-A","description":"Refund ORDER-A","amount":4999,"currency":"USD"},'
        b'"refundMethod":{"type":"secureToken","token":"296753123456","accountType":"checking","secCode":"ppd"},'
        b'"customFields":[{"name":"refundKey","value":"df81ed10-8bc3-4eab-92e6-59fd05c56b4f"}]}'
    )


def test_the_key_is_derived_from_source_and_source_ref_alone() -> None:
    key = idempotency_key("refund_requests", "ref-a")
    assert built()[0].idempotency_key == str(key)
    assert built(amount=1, order_id="OTHER")[0].idempotency_key == str(key)
    assert key == UUID("df81ed10-8bc3-4eab-92e6-59fd05c56b4f")
    assert key.version == 4
    assert len({idempotency_key("a", "bc"), idempotency_key("ab", "c"), idempotency_key("ab", "d")}) == 3


def test_without_an_order_id_one_is_made_from_the_key() -> None:
    refund, body = built(order_id=None)
    assert refund.order_id == default_order_id(UUID(refund.idempotency_key))
    assert len(refund.order_id) == 22
    assert refund.description == f"Refund {refund.order_id}"
    assert refund.order_id.encode() in body


def test_our_key_travels_in_the_body() -> None:
    refund, body = built()
    assert f'"customFields":[{{"name":"refundKey","value":"{refund.idempotency_key}"}}]'.encode() in body


def test_a_bad_row_is_recorded_and_blocks_no_other(world: World) -> None:
    bad, good = world.approve(routing_number="123456789"), world.approve()
    pulled = world.pull()
    assert (pulled.rows, pulled.new, list(pulled.invalid)) == (2, 1, [bad])
    assert world.row(good)["status"] == "approved"
    recorded = world.rows("SELECT source_ref, errors FROM refund_ledger.invalid_rows")
    assert [row["source_ref"] for row in recorded] == [bad]
    assert "ABA" in recorded[0]["errors"]["routing_number"]


def body_of(world: World, source_ref: str) -> dict[str, Any]:
    row = world.row(source_ref)
    body: dict[str, Any] = json.loads(
        world.cipher.open(bytes(row["request"]), row["request_sha256"], row["id"])
    )
    return body


def test_a_row_without_an_sec_code_is_frozen_with_that_of_the_setting_and_pulling_again_changes_nothing(
    world: World,
) -> None:
    account, token = world.approve(sec_code=None), world.approve(**TOKEN, sec_code="")
    pulled = world.pull()
    assert (pulled.new, pulled.invalid) == (2, {})
    assert {body_of(world, ref)["refundMethod"]["secCode"] for ref in (account, token)} == {"ppd"}
    assert world.pull().changed == {}


def test_a_code_in_capitals_is_the_same_code(world: World) -> None:
    ref = world.approve(sec_code="ppd")
    world.pull()
    world.change_source(ref, "sec_code = 'PPD'")
    assert world.pull().standing == [ref]


def test_rows_with_tel_and_web_are_recorded_with_what_to_give_instead(world: World) -> None:
    tel, web = world.approve(sec_code="tel"), world.approve(**TOKEN, sec_code="WEB")
    assert world.pull().new == 0
    recorded = {
        row["source_ref"]: row["errors"]
        for row in world.rows("SELECT source_ref, errors FROM refund_ledger.invalid_rows")
    }
    assert set(recorded) == {tel, web}
    assert all(
        "ppd for a consumer or ccd for a business" in errors["sec_code"] for errors in recorded.values()
    )


def test_a_refund_that_waits_with_a_code_that_is_refused_today_is_not_released_and_stays_as_it_was(
    world: World,
) -> None:
    today, world.settings = world.settings, world.settings.model_copy(update={"allow_sec_web": True})
    ref = world.approve(sec_code="web")
    world.pull()
    before = world.row(ref)
    world.settings = today
    assert list(world.pull().invalid) == [ref]
    assert world.release() == []
    after = world.row(ref)
    assert (after["status"], after["request"], after["request_sha256"]) == (
        "approved",
        before["request"],
        before["request_sha256"],
    )
    [run] = world.rows("SELECT findings FROM refund_ledger.refund_runs")
    assert run["findings"]["withdrawn"] == {str(after["id"]): "Its source row is invalid now (sec_code)."}
    world.settings = today.model_copy(update={"allow_sec_web": True})
    assert world.pull().standing == [ref]


def test_a_new_default_shows_as_a_change_of_the_rows_that_wait_and_name_no_code(world: World) -> None:
    silent, named = world.approve(sec_code=None), world.approve(sec_code="ppd")
    world.pull()
    world.settings = world.settings.model_copy(update={"sec_code": "ccd"})
    pulled = world.pull()
    assert (pulled.changed, pulled.standing) == ({silent: ["payee's details"]}, [named])
    assert body_of(world, silent)["refundMethod"]["secCode"] == "ppd"


def test_a_routing_number_of_no_documented_range_is_pulled_with_a_warning_that_does_not_hold_it(
    world: World,
) -> None:
    odd = world.approve(routing_number="130000006")
    world.approve()
    world.approve(**TOKEN)
    world.approve(routing_number="130000007")
    for new in (3, 0):
        pulled = world.pull()
        assert (pulled.new, len(pulled.invalid), list(pulled.warnings)) == (new, 1, [odd])
        assert "first two digits" in pulled.warnings[odd][0]
        assert "13" not in str(pulled.warnings[odd])
        assert str(pulled) == f"4 rows in the source: {new} new, 1 invalid, 0 changed, 1 with a warning."


def test_a_bad_row_becomes_a_refund_when_the_source_row_is_mended(world: World) -> None:
    ref = world.approve(routing_number="123456789")
    world.pull()
    world.change_source(ref, "routing_number = '053200983'")
    assert world.pull().new == 1
    assert world.rows("SELECT * FROM refund_ledger.invalid_rows") == []


def test_pulling_again_changes_nothing(world: World) -> None:
    ref = world.approve()
    world.pull()
    before = world.row(ref)
    assert world.pull().new == 0
    assert world.row(ref) == before


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("amount = 5000", ["amount"]),
        ("account_number = '111122223333'", ["payee's account"]),
        ("name_on_account = 'Somebody Else'", ["payee's details"]),
        ("approved_by = 'carl@example.com'", ["approved_by"]),
    ],
)
def test_a_source_row_that_changed_is_named_and_the_refund_stays_as_it_was(
    world: World, assignment: str, words: list[str]
) -> None:
    ref = world.approve()
    world.pull()
    before = world.row(ref)
    world.change_source(ref, assignment)
    assert world.pull().changed == {ref: words}
    assert world.row(ref) == before


def test_an_order_id_that_another_refund_has_is_an_error_of_the_row(world: World) -> None:
    first = world.approve(order_id="SAME-ORDER")
    world.pull()
    second = world.approve(order_id="SAME-ORDER")
    pulled = world.pull()
    assert "order ids are unique" in pulled.invalid[second]["order_id"]
    assert world.row(first)["status"] == "approved"


def test_any_database_with_a_sqlalchemy_engine_is_a_source_and_a_source_ref_that_comes_twice_is_an_error(
    world: World, tmp_path: Path
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db")
    with engine.begin() as connection:
        written = "withdrawn_at, status, payroc_refund_id, payroc_status, reason, updated_at"
        connection.exec_driver_sql(f"CREATE TABLE refund_requests ({', '.join(COLUMNS)}, {written})")
        insert = text(
            f"INSERT INTO refund_requests ({', '.join(COLUMNS)}) VALUES ({', '.join(':' + name for name in COLUMNS)})"
        )
        for number, ref in enumerate(("once", "twice", "twice")):
            connection.execute(insert, GOOD | {"source_ref": ref, "order_id": f"LITE-{number}"})
    world.source = SqlSource(engine)
    pulled = world.pull()
    assert (pulled.new, set(pulled.invalid)) == (1, {"twice"})
    assert "comes 2 times" in pulled.invalid["twice"]["source_ref"]
    world.write_back()
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            "SELECT source_ref, status, updated_at FROM refund_requests ORDER BY rowid"
        ).all()
    assert [row[:2] for row in found] == [("once", "approved"), ("twice", "invalid"), ("twice", "invalid")]
    assert found[0][2]


def test_a_query_that_lacks_a_column_is_named_with_the_column(world: World, tmp_path: Path) -> None:
    query = tmp_path / "select_approved.sql"
    query.write_text("SELECT source_ref, amount FROM refund_requests")
    world.source = SqlSource(world.source_engine, select_approved=query)
    with pytest.raises(
        SourceError, match=r"select_approved.sql does not return processing_terminal_id, order_id"
    ):
        world.pull()


def test_a_driver_error_is_told_without_the_values_that_it_quotes(world: World, tmp_path: Path) -> None:
    world.approve(account_number="99998888777766")
    query = tmp_path / "select_approved.sql"
    query.write_text("SELECT account_number::int FROM refund_requests")
    world.source = SqlSource(world.source_engine, select_approved=query)
    with pytest.raises(SourceError, match=r"select_approved.sql failed") as caught:
        world.pull()
    assert "99998888777766" not in str(caught.value)


def test_pulls_side_by_side_mark_no_good_refund_invalid(world: World) -> None:
    for _ in range(30):
        world.approve()

    async def four() -> None:
        await asyncio.gather(
            *(pull(world.source, world.ledger, world.cipher, world.settings) for _ in range(4))
        )

    world.run(four())
    assert world.rows("SELECT * FROM refund_ledger.invalid_rows") == []
    assert len(world.rows("SELECT * FROM refund_ledger.refunds")) == 30


@pytest.mark.parametrize("column", ["description", "order_id", "requested_by", "approved_by"])
def test_a_character_that_postgres_can_not_hold_is_an_error_of_its_row_alone(column: str) -> None:
    with pytest.raises(InvalidRow) as caught:
        built(**{column: "a\x00b"})
    assert column in caught.value.errors


def test_an_order_id_collision_is_noted_once_and_written_back_once(world: World) -> None:
    world.approve(order_id="SAME-ORDER-2")
    world.pull()
    world.approve(order_id="SAME-ORDER-2")
    world.pull()
    world.write_back()
    before = world.rows("SELECT first_seen_at, written_back_at FROM refund_ledger.invalid_rows")
    world.pull()
    assert world.rows("SELECT first_seen_at, written_back_at FROM refund_ledger.invalid_rows") == before
    assert world.write_back() == (0, [])


def test_a_row_without_a_source_ref_is_reported_while_it_is_there_and_never_written_back(
    world: World, tmp_path: Path
) -> None:
    query = tmp_path / "select_approved.sql"
    everything = (SQL_FOLDER / "select_approved.sql").read_text()
    query.write_text(everything.replace("source_ref             AS", "NULLIF(source_ref, 'none') AS"))
    world.approve(source_ref="none")
    source, world.source = world.source, SqlSource(world.source_engine, select_approved=query)
    assert list(world.pull().invalid) == ["(row 1)"]
    assert world.write_back() == (0, [])
    world.source = source
    world.pull()
    assert world.rows("SELECT source_ref FROM refund_ledger.invalid_rows") == []


def test_a_withdrawn_refund_takes_no_place_of_those_that_can_go(world: World) -> None:
    withdrawn, next_one = world.approve(), world.approve()
    world.pull()
    world.change_source(withdrawn, "withdrawn_at = now()")
    pulled = world.pull()
    candidates = world.run(world.ledger.runs.candidates(Selection(limit=1), standing=pulled.standing))
    assert [item.source_ref for item in candidates] == [next_one]
    assert list(pulled.withdrawn) == [world.row(withdrawn)["id"]]


def test_a_paused_terminal_takes_no_place_of_those_that_can_go(world: World) -> None:
    world.approve(processing_terminal_id="7701002")
    next_one = world.approve()
    world.pull()
    world.run(world.ledger.pauses.pause("7701002", "the bank called"))
    assert [item.source_ref for item in world.run(world.ledger.runs.candidates(Selection(limit=1)))] == [
        next_one
    ]
