"""Write-back: the source learns what became of its refunds."""

from __future__ import annotations

from include.refunds.ledger import Ledger
from include.refunds.source import Source

_BATCH = 200


async def write_back(source: Source, ledger: Ledger) -> tuple[int, list[str]]:
    """
    Bring the source up to date with the ledger.

    The source is written before the ledger notes it, so a death in between only writes the same values again.

    :returns: how many rows were written, and the source_refs whose UPDATE touched no row; those stay due.
    :raises SourceError: when the source can't be written; what was not written stays due.
    """
    written, untouched = 0, []
    async with ledger.write_back_lock():
        after = ""
        while batch := await ledger.due_write_backs(_BATCH, after):
            missed = set(await source.write_back(batch))
            await ledger.mark_written_back([item for item in batch if item.source_ref not in missed])
            written += len(batch) - len(missed)
            untouched += sorted(missed)
            after = batch[-1].source_ref
    return written, untouched
