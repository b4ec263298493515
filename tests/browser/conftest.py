"""One Airflow, one Chromium and two people at their browsers for all tests of this folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser.person import Person
from tests.conftest import ROOT
from tests.scheduler.conftest import Merchant, airflow, merchant, nothing_left_over

__all__ = ["airflow", "merchant", "nothing_left_over"]

CHROMIUM = shutil.which("chromium")
# A run over 50.00 USD asks.
THRESHOLD = 5_000
_PEOPLE = pytest.StashKey[list[Person]]()


@pytest.fixture(scope="module", autouse=True)
def a_threshold(merchant: Merchant) -> None:
    # Before the browser is there: Playwright holds this thread's event loop from then on.
    merchant.limit(approval_total=THRESHOLD)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    assert CHROMIUM, "chromium is not on the PATH: `apt-get install chromium`"
    with sync_playwright() as playwright:
        # Chromium's sandbox does not run as root, and all pages are this machine's.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def olivia(chromium: Browser, merchant: Merchant, request: pytest.FixtureRequest) -> Person:
    """She keeps connections and triggers runs."""
    return _log_in("olivia", chromium, merchant, request)


@pytest.fixture(scope="module")
def frank(chromium: Browser, merchant: Merchant, request: pytest.FixtureRequest) -> Person:
    """He approves runs."""
    return _log_in("frank", chromium, merchant, request)


def _log_in(name: str, chromium: Browser, merchant: Merchant, request: pytest.FixtureRequest) -> Person:
    pictures = os.environ.get("SCREENSHOTS")
    person = Person(
        chromium, merchant.airflow.client, name, pictures=ROOT / Path(pictures) if pictures else None
    )
    request.config.stash.setdefault(_PEOPLE, []).append(person)
    return person


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Add to the report of a test that failed what its people had before their eyes."""
    report = yield
    if report.failed and call.when != "teardown":
        report.sections += [
            (f"{person.name}'s page", person.sees()) for person in item.config.stash.get(_PEOPLE, [])
        ]
    return report
