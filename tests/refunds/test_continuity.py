"""A ledger that was restored, lost, copied or asleep reads Payroc's lists on from where it had read them, and pays nothing twice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from include.payroc.errors import (
    PayrocError,
    PayrocIncompleteList,
    PayrocNoAnswer,
    PayrocProblem,
    PayrocUnexpectedAnswer,
)
from include.payroc.models import AccessToken, Refund
from include.refunds.gateway import Gateway
from include.refunds.keys import idempotency_key
from include.refunds.ledger import LedgerError, Task
from include.refunds.release import PreflightFailed
from include.refunds.report import follow_up_report, run_report
from include.refunds.send import Sent
from tests.conftest import Sandbox, running_sandbox
from tests.refunds.conftest import World
from tests.refunds.test_resolve import direct
from tests.refunds.test_restored import Backup, back_up, restore, run_restored

__all__ = ["back_up"]

TERMINAL, OTHER = "7701001", "7701002"
DAY = 24.0


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A Payroc of these tests alone: they move its clock."""
    with running_sandbox(tmp_path_factory.mktemp("payroc") / "sandbox.log", "--hang-seconds", "1") as found:
        yield found


@pytest.fixture
def sandbox(process: Sandbox) -> Sandbox:
    """Empty, and with the clock of this machine."""
    process.post("/_sandbox/reset")
    return process


@pytest.fixture(autouse=True)
def terminal(world: World) -> None:
    """The terminal has a name: Payroc is empty at the begin of each test."""
    world.terminal = TERMINAL


class Lists:
    """
    The gateway, with something in the way of lists.

    :param failures: what the list of a terminal ends with, by terminal.
    :param sent_with: hash of another API key than the gateway's.
    """

    def __init__(
        self, world: World, failures: dict[str, PayrocError] | None = None, *, sent_with: str | None = None
    ) -> None:
        self._gateway: Gateway = world.gateway
        self._failures = failures or {}
        self.environment = world.gateway.environment
        self.sent_with = sent_with or world.gateway.sent_with
        self.asked: list[tuple[str, datetime | None, datetime | None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gateway, name)

    async def list_refunds(
        self, token: AccessToken, *, processing_terminal_id: str, **filters: Any
    ) -> AsyncIterator[Refund]:
        self.asked.append((processing_terminal_id, filters.get("date_from"), filters.get("date_to")))
        listed = self._gateway.list_refunds(token, processing_terminal_id=processing_terminal_id, **filters)
        failure = self._failures.get(processing_terminal_id)
        if failure is None or isinstance(failure, PayrocIncompleteList):
            async for item in listed:
                yield item
        if failure is not None:
            raise failure


NO_ANSWER = PayrocNoAnswer("list refunds", "no answer came")
HIDDEN = PayrocIncompleteList("list refunds", 1, ["order SO-1"])
FORBIDDEN = PayrocProblem(
    "list refunds", "forbidden", http_status=403, problem_type="forbidden", resource="terminal"
)


def pass_days(world: World, days: float) -> None:
    """Let time pass at Payroc and in the ledger."""
    world.sandbox.post("/_sandbox/clock", {"advanceSeconds": days * 86_400})
    world.hours_ahead += days * DAY


def run(world: World, run_id: str | None = None) -> str:
    """Do what a run of payroc_refunds does, and return its id."""
    run_id = run_id or f"run-{uuid4()}"
    world.run(world.ledger.runs.return_stale_releases())
    world.pull()
    for refund_id in world.release(run_id):
        world.send(refund_id)
    world.write_back()
    return run_id


def paid(world: World, source_ref: str) -> int:
    """Return how many refunds Payroc holds under the key of a source row."""
    key = str(idempotency_key(world.settings.source, source_ref))
    found = world.sandbox.get("/_sandbox/refunds")["refunds"]
    return sum(item["idempotencyKey"] == key for item in found)


def requests(world: World, operation: str = "list") -> int:
    """Return how many requests of a kind Payroc has answered, each page of a list as one; a token of before the reset is refused."""
    found = world.sandbox.get(f"/_sandbox/requests?operation={operation}")["requests"]
    return sum(item["status"] in (200, 201) for item in found)


def terminal_row(world: World, terminal: str = TERMINAL) -> dict[str, Any]:
    (row,) = world.rows("SELECT * FROM refund_ledger.terminals WHERE terminal = :it", it=terminal)
    return row


def change_list(world: World, assignment: str, terminal: str = TERMINAL) -> None:
    with world.ledger_engine.begin() as connection:
        connection.execute(
            text(f"UPDATE refund_ledger.terminals SET {assignment} WHERE terminal = :it"), {"it": terminal}
        )


def unfinished(world: World, run_id: str) -> list[str]:
    return world.run(run_report(world.ledger.engine, world.settings.source, run_id)).unfinished


def approve_again(world: World, source_ref: str, *changes: str) -> None:
    """Approve a row again that has ended, as an approver does who sees it without a status."""
    approved = f"approved_at = now() + interval '{world.hours_ahead - 1} hours'"
    world.change_source(source_ref, ", ".join(("status = NULL", approved, *changes)))


CHANGES = {
    "approved again": (),
    "another order id": ("order_id = 'NEW-1'",),
    "another terminal": (f"processing_terminal_id = '{OTHER}'",),
    "another amount": ("amount = 5099",),
    "all of it": ("order_id = 'NEW-1'", f"processing_terminal_id = '{OTHER}'", "amount = 5099"),
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_a_row_that_a_restored_ledger_forgot_is_not_paid_again_when_it_is_approved_again(
    world: World, back_up: Callable[[], Backup], changes: tuple[str, ...]
) -> None:
    first = world.approve()
    run(world)
    backup = back_up()
    forgotten = world.approve()
    run(world)
    assert (paid(world, first), paid(world, forgotten)) == (1, 1)
    restore(world, backup)
    pass_days(world, 8)
    approve_again(world, forgotten, *changes)
    run(world)
    run(world)
    assert paid(world, forgotten) == 1
    assert list(world.paused()) == ["*"]
    assert "Run `python -m include.refunds restored` before you resume." in world.paused()["*"]


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_a_row_that_a_lost_ledger_forgot_is_not_paid_again_when_it_is_approved_again(
    world: World, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "settings", world.settings.model_copy(update={"terminals": (TERMINAL,)}))
    forgotten = world.approve()
    run(world)
    world.lose_the_ledger()
    pass_days(world, 8)
    approve_again(world, forgotten, *changes)
    run(world)
    run(world)
    assert paid(world, forgotten) == 1


def test_a_copy_of_the_ledger_that_is_used_later_does_not_pay_what_the_other_one_paid(
    world: World, back_up: Callable[[], Backup]
) -> None:
    run(world)
    waiting = world.approve()
    world.pull()
    copy = back_up()
    run(world)
    assert paid(world, waiting) == 1
    pass_days(world, 8)
    restore(world, copy)
    pass_days(world, 0)
    approve_again(world, waiting)
    run(world)
    assert (paid(world, waiting), world.row(waiting)["status"]) == (1, "accepted")
    assert list(world.paused()) == ["*"]


def test_what_was_forgotten_is_adopted_with_an_event_of_its_own(
    world: World, back_up: Callable[[], Backup]
) -> None:
    world.approve()
    run(world)
    source_ref = world.approve()
    world.pull()
    backup = back_up()
    run(world)
    payroc_refund_id = world.row(source_ref)["payroc_refund_id"]
    restore(world, backup)
    world.follow_up()
    row = world.row(source_ref)
    assert (row["status"], row["payroc_refund_id"]) == ("accepted", payroc_refund_id)
    events = world.rows("SELECT refund_id, detail FROM refund_ledger.refund_events WHERE event = 'recovered'")
    assert events == [{"refund_id": row["id"], "detail": {"payroc_refund_id": payroc_refund_id}}]


# -- objects that no refund has ------------------------------------------------------------------------------


def read_lists(world: World) -> None:
    """Let a follow-up read the lists, whether or not they are due."""
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("UPDATE refund_ledger.terminals SET read_to = read_to - interval '2 days'")
    world.follow_up()


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_a_pulled_row_whose_key_stands_on_a_list_goes_to_review_in_the_transaction_that_stores_it(
    world: World, back_up: Callable[[], Backup], changes: tuple[str, ...]
) -> None:
    world.approve()
    run(world)
    backup = back_up()
    forgotten = world.approve()
    run(world)
    payroc_refund_id = world.row(forgotten)["payroc_refund_id"]
    restore(world, backup)
    read_lists(world)
    approve_again(world, forgotten, *changes)
    world.pull()
    row = world.row(forgotten)
    assert (row["status"], row["payroc_refund_id"]) == ("review", payroc_refund_id)
    assert row["reason"] == (
        f"Payroc's refund {payroc_refund_id} carries the key of this one, which this ledger never sent."
    )
    assert list(world.paused()) == ["*"]


def test_restored_takes_over_a_refund_that_its_pull_sent_to_review(
    world: World, back_up: Callable[[], Backup]
) -> None:
    world.approve()
    run(world)
    backup = back_up()
    forgotten = world.approve()
    run(world)
    restore(world, backup)
    read_lists(world)
    approve_again(world, forgotten)
    world.pull()
    assert world.row(forgotten)["status"] == "review"
    run_restored(world, backup.at)
    assert world.row(forgotten)["status"] == "accepted"


PLAIN_ACCOUNT = "5566770001"


@pytest.mark.parametrize(
    ("columns", "status"),
    [
        ({}, "review"),
        ({"amount": 5000}, "approved"),
        ({"account_number": "5566770002"}, "approved"),
        ({"processing_terminal_id": OTHER}, "approved"),
    ],
    ids=["all alike", "another amount", "other last four", "another terminal"],
)
def test_an_object_without_custom_fields_stops_only_a_refund_like_it(
    world: World, columns: dict[str, Any], status: str
) -> None:
    refund_id = world.released()
    plain = direct(world, refund_id, None, orderId="BY-HAND")
    read_lists(world)
    like_it = world.approve(**({"account_number": PLAIN_ACCOUNT} | columns))
    world.pull()
    row = world.row(like_it)
    assert row["status"] == status
    if status == "review":
        assert f"Payroc's refund {plain} has the terminal and the order id of this one, or" in row["reason"]
        assert world.paused() == {}


def test_an_object_without_custom_fields_that_a_refund_owns_stops_no_other(world: World) -> None:
    refund_id = world.released()
    plain = direct(world, refund_id, None, orderId="BY-HAND")
    read_lists(world)
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET session_replication_role = replica")
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.refund_states SET status = 'accepted', payroc_refund_id = '{plain}' WHERE refund_id = {refund_id}"
        )
    like_it = world.approve(account_number=PLAIN_ACCOUNT)
    world.pull()
    assert world.row(like_it)["status"] == "approved"


def test_a_key_that_shows_on_a_list_after_the_pull_keeps_the_refund_from_the_gate(world: World) -> None:
    run(world)
    source_ref = world.approve()
    world.pull()
    # The reading and the pull saw neither each other's rows.
    with world.ledger_engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO refund_ledger.foreign_refunds VALUES ('FOREIGN001', :key, :terminal, 'any', 1, 'USD', "
                "NULL, 'ready', false, now())"
            ),
            {"key": idempotency_key(world.settings.source, source_ref), "terminal": TERMINAL},
        )
    assert world.release("run-2") == []
    assert world.row(source_ref)["status"] == "review"


# -- the claim and the last check ----------------------------------------------------------------------------

UNKNOWN_LIST = {
    "read too long ago": "read_to = refund_ledger.now() - interval '4 days 1 minute'",
    "read with another API key or host": "read_with = 'another'",
    "never read": "read_from = NULL, read_to = NULL, read_with = NULL",
}


@pytest.mark.parametrize("change", UNKNOWN_LIST.values(), ids=UNKNOWN_LIST.keys())
def test_a_first_attempt_is_not_claimed_while_the_list_of_its_terminal_is_not_known(
    world: World, change: str
) -> None:
    refund_id = world.released()
    change_list(world, change)
    result = world.send(refund_id)
    assert (result.sent, world.posts(refund_id)) == (Sent.NOT_RELEASED, 0)
    assert result.reason == (
        f"Not sent: Payroc's list of terminal {TERMINAL} is not read up to now with this API key; "
        "the next run reads it first."
    )


@pytest.mark.parametrize("change", UNKNOWN_LIST.values(), ids=UNKNOWN_LIST.keys())
def test_the_last_check_demands_the_list_of_a_first_attempt_as_the_claim_does(
    world: World, change: str
) -> None:
    refund_ids = [world.released(), world.released()]

    async def work() -> tuple[bool, bool]:
        checked, changed = [
            await world.ledger.claims.claim(
                refund_id,
                Task("run-1"),
                environment=world.gateway.environment,
                sent_with=world.gateway.sent_with,
                token_seconds=3600,
            )
            for refund_id in refund_ids
        ]
        assert checked is not None
        assert changed is not None
        before = await world.ledger.claims.may_post(checked, 1)
        change_list(world, change)
        return before, await world.ledger.claims.may_post(changed, 1)

    assert world.run(work()) == (True, False)


def test_a_later_attempt_is_sent_though_the_list_is_not_known(world: World) -> None:
    refund_id = world.released("9003")
    assert world.send(refund_id).sent is Sent.UNKNOWN
    change_list(world, "read_to = refund_ledger.now() - interval '5 days'")
    world.hours_ahead += 1
    assert world.send(refund_id).sent is Sent.ACCEPTED
    assert world.paid(refund_id) == 1


# -- lists that can't be read --------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [NO_ANSWER, HIDDEN], ids=["no answer", "not understood"])
def test_a_list_that_fails_leaves_the_refunds_of_its_terminal_waiting_and_the_run_red(
    world: World, failure: PayrocError
) -> None:
    waits, goes = world.approve(), world.approve(processing_terminal_id=OTHER)
    world.gateway = Lists(world, {TERMINAL: failure})
    run_id = run(world)
    assert (world.row(waits)["status"], world.row(goes)["status"]) == ("approved", "accepted")
    (sentence,) = unfinished(world, run_id)
    assert sentence.startswith(f"Payroc's list of terminal {TERMINAL} could not be read since ")
    assert sentence.endswith(
        " 1 refund waits for it: nothing is sent for the first time before the list is known."
    )


def test_a_list_that_could_be_read_again_is_no_longer_reported(world: World) -> None:
    world.approve()
    world.approve(processing_terminal_id=OTHER)
    gateway, world.gateway = world.gateway, Lists(world, {TERMINAL: NO_ANSWER})
    run(world)
    world.gateway = gateway
    assert unfinished(world, run(world)) == []


def test_when_no_list_can_be_read_the_release_is_tried_again(world: World) -> None:
    world.approve()
    world.gateway = Lists(world, {TERMINAL: NO_ANSWER})
    world.pull()
    with pytest.raises(PreflightFailed, match="nothing was released, try again later"):
        world.release("run-1")


def test_a_terminal_that_payroc_refuses_pauses_it_and_no_other_one(world: World) -> None:
    waits, goes = world.approve(), world.approve(processing_terminal_id=OTHER)
    world.gateway = Lists(world, {TERMINAL: FORBIDDEN})
    run(world)
    assert (world.row(waits)["status"], world.row(goes)["status"]) == ("approved", "accepted")
    assert list(world.paused()) == [TERMINAL]


def test_a_closed_terminal_at_which_nothing_waits_is_a_note_and_leaves_the_run_green(world: World) -> None:
    world.approve()
    run(world)
    pass_days(world, 4)
    world.approve(processing_terminal_id=OTHER)
    world.gateway = Lists(world, {TERMINAL: FORBIDDEN})
    run_id = run(world)
    report = world.run(run_report(world.ledger.engine, world.settings.source, run_id))
    assert report.unfinished == []
    assert any(f"Payroc's list of terminal {TERMINAL} could not be read" in note for note in report.notes)


def test_a_terminal_that_payroc_always_refused_is_not_asked_for_again_when_nothing_needs_it(
    world: World,
) -> None:
    typo = world.approve()
    gateway = Lists(world, {TERMINAL: FORBIDDEN})
    world.gateway = gateway
    run(world)
    world.run(world.ledger.decisions.cancel(int(world.row(typo)["id"]), "A typing error."))
    world.approve(processing_terminal_id=OTHER)
    gateway.asked.clear()
    run(world)
    assert {terminal for terminal, _, _ in gateway.asked} == {OTHER}


def test_objects_that_can_not_be_understood_are_accepted_by_restored_and_refunds_are_sent_again(
    world: World,
) -> None:
    source_ref = world.approve()
    world.gateway = Lists(world, {TERMINAL: HIDDEN})
    run(world)
    now = world.run(world.ledger.now())
    with pytest.raises(LedgerError, match="--accept-not-understood"):
        run_restored(world, now)
    run_restored(world, now, accept=True)
    assert world.run(world.ledger.pauses.resume("*", "Looked at them in the portal."))
    run(world)
    assert world.row(source_ref)["status"] == "accepted"
    (event,) = world.rows(
        "SELECT reason, detail FROM refund_ledger.refund_events WHERE event = 'not_understood'"
    )
    assert event["detail"]["objects"] == [f"order SO-1 of terminal {TERMINAL}"]


def test_restored_ends_though_a_terminal_was_closed_when_an_operator_accepts_that(world: World) -> None:
    world.approve()
    run(world)
    world.gateway = Lists(world, {TERMINAL: FORBIDDEN})
    now = world.run(world.ledger.now())
    with pytest.raises(
        LedgerError, match=f"^Payroc refuses the list of terminal {TERMINAL}, and a refund that"
    ):
        run_restored(world, now)
    found = run_restored(world, now, accept=True).comparison
    assert [item.sentence.partition(": ")[0] for item in found.differences] == [
        f"Payroc refuses the list of terminal {TERMINAL}",
        f"Refund 1 (order {world.row(1)['order_id']}) can't be compared",
    ]
    (event,) = world.rows("SELECT detail FROM refund_ledger.refund_events WHERE event = 'not_understood'")
    assert event["detail"]["objects"] == [f"the list of terminal {TERMINAL}"]
    assert world.run(world.ledger.pauses.resume("*", "The terminal was closed."))


class OnlyLately(Lists):
    """Payroc refuses a ``dateFrom`` that is older than so many days."""

    def __init__(self, world: World, days: int, parameters: tuple[str, ...]) -> None:
        super().__init__(world)
        self._oldest = datetime.now(UTC) - timedelta(days=days)
        self._refusal = PayrocProblem(
            "list refunds",
            "bad-request",
            http_status=400,
            problem_type="bad-request",
            parameters=parameters,
        )

    async def list_refunds(self, token: AccessToken, **filters: Any) -> AsyncIterator[Refund]:
        if filters.get("date_from") is not None and filters["date_from"] < self._oldest:
            raise self._refusal
        async for item in super().list_refunds(token, **filters):
            yield item


@pytest.mark.parametrize("parameters", [("dateFrom",), ()], ids=["named", "not named"])
def test_a_look_back_that_payroc_refuses_is_shortened_and_named_in_the_report(
    world: World, parameters: tuple[str, ...]
) -> None:
    source_ref = world.approve()
    world.gateway = OnlyLately(world, 30, parameters)
    run_id = run(world)
    assert world.row(source_ref)["status"] == "accepted"
    report = world.run(run_report(world.ledger.engine, world.settings.source, run_id))
    (note,) = [note for note in report.notes if "refuses to list" in note]
    begin = terminal_row(world)["read_from"]
    assert f"so the ledger knows only those from {begin:%-d %b %Y} on." in note
    assert timedelta(days=15) < datetime.now(UTC) - begin <= timedelta(days=30)


# -- how far and how often -----------------------------------------------------------------------------------


def test_a_reading_knows_the_list_up_to_a_day_before_it_began_and_goes_on_a_minute_earlier(
    world: World,
) -> None:
    world.approve()
    gateway = Lists(world)
    world.gateway = gateway
    run(world)
    first = terminal_row(world)
    ((_, begin, end),) = {asked for asked in gateway.asked if asked[1] is not None}
    assert (begin, end) == (first["read_from"], first["read_to"] + timedelta(days=1))
    assert end - begin == timedelta(days=180)
    pass_days(world, 3)
    gateway.asked.clear()
    world.approve()
    run(world)
    (again,) = {asked for asked in gateway.asked if asked[1] is not None}
    assert again[1] == first["read_to"] - timedelta(minutes=1)


def test_a_new_adopters_first_run_sends_all_its_refunds_after_one_page_per_terminal(world: World) -> None:
    refs = [world.approve(processing_terminal_id=(TERMINAL, OTHER)[number % 2]) for number in range(12)]
    run(world)
    assert {world.row(ref)["status"] for ref in refs} == {"accepted"}
    assert (requests(world), requests(world, "create")) == (2, 12)


@pytest.mark.parametrize("approved_days_ago", [0.1, 3, 60])
def test_a_refund_of_any_age_is_sent_with_one_request_where_the_list_is_known(
    world: World, approved_days_ago: float
) -> None:
    world.approve()
    run(world)
    before = requests(world), requests(world, "create")
    approved_at = datetime.now(UTC) - timedelta(days=approved_days_ago)
    for _ in range(3):
        world.approve(approved_at=approved_at)
    run(world)
    # The run asks for one refund of the terminal, as it always did, and sends three.
    assert (requests(world), requests(world, "create")) == (before[0] + 1, before[1] + 3)


def test_a_monday_makes_no_request_of_its_own_where_the_follow_up_ran_at_the_weekend(world: World) -> None:
    world.approve()
    run(world)
    for _ in range(3):
        pass_days(world, 1)
        world.follow_up()
    world.approve()
    before = requests(world)
    run(world)
    assert requests(world) == before + 1


def test_another_api_key_lets_the_release_read_the_list_again(world: World) -> None:
    world.approve()
    run(world)
    world.gateway = Lists(world, sent_with="a new key")
    source_ref = world.approve()
    run(world)
    assert (world.row(source_ref)["status"], terminal_row(world)["read_with"]) == ("accepted", "a new key")


def test_the_follow_up_reads_a_list_about_once_a_day(world: World) -> None:
    world.approve()
    run(world)
    first = terminal_row(world)["read_to"]
    with world.ledger_engine.begin() as connection:
        # Nothing of the terminal is followed any more.
        connection.exec_driver_sql("SET session_replication_role = replica")
        connection.exec_driver_sql(
            "UPDATE refund_ledger.refund_states SET status = 'settled', updated_at = updated_at - interval '60 days'"
        )
    world.follow_up()
    assert terminal_row(world)["read_to"] == first
    pass_days(world, 1.1)
    world.follow_up()
    assert terminal_row(world)["read_to"] > first + timedelta(days=1)


def test_the_setting_names_terminals_that_no_row_names(world: World) -> None:
    world.approve()
    gateway = Lists(world)
    world.gateway = gateway
    world.settings = world.settings.model_copy(update={"terminals": (OTHER,)})
    run(world)
    assert {terminal for terminal, _, _ in gateway.asked} == {TERMINAL, OTHER}


def test_a_ledger_that_is_bound_to_no_payroc_yet_reads_nothing_in_a_follow_up(world: World) -> None:
    world.approve()
    world.pull()
    world.follow_up()
    assert (requests(world), terminal_row(world)["read_to"]) == (0, None)


# -- the report ----------------------------------------------------------------------------------------------


def test_the_report_names_refunds_on_our_terminals_that_were_made_elsewhere(world: World) -> None:
    refund_id = world.released()
    by_hand = direct(world, refund_id, [{"name": "who", "value": "the portal"}], orderId="BY-HAND")
    other_ledger = direct(world, refund_id, [{"name": "refundKey", "value": str(uuid4())}], orderId="THEIRS")
    read_lists(world)
    notes = world.run(follow_up_report(world.ledger.engine, world.settings.source)).notes
    assert (
        "Payroc lists refunds that were made elsewhere on the terminals of this ledger: 1 refund, 49.99 USD "
        f"({by_hand} of terminal {TERMINAL}, order BY-HAND, 49.99 USD)."
    ) in notes
    assert any(
        "carry a key of this project that no refund here has" in note and other_ledger in note
        for note in notes
    )


def test_an_answer_in_another_format_is_no_list(world: World) -> None:
    world.approve()
    world.gateway = Lists(
        world, {TERMINAL: PayrocUnexpectedAnswer("list refunds", "not JSON", http_status=502)}
    )
    world.pull()
    with pytest.raises(PreflightFailed):
        world.release("run-1")
    assert terminal_row(world)["read_to"] is None
