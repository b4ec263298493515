"""Whatever an environment says, it is settings that work, or one error that names the variable."""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import Phase, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from include.refunds import settings as module
from include.refunds.settings import ENV_PREFIX, OTHER_NAMES, Settings, SettingsError, get_settings

NAMES = sorted(Settings.model_fields)
SCHEDULES = ("schedule", "followup_schedule", "summary_schedule")

# What an environment can hold: anything but NUL; bytes that are no UTF-8 arrive as lone surrogates.
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="\x00"),
        st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"]),
        st.sampled_from(" \t\r\n\"'`,;[]{}\ufeff\u200b\u202e\xa0"),
    ),
    max_size=40,
)
NUMBER = st.one_of(st.integers(), st.floats(), st.integers(0, 10**40)).map(str)
WORD = st.sampled_from(
    ["true", "ppd", "Europe/Berlin", "@daily", "* * * * *", "0 0 31 2 *", "shop", "2,3", "/srv/x"]
)
VALUE = st.one_of(TEXT, NUMBER, WORD, st.tuples(TEXT, WORD, TEXT).map("".join))
AROUND = st.sampled_from(["{}\r", '"{}"', "'{}'", " {} ", '"{}"\r', "\ufeff{}", "\t{}\n"])


@contextmanager
def environment(**variables: str) -> Any:
    with patch.dict(os.environ, variables):
        get_settings.cache_clear()
        yield
    get_settings.cache_clear()


def work_with(settings: Settings) -> None:
    """Do with the settings what DAG files and tasks do, which must not be what finds a bad one."""
    from payroc_airflow.schedule import next_due, timetable

    now = datetime(2026, 11, 30, tzinfo=UTC)
    for seconds in (
        settings.retry_delay_seconds,
        settings.unknown_wait_seconds,
        settings.lease_margin_seconds,
    ):
        assert now + timedelta(seconds=seconds) > now
    assert now - timedelta(days=settings.request_days) < now
    assert timedelta(hours=settings.approval_timeout_hours + settings.deadline_hours) < timedelta(days=30)
    if settings.requests_per_second:
        assert 0 < 1 / settings.requests_per_second <= 1000
    source = settings.source
    assert (source.strip(), source.isprintable(), {*source} & {*"\"'`"}) == (source, True, set())
    os.fsencode(source)
    for name in SCHEDULES:
        if timetable(settings, name):  # type: ignore[arg-type]  # a name of the three
            assert next_due(getattr(settings, name), settings.timezone, now) is not None


def a_value_works_or_its_variable_is_named(name: str, value: str) -> None:
    variable = f"{ENV_PREFIX}{name.upper()}"
    secret = f"canary-{value}" if name in ("fingerprint_key", "encryption_keys", "notifiers") else value
    with environment(**{variable: secret}):
        try:
            work_with(get_settings())
        except SettingsError as error:
            said = str(error)
            assert said.startswith(f"{variable} is not usable; give ")
            assert said.isprintable()
            assert "canary" not in said


def what_surrounds_a_value_changes_nothing(setting: tuple[str, str], around: str) -> None:
    name, value = setting
    variable = f"{ENV_PREFIX}{name.upper()}"
    with environment(**{variable: value}):
        plain = getattr(get_settings(), name)
    with environment(**{variable: around.format(value)}):
        try:
            assert getattr(get_settings(), name) == plain
        except SettingsError as error:
            said = str(error)
            assert name in ("source", "fingerprint_key")
            assert said.startswith(f"{variable} is not usable; give ")


def an_unknown_name_is_refused(name: str) -> None:
    variable = f"{ENV_PREFIX}{name}"
    # An empty value leaves a known one unset.
    with environment(**{variable: ""}):
        try:
            get_settings()
        except SettingsError as error:
            said = str(error)
            assert " is not a setting; the nearest is PAYROC_REFUNDS_" in said
            assert said.isprintable()
        else:
            assert name in {known.upper() for known in (*NAMES, *OTHER_NAMES)}


ANY_NAME = st.one_of(
    TEXT.filter(lambda text: "=" not in text),
    st.builds(
        lambda name, at, more: name[:at] + more + name[at + 1 :],
        st.sampled_from([name.upper() for name in NAMES]),
        st.integers(0, 20),
        st.text("AEIOSTUXYZ_1\r", max_size=2),
    ),
)

# A value that each setting takes.
GOOD: dict[str, str] = {
    name: "7" for name in NAMES if name.endswith(("_seconds", "_days", "hours", "retries", "in_flight"))
} | {
    "key_window_days": "5",
    "http_timeout_seconds": "1.5",
    "lease_margin_seconds": "700",
    "look_back_days": "90",
    "terminals": "7701001,7701002",
    "approvers": "2,ann",
    "schedule": "@daily",
    "timezone": "Europe/Berlin",
    "token_cache": "false",
    "token_cache_dir": "/srv/tokens",
    "summary_folder": "s3://conn@bucket/summaries",
    "sec_code": "ccd",
    "source": "acme_refunds",
    "fingerprint_key": "f" * 40,
}


VALUES = given(st.sampled_from(NAMES), VALUE)
SURROUNDED = given(st.sampled_from(sorted(GOOD.items())), AROUND)
UNKNOWN = given(ANY_NAME)
DELAYS = given(st.just("retry_delay_seconds"), NUMBER)
SOURCES = given(st.just("source"), st.tuples(TEXT, WORD, st.text(" \t")).map("".join))


@pytest.mark.timeout(3600)
@example("retry_delay_seconds", "1" + "0" * 12)
@example("source", "shop ")
@example("schedule", "0 0 31 2 *")
@example("timezone", "posixrules")
@example("requests_per_second", "1e-320")
@VALUES
def test_a_value_works_or_its_variable_is_named(name: str, value: str) -> None:
    a_value_works_or_its_variable_is_named(name, value)


@SURROUNDED
def test_what_surrounds_a_value_changes_nothing(setting: tuple[str, str], around: str) -> None:
    what_surrounds_a_value_changes_nothing(setting, around)


@example("RETRYS")
@UNKNOWN
def test_an_unknown_name_is_refused(name: str) -> None:
    an_unknown_name_is_refused(name)


class WithWideBound(Settings):
    """Settings whose delay has a bound that Airflow can't take."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX)
    retry_delay_seconds: int = Field(60, ge=1, le=10**30)


def _untouched(text: str) -> str:
    return text


def _quoting(error: ValidationError) -> list[str]:
    return [
        f"{ENV_PREFIX}{found['loc'][0]} is not usable; give {found['input']}".upper()
        for found in error.errors()
    ]


MISTAKES: dict[str, tuple[str, object, Any]] = {
    "a bound is too wide": ("Settings", WithWideBound, DELAYS(a_value_works_or_its_variable_is_named)),
    "blanks around the source count": ("_bare", _untouched, SOURCES(a_value_works_or_its_variable_is_named)),
    "a value is quoted": ("_sentences", _quoting, VALUES(a_value_works_or_its_variable_is_named)),
    "quotes stay": ("_bare", _untouched, SURROUNDED(what_surrounds_a_value_changes_nothing)),
    "names are not looked at": ("_unknown_names", list, UNKNOWN(an_unknown_name_is_refused)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_properties_find_a_planted_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, planted, run = MISTAKES[mistake]
    monkeypatch.setattr(module, name, planted)
    with pytest.raises((AssertionError, OverflowError)):
        hypothesis_settings(phases=[Phase.generate], report_multiple_bugs=False)(run)()
