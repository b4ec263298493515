"""A folder for tokens that can't be used: sending goes on without it, with one warning."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from include.refunds.settings import get_settings
from payroc_airflow.gateway import HookGateway
from payroc_airflow.hooks.payroc import PayrocHook
from payroc_airflow.token_cache import default_folder, shared_folder
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")


def of_another_user(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)


def of_another_user_and_open(folder: Path) -> None:
    of_another_user(folder)
    folder.chmod(0o777)


def a_link(folder: Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)


def a_link_to_nothing(folder: Path) -> None:
    folder.symlink_to(folder.with_name("gone"))


def open_to_a_group(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def a_file(folder: Path) -> None:
    folder.write_text("")


def below_a_file(folder: Path) -> None:
    folder.parent.joinpath("file").write_text("")
    folder.symlink_to(folder.parent / "file" / "below")


UNUSABLE = [
    pytest.param(of_another_user, "belongs to another user", marks=AS_ROOT),
    pytest.param(of_another_user_and_open, "belongs to another user", marks=AS_ROOT),
    (a_link, "is a symbolic link"),
    (a_link_to_nothing, "is a symbolic link"),
    (open_to_a_group, "is open to other users"),
    (open_to_all, "is open to other users"),
    (a_file, "is not a folder"),
    (below_a_file, "is a symbolic link"),
]


@pytest.fixture
def folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the setting names, not yet there."""
    # What releases the refunds of a test keeps the folder that it has.
    asyncio.run(world.gateway.token())
    monkeypatch.setenv("PAYROC_REFUNDS_TOKEN_CACHE_DIR", str(tmp_path / "shared"))
    get_settings.cache_clear()
    return tmp_path / "shared"


@pytest.fixture
def gateway(world: World) -> Iterator[Callable[[], HookGateway]]:
    """A function that makes a gateway as a task would."""
    made: list[HookGateway] = []

    def make() -> HookGateway:
        made.append(HookGateway(PayrocHook()))
        return made[-1]

    yield make
    for each in made:
        asyncio.run(each.close())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("payroc_airflow")]


@pytest.mark.parametrize(("make", "why"), UNUSABLE)
def test_a_refund_is_sent_though_the_folder_can_not_be_used(
    world: World,
    gateway: Callable[[], HookGateway],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[Path], None],
    why: str,
) -> None:
    refund_id = world.released()
    make(folder)
    before = folder.lstat()
    caplog.clear()
    world.send(refund_id, gateway())
    assert (world.row(refund_id)["status"], world.paid(refund_id)) == ("accepted", 1)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{folder} {why}, so tasks of this host share no tokens ")
    assert "set PAYROC_REFUNDS_TOKEN_CACHE_DIR to a folder of this user's own with rights 0700" in warning
    # Neither written to nor made usable.
    assert (folder.lstat().st_mode, folder.lstat().st_uid) == (before.st_mode, before.st_uid)
    assert [path for place in (folder, folder.with_name("elsewhere")) for path in place.rglob("*")] == []


@pytest.mark.parametrize("taken", [a_file, a_link, open_to_all])
def test_another_user_who_made_the_default_folder_first_stops_nothing(
    world: World,
    gateway: Callable[[], HookGateway],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    taken: Callable[[Path], None],
) -> None:
    refund_id = world.released()
    monkeypatch.delenv("PAYROC_REFUNDS_TOKEN_CACHE_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    get_settings.cache_clear()
    taken(default_folder())
    assert shared_folder() is None
    world.send(refund_id, gateway())
    assert world.row(refund_id)["status"] == "accepted"


def test_a_folder_on_a_file_system_that_takes_none_stops_nothing(
    world: World,
    gateway: Callable[[], HookGateway],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refund_id = world.released()
    # Not even root makes a folder there.
    monkeypatch.setenv("PAYROC_REFUNDS_TOKEN_CACHE_DIR", "/proc/payroc-refunds/tokens")
    get_settings.cache_clear()
    caplog.clear()
    world.send(refund_id, gateway())
    assert world.row(refund_id)["status"] == "accepted"
    (warning,) = warnings(caplog)
    assert warning.startswith("/proc/payroc-refunds/tokens can't be made (")


def test_one_process_asks_for_one_token_without_the_folder(
    world: World, gateway: Callable[[], HookGateway], folder: Path
) -> None:
    ids = [world.released(), world.released()]
    open_to_all(folder)
    tokens = "/_sandbox/requests?operation=authorize"
    one, before = gateway(), world.sandbox.get(tokens)["count"]
    for refund_id in ids:
        world.send(refund_id, one)
    assert world.sandbox.get(tokens)["count"] == before + 1


def test_a_folder_that_became_another_users_meanwhile_gets_no_token(
    world: World, gateway: Callable[[], HookGateway], folder: Path
) -> None:
    refund_id, one = world.released(), gateway()
    asyncio.run(one.token())
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    open_to_all(folder)
    world.send(refund_id, one)
    assert world.row(refund_id)["status"] == "accepted"
    assert list(folder.glob("*.token")) == []
