"""Write-back: each refund's row of the source gets its outcome."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from include.refunds.ledger import NotWritten, WriteBack
from include.refunds.printable import printable
from include.refunds.source_errors import SourceError, SourceUnavailable
from include.refunds.source_update import Updated
from include.refunds.unwritten import doubled_sentence, first_of

_BATCH = 200

# A sentence or a log names so many rows; the report and `status` have a limit of their own.
_MOST_NAMED = 10


class WritableSource(Protocol):
    """The source, as the write-back sees it."""

    async def write_back(self, rows: Sequence[WriteBack]) -> Updated:
        """Write rows, and return which of them were written and which were not."""


@dataclass(slots=True)
class WrittenBack:
    """
    What a write-back did.

    :param written: how many rows were written.
    :param not_written: by source_ref, the rows that were refused, locked or not found. They stay due.
    :param doubled: by source_ref, how many rows of the source the UPDATE touched when it was more than one.
    :param trouble: why it has to be tried again, or can't go on; all else is done and noted.
    """

    written: int = 0
    not_written: dict[str, NotWritten] = field(default_factory=dict)
    doubled: dict[str, int] = field(default_factory=dict)
    trouble: SourceError | None = None

    def add(self, updated: Updated) -> None:
        """Count what one batch did."""
        self.written += len(updated.written)
        self.not_written |= {item.source_ref: item for item in updated.not_written}
        self.doubled |= updated.doubled

    def raise_trouble(self) -> None:
        """
        Raise what made it fail, once the caller has reported the rest.

        :raises SourceUnavailable: when the source, or a row of it, can't be written for now.
        :raises SourceError: when the statement can't be carried out for any row.
        """
        if self.trouble is not None:
            raise self.trouble

    def as_dict(self) -> dict[str, int]:
        """Return the counts, as the task hands them on."""
        return {
            "written": self.written,
            "not_written": len(self.not_written),
            "doubled": len(self.doubled),
        }

    def sentences(self) -> list[str]:
        """Return the counts, and a sentence for each row that needs attention; of many only the first."""
        named = [
            f"Source row {printable(item.source_ref)} is not written: {printable(item.reason)}"
            for item in self.not_written.values()
        ]
        doubled = [doubled_sentence(ref, count) for ref, count in self.doubled.items()]
        return [
            f"{self.written} rows written back, {len(named)} not.",
            *first_of(named, _MOST_NAMED, "more rows are not written"),
            *first_of(doubled, _MOST_NAMED, "more rows like these"),
        ]


class WriteBacks(Protocol):
    """What a write-back needs of the ledger."""

    def write_back_turn(self) -> AbstractAsyncContextManager[str]:
        """See :meth:`~include.refunds.ledger.write_backs.WriteBacks.write_back_turn`."""

    async def due_write_backs(
        self, limit: int, after: WriteBack | None = None, *, failed_before: bool = False
    ) -> list[WriteBack]:
        """See :meth:`~include.refunds.ledger.write_backs.WriteBacks.due_write_backs`."""

    async def mark_written_back(
        self, holder: str, written: Sequence[WriteBack], not_written: Sequence[NotWritten] = ()
    ) -> None:
        """See :meth:`~include.refunds.ledger.write_backs.WriteBacks.mark_written_back`."""


async def write_back(source: WritableSource, write_backs: WriteBacks) -> WrittenBack:
    """
    Bring the source up to date with the ledger.

    A row that can't be written is noted in the ledger with the reason and stays due; the others are written.
    It is tried again after all others, so that rows which are refused time and again hold up no new one.

    The source is written before the ledger notes it, so a death in between only writes the same values again.

    :raises SourceError: when the file can't be used; trouble with the database is returned.
    :raises LedgerUnavailable: when another write-back has the turn, or took it over.
    """
    done = WrittenBack()
    async with write_backs.write_back_turn() as holder:
        for failed_before in (False, True):
            after = None
            while due := await write_backs.due_write_backs(_BATCH, after, failed_before=failed_before):
                after = due[-1]
                # A row that has failed a moment ago has failed before, too.
                updated = await source.write_back(
                    [item for item in due if item.source_ref not in done.not_written]
                )
                await write_backs.mark_written_back(holder, updated.written, updated.not_written)
                done.add(updated)
                done.trouble = updated.stopped
                if not failed_before and not done.written:
                    done.trouble = done.trouble or updated.unusable
                if done.trouble is not None:
                    return done
    locked = [item for item in done.not_written.values() if item.is_transient]
    if locked:
        done.trouble = SourceUnavailable(_locked(locked))
    return done


def _locked(rows: Sequence[NotWritten]) -> str:
    named = [f"{printable(item.source_ref)}: {printable(item.reason)}." for item in rows]
    count = "1 row is" if len(rows) == 1 else f"{len(rows)} rows are"
    sentences = first_of(named, _MOST_NAMED, "more rows like these")
    return f"{count} not written yet on the connection refunds_source, all others are. {' '.join(sentences)}"
