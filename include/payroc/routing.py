"""ABA routing numbers: the check that catches a mistyped one before the bank does."""

from __future__ import annotations

_WEIGHTS = (3, 7, 1, 3, 7, 1, 3, 7, 1)


def aba_checksum_valid(routing_number: str) -> bool:
    """
    Tell whether nine digits carry a valid ABA check digit.

    The weighted sum ``3(d1+d4+d7) + 7(d2+d5+d8) + (d3+d6+d9)`` is a multiple of 10
    (https://en.wikipedia.org/wiki/ABA_routing_transit_number). It finds every single wrong digit and most transpositions, not
    those of two digits that differ by 5. Payroc's own sample ``123456789`` fails it.

    :param routing_number: the number as text; anything but nine digits 0-9 is not valid.
    """
    if len(routing_number) != 9 or not (routing_number.isascii() and routing_number.isdigit()):
        return False
    return sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, routing_number, strict=True)) % 10 == 0
