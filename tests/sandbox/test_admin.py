from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import requests

from include.sandbox.problems import DOCUMENTED, OTHERS
from tests.patience import eventually
from tests.sandbox.running import (
    USUAL_HANG_SECONDS,
    Client,
    RunningSandbox,
    body,
    new_key,
    parameters,
    problem_type,
)


def test_health_counts_the_refunds(sandbox: RunningSandbox, payroc: Client) -> None:
    payroc.create()
    health = sandbox.admin("GET", "health")
    assert (health["status"], health["refunds"]) == ("ok", 1)


def test_the_record_of_refunds_says_what_was_paid_for_which_key(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    key = new_key()
    refund_id = payroc.create(key=key).json()["refundId"]
    record = sandbox.admin("GET", "refunds?orderId=OrderRef6543")
    created_at = record["refunds"][0].pop("createdAt")
    assert created_at.endswith("Z")
    assert record == {
        "count": 1,
        "refundsPerOrder": {"OrderRef6543": 1},
        "refunds": [
            {
                "refundId": refund_id,
                "processingTerminalId": "1234001",
                "orderId": "OrderRef6543",
                "amount": 4999,
                "currency": "USD",
                "last4": "7890",
                "status": "ready",
                "responseCode": "A",
                "processorResponseCode": "0",
                "idempotencyKey": key,
                "settledAt": None,
            }
        ],
    }
    assert sandbox.admin("GET", "refunds?orderId=other")["count"] == 0


def test_the_journal_holds_every_request_in_order(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    refund_id = payroc.create(key=key).json()["refundId"]
    payroc.create(key=key)
    payroc.create_ending_in("9005")
    payroc.token = payroc.authorize("sandbox-key").json()["access_token"]
    payroc.list(orderId="OrderRef6543")
    payroc.get(refund_id)
    payroc.reverse(refund_id)
    payroc.close_batch()
    payroc.authorize("wrong-key")
    columns = ("operation", "orderId", "refundId", "status", "created", "replayed", "behaviour", "token")
    assert [tuple(entry[column] for column in columns) for entry in sandbox.journal()] == [
        ("authorize", None, None, 200, False, False, None, 1),
        ("create", "OrderRef6543", refund_id, 201, True, False, None, 1),
        ("create", "OrderRef6543", refund_id, 201, False, True, None, 1),
        ("create", "OrderRef6543", None, 500, False, False, "9005", 1),
        ("authorize", None, None, 200, False, False, None, 2),
        ("list", "OrderRef6543", None, 200, False, False, None, 2),
        ("get", "OrderRef6543", refund_id, 200, False, False, None, 2),
        ("reverse", "OrderRef6543", refund_id, 200, False, False, None, 2),
        ("close-batch", None, None, 202, False, False, None, 2),
        ("authorize", None, None, 401, False, False, None, None),
    ]
    assert [entry["idempotencyKey"] for entry in sandbox.journal("operation=create")][:2] == [key, key]
    assert sandbox.admin("GET", "requests")["tokensIssued"] == 2
    assert len(sandbox.journal(f"idempotencyKey={key}")) == 2
    assert len(sandbox.journal("orderId=OrderRef6543&operation=list")) == 1


@pytest.mark.parametrize("fragment", [*DOCUMENTED, *OTHERS, "type-of-tomorrow"])
def test_every_problem_type_can_be_asked_for(sandbox: RunningSandbox, payroc: Client, fragment: str) -> None:
    sandbox.fault("create", "problem", problem=fragment)
    answer = payroc.create()
    assert problem_type(answer) == fragment
    known = {**{name: status for name, (status, _, _) in DOCUMENTED.items()}, **OTHERS}
    assert answer.status_code == known.get(fragment, 400)
    assert sandbox.refunds() == []


def test_a_problem_can_carry_another_status_a_parameter_and_a_resource(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    sandbox.fault(
        "create", "problem", problem="bad-request", status=422, parameter="order.orderId", resource="order"
    )
    answer = payroc.create()
    assert (answer.status_code, answer.json()["status"], answer.json()["resource"]) == (422, 422, "order")
    assert parameters(answer) == ["order.orderId"]


def test_a_queued_fault_hits_so_many_requests_of_its_operation_and_order(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    sandbox.fault("create", "status", status=502, orderId="unlucky", times=2)
    (waiting,) = sandbox.admin("GET", "faults")["faults"]
    assert (waiting["operation"], waiting["orderId"], waiting["status"], waiting["left"]) == (
        "create",
        "unlucky",
        502,
        2,
    )
    unlucky = body(order__orderId="unlucky")
    assert payroc.create().status_code == 201
    assert payroc.list(orderId="unlucky").status_code == 200
    assert [payroc.create(unlucky).status_code for _ in range(3)] == [502, 502, 201]
    assert sandbox.admin("GET", "faults")["faults"] == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", ["authorize", "create", "list", "get", "reverse", "close-batch"])
def test_a_fault_hits_any_operation(
    sandbox: RunningSandbox, payroc: Client, operation: str, when: str
) -> None:
    refund_id = payroc.create().json()["refundId"]
    request: Callable[[], requests.Response] = {
        "authorize": lambda: payroc.authorize("sandbox-key"),
        "create": payroc.create,
        "list": payroc.list,
        "get": lambda: payroc.get(refund_id),
        "reverse": lambda: payroc.reverse(refund_id),
        "close-batch": payroc.close_batch,
    }[operation]
    sandbox.fault(operation, "close", when)
    with pytest.raises(requests.ConnectionError):
        request()
    sandbox.fault(operation, "garbage", when)
    assert "html" in request().headers["Content-Type"]
    dropped, garbled = [
        entry for entry in sandbox.journal(f"operation={operation}") if entry["behaviour"] == "queued"
    ]
    assert dropped["status"] is None
    assert garbled["status"] is not None


def test_a_fault_before_commit_creates_nothing_and_one_after_it_does(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    for when, created in (("before", 0), ("after", 1)):
        key = new_key()
        sandbox.fault("create", "problem", when, problem="api-error")
        assert payroc.create(key=key).status_code == 500
        assert len(sandbox.refunds()) == created
        sandbox.admin("POST", "reset")
        payroc.token = sandbox.client().token


def test_a_fault_also_hits_a_replay(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    first = payroc.create(key=key)
    sandbox.fault("create", "empty", "after")
    assert payroc.create(key=key).content == b""
    assert payroc.create(key=key).content == first.content


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_slow_request_gets_its_normal_answer_late(
    sandbox: RunningSandbox, payroc: Client, when: str
) -> None:
    sandbox.fault("create", "slow", when, seconds=0.3)
    started = time.monotonic()
    assert payroc.create().status_code == 201
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_slow_request_continues_when_the_faults_of_its_order_are_forgotten(
    sandbox: RunningSandbox, payroc: Client, when: str
) -> None:
    for order_id in ("other", "OrderRef6543"):
        sandbox.fault("create", "slow", when, seconds=3600, orderId=order_id)
    answers: list[requests.Response] = []
    creating = threading.Thread(target=lambda: answers.append(payroc.create()))
    creating.start()
    eventually(lambda: len(sandbox.admin("GET", "faults")["faults"]) == 1, "the create is delayed")
    sandbox.admin("DELETE", "faults?orderId=another")
    assert answers == []
    sandbox.admin("DELETE", "faults?orderId=OrderRef6543")
    creating.join()
    assert answers[0].status_code == 201
    assert [fault["orderId"] for fault in sandbox.admin("GET", "faults")["faults"]] == ["other"]


def test_a_hang_ends_after_its_seconds_without_an_answer(sandbox: RunningSandbox, payroc: Client) -> None:
    sandbox.fault("list", "hang", seconds=0.3)
    started = time.monotonic()
    with pytest.raises(requests.ConnectionError):
        payroc.list()
    assert 0.3 <= time.monotonic() - started < USUAL_HANG_SECONDS


def test_a_fault_says_when_to_retry(sandbox: RunningSandbox, payroc: Client) -> None:
    sandbox.fault("list", "status", status=503, retryAfterSeconds=9)
    assert payroc.list().headers["Retry-After"] == "9"


def test_queued_faults_can_be_forgotten(sandbox: RunningSandbox, payroc: Client) -> None:
    sandbox.fault("list", "status", status=503)
    sandbox.admin("DELETE", "faults")
    assert payroc.list().status_code == 200


def test_an_unknown_fault_is_refused(sandbox: RunningSandbox) -> None:
    with pytest.raises(requests.HTTPError, match="422"):
        sandbox.fault("create", "earthquake")
    with pytest.raises(requests.HTTPError, match="422"):
        sandbox.fault("create", "hang", secconds=1)


def test_the_clock_can_be_advanced_and_stamps_new_refunds(sandbox: RunningSandbox, payroc: Client) -> None:
    before = payroc.create().json()["order"]["dateTime"]
    now = sandbox.admin("POST", "clock", advanceSeconds=3000)["now"]
    after = payroc.create().json()["order"]["dateTime"]
    assert before < after
    assert after >= now[:19] + "Z"
    assert sandbox.admin("GET", "settings")["clockOffsetSeconds"] == 3000


def test_a_reset_sandbox_knows_nothing(sandbox: RunningSandbox, payroc: Client) -> None:
    payroc.create()
    sandbox.advance(5)
    sandbox.admin("PATCH", "settings", listDuplicates=True)
    sandbox.admin("PUT", "terminals/1234001", mode="no-ach")
    sandbox.fault("list", "hang")
    sandbox.admin("POST", "reset")
    assert sandbox.refunds() == []
    assert sandbox.admin("GET", "requests") == {"count": 0, "tokensIssued": 0, "requests": []}
    assert sandbox.admin("GET", "faults") == {"faults": []}
    assert sandbox.admin("GET", "terminals") == {"terminals": {}}
    assert sandbox.admin("GET", "settings") == {
        "clockOffsetSeconds": 0,
        "listLagSeconds": 0,
        "listDuplicates": False,
        "retryAfterSeconds": 2,
    }
    assert payroc.list().status_code == 401


def test_a_change_of_an_unknown_refund_is_not_found(sandbox: RunningSandbox) -> None:
    with pytest.raises(requests.HTTPError, match="404"):
        sandbox.admin("PATCH", "refunds/AAAAAAAAAA", status="complete")
