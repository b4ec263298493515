"""The mutation gate: the protocol with one thing broken is noticed within 1,000 histories, each time."""

from __future__ import annotations

import pytest

from tests.simulation.engine import Violation
from tests.simulation.history import History
from tests.simulation.mutants import MUTANTS, Mutant

_SEEDS = 1_000


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if not mutant.harmless], ids=lambda mutant: mutant.name)
def test_a_broken_protocol_is_noticed(mutant: Mutant) -> None:
    with mutant.applied():
        assert any(_breaks_an_invariant(seed) for seed in range(_SEEDS)), f"nothing noticed in {_SEEDS} histories: {mutant.name}"


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if mutant.harmless], ids=lambda mutant: mutant.name)
def test_a_change_that_is_said_to_be_harmless_breaks_no_invariant(mutant: Mutant) -> None:
    with mutant.applied():
        assert not [seed for seed in range(_SEEDS) if _breaks_an_invariant(seed)]


def test_the_gate_has_at_least_15_mutants_with_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS if not mutant.harmless}) >= 15


def _breaks_an_invariant(seed: int) -> bool:
    try:
        History(seed).run()
    except Violation:
        return True
    return False
