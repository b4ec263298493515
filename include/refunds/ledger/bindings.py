"""
What the ledger is bound to: one Payroc environment, one source, one fingerprint key. Bound once,
forever.
"""

from __future__ import annotations

from include.payroc.hosts import PRODUCTION
from include.refunds.ledger.database import LedgerError, Part
from include.refunds.settings import DEFAULT_SOURCE

# True when the ledger is bound to the Payroc environment `asked_environment`.
IN_ITS_ENVIRONMENT = """EXISTS (
    SELECT FROM refund_ledger.bindings WHERE name = 'environment' AND value = asked_environment)"""


class Bindings(Part):
    """The rows of ``bindings``."""

    async def check_environment(self, environment: str, *, bind: bool = False) -> bool:
        """
        Make sure that the ledger belongs to this Payroc, or to none yet.

        :param environment: Payroc's API base URL.
        :param bind: bind a ledger that belongs to none yet. Only given when this one has answered, so that a
            typing error binds nothing.
        :returns: whether it belonged to this one before.
        :raises LedgerError: when the ledger belongs to another one, or when this is production and the source
            has the default name.
        """
        nameless = environment == PRODUCTION and self._database.settings.source == DEFAULT_SOURCE
        found = await self._binding("environment", environment, bind=bind and not nameless)
        if found not in (None, environment):
            raise LedgerError(
                f"This ledger belongs to Payroc at {found}, the connection points to {environment}: "
                "use the connection it belongs to, or a ledger of its own."
            )
        if nameless:
            raise LedgerError(
                f"PAYROC_REFUNDS_SOURCE is {DEFAULT_SOURCE}, its default, and the connection is Payroc's "
                "production: set a name of your own, such as acme_refunds, and never change it, because two shops "
                "with one name and one Payroc account would send their refunds under the same keys."
            )
        return found is not None

    async def check_source(self) -> None:
        """
        Make sure that the ledger belongs to this source, and bind it when it belongs to none yet.

        Keys are derived from the source's name, so the same refund under another name would be another
        payment.

        :raises LedgerError: when the ledger belongs to another source.
        """
        source = self._database.settings.source
        found = await self._binding("source", source, bind=True)
        if found not in (None, source):
            raise LedgerError(
                f"This ledger belongs to the source {found!r}, but PAYROC_REFUNDS_SOURCE says {source!r}: set it "
                "back, because under another name the same refunds would be paid again; another source needs a "
                "ledger of its own."
            )

    async def check_fingerprint_key(self, check: str) -> None:
        """
        Make sure that the ledger's fingerprints were made with this key, and bind it when it has none yet.

        :param check: hash that only the same key gives (see :attr:`Cipher.fingerprint_check`).
        :raises LedgerError: when they were made with another one.
        """
        if await self._binding("fingerprint_check", check, bind=True) not in (None, check):
            raise LedgerError(
                "PAYROC_REFUNDS_FINGERPRINT_KEY is not the key with which this ledger's fingerprints were made: "
                "set the old one again; with another key no refund would be recognised, and no duplicate found."
            )

    async def _binding(self, name: str, value: str, *, bind: bool) -> str | None:
        """
        Return what the ledger was bound to before. One that was bound to nothing is bound with
        ``bind``.
        """
        query = "SELECT value FROM refund_ledger.bindings WHERE name = :name"
        insert = """
            INSERT INTO refund_ledger.bindings (name, value) VALUES (:name, :value)
            ON CONFLICT (name) DO NOTHING"""
        async with self._database.transaction() as (connection, _):
            found: str | None = (await connection.execute(query, {"name": name})).scalar_one_or_none()
            if found is None and bind:
                await connection.execute(insert, {"name": name, "value": value})
                # Another transaction may have been faster, with another value.
                bound = (await connection.execute(query, {"name": name})).scalar_one()
                found = None if bound == value else bound
        return found
