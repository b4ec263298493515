"""Settings, params, and the small rules around a run."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from include.refunds.cipher import Cipher, UnreadableRequest
from include.refunds.ledger_url import UrlError, ledger_url
from include.refunds.params import ParamsError, RunParams, in_lists
from include.refunds.report import money
from include.refunds.settings import Settings, SettingsError


def test_an_empty_schedule_means_manual_runs_only_and_other_empty_settings_are_unset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SCHEDULE", "RETRIES", "TOKEN_CACHE_DIR", "FINGERPRINT_KEY"):
        monkeypatch.setenv(f"PAYROC_REFUNDS_{name}", "")
    settings = Settings()
    assert (settings.schedule, settings.retries, settings.token_cache_dir, settings.fingerprint_key) == (
        "",
        5,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ENCRYPTION_KEYS", "", "No encryption key: set PAYROC_REFUNDS_ENCRYPTION_KEYS"),
        ("ENCRYPTION_KEYS", "not a key", "holds something that is not a Fernet key"),
        ("FINGERPRINT_KEY", "short", "missing or shorter than 32 characters"),
    ],
)
def test_a_missing_or_malformed_key_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(f"PAYROC_REFUNDS_{name}", value)
    with pytest.raises(SettingsError, match=f"{sentence}.*generate-keys"):
        Cipher(Settings())


def test_any_of_the_keys_opens_a_request_and_a_lost_one_is_told_with_the_refund(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Settings().encryption_keys[0].get_secret_value()
    sealed, digest = Cipher(Settings()).seal(b"body"), Cipher(Settings()).sha256(b"body")
    token, key_id = sealed.token, sealed.key_id
    new = "bmV3LWZlcm5ldC1rZXktb2YtdGhlLXRlc3RzLTEyMyE="
    monkeypatch.setenv("PAYROC_REFUNDS_ENCRYPTION_KEYS", f"{new}, {old}")
    assert Cipher(Settings()).open(token, digest, 7, key_id) == b"body"
    monkeypatch.setenv("PAYROC_REFUNDS_ENCRYPTION_KEYS", new)
    with pytest.raises(
        UnreadableRequest,
        match=f"request of refund 7 was encrypted with the key {key_id}, which is not among",
    ):
        Cipher(Settings()).open(token, digest, 7, key_id)


def test_keys_show_in_no_repr() -> None:
    settings = Settings()
    shown = repr(settings) + str(settings.model_dump())
    assert settings.encryption_keys[0].get_secret_value() not in shown
    assert str(settings.fingerprint_key and settings.fingerprint_key.get_secret_value()) not in shown


@pytest.mark.parametrize("name", ["dryrun", "Limit", "limit ", "\x1b[2Jlimit", "x" * 500])
def test_an_unknown_param_is_named(name: str) -> None:
    with pytest.raises(ParamsError, match=r"unknown params \(.{1,60}\); known are dry_run, limit") as refused:
        RunParams.check({}, {name: True})
    assert str(refused.value).isprintable()


WRONG: dict[str, list[object]] = {
    "dry_run": [None, 1, 0, "true", "false", [], {}],
    "limit": [None, 0, -1, 100_001, True, 1.5, float("nan"), float("inf"), "5", [5], {}, 10**400],
    "source_refs": ["RF-1", [1], [None], [["RF-1"]], {"RF-1": 1}, 5, True, ["RF\x001"], ["\ud83d"]],
    "processing_terminal_id": ["", "123", "7" * 51, 7701001, ["7701001"], {}, True, "7701\x00", "7701\ud83d"],
    "approved_before": [
        "2026-11-20T09:00:00",
        "2026-11-20",
        "yesterday",
        "1700000000",
        1700000000,
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-14:00",
        "infinity",
        True,
        ["2026-11-20T09:00:00Z"],
    ],
    "batch_size": [0, -5, True, 2.5, "2", [2], {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_an_unusable_param_is_named_with_what_to_give(name: str, value: object) -> None:
    with pytest.raises(ParamsError, match=f"^Param {name} is not usable; give [^;]*[.]$"):
        RunParams.check({name: value})


def test_several_unusable_params_are_all_named() -> None:
    with pytest.raises(
        ParamsError, match=r"^Param limit is not usable; .*Param approved_before is not usable"
    ):
        RunParams.check({"limit": 0, "approved_before": "yesterday", "batch_size": 1})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"source_refs": None}, {"source_refs": ()}),
        ({"source_refs": [" a ", "a", "a"]}, {"source_refs": (" a ", "a", "a")}),
        ({"limit": 5.0, "batch_size": None}, {"limit": 5, "batch_size": None}),
        ({"batch_size": 10**6}, {"batch_size": 100_000}),
        (
            {"approved_before": "2026-11-20t09:00:00.5-05:00"},
            {"approved_before": datetime(2026, 11, 20, 14, 0, 0, 500_000, tzinfo=UTC)},
        ),
    ],
)
def test_a_param_means_what_it_says(given: dict[str, object], found: dict[str, object]) -> None:
    params = RunParams.check(given, given)
    assert {name: getattr(params, name) for name in found} == found


def test_a_conf_that_is_no_object_is_refused() -> None:
    with pytest.raises(ParamsError, match="conf is not usable; give a JSON object"):
        RunParams.check({}, ["limit"])  # type: ignore[arg-type]  # what a caller of the API may send


@pytest.mark.parametrize(
    ("count", "batch_size", "lists", "longest"),
    [
        (0, None, 0, 0),
        (3, None, 3, 1),
        (1024, None, 1024, 1),
        (1025, None, 513, 2),
        (3000, 1, 1000, 3),
        (10, 4, 3, 4),
        (100_000, None, 1021, 98),
    ],
)
def test_ids_come_in_lists_that_never_exceed_the_largest_number_of_mapped_tasks(
    count: int, batch_size: int | None, lists: int, longest: int
) -> None:
    found = in_lists(list(range(count)), batch_size, 1024)
    assert [item for part in found for item in part] == list(range(count))
    assert (len(found), max(map(len, found), default=0)) == (lists, longest)


def test_money_is_written_with_the_currencys_own_minor_unit() -> None:
    assert [money(123456, code) for code in ("USD", "JPY", "KWD")] == [
        "1,234.56 USD",
        "123,456 JPY",
        "123.456 KWD",
    ]


def test_a_connections_special_characters_and_ssl_options_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "AIRFLOW_CONN_REFUNDS_LEDGER",
        "postgres://pay%40er:p%2Fw%3Ad@db.example:6432/refunds?sslmode=verify-full",
    )
    url = ledger_url()
    assert (url.username, url.password, url.port, url.query["sslmode"]) == (
        "pay@er",
        "p/w:d",
        6432,
        "verify-full",
    )
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", "postgres://db.example")
    with pytest.raises(UrlError, match="names no database"):
        ledger_url()
