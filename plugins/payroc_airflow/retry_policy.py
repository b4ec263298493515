"""Which outcome of a send task is retried, and when."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import RetryDecision, RetryPolicy

from payroc_airflow.exceptions import RefundsInDoubt

if TYPE_CHECKING:
    from airflow.sdk import Context


class PayrocRetryPolicy(RetryPolicy):
    """
    Retries a refund in doubt when its wait has ended: 90 seconds, Payroc's ``Retry-After``, or the end of a lease.

    Trouble that an operator has to fix fails at once: a setting, a connection, a param, a ledger that is not
    migrated, a statement that a database refuses. (A rejected refund is an ``AirflowFailException``, about
    which no policy is asked.) Everything else follows the task's own delay, such as a database that does not
    answer, only reads for now, or waits for a lock: a retry never sends a second time, because the ledger
    decides.
    """

    def evaluate(
        self, exception: BaseException, try_number: int, max_tries: int, context: Context | None = None
    ) -> RetryDecision:
        """Return the decision; see :meth:`airflow.sdk.RetryPolicy.evaluate`."""
        if isinstance(exception, RefundsInDoubt):
            # A second more, so that the wait has surely ended by the database's clock.
            return RetryDecision.retry(timedelta(seconds=exception.retry_after + 1), reason="refund in doubt")
        if _needs_an_operator(exception):
            return RetryDecision.fail(reason="an operator has to fix this")
        return RetryDecision.default()

    def serialize(self) -> dict[str, Any]:
        """Return nothing: the policy has no settings."""
        return {}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> PayrocRetryPolicy:
        """Return the policy."""
        return cls()


def _needs_an_operator(exception: BaseException) -> bool:
    # Each task of a DAG file has a policy, and only one that has failed needs these.
    from include.payroc.errors import PayrocConfigurationError
    from include.refunds.ledger import LedgerError, LedgerUnavailable
    from include.refunds.ledger_url import UrlError
    from include.refunds.params import ParamsError
    from include.refunds.release import PreflightRefused
    from include.refunds.settings import SettingsError
    from include.refunds.source import SourceError, SourceUnavailable

    permanent = (
        PayrocConfigurationError,
        LedgerError,
        UrlError,
        ParamsError,
        PreflightRefused,
        SettingsError,
        SourceError,
    )
    return isinstance(exception, permanent) and not isinstance(
        exception, LedgerUnavailable | SourceUnavailable
    )
