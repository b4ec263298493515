"""The operator itself, over the real ledger and the local Payroc: what a task of Airflow ends with."""

from __future__ import annotations

import builtins
import os
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException
from sqlalchemy import URL

from include.payroc.errors import PayrocConfigurationError
from include.refunds.ledger import LedgerError, LedgerUnavailable
from include.refunds.ledger_url import UrlError
from include.refunds.send import Result, Sent
from include.refunds.settings import SettingsError, get_settings
from payroc_airflow.exceptions import RefundsInDoubt, RefundsNotPaid, RefundsStopped
from payroc_airflow.operators import refund
from payroc_airflow.operators.refund import PayrocRefundOperator
from payroc_airflow.retry_policy import PayrocRetryPolicy
from tests.dags.conftest import airflow_connection
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world


class Operator:
    """
    Runs the operator as a task would.

    :param context: context of the last execution.
    """

    def __init__(self) -> None:
        self.context: Any = {}

    def __call__(
        self, *refund_ids: int, dag_id: str = "payroc_refunds", map_index: int = 0, try_number: int = 1
    ) -> None:
        ti = SimpleNamespace(dag_id=dag_id, run_id="run-1", map_index=map_index, try_number=try_number)
        self.context = {"ti": ti, "run_id": "run-1"}
        PayrocRefundOperator(task_id="send_refund", refund_ids=list(refund_ids)).execute(self.context)

    @property
    def label(self) -> str:
        return str(self.context["refund_label"])


@pytest.fixture
def send(world: World, ledger_url: URL, monkeypatch: pytest.MonkeyPatch) -> Operator:
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", airflow_connection(ledger_url))
    return Operator()


def released(world: World, *endings: str) -> list[int]:
    """Release refunds of one run together, and return their ids in this order."""
    for ending in endings:
        # A terminal of its own, so that the pause for a configuration error does not keep the others from being sent.
        world.approve(ending, **({"processing_terminal_id": "7701002"} if ending == "9018" else {}))
    world.pull()
    return world.release()


def order_ids(world: World, *refund_ids: int) -> list[str]:
    return [str(world.row(refund_id)["order_id"]) for refund_id in refund_ids]


def test_an_accepted_refund_is_a_success_and_its_attempt_names_the_task(world: World, send: Operator) -> None:
    refund_id = world.released()
    send(refund_id, dag_id="a dag of ours", map_index=7, try_number=3)
    assert (world.row(refund_id)["status"], world.paid(refund_id)) == ("accepted", 1)
    attempt = world.rows("SELECT run_id, map_index, try_number FROM refund_ledger.refund_attempts")
    assert attempt == [{"run_id": "run-1", "map_index": 7, "try_number": 3}]
    events = world.rows(
        "SELECT actor FROM refund_ledger.refund_events WHERE refund_id = :id ORDER BY id DESC LIMIT 1",
        id=refund_id,
    )
    assert events == [{"actor": "a dag of ours run-1"}]


@pytest.mark.parametrize(
    ("ending", "exception", "reason", "status"),
    [
        ("9001", RefundsNotPaid, "Declined by the bank.", "rejected"),
        ("9002", RefundsNotPaid, "Refused by Payroc: bad-request, refundMethod.accountNumber.", "rejected"),
        ("9013", RefundsNotPaid, "Payroc's status is 'admin', which people must look at.", "review"),
        ("9005", RefundsInDoubt, "Payroc, create refund: api-error (HTTP 500)", "unknown"),
        ("9018", RefundsStopped, "Payroc, create refund: forbidden (HTTP 403).", "released"),
    ],
)
def test_an_outcome_that_is_not_a_payment_is_an_exception_with_order_and_reason_and_labels_the_task(
    world: World, send: Operator, ending: str, exception: type[Exception], reason: str, status: str
) -> None:
    refund_id = world.released(ending)
    with pytest.raises(exception) as caught:
        send(refund_id)
    assert type(caught.value) is exception
    assert isinstance(caught.value, AirflowFailException) == (exception is not RefundsInDoubt)
    # The label names the task's row in the grid, above all when it failed.
    assert [send.label] == order_ids(world, refund_id)
    assert str(caught.value) == f"Order {send.label}: {reason}"
    assert world.row(refund_id)["status"] == status


def test_a_refund_in_doubt_tells_when_to_try_again(world: World, send: Operator) -> None:
    refund_id = world.released()
    world.fault(refund_id, "status", status=429, retryAfterSeconds=600)
    with pytest.raises(RefundsInDoubt) as caught:
        send(refund_id)
    assert 590 < caught.value.retry_after <= 600


def test_a_list_is_tried_again_when_the_first_of_its_waits_has_ended(world: World, send: Operator) -> None:
    late, early = released(world, "4321", "9005")
    world.fault(late, "status", status=429, retryAfterSeconds=600)
    with pytest.raises(RefundsInDoubt, match=r"\(1 more like it\)$") as caught:
        send(late, early)
    assert 80 < caught.value.retry_after <= 90


@pytest.mark.parametrize(
    ("endings", "exception"),
    [
        (("9002", "4321", "9013"), RefundsNotPaid),
        (("9002", "9005", "4321"), RefundsInDoubt),
        (("9018", "9005", "9002"), RefundsStopped),
    ],
)
def test_in_a_list_configuration_wins_then_doubt_then_what_people_must_look_at(
    world: World,
    send: Operator,
    endings: tuple[str, ...],
    exception: type[Exception],
) -> None:
    refund_ids = released(world, *endings)
    with pytest.raises(exception) as caught:
        send(*refund_ids)
    assert type(caught.value) is exception
    ends = {"4321": "accepted", "9002": "rejected", "9005": "unknown", "9013": "review", "9018": "released"}
    assert [world.row(refund_id)["status"] for refund_id in refund_ids] == [
        ends[ending] for ending in endings
    ]


def test_finished_refunds_of_a_list_are_skipped_when_it_is_tried_again(
    world: World, send: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_UNKNOWN_WAIT_SECONDS", "1")
    get_settings.cache_clear()
    paid, rejected, unknown = released(world, "4321", "9002", "4321")
    # Nothing is created at the first request, so the second one is a POST and not a look-up.
    world.fault(unknown, "status", status=503)
    with pytest.raises(RefundsInDoubt) as caught:
        send(paid, rejected, unknown)
    _wait_in_the_ledger(world, unknown)
    assert caught.value.retry_after <= 1
    with pytest.raises(RefundsNotPaid, match="Refused by Payroc"):
        send(paid, rejected, unknown, try_number=2)
    assert [world.attempts(refund_id) for refund_id in (paid, rejected, unknown)] == [
        ["accepted"],
        ["rejected"],
        ["unknown", "accepted"],
    ]
    assert [world.paid(refund_id) for refund_id in (paid, rejected, unknown)] == [1, 0, 1]


def _wait_in_the_ledger(world: World, refund_id: int) -> None:
    """Wait by the database's clock, which is the one that the operator goes by."""
    world.rows(
        "SELECT pg_sleep(greatest(0, extract(epoch FROM next_attempt_at - clock_timestamp()) + 0.05)) FROM refund_ledger.refunds "
        "WHERE id = :id",
        id=refund_id,
    )


def test_a_rejected_refund_fails_again_when_its_task_is_cleared_and_is_not_sent_again(
    world: World, send: Operator
) -> None:
    refund_id = world.released("9002")
    for _ in range(2):
        with pytest.raises(RefundsNotPaid, match="Refused by Payroc"):
            send(refund_id)
    assert world.attempts(refund_id) == ["rejected"]


@pytest.mark.parametrize("dag_id", ["payroc_refunds", "a dag of somebody else's"])
def test_a_refund_that_was_not_released_is_refused_wherever_the_operator_is_used(
    world: World, send: Operator, dag_id: str
) -> None:
    source_ref = world.approve()
    world.pull()
    refund_id = int(world.row(source_ref)["id"])
    with pytest.raises(RefundsNotPaid, match=r"It is approved, not released\.$"):
        send(refund_id, dag_id=dag_id)
    assert (world.row(source_ref)["status"], world.attempts(refund_id), world.paid(refund_id)) == (
        "approved",
        [],
        0,
    )


def test_refunds_that_do_not_exist_or_were_not_released_do_not_block_the_others_of_their_list(
    world: World, send: Operator
) -> None:
    (fine,), source_ref = released(world, "4321"), world.approve()
    world.pull()
    unreleased = int(world.row(source_ref)["id"])
    with pytest.raises(RefundsNotPaid, match=r"The ledger holds no refund 999999\. \(1 more like it\)$"):
        send(999_999, unreleased, fine)
    assert send.label == ", ".join(["no refund 999999", *order_ids(world, unreleased, fine)])
    assert [world.paid(unreleased), world.paid(fine)] == [0, 1]


def test_an_unreadable_request_stops_its_own_refund_and_not_the_others_of_the_list(
    world: World, send: Operator
) -> None:
    unreadable, fine = released(world, "4321", "4321")
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("SET session_replication_role = replica")
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.frozen_requests SET request = '\\x00' WHERE refund_id = {unreadable}"
        )
    with pytest.raises(RefundsStopped, match=f"The request of refund {unreadable} can't be opened"):
        send(unreadable, fine)
    assert [world.attempts(unreadable), world.attempts(fine)] == [[], ["accepted"]]
    assert world.row(unreadable)["status"] == "released"
    assert world.paused() == {}


def test_a_label_and_an_exception_show_an_order_id_in_one_line_without_markup() -> None:
    # The ledger may have such orders from before it refused them.
    nasty = "\x1b[2K\r\nTotals:\u202e<!channel>"
    clean = "⟨U+001B⟩⟦2K⟨U+000D⟩⟨U+000A⟩Totals:⟨U+202E⟩‹!channel›"
    assert refund._label([nasty]) == clean
    assert len(refund._label(["\x1b" * 5000] * 5)) == 250
    with pytest.raises(RefundsNotPaid) as caught:
        refund._raise_for([Result(1, nasty, Sent.REJECTED, nasty)])
    assert str(caught.value) == f"Order {clean}: {clean}"


def test_the_label_is_there_before_anything_is_asked_of_payroc(
    world: World, send: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    refund_id = world.released()
    monkeypatch.setenv("PAYROC_REFUNDS_TOKEN_CACHE", "false")
    get_settings.cache_clear()
    world.fault(None, "status", "authorize", status=503)
    with pytest.raises(RefundsInDoubt, match="nothing was sent"):
        send(refund_id)
    assert [send.label] == order_ids(world, refund_id)
    assert world.attempts(refund_id) == []


def test_the_label_of_a_list_names_three_orders_and_of_a_longer_one_its_ends_and_its_length(
    world: World, send: Operator
) -> None:
    rows = [world.approve() for _ in range(4)]
    world.pull()
    refund_ids = [int(world.row(source_ref)["id"]) for source_ref in rows]
    first, second, third, fourth = order_ids(world, *refund_ids)
    for listed, label in (
        (refund_ids[:3], f"{first}, {second}, {third}"),
        (refund_ids, f"{first} to {fourth} (4)"),
    ):
        with pytest.raises(RefundsNotPaid):
            send(*listed)
        assert send.label == label


def test_an_empty_list_is_a_success(send: Operator) -> None:
    send()
    assert send.label == ""


def test_nothing_that_a_task_says_holds_bank_data(
    world: World, send: Operator, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    for ending in ("4321", "9002", "9005"):
        world.approve(ending, account_number=f"8861000077{ending}")
    world.pull()
    refund_ids = world.release()
    with pytest.raises(RefundsInDoubt) as caught:
        send(*refund_ids)
    # Outside of a task Airflow's loggers print, and the standard library's are kept by pytest.
    said = f"{caplog.text} {''.join(capfd.readouterr())} {caught.value!r} {send.label}"
    assert "Refused by Payroc" in said
    assert [
        secret for secret in ("8861000077", "053200983", "Sarah Hopper", "sandbox-key") if secret in said
    ] == []


def test_a_broken_setting_fails_the_task_before_any_attempt(
    world: World, send: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    refund_id = world.released()
    for variable, value, exception in (
        ("AIRFLOW_CONN_REFUNDS_LEDGER", None, UrlError),
        ("AIRFLOW_CONN_REFUNDS_LEDGER", '{"conn_type": "mysql", "host": "db"}', UrlError),
        # Nothing listens on port 1.
        (
            "AIRFLOW_CONN_REFUNDS_LEDGER",
            '{"conn_type": "postgres", "host": "127.0.0.1", "port": 1, "schema": "x"}',
            LedgerUnavailable,
        ),
        ("AIRFLOW_CONN_PAYROC_DEFAULT", None, PayrocConfigurationError),
        ("PAYROC_REFUNDS_ENCRYPTION_KEYS", "no Fernet key", SettingsError),
        ("PAYROC_REFUNDS_RETRIES", "many", SettingsError),
    ):
        get_settings.cache_clear()
        with monkeypatch.context() as broken:
            if value is None:
                broken.delenv(variable)
            else:
                broken.setenv(variable, value)
            with pytest.raises(exception):
                send(refund_id)
    assert (world.attempts(refund_id), world.row(refund_id)["status"]) == ([], "released")


def test_a_ledger_of_another_revision_is_refused_before_any_attempt(world: World, send: Operator) -> None:
    refund_id = world.released()
    with world.ledger_engine.begin() as connection:
        connection.exec_driver_sql("UPDATE refund_ledger.schema_version SET version_num = '1.0000'")
    with pytest.raises(LedgerError, match=r"is at revision 1\.0000"):
        send(refund_id)
    assert world.attempts(refund_id) == []


def test_another_ledger_connection_can_be_named(
    world: World, ledger_url: URL, send: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    refund_id = world.released()
    monkeypatch.delenv("AIRFLOW_CONN_REFUNDS_LEDGER")
    monkeypatch.setenv("AIRFLOW_CONN_ANOTHER_LEDGER", airflow_connection(ledger_url))
    monkeypatch.setenv("AIRFLOW_CONN_ANOTHER_PAYROC", os.environ["AIRFLOW_CONN_PAYROC_DEFAULT"])
    monkeypatch.delenv("AIRFLOW_CONN_PAYROC_DEFAULT")
    ti = SimpleNamespace(dag_id="mine", run_id="run-1", map_index=-1, try_number=1)
    context: Any = {"ti": ti, "run_id": "run-1"}
    PayrocRefundOperator(
        task_id="send",
        refund_ids=[refund_id],
        payroc_conn_id="another_payroc",
        ledger_conn_id="another_ledger",
    ).execute(context)
    assert world.paid(refund_id) == 1


def test_only_refund_ids_is_templated() -> None:
    # What Airflow renders it also stores and shows.
    assert tuple(PayrocRefundOperator.template_fields) == ("refund_ids",)


def test_the_constructor_asks_nobody_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    # DAG files are parsed every few seconds, also where no connection, no setting and no database can be reached.
    monkeypatch.setenv("PAYROC_REFUNDS_RETRIES", "many")
    monkeypatch.delenv("AIRFLOW_CONN_REFUNDS_LEDGER", raising=False)
    monkeypatch.delenv("AIRFLOW_CONN_PAYROC_DEFAULT", raising=False)
    asked: list[object] = []

    def refuse(name: str) -> Callable[..., Any]:
        def ask(*args: object, **kwargs: object) -> None:
            asked.append((name, args))
            raise AssertionError(f"the constructor called {name}")

        return ask

    with monkeypatch.context() as closed:
        closed.setattr(builtins, "open", refuse("open"))
        closed.setattr(socket, "socket", refuse("socket"))
        closed.setattr("airflow.sdk.BaseHook.get_connection", refuse("get_connection"))
        operator = PayrocRefundOperator(task_id="send_refund", refund_ids=[1])
    assert asked == []
    assert isinstance(operator.retry_policy, PayrocRetryPolicy)


def test_a_retry_policy_of_the_dags_own_is_left_alone() -> None:
    own = PayrocRetryPolicy()
    assert PayrocRefundOperator(task_id="send_refund", refund_ids=[1], retry_policy=own).retry_policy is own
