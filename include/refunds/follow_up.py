"""Follow-up: ask Payroc what became of refunds in doubt and of accepted ones. It only reads Payroc, it never POSTs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from itertools import groupby

from include.payroc.errors import PayrocError
from include.refunds.classify import Sighting, judge_object
from include.refunds.gateway import Gateway
from include.refunds.ledger import Ledger
from include.refunds.look_up import look_up
from include.refunds.refund import Refund

# An ACH return for an account that is closed or unknown has to be sent within two banking days; ten calendar days cover
# that, holidays and a weekend. Payroc does not document how long a refund may come back.
SETTLED_FOLLOWED_FOR = timedelta(days=10)

# Payroc's clock and the ledger's may differ, and whether dateFrom is inclusive is not documented.
_DATE_MARGIN = timedelta(days=1)


async def follow_up(ledger: Ledger, gateway: Gateway) -> Counter[str]:
    """
    Look up the refunds in doubt, and follow the accepted and the recently settled ones.

    :returns: how many refunds each of ``looked up``, ``found``, ``followed``, ``changed`` and ``returned to approved`` counts.
    :raises PayrocError: when Payroc gives no token. A terminal that can't be listed is counted as ``failed`` and left for the next time.
    """
    counts: Counter[str] = Counter()
    counts["returned to approved"] = await ledger.return_stale_releases()
    in_doubt = await ledger.in_doubt()
    followed = await ledger.followed(SETTLED_FOLLOWED_FOR)
    if not in_doubt and not followed:
        return counts
    await ledger.check_environment(gateway.environment)
    for refund in in_doubt:
        counts["looked up"] += 1
        try:
            counts["found"] += await _look_up(refund, ledger, gateway)
        except PayrocError:
            counts["failed"] += 1
    for terminal, refunds in groupby(sorted(followed, key=_terminal), key=_terminal):
        try:
            counts += await _follow(terminal, refunds, ledger, gateway)
        except PayrocError:
            counts["failed"] += 1
    return counts


async def _look_up(refund: Refund, ledger: Ledger, gateway: Gateway) -> bool:
    verdict = await look_up(await gateway.token(), refund, gateway)
    if verdict is None:
        return False
    await ledger.record(refund.id, verdict)
    return verdict.sighting is not None


async def _follow(terminal: str, refunds: Iterable[Refund], ledger: Ledger, gateway: Gateway) -> Counter[str]:
    counts: Counter[str] = Counter()
    wanted = {refund.payroc_refund_id: refund for refund in refunds}
    oldest = min(refund.first_sent_at or refund.created_at for refund in wanted.values())
    token = await gateway.token()
    seen = []
    async for item in gateway.list_refunds(token, processing_terminal_id=terminal, date_from=oldest - _DATE_MARGIN):
        refund = wanted.pop(item.refund_id, None)
        if refund is not None:
            counts["followed"] += 1
            verdict = judge_object(item, refund)
            if verdict.sighting == Sighting(item.refund_id, refund.payroc_status or "", refund.status):
                seen.append(refund.id)
            else:
                recorded, _ = await ledger.record(refund.id, verdict)
                counts["changed"] += recorded.status is not refund.status
        if not wanted:
            break
    await ledger.mark_seen(seen)
    counts["not listed"] += len(wanted)
    return counts


def _terminal(refund: Refund) -> str:
    return refund.processing_terminal_id
