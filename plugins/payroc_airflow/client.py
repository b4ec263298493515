"""Payroc's operations as coroutines: what is sent, and what an answer means. It knows nothing of Airflow's connections."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from typing import Literal, TypeVar
from urllib.parse import quote, urljoin, urlsplit
from uuid import UUID

from pydantic import BaseModel

from include.payroc import answers
from include.payroc.errors import (
    OBJECTS_NAMED,
    PayrocConfigurationError,
    PayrocError,
    PayrocIncompleteList,
    PayrocProblem,
    PayrocUnexpectedAnswer,
)
from include.payroc.models import AccessToken, Problem, Refund
from payroc_airflow.connection import PayrocConnection
from payroc_airflow.metrics import timed
from payroc_airflow.token_cache import TokenCache, token_cache
from payroc_airflow.transport import Answer, Transport

MAX_TOKEN_SECONDS = 24 * 60 * 60
"""A refund in flight stays locked for the life of its token; one that lives longer than a day would lock it for days."""

MAX_PAGES = 10_000
"""A million refunds at 100 a page; beyond that the list does not end."""

PROBLEM_JSON = "application/problem+json"

LIST = "list refunds"

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")

_UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class PayrocClient:
    """
    Call Payroc, each call one request; :class:`~payroc_airflow.hooks.payroc.PayrocHook` says what each does and raises.

    It may be used by several event loops and threads.

    :param connection: where Payroc is.
    :param conn_id: name of the Airflow connection, for messages.
    :param timeout: seconds to connect, and seconds to wait for an answer; a whole exchange may take twice that.
    """

    def __init__(self, connection: PayrocConnection, conn_id: str, timeout: float) -> None:
        self._connection = connection
        self._conn_id = conn_id
        self._timeout = timeout
        self._transport = Transport(connection, timeout)
        self._refunds_url = f"{connection.api_url}/bank-transfer-refunds"

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        await self._transport.close()

    async def get_token(self, *, younger_than: float | None = None) -> AccessToken:
        """Return a token from the cache, or a new one."""
        return await self._token_cache.get(self.fetch_token, younger_than=younger_than)

    async def evict_token(self, token: AccessToken) -> None:
        """Forget exactly this token."""
        await self._token_cache.evict(token)

    async def fetch_token(self) -> AccessToken:
        """Ask Payroc for a token."""
        operation = "authorize"
        url = f"{self._connection.identity_url}/authorize"
        with timed(_latency(operation)):
            answer = await self._transport.exchange(
                operation, "POST", url, headers={"x-api-key": self._connection.api_key}
            )
        token = _parse(AccessToken, operation, answer, (200,))
        if token.expires_in > MAX_TOKEN_SECONDS:
            raise PayrocConfigurationError(
                f"Airflow connection {self._conn_id!r}: {self._connection.identity_url} gives tokens that live {token.expires_in} s; "
                "more than 24 hours is not supported, because a refund in flight stays locked for the life of its token."
            )
        return token

    async def create_refund(self, token: AccessToken, idempotency_key: str | UUID, body: bytes) -> Refund:
        """POST once."""
        operation = "create refund"
        answer = await self._call(
            operation, "POST", self._refunds_url, token, idempotency_key=idempotency_key, body=body
        )
        # The contract is 201; some of Payroc's own examples show 200.
        return _parse(Refund, operation, answer, (201, 200))

    async def get_refund(self, token: AccessToken, refund_id: str) -> Refund:
        """Return one refund."""
        operation = "get refund"
        answer = await self._call(operation, "GET", self._refund_url(refund_id), token)
        return _same_refund(refund_id, _parse(Refund, operation, answer, (200,)), operation)

    async def reverse_refund(self, token: AccessToken, refund_id: str, idempotency_key: str | UUID) -> Refund:
        """POST once."""
        operation = "reverse refund"
        url = f"{self._refund_url(refund_id)}/reverse"
        answer = await self._call(operation, "POST", url, token, idempotency_key=idempotency_key)
        return _same_refund(refund_id, _parse(Refund, operation, answer, (200,)), operation)

    def pages(
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
    ) -> Pages:
        """Return the pages of a terminal's refunds; nothing is sent yet."""
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
        params += (
            [("dateTo", _instant(date_to + timedelta(microseconds=999_999)))] if date_to is not None else []
        )
        params += [("last4", last4)] if last4 is not None else []
        params += [("settlementState", settlement_state)] if settlement_state is not None else []
        params += [("limit", str(min(page_size, limit or page_size)))]
        return Pages(self, self._refunds_url, params, limit)

    async def list_page(
        self, token: AccessToken, url: str, params: list[tuple[str, str]] | None, number: int
    ) -> answers.Page:
        """Return one page of a list; its number is counted from 1."""
        answer = await self._call(LIST, "GET", url, token, params=params)
        return _read(lambda body: answers.read_page(body, number), LIST, answer, (200,))

    @cached_property
    def _token_cache(self) -> TokenCache:
        return token_cache(self._connection, lock_seconds=2 * self._timeout)

    def _refund_url(self, refund_id: str) -> str:
        return f"{self._refunds_url}/{quote(refund_id, safe='')}"

    async def _call(
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
            return await self._transport.exchange(
                operation, method, url, headers=headers, params=params, body=body
            )


class Pages:
    """
    A list of refunds, page by page: :meth:`fetch` one, then :meth:`advance` to the next, as long as that says that there is one.

    :param limit: stop after so many objects; ``None`` reads to the end.
    """

    def __init__(
        self, client: PayrocClient, url: str, params: list[tuple[str, str]], limit: int | None
    ) -> None:
        self._client = client
        self._first = self._url = url
        self._params: list[tuple[str, str]] | None = params
        self._left = limit
        self._missing = 0
        self._names: list[str] = []
        self._seen: set[str] = set()
        self._fetched = 0
        self._page: answers.Page | None = None

    async def fetch(self, token: AccessToken) -> Sequence[Refund]:
        """Return the refunds of the page at which the list stands."""
        self._page = await self._client.list_page(token, self._url, self._params, self._fetched + 1)
        self._fetched += 1
        # A list may show an object on two pages.
        new = [name for name in self._page.not_understood if name not in self._names]
        self._missing += len(new)
        self._names = [*self._names, *new][:OBJECTS_NAMED]
        refunds = self._page.refunds[: self._left]
        if self._left is not None:
            self._left = max(0, self._left - len(refunds) - len(self._page.not_understood))
        return refunds

    def advance(self) -> bool:
        """
        Tell whether the list goes on, and turn to the next page.

        :raises PayrocIncompleteList: the list has ended, and it held objects that can't be understood.
        :raises PayrocUnexpectedAnswer: the page does not lead on properly.
        """
        if self._page is None:
            return False
        if self._left == 0 or not self._page.has_more:
            if self._missing:
                raise PayrocIncompleteList(LIST, self._missing, self._names)
            return False
        href = next((link.href for link in self._page.links if link.rel == "next"), None)
        if href is None:
            raise PayrocUnexpectedAnswer(
                LIST, "the list has more pages but no link to the next", http_status=200
            )
        # The token goes along, so a link may lead nowhere else.
        self._url, self._params = _next_page(href, self._first), None
        if self._url in self._seen:
            raise PayrocUnexpectedAnswer(LIST, "the pages go round in a circle", http_status=200)
        self._seen.add(self._url)
        if self._fetched == MAX_PAGES:
            raise PayrocUnexpectedAnswer(LIST, f"the list did not end after {MAX_PAGES} pages")
        return True


def _latency(operation: str) -> str:
    return f"latency.{operation.replace(' ', '_')}"


def _same_refund(refund_id: str, refund: Refund, operation: str) -> Refund:
    if refund.refund_id != refund_id:
        raise PayrocUnexpectedAnswer(operation, "the answer is another refund", http_status=200)
    return refund


def _uuid4(key: str | UUID) -> str:
    text = str(key).lower()
    if not _UUID4.fullmatch(text):
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


def _next_page(href: str, first: str) -> str:
    try:
        url = quote(urljoin(first, href), safe="!#$%&'()*+,/:;=?@[]~")
        there, here = urlsplit(url), urlsplit(first)
        same = (there.scheme, there.netloc, there.path) == (here.scheme, here.netloc, here.path)
    except ValueError:
        same = False
    if not same:
        raise PayrocUnexpectedAnswer(LIST, "the link to the next page leads elsewhere", http_status=200)
    return url


def _parse(model: type[Model], operation: str, answer: Answer, expected: tuple[int, ...]) -> Model:
    return _read(partial(answers.read, model), operation, answer, expected)


def _read(
    read: Callable[[bytes], Result], operation: str, answer: Answer, expected: tuple[int, ...]
) -> Result:
    if answer.status >= 400:
        raise _refusal(operation, answer)
    if answer.status not in expected:
        kind = (
            "a redirect, which is not followed"
            if 300 <= answer.status < 400
            else "a status that this operation does not have"
        )
        raise PayrocUnexpectedAnswer(
            operation, kind, http_status=answer.status, retry_after=answer.retry_after
        )
    if not answer.body:
        raise PayrocUnexpectedAnswer(operation, "an empty body", http_status=answer.status)
    try:
        return read(answer.body)
    except answers.NotUnderstood as error:
        detail = f"the body is not what this operation returns ({error})"
    raise PayrocUnexpectedAnswer(operation, detail, http_status=answer.status)


def _refusal(operation: str, answer: Answer) -> PayrocError:
    try:
        problem = answers.read(Problem, answer.body)
    except answers.NotUnderstood:
        problem = None
    # Any server's JSON may have a "type"; without the content type it takes all of the format's members to be Payroc's.
    if problem is None or not (answer.content_type == PROBLEM_JSON or problem.complete):
        return PayrocUnexpectedAnswer(
            operation,
            "an error that is not in Payroc's problem format",
            http_status=answer.status,
            retry_after=answer.retry_after,
        )
    parameters = tuple(
        dict.fromkeys(name for item in problem.errors or () if (name := _field_name(item.parameter)))
    )[:10]
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
    return (
        text
        if text is not None and re.fullmatch(r"(?!.*[0-9]{4})[A-Za-z_][A-Za-z0-9_.\[\]]{0,63}", text)
        else None
    )
