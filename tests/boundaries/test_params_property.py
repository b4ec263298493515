"""Whatever a run is triggered with, it is params that the ledger understands, or one error that names the param."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Annotated, Any

import pytest
from airflow.sdk import Param
from airflow.sdk.exceptions import ParamValidationError
from hypothesis import HealthCheck, Phase, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import Field

from include.refunds import params as module
from include.refunds.ledger import Ledger, LedgerEngine, LedgerError
from include.refunds.params import ParamsError, RunParams
from include.refunds.settings import get_settings
from tests.conftest import ROOT, NewDatabase

NAMES = sorted(RunParams.model_fields)
TEXT = st.text(st.characters(), max_size=12)
INSTANT = st.datetimes().map(lambda at: at.isoformat()) | st.datetimes(
    timezones=st.timezones() | st.just(UTC)
).map(lambda at: at.isoformat())
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-1, 100_001),
    st.floats(),
    TEXT,
    INSTANT,
    st.sampled_from(["7701001", "RF-1", "RF-1 ", "2026-11-20T09:00:00Z", "2016-12-31T23:59:60Z"]),
)
JSON = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=4
)


@pytest.fixture(scope="module")
def ledger(new_ledger: NewDatabase) -> Ledger:
    """A ledger that the examples share; they store a run in it and no refund."""
    return Ledger(LedgerEngine(new_ledger(), pool_size=0), get_settings(), actor="test")


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Any]]:
    """Airflow's own schema of each param."""
    from airflow.dag_processing.dagbag import DagBag

    dag = DagBag(dag_folder=str(ROOT / "dags" / "payroc_refunds.py")).dags["payroc_refunds"]
    return {name: dag.params.get_param(name).schema for name in NAMES}


def airflow_takes(schema: dict[str, Any], value: object) -> bool:
    try:
        Param(schema=schema).resolve(value)
    except ParamValidationError:
        return False
    return True


def a_value_is_a_param_or_refused_by_name(
    name: str, value: Any, schemas: dict[str, dict[str, Any]], ledger: Ledger
) -> None:
    by_airflow = airflow_takes(schemas[name], value)
    try:
        params = RunParams.check({name: value}, {name: value})
    except ParamsError as error:
        said = str(error)
        assert said.startswith(f"Param {name} is not usable; give ")
        assert said.isprintable()
        # What Airflow let pass is refused for what its schema can't say: characters that Postgres can't hold,
        # and instants that no calendar has in UTC.
        assert not by_airflow or name in ("source_refs", "processing_terminal_id", "approved_before")
        return
    # Airflow knows one form of an instant, we take every one of ISO 8601 that has a zone.
    assert by_airflow or name == "approved_before"
    if name == "source_refs":
        assert list(params.source_refs) == (value or [])

    async def work() -> None:
        found = await ledger.runs.candidates(params.selection())
        stored = params.model_dump(mode="json")
        json.dumps(stored, allow_nan=False)
        await ledger.runs.begin_run("run", stored, found, {}, datetime.now(UTC))

    asyncio.run(work())


def any_conf_is_params_or_refused(params: dict[str, Any], conf: Any) -> None:
    try:
        RunParams.check(params, conf)
    except ParamsError as error:
        said = str(error)
        assert said.isprintable()
        assert said.startswith(("Param ", "The run was triggered with unknown params (", "The run's conf "))
    else:
        assert {*params, *(conf or {})} <= {*NAMES}


VALUES = given(st.sampled_from(NAMES), JSON)


@pytest.mark.timeout(3600)
@example("source_refs", None)
@example("source_refs", ["RF\x001"])
@example("processing_terminal_id", "7701\ud83d")
@example("approved_before", "0001-01-01T00:00:00+14:00")
@example("batch_size", 10**400)
@example("batch_size", 1e300)
@example("limit", True)
@VALUES
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_value_is_a_param_or_refused_by_name(
    schemas: dict[str, dict[str, Any]], ledger: Ledger, name: str, value: Any
) -> None:
    a_value_is_a_param_or_refused_by_name(name, value, schemas, ledger)


@given(st.dictionaries(st.sampled_from(NAMES) | TEXT, JSON, max_size=3), st.none() | JSON)
@example({}, {"\x1b[2Jlimit": 1})
def test_any_conf_is_params_or_refused(params: dict[str, Any], conf: Any) -> None:
    any_conf_is_params_or_refused(params, conf)


class WithAnyText(RunParams):
    """Params whose texts may hold what Postgres can't."""

    source_refs: tuple[str, ...] = ()


class WithAnyNumber(RunParams):
    """Params whose limit may be a yes or a text."""

    limit: Annotated[int, Field(ge=1, le=100_000)] = 100_000


MISTAKES = {
    "any text": (WithAnyText, "source_refs", st.lists(st.text("ab\x00", min_size=1))),
    "any number": (WithAnyNumber, "limit", st.booleans() | st.just("5")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_property_finds_a_planted_mistake(
    mistake: str, schemas: dict[str, dict[str, Any]], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted, name, values = MISTAKES[mistake]
    monkeypatch.setattr("tests.boundaries.test_params_property.RunParams", planted)

    @hypothesis_settings(phases=[Phase.generate], report_multiple_bugs=False)
    @given(values)
    def run(value: Any) -> None:
        a_value_is_a_param_or_refused_by_name(name, value, schemas, ledger)

    with pytest.raises((AssertionError, LedgerError)):
        run()


def test_the_property_of_names_finds_a_planted_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "printable", lambda name, limit: name)
    with pytest.raises(AssertionError):
        any_conf_is_params_or_refused({}, {"\x1b[2Jlimit": 1})
