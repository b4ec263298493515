"""
What banks' rules say of a refund's payee, as far as it is documented in public.

What Payroc's API accepts stands in :mod:`include.payroc.models`; here stands what a new source row is held against. A request that
was frozen earlier is sent, and reissued, as it is. Ask your originating bank before you rely on a rule: Nacha's own book is not public.
"""

from __future__ import annotations

import re
from typing import Final

_WHAT_TO_GIVE: Final = "ppd for a consumer or ccd for a business"

# 01-12, and 21-32 for thrifts: the twelve Federal Reserve districts (Regulation CC, 12 CFR 229, appendix A,
#   https://ecfr.io/Title-12/Part-229/Appendix-A).
# 00: the US government, such as its postal money orders (https://tfm.fiscal.treasury.gov/v2/p4/c700.html).
# 61-72, electronic transactions, and 80, traveler's checks, are known from descriptions only, not from the American Bankers
#   Association or the Federal Reserve (https://en.wikipedia.org/wiki/ABA_routing_transit_number,
#   https://learn.microsoft.com/en-us/purview/sit-defn-aba-routing): so a number of no range is warned of, not refused.
_DOCUMENTED_RANGES: Final = frozenset({*range(13), *range(21, 33), *range(61, 73), 80})


def sec_code(given: object, default: str) -> object:
    """
    Return the SEC code that a source row stands for, in Payroc's spelling.

    Payroc demands one of every unreferenced refund to a bank account, and of a token that stands for one, in small letters
    (https://docs.payroc.com/guides/take-payments/payments/refunds/unreferenced-refunds/bank). Nacha and banks write them in capitals.

    :param given: what the row says; ``None`` or empty: nothing.
    :param default: the code of rows that say nothing.
    """
    if given is None or given == "":
        return default
    return given.lower() if isinstance(given, str) else given


def sec_code_error(code: object, *, allow_web: bool) -> str | None:
    """
    Return why a refund must not carry an SEC code, without quoting what the row says; ``None`` when it may.

    - ``ppd`` is for credits to consumers, ``ccd`` for credits to businesses
      (https://jackhenry.dev/payments-orchestrator/docs/payments/payments-1/what-are-sec-codes/). Payroc's manual has people choose PPD
      for a refund (https://support.payroc.com/en_US/self-care-portal-virtual-terminal/run-a-bank-transfer-refund-with-ach), and Stripe
      refunds by PPD even what was paid by WEB (https://stripe.com/docs/payments/ach-debit/sec-codes).
    - ``tel`` is for debits that a consumer authorizes by telephone: credits are refused
      (https://github.com/moov-io/ach/blob/master/batchTEL.go).
    - ``web`` as a credit is a payment from one consumer to another
      (https://www.pnc.com/en/corporate-and-institutional/treasury-management/resources/nacha-rule-changes/nacha-2014-march-person-to-person.html).
      Some processors refuse it for refunds (https://paya.helpjuice.com/47607-how/how-do-i-process-an-ach-refund-in-paya-connect); an
      example in Payroc's guide uses it, so a setting allows it.

    :param code: from :func:`sec_code`.
    :param allow_web: accept ``web``.
    """
    if code in ("ppd", "ccd") or (code == "web" and allow_web):
        return None
    if code == "tel":
        return f"is tel, which is for debits only; give {_WHAT_TO_GIVE}"
    if code == "web":
        return (
            f"is web, which is for payments between consumers; give {_WHAT_TO_GIVE}, "
            "or set PAYROC_REFUNDS_ALLOW_SEC_WEB when your bank says so"
        )
    return f"must be {_WHAT_TO_GIVE}"


def routing_number_error(routing_number: object) -> str | None:
    """
    Return why a routing number is none, whether or not its checksum is asked for; ``None`` when nothing is known against it.

    Nine zeros pass the checksum (https://en.wikipedia.org/wiki/ABA_routing_transit_number) and are nobody's number; they are what a
    field is filled with.
    """
    return "is nine zeros, which no bank has; ask the payee" if routing_number == "000000000" else None


def routing_number_warning(routing_number: object) -> str | None:
    """
    Return a sentence, without the number, when its first two digits are of no documented range.

    :param routing_number: anything but nine digits, which is refused elsewhere, is not warned of.
    """
    if not isinstance(routing_number, str) or not re.fullmatch("[0-9]{9}", routing_number):
        return None
    if int(routing_number[:2]) in _DOCUMENTED_RANGES:
        return None
    return "The first two digits of the routing number are of no documented range (00-12, 21-32, 61-72, 80); check it with the payee."
