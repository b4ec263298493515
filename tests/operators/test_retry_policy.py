"""Which outcome of a task is retried, and when."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from airflow.sdk import RetryAction, RetryDecision
from airflow.sdk.exceptions import AirflowFailException

from include.payroc.errors import PayrocConfigurationError, PayrocNoAnswer, PayrocProblem
from include.refunds.ledger import LedgerError, LedgerUnavailable, NoSuchRefund
from include.refunds.ledger_url import UrlError
from include.refunds.params import ParamsError
from include.refunds.release import PreflightFailed, PreflightRefused
from include.refunds.settings import SettingsError
from include.refunds.source import SourceError, SourceUnavailable
from payroc_airflow.exceptions import RefundsInDoubt, RefundsNotPaid, RefundsStopped
from payroc_airflow.retry_policy import PayrocRetryPolicy


def decided(exception: BaseException, try_number: int = 1, max_tries: int = 5) -> RetryDecision:
    return PayrocRetryPolicy().evaluate(exception, try_number, max_tries)


@pytest.mark.parametrize("retry_after", [0.0, 0.25, 90.0, 4200.0])
def test_a_refund_in_doubt_is_retried_when_its_wait_has_surely_ended(retry_after: float) -> None:
    decision = decided(RefundsInDoubt("Order 1: no answer", retry_after))
    assert decision.action is RetryAction.RETRY
    assert decision.retry_delay is not None
    assert timedelta(0) < decision.retry_delay - timedelta(seconds=retry_after) <= timedelta(seconds=1)


def test_the_wait_of_a_refund_in_doubt_does_not_grow_with_its_tries() -> None:
    error = RefundsInDoubt("Order 1: no answer", 90.0)
    assert decided(error, 1) == decided(error, 5)


@pytest.mark.parametrize(
    "kind",
    [
        PayrocConfigurationError,
        LedgerError,
        NoSuchRefund,
        UrlError,
        ParamsError,
        PreflightRefused,
        SettingsError,
        SourceError,
    ],
)
def test_trouble_that_an_operator_has_to_fix_fails_at_once(kind: type[Exception]) -> None:
    assert decided(kind("fix me")).action is RetryAction.FAIL


@pytest.mark.parametrize(
    "error",
    [
        LedgerUnavailable("no answer"),
        SourceUnavailable("no answer"),
        PreflightFailed("no answer"),
        PayrocNoAnswer("list refunds", "no answer within 30 s"),
        PayrocProblem("list refunds", "api-error", http_status=500, problem_type="api-error"),
        ConnectionResetError(),
        RuntimeError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_trouble_that_may_pass_follows_the_delay_of_the_task(error: Exception) -> None:
    assert decided(error) == RetryDecision.default()


@pytest.mark.parametrize("kind", [RefundsNotPaid, RefundsStopped])
def test_what_a_retry_can_not_change_is_an_exception_about_which_airflow_asks_no_policy(
    kind: type[Exception],
) -> None:
    assert issubclass(kind, AirflowFailException)
    assert not issubclass(RefundsInDoubt, AirflowFailException)


def test_the_policy_survives_serialization() -> None:
    data = json.loads(json.dumps(PayrocRetryPolicy().serialize()))
    copy = PayrocRetryPolicy.deserialize(data)
    assert isinstance(copy, PayrocRetryPolicy)
    for error in (
        RefundsInDoubt("Order 1", 90.0),
        LedgerError("not migrated"),
        LedgerUnavailable("no answer"),
    ):
        assert copy.evaluate(error, 1, 5) == decided(error)
