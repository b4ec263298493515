from __future__ import annotations

import re

import pytest

from tests.sandbox.running import Client, RunningSandbox, body, new_key, parameters, problem_type


def test_an_unknown_refund_is_not_found(payroc: Client) -> None:
    for answer in (payroc.get("AAAAAAAAAA"), payroc.reverse("AAAAAAAAAA")):
        assert answer.status_code == 404
        assert problem_type(answer) == "not-found"
        assert answer.json()["resource"] == "bankTransferRefund"


def test_a_refund_id_of_another_length_is_a_bad_request(payroc: Client) -> None:
    answer = payroc.get("AAAA")
    assert problem_type(answer) == "bad-request"
    assert parameters(answer) == ["refundId"]


def test_a_ready_refund_can_be_reversed(payroc: Client) -> None:
    created = payroc.create().json()
    answer = payroc.reverse(created["refundId"])
    assert answer.status_code == 200
    expected = {**created, "transactionResult": {**created["transactionResult"], "status": "reversal"}}
    assert answer.json() == expected
    assert payroc.get(created["refundId"]).json() == expected


def test_a_reversed_refund_does_not_settle(payroc: Client) -> None:
    refund_id = payroc.create().json()["refundId"]
    payroc.reverse(refund_id)
    payroc.close_batch()
    assert payroc.status(refund_id) == "reversal"


def test_a_settled_or_reversed_refund_cannot_be_reversed(payroc: Client) -> None:
    settled, reversed_ = (
        payroc.create().json()["refundId"],
        payroc.create(body(processingTerminalId="9999")).json()["refundId"],
    )
    payroc.close_batch()
    payroc.reverse(reversed_)
    for refund_id, status in ((settled, "COMPLETE"), (reversed_, "REVERSAL")):
        answer = payroc.reverse(refund_id)
        assert answer.status_code == 400
        assert problem_type(answer) == "bad-request"
        assert answer.json()["detail"] == f"Bank transfer with status {status} can not be reversed"


def test_reverse_needs_no_body_and_refuses_one_that_is_not_json(payroc: Client) -> None:
    refund_id = payroc.create().json()["refundId"]
    headers = {"Idempotency-Key": new_key(), "Content-Type": "text/plain"}
    answer = payroc.send(
        "POST", f"/bank-transfer-refunds/{refund_id}/reverse", headers=headers, data="please"
    )
    assert answer.status_code == 415
    assert payroc.reverse(refund_id).status_code == 200


def test_closing_a_batch_settles_the_ready_refunds_of_its_terminal(payroc: Client) -> None:
    mine = payroc.create().json()["refundId"]
    pending = payroc.create_ending_in("9012").json()["refundId"]
    declined = payroc.create_ending_in("9001").json()["refundId"]
    elsewhere = payroc.create(body(processingTerminalId="9999001")).json()["refundId"]
    answer = payroc.close_batch()
    assert answer.status_code == 202
    assert re.fullmatch(r"\d\d:\d\d", answer.json()["cutOffTime"])
    assert answer.json()["timezone"] == "Etc/UTC"
    assert [payroc.status(refund_id) for refund_id in (mine, pending, declined, elsewhere)] == [
        "complete",
        "pending",
        "declined",
        "ready",
    ]


def test_the_same_key_closes_a_batch_once(payroc: Client) -> None:
    key = new_key()
    first = payroc.close_batch(key=key)
    refund_id = payroc.create().json()["refundId"]
    assert payroc.close_batch(key=key).json() == first.json()
    assert payroc.status(refund_id) == "ready"


def test_a_terminal_id_that_is_too_short_closes_no_batch(payroc: Client) -> None:
    assert parameters(payroc.close_batch("123")) == ["processingTerminalId"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"status": "complete"}, ("complete", "A", "0")),
        ({"status": "returned"}, ("returned", "A", "R01")),
        ({"status": "returned", "processorResponseCode": "R10"}, ("returned", "A", "R10")),
        ({"status": "declined", "responseCode": "D"}, ("declined", "D", "0")),
        ({"status": "word-of-tomorrow"}, ("word-of-tomorrow", "A", "0")),
    ],
)
def test_the_admin_sets_any_status(
    sandbox: RunningSandbox, payroc: Client, change: dict[str, str], expected: tuple[str, str, str]
) -> None:
    refund_id = payroc.create().json()["refundId"]
    sandbox.admin("PATCH", f"refunds/{refund_id}", **change)
    result = payroc.get(refund_id).json()["transactionResult"]
    assert (result["status"], result["responseCode"], result["processorResponseCode"]) == expected
    assert (sandbox.refunds()[0]["settledAt"] is not None) == (change["status"] == "complete")
