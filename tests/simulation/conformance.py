"""What the steps need of the ledger, and that the ledger in memory has it: mypy checks this file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_type_hints

from include.refunds.continuity import ListLedger
from include.refunds.follow_up import FollowUpLedger
from include.refunds.ledger_parts import Stored
from include.refunds.listing import Known
from include.refunds.pull import PullLedger
from include.refunds.rehearse import Rehearsal, RehearsalLedger
from include.refunds.reissue import ReissueLedger
from include.refunds.release import ReleaseLedger
from include.refunds.resolve import ResolveLedger
from include.refunds.restored import RestoreLedger
from include.refunds.reverse import ReverseLedger
from include.refunds.rotate import Requests
from include.refunds.send import SendLedger
from include.refunds.verify import VerifyLedger
from include.refunds.write_back import WriteBacks
from tests.simulation.ledger import MemoryLedger

PROTOCOLS = (
    FollowUpLedger,
    Known,
    ListLedger,
    PullLedger,
    Rehearsal,
    RehearsalLedger,
    ReissueLedger,
    ReleaseLedger,
    Requests,
    ResolveLedger,
    RestoreLedger,
    ReverseLedger,
    SendLedger,
    Stored,
    VerifyLedger,
    WriteBacks,
)


def conforms(ledger: MemoryLedger) -> None:
    """Assign the ledger in memory to each protocol."""
    _follow_up: FollowUpLedger = ledger
    _known: Known = ledger.refunds
    _lists: ListLedger = ledger
    _pull: PullLedger = ledger
    _rehearsal: Rehearsal = ledger
    _rehearse: RehearsalLedger = ledger
    _reissue: ReissueLedger = ledger
    _release: ReleaseLedger = ledger
    _requests: Requests = ledger.requests
    _resolve: ResolveLedger = ledger
    _restored: RestoreLedger = ledger
    _reverse: ReverseLedger = ledger
    _send: SendLedger = ledger
    _stored: Stored = ledger.intake
    _verify: VerifyLedger = ledger
    _write_back: WriteBacks = ledger.write_backs


def methods_of(protocol: Any) -> Iterator[str]:
    """Yield the names of a protocol's methods, and of those of its parts."""
    for base in protocol.__mro__:
        if not getattr(base, "_is_protocol", False):
            continue
        for name, member in vars(base).items():
            if isinstance(member, property):
                yield from methods_of(get_type_hints(member.fget)["return"])
            elif callable(member) and not name.startswith("_"):
                yield name
