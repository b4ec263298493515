"""The protocol's gateway to Payroc, over the connection of :class:`~payroc_airflow.hooks.payroc.PayrocHook`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from types import TracebackType
from typing import Self, TypeVar

from include.payroc.errors import PayrocError
from include.payroc.models import AccessToken, Refund
from include.payroc.problems import NOT_AUTHORIZED
from include.refunds.settings import get_settings
from payroc_airflow import metrics
from payroc_airflow.hooks.payroc import PayrocHook
from payroc_airflow.limiter import Limiter
from payroc_airflow.task_context import outside_of_tasks
from payroc_airflow.token_cache import shared_folder

Answer = TypeVar("Answer")


class HookGateway:
    """
    Calls Payroc from the protocol's event loop.

    As an async context manager it closes its connections and leaves its share of the requests in flight; without, the end of the loop
    and of the process do.

    :param hook: the hook; its connection is read here.
    :raises PayrocConfigurationError: when the connection can't be used.
    """

    def __init__(self, hook: PayrocHook) -> None:
        self._hook = hook
        self._client = hook.client
        self.connection = f"Airflow connection {hook.payroc_conn_id!r}"
        self.environment = hook.api_url
        self.sent_with = hook.sent_with
        settings = get_settings()
        self._limiter = Limiter(
            shared_folder(), self.sent_with[:16], settings.requests_in_flight, settings.requests_per_second
        )

    async def __aenter__(self) -> Self:
        """Return the gateway."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the gateway."""
        await self.close()

    async def close(self) -> None:
        """Close the connections of the running event loop, and leave the share of the requests in flight to others."""
        self._limiter.leave()
        await self._client.close()

    def queue(self) -> AbstractAsyncContextManager[None]:
        """Hold one of the places of those who are claimed, or sent, or both."""
        return self._limiter.queue()

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Hold one of the places for what is under way to Payroc."""
        return self._limiter.turn()

    async def token(self, *, younger_than: float | None = None) -> AccessToken:
        """Return a token from the hook's cache, or a new one."""
        token = await self._client.get_token(younger_than=younger_than)
        self._hook.mask(token)
        return token

    async def create_refund(self, token: AccessToken, idempotency_key: str, body: bytes) -> Refund:
        """POST once."""
        metrics.count("sent")
        return await self._heeded(token, self._client.create_refund(token, idempotency_key, body))

    async def get_refund(self, token: AccessToken, refund_id: str) -> Refund:
        """Return one refund."""
        return await self._heeded(token, self._client.get_refund(token, refund_id))

    async def reverse_refund(self, token: AccessToken, refund_id: str, idempotency_key: str) -> Refund:
        """POST once."""
        return await self._heeded(token, self._client.reverse_refund(token, refund_id, idempotency_key))

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
        pages = self._client.pages(
            processing_terminal_id, order_id=order_id, date_from=date_from, date_to=date_to, limit=limit
        )
        more = True
        while more:
            for refund in await self._heeded(token, pages.fetch(token)):
                yield refund
            more = pages.advance()

    async def _heeded(self, token: AccessToken, call: Awaitable[Answer]) -> Answer:
        """Forget exactly this token when Payroc refuses it, so that nobody takes it again; go slower when it says so."""
        try:
            answer = await call
        except PayrocError as error:
            if error.http_status == 401 or error.problem_type == NOT_AUTHORIZED:
                await self._client.evict_token(token)
            if error.http_status == 429 or (error.http_status == 503 and error.retry_after is not None):
                self._limiter.refused(error.retry_after)
            raise
        self._limiter.answered()
        return answer


def connect(conn_id: str) -> HookGateway:
    """
    Return the gateway behind an Airflow connection: how the commands of ``include/`` reach Payroc, by an entry point.

    :param conn_id: Airflow connection of type ``payroc``.
    :raises PayrocConfigurationError: when the connection can't be used.
    """
    outside_of_tasks()
    return HookGateway(PayrocHook(payroc_conn_id=conn_id))
