"""A dry run: everything up to the release, in a transaction that is rolled back."""

from __future__ import annotations

from include.refunds.cipher import Cipher
from include.refunds.ledger import Ledger, totals
from include.refunds.params import RunParams
from include.refunds.pull import pull
from include.refunds.report import Line, Report, Total
from include.refunds.settings import Settings
from include.refunds.source import Source


async def rehearse(params: RunParams, source: Source, ledger: Ledger, cipher: Cipher, settings: Settings) -> Report:
    """
    Report what a run with these params would send. Nothing is stored, asked of a person, sent or written back.

    :raises SourceError: when the source can't be read.
    """
    async with ledger.rehearsal() as rehearsal:
        pulled = await pull(source, rehearsal, cipher, settings)
        candidates = await rehearsal.candidates(params.selection(), standing=pulled.standing)
        pauses = await rehearsal.pauses()
    report = Report("Dry run: this is what would be sent. Nothing was stored, sent or written back.")
    report.refunds = [
        Line(item.id, item.order_id, item.amount, item.currency, item.payee_last4, "would send", None, item.attempts, None)
        for item in candidates
    ]
    sums = totals((item.currency, item.amount) for item in candidates)
    report.totals = [Total("would send", currency, entry["count"], entry["amount"]) for currency, entry in sorted(sums.items())]
    report.invalid = pulled.invalid
    report.notes = [
        f"Source row {source_ref} changed after it was pulled ({', '.join(names)}); give it a new source_ref."
        for source_ref, names in pulled.changed.items()
    ]
    report.notes += [f"The sending is paused for {'everything' if scope == '*' else scope}: {why}" for scope, why in pauses.items()]
    return report
