"""Payroc's bank-transfer refunds for Airflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit
from uuid import UUID

from airflow.providers.http.hooks.http import HttpHook
from airflow.sdk.exceptions import AirflowException
from airflow.sdk.log import mask_secret

from include.payroc.errors import PayrocConfigurationError, PayrocError, PayrocNoAnswer
from include.payroc.models import AccessToken, Refund, RefundRequest
from include.refunds.settings import get_settings
from payroc_airflow import own_loop
from payroc_airflow.client import Pages, PayrocClient
from payroc_airflow.connection import PayrocConnection, read_connection


class PayrocHook(HttpHook):
    """
    Call Payroc's unreferenced bank-transfer refunds (https://docs.payroc.com/api).

    The connection: password = API key; extra ``environment`` = ``uat`` (default) or ``production``, or ``host`` = API base URL with
    its path and extra ``identity_url``; extras ``allow_http``, ``proxy``, ``ca_bundle`` when they are needed.

    Every call is one request: no retry, no redirect, a limit on time and size. What is not a usable answer raises a
    :class:`~include.payroc.errors.PayrocError`, which holds no body, token or key. Of ``HttpHook`` only the place in Airflow is
    inherited; its generic ``run`` is closed, because it logs bodies and sends extras as headers.

    :param payroc_conn_id: Airflow connection.
    :param timeout_seconds: seconds to connect, and seconds to wait for an answer; the whole answer may take twice that.
        ``None`` takes the setting ``PAYROC_REFUNDS_HTTP_TIMEOUT_SECONDS``.
    """

    conn_name_attr = "payroc_conn_id"
    default_conn_name = "payroc_default"
    conn_type = "payroc"
    hook_name = "Payroc"

    def __init__(
        self, *, payroc_conn_id: str = default_conn_name, timeout_seconds: float | None = None
    ) -> None:
        super().__init__(http_conn_id=payroc_conn_id)
        self.payroc_conn_id = payroc_conn_id
        self._timeout_seconds = timeout_seconds
        self._masked: AccessToken | None = None

    @property
    def api_url(self) -> str:
        """
        API base URL, without a slash at its end.

        :raises PayrocConfigurationError: the connection can't be used.
        """
        return self._connection.api_url

    @property
    def identity_url(self) -> str:
        """
        Base URL of the identity service, without a slash at its end.

        :raises PayrocConfigurationError: the connection can't be used.
        """
        return self._connection.identity_url

    @property
    def sent_with(self) -> str:
        """
        SHA-256 of API URL and API key, in hex: under another pair an idempotency key may count as new.

        :raises PayrocConfigurationError: the connection can't be used.
        """
        return self._connection.sent_with

    def get_token(self, *, younger_than: float | None = None) -> AccessToken:
        """
        Return a bearer token, from the cache or new (``POST {identity}/authorize``, https://docs.payroc.com/api/authentication).

        It has at least 2 minutes left, or a fifth of its life if that is less. ``expires_in`` is its whole life, of which a token
        from the cache has lived a part: now plus ``expires_in`` is never before its end.

        :param younger_than: seconds; a token that was received at least so long ago is not returned.
        :raises PayrocConfigurationError: the connection can't be used, or tokens would live longer than 24 hours.
        :raises PayrocError: Payroc gave no token.
        """
        token = own_loop.run(self.client.get_token(younger_than=younger_than))
        self.mask(token)
        return token

    def evict_token(self, token: AccessToken) -> None:
        """
        Forget a token that Payroc refused.

        :param token: only this very token is removed from the cache; a newer one stays.
        """
        own_loop.run(self.client.evict_token(token))

    def create_refund(
        self, body: bytes | RefundRequest, *, idempotency_key: str | UUID, token: AccessToken
    ) -> Refund:
        """
        Ask for a refund (``POST /bank-transfer-refunds``), once.

        An error does not mean that nothing was refunded: only a definitive :class:`~include.payroc.errors.PayrocProblem` does.

        :param body: bytes are sent as they are; under one key they must be the same every time.
        :param idempotency_key: UUID v4; Payroc replays the first answer to it for 7 days (https://docs.payroc.com/api/idempotency).
        :param token: from :meth:`get_token`; the cache is not read here, so that an old token can't be renewed unnoticed.
        :raises ValueError: the key is not a UUID v4; nothing was sent.
        :raises PayrocError: no refund came back.
        """
        content = body.to_body() if isinstance(body, RefundRequest) else body
        return own_loop.run(self.client.create_refund(token, idempotency_key, content))

    def get_refund(self, refund_id: str, *, token: AccessToken | None = None) -> Refund:
        """
        Return one refund (``GET /bank-transfer-refunds/{refundId}``).

        :param refund_id: 10 characters.
        :param token: ``None`` takes one from the cache.
        :raises PayrocError: no refund came back.
        """
        return own_loop.run(self.client.get_refund(token or self.get_token(), refund_id))

    def reverse_refund(
        self, refund_id: str, *, idempotency_key: str | UUID, token: AccessToken | None = None
    ) -> Refund:
        """
        Take a refund out of the open batch (``POST /bank-transfer-refunds/{refundId}/reverse``); no money moves then.

        :param refund_id: 10 characters.
        :param idempotency_key: UUID v4, not the one that the refund was created with.
        :param token: ``None`` takes one from the cache.
        :raises ValueError: the key is not a UUID v4; nothing was sent.
        :raises PayrocError: no refund came back; it may be reversed all the same.
        """
        return own_loop.run(self.client.reverse_refund(token or self.get_token(), refund_id, idempotency_key))

    def list_refunds(
        self,
        processing_terminal_id: str,
        *,
        order_id: str | None = None,
        refund_type: str | Sequence[str] | None = "unreferencedRefund",
        status: str | Sequence[str] | None = None,
        date_from: datetime | None = None,
        date_to: datetime | None = None,
        last4: str | None = None,
        settlement_state: Literal["settled", "unsettled"] | None = None,
        page_size: int = 100,
        limit: int | None = None,
        token: AccessToken | None = None,
    ) -> Iterator[Refund]:
        """
        Yield the refunds of a terminal (``GET /bank-transfer-refunds``), page by page as they are asked for.

        Payroc promises no order. The account holder's name, by which Payroc could filter too, would stand in URLs and is not offered.

        :param processing_terminal_id: 4 to 50 characters.
        :param order_id: 1 to 24 characters.
        :param refund_type: ``refund``, ``unreferencedRefund`` or both; ``None`` for all.
        :param status: one or more of Payroc's status words; ``None`` for all.
        :param date_from: instant with a zone; whole seconds, rounded down.
        :param date_to: instant with a zone; whole seconds, rounded up.
        :param last4: last four digits of the account.
        :param settlement_state: ``settled`` or ``unsettled``; the refund itself does not tell.
        :param page_size: refunds per request, 1 to 100.
        :param limit: stop after so many refunds, at least 1; ``None`` reads to the end.
        :param token: ``None`` takes one from the cache, anew for each page.
        :raises ValueError: an argument is out of its bounds; nothing was sent.
        :raises PayrocIncompleteList: at the end of the list, when it held objects that can't be understood; all others were yielded.
        :raises PayrocError: a page did not come or does not lead on properly. An incomplete list is never passed off as a whole one.
        """
        pages = self.client.pages(
            processing_terminal_id,
            order_id=order_id,
            refund_type=refund_type,
            status=status,
            date_from=date_from,
            date_to=date_to,
            last4=last4,
            settlement_state=settlement_state,
            page_size=page_size,
            limit=limit,
        )
        return self._refunds(pages, token)

    @cached_property
    def client(self) -> PayrocClient:
        """
        The same calls as coroutines, for code that runs an event loop.

        :raises PayrocConfigurationError: the connection can't be used.
        """
        timeout = (
            get_settings().http_timeout_seconds if self._timeout_seconds is None else self._timeout_seconds
        )
        return PayrocClient(self._connection, self.payroc_conn_id, timeout)

    def mask(self, token: AccessToken) -> None:
        """Keep a token out of Airflow's logs; done for what :meth:`get_token` returns."""
        if token is not self._masked:
            mask_secret(token.access_token.get_secret_value())
            self._masked = token

    def test_connection(self) -> tuple[bool, str]:
        """
        Fetch a token from Payroc itself, and nothing else; the sentence is shown in Airflow's UI.

        It does not name the connection: Airflow tests a copy, with an id that nobody knows.
        """
        try:
            self.mask(own_loop.run(self.client.fetch_token()))
        except PayrocConfigurationError as error:
            return False, str(error).replace(f"Airflow connection {self.payroc_conn_id!r}", "This connection")
        except PayrocNoAnswer as error:
            return False, f"No answer from {self.identity_url}: {error.detail}."
        except PayrocError as error:
            if error.http_status in (401, 403):
                return False, (
                    f"Payroc refused the API key (HTTP {error.http_status}): copy the key again, and check that it belongs to "
                    f"{self.identity_url}."
                )
            return False, f"{error}; asked {self.identity_url}."
        return True, f"Payroc accepted the API key at {self.identity_url}."

    def run(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a request of any form would go around the checks of the other methods."""
        raise AirflowException(
            "PayrocHook sends no free-form requests; use create_refund, get_refund, list_refunds or reverse_refund."
        )

    get_conn = run
    run_and_check = run
    run_with_advanced_retry = run
    check_response = run

    @cached_property
    def _connection(self) -> PayrocConnection:
        try:
            airflow_connection = self.get_connection(self.payroc_conn_id)
        except (AirflowException, ValueError):
            # Airflow's text may quote the URI, and with it the API key.
            raise PayrocConfigurationError(
                f"Airflow connection {self.payroc_conn_id!r} is not defined or can't be read; "
                "create it with type payroc and Payroc's API key as its password."
            ) from None
        connection = read_connection(airflow_connection)
        # Airflow masks the password itself, but not what stands inside an extra.
        if connection.proxy is not None and (password := urlsplit(connection.proxy).password):
            mask_secret(password)
        return connection

    def _refunds(self, pages: Pages, token: AccessToken | None) -> Iterator[Refund]:
        yield from own_loop.run(pages.fetch(token or self.get_token()))
        while pages.advance():
            yield from own_loop.run(pages.fetch(token or self.get_token()))
