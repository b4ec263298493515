"""Settings: what an environment may say, and the sentence for what it may not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from include.refunds.settings import Settings, SettingsError, get_settings
from tests.conftest import ROOT

_TERMINALS = "give Payroc's terminal ids with commas between them, such as 7701001,7701002, or leave it unset"


def refusal() -> str:
    """Return the sentence with which the environment is refused."""
    with pytest.raises(SettingsError) as refused:
        get_settings()
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("RETRIES", "-1", "give a whole number from 0 to 50"),
        ("RETRIES", "three", "give a whole number from 0 to 50"),
        ("KEY_WINDOW_DAYS", "7", "give a number above 0 and up to 6"),
        ("HTTP_TIMEOUT_SECONDS", "nan", "give a number above 0 and up to 120"),
        ("REQUESTS_PER_SECOND", "inf", "give a number from 0.001 to 10000"),
        ("RETRY_DELAY_SECONDS", "1" + "0" * 30, "give a whole number from 1 to 86400"),
        ("REQUEST_DAYS", "9" * 5000, "give a whole number from 1 to 36500"),
        ("SEC_CODE", "tel", "give ppd or ccd"),
        ("ALLOW_SEC_WEB", "maybe", "give true or false"),
        ("LOOK_BACK_DAYS", "7", "give a whole number from 8 to 3650"),
        ("TERMINALS", ",", _TERMINALS),
        ("TERMINALS", '["7701001"]', _TERMINALS),
        ("TERMINALS", "7701001 7701002", _TERMINALS),
        ("TERMINALS", "123", _TERMINALS),
        ("TIMEZONE", "Mars/Olympus", "give an IANA time zone such as America/New_York"),
        ("LEASE_MARGIN_SECONDS", "60", "give at least three times PAYROC_REFUNDS_HTTP_TIMEOUT_SECONDS"),
    ],
)
def test_an_unusable_setting_is_named_with_what_to_give(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, advice: str
) -> None:
    monkeypatch.setenv(f"PAYROC_REFUNDS_{name}", value)
    assert refusal() == f"PAYROC_REFUNDS_{name} is not usable; {advice}."


def test_several_unusable_settings_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RETRIES", "x"), ("TIMEZONE", "Mars"), ("RETRYS", "3"), ("SOURCE", " shop")):
        monkeypatch.setenv(f"PAYROC_REFUNDS_{name}", value)
    said = refusal()
    assert all(f"PAYROC_REFUNDS_{name} is " in said for name in ("RETRIES", "TIMEZONE", "RETRYS", "SOURCE"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("PAYROC_REFUNDS_RETRYS", "PAYROC_REFUNDS_RETRIES"),
        ("PAYROC_REFUNDS_LEDGER_URI", "PAYROC_REFUNDS_LEDGER_URL"),
        ("PAYROC_REFUNDS_SEC_CODE\r", "PAYROC_REFUNDS_SEC_CODE"),
        ("payroc_refunds_retries", "PAYROC_REFUNDS_RETRIES"),
        ("PAYROC_REFUNDS_", "PAYROC_REFUNDS_SOURCE"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(
    monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    monkeypatch.setenv(name, "3")
    said = refusal()
    assert f" is not a setting; the nearest is {nearest}. Rename or remove it." in said
    assert said.isprintable()


def test_every_name_that_the_project_writes_anywhere_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = ("include", "plugins", "dags", "demo", "docker", "benchmarks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    text = "".join(file.read_text() for file in (*files, ROOT / "docker-compose.yaml", ROOT / "Makefile"))
    names = set(re.findall(r"PAYROC_REFUNDS_[A-Z_]+[A-Z]", text))
    assert {"PAYROC_REFUNDS_DEMO_STATE", "PAYROC_REFUNDS_LEDGER_URL"} < names
    for name in names:
        # Empty is unset, so that no value of another setting is in the way.
        monkeypatch.setenv(name, "")
    get_settings()


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("RETRIES", "3\r", 3),
        ("RETRIES", '"3"\r', 3),
        ("RETRIES", "  3 ", 3),
        ("ALLOW_SEC_WEB", "true\r", True),
        ("TIMEZONE", "'Europe/Berlin'", "Europe/Berlin"),
        ("SCHEDULE", '"0 7 * * 1-5"', "0 7 * * 1-5"),
        ("SCHEDULE", '""', ""),
        ("SCHEDULE", "\r", ""),
        ("RETRIES", "\r", 5),
        ("TOKEN_CACHE_DIR", '"/srv/tokens"\r', Path("/srv/tokens")),
        ("APPROVERS", '"2, 3"\r', ("2", "3")),
    ],
)
def test_quotes_and_line_ends_around_a_value_are_left_out(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, found: object
) -> None:
    monkeypatch.setenv(f"PAYROC_REFUNDS_{name}", value)
    assert getattr(get_settings(), name.lower()) == found


@pytest.mark.parametrize(
    "value", ["shop\r", '"shop"', " shop", "shop ", "ann's", "sh\u200bop", "sho\u0301p", "  ", "s" * 101]
)
def test_the_name_of_the_source_is_refused_and_never_repaired(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_SOURCE", value)
    assert refusal() == (
        "PAYROC_REFUNDS_SOURCE is not usable; give a name of up to 100 plain characters such as acme_refunds, "
        "without quotes, line ends or blanks at an end."
    )


@pytest.mark.parametrize("value", ["shop", "acme refunds", "größe-1", "a" * 100])
def test_a_plain_name_of_the_source_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_SOURCE", value)
    assert get_settings().source == value


@pytest.mark.parametrize("value", ["{}\r", '"{}"', " {}", "\ufeff{}"])
def test_a_fingerprint_key_with_something_around_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    key = "a fingerprint key of forty characters..."
    monkeypatch.setenv("PAYROC_REFUNDS_FINGERPRINT_KEY", value.format(key))
    said = refusal()
    assert said.startswith("PAYROC_REFUNDS_FINGERPRINT_KEY is not usable; give the key alone")
    assert key not in said


@pytest.mark.parametrize("value", ['["2", "3"]', "[2]", "2;3", "2 3", '"2","3"', ",", "{}", "2\x003"])
def test_approvers_are_ids_with_commas_and_nothing_else(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    if "\x00" in value:
        with pytest.raises(ValueError, match="approvers"):
            Settings(approvers=value)  # type: ignore[arg-type]  # as the environment has it
        return
    monkeypatch.setenv("PAYROC_REFUNDS_APPROVERS", value)
    assert refusal() == (
        "PAYROC_REFUNDS_APPROVERS is not usable; give ids of Airflow users with commas between them, such as 2,3, "
        "or leave it unset for everybody who may answer for the DAG."
    )


def test_a_command_refuses_an_unknown_name_before_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_LEGDER_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    command = [sys.executable, "-m", "include.refunds", "migrate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        "PAYROC_REFUNDS_LEGDER_URL is not a setting; the nearest is PAYROC_REFUNDS_LEDGER_URL." in done.stderr
    )
