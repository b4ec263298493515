"""Reads of Payroc that outlive a token which Payroc has taken back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime

from include.payroc.errors import PayrocError
from include.payroc.models import AccessToken, Refund
from include.refunds.gateway import Reader


class FreshTokenReader:
    """
    Read Payroc for a command or the follow-up: what is refused with 401 is read once more, with a token
    received after that.

    The tasks of a host share a token, and Payroc may take it back before its end. A send attempt never uses
    this: it lives and ends with the one token it took before its claim.

    :param reader: the way to Payroc.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.environment = reader.environment
        self.sent_with = reader.sent_with
        self._refused: AccessToken | None = None
        self._fresh: AccessToken | None = None

    async def token(self, *, younger_than: float | None = None) -> AccessToken:
        """Return a bearer token, as a reader does."""
        return await self._reader.token(younger_than=younger_than)

    async def get_refund(self, token: AccessToken, refund_id: str) -> Refund:
        """Return one refund, as a reader does."""
        try:
            return await self._reader.get_refund(self._newer(token), refund_id)
        except PayrocError as error:
            return await self._reader.get_refund(await self._instead_of(token, error), refund_id)

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
        """Yield refunds, as a reader does; with a fresh token from the first one again."""

        def listed(token: AccessToken) -> AsyncIterator[Refund]:
            return self._reader.list_refunds(
                token,
                processing_terminal_id=processing_terminal_id,
                order_id=order_id,
                date_from=date_from,
                date_to=date_to,
                limit=limit,
            )

        try:
            async for refund in listed(self._newer(token)):
                yield refund
        except PayrocError as error:
            fresh = await self._instead_of(token, error)
        else:
            return
        async for refund in listed(fresh):
            yield refund

    def _newer(self, token: AccessToken) -> AccessToken:
        return self._fresh if self._fresh is not None and token == self._refused else token

    async def _instead_of(self, token: AccessToken, error: PayrocError) -> AccessToken:
        """
        Return a token received after one was refused.

        :raises PayrocError: the error itself, when it is no refusal of a token, or a fresh one was refused
            too.
        """
        if error.http_status != 401 or token == self._refused:
            raise error
        self._refused, self._fresh = token, await self._reader.token(younger_than=0)
        return self._fresh
