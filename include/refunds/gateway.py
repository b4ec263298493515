"""The one way from the protocol to Payroc, as an interface: Airflow's hook in production, a simulation in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

from include.payroc.models import AccessToken, Refund


class Reader(Protocol):
    """
    Payroc, as somebody sees it who only reads.

    A token that Payroc answers with 401 is forgotten, that very token and no newer one.

    Every method raises :class:`~include.payroc.errors.PayrocError` when Payroc gives no usable answer, and
    :class:`~include.payroc.errors.PayrocConfigurationError` when our side is not set up to ask.
    """

    @property
    def environment(self) -> str:
        """The API base URL: which Payroc this is. A ledger belongs to one of them."""

    @property
    def sent_with(self) -> str:
        """Hash of API base URL and API key: a key's replay is only known to hold for the same two."""

    async def token(self, *, younger_than: float | None = None) -> AccessToken:
        """
        Return a bearer token with enough life left for one attempt.

        :param younger_than: seconds; a token received longer ago than this must be replaced by a new one.
        """

    async def get_refund(self, token: AccessToken, refund_id: str) -> Refund:
        """
        Return one refund.

        :param refund_id: Payroc's id of it.
        """

    def list_refunds(
        self,
        token: AccessToken,
        *,
        processing_terminal_id: str,
        order_id: str | None = None,
        date_from: datetime | None = None,
        date_to: datetime | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[Refund]:
        """
        Yield the unreferenced refunds of a terminal, all pages.

        :param date_from: only those made after this instant.
        :param date_to: only those made before this instant.
        :param limit: stop after so many objects; ``None`` reads to the end.
        :raises PayrocIncompleteList: at the end, when the list held objects that can't be understood; all others were yielded.
        """


class Gateway(Reader, Protocol):
    """Payroc, as the protocol sees it: read, and sent to."""

    @property
    def connection(self) -> str:
        """How a message names the connection, for example ``Airflow connection 'payroc_default'``."""

    def queue(self) -> AbstractAsyncContextManager[None]:
        """
        Hold one of the places of those who wait for their turn or have it: entering waits until there is one,
        before anything is claimed.

        There are more than turns, so that the next ones are claimed while Payroc answers; not many more,
        because what was claimed by a worker that dies stays locked for the life of its token.
        """

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Hold one of the places for what is under way to Payroc: entering waits until there is one."""

    async def create_refund(self, token: AccessToken, idempotency_key: str, body: bytes) -> Refund:
        """POST the frozen body once, with no retry inside."""

    async def reverse_refund(self, token: AccessToken, refund_id: str, idempotency_key: str) -> Refund:
        """
        POST the reversal of a refund in the open batch once, with no retry inside.

        :param refund_id: Payroc's id of it.
        :param idempotency_key: never the one that the refund was created with.
        """
