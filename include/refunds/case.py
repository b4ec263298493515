"""A refund that people decide about: what a decision rests on, and when it takes two of them. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from include.refunds.people import same_person
from include.refunds.printable import printable
from include.refunds.refund import Refund

# A proposal is about what its author saw; after a week somebody has to look again.
PROPOSAL_VALID = timedelta(days=7)


class DecisionRefused(Exception):
    """A decision is not carried out; the message is one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """
    A decision of one person that waits for a second.

    :param decision: what was decided.
    :param by: who proposed it.
    :param same_login: it was written with the database login that is at work now, though operators have logins of
        their own: then one person may have typed both names.
    """

    decision: Mapping[str, str]
    by: str
    at: datetime
    same_login: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """
    A refund as people decide about it, and the ledger's time.

    :param may_have_moved: an attempt is not proven to be without effect, or Payroc showed an object of it.
    :param last_attempt_at: when the last attempt may last have sent its POST.
    :param chain_unpaid: whether this refund and all that it replaces are rejected, returned or reversed.
    :param proposal: the newest proposal since the refund came into its status.
    :param reissue: id of the refund that replaces it.
    :param first_source_ref: source_ref of the first refund of its chain of reissues.
    """

    refund: Refund
    may_have_moved: bool
    last_attempt_at: datetime | None
    chain_unpaid: bool
    proposal: Proposal | None
    reissue: int | None
    first_source_ref: str
    now: datetime


def is_confirmed(case: Case, decision: Mapping[str, str], by: str) -> bool:
    """
    Tell whether this is the second person's yes to what another one proposed; ``False`` makes it a proposal, in place of any other.

    :raises DecisionRefused: when the same person says the same again, or does so by another name.
    """
    proposal = case.proposal
    if (
        proposal is None
        or case.now - proposal.at > PROPOSAL_VALID
        or dict(proposal.decision) != dict(decision)
    ):
        return False
    if same_person(proposal.by, by):
        raise DecisionRefused(
            f"{printable(proposal.by)} proposed this already; a different person has to run the same command."
        )
    if proposal.same_login:
        raise DecisionRefused(
            f"{printable(proposal.by)} proposed this with the same database login; a different person has to run "
            "the same command with a login of their own."
        )
    return True
