"""Write-back through Airflow's own runner: what is retried, what is red, and what goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from demo.postgres import PostgresServer
from include.refunds import source
from include.refunds.source_update import Updated
from tests.dags.conftest import Runner
from tests.refunds.conftest import World


@pytest.fixture
def after_each_update(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], list[Updated]]:
    """A function that lets something happen after each update of the source; returns what these did."""

    def let(happen: Callable[[], None]) -> list[Updated]:
        done: list[Updated] = []
        run_update = source.run_update

        def update_then_happen(*args: Any) -> Updated:
            done.append(run_update(*args))
            happen()
            return done[-1]

        monkeypatch.setattr(source, "run_update", update_then_happen)
        return done

    return let


def test_a_source_that_only_reads_for_a_minute_is_written_by_the_retry(
    world: World,
    run_dag: Runner,
    postgres: PostgresServer,
    after_each_update: Callable[[Callable[[], None]], list[Updated]],
) -> None:
    ref = world.approve()
    change = f"ALTER DATABASE {world.source_engine.url.database} SET default_transaction_read_only"
    with postgres.connect() as connection:
        connection.execute(f"{change} = on")
        done = after_each_update(lambda: connection.execute(f"{change} TO DEFAULT") and None)
        run = run_dag()
    assert [update.stopped is not None for update in done] == [True, False]
    assert (run.state, run.tasks["write_back"]) == ("success", "success")
    assert (
        "the server only reads for now, as after a failover (ReadOnlySqlTransaction, SQLSTATE 25006)"
        in run.log
    )
    world.source_engine.dispose()
    assert world.source_row(ref)["status"] == "accepted"


def test_a_statement_that_fails_for_every_row_fails_at_once_and_makes_the_run_red(
    world: World, run_dag: Runner, after_each_update: Callable[[Callable[[], None]], list[Updated]]
) -> None:
    ref = world.approve()
    world.change_source(ref, "reason = NULL")
    with world.source_engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE refund_requests DROP COLUMN payroc_status")
    done = after_each_update(lambda: None)
    run = run_dag()
    assert len(done) == 1
    assert (run.state, run.tasks["write_back"], run.tasks["report"]) == ("failed", "failed", "failed")
    assert (
        "write_back.sql failed on the connection refunds_source: a column does not exist: payroc_status"
        in run.log
    )
    assert "write_back did not finish, its log says why." in run.log
    assert world.row(ref)["status"] == "accepted"


def test_a_refused_row_stops_no_other_and_is_red_until_it_is_written(world: World, run_dag: Runner) -> None:
    refused, fine = world.approve(), world.approve()
    with world.source_engine.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE refund_requests ADD CONSTRAINT closed "
            f"CHECK (source_ref <> '{refused}' OR status IS NULL)"
        )
    for dag_id in ("payroc_refunds", "payroc_refunds_followup"):
        run = run_dag(dag_id)
        assert (run.state, run.tasks["write_back"], run.tasks["report"]) == ("failed", "success", "failed")
        assert f"Source row {refused} has not been written back since" in run.log
        assert "a constraint refuses the row: closed (CheckViolation, SQLSTATE 23514)" in run.log
    assert world.source_row(fine)["status"] == "accepted"
    with world.source_engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE refund_requests DROP CONSTRAINT closed")
    assert run_dag("payroc_refunds_followup").state == "success"
    assert world.source_row(refused)["status"] == "accepted"


def test_an_update_that_touches_two_rows_is_named_in_the_report_and_is_no_failure(
    world: World, run_dag: Runner
) -> None:
    ref = world.approve()
    with world.source_engine.begin() as connection:
        # The same refund twice, as in a table of its lines; only one of them is offered.
        connection.exec_driver_sql("ALTER TABLE refund_requests DROP CONSTRAINT refund_requests_pkey")
        connection.exec_driver_sql("INSERT INTO refund_requests SELECT * FROM refund_requests")
        connection.exec_driver_sql(
            "UPDATE refund_requests SET withdrawn_at = now() "
            "WHERE ctid = (SELECT max(ctid) FROM refund_requests)"
        )
    run = run_dag()
    assert run.state == "success"
    assert f"Note: Source row {ref}: the UPDATE of write_back.sql touched 2 rows;" in run.log


def test_a_row_that_is_offered_again_is_written_again_and_the_report_says_so(
    world: World, run_dag: Runner
) -> None:
    ref = world.approve()
    run_dag()
    world.change_source(ref, "status = NULL")
    run = run_dag()
    assert run.state == "success"
    assert (
        "1 source row is offered again although the refund has ended; the outcome is written back again."
        in run.log
    )
    assert world.source_row(ref)["status"] == "accepted"
