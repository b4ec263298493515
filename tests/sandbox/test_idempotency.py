from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.patience import PATIENCE_SECONDS, eventually
from tests.sandbox.running import Client, RunningSandbox, body, new_key, new_session, parameters, problem_type

DAY = 24 * 3600


def test_a_post_without_a_key_misses_it(sandbox: RunningSandbox, payroc: Client) -> None:
    refund_id = payroc.create().json()["refundId"]
    for path in (
        "/bank-transfer-refunds",
        f"/bank-transfer-refunds/{refund_id}/reverse",
        "/processing-terminals/1234001/close-batch",
    ):
        for headers in ({}, {"Idempotency-Key": ""}):
            answer = payroc.send("POST", path, json=body(), headers=headers)
            assert answer.status_code == 400
            assert problem_type(answer) == "idempotency-key-missing"
    assert len(sandbox.refunds()) == 1


@pytest.mark.parametrize(
    "key",
    [
        "1",
        "not-a-uuid",
        "8e03978e-40d5-13e8-bc93-6894a57f9324",
        "8e03978e-40d5-53e8-bc93-6894a57f9324",
        "8e03978e40d543e8bc936894a57f9324",
    ],
)
def test_a_key_that_is_no_uuid_v4_is_a_bad_request(payroc: Client, key: str) -> None:
    answer = payroc.create(key=key)
    assert problem_type(answer) == "bad-request"
    assert parameters(answer) == ["Idempotency-Key"]


def test_the_same_key_and_body_get_the_first_response_byte_for_byte(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    key = new_key()
    first, second, third = payroc.create(key=key), payroc.create(key=key), payroc.create(key=key.upper())
    for replay in (second, third):
        assert (replay.status_code, replay.content, replay.headers["Location"]) == (
            201,
            first.content,
            first.headers["Location"],
        )
    assert len(sandbox.refunds()) == 1


def test_a_replay_shows_the_first_response_and_not_the_present_status(payroc: Client) -> None:
    key = new_key()
    refund_id = payroc.create(key=key).json()["refundId"]
    payroc.close_batch()
    assert payroc.create(key=key).json()["transactionResult"]["status"] == "ready"
    assert payroc.status(refund_id) == "complete"


def test_the_same_json_in_other_bytes_is_the_same_body(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    first = payroc.create(key=key)
    raw = json.dumps(dict(reversed(body().items())), indent=3)
    headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
    assert payroc.send("POST", "/bank-transfer-refunds", data=raw, headers=headers).json() == first.json()
    assert len(sandbox.refunds()) == 1


def test_the_same_key_with_another_body_is_in_use(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    payroc.create(key=key)
    answer = payroc.create(body(order__amount=1), key=key)
    assert answer.status_code == 409
    assert problem_type(answer) == "idempotency-key-in-use"
    assert len(sandbox.refunds()) == 1


def test_the_same_key_with_another_uri_is_in_use(payroc: Client) -> None:
    key = new_key()
    refund_id = payroc.create(key=key).json()["refundId"]
    answer = payroc.reverse(refund_id, key=key)
    assert answer.status_code == 409
    assert problem_type(answer) == "idempotency-key-in-use"
    assert payroc.status(refund_id) == "ready"


def test_a_bad_request_is_saved_too(payroc: Client) -> None:
    key = new_key()
    bad = body(order__amount=0)
    first = payroc.create(bad, key=key)
    assert payroc.create(bad, key=key).content == first.content
    assert problem_type(payroc.create(key=key)) == "idempotency-key-in-use"


def test_a_refused_token_does_not_use_up_the_key(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    good, payroc.token = payroc.token, "made-up"
    assert payroc.create(key=key).status_code == 401
    payroc.token = good
    assert payroc.create(key=key).status_code == 201


def test_a_repeated_reverse_is_replayed(payroc: Client) -> None:
    refund_id, key = payroc.create().json()["refundId"], new_key()
    first = payroc.reverse(refund_id, key=key)
    assert first.status_code == 200
    assert payroc.reverse(refund_id, key=key).content == first.content


def test_a_key_is_kept_for_seven_days_and_then_pays_a_second_time(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    key = new_key()
    payroc.create(key=key)
    sandbox.advance(7 * DAY - 60)
    payroc.token = sandbox.client().token
    assert payroc.create(key=key).status_code == 201
    assert len(sandbox.refunds()) == 1
    sandbox.advance(61)
    assert payroc.create(key=key).status_code == 201
    assert [refund["idempotencyKey"] for refund in sandbox.refunds()] == [key, key]


def test_a_key_whose_first_request_is_in_flight_is_in_use(sandbox: RunningSandbox, payroc: Client) -> None:
    sandbox.fault("create", "slow", seconds=3600)
    key, answers = new_key(), []
    slow = threading.Thread(target=lambda: answers.append(Client(sandbox.url).create(key=key)))
    slow.start()
    eventually(
        lambda: not sandbox.admin("GET", "faults")["faults"], "the first request is in flight", pause=0.01
    )
    meanwhile = payroc.create(key=key)
    sandbox.admin("DELETE", "faults")
    slow.join()
    assert meanwhile.status_code == 409
    assert problem_type(meanwhile) == "idempotency-key-in-use"
    assert answers[0].status_code == 201
    assert payroc.create(key=key).content == answers[0].content
    assert len(sandbox.refunds()) == 1


def test_forty_concurrent_requests_with_one_key_pay_once(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    headers = {"Authorization": f"Bearer {payroc.token}", "Idempotency-Key": key}

    def create(_: int) -> requests.Response:
        with new_session() as session:
            return session.post(
                f"{payroc.api}/bank-transfer-refunds", json=body(), headers=headers, timeout=PATIENCE_SECONDS
            )

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(create, range(40)))
    assert {answer.content for answer in answers} == {answers[0].content}
    assert [refund["idempotencyKey"] for refund in sandbox.refunds()] == [key]
