"""
The operator that sends released refunds.

What a task needs is imported when it runs: whoever parses the DAG file needs none of it, and a task finds it in the process that forked
it (:mod:`payroc_airflow.preload`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from include.refunds.printable import printable
from payroc_airflow.databases import LEDGER_CONN_ID, open_ledger
from payroc_airflow.exceptions import RefundsInDoubt, RefundsNotPaid, RefundsStopped
from payroc_airflow.retry_policy import PayrocRetryPolicy

if TYPE_CHECKING:
    from airflow.sdk import Context

    from include.refunds.send import Result
    from include.refunds.settings import Settings


# Airflow's column for the label of a mapped task.
_LONGEST_LABEL = 250


class PayrocRefundOperator(BaseOperator):
    """
    Send refunds that the ledger has released, each at most once, and record what became of them.

    Whatever Airflow does with the task (retry, clear, two copies at a time), the ledger decides whether money moves: a refund
    that has ended is skipped, one that is not released is refused.

    For ``map_index_template="{{ refund_label }}"`` the operator puts the order ids of its refunds into the context.

    :param refund_ids: ids of refunds in the ledger. Only ids cross from task to task, never bank data.
    :param payroc_conn_id: Airflow connection of type ``payroc``.
    :param ledger_conn_id: Airflow connection of the ledger, a Postgres database.
    :raises RefundsStopped: a configuration error; sending is paused where it has to be. Not retried.
    :raises RefundsInDoubt: an outcome is not known yet, or another worker holds a refund. Retried when the wait has ended.
    :raises RefundsNotPaid: a refund was rejected, is in review, or was not released. Not retried.
    """

    template_fields: Sequence[str] = ("refund_ids",)

    def __init__(
        self,
        *,
        refund_ids: Sequence[int],
        payroc_conn_id: str = "payroc_default",
        ledger_conn_id: str = LEDGER_CONN_ID,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("retry_policy", PayrocRetryPolicy())
        super().__init__(**kwargs)
        self.refund_ids = refund_ids
        self.payroc_conn_id = payroc_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Context) -> None:
        """Send the refunds; see the class for what is raised."""
        import uvloop

        from include.refunds.send import Sent
        from include.refunds.settings import get_settings

        results = uvloop.run(self._send(context, get_settings()))
        accepted = [result for result in results if result.sent is Sent.ACCEPTED]
        # Each line of a log costs as much as a request does, and hundreds of them hide the one that matters.
        told = (
            results
            if len(accepted) <= 3
            else [result for result in results if result.sent is not Sent.ACCEPTED]
        )
        for result in told:
            self.log.info("%s: %s. %s", _name(result), result.sent, printable(result.reason))
        if told is not results:
            self.log.info(
                "%d accepted, orders %s.", len(accepted), _label([result.order_id for result in accepted])
            )
        _raise_for(results)

    async def _send(self, context: Context, settings: Settings) -> list[Result]:
        from include.refunds.ledger import Task
        from include.refunds.send import send_refunds
        from payroc_airflow.gateway import HookGateway
        from payroc_airflow.hooks.payroc import PayrocHook
        from payroc_airflow.keys import cipher_of

        ti = context["ti"]
        task = Task(run_id=context["run_id"], map_index=ti.map_index, try_number=ti.try_number)
        async with open_ledger(context, settings, self.ledger_conn_id) as ledger:
            label = _label(await ledger.refunds.labels(self.refund_ids))
            context["refund_label"] = label  # type: ignore[typeddict-unknown-key]
            # The message that ends the task carries it, so that Airflow does not send a request just for that.
            ti.rendered_map_index = label
            async with HookGateway(PayrocHook(payroc_conn_id=self.payroc_conn_id)) as gateway:
                return await send_refunds(
                    self.refund_ids,
                    task,
                    ledger=ledger,
                    gateway=gateway,
                    cipher=cipher_of(settings),
                    settings=settings,
                )


def _label(order_ids: Sequence[str]) -> str:
    few = len(order_ids) <= 3
    shown = [printable(order_id) for order_id in (order_ids if few else (order_ids[0], order_ids[-1]))]
    label = ", ".join(shown) if few else f"{' to '.join(shown)} ({len(order_ids)})"
    return label[:_LONGEST_LABEL]


def _name(result: Result) -> str:
    return f"Order {printable(result.order_id)}" if result.order_id else f"Refund {result.refund_id}"


def _raise_for(results: Sequence[Result]) -> None:
    """Raise for the most serious result: what stops all, then what a retry mends, then what only people mend."""
    from include.refunds.send import Sent

    order = list(Sent)
    worst = min(results, key=lambda result: order.index(result.sent), default=None)
    if worst is None or worst.sent is Sent.ACCEPTED:
        return
    same = [result for result in results if result.sent is worst.sent]
    message = f"{_name(worst)}: {printable(worst.reason)}" + (
        f" ({len(same) - 1} more like it)" if len(same) > 1 else ""
    )
    if worst.sent is Sent.CONFIGURATION:
        raise RefundsStopped(message)
    if worst.sent in (Sent.UNKNOWN, Sent.BUSY):
        raise RefundsInDoubt(
            message, min(result.retry_after for result in results if result.sent in (Sent.UNKNOWN, Sent.BUSY))
        )
    raise RefundsNotPaid(message)
