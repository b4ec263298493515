"""Sending one refund: the real ledger in Postgres, the local Payroc over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from include.payroc.models import RefundRequest
from include.refunds.ledger import LedgerError, Task
from include.refunds.send import Sent, send_refunds
from payroc_airflow.hooks.payroc import PayrocHook
from tests.refunds.conftest import Death, Intercepted, World, die


def test_an_accepted_refund_is_paid_once_and_carries_payrocs_id(world: World) -> None:
    refund_id = world.released()
    assert world.send(refund_id).sent is Sent.ACCEPTED
    row = world.row(refund_id)
    assert (row["status"], row["attempts"], row["payroc_status"]) == ("accepted", 1, "ready")
    assert len(row["payroc_refund_id"]) == 10
    assert world.paid(refund_id) == 1


def test_sending_a_finished_refund_again_sends_nothing(world: World) -> None:
    refund_id = world.released()
    world.send(refund_id)
    assert world.send(refund_id).sent is Sent.ACCEPTED
    assert world.row(refund_id)["attempts"] == 1


@pytest.mark.parametrize(
    ("ending", "status", "paid", "reason"),
    [
        ("9001", "rejected", 1, "Declined by the bank."),
        ("9002", "rejected", 0, "Refused by Payroc: bad-request, refundMethod.accountNumber."),
        ("9012", "accepted", 1, "Accepted by Payroc."),
        ("9013", "review", 1, "Payroc's status is 'admin', which people must look at."),
        ("9014", "review", 0, "no refund with our key was found there"),
        ("9021", "review", 1, "differs from the request in amount"),
    ],
)
def test_a_definitive_answer_ends_the_refund_in_one_attempt(
    world: World, ending: str, status: str, paid: int, reason: str
) -> None:
    refund_id = world.released(ending)
    world.send(refund_id)
    row = world.row(refund_id)
    assert (row["status"], row["attempts"]) == (status, 1)
    assert reason in row["reason"]
    assert world.paid(refund_id) == paid
    assert world.paused() == {}


@pytest.mark.parametrize(
    "ending", ["9003", "9004", "9005", "9006", "9008", "9009", "9010", "9011", "9017", "9020"]
)
def test_an_answer_that_proves_nothing_is_unknown_and_the_next_attempt_ends_it_paid_once(
    world: World, ending: str
) -> None:
    refund_id = world.released(ending)
    result = world.send(refund_id)
    assert result.sent is Sent.UNKNOWN
    assert result.retry_after > 80
    assert world.row(refund_id)["status"] == "unknown"
    world.hours_ahead += 0.1
    assert world.send(refund_id).sent is Sent.ACCEPTED
    assert world.row(refund_id)["status"] == "accepted"
    assert world.paid(refund_id) == 1


def test_an_unknown_refund_is_looked_up_but_not_sent_again_before_its_wait_has_ended(world: World) -> None:
    refund_id = world.released("9005")
    world.send(refund_id)
    again = world.send(refund_id)
    assert again.sent is Sent.UNKNOWN
    assert world.row(refund_id)["attempts"] == 1


def test_a_look_up_ends_an_unknown_refund_that_payroc_has_even_before_its_wait_has_ended(
    world: World,
) -> None:
    refund_id = world.released("9006")
    world.send(refund_id)
    assert world.send(refund_id).sent is Sent.ACCEPTED
    assert world.row(refund_id)["attempts"] == 1
    assert world.paid(refund_id) == 1


def test_retry_after_lengthens_the_wait(world: World) -> None:
    refund_id = world.released()
    world.fault(refund_id, "status", status=429, retryAfterSeconds=600)
    assert world.send(refund_id).retry_after > 590


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_worker_that_dies_around_its_post_leaves_a_refund_that_is_paid_once(
    world: World, moment: str
) -> None:
    refund_id = world.released()
    with pytest.raises(Death):
        world.send(refund_id, Intercepted(world.gateway, **{moment: die}))
    assert world.row(refund_id)["status"] == "sending"
    assert world.attempts(refund_id) == [None]
    if moment == "before":
        assert world.send(refund_id).sent is Sent.BUSY
    world.hours_ahead += 2
    assert world.send(refund_id).sent is Sent.ACCEPTED
    assert world.paid(refund_id) == 1


def test_the_lease_outlives_the_token(world: World) -> None:
    refund_id = world.released()
    with pytest.raises(Death):
        world.send(refund_id, Intercepted(world.gateway, before=die))
    row = world.row(refund_id)
    token_seconds = 3600
    assert (
        row["lease_until"] - row["first_sent_at"]
    ).total_seconds() >= token_seconds + world.settings.lease_margin_seconds - 1


def test_two_workers_at_the_same_refund_make_one_post(world: World) -> None:
    refund_id = world.released()

    async def both() -> list[Sent]:
        results = await asyncio.gather(*(world.sending(refund_id) for _ in range(8)))
        return [result.sent for result in results]

    results = world.run(both())
    # A last check that finds its row locked by another one's claim sends nothing, and whoever comes next does.
    assert world.attempts(refund_id)[-1] == "accepted" or Sent.ACCEPTED not in results
    assert set(world.attempts(refund_id)[:-1]) <= {"not_sent"}
    if Sent.ACCEPTED not in results:
        assert world.send(refund_id).sent is Sent.ACCEPTED
    assert (world.posts(refund_id), world.paid(refund_id)) == (1, 1)


def test_a_worker_that_wakes_up_late_still_records_the_payment_that_it_made(world: World) -> None:
    refund_id = world.released()

    async def taken_over() -> None:
        world.fault(refund_id, "status", status=500)
        world.fault(refund_id, "status", "list", status=500)
        world.hours_ahead += 2
        assert (await world.sending(refund_id)).sent is Sent.UNKNOWN

    assert world.send(refund_id, Intercepted(world.gateway, after=taken_over)).sent is Sent.ACCEPTED
    assert world.attempts(refund_id) == ["accepted", "unknown"]
    assert world.row(refund_id)["status"] == "accepted"


def test_a_worker_that_wakes_up_late_records_nothing_weaker_than_a_payment(world: World) -> None:
    refund_id = world.released("9002")

    async def taken_over() -> None:
        with pytest.raises(Death):
            await world.sending(refund_id, Intercepted(world.gateway, before=die))

    async def late() -> None:
        world.hours_ahead += 2
        await taken_over()

    world.send(refund_id, Intercepted(world.gateway, before=late))
    assert world.row(refund_id)["status"] == "sending"
    assert world.attempts(refund_id) == ["rejected", None]


def test_a_refusal_after_an_unknown_attempt_goes_to_review_and_not_to_rejected(world: World) -> None:
    refund_id = world.released("9004")
    world.send(refund_id)
    world.fault(refund_id, "problem", problem="bad-request")
    world.hours_ahead += 0.1
    assert world.send(refund_id).sent is Sent.REVIEW
    assert "after an attempt whose outcome is not known" in world.row(refund_id)["reason"]


def test_past_the_key_window_a_refund_is_looked_up_and_goes_to_review_when_payroc_does_not_list_it(
    world: World,
) -> None:
    refund_id = world.released("9005")
    world.send(refund_id)
    world.hours_ahead += 24 * 7
    assert world.send(refund_id).sent is Sent.REVIEW
    assert world.row(refund_id)["attempts"] == 1
    assert world.paid(refund_id) == 0


def test_past_the_key_window_a_refund_that_payroc_lists_is_accepted(world: World) -> None:
    refund_id = world.released("9006")
    world.send(refund_id)
    world.hours_ahead += 24 * 7
    assert world.send(refund_id).sent is Sent.ACCEPTED
    assert world.row(refund_id)["attempts"] == 1


def test_with_another_api_key_than_the_first_attempts_nothing_is_sent(world: World) -> None:
    refund_id = world.released("9005")
    world.send(refund_id)
    other = Intercepted(world.gateway)
    other.sent_with = "hash of another key"
    world.hours_ahead += 0.1
    assert world.send(refund_id, other).sent is Sent.REVIEW
    assert world.row(refund_id)["attempts"] == 1


@pytest.mark.parametrize("ending", ["9018", "9019"])
def test_a_configuration_error_pauses_the_terminal_and_gives_the_refund_back(
    world: World, ending: str
) -> None:
    refund_id, other_id = world.released(ending), world.released()
    assert world.send(refund_id).sent is Sent.CONFIGURATION
    assert list(world.paused()) == [world.terminal]
    row = world.row(refund_id)
    assert (row["status"], row["first_sent_at"], row["sent_with"]) == ("released", None, None)
    assert world.send(other_id).sent is Sent.CONFIGURATION
    assert world.row(other_id)["attempts"] == 0


def test_a_second_401_with_a_newer_token_is_a_configuration_error_that_pauses_everything(
    world: World,
) -> None:
    refund_id = world.released()
    world.fault(refund_id, "problem", problem="not-authorized", times=2)
    assert world.send(refund_id).sent is Sent.UNKNOWN
    world.hours_ahead += 0.1
    assert world.send(refund_id).sent is Sent.CONFIGURATION
    assert list(world.paused()) == ["*"]


def test_a_pause_that_comes_after_the_claim_still_stops_the_post(world: World) -> None:
    refund_id = world.released("9005")
    world.send(refund_id)
    world.hours_ahead += 0.1

    class PausedDuringLookUp(Intercepted):
        async def list_refunds(self, *args, **kwargs):
            await world.ledger.pauses.pause("*", "stop it")
            async for item in self._gateway.list_refunds(*args, **kwargs):
                yield item

    world.send(refund_id, PausedDuringLookUp(world.gateway, before=die))
    assert world.attempts(refund_id) == ["unknown", "not_sent"]
    assert world.row(refund_id)["status"] == "unknown"


def test_a_second_refund_of_payrocs_for_our_key_is_kept_as_an_event_and_pauses_everything(
    world: World,
) -> None:
    refund_id, other_id = world.released(), world.released()
    world.send(other_id)
    foreign = world.row(other_id)["payroc_refund_id"]

    class AnswersWithAnother(Intercepted):
        async def create_refund(self, token, idempotency_key, body):
            answer = await self._gateway.create_refund(token, idempotency_key, body)
            return answer.model_copy(update={"refund_id": foreign})

    world.send(refund_id, AnswersWithAnother(world.gateway))
    assert world.row(refund_id)["status"] == "review"
    assert list(world.paused()) == ["*"]
    events = world.rows("SELECT reason FROM refund_ledger.refund_events WHERE event = 'contradiction'")
    assert foreign in events[0]["reason"]


def test_another_refund_at_payroc_with_our_order_id_is_never_adopted_and_nothing_is_sent(
    world: World,
) -> None:
    refund_id = world.released()
    # No answer comes, so the next attempt looks it up.
    world.fault(refund_id, "close")
    assert world.send(refund_id).sent is Sent.UNKNOWN
    hook = PayrocHook()
    strange = RefundRequest.model_validate(
        {
            "processing_terminal_id": world.terminal,
            "order": {
                "order_id": world.row(refund_id)["order_id"],
                "description": "by hand",
                "amount": 4999,
                "currency": "USD",
            },
            "refund_method": {
                "type": "secureToken",
                "token": "296753123456",
                "account_type": "checking",
                "sec_code": "ppd",
            },
            "custom_fields": [{"name": "who", "value": "somebody in the portal"}],
        }
    )
    hook.create_refund(strange, idempotency_key=uuid4(), token=hook.get_token())
    world.hours_ahead += 1
    assert world.send(refund_id).sent is Sent.REVIEW
    row = world.row(refund_id)
    assert row["payroc_refund_id"] is None
    assert "another refund with our order id" in row["reason"]
    assert world.paid(refund_id) == 1


def test_a_refund_that_was_not_released_is_refused(world: World) -> None:
    source_ref = world.approve()
    world.pull()
    result = world.send(int(world.row(source_ref)["id"]))
    assert (result.sent, result.reason) == (Sent.NOT_RELEASED, "It is approved, not released.")
    assert world.row(source_ref)["attempts"] == 0


def test_a_release_is_good_for_a_day_only(world: World) -> None:
    refund_id = world.released()
    world.hours_ahead += 24.1
    assert world.send(refund_id).sent is Sent.NOT_RELEASED
    assert world.paid(refund_id) == 0


def test_a_request_that_was_changed_in_the_ledger_is_not_sent(world: World) -> None:
    refund_id, other_id = world.released(), world.released()
    with world.ledger_engine.begin() as connection:
        other = f"SELECT request FROM refund_ledger.frozen_requests WHERE refund_id = {other_id}"
        connection.exec_driver_sql(
            f"UPDATE refund_ledger.frozen_requests SET request = ({other}) WHERE refund_id = {refund_id}"
        )
    result = world.send(refund_id)
    assert result.sent is Sent.CONFIGURATION
    assert "does not have the hash" in result.reason
    assert world.row(refund_id)["attempts"] == 0


def test_a_ledger_of_another_payroc_is_refused_before_any_claim(world: World) -> None:
    refund_id = world.released()
    other = Intercepted(world.gateway)
    other.environment = "https://api.payroc.com/v1"
    with pytest.raises(Exception, match="This ledger belongs to Payroc at"):
        world.send(refund_id, other)
    assert world.row(refund_id)["attempts"] == 0


def test_the_same_bytes_are_sent_in_every_attempt(world: World) -> None:
    refund_id = world.released("9005")
    bodies = []

    class Listening(Intercepted):
        async def create_refund(self, token, idempotency_key, body):
            bodies.append((idempotency_key, body))
            return await self._gateway.create_refund(token, idempotency_key, body)

    world.send(refund_id, Listening(world.gateway))
    world.hours_ahead += 0.1
    world.send(refund_id, Listening(world.gateway))
    assert len(bodies) == 2
    assert bodies[0] == bodies[1]


def test_a_refund_in_doubt_is_not_looked_up_at_another_payroc(world: World) -> None:
    refund_id = world.released("9005")
    world.send(refund_id)

    class AnotherPayroc(Intercepted):
        async def list_refunds(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("asked another Payroc")
            yield

    other = AnotherPayroc(world.gateway)
    other.environment = "https://api.payroc.com/v1"
    world.hours_ahead += 0.1
    with pytest.raises(LedgerError, match="This ledger belongs to Payroc at"):
        world.send(refund_id, other)
    assert world.row(refund_id)["status"] == "unknown"


def test_a_refused_token_is_forgotten_so_that_the_next_look_up_takes_a_new_one(world: World) -> None:
    refund_id = world.released("9006")
    world.send(refund_id)
    world.sandbox.post("/_sandbox/tokens/revoke")
    assert world.send(refund_id).sent is Sent.BUSY
    assert world.send(refund_id).sent is Sent.ACCEPTED


def test_a_word_of_payrocs_that_the_ledger_can_not_hold_does_not_keep_the_payment_from_being_recorded(
    world: World,
) -> None:
    refund_id = world.released()

    class Odd(Intercepted):
        async def create_refund(self, token: Any, idempotency_key: str, body: bytes) -> Any:
            answer = await self._gateway.create_refund(token, idempotency_key, body)
            result = answer.transaction_result.model_copy(update={"status": "rea\x00dy"})
            return answer.model_copy(update={"transaction_result": result})

    assert world.send(refund_id, Odd(world.gateway)).sent is Sent.REVIEW
    assert (world.row(refund_id)["payroc_status"], len(world.row(refund_id)["payroc_refund_id"])) == ("?", 10)


def test_in_a_list_what_was_not_foreseen_of_one_refund_keeps_no_other_from_being_sent(world: World) -> None:
    first, second = world.released(), world.released()
    order_id = world.row(first)["order_id"]

    class Fails(Intercepted):
        async def create_refund(self, token: Any, idempotency_key: str, body: bytes) -> Any:
            if order_id.encode() in body:
                raise ZeroDivisionError
            return await self._gateway.create_refund(token, idempotency_key, body)

    with pytest.raises(ZeroDivisionError):
        world.run(
            send_refunds(
                [first, second],
                Task("run-1"),
                ledger=world.ledger,
                gateway=Fails(world.gateway),
                cipher=world.cipher,
                settings=world.settings,
            )
        )
    assert [world.row(item)["status"] for item in (first, second)] == ["sending", "accepted"]


def test_a_pause_that_stopped_a_post_is_told_with_its_reason(world: World) -> None:
    refund_id = world.released()

    ledger = world.ledger
    claim = ledger.claims.claim

    async def claim_then_pause(*args: Any, **kwargs: Any) -> Any:
        claimed = await claim(*args, **kwargs)
        await ledger.pauses.pause("*", "the bank called")
        return claimed

    ledger.claims.claim = claim_then_pause  # type: ignore[method-assign]
    result = world.send(refund_id)
    assert (result.sent, result.reason) == (Sent.CONFIGURATION, "Sending is paused: the bank called")
    assert (world.row(refund_id)["status"], world.attempts(refund_id), world.paid(refund_id)) == (
        "released",
        ["not_sent"],
        0,
    )


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_worker_that_froze_between_claim_and_post_sends_nothing(world: World, taken_over: bool) -> None:
    refund_id = world.released()
    ledger = world.ledger
    claim = ledger.claims.claim

    async def claim_and_freeze(*args: Any, **kwargs: Any) -> Any:
        ledger.claims.claim = claim  # type: ignore[method-assign]
        claimed = await claim(*args, **kwargs)
        world.hours_ahead += 2
        if taken_over:
            with pytest.raises(Death):
                await world.sending(refund_id, Intercepted(world.gateway, before=die))
        return claimed

    ledger.claims.claim = claim_and_freeze  # type: ignore[method-assign]
    result = world.send(refund_id)
    assert result.sent is Sent.BUSY
    assert world.paid(refund_id) == 0
    assert world.attempts(refund_id) == (["not_sent", None] if taken_over else ["not_sent"])
    assert world.row(refund_id)["status"] == ("sending" if taken_over else "released")
    assert result.retry_after > (3600 if taken_over else 0)
