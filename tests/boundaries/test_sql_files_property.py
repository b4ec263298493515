"""Any file is one statement or a refusal by name, and what a literal says reaches the database as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import StatementError

from demo.postgres import PostgresServer
from include.refunds import sql_files, sql_text
from include.refunds.source_errors import SourceError
from include.refunds.sql_files import read_sql
from tests.support.mariadb import MariaDbServer

DIALECTS = ("postgresql", "mysql", "sqlite", "oracle")
PARAMETERS = ("source_ref", "status")

Phases = Sequence[Phase]
ALL = tuple(Phase)
# That a property goes red is enough; the smallest example of a planted mistake costs seconds.
WITHOUT_SHRINKING = (Phase.generate,)
WENT_WRONG = (AssertionError, SourceError, StatementError)

# Many of the characters that begin, end or escape something, and few others.
SYNTAX = "'\"`$[]-#/*\\:;%?{}(),.=&eEuUx1_ \t\n"
sql_like = st.text(alphabet=st.sampled_from(SYNTAX) | st.characters(exclude_categories=["Cs"]))
contents = (
    st.binary()
    | sql_like.map(str.encode)
    | sql_like.map(lambda sql: b"\xef\xbb\xbfSELECT " + sql.encode())
    | sql_like.map(lambda sql: f"UPDATE t SET {sql} = :status WHERE r = :source_ref".encode())
    | st.tuples(sql_like, st.sampled_from(["utf-16", "utf-16-le", "utf-32", "cp1252", "utf-7"])).map(
        lambda pair: pair[0].encode(pair[1], errors="replace")
    )
)


def any_file_is_a_statement_or_a_refusal(folder: Path, phases: Phases = ALL) -> None:
    @settings(phases=phases)
    @given(contents, st.sampled_from(DIALECTS))
    def check(content: bytes, dialect: str) -> None:
        file = folder / "write_back.sql"
        file.write_bytes(content)
        try:
            sql = read_sql(file, dialect, PARAMETERS, required="source_ref")
        except SourceError as error:
            sentence = str(error)
        else:
            assert set(text(sql.text).compile().params) == sql.parameters <= set(PARAMETERS)
            sentence = "write_back.sql is one statement."
        assert re.fullmatch(r"write_back\.sql [^\n]{10,400}\.", sentence)

    check()


# -- literals ----------------------------------------------------------------------------------------------

values = st.lists(
    st.sampled_from([*SYNTAX, ":x", ":status", r"\:x", r"\\:", "::text", "it's", "--", "/*"])
    | st.characters(exclude_characters="\0\r", codec="utf-8"),
    max_size=12,
).map("".join)
Expression = tuple[str, str]


def plain(value: str) -> str:
    """
    Return what a literal without backslash escapes means: a backslash before a colon is the file's own
    escape.
    """
    return value.replace("\\:", ":")


def standard(value: str) -> Expression:
    return "'" + value.replace("'", "''") + "'", plain(value)


def backslashed(value: str) -> Expression:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'", value


def e_string(value: str) -> Expression:
    return "E" + backslashed(value)[0], value


def dollars(value: str) -> Expression:
    value = value.replace("$", "")
    return f"$q${value}$q$", plain(value)


def double_quoted(value: str) -> Expression:
    return '"' + value.replace("\\", "\\\\").replace('"', '""') + '"', value


def name_in(quotes: str) -> Callable[[str], Expression]:
    def named(value: str) -> Expression:
        name = re.sub(r"[^ -~]|[\\.]", "", value.replace(quotes[-1], quotes[-1] * 2)).strip()
        name = name if quotes != "[]" else name.replace("]", "")
        quoted = f"{quotes[0]}n{name}{quotes[-1]}"
        return f"(SELECT {quoted} FROM (SELECT 'v' AS {quoted}) AS t)", "v"

    return named


def line_comment(mark: str) -> Callable[[str], Expression]:
    return lambda value: (f"'a' {mark} " + value.replace("\n", " ") + "\n", "a")


def block_comment(value: str) -> Expression:
    return "'a' /* " + value.replace("*", "") + " */", "a"


def nested_comment(value: str) -> Expression:
    inner = value.replace("*", "")
    return f"'a' /* {inner} /* {inner} */ {inner} */", "a"


def parameter(value: str) -> Expression:
    return "CAST(:status AS char(8))", "accepted"


COMMON = [standard, line_comment("--"), block_comment, parameter]
EXPRESSIONS = {
    "postgresql": [*COMMON, e_string, dollars, name_in('"'), nested_comment],
    "mysql": [backslashed, double_quoted, name_in("`"), line_comment("#"), *COMMON[1:]],
    "sqlite": [*COMMON, name_in('"'), name_in("`"), name_in("[]")],
}


def literals_reach_the_database_as_they_are(
    connection: Connection, folder: Path, phases: Phases = ALL
) -> None:
    dialect = connection.dialect.name
    expressions = st.builds(lambda make, value: make(value), st.sampled_from(EXPRESSIONS[dialect]), values)

    @settings(phases=phases, report_multiple_bugs=False)
    @given(st.lists(expressions, min_size=1, max_size=6))
    def check(parts: list[Expression]) -> None:
        file = folder / "select_approved.sql"
        file.write_text("SELECT " + ",\n".join(sql for sql, _ in parts) + " ;\n-- :x", encoding="utf-8")
        sql = read_sql(file, dialect, PARAMETERS)
        given_values = dict.fromkeys(sql.parameters, "accepted")
        row = connection.execute(text(sql.text), given_values).one()
        assert [str(value).rstrip() for value in row] == [meant.rstrip() for _, meant in parts]

    check()


@pytest.fixture(scope="module")
def on_postgres(postgres: PostgresServer) -> Iterator[Connection]:
    with create_engine(postgres.url("postgres"), isolation_level="AUTOCOMMIT").connect() as connection:
        yield connection


@pytest.fixture(scope="module")
def on_mariadb(mariadb: MariaDbServer) -> Iterator[Connection]:
    with create_engine(mariadb.new_database(), isolation_level="AUTOCOMMIT").connect() as connection:
        yield connection


@pytest.fixture(scope="module")
def on_sqlite() -> Iterator[Connection]:
    with create_engine("sqlite://").connect() as connection:
        yield connection


def test_any_file_is_a_statement_or_a_refusal(tmp_path: Path) -> None:
    any_file_is_a_statement_or_a_refusal(tmp_path)


def test_literals_reach_postgres_as_they_are(on_postgres: Connection, tmp_path: Path) -> None:
    literals_reach_the_database_as_they_are(on_postgres, tmp_path)


def test_literals_reach_mariadb_as_they_are(on_mariadb: Connection, tmp_path: Path) -> None:
    literals_reach_the_database_as_they_are(on_mariadb, tmp_path)


def test_literals_reach_sqlite_as_they_are(on_sqlite: Connection, tmp_path: Path) -> None:
    literals_reach_the_database_as_they_are(on_sqlite, tmp_path)


# -- planted mistakes --------------------------------------------------------------------------------------


POSTGRES = sql_text._BY_DIALECT["postgresql"]


@pytest.mark.parametrize(
    "rules",
    [
        replace(POSTGRES, escaped=r"(?!)"),
        replace(POSTGRES, quoted=sql_text._QUOTES),
        replace(POSTGRES, comment=r"(?!)"),
        replace(POSTGRES, nested_comments=False, comment=rf"{POSTGRES.comment}|/\*.*?\*/"),
    ],
    ids=["no E literals", "no names and dollars", "no comments", "no nested comments"],
)
def test_the_literals_property_finds_a_planted_mistake_in_the_rules(
    on_postgres: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: sql_text._Rules
) -> None:
    monkeypatch.setitem(sql_text._BY_DIALECT, "postgresql", rules)
    with pytest.raises(WENT_WRONG):
        literals_reach_the_database_as_they_are(on_postgres, tmp_path, WITHOUT_SHRINKING)


def test_the_literals_property_finds_a_planted_mistake_in_the_escapes(
    on_sqlite: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_files, "_NOT_AS_IT_IS", re.compile(r"(?!)"))
    with pytest.raises(WENT_WRONG):
        literals_reach_the_database_as_they_are(on_sqlite, tmp_path, WITHOUT_SHRINKING)


def test_the_file_property_finds_a_planted_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_files, "_decoded", lambda raw: raw.decode())
    with pytest.raises(UnicodeDecodeError):
        any_file_is_a_statement_or_a_refusal(tmp_path, WITHOUT_SHRINKING)
