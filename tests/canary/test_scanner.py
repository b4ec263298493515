"""The scanner finds what was planted, in whatever form, and nothing else."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import URL

from demo.postgres import PostgresServer
from tests.canary.payees import WORD_LENGTH, Mint
from tests.canary.scanner import Scanner, files, tables, texts

BEARER_TOKEN = "eyJhbGciOiJub25lIn0.eyJpc3MiOiJ4In0.uW3Zt0S_9hJ2mQ-4kYp8vN1xR6bC5dF7gH0jL3nT2eA"
API_KEY = "9f3c1e7ab2d4586071c8e5a9b3d2f4061728394a5b6c7d8e"

mint = Mint(seed=1)
payees = [mint.payee(by_token=number % 5 == 0) for number in range(50)]
PLANTED = {
    "account number": mint.account_numbers[7],
    "name": mint.names[8],
    "e-mail": mint.emails[9],
    "secure token": mint.secure_tokens[3],
    "bearer token": BEARER_TOKEN,
    "API key": API_KEY,
}


@pytest.fixture
def scanner() -> Scanner:
    scanner = Scanner(WORD_LENGTH)
    scanner.add_numbers("account number", mint.account_numbers)
    scanner.add_numbers("secure token", mint.secure_tokens)
    scanner.add_words("name", mint.names)
    scanner.add_words("e-mail", mint.emails)
    scanner.add_secrets("bearer token", [BEARER_TOKEN])
    scanner.add_secrets("API key", [API_KEY])
    return scanner


def as_base64(offset: int, urlsafe: bool = False) -> Callable[[str], str]:
    encode = base64.urlsafe_b64encode if urlsafe else base64.b64encode
    return lambda value: encode(b"\xfb" * offset + value.encode() + b'", "more": 1}').decode()


ENCODINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in quotes": json.dumps,
    "after an escaped line end": lambda value: json.dumps(f"Payee:\n{value}\tend"),
    "between digits and letters": lambda value: f"000{value}000" if value.isdigit() else f"x1{value}1x",
    "in JSON in JSON": lambda value: json.dumps(json.dumps({"value": value})),
    "JSON-escaped": lambda value: "".join(f"\\u{ord(letter):04x}" for letter in value),
    "as Python's bytes": lambda value: "".join(f"\\x{ord(letter):02x}" for letter in value),
    "URL-encoded": lambda value: f"/refunds?filter={quote(value, safe='')}&limit=1",
    "URL-encoded throughout": lambda value: "".join(f"%{ord(letter):02X}" for letter in value),
    "in hex": lambda value: value.encode().hex(),
    "in hex after an odd digit": lambda value: f"7{value.encode().hex().upper()}",
    "in hex between odd digits": lambda value: f"7{value.encode().hex()}7",
    "in base64": as_base64(0),
    "in base64 at the second offset": as_base64(1),
    "in base64 at the third offset": as_base64(2),
    "in URL-safe base64": as_base64(1, urlsafe=True),
    "in base64 after other characters": lambda value: f"ab{as_base64(0)(value)}",
    "in hex of base64": lambda value: as_base64(1)(value).encode().hex(),
    "in capitals or small letters": lambda value: value.upper() if " " in value or "@" in value else value,
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_planted_value_is_found_in_every_encoding(scanner: Scanner, kind: str, encoding: str) -> None:
    text = f"first line\nDEBUG payee={ENCODINGS[encoding](PLANTED[kind])} done\n"
    leaks = scanner.scan(texts({"a log": text}))
    assert {leak.needle.kind for leak in leaks} == {kind}
    assert {leak.place for leak in leaks} == {"line 2"}


@pytest.mark.parametrize(
    "form", ["{routing}/{account}", "{routing}{account}", "{routing} {account}", "{account}{routing}"]
)
def test_an_account_number_is_found_beside_its_routing_number(scanner: Scanner, form: str) -> None:
    payee = payees[7]
    text = form.format(routing=payee.routing_number, account=payee.account_number)
    assert [leak.needle.kind for leak in scanner.scan(texts({"a log": text}))] == ["account number"]


@pytest.mark.parametrize("name", ["md5", "sha1", "sha256"])
def test_an_unkeyed_hash_of_an_account_number_is_found(scanner: Scanner, name: str) -> None:
    digest = hashlib.new(name, mint.account_numbers[7].encode()).hexdigest()
    assert [leak.needle.kind for leak in scanner.scan(texts({"a log": f"fingerprint={digest}"}))] == [
        f"{name} of account number"
    ]


@pytest.mark.parametrize(
    "text",
    [
        f"payee ****{mint.account_numbers[7][-4:]}",
        f"payee {mint.account_numbers[7][:-1]} cut off",
        f"payee {Mint(seed=2).payee().account_number}",
        f"payee {Mint(seed=2).payee().name} <{Mint(seed=2).payee().email}>",
        f"Bearer {BEARER_TOKEN.rpartition('.')[0]}.***",
        f"x-api-key: {API_KEY[:8]}…",
        hashlib.sha256(b"anything else").hexdigest(),
    ],
)
def test_what_only_resembles_a_value_is_not_found(scanner: Scanner, text: str) -> None:
    assert scanner.scan(texts({"a log": text})) == []


def test_a_leak_is_told_by_kind_number_and_place_and_never_by_its_value(scanner: Scanner) -> None:
    [leak] = scanner.scan(texts({"task.log": f"one\ntwo\n{PLANTED['account number']}"}))
    assert str(leak) == "account number 7 in task.log, line 3"


@pytest.mark.parametrize("kind", PLANTED)
def test_leaks_in_files_are_found_packed_ones_and_names_of_files_included(
    scanner: Scanner, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "logs" / "clean.log").write_text("nothing here\n")
    (tmp_path / "logs" / "run" / "attempt=1.log").write_text(f'{{"event":"paying {PLANTED[kind]}"}}\n')
    (tmp_path / "logs" / "old.log.gz").write_bytes(gzip.compress(f"\npaying {PLANTED[kind]}".encode()))
    (tmp_path / f"dump {PLANTED[kind]}").touch()
    leaks = scanner.scan(files(tmp_path))
    assert {leak.needle.kind for leak in leaks} == {kind}
    assert {leak.artefact for leak in leaks} == {
        "the names of files",
        "logs/run/attempt=1.log",
        "logs/old.log.gz",
    }


@pytest.fixture(scope="module")
def database(postgres: PostgresServer) -> URL:
    postgres.create_database("canary_scanner")
    with postgres.connect("canary_scanner") as connection:
        connection.execute("CREATE SCHEMA ledger")
        connection.execute(
            "CREATE TABLE ledger.found (id int, said text, detail jsonb, raw bytea, list text[])"
        )
        connection.execute("CREATE TABLE xcom (key text, value jsonb)")
    return postgres.url("canary_scanner")


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize(
    ("table", "column", "store"),
    [
        ("ledger.found", "said", lambda value: f"refused\n{value}\tat once"),
        ("ledger.found", "detail", lambda value: json.dumps({"errors": [{"input": value}]})),
        ("ledger.found", "raw", lambda value: json.dumps({"accountNumber": value}).encode()),
        ("ledger.found", "raw", lambda value: base64.urlsafe_b64encode(value.encode())),
        ("ledger.found", "list", lambda value: ["one", value]),
        ("public.xcom", "value", lambda value: json.dumps({"return_value": json.dumps([value])})),
    ],
    ids=["text", "jsonb", "bytea", "base64 in bytea", "array", "xcom"],
)
def test_leaks_in_a_database_are_found_by_table_row_and_column(
    scanner: Scanner,
    postgres: PostgresServer,
    database: URL,
    kind: str,
    table: str,
    column: str,
    store: Callable[[str], object],
) -> None:
    with postgres.connect("canary_scanner") as connection:
        for name in ("ledger.found", "public.xcom"):
            connection.execute(f"TRUNCATE {name}")
            connection.execute(f"INSERT INTO {name} DEFAULT VALUES")
        connection.execute(f"INSERT INTO {table} ({column}) VALUES (%s)", [store(PLANTED[kind])])
    leaks = scanner.scan(tables(database))
    assert {leak.needle.kind for leak in leaks} == {kind}
    assert {(leak.artefact, leak.place) for leak in leaks} == {(f"table {table}", f"row 2, column {column}")}
