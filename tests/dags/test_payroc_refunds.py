"""``payroc_refunds`` through Airflow's own runner, from the source to the local Payroc and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from airflow.sdk.exceptions import ParamValidationError

from tests.boundaries.payroc_pages import ODD_OBJECTS, answer_normally, spoil_lists
from tests.dags.conftest import Runner, everything_that_airflow_kept
from tests.refunds.conftest import World


def posted(world: World) -> int:
    return sum(
        entry["operation"] == "create"
        for entry in world.sandbox.get("/_sandbox/requests?operation=create")["requests"]
    )


def test_every_kind_of_refund_ends_in_one_run_paid_at_most_once_and_is_written_back(
    world: World, run_dag: Runner
) -> None:
    expected = {
        "4321": ("accepted", 1),
        "9001": ("rejected", 1),
        "9002": ("rejected", 0),
        "9003": ("accepted", 1),
        "9005": ("accepted", 1),
        "9009": ("accepted", 1),
        "9020": ("accepted", 1),
    }
    refs = {ending: world.approve(ending) for ending in expected}
    token = world.approve(
        routing_number=None, account_number=None, secure_token="296753128804", name_on_account=None
    )
    invalid = world.approve(routing_number="123456789")
    run = run_dag()
    assert run.state == "success"
    for ending, (status, paid) in expected.items():
        row = world.row(refs[ending])
        assert (row["status"], world.paid(row["id"])) == (status, paid), ending
        assert world.source_row(refs[ending])["status"] == status
        assert run.tasks[f"send_refund {row['order_id']}"] == (
            "success" if status == "accepted" else "failed"
        )
    assert world.row(token)["status"] == "accepted"
    assert world.source_row(invalid)["status"] == "invalid"
    assert {(total["status"], total["count"]) for total in run.result["totals"]} == {
        ("accepted", 6),
        ("rejected", 2),
    }
    assert run.result["invalid_rows"] == 1

    before = posted(world)
    again = run_dag()
    assert again.state == "success"
    assert posted(world) == before
    assert "nothing was sent" in again.log


def test_a_run_without_approved_refunds_is_green_and_says_so(run_dag: Runner) -> None:
    run = run_dag()
    assert run.state == "success"
    assert run.tasks["send_refund"] == "skipped"
    assert "No refunds: nothing was approved, so nothing was sent." in run.log


def test_a_dry_run_shows_what_would_be_sent_and_changes_nothing(world: World, run_dag: Runner) -> None:
    ref = world.approve()
    order_id = world.source_row(ref)["order_id"]
    before = posted(world)
    run = run_dag(dry_run=True)
    assert run.state == "success"
    assert "Dry run: this is what would be sent." in run.log
    assert order_id in run.log
    assert run.result["totals"] == [{"status": "would send", "currency": "USD", "count": 1, "amount": 4999}]
    for table in ("refunds", "refund_events", "refund_runs", "invalid_rows"):
        assert world.rows(f"SELECT * FROM refund_ledger.{table}") == []
    assert posted(world) == before
    assert world.source_row(ref)["status"] is None


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"limit": 1}, "a"),
        ({"source_refs": ["b-REF", "c-REF"]}, "bc"),
        ({"processing_terminal_id": "7701002"}, "c"),
        ({"approved_before": "2026-11-20T09:00:01Z"}, "a"),
        ({"batch_size": 2}, "abc"),
    ],
)
def test_params_say_what_a_manual_run_is_about(
    world: World, run_dag: Runner, params: dict[str, Any], expected: str
) -> None:
    # Keys are derived from source_refs, so another test's "a" would be the same refund to Payroc.
    mark = next(iter(params))
    refs = {letter: f"{letter}-{mark}" for letter in "abc"}
    for number, (letter, ref) in enumerate(refs.items()):
        terminal = "7701002" if letter == "c" else "7701001"
        world.approve(
            source_ref=ref, approved_at=f"2026-11-20T09:00:0{number}Z", processing_terminal_id=terminal
        )
    if "source_refs" in params:
        params = {"source_refs": [ref.replace("REF", mark) for ref in params["source_refs"]]}
    run = run_dag(**params)
    assert run.state == "success"
    assert (
        "".join(letter for letter, ref in refs.items() if world.row(ref)["status"] == "accepted") == expected
    )
    mapped = [name for name in run.tasks if name.startswith("send_refund ")]
    assert len(mapped) == (2 if "batch_size" in params else len(expected))


def test_source_refs_that_a_run_is_not_about_are_named_in_its_report(world: World, run_dag: Runner) -> None:
    good, other = world.approve(), world.approve(processing_terminal_id="7701002")
    bad, ended = world.approve(routing_number="123456789"), world.approve()
    world.pull()
    world.run(world.ledger.decisions.cancel(world.row(ended)["id"], "A test."))
    asked = [good, f"{good} ", "no-such", "no-such", bad, ended, other]
    run = run_dag(source_refs=asked, processing_terminal_id=world.terminal)
    assert run.state == "success"
    notes = [note for note in run.result["notes"] if note.startswith("source_refs: ")]
    assert [note.partition(" ")[2].partition(" ")[2] for note in notes] == [
        "is neither in the source nor in the ledger; without the blanks around it, it is.",
        "is neither in the source nor in the ledger.",
        "is an invalid row of the source.",
        "is cancelled.",
        "is approved, and paused or left out by another param.",
    ]
    assert [name in note for name, note in zip([good, "no-such", bad, ended, other], notes, strict=True)]
    assert world.row(good)["status"] == "accepted"


def test_a_dry_run_names_the_source_refs_that_it_is_not_about(world: World, run_dag: Runner) -> None:
    good = world.approve()
    run = run_dag(dry_run=True, source_refs=[good, "no-such"])
    assert run.state == "success"
    assert run.result["notes"] == ["source_refs: no-such is neither in the source nor in the ledger."]


def test_of_very_many_unmatched_source_refs_the_first_are_named(world: World, run_dag: Runner) -> None:
    run = run_dag(dry_run=True, source_refs=[f"no-{number}" for number in range(1000)])
    assert run.state == "success"
    assert len(run.result["notes"]) == 51
    assert run.result["notes"][-1] == "950 more source_refs that the run is not about."


def test_a_terminal_without_a_refund_is_named_in_the_report(world: World, run_dag: Runner) -> None:
    world.approve()
    run = run_dag(dry_run=True, processing_terminal_id="7701001 ")
    assert run.state == "success"
    (note,) = run.result["notes"]
    assert note.startswith("processing_terminal_id: no approved refund is at 7701001")


@pytest.mark.parametrize("source_refs", [None, []])
def test_source_refs_of_null_or_of_none_mean_all(
    world: World, run_dag: Runner, source_refs: list[str] | None
) -> None:
    ref = world.approve()
    run = run_dag(source_refs=source_refs)
    assert (run.state, run.result["notes"]) == ("success", [])
    assert world.row(ref)["status"] == "accepted"


def test_an_unknown_param_fails_before_anything_is_written(world: World, run_dag: Runner) -> None:
    world.approve()
    run = run_dag(dryrun=True)
    assert (run.state, run.tasks["pull_approved"]) == ("failed", "failed")
    assert "unknown params (dryrun); known are dry_run, limit" in run.log
    assert world.rows("SELECT * FROM refund_ledger.refunds") == []


@pytest.mark.parametrize(
    "params", [{"approved_before": "2026-11-20T09:00:00"}, {"approved_before": "yesterday"}, {"limit": 0}]
)
def test_airflow_itself_refuses_a_bad_value_of_a_param(
    world: World, run_dag: Runner, params: dict[str, Any]
) -> None:
    world.approve()
    with pytest.raises(ParamValidationError):
        run_dag(**params)
    assert world.rows("SELECT * FROM refund_ledger.refunds") == []


@pytest.mark.parametrize(("dry_run", "failed"), [(False, "pull_approved"), (True, "report")])
def test_production_needs_a_source_name_of_ones_own(
    world: World, run_dag: Runner, monkeypatch: pytest.MonkeyPatch, dry_run: bool, failed: str
) -> None:
    # The proxy is nobody's: a run that went on would not get out of this machine.
    extra = {"environment": "production", "proxy": "http://127.0.0.1:9"}
    production = {"conn_type": "payroc", "password": "key", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_PAYROC_DEFAULT", json.dumps(production))
    world.approve()
    run = run_dag(dry_run=dry_run)
    assert (run.state, run.tasks[failed]) == ("failed", "failed")
    assert "PAYROC_REFUNDS_SOURCE is refund_requests, its default, and the connection is Payroc's" in run.log
    for table in ("refunds", "refund_events", "refund_runs"):
        assert world.rows(f"SELECT * FROM refund_ledger.{table}") == []
    assert world.rows("SELECT * FROM refund_ledger.bindings") == []


def test_a_refund_in_review_fails_the_run_and_blocks_no_other(world: World, run_dag: Runner) -> None:
    odd, fine = world.approve("9013"), world.approve()
    run = run_dag()
    assert (run.state, run.tasks["report"], run.tasks["write_back"]) == ("failed", "failed", "success")
    assert "1 in review: people have to look at them" in run.log
    assert [world.row(ref)["status"] for ref in (odd, fine)] == ["review", "accepted"]


def test_a_refund_that_stays_unknown_fails_the_run_and_the_next_run_takes_it_up(
    world: World, run_dag: Runner
) -> None:
    ref = world.approve()
    world.pull()
    world.fault(world.row(ref)["id"], "status", status=503, times=3)
    run = run_dag()
    assert (run.state, world.row(ref)["status"], world.row(ref)["attempts"]) == ("failed", "unknown", 3)
    assert "1 unknown" in run.log
    assert run_dag().state == "success"
    assert (world.row(ref)["status"], world.paid(world.row(ref)["id"])) == ("accepted", 1)


def test_a_refund_whose_source_row_changed_is_named_and_not_sent(world: World, run_dag: Runner) -> None:
    ref = world.approve()
    world.pull()
    world.change_source(ref, "amount = 1")
    run = run_dag()
    assert f"Source row {ref} changed after it was pulled (amount); give it a new source_ref." in run.log
    assert world.row(ref)["status"] == "approved"


TROUBLE = {
    "no connection to Payroc": (
        {"AIRFLOW_CONN_PAYROC_DEFAULT": None},
        "pull_approved",
        "Airflow connection 'payroc_default'",
    ),
    "no API key": (
        {"AIRFLOW_CONN_PAYROC_DEFAULT": '{"conn_type": "payroc", "extra": {"environment": "uat"}}'},
        "pull_approved",
        "password",
    ),
    "a wrong API key": (
        {
            "AIRFLOW_CONN_PAYROC_DEFAULT": '{"conn_type":"payroc","password":"wrong-key","host":"URL/v1","extra":{"identity_url":"URL"}}'
        },
        "release",
        "check the API key and the environment of the connection",
    ),
    "Payroc unreachable": (
        {
            "AIRFLOW_CONN_PAYROC_DEFAULT": '{"conn_type":"payroc","password":"k","host":"http://127.0.0.1:9/v1",'
            '"extra":{"identity_url":"http://127.0.0.1:9"}}'
        },
        "release",
        "connection refused",
    ),
    "no ledger": (
        {"AIRFLOW_CONN_REFUNDS_LEDGER": None},
        "pull_approved",
        "Airflow connection 'refunds_ledger' is not defined",
    ),
    "no source": (
        {"AIRFLOW_CONN_REFUNDS_SOURCE": None},
        "pull_approved",
        "Airflow connection 'refunds_source' is not defined",
    ),
    "a source without SQL": (
        {"AIRFLOW_CONN_REFUNDS_SOURCE": "http://example.com"},
        "pull_approved",
        "has no SQL hook",
    ),
    "no encryption key": (
        {"PAYROC_REFUNDS_ENCRYPTION_KEYS": None},
        "pull_approved",
        "set PAYROC_REFUNDS_ENCRYPTION_KEYS",
    ),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_is_told_in_one_sentence_and_loses_nothing(
    world: World, run_dag: Runner, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    environment, task_id, sentence = TROUBLE[case]
    ref = world.approve()
    with monkeypatch.context() as patched:
        for name, value in environment.items():
            if value is None:
                patched.delenv(name)
            else:
                patched.setenv(name, value.replace("URL", world.sandbox.url))
        run = run_dag()
    assert (run.state, run.tasks[task_id]) == ("failed", "failed")
    assert sentence in run.log
    assert run_dag().state == "success"
    assert (world.row(ref)["status"], world.paid(world.row(ref)["id"])) == ("accepted", 1)


def test_a_ledger_that_is_not_migrated_says_what_to_run(
    world: World, run_dag: Runner, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.dags.conftest import airflow_connection

    postgres.create_database("empty_ledger")
    monkeypatch.setenv("AIRFLOW_CONN_REFUNDS_LEDGER", airflow_connection(postgres.url("empty_ledger")))
    run = run_dag()
    assert run.tasks["pull_approved"] == "failed"
    assert "run `python -m include.refunds migrate`" in run.log


def test_a_missing_pool_fails_pull_approved_before_anything_is_written(
    world: World, run_dag: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.approve()
    monkeypatch.setattr("payroc_airflow.pools.pool_exists", lambda name: False)
    run = run_dag()
    assert run.tasks["pull_approved"] == "failed"
    assert "run `airflow pools set payroc_api" in run.log
    assert world.rows("SELECT * FROM refund_ledger.refunds") == []


def test_a_configuration_error_at_the_first_post_stops_the_run_before_the_second_and_the_next_run_sends_after_resume(
    world: World, run_dag: Runner
) -> None:
    refs = [world.approve(processing_terminal_id="7701009") for _ in range(4)]
    world.pull()
    world.fault(None, "problem", problem="forbidden")
    before = posted(world)
    run = run_dag()
    assert run.state == "failed"
    assert posted(world) == before + 1
    assert "Sending is paused" in run.log
    assert {world.row(ref)["status"] for ref in refs} == {"released"}
    world.run(world.ledger.pauses.resume("*", "mended"))
    assert run_dag().state == "success"
    assert {world.row(ref)["status"] for ref in refs} == {"accepted"}


def test_no_bank_data_reaches_airflow(world: World, run_dag: Runner) -> None:
    secrets = ["77665544332211", "021000021", "Ottoline Featherstone"]
    for ending in ("4321", "9002", "9006", "9009", "9021"):
        world.approve(
            account_number=secrets[0] + ending[-3:], routing_number=secrets[1], name_on_account=secrets[2]
        )
    world.approve(account_number=secrets[0], routing_number="021000022", name_on_account=secrets[2])
    run = run_dag()
    kept = everything_that_airflow_kept()
    assert run.run_id.encode() in kept
    for secret in (*secrets, "021000022"):
        assert secret not in run.log
        assert secret.encode() not in kept


def test_the_follow_up_brings_accepted_refunds_to_settled_and_writes_it_back(
    world: World, run_dag: Runner
) -> None:
    ref = world.approve()
    run_dag()
    world.sandbox.patch(f"/_sandbox/refunds/{world.row(ref)['payroc_refund_id']}", {"status": "complete"})
    run = run_dag("payroc_refunds_followup")
    assert run.state == "success"
    assert (world.row(ref)["status"], world.source_row(ref)["status"]) == ("settled", "settled")


def test_a_follow_up_with_odd_objects_at_payroc_is_green_and_its_report_names_them(
    world: World, run_dag: Runner
) -> None:
    terminal = "7701777"
    refund_id = world.released(processing_terminal_id=terminal)
    world.send(refund_id)
    odd, name = ODD_OBJECTS["half an emoji"]
    spoil_lists(world, terminal, odd)
    run = run_dag("payroc_refunds_followup")
    answer_normally(world)
    assert run.state == "success"
    assert f"Payroc lists 1 object ({name} of terminal {terminal}) that can't be understood" in run.log


def test_a_follow_up_is_red_when_people_have_something_to_do_and_green_while_time_will_tell(
    world: World, run_dag: Runner
) -> None:
    world.send(world.released("9005"))
    run = run_dag("payroc_refunds_followup")
    assert (run.state, run.tasks["report"]) == ("success", "success")
    refund_id = world.released()
    world.send(refund_id)
    world.sandbox.patch(f"/_sandbox/refunds/{world.row(refund_id)['payroc_refund_id']}", {"status": "admin"})
    run = run_dag("payroc_refunds_followup")
    assert (run.state, run.tasks["follow_up"], run.tasks["report"]) == ("failed", "success", "failed")
    assert "1 in review: people have to look at them" in run.log


def test_a_run_that_released_and_could_not_send_is_red_and_says_so(
    world: World, run_dag: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.approve()
    # The preflight's token is the last one that is given.
    monkeypatch.setattr("include.refunds.release._token", _then_refuse_tokens(world))
    run = run_dag()
    assert run.state == "failed"
    assert "1 released and not sent" in run.log
    world.sandbox.delete("/_sandbox/faults")


def _then_refuse_tokens(world: World) -> Any:
    from include.refunds.release import _token

    async def last_token(gateway: Any, **kwargs: Any) -> Any:
        token = await _token(gateway, **kwargs)
        world.fault(None, "problem", "authorize", problem="not-authorized", times=20)
        return token

    return last_token


def test_a_dry_run_leaves_out_what_the_source_withdrew(world: World, run_dag: Runner) -> None:
    withdrawn, kept = world.approve(), world.approve()
    world.pull()
    world.change_source(withdrawn, "withdrawn_at = now()")
    run = run_dag(dry_run=True)
    assert run.result["totals"][0]["count"] == 1
    assert world.row(kept)["order_id"] in run.log


def test_a_run_over_a_threshold_asks_a_person_and_where_nobody_can_be_asked_it_fails_and_sends_nothing(
    world: World, run_dag: Runner
) -> None:
    ref = world.approve()
    world.run(world.ledger.limits.set_limit("approval_count", 0, "test"))
    run = run_dag()
    assert run.state == "failed"
    assert [run.tasks[name] for name in ("approve_run", "release", "write_back", "report")] == [
        "failed",
        "upstream_failed",
        "success",
        "failed",
    ]
    assert "more than 0 take one. Under `airflow dags test` nobody can be asked" in run.log
    assert (world.row(ref)["status"], world.paid(world.row(ref)["id"])) == ("approved", 0)
    # A dry run changes nothing, so it asks nobody.
    assert run_dag(dry_run=True).tasks["approve_run"] == "success"
    world.run(world.ledger.limits.set_limit("approval_count", 1, "test"))
    assert run_dag().state == "success"
    assert world.paid(world.row(ref)["id"]) == 1
