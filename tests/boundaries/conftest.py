"""What the tests of boundaries share: the merchant's world of the tests of the ledger."""

from __future__ import annotations

from tests.refunds.conftest import world as world
