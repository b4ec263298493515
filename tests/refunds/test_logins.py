"""Two people have two logins where operators have logins of their own; names given with --by prove nothing then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import URL

from include.refunds.case import DecisionRefused
from include.refunds.ledger import Ledger, LedgerEngine
from include.refunds.reissue import reissue
from include.refunds.resolve import resolve
from include.refunds.roles import MIGRATOR, OPERATOR
from include.refunds.states import Status
from tests.conftest import Login
from tests.refunds.conftest import World

Decide = Callable[[str, str], Any]


@pytest.fixture
def ledger_of(world: World, ledger_url: URL, login: Login) -> Callable[[str, str], Ledger]:
    """Return the ledger for a name given with --by, and the login that gives it; ``owner`` owns the ledger."""

    def ledger(by: str, name: str) -> Ledger:
        url = ledger_url if name == "owner" else login(ledger_url, OPERATOR, name)
        return Ledger(LedgerEngine(url, pool_size=0), world.settings, actor=by)

    return ledger


def resolving(world: World, ledger_of: Callable[[str, str], Ledger]) -> Decide:
    refund_id = world.released("9013")
    world.send(refund_id)

    def decide(by: str, name: str) -> bool:
        ledger = ledger_of(by, name)
        work = resolve(
            refund_id, Status.ACCEPTED, "seen", payroc_refund_id=None, ledger=ledger, gateway=world.gateway
        )
        return world.run(work)[1]

    return decide


def reissuing(world: World, ledger_of: Callable[[str, str], Ledger]) -> Decide:
    refund_id = world.released("9002")
    world.send(refund_id)

    def decide(by: str, name: str) -> bool:
        work = reissue(
            refund_id,
            "seen",
            ledger=ledger_of(by, name),
            gateway=world.gateway,
            cipher=world.cipher,
            source=world.settings.source,
        )
        return world.run(work) is not None

    return decide


@pytest.fixture(params=[resolving, reissuing])
def decide(request: pytest.FixtureRequest, world: World, ledger_of: Callable[[str, str], Ledger]) -> Decide:
    """Return what decides about a refund with a name and a login, and tells whether that was carried out."""
    made: Decide = request.param(world, ledger_of)
    return made


def test_two_names_of_one_operators_login_are_not_two_people(decide: Decide) -> None:
    assert decide("ann", "ann") is False
    with pytest.raises(
        DecisionRefused, match="ann proposed this with the same database login; a different person"
    ):
        decide("bob", "ann")
    assert decide("bob", "bob") is True


def test_two_logins_with_one_name_are_not_two_people(decide: Decide) -> None:
    assert decide("ann", "ann") is False
    with pytest.raises(DecisionRefused, match="ann proposed this already"):
        decide("ann", "bob")


def test_where_operators_have_logins_the_owner_is_no_two_people_either(
    decide: Decide, ledger_url: URL, login: Login
) -> None:
    login(ledger_url, OPERATOR, "ann")
    assert decide("ann", "owner") is False
    with pytest.raises(DecisionRefused, match="with the same database login"):
        decide("bob", "owner")
    assert decide("bob", "bob") is True


def test_one_login_for_everything_goes_on_working_with_two_names(
    decide: Decide, ledger_url: URL, login: Login
) -> None:
    # It migrates as well, so it is no operator's own.
    login(ledger_url, MIGRATOR, "everything")
    login(ledger_url, OPERATOR, "everything")
    assert decide("ann", "everything") is False
    assert decide("bob", "everything") is True


def test_an_operators_login_of_another_database_counts_for_nothing(
    decide: Decide, ledger_url: URL, login: Login
) -> None:
    login(ledger_url.set(database="postgres"), OPERATOR, "elsewhere")
    assert decide("ann", "owner") is False
    assert decide("bob", "owner") is True


@pytest.mark.parametrize("requester", ["ann", "Ann", "ann@example.com"])
def test_a_requester_does_not_release_the_hold_with_the_own_login_by_another_name(
    world: World, ledger_of: Callable[[str, str], Ledger], requester: str
) -> None:
    world.limit(largest_refund=1)
    refund_id = world.released(requested_by=requester)
    with pytest.raises(DecisionRefused, match=r"ann requested refund .* and can't unhold it"):
        world.run(ledger_of("erin", "ann").decisions.unhold(refund_id, "seen"))
    world.run(ledger_of("erin", "erin").decisions.unhold(refund_id, "seen"))
    assert world.row(refund_id)["status"] == "approved"
