"""
Under a real scheduler each refund is paid exactly once by Payroc's own record and none is lost, whatever dies and whatever people press.

Airflow runs as API server, scheduler with LocalExecutor and DAG processor, with a Postgres of its own, and is driven over its REST
API. It delivers a task at least once: it tries killed tasks again, runs an orphan beside its retry, runs again what is cleared, and
believes people who mark a task as success. The ledger makes all of that harmless.

The short form is one run in which everything goes wrong at once, and what people may press afterwards. The rest needs ``--long``.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import pytest
from sqlalchemy import text

from tests.scheduler.client import TaskInstance
from tests.scheduler.conftest import Merchant
from tests.scheduler.deployment import DAG, OVERLAPPING_DAG, RETRY_AFTER_SECONDS, UNKNOWN_WAIT_SECONDS

Measured = Callable[..., None]


@pytest.fixture
def only_long(long: bool) -> None:
    if not long:
        pytest.skip("runs with --long only: it takes up to two minutes")


def assert_cut_off(merchant: Merchant, source_ref: str) -> None:
    """The blow fell in time: whoever made the last attempt has not recorded what Payroc answered."""
    attempt = merchant.attempt_row(source_ref)
    assert attempt is not None
    assert attempt["outcome"] is None, f"the worker of {source_ref} had already recorded {attempt['outcome']}"


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def orphaned(merchant: Merchant, ti: TaskInstance) -> psutil.Process:
    """Kill the supervisor of a task, and freeze the task's process."""
    supervisor, orphan = merchant.airflow.supervisor(ti), merchant.airflow.task_process(ti)
    supervisor.kill()
    # The kernel sends a SIGHUP to a frozen process that loses its supervisor, so it is frozen after that.
    merchant.wait_until(lambda: orphan.ppid() != supervisor.pid, "the supervisor's last thread dies")
    orphan.suspend()
    return orphan


def thaw(frozen: Iterable[psutil.Process]) -> None:
    """Let processes continue. One that stays frozen would keep all later tests from starting."""
    for process in frozen:
        with suppress(psutil.NoSuchProcess):
            process.resume()


# -- one run in which everything goes wrong --------------------------------------------------------------------------------


@dataclass
class TroubledRun:
    """A run that has ended, and what was seen of it."""

    run_id: str
    state: str
    seconds: float
    refs: dict[str, str]
    orphan_seconds: float
    side_by_side_seconds: float


@pytest.fixture(scope="module")
def troubled(merchant: Merchant) -> TroubledRun:
    """One run of seven refunds: two lose their worker in the middle of the create, and Payroc gives four more trouble."""
    airflow = merchant.airflow
    refs = {
        "killed": merchant.approve(),
        "orphaned": merchant.approve(),
        "rejected": merchant.approve("9002"),
        "limited": merchant.approve(),
        "failed": merchant.approve("9005"),
        "unanswered": merchant.approve("9009"),
        "untroubled": merchant.approve(),
    }
    # Payroc pays what the killed task asked for, when nobody is there any more to hear of it.
    merchant.hold(refs["killed"])
    # Payroc never gets to work on the orphan's create. That of the next attempt is slow, so that both are under way at once.
    merchant.trouble(refs["orphaned"], "hang", seconds=60)
    merchant.trouble(refs["orphaned"], "slow", seconds=2)
    merchant.trouble(refs["limited"], "status", status=429, retryAfterSeconds=RETRY_AFTER_SECONDS)
    orphans: list[tuple[psutil.Process, float]] = []

    def blow(source_ref: str) -> None:
        ti = merchant.task_of(source_ref)
        if source_ref == refs["killed"]:
            killed = airflow.task_process(ti)
            # Frozen, it hears nothing, and its supervisor waits: the payment comes before the next try.
            killed.suspend()
            merchant.let_go(source_ref)
            merchant.wait_until(lambda: merchant.refunds_at_payroc(source_ref), "Payroc pays")
            killed.kill()
        else:
            # Frozen in the middle of its create, the orphan outlives its lease.
            orphans.append((orphaned(merchant, ti), time.monotonic()))
        assert_cut_off(merchant, source_ref)

    begin = time.monotonic()
    run_id = airflow.client.trigger(DAG)
    try:
        merchant.strike([refs["killed"], refs["orphaned"]], blow)
        [(orphan, orphaned_at)] = orphans
        merchant.wait_until(
            lambda: merchant.task_of(refs["orphaned"]).try_number > 1, "the orphaned task is tried again"
        )
        retried_at = time.monotonic()
        merchant.wait_until(
            lambda: merchant.troubles_left(refs["orphaned"]) == 0, "the retry sends its create"
        )
        assert not has_ended(orphan), "the orphan died although it was frozen"
    finally:
        thaw(orphan for orphan, _ in orphans)
    merchant.wait_until(lambda: has_ended(orphan), "the orphan ends")
    ended_at = time.monotonic()
    state = airflow.client.wait_for_run(DAG, run_id, "success", "failed")
    return TroubledRun(
        run_id, state, time.monotonic() - begin, refs, ended_at - orphaned_at, ended_at - retried_at
    )


def test_a_run_in_which_everything_goes_wrong_pays_each_refund_once_and_ends_green(
    merchant: Merchant, troubled: TroubledRun, measured: Measured
) -> None:
    paid = [ref for name, ref in troubled.refs.items() if name != "rejected"]
    merchant.assert_paid_once(*paid)
    assert troubled.state == "success", merchant.airflow.client.errors(DAG, troubled.run_id)
    measured(
        refunds=len(paid),
        run_seconds=troubled.seconds,
        creates=sum(len(merchant.creates(ref)) for ref in paid),
    )


def test_a_task_killed_in_the_middle_of_its_create_is_tried_again_and_finds_what_it_paid(
    merchant: Merchant, troubled: TroubledRun, measured: Measured
) -> None:
    ref = troubled.refs["killed"]
    tries = merchant.task_of(ref).try_number
    assert tries > 1
    # The retry may send nothing while the lease lives, but may look up, and it found the payment.
    assert len(merchant.creates(ref)) == 1
    assert merchant.attempts(merchant.row(ref)["id"]) == [None]
    measured(tries=tries, creates=1)


def test_an_orphan_that_thaws_while_the_retry_sends_cannot_pay_again_or_spoil_the_record(
    merchant: Merchant, troubled: TroubledRun, measured: Measured
) -> None:
    ref = troubled.refs["orphaned"]
    creates = merchant.creates(ref)
    assert [entry["status"] for entry in creates] == [None, 201]
    # What the orphan wrote stands at its own attempt, not at the refund.
    assert merchant.attempts(merchant.row(ref)["id"]) == ["unknown", "accepted"]
    assert len({entry["idempotencyKey"] for entry in creates}) == 1
    measured(
        orphan_outlived_its_supervisor_seconds=troubled.orphan_seconds,
        orphan_and_retry_side_by_side_seconds=troubled.side_by_side_seconds,
        creates=len(creates),
    )


def test_a_rejected_refund_is_sent_once_and_never_tried_again(
    merchant: Merchant, troubled: TroubledRun
) -> None:
    ref = troubled.refs["rejected"]
    ti = merchant.task_of(ref)
    assert (ti.state, ti.try_number) == ("failed", 1)
    assert len(merchant.creates(ref)) == 1
    assert merchant.refunds_at_payroc(ref) == []
    assert [merchant.row(ref)["status"], merchant.source_row(ref)["status"]] == ["rejected", "rejected"]


def test_a_retry_after_of_payroc_is_waited_for_before_the_second_create(
    merchant: Merchant, troubled: TroubledRun, measured: Measured
) -> None:
    ref = troubled.refs["limited"]
    [waited] = merchant.waits(ref)
    assert waited >= RETRY_AFTER_SECONDS
    assert_one_wait_was_asked_for(merchant, ref, RETRY_AFTER_SECONDS)
    measured(retry_after=RETRY_AFTER_SECONDS, waited_seconds=waited)


def assert_one_wait_was_asked_for(merchant: Merchant, source_ref: str, seconds: float) -> None:
    """Airflow was asked for one wait of the right length, not for several tries that come too early."""
    ti = merchant.task_of(source_ref)
    attempt = merchant.attempt_row(source_ref)
    assert attempt is not None
    [asked] = merchant.airflow.retry_delays(DAG, attempt["run_id"], "send_refund", ti.map_index)
    # The policy adds a second.
    assert asked is not None
    assert asked <= seconds + 1
    assert ti.try_number == 2


@pytest.mark.parametrize("name", ["failed", "unanswered"])
def test_an_unknown_outcome_waits_as_long_as_the_setting_says_before_it_is_asked_about(
    merchant: Merchant, troubled: TroubledRun, measured: Measured, name: str
) -> None:
    ref = troubled.refs[name]
    attempts = merchant.rows(
        "SELECT outcome, http_status, started_at, finished_at FROM refund_ledger.refund_attempts WHERE refund_id = :id ORDER BY attempt",
        id=merchant.row(ref)["id"],
    )
    waited = (attempts[1]["started_at"] - attempts[0]["finished_at"]).total_seconds()
    assert waited >= UNKNOWN_WAIT_SECONDS
    assert len(attempts) == 2, attempts
    assert_one_wait_was_asked_for(merchant, ref, UNKNOWN_WAIT_SECONDS)
    if name == "failed":
        [between_creates] = merchant.waits(ref)
        assert between_creates >= UNKNOWN_WAIT_SECONDS
        measured(setting=UNKNOWN_WAIT_SECONDS, between_the_creates_seconds=between_creates)
    else:
        # Payroc had paid it before the answer was lost: the look-up finds it, and no second create is needed.
        assert len(merchant.creates(ref)) == 1
        measured(setting=UNKNOWN_WAIT_SECONDS, between_create_and_look_up_seconds=waited)


# -- what people may press -------------------------------------------------------------------------------------------------


def test_clearing_tasks_that_have_ended_well_or_badly_sends_nothing(
    merchant: Merchant, troubled: TroubledRun, measured: Measured
) -> None:
    client = merchant.airflow.client
    before = {
        ref: (merchant.creates(ref), merchant.task_of(ref).try_number) for ref in troubled.refs.values()
    }
    client.clear(DAG, troubled.run_id, "send_refund", downstream=True)
    client.wait_for_run(DAG, troubled.run_id, "success")
    for name, ref in troubled.refs.items():
        creates, tries = before[ref]
        ti = merchant.task_of(ref)
        assert (ti.state, ti.try_number) == ("failed" if name == "rejected" else "success", tries + 1)
        assert merchant.creates(ref) == creates
    merchant.assert_paid_once(*(ref for name, ref in troubled.refs.items() if name != "rejected"))
    measured(cleared=len(before), creates=0)


@contextmanager
def locked_source(merchant: Merchant) -> Iterator[None]:
    """Keep ``pull_approved`` waiting for the source meanwhile."""
    with merchant.source_engine.begin() as connection:
        connection.execute(text("LOCK TABLE refund_requests IN ACCESS EXCLUSIVE MODE"))
        yield


def test_an_approval_that_is_only_marked_as_success_releases_nothing_and_clearing_the_pull_heals_it(
    merchant: Merchant, measured: Measured
) -> None:
    client = merchant.airflow.client
    ref = merchant.approve()
    with locked_source(merchant):
        run_id = client.trigger(DAG)
        merchant.wait_until(
            lambda: client.task_instances(DAG, run_id)["pull_approved", -1].state == "running",
            "pull_approved runs",
        )
        client.set_state(DAG, run_id, "approve_run", "success")
    client.wait_for_run(DAG, run_id, "failed")
    found = {task_id: ti.state for (task_id, _), ti in client.task_instances(DAG, run_id).items()}
    assert found == {
        "pull_approved": "success",
        "approve_run": "success",
        "release": "failed",
        "send_refund": "upstream_failed",
        "write_back": "success",
        "report": "failed",
    }, client.errors(DAG, run_id)
    assert (merchant.row(ref)["status"], merchant.creates(ref)) == ("approved", [])

    client.clear(DAG, run_id, "pull_approved", downstream=True)
    client.wait_for_run(DAG, run_id, "success")
    merchant.assert_paid_once(ref)
    measured(creates_without_approval=0, creates_after_clearing=len(merchant.creates(ref)))


# -- at full size only -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_long")
def test_tasks_killed_in_the_middle_of_their_creates_never_pay_twice(
    merchant: Merchant, measured: Measured
) -> None:
    airflow = merchant.airflow
    refs = [merchant.approve() for _ in range(5)]
    # In turns Payroc pays what a dead task has asked for, and never gets to work on it.
    for number, ref in enumerate(refs):
        merchant.trouble(ref, "slow" if number % 2 else "hang", seconds=2)
    begin = time.monotonic()
    run_id = airflow.client.trigger(DAG)

    def kill(ref: str) -> None:
        airflow.task_process(merchant.task_of(ref)).kill()
        assert_cut_off(merchant, ref)

    merchant.strike(refs, kill)
    airflow.client.wait_for_run(DAG, run_id, "success")
    merchant.assert_paid_once(*refs)
    assert all(merchant.task_of(ref).try_number > 1 for ref in refs)
    measured(
        killed=len(refs),
        run_seconds=time.monotonic() - begin,
        creates=sum(len(merchant.creates(ref)) for ref in refs),
    )


@pytest.mark.usefixtures("only_long")
def test_orphans_and_their_retries_at_work_side_by_side_never_pay_twice(
    merchant: Merchant, measured: Measured
) -> None:
    airflow, lists, size = merchant.airflow, 5, 12
    refs = [merchant.approve() for _ in range(lists * size)]
    for ref in refs:
        merchant.trouble(ref, "slow", seconds=1.8)
    firsts = refs[::size]
    orphans: dict[int, psutil.Process] = {}
    begin = time.monotonic()
    run_id = airflow.client.trigger(DAG, batch_size=size)

    def orphan_task(ref: str) -> None:
        ti = merchant.task_of(ref)
        # Frozen, so that it is still busy with its list when the scheduler has started another one.
        orphans[ti.map_index] = orphaned(merchant, ti)
        assert_cut_off(merchant, ref)

    try:
        merchant.strike(firsts, orphan_task)
        together = watch_side_by_side(merchant, run_id, orphans)
    finally:
        thaw(orphans.values())
    airflow.client.wait_for_run(DAG, run_id, "success")
    merchant.assert_paid_once(*refs)
    assert len(together) == lists, f"only so many orphans were seen beside their retry: {together}"
    by_try = merchant.rows(
        "SELECT (try_number = 1) AS orphan, count(*) AS count FROM refund_ledger.refund_attempts WHERE run_id = :run GROUP BY 1",
        run=run_id,
    )
    claims = {row["orphan"]: row["count"] for row in by_try}
    measured(
        supervisors_killed=lists,
        refunds=len(refs),
        side_by_side_seconds=" ".join(f"{seconds:.1f}" for seconds in together.values()),
        claimed_by_orphans=claims.get(True, 0),
        claimed_by_retries=claims.get(False, 0),
        creates=sum(len(merchant.creates(ref)) for ref in refs),
        run_seconds=time.monotonic() - begin,
    )


def watch_side_by_side(
    merchant: Merchant, run_id: str, orphans: dict[int, psutil.Process]
) -> dict[int, float]:
    """
    Thaw each orphan when its retry is at work, and watch until all have ended.

    :returns: for how many seconds each worked beside its retry, by map index.
    """
    started: dict[int, float] = {}
    together: dict[int, float] = {}

    def have_ended() -> bool:
        for index, orphan in orphans.items():
            ti = merchant.airflow.task_instance(DAG, run_id, "send_refund", index)
            if index not in started and ti.try_number > 1 and ti.state == "running":
                started[index] = time.monotonic()
                orphan.resume()
            elif index not in together and has_ended(orphan):
                together[index] = time.monotonic() - started.get(index, time.monotonic())
        return len(together) == len(orphans)

    merchant.wait_until(have_ended, "all orphans have ended")
    assert len(started) == len(orphans), "an orphan ended although it was frozen"
    return together


@pytest.mark.usefixtures("only_long")
def test_clearing_tasks_that_are_in_the_middle_of_their_creates_never_pays_twice(
    merchant: Merchant, measured: Measured
) -> None:
    client = merchant.airflow.client
    refs = [merchant.approve() for _ in range(4)]
    for number, ref in enumerate(refs):
        merchant.trouble(ref, "slow" if number % 2 else "hang", seconds=2)
    run_id = client.trigger(DAG)
    first_ids: dict[str, str] = {}

    def clear(ref: str) -> None:
        ti = merchant.task_of(ref)
        first_ids[ref] = ti.id
        client.clear(DAG, run_id, ("send_refund", ti.map_index))

    merchant.strike(refs, clear)
    client.wait_for_run(DAG, run_id, "success")
    merchant.assert_paid_once(*refs)
    assert all(merchant.task_of(ref).id != first_ids[ref] for ref in refs), "a cleared task was not run again"
    measured(cleared=len(refs), creates=sum(len(merchant.creates(ref)) for ref in refs))


@pytest.mark.usefixtures("only_long")
def test_clearing_a_failed_task_whose_refund_is_in_doubt_brings_it_to_its_end(
    merchant: Merchant, measured: Measured
) -> None:
    client = merchant.airflow.client
    ref = merchant.approve("9005")
    run_id = client.trigger(DAG)
    give_up_waiting(merchant, [ref], DAG)
    client.wait_for_run(DAG, run_id, "failed")
    assert merchant.row(ref)["status"] == "unknown"
    client.clear(DAG, run_id, "send_refund", downstream=True)
    client.wait_for_run(DAG, run_id, "success")
    merchant.assert_paid_once(ref)
    measured(creates=len(merchant.creates(ref)))


def give_up_waiting(merchant: Merchant, refs: Sequence[str], dag_id: str) -> None:
    """Mark the tasks of refunds as failed while they wait for their retry."""
    for ref in refs:
        merchant.wait_until(
            lambda ref=ref: (
                merchant.attempt_row(ref) and merchant.task_of(ref, dag_id).state == "up_for_retry"
            ),
            f"{ref} waits for its retry",
        )
        attempt = merchant.attempt_row(ref)
        assert attempt is not None
        merchant.airflow.client.set_state(
            dag_id, attempt["run_id"], "send_refund", "failed", attempt["map_index"]
        )


@pytest.mark.usefixtures("only_long")
def test_marking_tasks_as_success_in_the_middle_of_their_creates_loses_no_refund(
    merchant: Merchant, measured: Measured
) -> None:
    client = merchant.airflow.client
    paid_unseen, unpaid = refs = [merchant.approve(), merchant.approve()]
    merchant.trouble(paid_unseen, "slow", seconds=2)
    merchant.trouble(unpaid, "hang", seconds=60)
    run_id = client.trigger(DAG)

    def mark(ref: str) -> None:
        ti = merchant.task_of(ref)
        # Frozen, so that on a busy machine too it does not end before its supervisor has learned that it shall not run any more.
        merchant.airflow.task_process(ti).suspend()
        client.set_state(DAG, run_id, "send_refund", "success", ti.map_index)

    merchant.strike(refs, mark)
    client.wait_for_run(DAG, run_id, "failed")
    assert {merchant.task_of(ref).state for ref in refs} == {"success"}
    # Whatever Airflow believes, the ledger knows that these two have not ended, and the next run takes them up.
    assert [merchant.row(ref)["status"] for ref in refs] == ["sending", "sending"]
    client.wait_for_run(DAG, client.trigger(DAG), "success")
    merchant.assert_paid_once(*refs)
    measured(marked=len(refs), creates=sum(len(merchant.creates(ref)) for ref in refs))


@pytest.mark.usefixtures("only_long")
def test_marking_the_send_task_as_success_before_it_is_expanded_sends_nothing_and_the_next_run_sends(
    merchant: Merchant, measured: Measured
) -> None:
    client = merchant.airflow.client
    refs = [merchant.approve(), merchant.approve()]
    # The request before the release is slow, which keeps the send task from being expanded.
    merchant.sandbox.post("/_sandbox/faults", {"operation": "list", "kind": "slow", "seconds": 2})
    run_id = client.trigger(DAG)
    merchant.wait_until(lambda: not merchant.sandbox.get("/_sandbox/faults")["faults"], "release asks Payroc")
    client.set_state(DAG, run_id, "send_refund", "success")
    assert client.task_instances(DAG, run_id)["release", -1].state == "running", "release had ended already"
    client.wait_for_run(DAG, run_id, "failed")
    assert [(merchant.row(ref)["status"], len(merchant.creates(ref))) for ref in refs] == [
        ("released", 0),
        ("released", 0),
    ]
    client.wait_for_run(DAG, client.trigger(DAG), "success")
    merchant.assert_paid_once(*refs)
    measured(
        creates_of_the_marked_run=0, creates_of_the_next_run=sum(len(merchant.creates(ref)) for ref in refs)
    )


@pytest.mark.usefixtures("only_long")
def test_a_second_run_waits_until_the_first_has_ended_and_sends_nothing_again(
    merchant: Merchant, measured: Measured
) -> None:
    client = merchant.airflow.client
    ref = merchant.approve()
    merchant.trouble(ref, "slow", seconds=2)
    first, second = client.trigger(DAG), client.trigger(DAG)
    merchant.wait_until(lambda: merchant.troubles_left(ref) == 0, "the first run sends")
    begin = time.monotonic()
    while client.run_state(DAG, first) == "running":
        states = (client.run_state(DAG, second), client.run_state(DAG, first))
        assert states in {
            ("queued", "running"),
            ("queued", "success"),
            ("running", "success"),
            ("success", "success"),
        }, states
        time.sleep(0.1)
    measured(queued_seconds=time.monotonic() - begin)
    for run_id in (first, second):
        client.wait_for_run(DAG, run_id, "success")
    merchant.assert_paid_once(ref)
    assert len(merchant.creates(ref)) == 1
    # The second run was about nothing.
    assert merchant.rows(
        "SELECT candidates FROM refund_ledger.refund_runs WHERE run_id = :id", id=second
    ) == [{"candidates": 0}]


@pytest.mark.usefixtures("only_long")
def test_runs_that_overlap_and_send_the_same_refunds_pay_each_once(
    merchant: Merchant, measured: Measured
) -> None:
    client = merchant.airflow.client
    refs = [merchant.approve() for _ in range(6)]
    for ref in refs:
        merchant.trouble(ref, "slow", seconds=1.8)
    with locked_source(merchant):
        run_ids = [client.trigger(OVERLAPPING_DAG) for _ in range(3)]
        for run_id in run_ids:
            merchant.wait_until(
                lambda run_id=run_id: (
                    client.task_instances(OVERLAPPING_DAG, run_id)["pull_approved", -1].state == "running"
                ),
                "all pull",
            )
    # A run whose refunds another run still sends may end as failed; in the end nothing is left.
    states = [client.wait_for_run(OVERLAPPING_DAG, run_id, "success", "failed") for run_id in run_ids]
    merchant.assert_paid_once(*refs)
    tasks = [
        sum(index >= 0 for _, index in client.task_instances(OVERLAPPING_DAG, run_id)) for run_id in run_ids
    ]
    assert sum(count > 0 for count in tasks) >= 2, f"the runs did not overlap: send tasks per run {tasks}"
    measured(
        runs=" ".join(states),
        refunds=len(refs),
        send_tasks=" ".join(map(str, tasks)),
        creates=sum(len(merchant.creates(ref)) for ref in refs),
    )


@pytest.mark.usefixtures("only_long")
def test_a_failed_run_cleared_while_the_next_run_sends_the_same_refunds_pays_each_once(
    merchant: Merchant, measured: Measured
) -> None:
    client = merchant.airflow.client
    refs = [merchant.approve("9005") for _ in range(4)]
    first = client.trigger(OVERLAPPING_DAG)
    give_up_waiting(merchant, refs, OVERLAPPING_DAG)
    client.wait_for_run(OVERLAPPING_DAG, first, "failed")
    for ref in refs:
        merchant.trouble(ref, "slow", seconds=2)
    second = client.trigger(OVERLAPPING_DAG)
    merchant.strike(refs[:1], lambda _: client.clear(OVERLAPPING_DAG, first, "send_refund", downstream=True))
    # The second run cannot write back and end meanwhile, so the cleared tasks run beside it.
    with locked_source(merchant):
        merchant.wait_until(lambda: sent_again(merchant, first), "the cleared tasks have run")
        assert client.run_state(OVERLAPPING_DAG, second) == "running"
    for run_id in (first, second):
        client.wait_for_run(OVERLAPPING_DAG, run_id, "success")
    merchant.assert_paid_once(*refs)
    measured(refunds=len(refs), creates=sum(len(merchant.creates(ref)) for ref in refs))


def sent_again(merchant: Merchant, run_id: str) -> bool:
    tasks = merchant.airflow.client.task_instances(OVERLAPPING_DAG, run_id)
    return all(ti.state == "success" for (task_id, _), ti in tasks.items() if task_id == "send_refund")


@pytest.mark.usefixtures("only_long")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_an_api_server_that_goes_away_in_the_middle_of_a_run_costs_no_refund_and_pays_none_twice(
    merchant: Merchant, measured: Measured, number: signal.Signals
) -> None:
    airflow = merchant.airflow
    refs = [merchant.approve() for _ in range(24)]
    for ref in refs:
        merchant.trouble(ref, "slow", seconds=1.8)
    run_id = airflow.client.trigger(DAG, batch_size=4)
    merchant.wait_until(lambda: merchant.troubles_left(refs[0]) == 0, "the first create")
    begin = time.monotonic()
    airflow.stop_api_server(number)
    airflow.start_api_server()
    away = time.monotonic() - begin
    airflow.client.wait_for_run(DAG, run_id, "success")
    tries = [merchant.task_of(ref).try_number for ref in refs[::4]]
    merchant.assert_paid_once(*refs)
    measured(
        away_seconds=away,
        refunds=len(refs),
        tries=" ".join(map(str, tries)),
        creates=sum(len(merchant.creates(ref)) for ref in refs),
    )
