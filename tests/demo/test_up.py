"""Who can log in to `make up`, and what it sets for them in the ledger."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import URL

from demo import up
from demo.postgres import PostgresServer
from demo.stack import Stack
from demo.state import FOLDER_VARIABLE, State
from include.refunds.cli import app
from tests.boundaries.books import GOOD, Books


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "state"))
    return State.open()


def test_each_user_keeps_a_password_that_only_the_owner_of_the_demo_reads(state: State) -> None:
    passwords = up._passwords(state)
    assert up._passwords(state) == passwords
    assert len(set(passwords.values())) == len(passwords) == 2
    assert (state.airflow / "passwords.json").stat().st_mode & 0o777 == 0o600


def test_a_user_who_is_new_gets_a_password_and_one_who_is_gone_loses_it(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    passwords = up._passwords(state)
    monkeypatch.setattr(up, "USERS", {"olivia": "op", "greta": "viewer"})
    changed = up._passwords(state)
    assert (changed["olivia"], set(changed)) == (passwords["olivia"], {"olivia", "greta"})


def test_a_threshold_ends_with_make_up_for_in_make_demo_nobody_could_be_asked(
    state: State, postgres: PostgresServer, ledger_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.stack.LEDGER_DATABASE", ledger_url.database)
    stack = Stack(state)
    stack.postgres = postgres
    found = []
    for change in (up._set_threshold, Stack._let_runs_pass):
        change(stack)
        with stack.ledger() as ledger:
            found.append(ledger.execute("SELECT approval_total FROM refund_ledger.refund_limits").fetchone())
    assert found == [(up.THRESHOLD,), (None,)]


def test_the_hint_about_a_held_refund_names_a_command_that_exists(
    state: State, postgres: PostgresServer, ledger_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = Books(ledger_url)
    books.pull([GOOD | {"source_ref": "ref"}])
    books.close()
    monkeypatch.setattr("demo.stack.LEDGER_DATABASE", ledger_url.database)
    stack = Stack(state)
    stack.postgres = postgres
    with stack.ledger() as ledger:
        ledger.execute("UPDATE refund_ledger.refund_states SET status = 'held', holds = '{largest_refund}'")
    named = re.search("`([a-z-]+) [0-9]+ --reason", up._nothing_to_send(stack) or "")
    assert named is not None
    assert named[1] in {command.name or command.callback.__name__ for command in app.registered_commands}
