"""The protocol's gateway to Payroc, over :class:`~payroc_airflow.hooks.payroc.PayrocHook`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime

from include.payroc.errors import PayrocError
from include.payroc.models import AccessToken, Refund
from include.payroc.problems import NOT_AUTHORIZED
from payroc_airflow import metrics
from payroc_airflow.hooks.payroc import PayrocHook
from payroc_airflow.task_context import outside_of_tasks


class HookGateway:
    """
    Calls the hook from the protocol's event loop.

    :param hook: the hook; its connection is read here.
    :raises PayrocConfigurationError: when the connection can't be used.
    """

    def __init__(self, hook: PayrocHook) -> None:
        self._hook = hook
        self.environment = hook.api_url
        self.sent_with = hook.sent_with

    async def token(self, *, younger_than: float | None = None) -> AccessToken:
        """Return a token from the hook's cache, or a new one."""
        return await asyncio.to_thread(self._hook.get_token, younger_than=younger_than)

    async def create_refund(self, token: AccessToken, idempotency_key: str, body: bytes) -> Refund:
        """POST once."""
        metrics.count("sent")
        with self._evicting(token):
            return await asyncio.to_thread(self._hook.create_refund, body, idempotency_key=idempotency_key, token=token)

    async def get_refund(self, token: AccessToken, refund_id: str) -> Refund:
        """Return one refund."""
        with self._evicting(token):
            return await asyncio.to_thread(self._hook.get_refund, refund_id, token=token)

    async def reverse_refund(self, token: AccessToken, refund_id: str, idempotency_key: str) -> Refund:
        """POST once."""
        with self._evicting(token):
            return await asyncio.to_thread(self._hook.reverse_refund, refund_id, idempotency_key=idempotency_key, token=token)

    async def list_refunds(
        self,
        token: AccessToken,
        *,
        processing_terminal_id: str,
        order_id: str | None = None,
        date_from: datetime | None = None,
        date_to: datetime | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[Refund]:
        """Yield refunds, each page fetched when it is needed."""
        refunds = self._hook.list_refunds(
            processing_terminal_id, order_id=order_id, date_from=date_from, date_to=date_to, limit=limit, token=token
        )
        with self._evicting(token):
            while (refund := await asyncio.to_thread(next, refunds, None)) is not None:
                yield refund

    @contextmanager
    def _evicting(self, token: AccessToken) -> Iterator[None]:
        """Forget exactly this token when Payroc refuses it, so that nobody takes it again."""
        try:
            yield
        except PayrocError as error:
            if error.http_status == 401 or error.problem_type == NOT_AUTHORIZED:
                self._hook.evict_token(token)
            raise


def connect(conn_id: str) -> HookGateway:
    """
    Return the gateway behind an Airflow connection: how the commands of ``include/`` reach Payroc, by an entry point.

    :param conn_id: Airflow connection of type ``payroc``.
    :raises PayrocConfigurationError: when the connection can't be used.
    """
    outside_of_tasks()
    return HookGateway(PayrocHook(payroc_conn_id=conn_id))
