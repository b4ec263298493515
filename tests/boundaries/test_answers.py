"""What Payroc answers costs itself alone, and what is not Payroc's stops before the first POST."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import URL

from include.payroc.errors import PayrocProblem, PayrocUnexpectedAnswer
from include.refunds.ledger import LedgerError
from include.refunds.reissue import reissue
from include.refunds.release import PreflightRefused
from include.refunds.restored import Restored, restored
from include.refunds.verify import Comparison, verify
from tests.boundaries.payroc_pages import ODD_OBJECTS, answer_normally, answer_with, page_with, spoil_lists
from tests.refunds.conftest import World
from tests.refunds.test_cli import cli
from tests.refunds.test_follow_up import paid, set_at_payroc
from tests.refunds.test_resolve import decide, ledger_of
from tests.refunds.test_reverse import undo

TERMINALS = itertools.count(1)
EMPTY_LIST = b'{"limit": 1, "count": 0, "hasMore": false, "links": [], "data": []}'


@pytest.fixture(autouse=True)
def terminal(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give each test a terminal of its own: Payroc remembers what other tests paid."""
    name = f"87{next(TERMINALS):06}"
    approve = world.approve
    monkeypatch.setattr(
        world,
        "approve",
        lambda ending="4321", **columns: approve(ending, **({"processing_terminal_id": name} | columns)),
    )
    yield name
    answer_normally(world)


def compare(world: World) -> Comparison:
    now, day = datetime.now(UTC), timedelta(days=1)
    return world.run(verify(now - day, now + day, ledger=world.ledger, gateway=world.gateway))


def sentences(world: World) -> list[str]:
    return [item.sentence for item in compare(world).differences]


def run_restored(world: World, *, accept: bool) -> Restored:
    work = restored(
        datetime.now(UTC) - timedelta(hours=1),
        "The disk was lost.",
        source=world.source,
        ledger=ledger_of(world, "ann"),
        gateway=world.gateway,
        cipher=world.cipher,
        settings=world.settings,
        accept_not_understood=accept,
    )
    return world.run(work)


# -- an object of a list that can't be understood ------------------------------------------------------------


def test_odd_objects_spoil_only_themselves_in_follow_up_and_verify(world: World, terminal: str) -> None:
    refunds = [paid(world), paid(world)]
    for refund_id in refunds:
        set_at_payroc(world, refund_id, "complete")
    spoil_lists(world, terminal, *[odd for odd, _ in ODD_OBJECTS.values()])
    counts = world.follow_up()
    assert (counts["changed"], counts["not understood"], counts.get("failed", 0)) == (2, len(ODD_OBJECTS), 0)
    assert [world.row(refund_id)["status"] for refund_id in refunds] == ["settled", "settled"]
    found = compare(world)
    names = [name for _, name in ODD_OBJECTS.values()]
    assert (found.hidden, found.hidden_names) == (
        len(names),
        [f"{name} of terminal {terminal}" for name in names],
    )
    assert [item.sentence for item in found.differences] == [
        f"Payroc lists {len(names)} objects ({', '.join(names)}) of terminal {terminal} that can't be "
        "understood."
    ]


def test_a_look_up_that_meets_an_odd_object_proves_no_absence(world: World, terminal: str) -> None:
    refund_id = paid(world, "9005")
    spoil_lists(world, terminal, ODD_OBJECTS["two amounts"][0])
    world.hours_ahead += 24 * 7
    assert world.follow_up()["not understood"] == 1
    assert world.row(refund_id)["status"] == "unknown"
    answer_normally(world)
    world.follow_up()
    assert world.row(refund_id)["status"] == "review"


def test_a_restore_with_an_odd_object_ends_by_a_decision_with_its_event(world: World, terminal: str) -> None:
    odd, name = ODD_OBJECTS["half an emoji"]
    paid(world)
    spoil_lists(world, terminal, odd)
    with pytest.raises(
        LedgerError,
        match=rf"1 object \({name} of terminal {terminal}\) that .*--accept-not-understood",
    ):
        run_restored(world, accept=False)
    with pytest.raises(LedgerError, match="not compared with Payroc since"):
        world.run(world.ledger.pauses.resume("*", "It looks fine."))
    found = run_restored(world, accept=True)
    assert found.comparison.hidden == 1
    (event,) = world.rows(
        "SELECT actor, reason, detail FROM refund_ledger.refund_events WHERE event = 'not_understood'"
    )
    assert (event["actor"], event["reason"]) == ("ann", "The disk was lost.")
    assert event["detail"] == {"count": 1, "objects": [f"{name} of terminal {terminal}"]}
    assert world.run(world.ledger.pauses.resume("*", "Compared."))


def test_a_restore_without_odd_objects_needs_no_decision_and_has_no_event(world: World) -> None:
    paid(world)
    run_restored(world, accept=True)
    query = "SELECT count(*) AS count FROM refund_ledger.refund_events WHERE event = 'not_understood'"
    assert world.rows(query) == [{"count": 0}]


def test_the_restored_command_names_the_odd_objects_and_the_option(
    world: World, terminal: str, ledger_url: URL, source_url: URL
) -> None:
    paid(world)
    spoil_lists(world, terminal, ODD_OBJECTS["invalid UTF-8"][0])
    source = source_url.set(drivername="postgres").render_as_string(hide_password=False)
    command = ("restored", "--backup-at", datetime.now(UTC).isoformat(), "--by", "ann", "--reason", "disk")
    refused = cli(*command, ledger=ledger_url, AIRFLOW_CONN_REFUNDS_SOURCE=source)
    assert refused.returncode == 2
    assert f"1 object (refund ODDID00002 of terminal {terminal}) that can't be understood" in refused.stderr
    assert "--accept-not-understood" in refused.stderr
    assert "Traceback" not in refused.stderr
    accepted = cli(*command, "--accept-not-understood", ledger=ledger_url, AIRFLOW_CONN_REFUNDS_SOURCE=source)
    assert accepted.returncode == 1, accepted.stderr


def test_an_odd_object_in_answer_to_a_post_leaves_the_refund_unknown(world: World) -> None:
    for odd, _ in ODD_OBJECTS.values():
        refund_id = world.released()
        answer_with(world, "create", odd)
        world.send(refund_id)
        answer_normally(world)
        row = world.row(refund_id)
        assert row["status"] == "unknown"
        assert "the body is not what this operation returns" in row["reason"]


# -- dates that only other programs write --------------------------------------------------------------------


def test_a_strange_date_of_a_foreign_object_stops_no_comparison(world: World, terminal: str) -> None:
    paid(world)
    today = datetime.now(UTC).replace(tzinfo=None).isoformat()
    unreadable = ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "", 1_700_000_000, None)
    foreign = [
        {
            "refundId": f"FOREIGN{number:03}",
            "processingTerminalId": terminal,
            "order": {"orderId": "portal", "amount": 100, "currency": "USD", "dateTime": date},
            "transactionResult": {"type": "unreferencedRefund", "status": "ready", "responseCode": "A"},
        }
        for number, date in enumerate((today, *unreadable, "0001-01-01T00:00:00"))
    ]
    spoil_lists(world, terminal, *[json.dumps(item).encode() for item in foreign])
    found = compare(world)
    assert found.differences == []
    # One of today lies in the range, and so do those without a date; the one of the year 1 does not.
    assert found.elsewhere["USD"].payroc_amount == 100 + 100 * len(unreadable)
    assert run_restored(world, accept=False).comparison.differences == []


# -- what is not Payroc's ------------------------------------------------------------------------------------

NOT_A_LIST = {
    "login page": b"<!doctype html><html><body>Sign in</body></html>",
    "gzip without its header": gzip.compress(EMPTY_LIST),
    "byte order mark": b"\xef\xbb\xbf" + EMPTY_LIST,
    "another shape": b'{"data": []}',
    "a list of numbers as text": b'{"limit": "1", "count": "0", "hasMore": "false", "data": []}',
    "a bare list": b"[]",
    "cut off": EMPTY_LIST[:-2],
}


@pytest.mark.parametrize("body", NOT_A_LIST.values(), ids=NOT_A_LIST)
def test_a_200_that_is_not_payrocs_list_stops_before_the_first_post(world: World, body: bytes) -> None:
    ref = world.approve()
    world.pull()
    answer_with(world, "list", body)
    with pytest.raises(PreflightRefused) as caught:
        world.release()
    assert "of Airflow connection 'payroc_default', because what answers there is not Payroc" in str(
        caught.value
    )
    assert (world.row(ref)["status"], world.paused()) == ("approved", {})


@pytest.mark.parametrize(
    "body",
    [
        *list(NOT_A_LIST.values())[:1],
        b"\xef\xbb\xbf" + b'{"access_token": "a", "expires_in": 3600, "token_type": "Bearer"}',
        gzip.compress(b'{"access_token": "a", "expires_in": 3600, "token_type": "Bearer"}'),
        b'{"access_token": "a", "expires_in": 3600, "token_type": "mac"}',
        b'{"token": "a"}',
    ],
    ids=["login page", "byte order mark", "gzip", "another scheme", "another shape"],
)
def test_a_200_that_is_not_payrocs_token_stops_before_the_first_post(world: World, body: bytes) -> None:
    ref = world.approve()
    world.pull()
    world.sandbox.post("/_sandbox/tokens/revoke")
    world.run(world.gateway.token(younger_than=0))
    answer_with(world, "authorize", body)
    world.fault(None, "problem", "list", problem="not-authorized", times=2)
    with pytest.raises(PreflightRefused, match="Airflow connection 'payroc_default'"):
        world.release()
    assert (world.row(ref)["status"], world.paused()) == ("approved", {})


def test_somebody_elses_odd_object_stops_no_release_while_the_list_is_known(
    world: World, terminal: str
) -> None:
    world.released()
    world.approve()
    world.pull()
    answer_with(world, "list", page_with([ODD_OBJECTS["nesting of 10,000"][0]], []))
    assert len(world.release("run-2")) == 2


# -- refusals that concern one refund, one terminal or the connection ----------------------------------------


@pytest.mark.parametrize(("status", "kind"), [(413, "payload-too-large"), (422, "unprocessable")])
def test_a_413_or_422_of_payroc_concerns_its_refund_alone(world: World, status: int, kind: str) -> None:
    refused, other = world.released(), world.released()
    world.fault(refused, "problem", problem=kind, status=status)
    world.send(refused)
    world.send(other)
    assert [world.row(refund_id)["status"] for refund_id in (refused, other)] == ["review", "accepted"]
    assert world.paused() == {}
    assert "Payroc does not document this answer for refunds" in world.row(refused)["reason"]


@pytest.mark.parametrize(
    ("status", "kind"), [(402, "payment-required"), (405, "not-allowed"), (414, "x"), (431, "x")]
)
def test_another_refusal_that_has_nothing_to_do_with_one_refund_pauses_all(
    world: World, status: int, kind: str
) -> None:
    refund_id = world.released()
    world.fault(refund_id, "problem", problem=kind, status=status)
    world.send(refund_id)
    assert (world.row(refund_id)["status"], list(world.paused())) == ("released", ["*"])


def test_a_404_of_the_collection_concerns_the_connection(world: World) -> None:
    refund_id = world.released()
    world.fault(refund_id, "problem", problem="not-found")
    world.send(refund_id)
    assert list(world.paused()) == ["*"]
    assert "check host and extra environment of the connection" in world.paused()["*"]


def test_a_404_of_the_collection_stops_a_release_and_names_the_connection(world: World) -> None:
    world.approve()
    world.pull()
    world.fault(None, "problem", "list", problem="not-found")
    with pytest.raises(PreflightRefused, match=r"check host and extra environment.*'payroc_default'"):
        world.release()
    assert list(world.paused()) == ["*"]


def test_a_404_about_a_terminal_pauses_that_terminal(world: World) -> None:
    world.approve(processing_terminal_id="8700991")
    fine = world.approve(processing_terminal_id="8700992")
    world.pull()
    world.fault(None, "problem", "list", problem="not-found", resource="processingTerminal")
    assert world.release() == [world.row(fine)["id"]]
    assert list(world.paused()) == ["8700991"]


def test_a_refund_is_absent_only_when_payroc_itself_does_not_find_it(world: World) -> None:
    refund_id = paid(world)
    answer_with(world, "list", EMPTY_LIST)
    world.fault(None, "status", "get", status=404)
    with pytest.raises(PayrocUnexpectedAnswer):
        compare(world)
    world.fault(None, "problem", "get", problem="something-else", status=404)
    with pytest.raises(PayrocProblem):
        compare(world)
    world.fault(None, "problem", "get", problem="not-found")
    assert [item.refund_id for item in compare(world).differences] == [refund_id]


# -- a token that Payroc has taken back ----------------------------------------------------------------------


def comparing(world: World, refund_id: int) -> None:
    assert sentences(world) == []


def following_up(world: World, refund_id: int) -> None:
    counts = world.follow_up()
    assert (counts["followed"], counts.get("failed", 0)) == (1, 0)


def reversing(world: World, refund_id: int) -> None:
    assert undo(world, refund_id).done


def restoring(world: World, refund_id: int) -> None:
    assert run_restored(world, accept=False).comparison.differences == []


@pytest.mark.parametrize("work", [comparing, following_up, reversing, restoring])
def test_a_token_that_payroc_took_back_costs_one_fresh_token(
    world: World, work: Callable[[World, int], None]
) -> None:
    refund_id = paid(world)
    world.sandbox.post("/_sandbox/tokens/revoke")
    issued = world.sandbox.get("/_sandbox/requests")["tokensIssued"]
    work(world, refund_id)
    assert world.sandbox.get("/_sandbox/requests")["tokensIssued"] == issued + 1


def test_a_token_that_payroc_took_back_stops_no_decision(world: World) -> None:
    refund_id = paid(world)
    set_at_payroc(world, refund_id, "admin")
    world.follow_up()
    set_at_payroc(world, refund_id, "ready")
    world.sandbox.post("/_sandbox/tokens/revoke")
    assert not decide(world, refund_id, "accepted", "ann")
    world.sandbox.post("/_sandbox/tokens/revoke")
    assert decide(world, refund_id, "accepted", "bob")
    assert world.row(refund_id)["status"] == "accepted"


def test_a_token_that_payroc_took_back_stops_no_reissue(world: World) -> None:
    refund_id = paid(world, "9002")
    assert world.row(refund_id)["status"] == "rejected"
    for person, reissued in (("ann", False), ("bob", True)):
        world.sandbox.post("/_sandbox/tokens/revoke")
        work = reissue(
            refund_id,
            "paid by mistake to nobody",
            ledger=ledger_of(world, person),
            gateway=world.gateway,
            cipher=world.cipher,
            source=world.settings.source,
        )
        assert (world.run(work) is not None) is reissued


def test_a_fresh_token_that_payroc_refuses_too_ends_the_reading(world: World) -> None:
    paid(world)
    world.fault(None, "problem", "list", problem="not-authorized", times=10)
    with pytest.raises(PayrocProblem, match="not-authorized"):
        compare(world)
    assert len(world.sandbox.get("/_sandbox/faults")["faults"]) == 1
    assert world.sandbox.get("/_sandbox/faults")["faults"][0]["left"] == 8


def test_a_send_attempt_takes_no_second_token(world: World) -> None:
    refund_id = world.released()
    world.sandbox.post("/_sandbox/tokens/revoke")
    issued = world.sandbox.get("/_sandbox/requests")["tokensIssued"]
    world.send(refund_id)
    assert world.row(refund_id)["status"] == "unknown"
    assert world.sandbox.get("/_sandbox/requests")["tokensIssued"] == issued
    assert world.posts(refund_id) == 1
