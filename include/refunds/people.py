"""People: when two names or logins are one person's."""

from __future__ import annotations

from include.refunds.text import fold


def person(name: str) -> str:
    """
    Return the normal form of a person's name or login, which the ledger stores and compares.

    Case, the number of blanks, invisible characters, composed or decomposed accents and full-width letters
    make no difference. Letters of two alphabets that look alike do.

    :param name: any text, also one that no row may hold.
    """
    return fold(name)


def same_person(one: str, other: str) -> bool:
    """Return whether two names are one person's."""
    return person(one) == person(other)
