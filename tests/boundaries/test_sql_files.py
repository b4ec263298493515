"""The two SQL files: what they may hold, and the sentence for what they may not."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine, text

from include.refunds.ledger import WriteBack
from include.refunds.source import COLUMNS, SourceError, SqlSource
from include.refunds.sql_text import Parameter, SqlTextError, read_statement
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world


def select(column: str, more: str = "") -> str:
    """Return a query of one row with every wanted column, NULL but for this description."""
    others = ", ".join(f"NULL AS {name}" for name in COLUMNS if name != "description")
    return f"SELECT {column} AS description, {others}{more}"


@pytest.fixture
def engine(source_url: URL) -> Engine:
    return create_engine(source_url)


def rows(engine: Engine, folder: Path, query: str | bytes) -> list[dict[str, Any]]:
    file = folder / "select_approved.sql"
    file.write_bytes(query if isinstance(query, bytes) else query.encode())
    return [dict(row) for row in asyncio.run(SqlSource(engine, select_approved=file).select_approved())]


def written(engine: Engine, folder: Path, update: str | bytes, source_ref: str = "RF-1") -> list[str]:
    file = folder / "write_back.sql"
    file.write_bytes(update if isinstance(update, bytes) else update.encode())
    row = WriteBack(
        source_ref=source_ref,
        status="accepted",
        payroc_refund_id="JD80BRUT1T",
        payroc_status="ready",
        reason=None,
        updated_at=datetime(2026, 11, 2, 14, 30, tzinfo=UTC),
    )
    updated = asyncio.run(SqlSource(engine, write_back=file).write_back([row]))
    return [item.source_ref for item in updated.not_written]


def refused(engine: Engine, folder: Path, query: str | bytes) -> str:
    with pytest.raises(SourceError) as caught:
        rows(engine, folder, query)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- colons ------------------------------------------------------------------------------------------------

LITERALS = {
    """'{"ok":true}'""": '{"ok":true}',
    "'(?:a|b)'": "(?:a|b)",
    "'https://shop.example:8080/a'": "https://shop.example:8080/a",
    "'at :time, or 10:30:00'": "at :time, or 10:30:00",
    "'it''s :terminal'": "it's :terminal",
    "'100% of :all, %s, %(source_ref)s'": "100% of :all, %s, %(source_ref)s",
    r"E'it\'s :terminal'": "it's :terminal",
    "$$ :a 'b' $$": " :a 'b' ",
    "$do$ $$ :a $$ $do$": " $$ :a $$ ",
    "U&'d\\0061t :x'": "dat :x",
    "'a'::text": "a",
    "CAST(10 AS text)::text::varchar": "10",
    "((ARRAY['a', 'b'])[:1])[1]": "a",
    "((ARRAY['a', 'b'])[1:1])[1]": "a",
    r"'{\:ok}'": "{:ok}",
    r"'{\\:ok}'": r"{\:ok}",
    '(SELECT "a:b" FROM (SELECT 7 AS "a:b") AS t)::text': "7",
    "'a' -- see :terminal\n": "a",
    "'a' /* :x /* :y */ 'z :w' */": "a",
    "'a' -- it's\n": "a",
}


@pytest.mark.parametrize(("literal", "value"), LITERALS.items(), ids=range(len(LITERALS)))
def test_colons_in_literals_names_and_comments_are_no_parameters(
    engine: Engine, tmp_path: Path, literal: str, value: str
) -> None:
    assert rows(engine, tmp_path, select(literal))[0]["description"] == value


MYSQL_LITERALS = {
    r"'it\'s :terminal'": "it's :terminal",
    r"'C\\'": "C\\",
    r"'a\:b'": "a:b",
    r"'a\\:b'": r"a\:b",
    '"say :it"': "say :it",
    "'a' # see :terminal, it's\n": "a",
    "'a' -- see :terminal, it's\n": "a",
    "(SELECT `a:b` FROM (SELECT 'x' AS `a:b`) AS t)": "x",
    """'{"ok":true} 100% %s %(source_ref)s'""": '{"ok":true} 100% %s %(source_ref)s',
    "(@a:='x')": "x",
}


@pytest.mark.parametrize(("literal", "value"), MYSQL_LITERALS.items(), ids=range(len(MYSQL_LITERALS)))
def test_mysql_literals_and_comments_hold_no_parameters(
    mysql_url: URL, tmp_path: Path, literal: str, value: str
) -> None:
    assert rows(create_engine(mysql_url), tmp_path, select(literal))[0]["description"] == value


SQLITE_LITERALS = {
    "'{\"ok\":true} 100% ? %s'": '{"ok":true} 100% ? %s',
    "'C:\\' || ':x'": "C:\\:x",
    "(SELECT [a:b] FROM (SELECT 'x' AS [a:b]))": "x",
    "'a' --:x ?\n": "a",
}


@pytest.mark.parametrize(("literal", "value"), SQLITE_LITERALS.items(), ids=range(len(SQLITE_LITERALS)))
def test_sqlite_literals_and_comments_hold_no_parameters(tmp_path: Path, literal: str, value: str) -> None:
    assert rows(create_engine("sqlite://"), tmp_path, select(literal))[0]["description"] == value


def test_a_word_after_a_colon_in_the_query_is_refused_with_the_remedy(engine: Engine, tmp_path: Path) -> None:
    refusal = refused(engine, tmp_path, select("'a'", "\nWHERE 'x' <> :terminal"))
    assert refusal == (
        "select_approved.sql names the parameter :terminal in line 2, but it takes none: write the value, "
        "or `\\:terminal` for a colon that is meant as such."
    )


def test_a_slice_up_to_a_column_is_refused_with_the_remedy_which_works(
    engine: Engine, tmp_path: Path
) -> None:
    query = select("(t.tags[{}n])[1]", " FROM (SELECT ARRAY['a', 'b'] AS tags, 1 AS n) AS t")
    assert r"`\:n`" in refused(engine, tmp_path, query.format(":"))
    assert rows(engine, tmp_path, query.format("\\:"))[0]["description"] == "a"


@pytest.mark.parametrize(
    "update",
    [
        "-- it's :terminal\nUPDATE refund_requests SET status = :status WHERE source_ref = :source_ref",
        "UPDATE refund_requests SET status = :status, reason = '{\"ok\":true}'\n"
        "WHERE source_ref = :source_ref;\n-- :x",
        "UPDATE refund_requests SET status = :status, updated_at = :updated_at::text::timestamptz\n"
        "WHERE source_ref=:source_ref",
    ],
)
def test_the_update_takes_parameters_in_its_code_alone(world: World, tmp_path: Path, update: str) -> None:
    ref = world.approve()
    assert written(world.source_engine, tmp_path, update, ref) == []
    assert world.source_row(ref)["status"] == "accepted"


def test_an_unknown_parameter_of_the_update_is_named_with_the_known_ones(
    engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as caught:
        written(engine, tmp_path, "UPDATE t SET a = :state\nWHERE r = :source_ref AND tags[:n] = 'x'")
    assert str(caught.value) == (
        "write_back.sql names the unknown parameters :state and :n: it may use :source_ref, :status, "
        ":payroc_refund_id, :payroc_status, :reason and :updated_at; write `\\:state` for a colon that "
        "is meant as such."
    )


def test_an_update_without_the_reference_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^write_back\.sql does not use the parameter :source_ref"):
        written(engine, tmp_path, "UPDATE t SET a = :status WHERE r = ':source_ref' -- :source_ref")


# -- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_in_utf_8_is_read_with_or_without_its_mark(
    engine: Engine, tmp_path: Path, encoding: str
) -> None:
    query = select("'Größe 😀'").encode(encoding)
    assert rows(engine, tmp_path, query)[0]["description"] == "Größe 😀"


UNREADABLE = {
    "UTF-16": (select("'é'").encode("utf-16"), "is in UTF-16: save it as UTF-8"),
    "UTF-16 without a mark": (select("'a'").encode("utf-16-le"), "is in UTF-16: save it as UTF-8"),
    "UTF-32": (select("'a'").encode("utf-32"), "is in UTF-32: save it as UTF-8"),
    "Windows-1252": (b"-- 1\n" + select("'é'").encode("cp1252"), "is not UTF-8 in line 2: save it as UTF-8"),
    "NUL": (select("'a\0b'").encode(), "has a character in line 1 that no SQL holds (U+0000): remove it"),
    "a blank of a web page": (
        select("'a'\u00a0").encode(),
        "has a character in line 1 that is no SQL outside of quotes (U+00A0): write a plain blank",
    ),
    "an invisible mark": (
        b"SELECT\n" + select("\ufeff'a'").encode(),
        "has a character in line 2 that is no SQL outside of quotes (U+FEFF): remove it",
    ),
    "empty": (b"", "holds no statement: write one SQL statement into it"),
    "blanks": (b"\xef\xbb\xbf \r\n\t", "holds no statement: write one SQL statement into it"),
    "comments": (b"-- nothing\n/* yet */ ;", "holds no statement: write one SQL statement into it"),
    "two statements": (
        (select("'a;b'") + ";\n" + select("'c'")).encode(),
        "holds several statements, the second in line 2: keep one",
    ),
    "an open quote": (
        select("'a'", "\nWHERE 'x = 1").encode(),
        "has a quote in line 2 that is never closed: close it",
    ),
    "an open comment": (
        select("'a'", " /* b").encode(),
        "has a comment in line 1 that is never closed: close it",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), UNREADABLE.values(), ids=UNREADABLE)
def test_another_file_is_refused_in_one_sentence(
    engine: Engine, tmp_path: Path, content: bytes, sentence: str
) -> None:
    assert refused(engine, tmp_path, content) == f"select_approved.sql {sentence}."


def test_a_file_that_is_missing_or_a_folder_is_refused(engine: Engine, tmp_path: Path) -> None:
    for path in (tmp_path / "none.sql", tmp_path):
        with pytest.raises(SourceError, match="can't be read"):
            asyncio.run(SqlSource(engine, select_approved=path).select_approved())


def test_one_semicolon_at_the_end_is_fine_with_comments_behind_it(engine: Engine, tmp_path: Path) -> None:
    query = select("'a'") + " ; -- the end; really\n/* ; */ "
    assert len(rows(engine, tmp_path, query)) == 1


def test_a_statement_that_returns_no_rows_is_refused(engine: Engine, tmp_path: Path) -> None:
    assert (
        refused(engine, tmp_path, "UPDATE refund_requests SET status = 'a' WHERE false")
        == "select_approved.sql returns no rows: give a SELECT."
    )


# -- columns -----------------------------------------------------------------------------------------------


def test_a_wanted_column_that_comes_twice_is_refused_before_a_row_is_used(
    engine: Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE orders (order_ref text, amount bigint, account_number text, shipped text)")
        )
    query = "SELECT r.*, o.* FROM refund_requests r JOIN orders o ON o.order_ref = r.order_id"
    assert refused(engine, tmp_path, query) == (
        "select_approved.sql returns amount and account_number more than once: keep one of each, "
        "by naming the columns in place of a *."
    )


@pytest.mark.parametrize("twice", ["4999 AS amount", '4999 AS "AMOUNT"', '4999 AS "Amount"'])
def test_a_column_that_comes_twice_is_refused_in_any_spelling(
    engine: Engine, tmp_path: Path, twice: str
) -> None:
    assert "returns amount more than once" in refused(engine, tmp_path, select("'a'", f", {twice}"))


def test_columns_nobody_wants_may_come_twice_and_stay_out(engine: Engine, tmp_path: Path) -> None:
    (row,) = rows(engine, tmp_path, select("'a'", ', 1 AS other, 2 AS other, 3 AS "Other"'))
    assert set(row) == set(COLUMNS)


def test_names_in_capitals_are_the_same_columns(tmp_path: Path) -> None:
    (row,) = rows(create_engine("sqlite://"), tmp_path, select("'a'").upper())
    assert row["description"] == "A"


def test_a_missing_column_is_named(engine: Engine, tmp_path: Path) -> None:
    query = select("'a'").replace("NULL AS amount, ", "").replace("NULL AS email, ", "")
    assert refused(engine, tmp_path, query) == (
        "select_approved.sql does not return amount and email: add the columns, or NULL AS amount."
    )


# -- databases that are not known here ---------------------------------------------------------------------


def test_an_unknown_database_takes_what_all_known_ones_read_alike() -> None:
    sql = "SELECT 'a:b', \"c:d\" -- it is :e\nFROM t WHERE u = :source_ref"
    for dialect in ("postgresql", "mysql", "sqlite", "oracle"):
        parameters = [piece for piece in read_statement(sql, dialect) if isinstance(piece, Parameter)]
        assert [parameter.name for parameter in parameters] == ["source_ref"]


@pytest.mark.parametrize("literal", ["$$ :x $$", "1 --:x\n", "1 # :x\n"], ids=["dollars", "dashes", "hash"])
def test_an_unknown_database_refuses_what_they_read_differently(literal: str) -> None:
    with pytest.raises(
        SqlTextError, match=r"^has :x in line 1, which .* depending on the database: write `\\:x`"
    ):
        read_statement(f"SELECT {literal} FROM t", "oracle")
