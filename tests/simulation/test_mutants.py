"""The mutation gate: the protocol with one thing broken is noticed within 3,000 histories, each time."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tests.simulation.mutants import ENOUGH, HARMLESS, MUTANTS, Mutant, noticed


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if not mutant.harmless], ids=lambda mutant: mutant.name
)
def test_a_broken_protocol_is_noticed(mutant: Mutant) -> None:
    _, sentence = noticed(mutant)
    assert sentence is not None, f"nothing noticed in {ENOUGH} histories: {mutant.name}"


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if mutant.harmless], ids=lambda mutant: mutant.name
)
def test_a_change_that_is_said_to_be_harmless_breaks_no_invariant(mutant: Mutant) -> None:
    assert noticed(mutant) == (HARMLESS, None)


def test_the_docs_name_each_mutant() -> None:
    text = (ROOT / "docs" / "safety.md").read_text()
    gate = text[text.index("### M: the mutation gate") : text.index("### E: every point")]
    rows = re.findall(r"^\| (.+) \| +([\d,]+) \| (?:(.+) \| +([\d,]+)| *\|) \|$", gate, re.M)
    named = [name for one, _, other, _ in rows for name in (one, other) if name]
    assert sorted(named) == sorted(mutant.name for mutant in MUTANTS if not mutant.harmless)
    assert len(re.findall(r"^- ", gate, re.M)) == sum(bool(mutant.harmless) for mutant in MUTANTS)
