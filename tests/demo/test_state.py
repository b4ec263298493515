"""What the demo keeps between two runs, and who may work with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo import down
from demo.errors import DemoError
from demo.state import FOLDER_VARIABLE, State, state_folder
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_user_and_a_checkout_have_a_folder_of_their_own_outside_the_home() -> None:
    folder = state_folder()
    assert str(os.geteuid()) in folder.name
    assert not folder.is_relative_to(Path.home())
    assert not folder.is_relative_to(ROOT)


def test_keys_are_drawn_once_and_only_their_owner_reads_them(folder: Path) -> None:
    keys = State.open().keys()
    assert State.open().keys() == keys
    assert (folder / "keys.json").stat().st_mode & 0o777 == 0o600


def test_nobody_else_can_list_the_folder(folder: Path) -> None:
    State.open()
    assert folder.stat().st_mode & 0o066 == 0
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in ("airflow", "logs"))


def test_damaged_keys_are_not_replaced_silently(folder: Path) -> None:
    state = State.open()
    state.keys()
    (folder / "keys.json").write_text("{")
    with pytest.raises(DemoError, match="make reset"):
        state.keys()


def test_keys_of_an_earlier_version_are_kept_and_what_it_kept_beside_them_is_left(folder: Path) -> None:
    keys = State.open().keys()
    kept = json.loads((folder / "keys.json").read_text())
    (folder / "keys.json").write_text(json.dumps(kept | {"admin_password": "of earlier days"}))
    assert State.open().keys() == keys


def test_notes_are_kept(folder: Path) -> None:
    State.open().set_note("sandbox_port", "8089")
    assert State.open().note("sandbox_port") == "8089"
    assert State.open().note("other") is None


def test_a_folder_with_other_things_in_it_is_neither_used_nor_removed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(DemoError, match="this demo did not make it"):
        State.open()
    down.reset(folder)
    assert (folder / "thesis.txt").exists()
    assert capsys.readouterr().out == "The demo has no data.\n"


def test_a_link_to_a_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DemoError):
        State.open()


def test_of_two_commands_the_second_is_told_of_the_first(folder: Path) -> None:
    first, second = State.open().locked("make up"), State.open().locked("make demo")
    with first, pytest.raises(DemoError, match=rf"`make up` \(process {os.getpid()}\).*`make down`"):
        second.__enter__()
    with State.open().locked("make demo"):
        pass


def test_the_lock_of_a_killed_command_is_free(folder: Path) -> None:
    code = "import time\nfrom demo.state import State\nwith State.open().locked('make up'):\n    print(flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert State.open().holder() == (other.pid, "make up")
        other.kill()
    assert State.open().holder() is None
    with State.open().locked("make demo"):
        pass


def test_down_asks_the_command_that_holds_the_lock_to_end(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import time\nfrom demo.state import State\nwith State.open().locked('make up'):\n    print(flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert down.down(folder) == 0
        assert other.wait(10) != 0
    assert f"Stopping `make up` (process {other.pid})" in capsys.readouterr().out
    down.down(folder)
    assert capsys.readouterr().out == "Nothing of this demo is running.\n"


def test_reset_removes_what_the_demo_made(folder: Path) -> None:
    State.open().keys()
    assert down.reset(folder) == 0
    assert not folder.exists()


def test_reset_works_where_no_package_is_installed(folder: Path) -> None:
    State.open().keys()
    reset = [
        sys.executable,
        "-S",
        "-c",
        "import sys; sys.path.insert(0, '.'); sys.argv[1:] = ['reset']; from demo.__main__ import main; main()",
    ]
    subprocess.run(
        reset, cwd=ROOT, check=True, env={FOLDER_VARIABLE: str(folder), "PATH": os.environ["PATH"]}
    )
    assert not folder.exists()
