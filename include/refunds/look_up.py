"""Looking a refund up at Payroc, by its order id. It only reads."""

from __future__ import annotations

from datetime import datetime, timedelta

from include.payroc.errors import PayrocError
from include.payroc.models import AccessToken
from include.payroc.models import Refund as Found
from include.refunds.classify import Outcome, Verdict, judge_look_up
from include.refunds.gateway import Reader
from include.refunds.refund import Refund
from include.refunds.settings import Settings


async def look_up(token: AccessToken, refund: Refund, reader: Reader) -> Verdict | None:
    """
    Return what Payroc's list says of a refund, or ``None`` when it does not list it, which proves nothing.

    :raises PayrocError: when the list did not come, or not as a whole. A hit counts all the same: what was not seen can't undo it.
    """
    listed = reader.list_refunds(
        token, processing_terminal_id=refund.processing_terminal_id, order_id=refund.order_id
    )
    found: list[Found] = []
    try:
        async for item in listed:
            found.append(item)
    except PayrocError:
        verdict = judge_look_up(found, refund)
        if verdict is None or not verdict.is_hit:
            raise
        return verdict
    return judge_look_up(found, refund)


async def look_up_in_doubt(
    token: AccessToken, refund: Refund, reader: Reader, settings: Settings, now: datetime
) -> Verdict | None:
    """
    Look up a refund whose outcome is not known. One that Payroc does not list, and that may not be sent
    again, is for an operator.

    :param now: the ledger's time.
    :returns: ``None`` when there is nothing to record: it may still be sent under its key.
    :raises PayrocError: when the list did not come, or not as a whole.
    """
    verdict = await look_up(token, refund, reader)
    if verdict is None and past_window(refund, reader, settings, now):
        return Verdict(
            Outcome.REVIEW, "Its key may no longer be sent again, and Payroc lists no refund with it."
        )
    return verdict


def past_window(refund: Refund, reader: Reader, settings: Settings, now: datetime) -> bool:
    """
    Tell whether a refund's key may no longer be sent.

    Payroc keeps a key for 7 days (https://docs.payroc.com/api/idempotency); later, or with another API host or key, the
    same key may be taken for a new one.
    """
    if refund.first_sent_at is None:
        return False
    return (
        now - refund.first_sent_at >= timedelta(days=settings.key_window_days)
        or refund.sent_with != reader.sent_with
    )
