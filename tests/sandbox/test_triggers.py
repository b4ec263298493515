from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import requests

from include.sandbox import triggers
from include.sandbox.__main__ import parser
from tests.patience import PATIENCE_SECONDS, eventually
from tests.sandbox.running import REPO, Client, RunningSandbox, body, new_key, parameters, problem_type

NO_ANSWER_SECONDS = 0.4


def statuses(sandbox: RunningSandbox) -> list[str]:
    return [refund["status"] for refund in sandbox.refunds()]


def refund_id_of(answer: requests.Response) -> str:
    assert answer.status_code == 201, answer.text
    return str(answer.json()["refundId"])


def assert_repeat_is_replayed(sandbox: RunningSandbox, repeat: Callable[[], requests.Response]) -> None:
    """After a fault behind the commit: the refund is there already, and the repeat gets its answer."""
    (refund,) = sandbox.refunds()
    assert refund_id_of(repeat()) == refund["refundId"]
    assert len(sandbox.refunds()) == 1
    assert [entry["created"] for entry in sandbox.journal("operation=create")] == [True, False]
    assert [entry["replayed"] for entry in sandbox.journal("operation=create")] == [False, True]


def assert_repeat_is_processed(sandbox: RunningSandbox, repeat: Callable[[], requests.Response]) -> None:
    """After a fault before the commit: nothing is there, and the repeat creates the refund."""
    assert sandbox.refunds() == []
    refund_id_of(repeat())
    assert statuses(sandbox) == ["ready"]
    assert [entry["created"] for entry in sandbox.journal("operation=create")] == [False, True]


def test_9001_is_declined_by_the_bank(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    answer = payroc.create_ending_in("9001", key=key)
    assert answer.status_code == 201
    assert (
        answer.json()["transactionResult"]["status"],
        answer.json()["transactionResult"]["responseCode"],
    ) == ("declined", "D")
    assert payroc.create_ending_in("9001", key=key).content == answer.content
    assert statuses(sandbox) == ["declined"]


def test_9002_is_a_bad_request_about_the_account_number(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    for _ in range(2):
        answer = payroc.create_ending_in("9002", key=key)
        assert problem_type(answer) == "bad-request"
        assert parameters(answer) == ["refundMethod.accountNumber"]
    assert sandbox.journal("operation=create")[1]["replayed"]
    assert sandbox.refunds() == []


def test_9003_pays_without_an_answer_and_a_repeat_is_replayed_even_while_the_first_still_hangs(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    key = new_key()
    with hanging_create(payroc, "9003", key):
        eventually(lambda: len(sandbox.refunds()) == 1)
        assert_repeat_is_replayed(sandbox, lambda: payroc.create_ending_in("9003", key=key))
    assert sandbox.journal("operation=create")[0]["status"] is None


def test_9004_pays_nothing_without_an_answer_and_a_repeat_is_processed(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    key = new_key()
    with pytest.raises(requests.ReadTimeout):
        payroc.create_ending_in("9004", key=key, timeout=NO_ANSWER_SECONDS)
    assert_repeat_is_processed(sandbox, lambda: payroc.create_ending_in("9004", key=key))


@pytest.mark.parametrize(
    ("digits", "status", "problem"),
    [("9005", 500, "api-error"), ("9015", 409, "idempotency-key-in-use"), ("9017", 401, "not-authorized")],
)
def test_a_problem_once_before_commit_and_a_repeat_is_processed(
    sandbox: RunningSandbox, payroc: Client, digits: str, status: int, problem: str
) -> None:
    key = new_key()
    answer = payroc.create_ending_in(digits, key=key)
    assert answer.status_code == status
    assert problem_type(answer) == problem
    assert_repeat_is_processed(sandbox, lambda: payroc.create_ending_in(digits, key=key))


def test_9006_is_a_500_after_commit_and_a_repeat_is_replayed(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    answer = payroc.create_ending_in("9006", key=key)
    assert answer.status_code == 500
    assert problem_type(answer) == "api-error"
    assert answer.json()["errors"] == [{"message": "Service offline"}]
    assert_repeat_is_replayed(sandbox, lambda: payroc.create_ending_in("9006", key=key))


@pytest.mark.parametrize(
    ("digits", "status", "problem"),
    [
        ("9007", 500, "api-error"),
        ("9014", 409, "resource-already-exists"),
        ("9018", 403, "forbidden"),
        ("9019", 400, "capabilities-missing"),
    ],
)
def test_a_problem_every_time_and_nothing_is_created(
    sandbox: RunningSandbox, payroc: Client, digits: str, status: int, problem: str
) -> None:
    key = new_key()
    for _ in range(3):
        answer = payroc.create_ending_in(digits, key=key)
        assert answer.status_code == status
        assert problem_type(answer) == problem
    assert not any(entry["replayed"] for entry in sandbox.journal())
    assert sandbox.refunds() == []


def test_9018_names_the_resource_and_9019_the_terminal(payroc: Client) -> None:
    assert payroc.create_ending_in("9018").json()["resource"] == "bankTransferRefund"
    assert parameters(payroc.create_ending_in("9019")) == ["processingTerminalId"]


def test_9008_asks_once_to_wait(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    answer = payroc.create_ending_in("9008", key=key)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "2")
    assert_repeat_is_processed(sandbox, lambda: payroc.create_ending_in("9008", key=key))
    sandbox.admin("PATCH", "settings", retryAfterSeconds=7)
    assert payroc.create_ending_in("9008").headers["Retry-After"] == "7"


def test_9009_closes_the_connection_after_commit_and_a_repeat_is_replayed(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    key = new_key()
    with pytest.raises(requests.ConnectionError):
        payroc.create_ending_in("9009", key=key)
    assert_repeat_is_replayed(sandbox, lambda: payroc.create_ending_in("9009", key=key))


def test_9010_answers_201_with_html_after_commit_and_a_repeat_is_replayed(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    key = new_key()
    answer = payroc.create_ending_in("9010", key=key)
    assert answer.status_code == 201
    assert answer.headers["Content-Type"].startswith("text/html")
    assert answer.text.startswith("<!doctype html>")
    assert_repeat_is_replayed(sandbox, lambda: payroc.create_ending_in("9010", key=key))


def test_9011_answers_201_with_nothing_after_commit_and_a_repeat_is_replayed(
    sandbox: RunningSandbox, payroc: Client
) -> None:
    key = new_key()
    answer = payroc.create_ending_in("9011", key=key)
    assert (answer.status_code, answer.content) == (201, b"")
    assert_repeat_is_replayed(sandbox, lambda: payroc.create_ending_in("9011", key=key))


@pytest.mark.parametrize(("digits", "status"), [("9012", "pending"), ("9013", "admin")])
def test_a_status_other_than_ready_stays_when_the_batch_closes(
    payroc: Client, digits: str, status: str
) -> None:
    answer = payroc.create_ending_in(digits)
    assert answer.json()["transactionResult"]["status"] == status
    assert answer.json()["transactionResult"]["responseCode"] == "A"
    payroc.close_batch()
    assert payroc.status(refund_id_of(answer)) == status


def test_9016_settles_with_one_batch_and_is_returned_with_the_next(payroc: Client) -> None:
    returned, kept = refund_id_of(payroc.create_ending_in("9016")), refund_id_of(payroc.create())
    seen = [payroc.status(returned)]
    for _ in range(3):
        payroc.close_batch()
        seen.append(payroc.status(returned))
    assert seen == ["ready", "complete", "returned", "returned"]
    assert payroc.get(returned).json()["transactionResult"]["processorResponseCode"] == "R01"
    assert payroc.status(kept) == "complete"


def test_9020_is_a_503_in_html_and_a_repeat_is_processed(sandbox: RunningSandbox, payroc: Client) -> None:
    key = new_key()
    answer = payroc.create_ending_in("9020", key=key)
    assert answer.status_code == 503
    assert answer.headers["Content-Type"].startswith("text/html")
    assert_repeat_is_processed(sandbox, lambda: payroc.create_ending_in("9020", key=key))


def test_9021_answers_with_another_amount_than_the_refund_has(payroc: Client) -> None:
    key = new_key()
    answer = payroc.create_ending_in("9021", key=key)
    assert answer.json()["order"]["amount"] != 4999
    assert payroc.create_ending_in("9021", key=key).content == answer.content
    assert payroc.get(refund_id_of(answer)).json()["order"]["amount"] == 4999


def test_a_secure_token_triggers_by_its_last_four_digits(sandbox: RunningSandbox, payroc: Client) -> None:
    method = {"type": "secureToken", "token": "296753129001", "accountType": "checking", "secCode": "web"}
    assert payroc.create(body(refundMethod=method)).json()["transactionResult"]["status"] == "declined"


def test_a_fault_once_is_once_per_key(payroc: Client) -> None:
    assert [payroc.create_ending_in("9005", key=new_key()).status_code for _ in range(3)] == [500, 500, 500]


def test_help_and_readme_list_the_triggers_of_the_code() -> None:
    assert triggers.as_text() in parser().format_help()
    assert triggers.as_markdown() in (REPO / "include" / "sandbox" / "README.md").read_text()
    assert [trigger.digits for trigger in triggers.TRIGGERS] == [
        str(9000 + number) for number in range(1, 22)
    ]


class hanging_create:
    """A create whose client waits for the answer in vain, without blocking the test."""

    def __init__(self, payroc: Client, digits: str, key: str) -> None:
        self._request = requests.Request(
            "POST",
            f"{payroc.api}/bank-transfer-refunds",
            json=body(refundMethod__accountNumber=f"123456{digits}"),
            headers={"Authorization": f"Bearer {payroc.token}", "Idempotency-Key": key},
        ).prepare()
        host, port = payroc.url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS)

    def __enter__(self) -> None:
        head = f"POST {self._request.path_url} HTTP/1.1\r\nHost: sandbox\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self._request.headers.items())
        assert isinstance(self._request.body, bytes)
        self._socket.sendall(head.encode() + b"\r\n" + self._request.body)

    def __exit__(self, *_: object) -> None:
        self._socket.close()
