"""Looking a refund up at Payroc, by its order id. It only reads."""

from __future__ import annotations

from include.payroc.models import AccessToken
from include.refunds.classify import Verdict, judge_look_up
from include.refunds.gateway import Gateway
from include.refunds.refund import Refund


async def look_up(token: AccessToken, refund: Refund, gateway: Gateway) -> Verdict | None:
    """
    Return what Payroc's list says of a refund, or ``None`` when it does not list it, which proves nothing.

    :raises PayrocError: when the list did not come.
    """
    listed = gateway.list_refunds(token, processing_terminal_id=refund.processing_terminal_id, order_id=refund.order_id)
    return judge_look_up([item async for item in listed], refund)
