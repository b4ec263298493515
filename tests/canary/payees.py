"""Payees who exist nowhere else, so that any trace of one of them, wherever it is found, is a leak."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

# Every made-up word has this length: long enough never to be met by chance, short enough for two of them on an account.
WORD_LENGTH = 10
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwxz", "aeiou"


@dataclass(frozen=True)
class Payee:
    """
    One payee.

    :param secure_token: Payroc's token of the account, for a payee who is paid by one; it stands for routing and account number.
    """

    name: str
    email: str
    routing_number: str
    account_number: str
    secure_token: str | None = None

    def columns(self) -> dict[str, Any]:
        """Return the payee's columns of a source row."""
        by_account = self.secure_token is None
        return {
            "name_on_account": self.name,
            "routing_number": self.routing_number if by_account else None,
            "account_number": self.account_number if by_account else None,
            "secure_token": self.secure_token,
            "email": self.email,
        }


class Mint:
    """
    Makes payees, and remembers every value that it ever gave out.

    :param seed: the same seed gives the same payees.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._given: set[str] = set()
        self.names: list[str] = []
        self.emails: list[str] = []
        self.account_numbers: list[str] = []
        self.secure_tokens: list[str] = []
        self.accounts: list[tuple[str, str]] = []
        self.routing_numbers = [self._routing_number() for _ in range(12)]

    def payee(self, ending: str | None = None, *, by_token: bool = False) -> Payee:
        """
        Make one more payee.

        :param ending: last four digits of the account number or of the token, at which the local Payroc shows a behaviour.
        """
        payee = Payee(
            name=self.name(),
            email=self.email(),
            routing_number=self._random.choice(self.routing_numbers),
            account_number=self.account_number(None if by_token else ending),
            secure_token=self.secure_token(ending) if by_token else None,
        )
        self.accounts.append((payee.routing_number, payee.account_number))
        return payee

    def name(self) -> str:
        """Make a name of two words."""
        self.names.append(f"{self._word()} {self._word()}".title())
        return self.names[-1]

    def email(self) -> str:
        """Make an e-mail address."""
        self.emails.append(f"{self._word()}@canary.example")
        return self.emails[-1]

    def account_number(self, ending: str | None = None) -> str:
        """Make an account number of 10 to 12 digits, most of them longer ones: those are never met by chance."""
        self.account_numbers.append(self._digits(self._random.choice((10, *[11] * 4, *[12] * 15)), ending))
        return self.account_numbers[-1]

    def secure_token(self, ending: str | None = None) -> str:
        """Make a secure token of 13 to 19 digits."""
        self.secure_tokens.append(self._digits(self._random.choice((13, 16, 19)), ending))
        return self.secure_tokens[-1]

    def _word(self) -> str:
        return self._new(
            lambda: "".join(
                self._random.choice(_VOWELS if place % 2 else _CONSONANTS) for place in range(WORD_LENGTH)
            )
        )

    def _digits(self, length: int, ending: str | None) -> str:
        # Ordinary accounts must not trigger anything.
        last = ending or f"{self._random.randrange(1000, 8000)}"
        first = self._random.choice("23456789")
        return self._new(lambda: first + "".join(self._random.choices("0123456789", k=length - 5)) + last)

    def _routing_number(self) -> str:
        digits = [*divmod(self._random.randint(1, 12), 10), *self._random.choices(range(10), k=6)]
        weighted = sum(weight * digit for weight, digit in zip((3, 7, 1) * 3, digits, strict=False))
        return "".join(map(str, [*digits, -weighted % 10]))

    def _new(self, make: Any) -> str:
        while (value := str(make())) in self._given:
            pass
        self._given.add(value)
        return value
