"""Payroc's bank-transfer refunds for Airflow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar
from urllib.parse import quote, urljoin, urlsplit
from uuid import UUID

from airflow.providers.http.hooks.http import HttpHook
from airflow.sdk.exceptions import AirflowException
from airflow.sdk.log import mask_secret
from pydantic import BaseModel, ValidationError

from include.payroc.errors import (
    PayrocConfigurationError,
    PayrocError,
    PayrocIncompleteList,
    PayrocNoAnswer,
    PayrocProblem,
    PayrocUnexpectedAnswer,
)
from include.payroc.models import AccessToken, Problem, Refund, RefundPage, RefundRequest, explain
from include.refunds.settings import get_settings
from payroc_airflow.connection import PayrocConnection, read_connection
from payroc_airflow.metrics import timed
from payroc_airflow.token_cache import FileTokenCache, MemoryTokenCache, TokenCache, default_folder
from payroc_airflow.transport import Answer, exchange, new_session

if TYPE_CHECKING:
    import requests

MAX_TOKEN_SECONDS = 24 * 60 * 60
"""A refund in flight stays locked for the life of its token; one that lives longer than a day would lock it for days."""

MAX_PAGES = 10_000
"""A million refunds at 100 a page; beyond that the list does not end."""

PROBLEM_JSON = "application/problem+json"

Model = TypeVar("Model", bound=BaseModel)


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

    def __init__(self, *, payroc_conn_id: str = default_conn_name, timeout_seconds: float | None = None) -> None:
        super().__init__(http_conn_id=payroc_conn_id)
        self.payroc_conn_id = payroc_conn_id
        self._timeout_seconds = timeout_seconds

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
        token = self._token_cache.get(self._fetch_token, younger_than=younger_than)
        mask_secret(token.access_token.get_secret_value())
        return token

    def evict_token(self, token: AccessToken) -> None:
        """
        Forget a token that Payroc refused.

        :param token: only this very token is removed from the cache; a newer one stays.
        """
        self._token_cache.evict(token)

    def create_refund(self, body: bytes | RefundRequest, *, idempotency_key: str | UUID, token: AccessToken) -> Refund:
        """
        Ask for a refund (``POST /bank-transfer-refunds``), once.

        An error does not mean that nothing was refunded: only a definitive :class:`~include.payroc.errors.PayrocProblem` does.

        :param body: bytes are sent as they are; under one key they must be the same every time.
        :param idempotency_key: UUID v4; Payroc replays the first answer to it for 7 days (https://docs.payroc.com/api/idempotency).
        :param token: from :meth:`get_token`; the cache is not read here, so that an old token can't be renewed unnoticed.
        :raises ValueError: the key is not a UUID v4; nothing was sent.
        :raises PayrocError: no refund came back.
        """
        return self._refund(
            "create refund",
            "POST",
            "/bank-transfer-refunds",
            token,
            idempotency_key=idempotency_key,
            body=body.to_body() if isinstance(body, RefundRequest) else body,
            # The contract is 201; some of Payroc's own examples show 200.
            expected=(201, 200),
        )

    def get_refund(self, refund_id: str, *, token: AccessToken | None = None) -> Refund:
        """
        Return one refund (``GET /bank-transfer-refunds/{refundId}``).

        :param refund_id: 10 characters.
        :param token: ``None`` takes one from the cache.
        :raises PayrocError: no refund came back.
        """
        return self._same_refund(refund_id, self._refund("get refund", "GET", _refund_path(refund_id), token or self.get_token()))

    def reverse_refund(self, refund_id: str, *, idempotency_key: str | UUID, token: AccessToken | None = None) -> Refund:
        """
        Take a refund out of the open batch (``POST /bank-transfer-refunds/{refundId}/reverse``); no money moves then.

        :param refund_id: 10 characters.
        :param idempotency_key: UUID v4, not the one that the refund was created with.
        :param token: ``None`` takes one from the cache.
        :raises ValueError: the key is not a UUID v4; nothing was sent.
        :raises PayrocError: no refund came back; it may be reversed all the same.
        """
        path = f"{_refund_path(refund_id)}/reverse"
        refund = self._refund("reverse refund", "POST", path, token or self.get_token(), idempotency_key=idempotency_key)
        return self._same_refund(refund_id, refund, "reverse refund")

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
        if not 1 <= page_size <= 100:
            raise ValueError("page_size must be 1 to 100.")
        if limit is not None and limit < 1:
            raise ValueError("limit must be at least 1.")
        if last4 is not None and not re.fullmatch(r"[0-9]{4}", last4):
            raise ValueError("last4 must be four digits.")
        params: list[tuple[str, str]] = [("processingTerminalId", processing_terminal_id)]
        params += [("orderId", order_id)] if order_id is not None else []
        params += [("type", word) for word in _words(refund_type)]
        params += [("status", word) for word in _words(status)]
        params += [("dateFrom", _instant(date_from))] if date_from is not None else []
        params += [("dateTo", _instant(date_to + timedelta(microseconds=999_999)))] if date_to is not None else []
        params += [("last4", last4)] if last4 is not None else []
        params += [("settlementState", settlement_state)] if settlement_state is not None else []
        params += [("limit", str(min(page_size, limit or page_size)))]
        return self._pages(params, limit, token)

    def test_connection(self) -> tuple[bool, str]:
        """
        Fetch a token from Payroc itself, and nothing else; the sentence is shown in Airflow's UI.

        It does not name the connection: Airflow tests a copy, with an id that nobody knows.
        """
        try:
            self._fetch_token()
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

    def get_conn(self, headers: dict[Any, Any] | None = None, extra_options: dict[str, Any] | None = None) -> requests.Session:
        """Return the hook's session, without any credentials; what ``HttpHook`` would add to it is refused."""
        if headers or extra_options:
            self.run()
        return self._session

    def run(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a request of any form would go around the checks of the other methods."""
        raise AirflowException("PayrocHook sends no free-form requests; use create_refund, get_refund, list_refunds or reverse_refund.")

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

    @cached_property
    def _session(self) -> requests.Session:
        return new_session(self._connection)

    @cached_property
    def _token_cache(self) -> TokenCache:
        settings = get_settings()
        if not settings.token_cache:
            return MemoryTokenCache()
        folder = settings.token_cache_dir or default_folder()
        return FileTokenCache(folder, self._connection, lock_seconds=2 * self._timeout)

    @property
    def _timeout(self) -> float:
        return get_settings().http_timeout_seconds if self._timeout_seconds is None else self._timeout_seconds

    def _fetch_token(self) -> AccessToken:
        operation = "authorize"
        headers = {"x-api-key": self._connection.api_key}
        with timed(_latency(operation)):
            answer = exchange(self._session, operation, "POST", f"{self.identity_url}/authorize", timeout=self._timeout, headers=headers)
        token = _parse(AccessToken, operation, answer, (200,))
        mask_secret(token.access_token.get_secret_value())
        if token.expires_in > MAX_TOKEN_SECONDS:
            raise PayrocConfigurationError(
                f"Airflow connection {self.payroc_conn_id!r}: {self.identity_url} gives tokens that live {token.expires_in} s; "
                "more than 24 hours is not supported, because a refund in flight stays locked for the life of its token."
            )
        return token

    def _call(
        self,
        operation: str,
        method: str,
        url: str,
        token: AccessToken,
        *,
        params: list[tuple[str, str]] | None = None,
        idempotency_key: str | UUID | None = None,
        body: bytes | None = None,
    ) -> Answer:
        headers = {"Authorization": f"Bearer {token.access_token.get_secret_value()}"}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = _uuid4(idempotency_key)
        if body is not None:
            headers["Content-Type"] = "application/json"
        with timed(_latency(operation)):
            return exchange(self._session, operation, method, url, timeout=self._timeout, headers=headers, params=params, body=body)

    def _refund(
        self,
        operation: str,
        method: str,
        path: str,
        token: AccessToken,
        *,
        idempotency_key: str | UUID | None = None,
        body: bytes | None = None,
        expected: tuple[int, ...] = (200,),
    ) -> Refund:
        answer = self._call(operation, method, f"{self.api_url}{path}", token, idempotency_key=idempotency_key, body=body)
        return _parse(Refund, operation, answer, expected)

    @staticmethod
    def _same_refund(refund_id: str, refund: Refund, operation: str = "get refund") -> Refund:
        if refund.refund_id != refund_id:
            raise PayrocUnexpectedAnswer(operation, "the answer is another refund", http_status=200)
        return refund

    def _pages(self, params: list[tuple[str, str]], limit: int | None, token: AccessToken | None) -> Iterator[Refund]:
        operation = "list refunds"
        first = url = f"{self.api_url}/bank-transfer-refunds"
        query: list[tuple[str, str]] | None = params
        seen: set[str] = set()
        left, missing = limit, 0
        for _ in range(MAX_PAGES):
            answer = self._call(operation, "GET", url, token or self.get_token(), params=query)
            page = _parse(RefundPage, operation, answer, (200,))
            for refund in page.data:
                if refund is None:
                    missing += 1
                    continue
                yield refund
                if left is not None:
                    left -= 1
                    if left == 0:
                        return
            if not page.has_more:
                if missing:
                    raise PayrocIncompleteList(operation, missing)
                return
            href = next((link.href for link in page.links if link.rel == "next"), None)
            if href is None:
                raise PayrocUnexpectedAnswer(operation, "the list has more pages but no link to the next", http_status=answer.status)
            # The token goes along, so a link may lead nowhere else.
            url, query = _next_page(href, first, operation), None
            if url in seen:
                raise PayrocUnexpectedAnswer(operation, "the pages go round in a circle", http_status=answer.status)
            seen.add(url)
        raise PayrocUnexpectedAnswer(operation, f"the list did not end after {MAX_PAGES} pages")


def _latency(operation: str) -> str:
    return f"latency.{operation.replace(' ', '_')}"


def _refund_path(refund_id: str) -> str:
    return f"/bank-transfer-refunds/{quote(refund_id, safe='')}"


def _uuid4(key: str | UUID) -> str:
    text = str(key).lower()
    if not re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", text):
        raise ValueError("The idempotency key must be a UUID v4.")
    return text


def _words(value: str | Sequence[str] | None) -> Sequence[str]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def _instant(value: datetime) -> str:
    if value.tzinfo is None:
        raise ValueError("A date must have a time zone.")
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _next_page(href: str, first: str, operation: str) -> str:
    try:
        url = urljoin(first, href)
        there, here = urlsplit(url), urlsplit(first)
        same = (there.scheme, there.netloc, there.path) == (here.scheme, here.netloc, here.path)
    except ValueError:
        same = False
    if not same:
        raise PayrocUnexpectedAnswer(operation, "the link to the next page leads elsewhere", http_status=200)
    return url


def _parse(model: type[Model], operation: str, answer: Answer, expected: tuple[int, ...]) -> Model:
    if answer.status >= 400:
        raise _refusal(operation, answer)
    if answer.status not in expected:
        kind = "a redirect, which is not followed" if 300 <= answer.status < 400 else "a status that this operation does not have"
        raise PayrocUnexpectedAnswer(operation, kind, http_status=answer.status, retry_after=answer.retry_after)
    if not answer.body:
        raise PayrocUnexpectedAnswer(operation, "an empty body", http_status=answer.status)
    try:
        return model.model_validate_json(answer.body)
    except ValidationError as error:
        fields = ", ".join(sorted(name or "the whole" for name in explain(error))[:5])
        detail = f"the body is not what this operation returns (see {fields})"
    raise PayrocUnexpectedAnswer(operation, detail, http_status=answer.status)


def _refusal(operation: str, answer: Answer) -> PayrocError:
    try:
        problem = Problem.model_validate_json(answer.body)
    except ValidationError:
        problem = None
    # Any server's JSON may have a "type"; without the content type it takes all of the format's members to be Payroc's.
    if problem is None or not (answer.content_type == PROBLEM_JSON or problem.complete):
        return PayrocUnexpectedAnswer(
            operation, "an error that is not in Payroc's problem format", http_status=answer.status, retry_after=answer.retry_after
        )
    parameters = tuple(dict.fromkeys(name for item in problem.errors or () if (name := _field_name(item.parameter))))[:10]
    fragment = _word(problem.fragment, 64)
    about = f" about {', '.join(parameters)}" if parameters else ""
    return PayrocProblem(
        operation,
        f"{fragment or 'a problem'}{about}",
        http_status=answer.status,
        problem_type=fragment,
        instance=_plain(problem.instance, 300),
        resource=_word(problem.resource, 100),
        parameters=parameters,
        retry_after=answer.retry_after,
    )


def _plain(text: str | None, most: int) -> str | None:
    """Return a server's word if it is one: what is said in free text could echo what was sent."""
    return text if text is not None and len(text) <= most and re.fullmatch(r"[!-~]+", text) else None


def _word(text: str | None, most: int) -> str | None:
    # A run of digits would be a value, not a word.
    return None if text is None or re.search(r"[0-9]{4}", text) else _plain(text, most)


def _field_name(text: str | None) -> str | None:
    # A run of digits would be a value, not a name.
    return text if text is not None and re.fullmatch(r"(?!.*[0-9]{4})[A-Za-z_][A-Za-z0-9_.\[\]]{0,63}", text) else None
