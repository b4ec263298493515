"""
Restored: what comes first after the ledger was restored from a backup.

Such a ledger has forgotten what was sent since the backup. That alone pays nothing twice, because every refund has its key for life and
is looked up when its approval is older than a day; but what Payroc holds would come as a surprise, refund by refund, and go to people.
So the sending stops, everything that Payroc has is taken over at once, and both sides are compared before anybody may resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from include.payroc import models
from include.payroc.errors import PayrocIncompleteList
from include.refunds.cipher import Cipher
from include.refunds.classify import judge_object
from include.refunds.follow_up import follow_up
from include.refunds.gateway import Gateway
from include.refunds.ledger import Ledger
from include.refunds.listing import in_batches, known, pairs
from include.refunds.pull import pull
from include.refunds.refund import Refund
from include.refunds.settings import Settings
from include.refunds.source import Source
from include.refunds.verify import Comparison, RangeError, verify

# Payroc's clock and the ledger's may differ, its dates may be cut off at the second, and whether dateFrom is inclusive is not documented.
_MARGIN = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class TakenOver:
    """
    A refund that Payroc has, and of which the restored ledger did not know that it was sent.

    :param before: the refund as the backup had it.
    :param after: the refund now.
    """

    before: Refund
    after: Refund

    def __str__(self) -> str:
        return (
            f"Refund {self.after.id} (order {self.after.order_id}) was {self.before.status} and is {self.after.status}: "
            f"Payroc's refund {self.after.payroc_refund_id}."
        )


@dataclass(frozen=True, slots=True)
class Restored:
    """
    What was found after a restore.

    :param since: since when the ledger may have forgotten anything.
    :param pulled: how many refunds the ledger had lost that the source still has.
    :param comparison: the ledger and Payroc since then, after everything was taken over.
    """

    since: datetime
    pulled: int
    taken_over: list[TakenOver]
    comparison: Comparison


async def restored(
    backup_at: datetime,
    reason: str,
    *,
    terminals: Sequence[str] = (),
    source: Source,
    ledger: Ledger,
    gateway: Gateway,
    cipher: Cipher,
    settings: Settings,
) -> Restored:
    """
    Pause the sending, take over what Payroc has and the restored ledger does not know, and compare both.

    Until it has come to its end, nobody can resume; cut off, it is run again. It sends nothing.

    :param backup_at: when the backup was made.
    :param terminals: processing terminals beside those that ledger and source know.
    :raises RangeError: when the backup is of the future.
    :raises PayrocError: when Payroc did not tell everything.
    :raises SourceError: when the source can't be read.
    :raises LedgerError: when the ledger belongs to another Payroc or source.
    """
    now = await ledger.now()
    if backup_at > now:
        raise RangeError(
            f"The backup can't be of {backup_at:%Y-%m-%d %H:%M %Z}, which is in the future: give the instant when it was made."
        )
    since = await ledger.begin_restore(backup_at, reason)
    await ledger.check_environment(gateway.environment)
    pulled = await pull(source, ledger, cipher, settings)
    taken_over = []
    for terminal in sorted({*await ledger.all_terminals(), *terminals}):
        listed = gateway.list_refunds(await gateway.token(), processing_terminal_id=terminal, date_from=since - _MARGIN)
        # Of what can't be understood the comparison speaks.
        with suppress(PayrocIncompleteList):
            async for batch in in_batches(listed):
                taken_over += await _take_over(batch, ledger)
    await follow_up(ledger, gateway, settings)
    comparison = await verify(since - _MARGIN, now + _MARGIN, terminals=terminals, ledger=ledger, gateway=gateway)
    await ledger.end_restore(reason)
    return Restored(since, pulled.new, taken_over, comparison)


async def _take_over(batch: Sequence[models.Refund], ledger: Ledger) -> list[TakenOver]:
    taken = []
    for item, refund in pairs(batch, await known(batch, ledger)):
        if refund is None or item.refund_id == refund.payroc_refund_id:
            continue
        after, _ = await ledger.record(refund.id, judge_object(item, refund), restored=True)
        if after.status is not refund.status:
            taken.append(TakenOver(refund, after))
    return taken
