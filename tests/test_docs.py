"""The docs say what is true: their code is run, their SQL is run, their links lead somewhere."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, bindparam, create_engine, text

from include.refunds.revision import REVISION
from include.refunds.source import SqlSource
from include.refunds.source_update import PARAMETERS
from include.refunds.sql_files import read_sql
from tests.conftest import ROOT
from tests.dags.conftest import Runner, run_dag, world  # noqa: F401 - fixtures
from tests.refunds.conftest import World

DOCS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "include" / "sandbox" / "README.md",
]


def blocks(document: Path, language: str) -> list[str]:
    """Return the code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.S | re.M)


@pytest.mark.parametrize("document", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_to_files(document: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)", document.read_text()) if "://" not in target]
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []


def test_the_commands_of_make_that_the_docs_name_exist() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for document in DOCS for name in re.findall(r"`?\bmake ([a-z-]+)`", document.read_text())}
    named |= {
        name
        for document in DOCS
        for block in blocks(document, "console")
        for name in re.findall(r"^\$ make ([a-z-]+)", block, re.M)
    }
    assert named
    assert named <= known


def test_the_readme_names_the_revision_that_migrate_prints() -> None:
    assert re.findall(r"The ledger is at revision (\S+)\.", (ROOT / "README.md").read_text()) == [REVISION]


def test_the_settings_that_the_docs_name_exist() -> None:
    from include.refunds.settings import OTHER_NAMES, Settings

    known = {f"PAYROC_REFUNDS_{name.upper()}" for name in (*Settings.model_fields, *OTHER_NAMES)}
    named = {
        name for document in DOCS for name in re.findall(r"PAYROC_REFUNDS_[A-Z_]+[A-Z]", document.read_text())
    }
    # The page on boundaries shows how a misspelled one is refused.
    assert named - known == {"PAYROC_REFUNDS_RETRYS"}


def test_the_example_of_the_hook_counts_refunds_by_status(
    world: World,  # noqa: F811
    airflow_database: None,
    tmp_path: Path,
) -> None:
    from airflow.dag_processing.dagbag import DagBag

    world.send(world.released(processing_terminal_id="2201001"))
    (tmp_path / "example.py").write_text(blocks(ROOT / "docs" / "hook.md", "python")[0])
    bag = DagBag(dag_folder=str(tmp_path))
    assert bag.import_errors == {}
    task = bag.dags["refunds_of_the_week"].get_task("count_by_status")
    assert task.python_callable(params={"processing_terminal_id": "2201001"})["ready"] >= 1


def test_the_update_of_the_worked_example_finds_its_row_by_the_key(source_url: URL, tmp_path: Path) -> None:
    table, _, update = blocks(ROOT / "README.md", "sql")
    (tmp_path / "write_back.sql").write_text(update)
    sql = read_sql(tmp_path / "write_back.sql", "postgresql", PARAMETERS, required="source_ref")
    with create_engine(source_url).begin() as connection:
        connection.execute(text(table))
        connection.execute(
            text(
                "INSERT INTO returns (return_no, store_terminal, refund_total, payee, payee_kind, aba, account, "
                "clerk) SELECT n, '7701001', 1, 'a', 'person', 'b', 'c', 'd' FROM generate_series(1, 20000) AS n"
            )
        )
        connection.execute(text("ANALYZE returns"))
        values: dict[str, Any] = dict.fromkeys(sql.parameters, "return-7001") | {
            "updated_at": datetime.now(UTC)
        }
        explain = text(f"EXPLAIN {sql.text}").bindparams(*(bindparam(*value) for value in values.items()))
        plan = connection.execute(explain).scalars().all()
    assert any("Index Scan using returns_pkey" in line for line in plan), plan


def test_the_worked_example_rounds_cents_of_floating_point() -> None:
    _, select, _ = blocks(ROOT / "README.md", "sql")
    (expression,) = re.findall(r"^ *(.*?) +AS amount,", select, re.M)
    query = text(f"SELECT {expression} FROM (SELECT :total AS refund_total)")
    with create_engine("sqlite://").connect() as connection:
        found = [
            connection.execute(query, {"total": total}).scalar_one() for total in (0.29, 1.15, 64.10, 74.5)
        ]
    assert found == [29, 115, 6410, 7450]


def test_the_worked_example_of_the_readme_pulls_from_and_writes_back_to_a_table_with_other_names(
    world: World,  # noqa: F811
    tmp_path: Path,
) -> None:
    table, select, update = blocks(ROOT / "README.md", "sql")
    row: dict[str, Any] = {
        "number": 7001,
        "store": "7701001",
        "total": "74.50",
        "holder": "Sarah Hopper",
        "aba": "053200983",
        "account": "556677889911",
        "at": datetime(2026, 11, 20, 9, 0, tzinfo=UTC),
    }
    with world.source_engine.begin() as connection:
        connection.execute(text(table))
        connection.execute(
            text(
                "INSERT INTO returns (return_no, store_terminal, refund_total, payee, payee_kind, aba, account, "
                "clerk, manager, approved_on) VALUES (:number, :store, :total, :holder, 'person', :aba, :account, 'ann', 'bob', :at)"
            ),
            row,
        )
    for name, sql in (("select_approved.sql", select), ("write_back.sql", update)):
        (tmp_path / name).write_text(sql)
    world.source = SqlSource(
        world.source_engine,
        select_approved=tmp_path / "select_approved.sql",
        write_back=tmp_path / "write_back.sql",
    )
    pulled = world.pull()
    assert (pulled.new, pulled.invalid) == (1, {})
    world.send(world.release()[0])
    assert world.write_back() == (1, [])
    with world.source_engine.connect() as connection:
        found = connection.execute(text("SELECT payout_status, payroc_id FROM returns")).one()
    assert found.payout_status == "accepted"
    assert world.row("return-7001")["amount"] == 7450
    assert found.payroc_id == world.row("return-7001")["payroc_refund_id"]
    assert world.pull().rows == 0
