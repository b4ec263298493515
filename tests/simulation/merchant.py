"""The merchant's table, and the people who approve, edit and withdraw in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any
from unittest.mock import patch

from include.refunds import pull
from include.refunds.cipher import Cipher
from include.refunds.keys import default_order_id, idempotency_key
from include.refunds.ledger import NotWritten, WriteBack
from include.refunds.settings import Settings
from include.refunds.source import COLUMNS, SourceRow, SourceUnavailable
from include.refunds.source_update import Updated
from tests.simulation.engine import EPOCH, Engine, Violation

TERMINALS = ("7701001", "7701002")
# With one that only a row which is changed later names.
ALL_TERMINALS = (*TERMINALS, "7701003")
_ENDED = frozenset({"accepted", "settled", "returned", "reversed", "rejected", "cancelled"})


def build_once(row: SourceRow, cipher: Cipher, settings: Settings, now: datetime) -> Any:
    """Validate a source row as production does, once: it always gives the same refund."""
    values = tuple(row.values())
    built = _BUILT.get(values)
    if built is None:
        if len(_BUILT) == _MOST_BUILT:
            _BUILT.clear()
        # Errors are not kept: a row may be invalid for its time.
        built = _BUILT[values] = _build(row, cipher, settings, now)
    return built


_BUILT: dict[tuple[Any, ...], Any] = {}
_MOST_BUILT = 10_000
_build = pull.build


@contextmanager
def remembered_rows() -> Iterator[None]:
    """Let pull validate each source row once: a fifth of a history's time, and nothing that happens in between changes it."""
    with patch.object(pull, "build", build_once):
        yield


_key_of = lru_cache(maxsize=1000)(idempotency_key)


@dataclass(slots=True)
class Approved:
    """
    A refund in the merchant's table.

    :param versions: what of it was ever approved: order, amount, terminal, payee. One of these may be paid, once.
    :param reset: somebody took its status away after the refund had ended, so it is offered again.
    :param is_overtaken: a write-back that had lost its turn put something older there.
    :param first: the refund that this one is a reissue of; two people approved it in the ledger, the table has no row of it.
    """

    row: dict[str, Any]
    key: str
    order_id: str
    versions: list[tuple[str, int, str, str]] = field(default_factory=list)
    withdrawn: bool = False
    status: str | None = None
    updated_at: datetime | None = None
    reset: bool = False
    is_overtaken: bool = False
    first: Approved | None = None

    @property
    def source_ref(self) -> str:
        return str(self.row["source_ref"])

    def note_version(self) -> None:
        payee = self.row["secure_token"] or self.row["account_number"]
        self.versions.append((self.order_id, self.row["amount"], self.row["processing_terminal_id"], payee))


class Merchant:
    """
    The source.

    :param source: the source's fixed name, from which keys are derived.
    """

    def __init__(self, engine: Engine, source: str) -> None:
        self.engine = engine
        self.source = source
        self.refunds: dict[str, Approved] = {}
        self.reissues: dict[str, Approved] = {}
        self.by_key: dict[str, Approved] = {}
        self.by_order: dict[str, Approved] = {}
        self.invalid: set[str] = set()
        # The table can't be written for now: a right is missing, or it is locked.
        self.read_only = False
        # The UPDATE refuses what is older than what is there, as our write_back.sql does; an adopter's own may not.
        self.guarded = False
        # Who has the turn of the write-back, as the ledger says.
        self.writer: Callable[[], str | None] = lambda: None
        # A restored ledger knows less than the source for a while.
        self.restored = False

    def approve(self, number: int, **columns: Any) -> Approved:
        """Approve one more refund."""
        ref = f"ref-{number}"
        key = _key_of(self.source, ref)
        row = dict.fromkeys(COLUMNS) | {
            "source_ref": ref,
            "processing_terminal_id": TERMINALS[0],
            "order_id": f"order-{number}",
            "amount": 1000 + number,
            "currency": "USD",
            "name_on_account": "Sarah Hopper",
            "account_type": "checking",
            "sec_code": "ppd",
            "routing_number": "053200983",
            "account_number": f"55667{number:05d}",
            "requested_by": "ann",
            "approved_by": "bob",
            "approved_at": EPOCH + timedelta(seconds=self.engine.time - 3600 + number),
        }
        approved = Approved(
            row | columns, str(key), columns.get("order_id", row["order_id"]) or default_order_id(key)
        )
        approved.note_version()
        self.refunds[ref] = self.by_key[approved.key] = self.by_order[approved.order_id] = approved
        return approved

    def reissued(self, source_ref: str, order_id: str) -> Approved:
        """Note that two people approved a refund anew in the ledger."""
        first = self.refunds[source_ref.partition("/")[0]]
        row = first.row | {"source_ref": source_ref, "order_id": order_id}
        key = str(idempotency_key(self.source, source_ref))
        item = Approved(row, key, order_id, first=first)
        for _, amount, terminal, payee in first.versions:
            item.versions.append((order_id, amount, terminal, payee))
        self.reissues[source_ref] = self.by_key[key] = item
        return item

    def rows(self) -> list[dict[str, Any]]:
        """Return what select_approved.sql returns: approved, not withdrawn, not ended."""
        return [
            item.row for item in self.refunds.values() if not item.withdrawn and item.status not in _ENDED
        ]

    def edit(self, item: Approved, **columns: Any) -> None:
        """Change a row that may have been pulled already."""
        item.row = item.row | columns
        item.order_id = columns.get("order_id", item.order_id)
        item.note_version()
        self.engine.tell(f"source: {item.source_ref} is edited ({', '.join(columns)})")

    def withdraw(self, item: Approved, *, withdrawn: bool = True) -> None:
        """Withdraw a row, or delete it, or bring it back: select_approved.sql sees no difference."""
        item.withdrawn = withdrawn
        self.engine.tell(f"source: {item.source_ref} is {'withdrawn' if withdrawn else 'back'}")

    def reset(self, item: Approved) -> None:
        """Take the status of an ended refund away, as a restore of the table does, or an edit by hand."""
        item.status, item.reset = None, True
        self.engine.tell(f"source: {item.source_ref} loses its status")


class SimulatedSource:
    """The source as a worker sees it: each call may fail, with or without its effect."""

    def __init__(self, merchant: Merchant) -> None:
        self._merchant = merchant

    async def select_approved(self) -> Sequence[SourceRow]:
        engine = self._merchant.engine
        await engine.point("source: select")
        rows = self._merchant.rows()
        assert engine.current is not None
        engine.current.seen_source = {row["source_ref"]: row for row in rows}
        return rows

    async def write_back(self, rows: Sequence[WriteBack]) -> Updated:
        engine, merchant = self._merchant.engine, self._merchant
        if merchant.read_only:
            return Updated(stopped=SourceUnavailable("The source can't be written."))
        before = engine.chance() < 0.5
        if before:
            await engine.point("source: write back")
        updated = Updated()
        for item in rows:
            target = merchant.refunds.get(item.source_ref)
            if target is None:
                updated.not_written.append(NotWritten(item.source_ref, "There is no such row."))
                continue
            if (
                target.updated_at is not None
                and item.updated_at < target.updated_at
                and not merchant.restored
            ):
                if merchant.guarded:
                    updated.not_written.append(NotWritten(item.source_ref, "The row is newer."))
                    continue
                assert engine.current is not None
                if engine.current.write_back == merchant.writer():
                    raise Violation(
                        f"An older write-back overtakes a newer one: {item.source_ref} goes from {target.status} "
                        f"back to {item.status}."
                    )
                # It stood still for so long that its turn has ended: this is written again, unless it dies now.
                target.is_overtaken = True
            else:
                target.is_overtaken = False
            target.status, target.updated_at = item.status, item.updated_at
            updated.written.append(item)
        if not before:
            await engine.point("source: written back")
        return updated
