"""What a verdict does to a refund, over every status, verdict and history that can meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise, product
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from include.payroc.errors import PayrocError, PayrocNoAnswer, PayrocProblem, PayrocUnexpectedAnswer
from include.refunds.classify import EVERYTHING, Outcome, Sighting, Verdict, judge_error
from include.refunds.refund import History
from include.refunds.states import EDGES, PAID, Status
from include.refunds.transitions import Change, decide
from tests.refunds.test_classify import REFUND

NOW = datetime(2026, 11, 20, 9, tzinfo=UTC)
UNKNOWN_WAIT = timedelta(seconds=90)
A_DAY = timedelta(days=1)
OURS, ANOTHER = "CD3HN88U9F", "OTHER00001"

WORD_OF = {
    Status.ACCEPTED: "ready",
    Status.SETTLED: "complete",
    Status.RETURNED: "returned",
    Status.REVERSED: "reversal",
    Status.REJECTED: "declined",
    Status.REVIEW: "admin",
}
NEVER_SENT = (Status.APPROVED, Status.HELD, Status.RELEASED)
OUTCOME_OF = {Status.REJECTED: Outcome.REJECTED, Status.REVIEW: Outcome.REVIEW}


def sighting(status: Status, refund_id: str = OURS) -> Verdict:
    outcome = OUTCOME_OF.get(status, Outcome.ACCEPTED)
    return Verdict(
        outcome, f"Payroc says {WORD_OF[status]}.", sighting=Sighting(refund_id, WORD_OF[status], status)
    )


SIGHTINGS = [sighting(status) for status in WORD_OF]
CONTRADICTION = Verdict(Outcome.REVIEW, "Payroc holds more than one refund of ours.", contradiction=True)
WITHOUT_SIGHTING = [
    *(
        Verdict(outcome, f"It is {outcome}.")
        for outcome in (Outcome.REJECTED, Outcome.UNKNOWN, Outcome.REVIEW, Outcome.NOT_SENT)
    ),
    *(
        Verdict(Outcome.CONFIGURATION, "Mend it.", pause=pause, not_processed=proven)
        for pause, proven in product((EVERYTHING, REFUND.processing_terminal_id), (True, False))
    ),
]
HISTORIES = [
    History(),
    History(processed=True),
    History(unresolved=True),
    History(unresolved=True, key_in_use=True),
    History(unresolved=True, unauthorized_at=NOW),
]


class Case(NamedTuple):
    """One way in which a row and a verdict meet."""

    status: Status
    stored_id: str | None
    verdict: Verdict
    history: History
    current: bool
    foreign_id: bool = False

    def decide(self, unknown_wait: timedelta = UNKNOWN_WAIT) -> Change | None:
        return decide(
            replace(
                REFUND,
                status=self.status,
                payroc_refund_id=self.stored_id,
                first_sent_at=None if self.status in NEVER_SENT else NOW,
            ),
            self.verdict,
            self.history,
            current=self.current,
            foreign_id=self.foreign_id,
            now=NOW,
            unknown_wait=unknown_wait,
        )


def cases() -> Iterator[Case]:
    verdicts = [*SIGHTINGS, CONTRADICTION, *WITHOUT_SIGHTING]
    for case in product(Status, (None, OURS, ANOTHER), verdicts, HISTORIES, (True, False), (True, False)):
        if can_be(Case(*case)):
            yield Case(*case)


def can_be(case: Case) -> bool:
    if case.foreign_id and case.verdict.sighting is None:
        return False
    # An attempt is current only while its refund is sending; a look-up without an attempt may also be for an unknown one, and
    # what it says without an object is never anything but review.
    return (
        not case.current
        or case.status is Status.SENDING
        or (case.status is Status.UNKNOWN and case.verdict.outcome is Outcome.REVIEW)
    )


def steps_of(case: Case) -> tuple[Status, ...]:
    change = case.decide()
    return change.steps if change is not None else ()


def test_every_way_that_is_decided_walks_along_the_edges() -> None:
    walked = {edge for case in cases() for edge in pairwise((case.status, *steps_of(case)))}
    assert walked <= EDGES
    assert {target for _, target in walked} >= {
        *sorted(PAID),
        Status.REJECTED,
        Status.UNKNOWN,
        Status.REVIEW,
        Status.RELEASED,
    }


def test_an_attempt_that_no_longer_holds_the_refund_records_a_sighting_or_a_contradiction_and_nothing_weaker() -> (
    None
):
    for case in cases():
        if not case.current and case.verdict in WITHOUT_SIGHTING:
            assert case.decide() is None, case


@pytest.mark.parametrize("status", [Status.SENDING, Status.UNKNOWN])
@pytest.mark.parametrize("verdict", SIGHTINGS)
def test_a_sighting_is_recorded_whoever_made_it(status: Status, verdict: Verdict) -> None:
    late, current = (Case(status, None, verdict, History(), current=held) for held in (False, True))
    assert late.decide() == current.decide()
    assert late.decide() is not None


def test_a_refund_in_review_is_left_by_people_only() -> None:
    in_review = [case for case in cases() if case.status is Status.REVIEW]
    assert in_review
    assert all(steps_of(case) == () for case in in_review)


def test_what_payroc_says_of_a_refund_in_review_is_kept_for_people_to_see() -> None:
    for verdict in SIGHTINGS:
        change = Case(Status.REVIEW, None, verdict, History(), current=False).decide()
        assert change is not None
        assert change.sighting == verdict.sighting


def test_a_refund_id_of_another_row_and_a_second_one_are_contradictions_that_pause_everything() -> None:
    met = 0
    for case in cases():
        seen = case.verdict.sighting
        if seen is None or not (case.foreign_id or case.stored_id not in (None, seen.payroc_refund_id)):
            continue
        met += 1
        change = case.decide()
        assert change is not None, case
        assert change.contradiction is not None, case
        assert OURS in change.contradiction
        assert (change.pause, change.sighting) == (EVERYTHING, None), case
        assert (case.status, *change.steps)[-1] is Status.REVIEW, case
    assert met


def test_two_refunds_of_ours_at_payroc_pause_everything_whoever_found_them() -> None:
    for case in cases():
        if case.verdict is CONTRADICTION:
            change = case.decide()
            assert change is not None, case
            assert (change.contradiction, change.pause) == (CONTRADICTION.reason, EVERYTHING)
            assert (case.status, *change.steps)[-1] is Status.REVIEW, case


def test_rejected_is_reached_by_a_definitive_refusal_or_a_declined_object_only() -> None:
    for case in cases():
        if Status.REJECTED in steps_of(case):
            assert case.verdict.outcome is Outcome.REJECTED, case
            assert case.current or case.verdict.sighting is not None, case


ERRORS: list[PayrocError] = [
    PayrocNoAnswer("create refund", "no answer within 30 s"),
    *(
        PayrocUnexpectedAnswer("create refund", "strange", http_status=status)
        for status in (201, 302, 400, 401, 404, 429, 503)
    ),
    *(
        PayrocProblem(
            "create refund", fragment, http_status=status, problem_type=fragment, parameters=parameters
        )
        for status, fragment, parameters in product(
            (400, 401, 403, 404, 409, 415, 422, 429, 500),
            (
                "bad-request",
                "idempotency-key-in-use",
                "resource-already-exists",
                "capabilities-missing",
                "not-authorized",
                "forbidden",
            ),
            ((), ("processingTerminalId",)),
        )
    ),
]


def test_no_answer_to_a_post_rejects_or_gives_back_a_refund_of_which_an_earlier_attempt_is_unresolved() -> (
    None
):
    ends: dict[bool, set[Status]] = {True: set(), False: set()}
    for error, history in product(ERRORS, HISTORIES):
        steps = steps_of(
            Case(Status.SENDING, None, judge_error(error, REFUND, history), history, current=True)
        )
        assert steps, error
        ends[history.unresolved].add(steps[-1])
    assert ends[True] == {Status.UNKNOWN, Status.REVIEW}
    assert ends[False] == {Status.UNKNOWN, Status.REVIEW, Status.REJECTED, Status.RELEASED}


@pytest.mark.parametrize(
    ("here", "older"),
    [
        (Status.SETTLED, Status.ACCEPTED),
        (Status.RETURNED, Status.ACCEPTED),
        (Status.RETURNED, Status.SETTLED),
        (Status.REVERSED, Status.ACCEPTED),
    ],
)
def test_an_older_word_about_the_same_refund_id_changes_nothing(here: Status, older: Status) -> None:
    # A list may lag behind what another answer told before.
    assert Case(here, OURS, sighting(older), History(), current=False).decide() is None


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (Status.SETTLED, Status.REVERSED),
        (Status.REVERSED, Status.SETTLED),
        (Status.REVERSED, Status.RETURNED),
        (Status.RETURNED, Status.REVERSED),
        (Status.SETTLED, Status.REJECTED),
        (Status.RETURNED, Status.REJECTED),
        (Status.REVERSED, Status.REJECTED),
        (Status.REJECTED, Status.ACCEPTED),
        (Status.REJECTED, Status.SETTLED),
        (Status.CANCELLED, Status.ACCEPTED),
    ],
)
def test_a_word_that_can_be_neither_older_nor_newer_is_a_contradiction(here: Status, said: Status) -> None:
    # Reversed means that it left the open batch before it moved any money; settled and returned mean that money moved. And rejected
    # lets people reissue: an object that says otherwise would be a second payment that nobody hears of.
    stored_id = None if here is Status.CANCELLED else OURS
    change = Case(here, stored_id, sighting(said), History(), current=False).decide()
    assert change is not None
    assert (change.steps, change.pause, change.sighting) == (
        (Status.REVIEW,),
        EVERYTHING,
        sighting(said).sighting,
    )
    assert change.contradiction == f"Payroc says {said} of a refund that is {here} here."


@pytest.mark.parametrize("status", NEVER_SENT)
@pytest.mark.parametrize("said", [*sorted(PAID), Status.REJECTED])
def test_an_object_of_a_refund_that_was_never_sent_is_taken_over_and_pauses_everything(
    status: Status, said: Status
) -> None:
    change = Case(status, None, sighting(said), History(), current=False).decide()
    assert change is not None
    assert (change.steps[-1], change.pause, change.sighting) == (said, EVERYTHING, sighting(said).sighting)
    assert (change.recovered, change.contradiction) == (True, None)
    assert change.pause_reason is not None
    assert change.pause_reason.endswith("Run `python -m include.refunds restored` before you resume.")


@pytest.mark.parametrize("status", NEVER_SENT)
def test_an_object_that_differs_from_a_refund_that_was_never_sent_ends_in_review_and_pauses_everything(
    status: Status,
) -> None:
    change = Case(status, None, sighting(Status.REVIEW), History(), current=False).decide()
    assert change is not None
    assert (change.steps[-1], change.pause) == (Status.REVIEW, EVERYTHING)
    assert (change.recovered, bool(change.contradiction)) == (False, True)


@pytest.mark.parametrize("said", [*sorted(PAID), Status.REJECTED, Status.REVIEW])
def test_an_object_of_a_refund_that_is_claimed_and_has_passed_no_last_check_pauses_everything(
    said: Status,
) -> None:
    claimed = replace(REFUND, status=Status.SENDING, first_sent_at=None)
    change = decide(
        claimed,
        sighting(said),
        History(),
        current=False,
        foreign_id=False,
        now=NOW,
        unknown_wait=UNKNOWN_WAIT,
    )
    assert change is not None
    assert set(pairwise((Status.SENDING, *change.steps))) <= EDGES
    assert (change.steps[-1], change.pause) == (said, EVERYTHING)
    assert change.recovered is (said is not Status.REVIEW)


@pytest.mark.parametrize(
    ("here", "said", "steps"),
    [
        (Status.SENDING, Status.ACCEPTED, (Status.ACCEPTED,)),
        (Status.SENDING, Status.SETTLED, (Status.SETTLED,)),
        (Status.SENDING, Status.RETURNED, (Status.ACCEPTED, Status.RETURNED)),
        (Status.SENDING, Status.REVERSED, (Status.ACCEPTED, Status.REVERSED)),
        (Status.SENDING, Status.REJECTED, (Status.REJECTED,)),
        (Status.SENDING, Status.REVIEW, (Status.REVIEW,)),
        (Status.UNKNOWN, Status.RETURNED, (Status.RETURNED,)),
        (Status.ACCEPTED, Status.SETTLED, (Status.SETTLED,)),
        (Status.ACCEPTED, Status.REJECTED, (Status.REJECTED,)),
        (Status.SETTLED, Status.RETURNED, (Status.RETURNED,)),
    ],
)
def test_a_newer_word_leads_on(here: Status, said: Status, steps: tuple[Status, ...]) -> None:
    stored_id = OURS if here in PAID else None
    change = Case(here, stored_id, sighting(said), History(), current=False).decide()
    assert change is not None
    assert (change.steps, change.sighting, change.contradiction, change.pause) == (
        steps,
        sighting(said).sighting,
        None,
        None,
    )


def test_the_same_word_again_moves_nothing() -> None:
    for status in WORD_OF:
        change = Case(status, OURS, sighting(status), History(), current=False).decide()
        assert change == Change(sighting=sighting(status).sighting)


@given(
    retry_after=st.floats(min_value=0, max_value=1e9),
    unknown_wait=st.timedeltas(min_value=timedelta(seconds=1), max_value=A_DAY),
    history=st.sampled_from(HISTORIES),
)
def test_an_unknown_refund_waits_as_long_as_payroc_asks_but_not_less_than_the_setting_nor_more_than_a_day(
    retry_after: float, unknown_wait: timedelta, history: History
) -> None:
    verdict = Verdict(Outcome.UNKNOWN, "No answer.", retry_after=retry_after)
    change = Case(Status.SENDING, None, verdict, history, current=True).decide(unknown_wait)
    assert change is not None
    assert change.steps == (Status.UNKNOWN,)
    assert change.wait_until is not None
    assert unknown_wait <= change.wait_until - NOW <= A_DAY
    assert change.wait_until - NOW >= min(timedelta(seconds=retry_after), A_DAY)


def test_whatever_ends_unknown_has_a_wait_and_nothing_else_has_one() -> None:
    for case in cases():
        change = case.decide()
        if change is not None:
            waits = change.wait_until is not None
            assert waits == (change.steps[-1:] == (Status.UNKNOWN,)), case
            assert not waits or change.wait_until >= NOW + UNKNOWN_WAIT, case


def test_a_refund_is_given_back_only_when_neither_this_attempt_nor_an_earlier_one_can_have_been_processed() -> (
    None
):
    given_back = 0
    for case in cases():
        change = case.decide()
        back = change is not None and Status.RELEASED in change.steps
        proven = case.verdict.outcome is Outcome.NOT_SENT or case.verdict.not_processed
        assert back == (
            case.current and proven and not case.history.unresolved and not case.history.processed
        ), case
        # The key window begins with the first POST that may have been processed.
        assert back == (change is not None and change.never_sent), case
        given_back += back
    assert given_back


def test_a_configuration_error_pauses_its_scope_wherever_the_refund_goes() -> None:
    for case in cases():
        if case.current and case.verdict.outcome is Outcome.CONFIGURATION:
            change = case.decide()
            assert change is not None
            assert change.pause == case.verdict.pause
            assert change.steps in ((Status.RELEASED,), (Status.UNKNOWN,))
