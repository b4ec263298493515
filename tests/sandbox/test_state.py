from __future__ import annotations

from pathlib import Path

import pytest

from include.sandbox.__main__ import main
from tests.sandbox.running import Client, new_key, running_sandbox


def test_a_killed_and_restarted_sandbox_knows_its_refunds_keys_and_tokens(tmp_path: Path) -> None:
    state, key, lost = str(tmp_path / "state.db"), new_key(), new_key()
    with running_sandbox("--state", state) as first:
        payroc = first.client()
        created = payroc.create(key=key)
        payroc.create_ending_in("9005", key=lost)
        for _ in range(50):
            payroc.create()
        first.advance(60)
        first.admin("PUT", "terminals/9999001", mode="no-ach")
        record, journal = first.refunds(), first.journal()
        assert len(record) == 51
        first.kill()
    with running_sandbox("--state", state) as second:
        assert second.refunds() == record
        assert second.journal() == journal
        assert second.admin("GET", "settings")["clockOffsetSeconds"] == 60
        assert second.admin("GET", "terminals") == {"terminals": {"9999001": "no-ach"}}
        again = Client(second.url)
        again.token = payroc.token
        assert again.create(key=key).content == created.content
        assert again.create_ending_in("9005", key=lost).status_code == 201
        assert len(second.refunds()) == len(record) + 1


def test_the_state_file_holds_no_account_number_and_no_token(tmp_path: Path) -> None:
    state = tmp_path / "state.db"
    with running_sandbox("--state", str(state)) as sandbox:
        payroc = sandbox.client()
        payroc.create()
        sandbox.kill()
    held = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"OrderRef6543" in held
    for secret in ("1234567890", "123456789", payroc.token, "sandbox-key"):
        assert secret.encode() not in held


def test_two_sandboxes_cannot_use_one_state_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = str(tmp_path / "state.db")
    with running_sandbox("--state", state):
        assert main(["--port", "0", "--state", state]) == 2
        assert (
            capsys.readouterr().err
            == f"Cannot use {state} as the state file (is another sandbox using it?): database is locked.\n"
        )


def test_a_file_that_is_no_state_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not a database, " * 1000)
    assert main(["--port", "0", "--state", str(other)]) == 2
    assert "file is not a database" in capsys.readouterr().err
    assert other.read_text() == "not a database, " * 1000
