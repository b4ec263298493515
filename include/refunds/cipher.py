"""Encryption of the frozen request at rest, and the keyed hashes that stay readable beside it."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from include.refunds.keys import key_id, keyed_sha256
from include.refunds.settings import Settings, SettingsError


class UnreadableRequest(Exception):
    """A frozen request can't be opened or is not the one that was stored; the message names the refund and the remedy."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """An encrypted request, and the id of the key that opens it."""

    token: bytes
    key_id: str


class Cipher:
    """
    Encrypts and opens frozen requests.

    :param settings: ``encryption_keys`` (the first encrypts, all decrypt) and ``fingerprint_key``.
    :raises SettingsError: when a key is missing or malformed.
    """

    def __init__(self, settings: Settings) -> None:
        if not settings.encryption_keys:
            raise SettingsError(
                "No encryption key: set PAYROC_REFUNDS_ENCRYPTION_KEYS to a Fernet key; "
                "`python -m include.refunds generate-keys` prints one."
            )
        keys = [key.get_secret_value() for key in settings.encryption_keys]
        try:
            self._fernet = MultiFernet([Fernet(key) for key in keys])
        except ValueError:
            raise SettingsError(
                "PAYROC_REFUNDS_ENCRYPTION_KEYS holds something that is not a Fernet key (32 bytes, url-safe base64); "
                "`python -m include.refunds generate-keys` prints one."
            ) from None
        if settings.fingerprint_key is None or len(settings.fingerprint_key.get_secret_value()) < 32:
            raise SettingsError(
                "PAYROC_REFUNDS_FINGERPRINT_KEY is missing or shorter than 32 characters; "
                "`python -m include.refunds generate-keys` prints one."
            )
        self._fingerprint_key = settings.fingerprint_key.get_secret_value()
        self.key_ids = tuple(key_id(key) for key in keys)

    @property
    def fingerprint_check(self) -> str:
        """A hash that only the same fingerprint key gives, by which the ledger knows its key again."""
        return keyed_sha256(self._fingerprint_key, b"check")

    def seal(self, body: bytes) -> Sealed:
        """Return the body encrypted with the first key."""
        return Sealed(self._fernet.encrypt(body), self.key_ids[0])

    def open(
        self, sealed: bytes, expected_sha256: str, refund_id: int, sealed_with: str | None = None
    ) -> bytes:
        """
        Return the frozen body, proven to be the one that was stored.

        :param sealed_with: id of the key that encrypted it, as far as the ledger knows.
        :raises UnreadableRequest: when no key opens it, or its keyed hash differs from the ledger's.
        """
        try:
            body = self._fernet.decrypt(sealed)
        except InvalidToken:
            if sealed_with in self.key_ids:
                raise UnreadableRequest(
                    f"The request of refund {refund_id} can't be opened though its key {sealed_with} is there: "
                    "the row was changed; it is not sent."
                ) from None
            which = f"the key {sealed_with}, which" if sealed_with else "a key that"
            raise UnreadableRequest(
                f"The request of refund {refund_id} was encrypted with {which} is not among PAYROC_REFUNDS_ENCRYPTION_KEYS; "
                "put that key back, after the first."
            ) from None
        if self.sha256(body) != expected_sha256:
            raise UnreadableRequest(
                f"The request of refund {refund_id} does not have the hash that the ledger holds: either "
                "PAYROC_REFUNDS_FINGERPRINT_KEY was changed, or the row was; it is not sent."
            )
        return body

    def sha256(self, body: bytes) -> str:
        """Return the keyed hash that proves a body unchanged."""
        return keyed_sha256(self._fingerprint_key, b"request\0" + body)

    def fingerprint(self, payee: str) -> str:
        """Return the keyed hash by which refunds of the same payee are found."""
        return keyed_sha256(self._fingerprint_key, b"payee\0" + payee.encode())
