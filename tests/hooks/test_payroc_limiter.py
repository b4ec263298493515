"""How many refunds are under way at a time, and how fast they follow: real processes of one host, and a server that counts."""

from __future__ import annotations

import asyncio
import fcntl
import multiprocessing
import os
import signal
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from include.payroc.errors import PayrocError
from include.refunds.settings import get_settings
from payroc_airflow import limiter as limiter_module
from payroc_airflow.gateway import HookGateway
from payroc_airflow.hooks.payroc import PayrocHook
from payroc_airflow.limiter import COUNT_EVERY_SECONDS, Limiter
from tests.patience import PATIENCE_SECONDS

# After so long everybody has counted the others anew.
COUNTED_SECONDS = 10 * COUNT_EVERY_SECONDS

PATH = "/v1/bank-transfer-refunds"
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "tokens"


@contextmanager
def processes(count: int, work: Callable[..., Any], *arguments: Any) -> Iterator[list[Any]]:
    """Processes that run a function; they are killed at the end, if they have not ended."""
    running = [FORK.Process(target=work, args=arguments, daemon=True) for _ in range(count)]
    for process in running:
        process.start()
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.join()


async def most_at_once(
    place: Callable[[], AbstractAsyncContextManager[None]], wanted: int, seconds: float = 0.1
) -> int:
    """Return how many of the wanted places are held at a time when each is held for so long."""
    held = most = 0

    async def hold() -> None:
        nonlocal held, most
        async with place():
            held += 1
            most = max(most, held)
            await asyncio.sleep(seconds)
            held -= 1

    await asyncio.gather(*[hold() for _ in range(wanted)])
    return most


class Counted:
    """
    Counts the requests that are at the server at a time.

    :param wanted: all wait until there are so many.
    """

    def __init__(self, wanted: int, seconds: float) -> None:
        self.most = 0
        self._now = 0
        self._wanted = wanted
        self._are_there = threading.Event()
        self._seconds = seconds
        self._lock = threading.Lock()

    def __call__(self, handler) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            if self.most >= self._wanted:
                self._are_there.set()
        self._are_there.wait(PATIENCE_SECONDS)
        time.sleep(self._seconds)
        with self._lock:
            self._now -= 1
        handler.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


# --- requests in flight ---------------------------------------------------------------------------------------------------


def send_together(ready: Any, token: Any, key: str, count: int) -> None:
    async def send(gateway: HookGateway) -> None:
        async with gateway.queue(), gateway.turn():
            try:
                await gateway.create_refund(token, key, b"{}")
            except PayrocError:
                return

    async def work() -> None:
        async with HookGateway(PayrocHook(timeout_seconds=PATIENCE_SECONDS)) as gateway:
            async with gateway.turn():
                pass
            ready.wait()
            # By then each knows of the others.
            await asyncio.sleep(1.2)
            await asyncio.gather(*[send(gateway) for _ in range(count)])

    asyncio.run(work())


def test_the_processes_of_a_host_share_the_requests_in_flight(
    hook, payroc, reply, token, key, monkeypatch
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_REQUESTS_IN_FLIGHT", "8")
    get_settings.cache_clear()
    counted = Counted(6, 0.1)
    payroc.on("POST", PATH, reply(raw=counted))
    with processes(4, send_together, FORK.Barrier(4), token, key, 10) as running:
        for process in running:
            process.join(PATIENCE_SECONDS)
        assert [process.exitcode for process in running] == [0] * 4
    assert len(payroc.of(PATH)) == 40
    assert 6 <= counted.most <= 8


@pytest.mark.parametrize(
    ("per_second", "most"), [(None, 8), (1000.0, 4)], ids=["no limit per second", "limit per second"]
)
def test_twice_as_many_queue_as_have_turns_and_under_a_limit_per_second_no_more(
    folder, per_second, most
) -> None:
    limiter = Limiter(folder, "a", 4, per_second)

    async def work() -> list[int]:
        return [await most_at_once(place, 20) for place in (limiter.queue, limiter.turn)]

    assert asyncio.run(work()) == [most, 4]


def test_the_queue_is_shared_halved_and_given_back_as_the_turns_are(folder) -> None:
    one, other = Limiter(folder, "a", 8, None), Limiter(folder, "a", 8, None)

    async def work() -> list[int]:
        most = [await most_at_once(one.queue, 30)]
        async with other.queue():
            await asyncio.sleep(COUNTED_SECONDS)
            most.append(await most_at_once(one.queue, 30))
            one.refused(None)
        other.leave()
        await asyncio.sleep(COUNTED_SECONDS)
        most.append(await most_at_once(one.queue, 30))
        for _ in range(40):
            one.answered()
        return [*most, await most_at_once(one.queue, 30)]

    assert asyncio.run(work()) == [16, 8, 4, 16]


def hold_a_turn(folder: Path, in_flight: int, held: Any) -> None:
    async def work() -> None:
        async with Limiter(folder, "a", in_flight, None).turn():
            held.set()
            await asyncio.sleep(PATIENCE_SECONDS)

    asyncio.run(work())


def test_what_a_killed_process_had_goes_to_the_others(folder) -> None:
    limiter = Limiter(folder, "a", 12, None)
    held = FORK.Event()

    async def work(process: Any) -> list[int]:
        most = [await most_at_once(limiter.turn, 20)]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        await asyncio.sleep(COUNTED_SECONDS)
        return [*most, await most_at_once(limiter.turn, 20)]

    with processes(1, hold_a_turn, folder, 12, held) as [process]:
        assert held.wait(PATIENCE_SECONDS)
        assert asyncio.run(work(process)) == [6, 12]
    limiter.leave()
    assert list(folder.glob("*.sending")) == []


def test_those_who_wait_take_up_what_has_become_free_though_no_turn_of_theirs_ends(
    folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So seldom that the wait for it shows.
    monkeypatch.setattr(limiter_module, "COUNT_EVERY_SECONDS", 0.5)
    other, limiter = Limiter(folder, "a", 2, None), Limiter(folder, "a", 2, None)

    async def work() -> float:
        async with other.turn(), limiter.turn():
            begun = time.monotonic()
            other.leave()
            async with asyncio.timeout(PATIENCE_SECONDS), limiter.turn():
                return time.monotonic() - begun

    assert asyncio.run(work()) > 0.1


def test_each_process_has_a_place_though_there_are_more_of_them(folder) -> None:
    limiters = [Limiter(folder, "a", 2, None) for _ in range(5)]

    async def work() -> list[int]:
        return [await most_at_once(limiter.turn, 4, 0.01) for limiter in limiters]

    assert asyncio.run(work())[2:] == [1, 1, 1]


def test_a_place_is_given_back_by_what_fails_and_by_what_is_cancelled(folder) -> None:
    limiter = Limiter(folder, "a", 1, None)

    async def fail() -> None:
        async with limiter.turn():
            raise ValueError("of the caller")

    async def hold() -> None:
        async with limiter.turn():
            await asyncio.sleep(PATIENCE_SECONDS)

    async def work() -> int:
        holding, waiting = asyncio.create_task(hold()), asyncio.create_task(hold())
        await asyncio.sleep(0.05)
        for task in (waiting, holding):
            task.cancel()
        # The place was handed on to one that is cancelled before it can take it.
        with pytest.raises(asyncio.CancelledError):
            await holding
        with pytest.raises(ValueError, match="of the caller"):
            await asyncio.wait_for(fail(), PATIENCE_SECONDS)
        return await asyncio.wait_for(most_at_once(limiter.turn, 3, 0.01), PATIENCE_SECONDS)

    assert asyncio.run(work()) == 1


def test_a_turn_that_is_handed_on_to_one_who_is_cancelled_goes_to_the_next(folder) -> None:
    limiter = Limiter(folder, "a", 1, None)
    begun: list[str] = []

    async def take(name: str) -> None:
        async with limiter.turn():
            begun.append(name)

    async def work() -> None:
        async with limiter.turn():
            first, second = asyncio.create_task(take("first")), asyncio.create_task(take("second"))
            await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait_for(second, PATIENCE_SECONDS)

    asyncio.run(work())
    assert begun == ["second"]


def test_a_loop_that_ended_in_the_middle_of_a_turn_takes_no_place_with_it(folder) -> None:
    limiter = Limiter(folder, "a", 1, None)
    abandoned = asyncio.new_event_loop()
    turn = limiter.turn()
    abandoned.run_until_complete(turn.__aenter__())
    abandoned.close()
    assert asyncio.run(asyncio.wait_for(most_at_once(limiter.turn, 2, 0.01), PATIENCE_SECONDS)) == 1


# --- 429 ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(hook, payroc, reply, token, key, monkeypatch) -> Callable[..., None]:
    """Return a function that sends one refund by a gateway, and lets Payroc answer with a status."""

    async def tell(gateway: HookGateway, status: int, headers: dict[str, str]) -> None:
        payroc.on("POST", PATH, reply(status, b"", headers))
        with pytest.raises(PayrocError):
            await gateway.create_refund(token, key, b"{}")

    monkeypatch.setenv("PAYROC_REFUNDS_REQUESTS_IN_FLIGHT", "8")
    get_settings.cache_clear()
    return tell


async def seconds_until_a_turn(limiter: Any) -> float:
    begun = time.monotonic()
    async with limiter.queue(), limiter.turn():
        return time.monotonic() - begun


@pytest.mark.parametrize("place", ["queue", "turn"])
@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (429, {}, 1),
        (429, {"Retry-After": "2"}, 2),
        (503, {"Retry-After": "1"}, 1),
        (503, {}, 0),
        (500, {"Retry-After": "2"}, 0),
    ],
)
def test_a_429_lets_nobody_queue_and_no_turn_begin_before_payroc_wants_one(
    told, hook, status, headers, wait, place
) -> None:
    async def work() -> tuple[float, float, float]:
        async with HookGateway(hook) as gateway:
            async with gateway.queue(), gateway.turn():
                begun = time.monotonic()
                await told(gateway, status, headers)
            pause, told_after = gateway._limiter._host.pause_left(), time.monotonic() - begun
            async with getattr(gateway, place)():
                return pause, told_after, time.monotonic() - begun

    pause, told_after, seconds = asyncio.run(work())
    assert wait - told_after <= pause <= wait <= seconds + 0.1


def test_429s_halve_the_places_once_for_all_that_was_under_way_and_answers_give_them_back(
    told, hook, payroc, reply, refund_body
) -> None:
    async def work() -> list[int]:
        async with HookGateway(hook) as gateway:
            limiter = gateway._limiter
            await asyncio.gather(*[told(gateway, 429, {}) for _ in range(8)])
            most = [await most_at_once(limiter.turn, 10)]
            await told(gateway, 429, {})
            most.append(await most_at_once(limiter.turn, 10))
            payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(200, refund_body))
            token = await gateway.token()
            for _ in range(40):
                await gateway.get_refund(token, "CD3HN88U9F")
            return [*most, await most_at_once(limiter.turn, 10)]

    assert asyncio.run(work()) == [4, 2, 8]


def test_the_last_place_is_never_taken(folder) -> None:
    limiter = Limiter(folder, "a", 4, None)

    async def work() -> int:
        for _ in range(4):
            limiter.refused(None)
            await asyncio.sleep(1.05)
        return await most_at_once(limiter.turn, 3, 0.01)

    assert asyncio.run(work()) == 1


def take_a_turn(folder: Path, per_second: float | None, results: Any) -> None:
    asyncio.run(seconds_until_a_turn(Limiter(folder, "a", 8, per_second)))
    results.put(time.monotonic())


def test_a_pause_is_for_all_processes_of_the_host(folder) -> None:
    limiter = Limiter(folder, "a", 8, None)
    results = FORK.Queue()
    begun = time.monotonic()
    limiter.refused(2)
    with processes(2, take_a_turn, folder, None, results):
        moments = [results.get(timeout=PATIENCE_SECONDS) for _ in range(2)]
    assert min(moments) > begun + 1.9


def test_another_account_is_neither_paused_nor_counted(folder) -> None:
    paused, other = Limiter(folder, "a", 8, None), Limiter(folder, "b", 8, None)
    asyncio.run(seconds_until_a_turn(paused))
    paused.refused(60)
    assert other._host.pause_left() == 0
    assert asyncio.run(most_at_once(other.turn, 10)) == 8


def test_nobody_sleeps_for_the_day_that_a_server_asks_for(folder) -> None:
    limiter = Limiter(folder, "a", 8, None)
    begun = time.monotonic()
    limiter.refused(86_400)
    left = limiter._host.pause_left()
    assert begun + 60 - time.monotonic() <= left <= 60


# --- refunds a second -------------------------------------------------------------------------------------------------------


def go_through(folder: Path, per_second: float, start: Any, results: Any) -> None:
    limiter = Limiter(folder, "a", 16, per_second)
    begun: list[float] = []

    async def take() -> None:
        async with limiter.queue():
            begun.append(time.monotonic())
            async with limiter.turn():
                pass

    async def work() -> None:
        await asyncio.gather(*[take() for _ in range(60)])

    start.wait()
    asyncio.run(work())
    results.put(begun)


def test_processes_let_no_more_than_so_many_refunds_into_their_queues_a_second(folder) -> None:
    results = FORK.Queue()
    with processes(3, go_through, folder, 100, FORK.Barrier(3), results):
        begun = sorted(moment for _ in range(3) for moment in results.get(timeout=PATIENCE_SECONDS))
    assert len(begun) == 180
    # One tenth of leeway, and what a late wake-up may make up for.
    for first, last in ((0, 179), (0, 90), (90, 179)):
        assert last - first <= (begun[last] - begun[first]) * 110 + 10


def test_a_moment_from_before_the_host_started_anew_is_not_waited_for(folder) -> None:
    folder.mkdir(mode=0o700)
    for content in (struct.pack("<dd", 1e9, 1e9), struct.pack("<dd", float("nan"), float("inf")), b"abc"):
        (folder / "a.pace").write_bytes(content)
        assert asyncio.run(seconds_until_a_turn(Limiter(folder, "a", 8, 10))) < PATIENCE_SECONDS


def test_a_process_that_stopped_in_the_middle_of_a_step_is_not_waited_for(folder) -> None:
    limiter = Limiter(folder, "a", 8, 10)
    asyncio.run(seconds_until_a_turn(limiter))
    with (folder / "a.pace").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert 0.5 < asyncio.run(seconds_until_a_turn(limiter)) < PATIENCE_SECONDS


# --- the folder -------------------------------------------------------------------------------------------------------------


def test_what_is_shared_can_only_be_opened_by_the_owner_and_holds_nothing_but_moments(folder) -> None:
    limiter = Limiter(folder, "a", 8, 10)
    asyncio.run(seconds_until_a_turn(limiter))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.suffix or path.name: path.stat().st_size for path in folder.iterdir()} == {
        ".sending": 0,
        ".pace": 8,
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("per_second", [None, 20.0])
def test_a_folder_that_can_not_be_used_stops_no_refund_and_is_told_once(tmp_path, per_second, caplog) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "open", tmp_path / "file"):
        caplog.clear()
        limiter = Limiter(folder, "a", 3, per_second)
        begun = time.monotonic()
        assert (
            asyncio.run(
                most_at_once(limiter.queue if per_second else limiter.turn, 9, 0.5 if per_second else 0.01)
            )
            == 3
        )
        assert per_second is None or time.monotonic() - begun > 8 / per_second
        begun = time.monotonic()
        limiter.refused(None)
        left = limiter._host.pause_left()
        assert begun + 1 - time.monotonic() <= left <= 1
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "each keeps to PAYROC_REFUNDS_REQUESTS_IN_FLIGHT" in caplog.text


def test_a_gateway_that_sends_nothing_leaves_no_trace(hook, payroc, folder) -> None:
    async def work() -> None:
        async with HookGateway(hook) as gateway:
            await gateway.token()

    asyncio.run(work())
    assert {path.suffix for path in folder.iterdir()} == {".token", ".lock"}


def use_in_a_fork(limiter: Limiter, results: Any) -> None:
    results.put(
        (
            asyncio.run(most_at_once(limiter.turn, 9)),
            sorted(path.name for path in limiter._host._folder.glob("*.sending")),
        )
    )


def test_a_forked_process_is_one_more(folder) -> None:
    limiter = Limiter(folder, "a", 8, None)
    asyncio.run(most_at_once(limiter.turn, 1))
    [mine] = folder.glob("*.sending")
    results = FORK.Queue()
    with processes(1, use_in_a_fork, limiter, results):
        most, names = results.get(timeout=PATIENCE_SECONDS)
    assert (most, len(names), mine.name in names) == (4, 2, True)
