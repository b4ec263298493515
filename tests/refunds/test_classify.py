"""What an answer of Payroc proves: one row for each rule of the design's section 4, and what no reason may hold."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from typing import Any
from uuid import UUID

import pytest

from include.payroc import models
from include.payroc.errors import PayrocError, PayrocNoAnswer, PayrocProblem, PayrocUnexpectedAnswer
from include.refunds.classify import Outcome, Sighting, judge_error, judge_look_up, judge_object
from include.refunds.refund import History, Refund
from include.refunds.states import Status
from tests.refunds.conftest import World

TERMINAL = "7701001"
KEY = UUID("8e03978e-40d5-43e8-bc93-6894a57f9324")
ACCOUNT, PAYEE = "55667000001234", "Sarah Hopper"
AN_INSTANT = datetime(2026, 11, 20, 9, tzinfo=UTC)

REFUND = Refund(
    id=1,
    source_ref="ref-1",
    processing_terminal_id=TERMINAL,
    order_id="OrderRef6543",
    amount=4999,
    currency="USD",
    payee_last4="1234",
    approved_at=AN_INSTANT,
    idempotency_key=KEY,
    request=b"sealed",
    request_sha256="hash",
    request_key=None,
    sent_with="hash of URL and key",
    status=Status.SENDING,
    reason=None,
    released_at=AN_INSTANT,
    attempts=1,
    first_sent_at=AN_INSTANT,
    lease_until=AN_INSTANT,
    next_attempt_at=AN_INSTANT,
    payroc_refund_id=None,
    payroc_status=None,
    replaces=None,
    created_at=AN_INSTANT,
    updated_at=AN_INSTANT,
)

NOTHING_BEFORE = History()
UNRESOLVED = History(unresolved=True)
KEY_WAS_IN_USE = History(unresolved=True, key_in_use=True)
UNAUTHORIZED_BEFORE = History(unresolved=True, unauthorized_at=AN_INSTANT)

OUR_KEY = (("refundKey", str(KEY)),)


def found(
    refund_id: str = "CD3HN88U9F",
    *,
    word: str = "ready",
    code: str = "A",
    authorized: int | None = -4999,
    order_id: str = "OrderRef6543",
    amount: int = 4999,
    currency: str = "USD",
    terminal: str = TERMINAL,
    account: str | None = "**********1234",
    fields: tuple[tuple[str, str], ...] | None = OUR_KEY,
) -> models.Refund:
    """Return a refund object of Payroc's; without changes it matches REFUND."""
    body: dict[str, Any] = {
        "refundId": refund_id,
        "processingTerminalId": terminal,
        "order": {"orderId": order_id, "amount": amount, "currency": currency},
        "transactionResult": {
            "type": "unreferencedRefund",
            "status": word,
            "responseCode": code,
            "authorizedAmount": authorized,
        },
        "customFields": None
        if fields is None
        else [{"name": name, "value": value} for name, value in fields],
    }
    if account is not None:
        body["bankAccount"] = {"type": "ach", "nameOnAccount": PAYEE, "accountNumber": account}
    return models.Refund.model_validate(body, strict=False)


@pytest.mark.parametrize(
    ("word", "code", "outcome", "status"),
    [
        ("ready", "A", Outcome.ACCEPTED, Status.ACCEPTED),
        ("pending", "A", Outcome.ACCEPTED, Status.ACCEPTED),
        ("complete", "A", Outcome.ACCEPTED, Status.SETTLED),
        ("returned", "A", Outcome.ACCEPTED, Status.RETURNED),
        ("reversal", "A", Outcome.ACCEPTED, Status.REVERSED),
        ("declined", "D", Outcome.REJECTED, Status.REJECTED),
        ("declined", "A", Outcome.REJECTED, Status.REJECTED),
        ("ready", "D", Outcome.REJECTED, Status.REJECTED),
        ("pending", "D", Outcome.REJECTED, Status.REJECTED),
        ("admin", "A", Outcome.REVIEW, Status.REVIEW),
        ("somethingNew", "A", Outcome.REVIEW, Status.REVIEW),
        # Payroc's words are lower case; what merely resembles one is not known.
        ("Ready", "A", Outcome.REVIEW, Status.REVIEW),
    ],
)
def test_payrocs_word_decides_and_the_refund_id_is_kept(
    word: str, code: str, outcome: Outcome, status: Status
) -> None:
    verdict = judge_object(found(word=word, code=code), REFUND, http_status=201)
    # Whatever the word says beside it, a response code of decline is kept as that word: the ledger has no other place for it.
    kept = "declined" if code == "D" else word
    assert (verdict.outcome, verdict.sighting) == (outcome, Sighting("CD3HN88U9F", kept, status))
    assert (verdict.http_status, verdict.pause, verdict.look_up_first, verdict.contradiction) == (
        201,
        None,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"order_id": "OrderRef6544"}, "order id"),
        ({"amount": 49990}, "amount"),
        ({"currency": "CAD"}, "currency"),
        ({"terminal": "7701002"}, "terminal"),
        ({"account": "**********1235"}, "last four digits"),
        # Negative is the sign of a refund; a positive one would have taken the money from the payee.
        ({"authorized": 4999}, "authorized amount"),
        ({"authorized": -4000}, "authorized amount"),
        ({"authorized": 0}, "authorized amount"),
    ],
)
@pytest.mark.parametrize("word", ["ready", "complete"])
def test_an_answer_that_differs_from_the_request_goes_to_review_with_its_refund_id(
    word: str, changes: dict[str, Any], named: str
) -> None:
    verdict = judge_object(found(word=word, **changes), REFUND, http_status=201)
    assert (verdict.outcome, verdict.sighting) == (
        Outcome.REVIEW,
        Sighting("CD3HN88U9F", word, Status.REVIEW),
    )
    assert verdict.reason == (
        f"Payroc's refund CD3HN88U9F differs from the request in {named}. "
        "Another shop with the same PAYROC_REFUNDS_SOURCE at this Payroc account may have sent it."
    )


def test_only_an_object_with_our_key_may_be_of_another_shop_with_our_sources_name() -> None:
    verdict = judge_object(found(amount=1, fields=None), REFUND, http_status=201)
    assert verdict.reason == "Payroc's refund CD3HN88U9F differs from the request in amount."


@pytest.mark.parametrize("status", [400, 409])
def test_a_key_that_is_in_use_may_be_another_shops_with_our_sources_name(status: int) -> None:
    verdict = judge_error(problem(status, "idempotency-key-in-use"), REFUND, NOTHING_BEFORE)
    assert "another request. Another shop with the same PAYROC_REFUNDS_SOURCE" in verdict.reason


@pytest.mark.parametrize(
    ("changes", "last4"),
    [
        ({"account": None}, "1234"),
        ({"account": "**************"}, "1234"),
        ({"account": "1234"}, "1234"),
        # A payee that a token stands for has digits that we do not know.
        ({}, None),
        ({"authorized": None}, "1234"),
    ],
)
def test_what_is_not_told_or_not_known_is_no_difference(changes: dict[str, Any], last4: str | None) -> None:
    assert judge_object(found(**changes), replace(REFUND, payee_last4=last4)).outcome is Outcome.ACCEPTED


def test_a_declined_object_authorizes_nothing_and_is_rejected_all_the_same() -> None:
    assert judge_object(found(word="declined", code="D", authorized=0), REFUND).outcome is Outcome.REJECTED


def test_all_that_differs_is_named() -> None:
    verdict = judge_object(found(amount=1, currency="CAD", authorized=-1), REFUND)
    assert "in amount, currency, authorized amount." in verdict.reason


def problem(status: int, fragment: str | None, **more: Any) -> PayrocProblem:
    return PayrocProblem(
        "create refund", fragment or "a problem", http_status=status, problem_type=fragment, **more
    )


def strange(
    status: int | None, detail: str = "an error that is not in Payroc's problem format"
) -> PayrocUnexpectedAnswer:
    return PayrocUnexpectedAnswer("create refund", detail, http_status=status)


NO_ANSWER = PayrocNoAnswer("create refund", "no answer within 30 s")
ABOUT_TERMINAL = {"parameters": ("processingTerminalId",)}

# What a verdict asks for: outcome, pause, not_processed, look_up_first.
UNKNOWN = (Outcome.UNKNOWN, None, False, False)
REJECTED = (Outcome.REJECTED, None, False, False)
LOOK_UP_ELSE_REVIEW = (Outcome.REVIEW, None, False, True)
STOP_TERMINAL = (Outcome.CONFIGURATION, TERMINAL, True, False)
STOP_ALL = (Outcome.CONFIGURATION, "*", True, False)
STOP_ALL_AND_DOUBT = (Outcome.CONFIGURATION, "*", False, False)


@pytest.mark.parametrize(
    ("error", "history", "expected"),
    [
        (NO_ANSWER, NOTHING_BEFORE, UNKNOWN),
        (NO_ANSWER, UNAUTHORIZED_BEFORE, UNKNOWN),
        (strange(201, "an empty body"), NOTHING_BEFORE, UNKNOWN),
        (strange(200, "the body is not what this operation returns"), NOTHING_BEFORE, UNKNOWN),
        (strange(204), NOTHING_BEFORE, UNKNOWN),
        (strange(None), NOTHING_BEFORE, UNKNOWN),
        (strange(503), NOTHING_BEFORE, UNKNOWN),
        (strange(429), NOTHING_BEFORE, UNKNOWN),
        (strange(302, "a redirect, which is not followed"), NOTHING_BEFORE, STOP_ALL_AND_DOUBT),
        (strange(307, "a redirect, which is not followed"), UNRESOLVED, STOP_ALL_AND_DOUBT),
        (strange(400), NOTHING_BEFORE, STOP_ALL_AND_DOUBT),
        (strange(403), NOTHING_BEFORE, STOP_ALL_AND_DOUBT),
        (strange(404), UNRESOLVED, STOP_ALL_AND_DOUBT),
        (problem(400, None), NOTHING_BEFORE, STOP_ALL_AND_DOUBT),
        (problem(401, "not-authorized"), NOTHING_BEFORE, UNKNOWN),
        (problem(401, "not-authorized"), UNRESOLVED, UNKNOWN),
        (problem(401, "not-authorized"), UNAUTHORIZED_BEFORE, STOP_ALL),
        (problem(401, "never-heard-of"), NOTHING_BEFORE, UNKNOWN),
        (strange(401), NOTHING_BEFORE, UNKNOWN),
        (strange(401), UNAUTHORIZED_BEFORE, STOP_ALL_AND_DOUBT),
        (problem(400, "bad-request"), NOTHING_BEFORE, REJECTED),
        (problem(400, "bad-request"), UNRESOLVED, LOOK_UP_ELSE_REVIEW),
        (problem(400, "bad-request", parameters=("refundMethod.accountNumber",)), NOTHING_BEFORE, REJECTED),
        (problem(400, "bad-request", **ABOUT_TERMINAL), NOTHING_BEFORE, STOP_TERMINAL),
        (problem(400, "bad-request", **ABOUT_TERMINAL), UNRESOLVED, STOP_TERMINAL),
        (
            problem(400, "bad-request", parameters=("order.amount", "body.processingTerminalId")),
            NOTHING_BEFORE,
            STOP_TERMINAL,
        ),
        (problem(400, "never-heard-of"), NOTHING_BEFORE, REJECTED),
        (problem(400, "never-heard-of"), UNRESOLVED, LOOK_UP_ELSE_REVIEW),
        (problem(400, "never-heard-of", **ABOUT_TERMINAL), NOTHING_BEFORE, STOP_TERMINAL),
        # A request of ours has the header; what takes it off stands between us and Payroc and does so to every refund.
        (problem(400, "idempotency-key-missing"), NOTHING_BEFORE, STOP_ALL),
        (problem(400, "capabilities-missing"), NOTHING_BEFORE, STOP_TERMINAL),
        (problem(400, "capabilities-missing", **ABOUT_TERMINAL), UNRESOLVED, STOP_TERMINAL),
        (problem(403, "forbidden"), NOTHING_BEFORE, STOP_ALL),
        (problem(403, "forbidden", resource="bankTransferRefund"), NOTHING_BEFORE, STOP_TERMINAL),
        (problem(403, "forbidden", resource="bankTransferRefund"), UNRESOLVED, STOP_TERMINAL),
        (problem(404, "not-found"), NOTHING_BEFORE, STOP_ALL),
        # A 403 speaks of the terminal by its resource; that of a 404 is what was not found.
        (problem(404, "not-found", resource="bankTransferRefund"), NOTHING_BEFORE, STOP_ALL),
        (problem(406, "not-acceptable"), NOTHING_BEFORE, STOP_ALL),
        (problem(409, "cannot-be-modified"), NOTHING_BEFORE, STOP_ALL),
        (problem(409, "never-heard-of"), UNRESOLVED, STOP_ALL),
        (problem(404, "not-found", resource="processingTerminal"), NOTHING_BEFORE, STOP_TERMINAL),
        (problem(413, "payload-too-large"), NOTHING_BEFORE, LOOK_UP_ELSE_REVIEW),
        (problem(413, "payload-too-large"), UNRESOLVED, LOOK_UP_ELSE_REVIEW),
        (strange(413), NOTHING_BEFORE, STOP_ALL_AND_DOUBT),
        (problem(415, "unsupported-media-type"), NOTHING_BEFORE, STOP_ALL),
        (problem(422, "never-heard-of"), NOTHING_BEFORE, LOOK_UP_ELSE_REVIEW),
        (problem(422, "never-heard-of"), UNRESOLVED, LOOK_UP_ELSE_REVIEW),
        (problem(409, "idempotency-key-in-use"), NOTHING_BEFORE, LOOK_UP_ELSE_REVIEW),
        (problem(409, "idempotency-key-in-use"), UNRESOLVED, UNKNOWN),
        (problem(409, "idempotency-key-in-use"), KEY_WAS_IN_USE, LOOK_UP_ELSE_REVIEW),
        (problem(400, "idempotency-key-in-use"), NOTHING_BEFORE, LOOK_UP_ELSE_REVIEW),
        (problem(400, "idempotency-key-in-use"), UNRESOLVED, UNKNOWN),
        (problem(400, "idempotency-key-in-use"), KEY_WAS_IN_USE, LOOK_UP_ELSE_REVIEW),
        (problem(409, "resource-already-exists"), NOTHING_BEFORE, LOOK_UP_ELSE_REVIEW),
        (problem(409, "resource-already-exists"), UNRESOLVED, LOOK_UP_ELSE_REVIEW),
        (problem(500, "api-error"), NOTHING_BEFORE, UNKNOWN),
    ],
    ids=lambda value: (
        f"{type(value).__name__}-{value.http_status}-{value.problem_type}"
        if isinstance(value, PayrocError)
        else None
    ),
)
def test_a_failed_post_is_judged_by_its_type_then_its_status_then_what_was_before(
    error: PayrocError, history: History, expected: tuple[Outcome, str | None, bool, bool]
) -> None:
    verdict = judge_error(error, REFUND, history)
    assert (verdict.outcome, verdict.pause, verdict.not_processed, verdict.look_up_first) == expected
    assert (verdict.http_status, verdict.problem_type, verdict.sighting) == (
        error.http_status,
        error.problem_type,
        None,
    )
    assert verdict.contradiction is False


DECIDED_BY_TYPE = {
    "idempotency-key-in-use": LOOK_UP_ELSE_REVIEW,
    "resource-already-exists": LOOK_UP_ELSE_REVIEW,
    "capabilities-missing": STOP_TERMINAL,
}
DECIDED_BY_STATUS = (
    "bad-request",
    "forbidden",
    "not-found",
    "not-acceptable",
    "cannot-be-modified",
    "payload-too-large",
    "unsupported-media-type",
    "api-error",
    "insufficient-funds",
    "never-heard-of",
)
TYPES = (*DECIDED_BY_TYPE, *DECIDED_BY_STATUS, "not-authorized", "idempotency-key-missing")
OTHER_4XX = (402, 403, 404, 405, 406, 409, 410, 411, 413, 415, 421, 422, 431, 451)


def verdicts(
    types: Any, statuses: Any, history: History = NOTHING_BEFORE
) -> set[tuple[Outcome, str | None, bool, bool]]:
    judged = (
        judge_error(problem(status, fragment), REFUND, history)
        for status, fragment in product(statuses, types)
    )
    return {
        (verdict.outcome, verdict.pause, verdict.not_processed, verdict.look_up_first) for verdict in judged
    }


@pytest.mark.parametrize("history", [NOTHING_BEFORE, UNRESOLVED, KEY_WAS_IN_USE, UNAUTHORIZED_BEFORE])
def test_a_408_a_429_and_a_5xx_prove_nothing_whatever_their_type_says(history: History) -> None:
    assert verdicts(TYPES, (408, 429, *range(500, 600)), history) == {UNKNOWN}


@pytest.mark.parametrize("fragment", DECIDED_BY_TYPE)
def test_a_type_that_decides_does_so_under_every_status(fragment: str) -> None:
    assert verdicts([fragment], (400, *OTHER_4XX)) == {DECIDED_BY_TYPE[fragment]}


def test_any_other_type_is_a_refusal_under_400_and_else_about_the_configuration() -> None:
    assert verdicts(DECIDED_BY_STATUS, [400]) == {REJECTED}
    others = set(OTHER_4XX) - {413, 422}
    assert verdicts(DECIDED_BY_STATUS, others) == {STOP_ALL}
    # Payroc documents neither for refunds, and both are about what was sent.
    assert verdicts(DECIDED_BY_STATUS, (413, 422)) == {LOOK_UP_ELSE_REVIEW}


def test_nothing_is_a_definitive_refusal_while_an_earlier_attempt_is_unresolved() -> None:
    for history in (UNRESOLVED, KEY_WAS_IN_USE, UNAUTHORIZED_BEFORE):
        assert Outcome.REJECTED not in {outcome for outcome, *_ in verdicts(TYPES, range(300, 600), history)}


def test_the_wait_that_payroc_asks_for_is_handed_on() -> None:
    assert (
        judge_error(problem(429, "api-error", retry_after=600.0), REFUND, NOTHING_BEFORE).retry_after == 600.0
    )
    assert judge_error(NO_ANSWER, REFUND, NOTHING_BEFORE).retry_after == 0.0


# -- look-up -----------------------------------------------------------------------------------------------------

OTHER_KEY = (("refundKey", "11111111-1111-4111-8111-111111111111"),)
NO_KEY = (("who", "somebody in the portal"),)


@pytest.mark.parametrize(
    ("listed", "outcome", "refund_id"),
    [
        ([found()], Outcome.ACCEPTED, "CD3HN88U9F"),
        ([found(word="complete")], Outcome.ACCEPTED, "CD3HN88U9F"),
        ([found(word="declined", code="D")], Outcome.REJECTED, "CD3HN88U9F"),
        ([found(fields=(*NO_KEY, *OUR_KEY))], Outcome.ACCEPTED, "CD3HN88U9F"),
        # With our key it is ours, and what differs is for people.
        ([found(amount=1)], Outcome.REVIEW, "CD3HN88U9F"),
        ([found(fields=None)], Outcome.ACCEPTED, "CD3HN88U9F"),
        ([found(fields=())], Outcome.ACCEPTED, "CD3HN88U9F"),
        ([found(fields=None, account=None)], Outcome.ACCEPTED, "CD3HN88U9F"),
        ([found("OTHER00001", fields=OTHER_KEY), found()], Outcome.ACCEPTED, "CD3HN88U9F"),
        ([found("OTHER00001", order_id="OrderRef9999"), found()], Outcome.ACCEPTED, "CD3HN88U9F"),
        # A list may repeat an object across its pages.
        ([found(), found()], Outcome.ACCEPTED, "CD3HN88U9F"),
    ],
)
def test_a_look_up_adopts_what_carries_our_key_or_carries_nothing_and_equals_the_request(
    listed: list[models.Refund], outcome: Outcome, refund_id: str
) -> None:
    verdict = judge_look_up(listed, REFUND)
    assert verdict is not None
    assert verdict.sighting is not None
    assert (verdict.outcome, verdict.sighting.payroc_refund_id, verdict.contradiction) == (
        outcome,
        refund_id,
        False,
    )


@pytest.mark.parametrize(
    "stranger",
    [
        found("OTHER00001", fields=NO_KEY),
        found("OTHER00001", fields=OTHER_KEY),
        found("OTHER00001", fields=(("refundkey", str(KEY)),)),
        found("OTHER00001", fields=None, amount=5000, authorized=-5000),
        found("OTHER00001", fields=None, currency="CAD"),
        found("OTHER00001", fields=None, account="**********9999"),
        found("OTHER00001", fields=None, terminal="7701002"),
    ],
)
def test_another_refund_with_our_order_id_is_for_people_and_never_adopted(stranger: models.Refund) -> None:
    verdict = judge_look_up([stranger], REFUND)
    assert verdict is not None
    assert (verdict.outcome, verdict.sighting, verdict.contradiction) == (Outcome.REVIEW, None, False)
    assert "another refund with our order id: OTHER00001" in verdict.reason


@pytest.mark.parametrize(
    "listed", [[], [found(order_id="OrderRef9999")], [found(order_id="OrderRef9999", fields=None)]]
)
def test_a_look_up_that_finds_nothing_under_our_order_id_proves_nothing(listed: list[models.Refund]) -> None:
    assert judge_look_up(listed, REFUND) is None


@pytest.mark.parametrize(
    "second",
    [found("SECOND0001"), found("SECOND0001", word="declined", code="D"), found("SECOND0001", amount=1)],
)
def test_two_refunds_with_our_key_are_a_contradiction_that_names_both(second: models.Refund) -> None:
    for listed in ([found(), second], [second, found(), second]):
        verdict = judge_look_up(listed, REFUND)
        assert verdict is not None
        assert (verdict.outcome, verdict.sighting, verdict.contradiction) == (Outcome.REVIEW, None, True)
        assert (
            verdict.reason
            == "Payroc holds more than one refund of ours for this order: CD3HN88U9F, SECOND0001."
        )


# -- what a reason may hold --------------------------------------------------------------------------------------

FREE_TEXT = f"account {ACCOUNT} of {PAYEE} is closed"


def tells(text: str) -> list[str]:
    """Return what of the payee or of the server's free text stands in a text."""
    return [secret for secret in (ACCOUNT, PAYEE, "is closed") if secret in text]


@pytest.mark.parametrize("history", [NOTHING_BEFORE, UNRESOLVED, KEY_WAS_IN_USE, UNAUTHORIZED_BEFORE])
def test_no_reason_holds_the_instance_or_the_resource_of_a_problem(history: History) -> None:
    for status, fragment in product((400, 401, 403, 404, 409, 429, 500), TYPES):
        error = problem(status, fragment, instance=f"https://api.payroc.com/{ACCOUNT}", resource=FREE_TEXT)
        assert tells(judge_error(error, REFUND, history).reason) == []


@pytest.mark.parametrize(
    "word",
    [
        "",
        FREE_TEXT,
        ACCOUNT,
        f"admin {ACCOUNT}",
        "admin1234",
        "a" * 31,
        "ädmin",
        "admin\n",
        "<b>admin</b>",
        "\u202enimda",
    ],
)
def test_a_status_that_is_not_a_plain_word_is_for_people_and_not_quoted(word: str) -> None:
    for changes in ({}, {"amount": 1}):
        verdict = judge_object(found(word=word, **changes), REFUND)
        assert (verdict.outcome, verdict.sighting) == (
            Outcome.REVIEW,
            Sighting("CD3HN88U9F", "?", Status.REVIEW),
        )
        assert word == "" or word not in verdict.reason


def test_no_reason_shows_the_digits_in_which_accounts_differ() -> None:
    for changes in (
        {"account": ACCOUNT},
        {"account": ACCOUNT, "amount": 1},
        {"account": ACCOUNT, "fields": None},
    ):
        refund = replace(REFUND, payee_last4="7777")
        listed = judge_look_up([found(**changes)], refund)
        assert listed is not None
        for reason in (judge_object(found(**changes), refund).reason, listed.reason):
            assert tells(reason) == []
            assert "1234" not in reason
            assert "7777" not in reason


def kept_of(world: World, fragment: str, status: int, parameter: str) -> str:
    """Return all that the ledger keeps of a problem, and what its task says."""
    refund_id = world.released("1234", account_number=ACCOUNT, name_on_account=PAYEE)
    world.fault(
        refund_id, "problem", problem=fragment, status=status, parameter=parameter, resource=FREE_TEXT
    )
    result = world.send(refund_id)
    assert world.attempts(refund_id) not in ([], ["accepted"])
    kept = [
        *world.rows("SELECT reason FROM refund_ledger.refunds"),
        *world.rows("SELECT reason, detail FROM refund_ledger.refund_events"),
    ]
    kept += world.rows("SELECT problem_type, outcome FROM refund_ledger.refund_attempts")
    kept += world.rows("SELECT reason FROM refund_ledger.pauses")
    for scope in world.paused():
        world.run(world.ledger.pauses.resume(scope, "for the next one"))
    return f"{result.reason} {kept}"


def test_what_a_problem_says_of_the_payee_is_not_kept(world: World) -> None:
    for fragment, status, parameter in (
        ("bad-request", 400, ACCOUNT),
        ("bad-request", 400, f"refundMethod.accountNumber={ACCOUNT}"),
        ("bad-request", 400, f"refundMethod.{ACCOUNT}.processingTerminalId"),
        ("bad-request", 400, FREE_TEXT),
        ("capabilities-missing", 400, f"{ACCOUNT}.processingTerminalId"),
        ("forbidden", 403, FREE_TEXT),
        (FREE_TEXT, 400, "order.amount"),
    ):
        assert tells(kept_of(world, fragment, status, parameter)) == [], (fragment, parameter)


def test_an_account_number_that_stands_in_the_type_of_a_problem_is_not_kept(world: World) -> None:
    assert tells(kept_of(world, f"account-{ACCOUNT}", 400, "order.amount")) == []
