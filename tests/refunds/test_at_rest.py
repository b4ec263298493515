"""Requests at rest: another key, a lost key, and their end."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

from include.refunds.case import DecisionRefused
from include.refunds.cipher import Cipher, Sealed
from include.refunds.keys import key_id
from include.refunds.ledger import LedgerError
from include.refunds.reissue import reissue
from include.refunds.roles import KEY_ROTATOR
from include.refunds.rotate import Rotated, rotate_keys
from include.refunds.send import Sent
from include.refunds.settings import Settings, SettingsError, get_settings
from include.refunds.states import Status
from tests.conftest import Login
from tests.dags.conftest import Runner
from tests.dags.conftest import run_dag as run_dag
from tests.refunds.conftest import Death, World, die
from tests.refunds.test_ledger_rules import change, force
from tests.refunds.test_roles import command

OLD = os.environ["PAYROC_REFUNDS_ENCRYPTION_KEYS"]
NEW = "bmV3LWZlcm5ldC1rZXktb2YtdGhlLXRlc3RzLS0tLSE="
LOST = "bG9zdC1mZXJuZXQta2V5LW9mLXRoZS10ZXN0cy0tLSE="
# What the ledger demands of one state or another.
STATE = (
    "attempts = 1, first_sent_at = now(), sent_with = 'x', lease_until = now(), fence_until = now(), "
    "next_attempt_at = now(), released_by = 'x', released_at = now(), holds = '{x}'"
)
FINAL = (Status.SETTLED, Status.RETURNED, Status.REVERSED, Status.REJECTED, Status.CANCELLED)


@pytest.fixture
def world(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The world, which rotates two requests at a time."""
    monkeypatch.setattr("include.refunds.rotate._BATCH", 2)
    return world


def cipher(*keys: str) -> Cipher:
    return Cipher(Settings(encryption_keys=",".join(keys)))


def rotate(world: World, *keys: str, advance: Callable[[int], None] = lambda count: None) -> Rotated:
    return world.run(rotate_keys(world.ledger.requests, cipher(*keys), advance=advance))


def bodies(world: World, *keys: str) -> list[bytes]:
    """Return every frozen body, opened with these keys alone."""
    return [
        cipher(*keys).open(bytes(row["request"]), row["request_sha256"], row["id"], row["request_key"])
        for row in world.rows(
            "SELECT * FROM refund_ledger.frozen_requests JOIN refund_ledger.refund_instructions ON id = refund_id "
            "WHERE request IS NOT NULL ORDER BY id"
        )
    ]


def keys_of(world: World) -> dict[str, int]:
    return world.run(world.ledger.requests.requests_by_key())


# -- another key -----------------------------------------------------------------------------------------------------------


def test_after_a_rotation_the_old_key_can_be_taken_away_and_the_same_bytes_are_sent(
    world: World, ledger_url: URL, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [world.released() for _ in range(3)]
    # From before the ledger noted keys.
    force(world, ids[0], "request_key = NULL")
    before = bodies(world, OLD)
    monkeypatch.setenv("PAYROC_REFUNDS_ENCRYPTION_KEYS", f"{NEW},{OLD}")
    get_settings.cache_clear()
    shown = command(login(ledger_url, KEY_ROTATOR), "rotate-keys")
    assert f"3 requests were encrypted anew with the key {key_id(NEW)}." in shown
    assert f"key {key_id(NEW)} (the first): 3 requests" in shown
    assert bodies(world, NEW) == before
    world.cipher = cipher(NEW)
    assert [world.send(refund_id).sent for refund_id in ids] == [Sent.ACCEPTED] * 3
    events = world.rows(
        "SELECT actor, login, reason FROM refund_ledger.refund_events WHERE event = 'rotation'"
    )
    name = login(ledger_url, KEY_ROTATOR).username
    assert [tuple(row.values()) for row in events] == [
        ("rotate-keys", name, f"3 requests are encrypted with the key {key_id(NEW)} now.")
    ]
    assert "intact" in command(ledger_url, "verify-audit")


def test_a_rotation_that_was_killed_goes_on_where_it_stopped(world: World) -> None:
    for _ in range(5):
        world.approve()
    world.pull()
    advanced: list[int] = []
    with pytest.raises(Death):
        rotate(world, NEW, OLD, advance=lambda count: die())
    assert keys_of(world) == {key_id(NEW): 2, key_id(OLD): 3}
    done = [
        row["request"]
        for row in world.rows("SELECT request FROM refund_ledger.frozen_requests ORDER BY refund_id LIMIT 2")
    ]
    assert rotate(world, NEW, OLD, advance=advanced.append) == Rotated(done=3)
    assert advanced == [2, 1]
    assert keys_of(world) == {key_id(NEW): 5}
    assert [
        row["request"]
        for row in world.rows("SELECT request FROM refund_ledger.frozen_requests ORDER BY refund_id LIMIT 2")
    ] == done
    assert rotate(world, NEW, OLD) == Rotated()


def test_the_service_goes_on_between_two_batches(world: World) -> None:
    # Both keys are given to every process before; this one still encrypts with the old one.
    world.cipher = cipher(OLD, NEW)
    ended = world.released("9002")
    world.send(ended)
    sent, *_ = [world.released() for _ in range(5)]
    force(world, ended, "updated_at = now() - interval '31 days'")
    # What was rotated first is sent as well as what waits for its turn.
    ids = [
        row["id"]
        for row in world.rows("SELECT id FROM refund_ledger.refunds WHERE status = 'released' ORDER BY id")
    ]
    pulled: list[str] = []

    def meanwhile(count: int) -> None:
        if not pulled:
            pulled.append(world.approve())
            world.pull()
            assert world.send(ids[0]).sent is Sent.ACCEPTED
            assert world.send(ids[-1]).sent is Sent.ACCEPTED
            assert world.follow_up()["emptied"] == 1

    with ThreadPoolExecutor(1) as beside:
        rotated = rotate(world, NEW, OLD, advance=lambda count: beside.submit(meanwhile, count).result())
    assert rotated.unreadable == []
    assert keys_of(world) == {key_id(NEW): 6}
    assert world.row(ended)["request"] is None
    assert world.row(pulled[0])["status"] == "approved"
    assert world.paid(sent) == 1
    assert len(bodies(world, NEW)) == 6


def test_a_request_that_was_emptied_while_it_was_encrypted_anew_stays_empty(world: World) -> None:
    refund_id = world.released("9002")
    world.send(refund_id)

    async def work() -> int:
        (kept,) = await world.ledger.requests.requests_to_rotate("other", after=0, limit=10)
        change(world, refund_id, "request = NULL")
        return await world.ledger.requests.store_rotated([(kept, Sealed(b"anew", "other"))])

    assert world.run(work()) == 0
    assert world.row(refund_id)["request"] is None


def test_requests_that_no_key_opens_are_named_and_the_others_are_encrypted_anew(
    world: World, ledger_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = world.released()
    world.cipher = cipher(LOST)
    for _ in range(2):
        world.approve()
    world.pull()
    world.cipher = cipher(OLD)
    for _ in range(2):
        world.approve()
    world.pull()
    force(world, lost, "request = 'not a token'")
    monkeypatch.setenv("PAYROC_REFUNDS_ENCRYPTION_KEYS", f"{NEW},{OLD}")
    get_settings.cache_clear()
    shown = " ".join(command(ledger_url, "rotate-keys", exit_code=1).split())
    assert (
        f"The request of refund {lost} can't be opened though its key {key_id(OLD)} is there: the row was changed"
        in shown
    )
    for refund_id in (lost + 1, lost + 2):
        assert (
            f"The request of refund {refund_id} was encrypted with the key {key_id(LOST)}, which is not among"
            in shown
        )
    assert keys_of(world) == {key_id(NEW): 2, key_id(OLD): 1, key_id(LOST): 2}
    assert f"key {key_id(LOST)} (not set here): 2 requests" in shown


# -- a lost key ------------------------------------------------------------------------------------------------------------


def test_a_refund_whose_key_is_lost_is_not_sent_says_which_key_it_needs_and_pauses_nothing(
    world: World,
) -> None:
    first, second = world.released(), world.released()
    world.cipher = cipher(NEW)
    result = world.send(first)
    assert (result.sent, result.stops_all, world.paused()) == (Sent.CONFIGURATION, False, {})
    assert result.reason == (
        f"The request of refund {first} was encrypted with the key {key_id(OLD)}, which is not among PAYROC_REFUNDS_ENCRYPTION_KEYS; "
        "put that key back, after the first."
    )
    assert (world.row(first)["status"], world.posts(first)) == ("released", 0)
    world.cipher = cipher(NEW, OLD)
    assert [world.send(refund_id).sent for refund_id in (first, second)] == [Sent.ACCEPTED] * 2


def test_everything_but_the_sending_goes_on_without_any_key(
    world: World, run_dag: Runner, ledger_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A terminal of its own, because the local Payroc holds the refunds of other tests.
    doubtful, paid, waiting = (
        world.released(ending, processing_terminal_id="7701791") for ending in ("9006", "4321", "4321")
    )
    for refund_id in (doubtful, paid):
        world.send(refund_id)
    assert world.row(doubtful)["status"] == "unknown"
    world.sandbox.patch(f"/_sandbox/refunds/{world.row(paid)['payroc_refund_id']}", {"status": "complete"})
    for name in ("ENCRYPTION_KEYS", "FINGERPRINT_KEY"):
        monkeypatch.delenv(f"PAYROC_REFUNDS_{name}")
    run = run_dag("payroc_refunds_followup")
    assert run.state == "success", run.log
    assert [world.row(refund_id)["status"] for refund_id in (doubtful, paid, waiting)] == [
        "accepted",
        "settled",
        "released",
    ]
    assert world.source_row(world.row(paid)["source_ref"])["status"] == "settled"
    today = f"{world.run(world.ledger.now()):%Y-%m-%d}"
    for arguments in (
        ("status",),
        ("show", str(waiting)),
        ("limits",),
        ("verify-audit",),
        ("verify", "--from", today, "--to", today),
    ):
        command(ledger_url, *arguments)
    with pytest.raises(SettingsError, match="No encryption key: set PAYROC_REFUNDS_ENCRYPTION_KEYS"):
        Cipher(Settings())


def test_a_pull_with_another_fingerprint_key_is_refused_with_a_sentence_and_stores_nothing(
    world: World,
) -> None:
    world.approve()
    world.pull()
    before = world.rows("SELECT * FROM refund_ledger.refund_events")
    world.approve()
    world.cipher = Cipher(Settings(fingerprint_key="another fingerprint key, of 32 characters or more"))
    with pytest.raises(
        LedgerError,
        match=r"^PAYROC_REFUNDS_FINGERPRINT_KEY is not the key with which this ledger's fingerprints were made",
    ):
        world.pull()
    assert len(world.rows("SELECT * FROM refund_ledger.refunds")) == 1
    assert world.rows("SELECT * FROM refund_ledger.refund_events") == before


# -- the end of a request --------------------------------------------------------------------------------------------------


def test_the_follow_up_empties_the_requests_of_refunds_that_ended_long_ago_and_of_no_other(
    world: World,
) -> None:
    old, young = ([world.approve() for _ in Status] for _ in range(2))
    world.pull()
    for refs, days in ((old, 31), (young, 29)):
        for number, (ref, status) in enumerate(zip(refs, Status, strict=True)):
            changed = f"status = '{status}', payroc_refund_id = 'F{days}A{number:06}', updated_at = now() - interval '{days} days'"
            force(world, world.row(ref)["id"], f"{STATE}, {changed}")
    assert world.follow_up()["emptied"] == len(FINAL)
    for status, ref in zip(Status, old, strict=True):
        assert (world.row(ref)["request"] is None) == (status in FINAL), status
    assert all(world.row(ref)["request"] is not None for ref in young)


@pytest.mark.parametrize("status", [status for status in Status if status not in FINAL])
def test_the_database_refuses_to_empty_the_request_of_a_refund_that_has_not_ended(
    world: World, status: Status
) -> None:
    refund_id = world.released()
    force(world, refund_id, f"{STATE}, status = '{status}', payroc_refund_id = 'ABCDEFGHIJ'")
    with pytest.raises(DBAPIError, match=f"the request of a refund that is {status} is kept"):
        change(world, refund_id, "request = NULL")


def test_a_refund_whose_request_was_emptied_is_shown_and_not_reissued(world: World, ledger_url: URL) -> None:
    refund_id = world.released("9002")
    world.send(refund_id)
    before = world.row(refund_id)
    force(world, refund_id, "updated_at = now() - interval '31 days'")
    assert world.follow_up()["emptied"] == 1
    after = world.row(refund_id)
    assert (after["payee_last4"], after["payee_fingerprint"]) == (
        before["payee_last4"],
        before["payee_fingerprint"],
    )
    assert "rejected" in command(ledger_url, "show", str(refund_id))
    command(ledger_url, "status")
    work = reissue(
        refund_id,
        "seen",
        ledger=world.ledger,
        gateway=world.gateway,
        cipher=world.cipher,
        source=world.settings.source,
    )
    with pytest.raises(
        DecisionRefused,
        match=f"The request of refund {refund_id} was emptied, so there is nothing to send: approve it anew",
    ):
        world.run(work)
