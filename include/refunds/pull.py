"""Pull: source rows become refunds of the ledger, or are reported with what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from include.refunds.bank_rules import routing_number_warning
from include.refunds.cipher import Cipher, Sealed
from include.refunds.ledger import NAMELESS, NewRefund, differences
from include.refunds.ledger_parts import Clock, Stored
from include.refunds.people import person
from include.refunds.rows import InvalidRow, RefundRow, name_of
from include.refunds.settings import Settings
from include.refunds.source import ReadableSource, SourceRow
from include.refunds.text import fold

_BATCH = 1000


@dataclass(slots=True)
class Pulled:
    """
    What a pull found.

    :param at: when it began, in the ledger's time.
    :param rows: rows that the source returned.
    :param new: refunds stored for the first time.
    :param invalid: errors by source_ref and column.
    :param changed: source_refs whose row differs from the refund it once became, each with what differs.
    :param standing: source_refs of the rows that are valid and not changed: the source stands by these
        refunds.
    :param withdrawn: ids of refunds that wait and that the source no longer returns, each with a sentence.
    :param written_again: rows that are offered although their refunds have ended; they are written again.
    :param still_offered: such rows that were written back again lately, and are offered all the same.
    :param warnings: by source_ref of a row in ``standing``, sentences about what is odd of it though no rule
        refuses it.
    """

    at: datetime
    rows: int
    new: int = 0
    invalid: dict[str, dict[str, str]] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)
    standing: list[str] = field(default_factory=list)
    withdrawn: dict[int, str] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    written_again: int = 0
    still_offered: int = 0

    def __str__(self) -> str:
        counts = f"{self.new} new, {len(self.invalid)} invalid, {len(self.changed)} changed, {len(self.warnings)} with a warning"
        return f"{self.rows} rows in the source: {counts}."


class PullBindings(Protocol):
    """What a pull needs to know of what the ledger is bound to."""

    async def check_source(self) -> None:
        """See :meth:`~include.refunds.ledger.bindings.Bindings.check_source`."""

    async def check_fingerprint_key(self, check: str) -> None:
        """See :meth:`~include.refunds.ledger.bindings.Bindings.check_fingerprint_key`."""


class _Intake(Stored, Protocol):
    async def store(self, rows: Sequence[tuple[NewRefund, Sealed]]) -> set[str]: ...

    async def spelled(self, folded: Sequence[str]) -> set[str]: ...

    async def note_invalid(self, invalid: dict[str, dict[str, str]], valid: Sequence[str]) -> None: ...

    async def set_aside(self, standing: Sequence[str]) -> dict[int, str]: ...


class PullLists(Protocol):
    """What a pull notes of terminals."""

    async def note_terminals(self, terminals: Collection[str]) -> None:
        """See :meth:`~include.refunds.ledger.lists.Lists.note_terminals`."""


class _WriteBacks(Protocol):
    async def write_again(self, offered: Collection[str]) -> tuple[int, int]: ...


class PullLedger(Clock, Protocol):
    """What a pull needs of the ledger."""

    @property
    def bindings(self) -> PullBindings: ...

    @property
    def intake(self) -> _Intake: ...

    @property
    def lists(self) -> PullLists: ...

    @property
    def write_backs(self) -> _WriteBacks: ...


async def pull(source: ReadableSource, ledger: PullLedger, cipher: Cipher, settings: Settings) -> Pulled:
    """
    Store the source's approved refunds that the ledger does not have yet, each with its key and its frozen
    body.

    A bad row is recorded with its errors and blocks no other. A row that was pulled before never changes.

    :returns: what was found; nothing in it holds bank data.
    :raises SourceError: when the source can't be read.
    :raises LedgerError: when the ledger belongs to another source, or its fingerprints were made with another
        key.
    """
    await ledger.bindings.check_source()
    await ledger.bindings.check_fingerprint_key(cipher.fingerprint_check)
    began = await ledger.now()
    rows = await source.select_approved()
    pulled = Pulled(at=began, rows=len(rows))
    # A worker may have stood still since it began: what it has read may be approved after that.
    valid = validate(rows, cipher, settings, await ledger.now(), pulled.invalid)
    # Those of rows that were pulled before, too: a terminal that was changed in the source may have paid.
    await ledger.lists.note_terminals({refund.processing_terminal_id for refund, _ in valid})
    for start in range(0, len(valid), _BATCH):
        await _store(valid[start : start + _BATCH], ledger.intake, cipher, pulled)
    await ledger.intake.note_invalid(
        pulled.invalid, [refund.source_ref for refund, _ in valid if refund.source_ref not in pulled.invalid]
    )
    offered = [*pulled.standing, *pulled.changed, *pulled.invalid]
    pulled.written_again, pulled.still_offered = await ledger.write_backs.write_again(offered)
    pulled.warnings = warnings(rows, frozenset(pulled.standing))
    aside = await ledger.intake.set_aside(pulled.standing)
    named = {*pulled.changed, *pulled.invalid}
    pulled.withdrawn = {
        key: "Its source row is no longer approved." for key, ref in aside.items() if ref not in named
    }
    return pulled


def validate(
    rows: Sequence[SourceRow],
    cipher: Cipher,
    settings: Settings,
    now: datetime,
    invalid: dict[str, dict[str, str]],
) -> list[tuple[NewRefund, bytes]]:
    """
    Return the rows that validate, each with the body to freeze; put the errors of the others into
    ``invalid``.

    :param now: the ledger's time.
    :param invalid: errors by source_ref and column; a row without a source_ref is named by its place, from 1.
    """
    names = [name_of(row) for row in rows]
    seen = Counter(names)
    valid = []
    for number, (row, name) in enumerate(zip(rows, names, strict=True), start=1):
        try:
            if name is not None and seen[name] > 1:
                raise InvalidRow({"source_ref": f"comes {seen[name]} times; each refund needs its own"})
            valid.append(build(row, cipher, settings, now))
        except InvalidRow as error:
            invalid[name or f"{NAMELESS}{number})"] = error.errors
    return valid


def warnings(rows: Sequence[SourceRow], source_refs: Collection[str]) -> dict[str, list[str]]:
    """
    Return what is odd of rows though no rule refuses it, in sentences without bank data.

    :param source_refs: the rows in question.
    :returns: sentences by source_ref, for the rows of which there is something to say.
    """
    return {
        name: [warning]
        for row in rows
        if (name := name_of(row)) in source_refs
        and name is not None
        and (warning := routing_number_warning(row["routing_number"]))
    }


def build(row: SourceRow, cipher: Cipher, settings: Settings, now: datetime) -> tuple[NewRefund, bytes]:
    """
    Return the refund that a source row stands for, and the body that is sent for it, now and in every
    attempt.

    :param now: the ledger's time.
    :raises InvalidRow: when the row breaks a rule of Payroc's or of ours.
    """
    read = RefundRow.read(row, settings, now)
    body = read.request.to_body()
    refund = NewRefund(
        source_ref=read.source_ref,
        source_ref_folded=fold(read.source_ref),
        processing_terminal_id=read.request.processing_terminal_id,
        order_id=read.request.order.order_id,
        description=read.request.order.description,
        amount=read.request.order.amount,
        currency=read.request.order.currency,
        payee_last4=read.payee_last4,
        payee_fingerprint=cipher.fingerprint(read.payee),
        request_sha256=cipher.sha256(body),
        requested_by=read.requested_by,
        requested_by_folded=person(read.requested_by),
        approved_by=read.approved_by,
        approved_by_folded=person(read.approved_by),
        approved_at=read.approved_at,
        idempotency_key=str(read.idempotency_key),
    )
    return refund, body


async def _store(
    valid: list[tuple[NewRefund, bytes]], intake: _Intake, cipher: Cipher, pulled: Pulled
) -> None:
    refs = [refund.source_ref for refund, _ in valid]
    known = await intake.stored(refs)
    inserted = await intake.store(
        [(refund, cipher.seal(body)) for refund, body in valid if refund.source_ref not in known]
    )
    pulled.new += len(inserted)
    if len(inserted) + len(known) < len(valid):
        # Another pull may have stored them a moment ago.
        known = await intake.stored(refs)
    collided = {
        refund.source_ref: refund.source_ref_folded
        for refund, _ in valid
        if refund.source_ref not in inserted and refund.source_ref not in known
    }
    spelled = await intake.spelled(list(collided.values())) if collided else set()
    for refund, _ in valid:
        if refund.source_ref in collided:
            pulled.invalid[refund.source_ref] = (
                {"source_ref": "is that of another refund in another spelling; each refund needs its own"}
                if refund.source_ref_folded in spelled
                else {"order_id": "is used by another refund of this terminal; order ids are unique"}
            )
        elif refund.source_ref in known and (differing := differences(refund, known[refund.source_ref])):
            pulled.changed[refund.source_ref] = differing
        else:
            pulled.standing.append(refund.source_ref)


def source_changes(
    rows: Sequence[SourceRow], stored: Mapping[str, Any], cipher: Cipher, settings: Settings, now: datetime
) -> dict[str, str]:
    """
    Return what the source no longer stands by: source_refs that are gone, invalid or different now, each with
    a sentence.

    :param rows: the source's rows of this moment.
    :param stored: what the ledger holds of the refunds in question, by source_ref (see
        :meth:`~include.refunds.intake.Intake.stored`).
    :param now: the ledger's time.
    """
    asked = [row for row in rows if name_of(row) in stored]
    invalid: dict[str, dict[str, str]] = {}
    valid = {refund.source_ref: refund for refund, _ in validate(asked, cipher, settings, now, invalid)}
    findings = {}
    for source_ref, row in stored.items():
        if source_ref in invalid:
            findings[source_ref] = f"Its source row is invalid now ({', '.join(invalid[source_ref])})."
        elif source_ref not in valid:
            findings[source_ref] = "Its source row is no longer approved."
        elif differing := differences(valid[source_ref], row):
            findings[source_ref] = (
                f"Its source row changed ({', '.join(differing)}); give it a new source_ref."
            )
    return findings
