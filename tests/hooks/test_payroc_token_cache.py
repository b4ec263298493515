"""Tokens are shared, renewed in time, and never given out when they should not be."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest

from include.payroc.errors import PayrocError
from include.payroc.models import AccessToken
from include.refunds.settings import get_settings
from payroc_airflow.connection import PayrocConnection
from payroc_airflow.hooks.payroc import PayrocHook
from payroc_airflow.token_cache import FileTokenCache, MemoryTokenCache, default_folder, usable
from tests.patience import PATIENCE_SECONDS

CONNECTION = PayrocConnection(
    "https://api.example/v1", "https://identity.example", "canary-api-key-of-the-cache"
)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Fetcher:
    def __init__(self, expires_in: int = 3600) -> None:
        self.expires_in = expires_in
        self.count = 0

    def __call__(self) -> AccessToken:
        self.count += 1
        return AccessToken.model_validate(
            {"access_token": f"canary-token-{self.count}", "expires_in": self.expires_in, "scope": "a b"}
        )


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("payroc_airflow.token_cache.time.time", clock)
    return clock


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = usable(tmp_path / "tokens")
    assert folder is not None
    return folder


@pytest.fixture(params=["file", "memory"])
def cache(request, folder):
    return (
        FileTokenCache(folder, CONNECTION, lock_seconds=1) if request.param == "file" else MemoryTokenCache()
    )


def get(cache, fetch, **more) -> AccessToken:
    async def ask() -> AccessToken:
        return fetch()

    return asyncio.run(cache.get(ask, **more))


def evict(cache, token: AccessToken) -> None:
    asyncio.run(cache.evict(token))


def value(token: AccessToken) -> str:
    return token.access_token.get_secret_value()


def test_a_token_is_kept(cache) -> None:
    fetch = Fetcher()
    first, second = get(cache, fetch), get(cache, fetch)
    assert first == second
    assert (value(second), second.expires_in, second.scope) == ("canary-token-1", 3600, "a b")
    assert fetch.count == 1


@pytest.mark.parametrize(
    ("expires_in", "margin"), [(3600, 120), (600, 120), (599, 119.8), (100, 20), (1, 0.2)]
)
def test_a_token_is_renewed_two_minutes_or_a_fifth_of_its_life_before_its_end(
    cache, clock, expires_in, margin
) -> None:
    fetch = Fetcher(expires_in)
    get(cache, fetch)
    clock.now += expires_in - margin - 0.01
    assert value(get(cache, fetch)) == "canary-token-1"
    clock.now += 0.02
    assert value(get(cache, fetch)) == "canary-token-2"


def test_a_token_received_that_many_seconds_ago_or_more_is_replaced(cache, clock) -> None:
    fetch = Fetcher()
    get(cache, fetch)
    clock.now += 10
    assert value(get(cache, fetch, younger_than=10.5)) == "canary-token-1"
    assert value(get(cache, fetch, younger_than=10)) == "canary-token-2"
    assert value(get(cache, fetch)) == "canary-token-2"
    assert value(get(cache, fetch, younger_than=0)) == "canary-token-3"


def test_a_token_counts_from_the_moment_it_was_asked_for(cache, clock) -> None:
    fetch = Fetcher()

    def slow() -> AccessToken:
        clock.now += 30
        return fetch()

    get(cache, slow)
    assert value(get(cache, fetch, younger_than=30)) == "canary-token-2"


def test_a_token_from_the_future_is_not_trusted(cache, clock) -> None:
    fetch = Fetcher()
    get(cache, fetch)
    clock.now -= 1
    assert value(get(cache, fetch)) == "canary-token-2"


def test_only_the_very_token_that_was_refused_is_evicted(cache) -> None:
    fetch = Fetcher()
    refused = get(cache, fetch)
    newer = get(cache, fetch, younger_than=0)
    evict(cache, refused)
    assert get(cache, fetch) == newer
    evict(cache, newer)
    assert value(get(cache, fetch)) == "canary-token-3"
    evict(cache, newer)
    assert value(get(cache, fetch)) == "canary-token-3"


def test_a_failed_fetch_leaves_nothing_behind_and_lets_the_next_one_try(cache) -> None:
    def fail() -> AccessToken:
        raise PayrocError("authorize", "no")

    with pytest.raises(PayrocError):
        get(cache, fail)
    assert value(get(cache, Fetcher())) == "canary-token-1"


# --- the file ---------------------------------------------------------------------------------------------------------------


def test_the_file_is_encrypted_and_only_the_owner_can_open_it(folder) -> None:
    get(FileTokenCache(folder, CONNECTION, lock_seconds=1), Fetcher())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = sorted(path.suffix for path in folder.iterdir())
    assert files == [".lock", ".token"]
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"canary" not in path.read_bytes()
        assert "canary" not in path.name


@pytest.mark.parametrize(
    "other",
    [
        PayrocConnection(CONNECTION.api_url, CONNECTION.identity_url, "another-api-key"),
        PayrocConnection(CONNECTION.api_url, "https://other.example", CONNECTION.api_key),
        PayrocConnection("https://other.example/v1", CONNECTION.identity_url, CONNECTION.api_key),
    ],
    ids=["key", "identity", "api"],
)
def test_another_key_or_another_payroc_has_another_token_even_if_files_are_copied(folder, other) -> None:
    fetch = Fetcher()
    get(FileTokenCache(folder, CONNECTION, lock_seconds=1), fetch)
    (written,) = folder.glob("*.token")
    assert value(get(FileTokenCache(folder, other, lock_seconds=1), fetch)) == "canary-token-2"
    (copied,) = set(folder.glob("*.token")) - {written}
    copied.write_bytes(written.read_bytes())
    assert value(get(FileTokenCache(folder, other, lock_seconds=1), fetch)) == "canary-token-3"


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\xff" * 100])
def test_a_damaged_file_is_a_miss(folder, damage) -> None:
    fetch = Fetcher()
    cache = FileTokenCache(folder, CONNECTION, lock_seconds=1)
    get(cache, fetch)
    (path,) = folder.glob("*.token")
    path.write_bytes(damage)
    assert value(get(cache, fetch)) == "canary-token-2"
    assert value(get(cache, fetch)) == "canary-token-2"


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b'{"token": {"access_token": 5, "expires_in": 1}, "received_at": 1}', b"null"]
)
def test_a_file_with_odd_content_is_a_miss(folder, content) -> None:
    fetch = Fetcher()
    cache = FileTokenCache(folder, CONNECTION, lock_seconds=1)
    get(cache, fetch)
    (path,) = folder.glob("*.token")
    path.write_bytes(cache._fernet.encrypt(content))
    assert value(get(cache, fetch)) == "canary-token-2"


def test_a_link_in_place_of_the_lock_is_not_followed(folder, tmp_path) -> None:
    cache = FileTokenCache(folder, CONNECTION, lock_seconds=1)
    cache._lock_path.symlink_to(tmp_path / "elsewhere")
    assert value(get(cache, Fetcher())) == "canary-token-1"
    assert not (tmp_path / "elsewhere").exists()


def fail_to_write(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_token_that_can_not_be_written_is_still_given_out(folder, monkeypatch, caplog) -> None:
    cache = FileTokenCache(folder, CONNECTION, lock_seconds=1)
    monkeypatch.setattr("payroc_airflow.token_cache.tempfile.mkstemp", fail_to_write)
    assert value(get(cache, Fetcher())) == "canary-token-1"
    assert "No space left on device" in caplog.text


def test_a_refused_token_that_can_not_be_removed_is_not_given_out_again(folder, monkeypatch) -> None:
    cache, fetch = FileTokenCache(folder, CONNECTION, lock_seconds=1), Fetcher()
    refused = get(cache, fetch)
    monkeypatch.setattr(Path, "unlink", fail_to_write)
    evict(cache, refused)
    assert value(get(cache, fetch)) == "canary-token-2"
    assert value(get(cache, fetch)) == "canary-token-2"


def test_a_file_system_without_locks_shares_no_token(folder, monkeypatch, caplog) -> None:
    monkeypatch.setattr("payroc_airflow.token_cache.fcntl.flock", fail_to_write)
    cache, fetch = FileTokenCache(folder, CONNECTION, lock_seconds=1), Fetcher()
    assert [value(get(cache, fetch)) for _ in range(2)] == ["canary-token-1"] * 2
    assert "the file system locks no file" in caplog.text


def test_a_process_that_holds_the_lock_for_too_long_is_not_waited_for(folder) -> None:
    holder = FileTokenCache(folder, CONNECTION, lock_seconds=1)
    waiting = FileTokenCache(folder, CONNECTION, lock_seconds=0.2)
    fetch = Fetcher()
    kept = get(holder, fetch)

    async def ask() -> AccessToken:
        return fetch()

    async def compete() -> None:
        async with holder._locked() as locked:
            assert locked
            assert value(await waiting.get(ask, younger_than=0)) == "canary-token-2"
            await waiting.evict(kept)

    asyncio.run(compete())
    # It keeps its own to itself, and asks for no other.
    assert value(get(waiting, fetch)) == "canary-token-2"
    assert get(FileTokenCache(folder, CONNECTION, lock_seconds=1), fetch) == kept


def test_a_token_that_no_other_task_can_have_is_kept_until_payroc_refuses_it(folder, monkeypatch) -> None:
    monkeypatch.setattr("payroc_airflow.token_cache.tempfile.mkstemp", fail_to_write)
    cache, fetch = FileTokenCache(folder, CONNECTION, lock_seconds=1), Fetcher()
    refused = get(cache, fetch)
    assert get(cache, fetch) is refused
    evict(cache, refused)
    assert value(get(cache, fetch)) == "canary-token-2"


def test_a_file_is_opened_again_only_when_another_process_has_changed_it(folder, monkeypatch) -> None:
    fetch = Fetcher()
    cache, other = (
        FileTokenCache(folder, CONNECTION, lock_seconds=1),
        FileTokenCache(folder, CONNECTION, lock_seconds=1),
    )
    first = get(cache, fetch)
    assert get(cache, fetch) == first
    opened: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read_bytes(path))
    for _ in range(100):
        assert get(cache, fetch) == first
    assert opened == []
    evict(other, first)
    second = get(other, fetch)
    opened.clear()
    assert [value(get(cache, fetch)) for _ in range(100)] == ["canary-token-2"] * 100
    assert get(other, fetch) == second
    assert len(opened) == 2


@pytest.mark.parametrize("shared", [True, False])
def test_coroutines_that_want_a_token_at_once_ask_payroc_once(folder, shared) -> None:
    cache = FileTokenCache(folder, CONNECTION, lock_seconds=5) if shared else MemoryTokenCache()
    fetch = Fetcher()

    async def ask() -> AccessToken:
        await asyncio.sleep(0.1)
        return fetch()

    async def work() -> set[str]:
        return {value(token) for token in await asyncio.gather(*[cache.get(ask) for _ in range(64)])}

    assert (asyncio.run(work()), fetch.count) == ({"canary-token-1"}, 1)


def test_the_default_folder_is_this_users_in_the_temporary_directory() -> None:
    assert default_folder() == Path(tempfile.gettempdir()) / f"payroc-refunds-{os.geteuid()}"


# --- through the hook ---------------------------------------------------------------------------------------------------------


def ask_for_a_token(start, results, timeout_seconds: float) -> None:
    start.wait()
    try:
        results.put(value(PayrocHook(timeout_seconds=timeout_seconds).get_token()))
    except Exception as error:  # noqa: BLE001 - the parent must hear of it
        results.put(repr(error))


def test_forty_processes_that_start_together_ask_payroc_once(hook, payroc, reply) -> None:
    body = b'{"access_token": "canary-token-shared", "expires_in": 3600}'

    def slow(handler) -> None:
        time.sleep(0.3)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    payroc.on("POST", "/authorize", reply(raw=slow))
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=ask_for_a_token, args=(start, results, 60.0)) for _ in range(40)]
    for process in processes:
        process.start()
    start.set()
    got = [results.get(timeout=PATIENCE_SECONDS) for _ in processes]
    for process in processes:
        process.join()
    assert set(got) == {"canary-token-shared"}
    assert len(payroc.of("/authorize")) == 1


def test_threads_of_one_process_ask_payroc_once(hook, payroc) -> None:
    threads = [threading.Thread(target=hook.get_token) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(payroc.of("/authorize")) == 1


def test_hooks_share_a_token_and_a_refused_one_is_replaced_for_all(hook, payroc) -> None:
    refused = hook.get_token()
    other = PayrocHook(timeout_seconds=60)
    assert other.get_token() == refused
    hook.evict_token(refused)
    assert value(other.get_token()) == "canary-token-2"
    hook.evict_token(refused)
    assert value(hook.get_token()) == "canary-token-2"
    assert value(hook.get_token(younger_than=0)) == "canary-token-3"


def test_with_the_cache_switched_off_each_hook_keeps_its_own_token_in_memory(
    hook, payroc, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_TOKEN_CACHE", "false")
    get_settings.cache_clear()
    other = PayrocHook(timeout_seconds=60)
    assert [value(each.get_token()) for each in (hook, hook, other, other)] == ["canary-token-1"] * 2 + [
        "canary-token-2"
    ] * 2
    assert not (tmp_path / "tokens").exists()


def test_a_token_of_the_cache_is_masked_too(hook) -> None:
    from airflow.sdk._shared.secrets_masker import redact, reset_secrets_masker

    hook.get_token()
    reset_secrets_masker()
    PayrocHook().get_token()
    assert redact("a canary-token-1 b") == "a *** b"
