"""
Reissue: a refund that ended without money at the payee is paid again, as a new refund that two people
approve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from include.payroc.errors import PayrocError
from include.payroc.models import REFUND_KEY_FIELD, AccessToken, CustomField, RefundRequest
from include.refunds.case import Case, DecisionRefused
from include.refunds.cipher import Cipher, Sealed, UnreadableRequest
from include.refunds.gateway import Reader
from include.refunds.keys import default_order_id, idempotency_key
from include.refunds.ledger_parts import Cases, ChecksEnvironment, Recorder, Replaced
from include.refunds.look_up import look_up
from include.refunds.reader import FreshTokenReader
from include.refunds.refund import Refund
from include.refunds.states import REPLACEABLE

_LONGEST_SOURCE_REF = 200


@dataclass(frozen=True, slots=True)
class Reissue:
    """
    What a reissue has of its own; everything else it takes from the refund that it replaces.

    :param request: the encrypted body.
    """

    source_ref: str
    order_id: str
    idempotency_key: str
    request: Sealed
    request_sha256: str

    @property
    def decision(self) -> dict[str, str]:
        """What two people have to agree on."""
        return {"reissue": self.source_ref}


class _Decisions(Cases, Protocol):
    async def reissue(self, read: Case, new: Reissue, reason: str) -> int | None: ...


class ReissueLedger(Protocol):
    """What a reissue needs of the ledger."""

    @property
    def bindings(self) -> ChecksEnvironment: ...

    @property
    def decisions(self) -> _Decisions: ...

    @property
    def records(self) -> Recorder: ...

    @property
    def refunds(self) -> Replaced: ...


async def reissue(
    refund_id: int, reason: str, *, ledger: ReissueLedger, gateway: Reader, cipher: Cipher, source: str
) -> int | None:
    """
    Reissue a refund, or propose to. Who does it is the ledger's actor.

    Payroc is asked whether the refund, or one that it replaces itself, is paid after all. The new refund
    passes the same gate as every other: the next run releases it, and asks once more before it sends.

    :param source: the source's fixed name, from which keys are derived.
    :returns: the new refund's id, ``None`` when a second person is waited for.
    :raises DecisionRefused: when it can't be reissued.
    """
    case = await ledger.decisions.case(refund_id)
    check_replaceable(case)
    await ledger.bindings.check_environment(gateway.environment)
    reader = FreshTokenReader(gateway)
    try:
        paid = await paid_after_all(
            await reader.token(),
            [case.refund, *await ledger.refunds.replaced(refund_id)],
            ledger.records,
            reader,
        )
    except PayrocError as error:
        raise DecisionRefused(
            f"{error}, so whether refund {refund_id} is paid after all is not known; nothing was changed."
        ) from None
    if paid is not None:
        raise DecisionRefused(paid)
    try:
        body = cipher.open(
            case.refund.request or b"", case.refund.request_sha256, refund_id, case.refund.request_key
        )
    except UnreadableRequest as error:
        raise DecisionRefused(str(error)) from None
    source_ref = next_source_ref(case)
    key = idempotency_key(source, source_ref)
    order_id = default_order_id(key)
    new_body = with_order(body, order_id, str(key))
    return await ledger.decisions.reissue(
        case, Reissue(source_ref, order_id, str(key), cipher.seal(new_body), cipher.sha256(new_body)), reason
    )


async def paid_after_all(
    token: AccessToken, replaced: Sequence[Refund], records: Recorder, reader: Reader
) -> str | None:
    """
    Return a sentence when Payroc holds a refund of these that is neither declined, nor returned, nor
    reversed. The ledger learns it.

    :raises PayrocError: when Payroc did not tell.
    """
    for refund in replaced:
        found = await look_up(token, refund, reader)
        if (
            found is None
            or not found.is_hit
            or (found.sighting is not None and found.sighting.status in REPLACEABLE)
        ):
            continue
        if found.sighting is not None:
            await records.record(refund.id, found)
        return f"Refund {refund.id}, which is {refund.status} here, may be paid after all: {found.reason}"
    return None


def check_replaceable(case: Case) -> None:
    """
    Make sure that a refund may be replaced now.

    :raises DecisionRefused: when it may not.
    """
    refund = case.refund
    if refund.status not in REPLACEABLE:
        raise DecisionRefused(
            f"Refund {refund.id} is {refund.status}; only one that is rejected, returned or reversed is reissued."
        )
    if not case.chain_unpaid:
        raise DecisionRefused(
            f"Refund {refund.id} replaces one that may be paid after all; `show {refund.id}` names it."
        )
    if case.reissue is not None:
        raise DecisionRefused(f"Refund {refund.id} was reissued already, as refund {case.reissue}.")
    if refund.request is None:
        raise DecisionRefused(
            f"The request of refund {refund.id} was emptied, so there is nothing to send: approve it anew in the source."
        )


def next_source_ref(case: Case) -> str:
    """
    Return the source_ref of the next refund of a chain: the first one's with ``/2``, ``/3`` and so on.

    :raises DecisionRefused: when that is too long.
    """
    first, own = case.first_source_ref, case.refund.source_ref
    number = 2 if own == first else int(own.removeprefix(f"{first}/")) + 1
    source_ref = f"{first}/{number}"
    if len(source_ref) > _LONGEST_SOURCE_REF:
        raise DecisionRefused(
            f"The source_ref of refund {case.refund.id} has no room for /{number}: approve it anew in the source."
        )
    return source_ref


def with_order(body: bytes, order_id: str, key: str) -> bytes:
    """Return a frozen body with another order id and our key in it; everything else stays as it was sent."""
    # It was checked when it was frozen; a stricter setting of today must not refuse it.
    request = RefundRequest.model_validate_json(body, context={"aba_checksum": False})
    fields = tuple(
        CustomField(name=field.name, value=key) if field.name == REFUND_KEY_FIELD else field
        for field in request.custom_fields or ()
    )
    order = request.order.model_copy(update={"order_id": order_id})
    return request.model_copy(update={"order": order, "custom_fields": fields}).to_body()
