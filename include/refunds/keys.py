"""What is derived from a source row and never drawn: idempotency key, default order id, fingerprint, hashes."""

from __future__ import annotations

import hashlib
import hmac
import json
from uuid import UUID


def idempotency_key(source: str, source_ref: str) -> UUID:
    """
    Return the idempotency key of a refund: SHA-256 of source and source_ref, in the form of a UUID v4.

    Derived, so that a lost or restored ledger cannot send the same refund under a second key. Payroc asks for a
    UUID v4 (https://docs.payroc.com/api/idempotency), hence the version and variant bits.

    :param source: fixed name of the source (setting ``PAYROC_REFUNDS_SOURCE``).
    :param source_ref: the source's own reference of the refund.
    """
    digest = hashlib.sha256(json.dumps([source, source_ref]).encode()).digest()
    return UUID(bytes=digest[:16], version=4)


def reverse_key(key: UUID) -> UUID:
    """
    Return the idempotency key under which a refund is reversed: SHA-256 of the key that it was created with, in the form of a UUID v4.

    Derived like that one, so that a reversal may be asked for again, and never the same: Payroc refuses a key that was used at
    another URI.
    """
    digest = hashlib.sha256(b"reverse\0" + key.bytes).digest()
    return UUID(bytes=digest[:16], version=4)


def default_order_id(key: UUID) -> str:
    """Return the order id of a refund whose source gives none: 22 characters made from its idempotency key."""
    return f"RF{key.hex[:20].upper()}"


def payee_of_account(routing_number: str, account_number: str) -> str:
    """Return what a bank account is recognised by: a bank reads it the same with zeros before it."""
    return f"{routing_number}/{account_number.lstrip('0')}"


def payee_of_token(token: str) -> str:
    """Return what a secure token is recognised by, however it was typed."""
    return "".join(token.split()).casefold()


def keyed_sha256(key: str, value: bytes) -> str:
    """
    Return an HMAC-SHA256 as 64 hex digits.

    A plain hash of a body with a ten-digit account number could be reversed by trying all of them; with a key that
    is not in the database it can't.
    """
    return hmac.new(key.encode(), value, hashlib.sha256).hexdigest()


def key_id(key: str) -> str:
    """Return the name of an encryption key: the first 8 hex digits of its SHA-256, which tell nothing of a key that is long and random."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]
