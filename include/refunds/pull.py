"""Pull: source rows become refunds of the ledger, or are reported with what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from include.payroc.models import REFUND_KEY_FIELD, RefundRequest, explain
from include.refunds.bank_rules import routing_number_error, routing_number_warning, sec_code, sec_code_error
from include.refunds.cipher import Cipher
from include.refunds.keys import default_order_id, idempotency_key
from include.refunds.ledger import NAMELESS, Ledger, NewRefund, differences
from include.refunds.settings import Settings
from include.refunds.source import Source, SourceRow

_BATCH = 1000
_ACCOUNT_COLUMNS = ("name_on_account", "account_type", "routing_number", "account_number")


class InvalidRow(Exception):
    """
    A source row that can't become a refund.

    :param errors: what is wrong, by column, without the values.
    """

    def __init__(self, errors: dict[str, str]) -> None:
        self.errors = errors
        super().__init__("; ".join(f"{column}: {message}" for column, message in errors.items()))


@dataclass(slots=True)
class Pulled:
    """
    What a pull found.

    :param at: when it began, in the ledger's time.
    :param rows: rows that the source returned.
    :param new: refunds stored for the first time.
    :param invalid: errors by source_ref and column.
    :param changed: source_refs whose row differs from the refund it once became, each with what differs.
    :param standing: source_refs of the rows that are valid and not changed: the source stands by these refunds.
    :param withdrawn: ids of refunds that wait and that the source no longer returns, each with a sentence.
    :param written_again: rows that are offered although their refunds have ended; they are written again.
    :param still_offered: such rows that were written back again lately, and are offered all the same.
    :param warnings: by source_ref of a row in ``standing``, sentences about what is odd of it though no rule refuses it.
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


async def pull(source: Source, ledger: Ledger, cipher: Cipher, settings: Settings) -> Pulled:
    """
    Store the source's approved refunds that the ledger does not have yet, each with its key and its frozen body.

    A bad row is recorded with its errors and blocks no other. A row that was pulled before never changes.

    :returns: what was found; nothing in it holds bank data.
    :raises SourceError: when the source can't be read.
    :raises LedgerError: when the ledger belongs to another source, or its fingerprints were made with another key.
    """
    await ledger.check_source()
    await ledger.check_fingerprint_key(cipher.fingerprint_check)
    began = await ledger.now()
    rows = await source.select_approved()
    pulled = Pulled(at=began, rows=len(rows))
    valid = validate(rows, cipher, settings, pulled.invalid)
    for start in range(0, len(valid), _BATCH):
        await _store(valid[start : start + _BATCH], ledger, cipher, pulled)
    await ledger.note_invalid(
        pulled.invalid, [refund.source_ref for refund, _ in valid if refund.source_ref not in pulled.invalid]
    )
    offered = [*pulled.standing, *pulled.changed, *pulled.invalid]
    pulled.written_again, pulled.still_offered = await ledger.write_again(offered)
    pulled.warnings = warnings(rows, frozenset(pulled.standing))
    aside = await ledger.set_aside(pulled.standing)
    named = {*pulled.changed, *pulled.invalid}
    pulled.withdrawn = {
        key: "Its source row is no longer approved." for key, ref in aside.items() if ref not in named
    }
    return pulled


def validate(
    rows: Sequence[SourceRow], cipher: Cipher, settings: Settings, invalid: dict[str, dict[str, str]]
) -> list[tuple[NewRefund, bytes]]:
    """
    Return the rows that validate, each with the body to freeze; put the errors of the others into ``invalid``.

    :param invalid: errors by source_ref and column.
    """
    seen = Counter(row["source_ref"] for row in rows)
    valid = []
    for number, row in enumerate(rows, start=1):
        source_ref = row["source_ref"]
        try:
            if not _is_text(source_ref, 200):
                raise InvalidRow({"source_ref": "must be text of 1 to 200 characters"})
            if seen[source_ref] > 1:
                raise InvalidRow({"source_ref": f"comes {seen[source_ref]} times; each refund needs its own"})
            valid.append(build(row, cipher, settings))
        except InvalidRow as error:
            name = source_ref if _is_text(source_ref, 200) else f"{NAMELESS}{number})"
            invalid[name] = error.errors
    return valid


def warnings(rows: Sequence[SourceRow], source_refs: Collection[str]) -> dict[str, list[str]]:
    """
    Return what is odd of rows though no rule refuses it, in sentences without bank data.

    :param source_refs: the rows in question.
    :returns: sentences by source_ref, for the rows of which there is something to say.
    """
    asked = [row for row in rows if row["source_ref"] in source_refs]
    return {
        row["source_ref"]: [warning]
        for row in asked
        if (warning := routing_number_warning(row["routing_number"]))
    }


def build(row: SourceRow, cipher: Cipher, settings: Settings) -> tuple[NewRefund, bytes]:
    """
    Return the refund that a source row stands for, and the body that is sent for it, now and in every attempt.

    :raises InvalidRow: when the row breaks a rule of Payroc's or of ours.
    """
    errors = _people_errors(row)
    approved_at = _instant(row["approved_at"])
    if approved_at is None:
        errors["approved_at"] = "must be an instant, such as 2026-11-23T09:30:00-05:00"
    amount = _whole(row["amount"])
    if amount is None:
        errors["amount"] = "must be a whole number in minor units, such as 4999 for 49.99"
    key = idempotency_key(settings.source, row["source_ref"])
    order_id = _text_or(row["order_id"], default_order_id(key))
    try:
        request = RefundRequest.model_validate(
            {
                "processing_terminal_id": row["processing_terminal_id"],
                "order": {
                    "order_id": order_id,
                    "description": _text_or(row["description"], f"Refund {order_id}"),
                    "amount": amount if amount is not None else 1,
                    "currency": row["currency"],
                },
                "refund_method": _method(row, settings, errors),
                "customer": {"contact_methods": [{"type": "email", "value": row["email"]}]}
                if _given(row["email"])
                else None,
                "custom_fields": [{"name": REFUND_KEY_FIELD, "value": str(key)}],
            },
            context={"aba_checksum": settings.aba_checksum},
        )
    except ValidationError as error:
        for path, message in explain(error).items():
            errors.setdefault(_column_of(path), message)
        # The method could not even be built when its columns contradict one another, which is said already.
        if len(errors) > 1:
            errors.pop("refund_method", None)
        raise InvalidRow(errors) from None
    if errors or amount is None or approved_at is None:
        raise InvalidRow(errors)
    body = request.to_body()
    payee = (
        row["secure_token"]
        if _given(row["secure_token"])
        else f"{row['routing_number']}/{row['account_number']}"
    )
    refund = NewRefund(
        source_ref=row["source_ref"],
        processing_terminal_id=request.processing_terminal_id,
        order_id=request.order.order_id,
        description=request.order.description,
        amount=amount,
        currency=request.order.currency,
        payee_last4=None if _given(row["secure_token"]) else row["account_number"][-4:],
        payee_fingerprint=cipher.fingerprint(payee),
        request_sha256=cipher.sha256(body),
        requested_by=row["requested_by"],
        approved_by=row["approved_by"],
        approved_at=approved_at,
        idempotency_key=str(key),
    )
    return refund, body


async def _store(
    valid: list[tuple[NewRefund, bytes]], ledger: Ledger, cipher: Cipher, pulled: Pulled
) -> None:
    refs = [refund.source_ref for refund, _ in valid]
    known = await ledger.stored(refs)
    inserted = await ledger.store(
        [(refund, cipher.seal(body)) for refund, body in valid if refund.source_ref not in known]
    )
    pulled.new += len(inserted)
    if len(inserted) + len(known) < len(valid):
        # Another pull may have stored them a moment ago.
        known = await ledger.stored(refs)
    for refund, _ in valid:
        if refund.source_ref not in inserted and refund.source_ref not in known:
            pulled.invalid[refund.source_ref] = {
                "order_id": "is used by another refund of this terminal; order ids are unique"
            }
        elif refund.source_ref in known and (differing := differences(refund, known[refund.source_ref])):
            pulled.changed[refund.source_ref] = differing
        else:
            pulled.standing.append(refund.source_ref)


def _column_of(path: str) -> str:
    """Return the source column behind a field of Payroc's request."""
    if path.startswith("customer"):
        return "email"
    name = path.rpartition(".")[2]
    return "secure_token" if name == "token" else name


def _method(row: SourceRow, settings: Settings, errors: dict[str, str]) -> dict[str, Any] | None:
    code = sec_code(row["sec_code"], settings.sec_code)
    if problem := sec_code_error(code, allow_web=settings.allow_sec_web):
        errors["sec_code"] = problem
    has_token = _given(row["secure_token"])
    if has_token and any(_given(row[name]) for name in ("routing_number", "account_number")):
        errors["secure_token"] = "is given together with a bank account; give one of the two"  # noqa: S105 - a message
        return None
    if has_token:
        account_type = row["account_type"] if _given(row["account_type"]) else None
        return {
            "type": "secureToken",
            "token": row["secure_token"],
            "account_type": account_type,
            "sec_code": code,
        }
    if not any(_given(row[name]) for name in ("routing_number", "account_number")):
        errors["account_number"] = "is missing, and so is secure_token; give one of the two"
        return None
    if problem := routing_number_error(row["routing_number"]):
        errors["routing_number"] = problem
    return {"type": "ach", "sec_code": code} | {name: row[name] for name in _ACCOUNT_COLUMNS}


def _people_errors(row: SourceRow) -> dict[str, str]:
    errors = {}
    for column in ("requested_by", "approved_by"):
        if not _is_text(row[column], 200) or not row[column].strip():
            errors[column] = "is missing, or not text of at most 200 characters"
    if not errors and row["requested_by"].strip().lower() == row["approved_by"].strip().lower():
        errors["approved_by"] = "is the same person as requested_by; a refund needs two"
    return errors


def _instant(value: object) -> datetime | None:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _whole(value: object) -> int | None:
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_text(value: object, longest: int) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= longest and "\x00" not in value


def _given(value: object) -> bool:
    return value is not None and value != ""


def _text_or(value: object, default: str) -> object:
    return default if value is None or (isinstance(value, str) and not value.strip()) else value


def source_changes(
    rows: Sequence[SourceRow], stored: Mapping[str, Any], cipher: Cipher, settings: Settings
) -> dict[str, str]:
    """
    Return what the source no longer stands by: source_refs that are gone, invalid or different now, each with a sentence.

    :param rows: the source's rows of this moment.
    :param stored: what the ledger holds of the refunds in question, by source_ref (see :meth:`Ledger.stored`).
    """
    asked = [row for row in rows if row["source_ref"] in stored]
    invalid: dict[str, dict[str, str]] = {}
    now = {refund.source_ref: refund for refund, _ in validate(asked, cipher, settings, invalid)}
    findings = {}
    for source_ref, row in stored.items():
        if source_ref in invalid:
            findings[source_ref] = f"Its source row is invalid now ({', '.join(invalid[source_ref])})."
        elif source_ref not in now:
            findings[source_ref] = "Its source row is no longer approved."
        elif differing := differences(now[source_ref], row):
            findings[source_ref] = (
                f"Its source row changed ({', '.join(differing)}); give it a new source_ref."
            )
    return findings
