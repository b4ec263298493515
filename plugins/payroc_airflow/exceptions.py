"""How the approval and the sending of refunds end in Airflow's terms."""

from __future__ import annotations

from airflow.sdk.exceptions import AirflowException, AirflowFailException


class RefundsStopped(AirflowFailException):
    """A configuration error: the task fails without retry, and nothing more is sent until people have mended it."""


class RefundsInDoubt(AirflowException):
    """
    The outcome of a refund is not known yet, or another worker holds it: the task is tried again.

    :param message: what is in doubt.
    :param retry_after: seconds after which the next try makes sense.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RefundsNotPaid(AirflowFailException):
    """A refund was rejected, waits for people, or is not released: trying again changes nothing."""


class RunNotApproved(AirflowFailException):
    """Nobody has approved the run in a way that counts: nothing is sent, and only a person can change that."""
