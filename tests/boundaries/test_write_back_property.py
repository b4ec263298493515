"""Every good row of the source is written with its values; every other one is named, and stays due."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from include.refunds import source_update
from include.refunds.ledger import Ledger, LedgerEngine, NotWritten, WriteBack
from include.refunds.ledger.write_backs import WriteBacks
from include.refunds.source import SqlSource
from include.refunds.write_back import WrittenBack, write_back
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world

# A merchant's references may look like SQL, like a parameter or like a driver's placeholder.
REFS = ("RF-1", "RF-2", "O'Brien; --", "100%", "%(status)s", ":status", "\\", "é 😀")
WORDS = "O'Brien, account 55667788, is closed"

GOOD, DOUBLED = "good", "doubled"
# Why a row can't be written: it is gone, swallowed by a trigger, or refused in one of many ways.
BAD = ("gone", "swallowed", "trigger", "late trigger", "check", "short", "number", "right", "unknown column")
SQLITE_BAD = ("gone", "check", "trigger")

POSTGRES_TABLE = f"""
ALTER TABLE refund_requests DROP CONSTRAINT refund_requests_pkey;
ALTER TABLE refund_requests ADD COLUMN kind text, ADD COLUMN short varchar(4), ADD COLUMN number integer,
    ADD CONSTRAINT odd CHECK (kind <> 'check' OR status IS NULL);
CREATE TABLE originals AS SELECT * FROM refund_requests;
CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    CASE NEW.kind
        WHEN 'swallowed' THEN RETURN NULL;
        WHEN 'trigger' THEN RAISE EXCEPTION '{WORDS.replace("'", "''")}';
        WHEN 'short' THEN NEW.short := '55667788';
        WHEN 'number' THEN NEW.number := CAST('55667788 closed' AS integer);
        WHEN 'right' THEN RAISE EXCEPTION 'closed' USING ERRCODE = 'insufficient_privilege';
        WHEN 'unknown column' THEN EXECUTE 'SELECT closed FROM refund_requests';
        ELSE NULL;
    END CASE;
    RETURN NEW;
END $$;
CREATE TRIGGER odd BEFORE UPDATE ON refund_requests FOR EACH ROW EXECUTE FUNCTION odd();
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.kind = 'late trigger' THEN RAISE EXCEPTION 'closed'; END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON refund_requests DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION late();
"""
PREPARE = text("""
    INSERT INTO refund_requests SELECT (jsonb_populate_record(o, jsonb_build_object('kind', k.kind))).*
    FROM originals AS o JOIN jsonb_to_recordset(CAST(:kinds AS jsonb)) AS k (source_ref text, kind text)
        USING (source_ref)
    CROSS JOIN generate_series(1, CASE k.kind WHEN 'gone' THEN 0 WHEN 'doubled' THEN 2 ELSE 1 END)""")
CHANGE = text("""
    UPDATE refund_ledger.refund_states SET status = 'rejected', reason = :reason, payroc_status = :payroc_status,
        updated_at = :updated_at, written_back_at = NULL
    FROM refund_ledger.refund_instructions WHERE id = refund_id AND source_ref = :source_ref""")

values = st.none() | st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=40)
instants = st.integers(946_684_800_000_000, 4_102_444_800_000_000).map(
    lambda microseconds: datetime.fromtimestamp(0, UTC) + timedelta(microseconds=microseconds)
)


@st.composite
def cases(draw: st.DrawFn, kinds: Sequence[str]) -> tuple[dict[str, str], list[WriteBack]]:
    """Draw a kind for some source_refs, and what is to be written into their rows."""
    chosen = draw(st.dictionaries(st.sampled_from(REFS), st.sampled_from(kinds) | st.just(GOOD), min_size=1))
    rows = [
        WriteBack(ref, "rejected", None, draw(values), draw(values), draw(instants)) for ref in sorted(chosen)
    ]
    return chosen, rows


def stored(row: WriteBack) -> tuple[Any, ...]:
    return row.source_ref, row.status, row.payroc_status, row.reason, row.updated_at.replace(microsecond=0)


def names_only_bad_rows(kinds: dict[str, str], not_written: Iterable[NotWritten]) -> bool:
    """Return whether exactly the bad rows are named, and without a word of the merchant's."""
    named = {item.source_ref: item.reason for item in not_written}
    return set(named) == bad_refs(kinds) and not any(
        word in reason for reason in named.values() for word in ("Brien", "55667788", "closed")
    )


def bad_refs(kinds: dict[str, str]) -> set[str]:
    return {ref for ref, kind in kinds.items() if kind in BAD}


def doubled_refs(kinds: dict[str, str]) -> dict[str, int]:
    return {ref: 2 for ref, kind in kinds.items() if kind == DOUBLED}


# -- Postgres, with the ledger ------------------------------------------------------------------------------


class Shop:
    """A ledger whose refunds are due, and a table with rows of each kind."""

    def __init__(self, world: World) -> None:
        self.engine = world.source_engine
        self.world = world
        for ref in REFS:
            world.approve(source_ref=ref)
        world.pull()
        with self.engine.begin() as connection:
            connection.exec_driver_sql(POSTGRES_TABLE)
        with world.ledger_engine.begin() as connection:
            connection.exec_driver_sql("SET session_replication_role = replica")
            connection.exec_driver_sql("UPDATE refund_ledger.refund_states SET written_back_at = updated_at")
        self._loop = asyncio.new_event_loop()
        self._ledger = Ledger(LedgerEngine(world.ledger_engine.url), world.settings, actor="test")

    def close(self) -> None:
        self._loop.run_until_complete(self._ledger.engine.dispose())
        self._loop.close()

    def prepare(self, kinds: dict[str, str], rows: Sequence[WriteBack]) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql("TRUNCATE refund_requests")
            as_json = [{"source_ref": ref, "kind": kind} for ref, kind in kinds.items()]
            connection.execute(PREPARE, {"kinds": json.dumps(as_json)})
        with self.world.ledger_engine.begin() as connection:
            connection.exec_driver_sql("SET session_replication_role = replica")
            connection.exec_driver_sql("TRUNCATE refund_ledger.write_back_notes")
            connection.exec_driver_sql("UPDATE refund_ledger.refund_states SET written_back_at = updated_at")
            for row in rows:
                connection.execute(CHANGE, {name: getattr(row, name) for name in CHANGE.compile().params})

    def write_back(self) -> WrittenBack:
        return self._loop.run_until_complete(write_back(self.world.source, self._ledger.write_backs))

    def due(self) -> set[str]:
        async def work() -> set[str]:
            lists = [
                await self._ledger.write_backs.due_write_backs(100, failed_before=failed)
                for failed in (False, True)
            ]
            return {item.source_ref for items in lists for item in items}

        return self._loop.run_until_complete(work())

    def written(self) -> list[tuple[Any, ...]]:
        query = """SELECT DISTINCT source_ref, status, payroc_status, reason, updated_at FROM refund_requests
            WHERE status IS NOT NULL OR updated_at IS NOT NULL"""
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.exec_driver_sql(query)]


def every_row_is_written_exactly_or_named_and_due(shop: Shop) -> None:
    @settings(report_multiple_bugs=False)
    @given(cases((*BAD, DOUBLED)))
    def check(case: tuple[dict[str, str], list[WriteBack]]) -> None:
        kinds, rows = case
        good = [row for row in rows if row.source_ref not in bad_refs(kinds)]
        shop.prepare(kinds, rows)
        # The second one has nothing new to write, and finds the bad rows again.
        for written, doubled in ((len(good), doubled_refs(kinds)), (0, {})):
            done = shop.write_back()
            assert (done.written, done.doubled) == (written, doubled)
            assert names_only_bad_rows(kinds, done.not_written.values())
            assert done.trouble is None or not good
            assert shop.due() == bad_refs(kinds)
            assert sorted(shop.written()) == sorted(map(stored, good))

    check()


@pytest.fixture
def shop(world: World) -> Iterator[Shop]:
    shop = Shop(world)
    yield shop
    shop.close()


def test_every_row_is_written_exactly_or_named_and_due_in_postgres(shop: Shop) -> None:
    every_row_is_written_exactly_or_named_and_due(shop)


# -- SQLite, without the ledger -----------------------------------------------------------------------------


class Till:
    """A table in SQLite with rows of each kind."""

    def __init__(self, path: Path) -> None:
        self.source = SqlSource(create_engine(f"sqlite:///{path}"))
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.executescript(f"""
            PRAGMA synchronous = off;
            CREATE TABLE refund_requests (
                source_ref text, status text, payroc_refund_id text, payroc_status text, reason text,
                updated_at text, kind text, CHECK (kind <> 'check' OR status IS NULL));
            CREATE TRIGGER odd BEFORE UPDATE ON refund_requests WHEN NEW.kind = 'trigger'
                BEGIN SELECT RAISE(ABORT, "{WORDS}"); END;""")

    def close(self) -> None:
        self._connection.close()

    def prepare(self, kinds: dict[str, str]) -> None:
        self._connection.execute("DELETE FROM refund_requests")
        self._connection.executemany(
            "INSERT INTO refund_requests (source_ref, kind) VALUES (?, ?)",
            [item for item in kinds.items() for _ in range({"gone": 0, DOUBLED: 2}.get(item[1], 1))],
        )

    def written(self) -> list[tuple[Any, ...]]:
        return self._connection.execute(
            "SELECT DISTINCT source_ref, status, payroc_status, reason FROM refund_requests "
            "WHERE status IS NOT NULL"
        ).fetchall()


def every_row_is_written_exactly_or_named(till: Till) -> None:
    @settings(report_multiple_bugs=False)
    @given(cases((*SQLITE_BAD, DOUBLED)))
    def check(case: tuple[dict[str, str], list[WriteBack]]) -> None:
        kinds, rows = case
        good = [row for row in rows if row.source_ref not in bad_refs(kinds)]
        till.prepare(kinds)
        for _ in range(2):
            updated = asyncio.run(till.source.write_back(rows))
            assert sorted(updated.written, key=rows.index) == good
            assert updated.doubled == doubled_refs(kinds)
            assert names_only_bad_rows(kinds, updated.not_written)
            assert sorted(till.written()) == sorted(stored(row)[:-1] for row in good)

    check()


@pytest.fixture
def till(tmp_path: Path) -> Iterator[Till]:
    till = Till(tmp_path / "till.db")
    yield till
    till.close()


def test_every_row_is_written_exactly_or_named_in_sqlite(till: Till) -> None:
    every_row_is_written_exactly_or_named(till)


# -- planted mistakes ---------------------------------------------------------------------------------------


def count_together(counts: Any) -> Any:
    """As many rows touched as there are refunds: then each is taken for written."""

    def mistaken(self: Any, connection: Any, rows: Sequence[WriteBack]) -> list[int]:
        found = counts(self, connection, rows)
        return [1] * len(rows) if sum(found) == len(rows) else found

    return mistaken


def refuse_all(refused: Any) -> Any:
    """One refused row is taken for the refusal of its whole batch."""

    def mistaken(self: Any, rows: Sequence[WriteBack], error: Exception) -> None:
        for row in rows:
            self._done.not_written.append(NotWritten(row.source_ref, "refused"))

    return mistaken


def lose_one(split: Any) -> Any:
    """The last row of a batch that is split is forgotten."""
    return lambda rows, pieces: split(rows[:-1] if len(rows) > 2 else rows, pieces)


def quote_the_driver(describe: Any) -> Any:
    """The reason is what the driver says."""
    return lambda error: dataclasses.replace(describe(error), meaning=str(error))


@pytest.mark.parametrize(
    ("owner", "name", "mistake"),
    [
        (source_update._Update, "_counts", count_together),
        (source_update._Update, "_refused", refuse_all),
        (source_update, "_split", lose_one),
        (source_update, "describe", quote_the_driver),
    ],
    ids=["counted together", "one refusal for all", "a row is lost", "the driver is quoted"],
)
def test_the_property_finds_a_planted_mistake(
    till: Till, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, mistake: Callable[[Any], Any]
) -> None:
    monkeypatch.setattr(owner, name, mistake(getattr(owner, name)))
    with pytest.raises(AssertionError):
        every_row_is_written_exactly_or_named(till)


def test_the_property_finds_that_a_refused_row_is_noted_as_written(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = WriteBacks.mark_written_back

    async def mark_all(self: WriteBacks, holder: str, written: Any, not_written: Any) -> None:
        refused = {item.source_ref for item in not_written}
        due = await self.due_write_backs(100)
        await mark(
            self, holder, [*written, *(item for item in due if item.source_ref in refused)], not_written
        )

    monkeypatch.setattr(WriteBacks, "mark_written_back", mark_all)
    with pytest.raises(AssertionError):
        every_row_is_written_exactly_or_named_and_due(shop)
