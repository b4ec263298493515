"""What the DAGs promise before they run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

DAG_IDS = ("payroc_refunds", "payroc_refunds_followup", "payroc_refunds_summary")


@pytest.fixture(scope="module")
def dags() -> dict[str, Any]:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=str(ROOT / "dags"))
    assert bag.import_errors == {}
    return bag.dags


def test_there_are_three_dags_with_their_tasks_in_order(dags: dict[str, Any]) -> None:
    assert set(dags) == set(DAG_IDS)
    order = [task.task_id for task in dags["payroc_refunds"].topological_sort()]
    assert order == ["pull_approved", "approve_run", "release", "send_refund", "write_back", "report"]


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_a_dag_runs_one_at_a_time_and_never_for_days_that_have_passed(
    dags: dict[str, Any], dag_id: str
) -> None:
    dag = dags[dag_id]
    assert (dag.catchup, dag.max_active_runs) == (False, 1)
    assert {kind.value for kind in dag.allowed_run_types} == {"scheduled", "manual"}
    assert dag.doc_md


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_a_dag_serializes_the_same_way_twice(dags: dict[str, Any], dag_id: str) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    assert DagSerialization.to_dict(dags[dag_id]) == DagSerialization.to_dict(dags[dag_id])


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_a_dag_that_is_unpaused_for_the_first_time_waits_for_the_next_time_and_does_not_run_the_last(
    dags: dict[str, Any], dag_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk.timezone import coerce_datetime
    from airflow.serialization.serialized_objects import DagSerialization

    stored = DagSerialization.from_dict(DagSerialization.to_dict(dags[dag_id]))
    # Right after a time is due, too: every seven minutes of a week pass all of them.
    for number in range(7 * 24 * 60 // 7):
        now = coerce_datetime(datetime(2026, 11, 23, tzinfo=UTC) + number * timedelta(minutes=7, seconds=1))
        monkeypatch.setattr("airflow.timetables.trigger.utcnow", lambda now=now: now)
        assert stored.next_dagrun_info(last_automated_run_info=None).run_after > now


def test_the_refund_run_is_scheduled_on_weekday_mornings_in_its_time_zone(dags: dict[str, Any]) -> None:
    timetable = dags["payroc_refunds"].timetable
    assert timetable.expression == "0 7 * * 1-5"
    assert str(getattr(timetable.timezone, "name", timetable.timezone)) == "America/New_York"


def test_each_param_explains_itself(dags: dict[str, Any]) -> None:
    params = dags["payroc_refunds"].params
    assert set(params) == {
        "dry_run",
        "limit",
        "source_refs",
        "processing_terminal_id",
        "approved_before",
        "batch_size",
    }
    for name in params:
        assert params.get_param(name).description
        assert params.get_param(name).schema["title"]


def test_send_tasks_have_their_pool_their_names_and_their_retries(dags: dict[str, Any]) -> None:
    task = dags["payroc_refunds"].get_task("send_refund")
    arguments = task.partial_kwargs
    assert (arguments["pool"], arguments["map_index_template"]) == ("payroc_api", "{{ refund_label }}")
    assert (task.retries, task.retry_delay) == (5, timedelta(seconds=60))
    assert type(task.retry_policy).__name__ == "PayrocRetryPolicy"


def test_an_empty_schedule_means_manual_runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.dag_processing.dagbag import DagBag

    from include.refunds.settings import get_settings

    monkeypatch.setenv("PAYROC_REFUNDS_SCHEDULE", "")
    get_settings.cache_clear()
    dag = DagBag(dag_folder=str(ROOT / "dags" / "payroc_refunds.py")).dags["payroc_refunds"]
    assert dag.timetable.can_be_scheduled is False


def test_a_run_has_a_deadline_of_four_hours_and_none_when_the_setting_is_zero(
    dags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.dag_processing.dagbag import DagBag

    from include.refunds.settings import get_settings

    (deadline,) = dags["payroc_refunds"].deadline
    assert deadline.interval == timedelta(hours=4)
    assert deadline.callback.path == "payroc_airflow.notify.DeadlineMissed"
    monkeypatch.setenv("PAYROC_REFUNDS_DEADLINE_HOURS", "0")
    get_settings.cache_clear()
    assert not DagBag(dag_folder=str(ROOT / "dags" / "payroc_refunds.py")).dags["payroc_refunds"].deadline


def test_a_run_of_airflow_dags_test_has_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.dag_processing.dagbag import DagBag

    monkeypatch.setattr("sys.argv", ["airflow", "dags", "test", "payroc_refunds"])
    assert not DagBag(dag_folder=str(ROOT / "dags" / "payroc_refunds.py")).dags["payroc_refunds"].deadline


def test_a_mistake_in_the_notifiers_stops_no_dag(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.dag_processing.dagbag import DagBag

    from include.refunds.settings import get_settings

    monkeypatch.setenv("PAYROC_REFUNDS_NOTIFIERS", "finance@example.com")
    get_settings.cache_clear()
    bag = DagBag(dag_folder=str(ROOT / "dags"))
    assert (set(bag.dags), bag.import_errors) == (set(DAG_IDS), {})


def test_the_dags_import_nothing_that_only_messages_and_summaries_need() -> None:
    # Each task's process imports the DAG's file.
    code = """
import sys
import airflow.sdk
import payroc_refunds, payroc_refunds_followup, payroc_refunds_summary
late = ("include.refunds.message", "include.refunds.summary", "airflow.providers.smtp.notifications", "payroc_airflow.summary")
assert [name for name in late if name in sys.modules] == []
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins"), str(ROOT / "dags")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("RETRYS", "3", "PAYROC_REFUNDS_RETRYS is not a setting; the nearest is PAYROC_REFUNDS_RETRIES."),
        (
            "SOURCE",
            "shop\r",
            "PAYROC_REFUNDS_SOURCE is not usable; give a name of up to 100 plain characters",
        ),
        ("SCHEDULE", "every day", "PAYROC_REFUNDS_SCHEDULE is not usable; give a cron expression"),
        ("SCHEDULE", "0 7 31 2 *", "PAYROC_REFUNDS_SCHEDULE is not usable; give a cron expression"),
    ],
)
def test_a_wrong_setting_is_an_import_error_of_our_dag_files_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, sentence: str
) -> None:
    from airflow.dag_processing.dagbag import DagBag

    for dag_id in DAG_IDS:
        shutil.copy(ROOT / "dags" / f"{dag_id}.py", tmp_path)
    (tmp_path / "theirs.py").write_text("from airflow.sdk import DAG\nwith DAG('theirs'): pass\n")
    monkeypatch.setenv(f"PAYROC_REFUNDS_{name}", value)
    bag = DagBag(dag_folder=str(tmp_path))
    assert "theirs" in bag.dags
    (error,) = [text for file, text in bag.import_errors.items() if file.endswith("payroc_refunds.py")]
    assert error.rstrip().splitlines()[-1].partition("SettingsError: ")[2].startswith(sentence)
