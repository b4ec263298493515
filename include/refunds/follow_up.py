"""Follow-up: ask Payroc what became of refunds in doubt, and compare its lists with the ledger. It only reads Payroc, it never POSTs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta

from include.payroc.errors import OBJECTS_NAMED, PayrocError, PayrocIncompleteList
from include.refunds.business_days import business_days_before
from include.refunds.classify import judge_object
from include.refunds.gateway import Reader
from include.refunds.ledger import Ledger
from include.refunds.listing import in_batches, known, of_terminal, pairs
from include.refunds.look_up import look_up_in_doubt
from include.refunds.reader import FreshTokenReader
from include.refunds.refund import Refund
from include.refunds.settings import Settings
from include.refunds.transitions import is_known

# An ACH return for an account that is closed or unknown has to be sent within two banking days of settlement, but banks are late, and
# Payroc does not document how long a refund may come back. Two weeks cover that, with two bank holidays, which are not known here.
FOLLOWED_FOR_BUSINESS_DAYS = 12

# One refund that stays in review for a year must not have a year listed every two hours.
_LISTED_BACK = timedelta(days=60)

_EMPTIED_AT_ONCE = 1000

# Payroc's clock and the ledger's may differ, and whether dateFrom is inclusive is not documented.
_DATE_MARGIN = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class FollowedUp:
    """
    What a follow-up did.

    :param counts: how many refunds each of ``looked up``, ``found``, ``followed``, ``changed``, ``returned to
        approved`` and ``emptied`` (their requests, some days after they ended) counts. A look-up or a list
        that failed (``failed``) is left for the next time.
    :param not_understood: names of the objects at Payroc that can't be understood, each with its terminal, up
        to
        :data:`~include.payroc.errors.OBJECTS_NAMED`. They are skipped, because they would fail forever, and
            counted (``not understood``). A refund that hides behind one is reported when it was not looked at
            for too long.
    """

    counts: Counter[str]
    not_understood: list[str]


async def follow_up(ledger: Ledger, gateway: Reader, settings: Settings) -> FollowedUp:
    """
    Look up the refunds in doubt, and compare the list of each terminal with the ledger.

    Every listed object that is ours is compared, whatever our row says: a second object for one key, or one for a refund that we call
    rejected, is recorded as the contradiction that it is.

    :raises PayrocError: when Payroc gives no token.
    """
    counts: Counter[str] = Counter()
    names: dict[str, None] = {}
    reader = FreshTokenReader(gateway)
    counts["returned to approved"] = await ledger.return_stale_releases()
    counts["emptied"] = await _empty_requests(ledger, settings)
    now = await ledger.now()
    in_doubt = await ledger.in_doubt()
    followed = await ledger.followed(now - business_days_before(now, FOLLOWED_FOR_BUSINESS_DAYS))
    if not in_doubt and not followed:
        return FollowedUp(counts, [])
    await ledger.check_environment(gateway.environment)
    for refund in in_doubt:
        counts["looked up"] += 1
        try:
            counts["found"] += await _look_up(refund, ledger, reader, settings)
        except PayrocIncompleteList as error:
            names |= dict.fromkeys(of_terminal(error, refund.processing_terminal_id))
        except PayrocError:
            counts["failed"] += 1
    for terminal, since in followed.items():
        try:
            await _compare(terminal, max(since, now - _LISTED_BACK), ledger, reader, counts)
        except PayrocIncompleteList as error:
            names |= dict.fromkeys(of_terminal(error, terminal))
        except PayrocError:
            counts["failed"] += 1
    # An object may be on a terminal's list and on that of a look-up.
    if names:
        counts["not understood"] = len(names)
    return FollowedUp(counts, list(names)[:OBJECTS_NAMED])


async def _empty_requests(ledger: Ledger, settings: Settings) -> int:
    emptied = 0
    while count := await ledger.empty_requests(timedelta(days=settings.request_days), _EMPTIED_AT_ONCE):
        emptied += count
    return emptied


async def _look_up(refund: Refund, ledger: Ledger, reader: Reader, settings: Settings) -> bool:
    verdict = await look_up_in_doubt(await reader.token(), refund, reader, settings, await ledger.now())
    if verdict is None:
        return False
    await ledger.record(refund.id, verdict)
    return verdict.sighting is not None


async def _compare(
    terminal: str, since: datetime, ledger: Ledger, reader: Reader, counts: Counter[str]
) -> None:
    token = await reader.token()
    async for batch in in_batches(
        reader.list_refunds(token, processing_terminal_id=terminal, date_from=since - _DATE_MARGIN)
    ):
        rows = await known(batch, ledger)
        seen = []
        for item, refund in pairs(batch, rows):
            if refund is None:
                continue
            counts["followed"] += 1
            verdict = judge_object(item, refund)
            if verdict.sighting is not None and is_known(refund, verdict.sighting):
                seen.append(refund.id)
            else:
                recorded, _ = await ledger.record(refund.id, verdict)
                counts["changed"] += recorded.status is not refund.status
        await ledger.mark_seen(seen)
