"""
The list of refunds: filters, pages and links.

Assumptions, since Payroc does not say: newest first; ``dateFrom`` is inclusive and ``dateTo`` exclusive, both against
``order.dateTime``; ``nameOnAccount`` matches exactly; a refund counts as settled from its batch close on, also when it was returned
later, and ``settlementDate`` is that day in UTC; ``before`` together with ``after``, an unknown cursor, a limit outside 1 to 100 and an
instant without a zone are 400. ``hasMore`` says that older refunds follow; links are given only where something is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from include.sandbox.answers import Answer, Refusal
from include.sandbox.problems import problem
from include.sandbox.store import Condition, Store
from include.sandbox.validation import Error, invalid, required

STATUSES = ("ready", "pending", "declined", "complete", "admin", "reversal", "returned")
TYPES = ("refund", "unreferencedRefund")
DEFAULT_LIMIT = 10
MAX_LIMIT = 100
DAY_SECONDS = 24 * 3600


@dataclass(frozen=True)
class ListQuery:
    """
    A checked query.

    :param conditions: the filters.
    :param limit: refunds per page.
    :param cursor: refund id of the neighbour of the page, None for the first page.
    :param backwards: the page ends before the cursor instead of starting after it.
    """

    conditions: Sequence[Condition]
    limit: int
    cursor: str | None
    backwards: bool


def read_query(query: QueryParams) -> ListQuery:
    """
    Check the query of a list request.

    :raises Refusal: with a ``bad-request`` that names every bad parameter.
    """
    errors: list[Error] = []
    conditions: list[Condition] = []

    def text(name: str, column: str, *, shortest: int, longest: int) -> None:
        if name in query:
            if shortest <= len(query[name]) <= longest:
                conditions.append(Condition(f"{column} = ?", (query[name],)))
            else:
                errors.append(invalid(name))

    def words(name: str, allowed: Sequence[str], condition: Callable[[list[str]], Condition]) -> None:
        values = query.getlist(name)
        if any(value not in allowed for value in values):
            errors.append(invalid(name))
        elif values:
            conditions.append(condition(values))

    def date_time(name: str, sql: str) -> None:
        if name in query:
            at = _instant(query[name])
            if at is None:
                errors.append(invalid(name, f"'{name}' must be a date and time with a zone"))
            else:
                conditions.append(Condition(sql, (at,)))

    if "processingTerminalId" not in query:
        errors.append(required("processingTerminalId"))
    text("processingTerminalId", "terminal", shortest=4, longest=50)
    text("orderId", "order_id", shortest=1, longest=24)
    text("nameOnAccount", "name", shortest=1, longest=50)
    if "last4" in query and not re.fullmatch("[0-9]{4}", query["last4"]):
        errors.append(invalid("last4"))
    else:
        text("last4", "last4", shortest=4, longest=4)
    # Every refund here is unreferenced; a referenced one belongs to a payment, and the sandbox has no payments.
    words("type", TYPES, lambda values: Condition("1" if "unreferencedRefund" in values else "0"))
    words("status", STATUSES, lambda values: Condition(f"status IN ({','.join('?' * len(values))})", values))
    date_time("dateFrom", "CAST(created_at AS INTEGER) >= ?")
    date_time("dateTo", "CAST(created_at AS INTEGER) < ?")
    words(
        "settlementState",
        ("settled", "unsettled"),
        lambda values: Condition(
            "settled_at IS NOT NULL" if values[-1] == "settled" else "settled_at IS NULL"
        ),
    )
    if "settlementDate" in query:
        day = _day(query["settlementDate"])
        if day is None:
            errors.append(invalid("settlementDate"))
        else:
            conditions.append(Condition("settled_at >= ? AND settled_at < ?", (day, day + DAY_SECONDS)))
    limit = DEFAULT_LIMIT
    if "limit" in query:
        limit = int(query["limit"]) if re.fullmatch("[0-9]{1,3}", query["limit"]) else 0
        if not 1 <= limit <= MAX_LIMIT:
            errors.append(invalid("limit", f"'limit' must be between 1 and {MAX_LIMIT}"))
    if "before" in query and "after" in query:
        errors.append(invalid("before", "'before' and 'after' exclude each other"))
    if errors:
        raise Refusal(problem("bad-request", errors=errors))
    return ListQuery(conditions, limit, query.get("before", query.get("after")), "before" in query)


def list_page(store: Store, query: QueryParams, url: str) -> Answer:
    """
    Answer a list request.

    :param url: absolute URL of the list without its query; the links repeat the filters on it.
    :raises Refusal: with a ``bad-request`` when the query is bad.
    """
    asked = read_query(query)
    duplicates = store.settings.list_duplicates
    rows = max(1, asked.limit // 2) if duplicates else asked.limit
    visible = [*asked.conditions, shown_refunds(store)]
    page_conditions = list(visible)
    if asked.cursor is not None:
        neighbour = store.refund(asked.cursor)
        if neighbour is None:
            raise Refusal(problem("bad-request", errors=[invalid("before" if asked.backwards else "after")]))
        page_conditions.append(_newer(neighbour.seq) if asked.backwards else _older(neighbour.seq))
    page = store.refunds(page_conditions, newest_first=not asked.backwards, limit=rows)
    if asked.backwards:
        page.reverse()

    has_more = bool(page) and store.has_refund([*visible, _older(page[-1].seq)])
    filters = [
        (name, value) for name, value in query.multi_items() if name not in ("before", "after", "limit")
    ]
    filters.append(("limit", str(asked.limit)))
    links = []
    if has_more:
        links.append(_link("next", url, [*filters, ("after", page[-1].refund_id)]))
    if page and store.has_refund([*visible, _newer(page[0].seq)]):
        links.append(_link("previous", url, [*filters, ("before", page[0].refund_id)]))
    data = [refund.object for refund in page for _ in range(2 if duplicates else 1)][: asked.limit]
    return Answer(
        200,
        json.dumps(
            {"limit": asked.limit, "count": len(data), "hasMore": has_more, "data": data, "links": links}
        ),
    )


def shown_refunds(store: Store) -> Condition:
    """Condition that limits list and get to the refunds that are old enough to be shown, by the lag that the admin endpoints set."""
    lag = store.settings.list_lag_seconds
    return Condition("created_at <= ?", (store.now() - lag,)) if lag else Condition("1")


def _older(seq: int) -> Condition:
    return Condition("seq < ?", (seq,))


def _newer(seq: int) -> Condition:
    return Condition("seq > ?", (seq,))


def _link(rel: str, url: str, query: Sequence[tuple[str, str]]) -> dict[str, str]:
    return {"rel": rel, "method": "get", "href": f"{url}?{urlencode(query)}"}


def _instant(text: str) -> float | None:
    """Read a date and time with a zone as seconds since the epoch."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return at.timestamp() if at.tzinfo is not None and "T" in text.upper() else None


def _day(text: str) -> float | None:
    """Read the begin of a day in UTC as seconds since the epoch."""
    return _instant(f"{text}T00:00:00+00:00") if re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text) else None
