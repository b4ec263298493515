"""The question whether a run may release its refunds, as a person reads it: counts and sums, no bank data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from include.refunds.limits import Totals
from include.refunds.money import money, sums
from include.refunds.printable import printable


@dataclass(frozen=True, slots=True)
class Question:
    """
    What a person has to know to approve a run.

    :param why: which threshold is passed, one sentence.
    :param candidates_hash: of exactly which refunds.
    :param basis: what the run would release for the first time: ``totals`` with count, amount and largest per currency, and
        ``new_payees``, to whom nothing was released before; ``again`` counts what was released before and not sent.
    :param today: what the day has released without a person before, per currency.
    """

    why: str
    candidates_hash: str
    basis: dict[str, Any]
    today: Totals

    @property
    def subject(self) -> str:
        """The question in one line, the sums first: lists cut off its end."""
        if not self.basis["totals"]:
            return f"Release {self.basis['again']:,} refunds again?"
        return f"Release {sums(self.basis['totals'])}?"

    def body(self, run_id: str) -> str:
        """Return the question in Markdown."""
        rows = [
            f"| {currency} | {entry['count']:,} | {money(entry['amount'], currency)} | {money(entry['largest'], currency)} |"
            for currency, entry in sorted(self.basis["totals"].items())
        ]
        return "\n".join(
            [
                f"The run `{printable(run_id)}` would release these refunds to Payroc:",
                "",
                "| Currency | Refunds | Total | Largest refund |",
                "| --- | ---: | ---: | ---: |",
                *rows,
                "",
                f"Payees to whom nothing was released before: **{self.basis['new_payees']:,}**",
                "",
                *(
                    [f"Beside these, {self.basis['again']:,} that were released before and not sent.", ""]
                    if self.basis["again"]
                    else []
                ),
                f"Released today without a person before: {sums(self.today)}.",
                "",
                f"{self.why} Approve releases exactly these refunds; what the source adds meanwhile waits for the next run, and what it "
                "withdraws or changes is left out. Reject sends nothing, and they stay approved.",
                "",
                f"Reference: `{self.candidates_hash[:16]}`",
            ]
        )
