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
from include.payroc.errors import PayrocIncompleteList, objects_named
from include.refunds.cipher import Cipher
from include.refunds.classify import Outcome, Verdict, judge_object
from include.refunds.follow_up import follow_up
from include.refunds.gateway import Reader
from include.refunds.keys import idempotency_key
from include.refunds.ledger import Ledger, LedgerError
from include.refunds.listing import in_batches, known, pairs
from include.refunds.pull import Pulled, pull
from include.refunds.reader import FreshTokenReader
from include.refunds.refund import Refund
from include.refunds.settings import Settings
from include.refunds.source import Source
from include.refunds.verify import Comparison, RangeError, verify

# Payroc's clock and the ledger's may differ, its dates may be cut off at the second, and whether dateFrom is inclusive is not documented.
_MARGIN = timedelta(days=1)

# A chain of reissues that is longer than this has worried people for a long time.
_NUMBERS_OF_REISSUES = range(2, 10)


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
    :param pulled: what the source has; new ones are those that the ledger had lost.
    :param comparison: the ledger and Payroc since then, after everything was taken over.
    """

    since: datetime
    pulled: Pulled
    taken_over: list[TakenOver]
    comparison: Comparison


async def restored(
    backup_at: datetime,
    reason: str,
    *,
    terminals: Sequence[str] = (),
    source: Source,
    ledger: Ledger,
    gateway: Reader,
    cipher: Cipher,
    settings: Settings,
    accept_not_understood: bool = False,
) -> Restored:
    """
    Pause the sending, take over what Payroc has and the restored ledger does not know, and compare both.

    From its begin on, nobody can resume until it has come to its end; cut off, it is run again. It sends nothing.

    :param backup_at: when the backup was made.
    :param terminals: processing terminals beside those that ledger and source know.
    :param accept_not_understood: end it though Payroc lists objects that can't be understood; the audit trail
        then holds who decided so, why, and about which objects.
    :raises RangeError: when the backup is of the future.
    :raises PayrocError: when Payroc did not tell everything.
    :raises SourceError: when the source can't be read.
    :raises LedgerError: when the ledger belongs to another Payroc or source, this login lacks a right, or
        another one was begun after this one; or when Payroc lists objects that can't be understood, and nobody
        has accepted that.
    """
    now = await ledger.now()
    if backup_at > now:
        raise RangeError(
            f"The backup can't be of {backup_at:%Y-%m-%d %H:%M %Z}, which is in the future: give the instant when it was made."
        )
    begun = await ledger.begin_restore(backup_at, reason)
    since = begun.since
    await ledger.check_environment(gateway.environment)
    reader = FreshTokenReader(gateway)
    pulled = await pull(source, ledger, cipher, settings)
    taken_over: list[TakenOver] = []
    lost: dict[str, str] = {}
    for terminal in sorted({*await ledger.all_terminals(), *terminals}):
        listed = reader.list_refunds(
            await reader.token(), processing_terminal_id=terminal, date_from=since - _MARGIN
        )
        # Of what can't be understood the comparison speaks.
        with suppress(PayrocIncompleteList):
            async for batch in in_batches(listed):
                taken_over += await _take_over(batch, lost, ledger)
    await _set_aside_reissued(lost, ledger, settings)
    if failed := (await follow_up(ledger, gateway, settings)).counts["failed"]:
        raise LedgerError(
            f"{failed} look-ups or lists failed at Payroc, so not everything is known: run it again."
        )
    comparison = await verify(
        since - _MARGIN, now + _MARGIN, terminals=terminals, ledger=ledger, gateway=gateway
    )
    if comparison.hidden and not accept_not_understood:
        objects = objects_named(comparison.hidden, comparison.hidden_names)
        raise LedgerError(
            f"Payroc lists {objects} that can't be understood, and a refund that the ledger forgot may be "
            "among them: look at them in Payroc's portal, then run `restored` again with "
            "--accept-not-understood; until then sending stays paused."
        )
    await ledger.end_restore(begun.number, reason, comparison.hidden, comparison.hidden_names)
    return Restored(since, pulled, taken_over, comparison)


async def _take_over(batch: Sequence[models.Refund], lost: dict[str, str], ledger: Ledger) -> list[TakenOver]:
    """
    Take over what Payroc has of refunds that the ledger knows.

    :param lost: Payroc's refund ids by key, of those that it does not know; what is found is put into it.
    """
    taken = []
    for item, refund in pairs(batch, await known(batch, ledger)):
        if refund is None:
            if item.refund_key is not None:
                lost[item.refund_key] = item.refund_id
        elif item.refund_id != refund.payroc_refund_id:
            after, _ = await ledger.record(refund.id, judge_object(item, refund), restored=True)
            if after.status is not refund.status:
                taken.append(TakenOver(refund, after))
    return taken


async def _set_aside_reissued(lost: dict[str, str], ledger: Ledger, settings: Settings) -> None:
    """
    Give to people what waits, and of which Payroc has a reissue that the ledger has forgotten: sent as well, it would be paid twice.

    :param lost: Payroc's refund ids by key, of refunds that the ledger does not know.
    """
    if not lost:
        return
    for refund in await ledger.not_sent():
        for number in _NUMBERS_OF_REISSUES:
            found = lost.get(str(idempotency_key(settings.source, f"{refund.source_ref}/{number}")))
            if found is not None:
                what = f"Payroc's refund {found} is a reissue of this one, which the ledger has forgotten since its backup."
                await ledger.record(refund.id, Verdict(Outcome.REVIEW, what, contradiction=True))
                break
