"""The mutation gate: the protocol with one thing broken is noticed within 3,000 histories, each time."""

from __future__ import annotations

import pytest

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


def test_the_gate_has_at_least_15_mutants_with_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS if not mutant.harmless}) >= 15
