"""Sealing of events: the end of runs, follow-ups and commands puts what happened under a hash."""

from __future__ import annotations

from include.refunds.ledger.database import LedgerError, Part

# As many as the function takes at most.
_BATCH = 20_000


class Seals(Part):
    """The seals of the audit trail."""

    async def seal(self) -> None:
        """
        Seal all events that are committed, in batches of a transaction each.

        Where another process is sealing, this one leaves the events to it and does not wait.

        :raises LedgerError: when it can't be done. Nothing is lost then: the next call seals the same events.
        """
        seal = "SELECT sealed FROM refund_ledger.seal(:most)"
        sealed = _BATCH
        while sealed == _BATCH:
            async with self._database.transaction() as (connection, _):
                sealed = (await connection.execute(seal, {"most": _BATCH})).scalar_one_or_none() or 0

    async def seal_or_say(self) -> list[str]:
        """
        Seal as :meth:`seal` does, at the end of work that is done whether or not its events can be sealed
        now.

        :returns: a sentence for people when it failed; nothing otherwise.
        """
        try:
            await self.seal()
        except LedgerError as error:
            return [f"The newest events are not sealed yet; the next run or command seals them. {error}"]
        return []
