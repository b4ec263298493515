"""No message, traceback, log line at DEBUG, representation or command shows bank data, tokens or keys, whatever goes wrong."""

from __future__ import annotations

import json
import logging
import os
import pickle
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from pydantic import ValidationError
from sqlalchemy import URL, create_engine, text

from demo.postgres import PostgresServer
from include.payroc.errors import PayrocConfigurationError, PayrocError
from include.payroc.models import Refund, RefundRequest
from include.refunds import cli
from include.refunds.ledger import LedgerError
from include.refunds.pull import build
from include.refunds.report import status_report
from include.refunds.rows import InvalidRow
from include.refunds.settings import get_settings
from include.refunds.source import SourceError, SqlSource
from include.refunds.write_back import write_back
from payroc_airflow import own_loop
from payroc_airflow.hooks.payroc import PayrocHook
from tests.canary import rows
from tests.canary.payees import WORD_LENGTH, Mint
from tests.canary.scanner import Scanner, texts
from tests.canary.story import WHO, keep_tokens
from tests.conftest import Sandbox
from tests.processes.line import Line, running
from tests.refunds.conftest import World

# How long calls that are meant to fail wait for an answer.
SHORT = 0.3


class Talk:
    """What was said: by loggers, on the screen, and by exceptions in every form."""

    def __init__(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self._capfd = capfd
        self._caplog = caplog
        self.said = {"standard output": "", "standard error": ""}
        self.errors = 0
        caplog.set_level(logging.DEBUG)
        # Airflow's loggers do not hand on to the root.
        for name in ("airflow", "airflow.task", "aiohttp.client", "asyncio", "httpx"):
            caplog.set_level(logging.DEBUG, logger=name)

    def note(self, what: str, said: object) -> None:
        self.said[f"{what} ({len(self.said)})"] = f"{said}\n{said!r}"

    @contextmanager
    def failing(self, what: str, *kinds: type[Exception]) -> Iterator[None]:
        """Let something fail, and note what its exception says; it may succeed as well."""
        try:
            yield
        except kinds as error:
            self.errors += 1
            logging.getLogger("canary").exception("%s failed: %s", what, error)
            self.note(what, error)
            self.note(f"{what}, arguments", error.args)
            self.note(f"{what}, attributes", vars(error))
            self.note(f"{what}, traceback", traceback.format_exc())
            if not isinstance(error, ValidationError):
                # Pydantic's own error keeps what it was given, as its documentation says; it is not handed on.
                self.note(f"{what}, pickled", pickle.dumps(error).decode("latin-1"))

    def heard(self) -> dict[str, str]:
        """Return all that was said until now."""
        out, err = self._capfd.readouterr()
        self.said["standard output"] += out
        self.said["standard error"] += err
        return self.said | {"log": self._caplog.text}


@pytest.fixture
def talk(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Talk:
    return Talk(capfd, caplog)


@pytest.fixture
def mint() -> Mint:
    return Mint(seed=20260102)


@pytest.fixture
def api_key() -> str:
    return secrets.token_hex(24)


@pytest.fixture
def line(sandbox: Sandbox) -> Iterator[Line]:
    """The line on which bearer tokens come."""
    with running(sandbox.url) as line:
        yield line


@pytest.fixture
def tokens(line: Line) -> list[str]:
    """Every bearer token that was issued."""
    return keep_tokens(line)


@pytest.fixture
def world(
    ledger_url: URL,
    source_url: URL,
    sandbox: Sandbox,
    line: Line,
    tokens: list[str],
    api_key: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[World]:
    """A merchant with keys of his own."""
    connection = {
        "conn_type": "payroc",
        "password": api_key,
        "host": sandbox.api_url,
        "extra": {"identity_url": line.url},
    }
    environment = {
        "AIRFLOW_CONN_PAYROC_DEFAULT": json.dumps(connection),
        "PAYROC_REFUNDS_ENCRYPTION_KEYS": f"{Fernet.generate_key().decode()},{Fernet.generate_key().decode()}",
        "PAYROC_REFUNDS_FINGERPRINT_KEY": secrets.token_urlsafe(48),
        "PAYROC_REFUNDS_TOKEN_CACHE_DIR": str(tmp_path / "tokens"),
        "PAYROC_REFUNDS_LEDGER_URL": ledger_url.render_as_string(hide_password=False),
        "PAYROC_REFUNDS_SOURCE_URL": source_url.render_as_string(hide_password=False),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    world = World(ledger_url, source_url, sandbox)
    yield world
    sandbox.delete("/_sandbox/faults")
    world.close()


@pytest.fixture
def assert_nothing_leaked(
    world: World, mint: Mint, talk: Talk, api_key: str, tokens: list[str], postgres: PostgresServer
) -> Callable[[], None]:
    """Return a function that searches everything that was said."""

    def check() -> None:
        settings = world.settings
        scanner = Scanner(WORD_LENGTH)
        scanner.add_numbers("account number", mint.account_numbers)
        scanner.add_numbers("secure token", mint.secure_tokens)
        scanner.add_words("name", mint.names)
        scanner.add_words("e-mail", mint.emails)
        scanner.add_secrets("bearer token", tokens)
        scanner.add_secrets("API key", [api_key])
        scanner.add_secrets("encryption key", [key.get_secret_value() for key in settings.encryption_keys])
        scanner.add_secrets(
            "fingerprint key",
            [settings.fingerprint_key.get_secret_value() if settings.fingerprint_key else ""],
        )
        scanner.add_secrets("database password", [postgres.password])
        heard = talk.heard()
        leaks = scanner.scan(texts(heard))
        assert not leaks, "\n".join(map(str, leaks[:30]))
        for number in mint.routing_numbers:
            assert not [what for what, said in heard.items() if number in said], "a routing number is shown"

    return check


def request_of(world: World, columns: dict[str, Any]) -> bytes:
    """Return the body for a source row."""
    row = world.source_row(world.approve(**columns))
    return build(row, world.cipher, world.settings, datetime.now(UTC))[1]


@pytest.mark.parametrize(
    "say",
    [
        lambda value: logging.getLogger("payroc_airflow.any").debug("paying %s", value),
        lambda value: logging.getLogger("airflow.task").debug("paying %s", value),
        lambda value: sys.stdout.write(value),
        lambda value: os.write(2, value.encode()),
    ],
    ids=["logger", "Airflow's logger", "standard output", "standard error"],
)
@pytest.mark.parametrize("kind", ["account", "name", "token"])
def test_what_is_said_anywhere_is_heard(
    mint: Mint,
    tokens: list[str],
    assert_nothing_leaked: Callable[[], None],
    say: Callable[[str], object],
    kind: str,
) -> None:
    payee = mint.payee()
    tokens.append(secrets.token_urlsafe(32))
    say({"account": payee.account_number, "name": payee.name, "token": tokens[-1]}[kind])
    with pytest.raises(AssertionError, match=kind):
        assert_nothing_leaked()


@pytest.mark.parametrize("place", ["message", "cause", "attribute"])
def test_what_an_exception_holds_is_heard(
    mint: Mint, talk: Talk, assert_nothing_leaked: Callable[[], None], place: str
) -> None:
    value = mint.payee().account_number
    error = PayrocError(
        "create refund",
        value if place == "message" else "refused",
        instance=value if place == "attribute" else None,
    )
    with talk.failing("planted", PayrocError):
        raise error from (ValueError(value) if place == "cause" else None)
    with pytest.raises(AssertionError, match="account number 0"):
        assert_nothing_leaked()


# -- calls to Payroc -------------------------------------------------------------------------------------------------------


def test_calls_that_go_wrong_in_every_way_show_nothing(
    world: World,
    mint: Mint,
    talk: Talk,
    tokens: list[str],
    assert_nothing_leaked: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A loop tells at DEBUG that it was made, and an earlier test may have made the process's own: that proves that the level is heard.
    monkeypatch.setattr(own_loop, "_own", own_loop._OwnLoop())
    patient, hook = PayrocHook(), PayrocHook(timeout_seconds=SHORT)
    token = patient.get_token()
    key = "8e03978e-40d5-43e8-bc93-6894a57f93{:02}"
    paid = patient.create_refund(
        request_of(world, mint.payee().columns()), idempotency_key=key.format(0), token=token
    )
    calls: dict[str, Callable[[int], object]] = {
        "create": lambda number: hook.create_refund(
            request_of(world, mint.payee(by_token=number % 2 == 0).columns()),
            idempotency_key=key.format(number),
            token=token,
        ),
        "get": lambda number: hook.get_refund(paid.refund_id, token=token),
        "list": lambda number: list(hook.list_refunds("7701001", token=token)),
        "reverse": lambda number: hook.reverse_refund(
            paid.refund_id, idempotency_key=key.format(50 + number), token=token
        ),
        "authorize": lambda number: hook.get_token(younger_than=0),
    }
    faults = [fault | ({"seconds": 2 * SHORT} if "seconds" in fault else {}) for fault in rows.FAULTS]
    for operation, call in calls.items():
        for number, fault in enumerate(
            [*faults, {"kind": "problem", "status": 400, "problem": "bad-request"}], start=1
        ):
            world.fault(None, operation=operation, **fault)
            with talk.failing(f"{operation}, {fault['kind']} {fault.get('when')}", PayrocError):
                talk.note(f"{operation}, answer", call(number))
    assert world.sandbox.get("/_sandbox/faults")["faults"] == []
    assert talk.errors >= len(calls) * (len(rows.FAULTS) - 4), "the calls did not fail"
    assert "DEBUG    asyncio" in talk.heard()["log"]
    assert len(tokens) > 1
    assert_nothing_leaked()


@pytest.mark.parametrize(
    "broken",
    [
        {"host": "ftp://payroc.example/v1"},
        {"host": "http://payroc.example/v1"},
        {"host": "https://user:{key}@payroc.example/v1"},
        {"extra": {"environment": "{key}"}},
        {"extra": {"proxy": "{key}"}},
        {"extra": {"nonsense": "{key}", "environment": "uat", "proxy": "http://user:{key}@127.0.0.1:1"}},
        {"extra": "{key}"},
        {"password": "{key} {key}"},
        {"port": "{key}"},
    ],
    ids=lambda broken: " ".join(broken),
)
def test_a_connection_that_can_not_be_used_does_not_show_its_key(
    world: World,
    talk: Talk,
    api_key: str,
    monkeypatch: pytest.MonkeyPatch,
    assert_nothing_leaked: Callable[[], None],
    broken: dict[str, Any],
) -> None:
    parts = {"conn_type": "payroc", "password": "{key}"} | broken
    forms = {
        "json": json.dumps(parts).replace("{key}", api_key),
        "uri": f"payroc://:{api_key}@payroc.example:port/v1?extra={api_key}",
    }
    for form, value in forms.items():
        monkeypatch.setenv("AIRFLOW_CONN_PAYROC_DEFAULT", value)
        with talk.failing(form, PayrocConfigurationError, PayrocError):
            talk.note("connection", PayrocHook()._connection)
            PayrocHook(timeout_seconds=SHORT).get_token()
        talk.note("the Test button", PayrocHook(timeout_seconds=SHORT).test_connection())
    assert talk.errors > 0
    assert_nothing_leaked()


# -- what is printed of objects --------------------------------------------------------------------------------------------


def test_no_object_shows_what_it_holds(
    world: World, mint: Mint, talk: Talk, assert_nothing_leaked: Callable[[], None]
) -> None:
    hook = PayrocHook()
    token = hook.get_token()
    for by_token in (False, True):
        body = request_of(world, mint.payee(by_token=by_token).columns())
        request = RefundRequest.model_validate_json(body)
        answer = {
            **json.loads(body),
            "refundId": "CD3HN88U9F",
            "bankAccount": {
                "type": "ach",
                "nameOnAccount": mint.name(),
                "accountNumber": mint.account_number(),
            },
            "transactionResult": {"type": "unreferencedRefund", "status": "ready", "responseCode": "A"},
        }
        refund = Refund.model_validate_json(json.dumps(answer))
        for model in (
            request,
            request.refund_method,
            request.customer,
            refund,
            refund.bank_account,
            refund.customer,
            token,
        ):
            assert model is not None
            talk.note(type(model).__name__, model)
            talk.note(type(model).__name__, model.model_dump())
            talk.note(type(model).__name__, model.model_dump_json())
    refund_id = world.released(**mint.payee().columns())
    sent = world.send(refund_id)
    ledgers, _, _ = world.run(world.ledger.refunds.read(refund_id))
    for thing in (
        sent,
        ledgers,
        hook,
        hook._connection,
        hook.__dict__,
        world.gateway,
        world.ledger,
        world.cipher,
        world.settings,
        world.source,
    ):
        talk.note(type(thing).__name__, thing)
    assert_nothing_leaked()


def test_rows_that_are_refused_are_explained_without_their_values(
    world: World, mint: Mint, talk: Talk, assert_nothing_leaked: Callable[[], None]
) -> None:
    for row in rows.invalid_rows(mint):
        with talk.failing("row", InvalidRow, ValidationError):
            build(row, world.cipher, world.settings, datetime.now(UTC))
        values = {name: value for name, value in row.items() if isinstance(value, str)}
        with talk.failing("model", ValidationError):
            method = {"type": "ach"} | {
                name: values.get(name) for name in ("account_number", "routing_number", "name_on_account")
            }
            RefundRequest.model_validate(
                values | {"refund_method": method, "order": values, "customer": values}
            )
    assert talk.errors > 40
    assert_nothing_leaked()


# -- databases that refuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    ["account_number::smallint", "name_on_account::integer", "email::timestamptz", "secure_token::smallint"],
)
def test_a_source_that_quotes_a_value_in_its_error_is_not_repeated(
    world: World,
    mint: Mint,
    talk: Talk,
    source_url: URL,
    tmp_path: Path,
    assert_nothing_leaked: Callable[[], None],
    cast: str,
) -> None:
    world.approve(**mint.payee(by_token=True).columns())
    world.approve(**mint.payee().columns())
    column = cast.partition("::")[0]
    select, update = tmp_path / "select.sql", tmp_path / "update.sql"
    select.write_text(f"SELECT *, {cast} AS cast FROM refund_requests WHERE {column} IS NOT NULL")
    update.write_text(
        f"UPDATE refund_requests SET reason = {cast} WHERE {column} IS NOT NULL OR source_ref = :source_ref"
    )
    source = SqlSource(world.source_engine, select_approved=select, write_back=update)
    world.pull()
    world.release()
    with talk.failing("select", SourceError):
        world.run(source.select_approved())
    done = world.run(write_back(source, world.ledger.write_backs))
    assert len(done.not_written) == 2
    talk.note("update", done)
    assert talk.errors == 1
    assert_nothing_leaked()


def test_a_source_that_quotes_a_row_in_its_error_is_not_repeated(
    world: World, mint: Mint, talk: Talk, assert_nothing_leaked: Callable[[], None]
) -> None:
    world.send(world.released(**mint.payee().columns()))
    with world.source_engine.begin() as connection:
        connection.execute(
            text("ALTER TABLE refund_requests ADD CONSTRAINT nothing_is_paid CHECK (status <> 'accepted')")
        )
    done = world.run(write_back(world.source, world.ledger.write_backs))
    assert len(done.not_written) == 1
    talk.note("write-back", done)
    talk.note("report", world.run(status_report(world.ledger.engine, world.settings.source)))
    assert_nothing_leaked()


def test_what_a_trigger_of_the_merchants_says_of_a_payee_is_not_repeated(
    world: World, mint: Mint, talk: Talk, assert_nothing_leaked: Callable[..., None]
) -> None:
    world.approve(**mint.payee().columns())
    with world.source_engine.begin() as connection:
        connection.exec_driver_sql("""
            CREATE FUNCTION block() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'payee %% is blocked', NEW.name_on_account; END $$;
            CREATE TRIGGER block BEFORE UPDATE ON refund_requests FOR EACH ROW EXECUTE FUNCTION block()""")
    world.pull()
    done = world.run(write_back(world.source, world.ledger.write_backs))
    assert len(done.not_written) == 1
    talk.note("update", done)
    talk.note("report", world.run(status_report(world.ledger.engine, world.settings.source)))
    assert_nothing_leaked()


def test_a_ledger_that_quotes_a_row_in_its_error_is_not_repeated(
    world: World, mint: Mint, talk: Talk, ledger_url: URL, assert_nothing_leaked: Callable[[], None]
) -> None:
    world.approve(**mint.payee().columns())
    engine = create_engine(ledger_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "ALTER TABLE refund_ledger.refund_instructions ADD CONSTRAINT nothing_comes_in CHECK (amount < 0) NOT VALID"
            )
        )
    try:
        with talk.failing("pull", LedgerError):
            world.pull()
    finally:
        with engine.begin() as connection:
            connection.execute(
                text("ALTER TABLE refund_ledger.refund_instructions DROP CONSTRAINT nothing_comes_in")
            )
        engine.dispose()
    assert talk.errors == 1
    assert_nothing_leaked()


# -- commands --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs a command in this process, and lets unforeseen errors be printed as Python prints them."""
    # Typer puts its own in place.
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(*arguments: str, **environment: str) -> int:
        get_settings.cache_clear()
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            patched.setattr(sys, "argv", ["refunds", *arguments])
            try:
                cli.main()
            except SystemExit as ended:
                return int(ended.code or 0)
            except Exception:  # noqa: BLE001 - whatever it is, it is printed
                sys.excepthook(*sys.exc_info())
                return 1
        return 0

    return run


def test_an_import_that_goes_wrong_quotes_no_line(
    world: World,
    mint: Mint,
    tmp_path: Path,
    command: Callable[..., int],
    postgres: PostgresServer,
    assert_nothing_leaked: Callable[[], None],
) -> None:
    lines = rows.single_rows(mint)
    good = rows.write_csv(tmp_path / "good.csv", lines)
    files = [
        rows.write_csv(tmp_path / "broken.csv", rows.broken_lines(mint)),
        rows.write_csv(tmp_path / "utf-16.csv", lines, encoding="utf-16-le"),
        tmp_path / "latin-1.csv",
        tmp_path / "endless field.csv",
        tmp_path / "more fields.csv",
        tmp_path / "fewer fields.csv",
    ]
    whole = good.read_text()
    files[2].write_bytes(whole.replace("returned", "zurückgegeben").encode("latin-1"))
    files[3].write_text(whole + f'"{mint.account_number()}' + "x" * 200_000)
    files[4].write_text(
        "".join(
            f"{line},{mint.account_number()}\n" if number else f"{line}\n"
            for number, line in enumerate(whole.splitlines())
        )
    )
    files[5].write_text(
        "".join(
            f"{line.rpartition(',')[0] if number else line}\n"
            for number, line in enumerate(whole.splitlines())
        )
    )
    for file in files:
        assert command("import", str(file)) != 0
    password = postgres.password
    for url in (
        f"mysql://u:{password}@h/x",
        f"postgresql://u:{password}@127.0.0.1:1/x",
        f"postgresql://u:{password}@h:port/x",
        password,
    ):
        assert command("import", str(good), "--source-url", url) != 0
    world.change_source(world.approve(), "name_on_account = NULL")
    with world.source_engine.begin() as connection:
        connection.execute(
            text("ALTER TABLE refund_requests ADD CONSTRAINT nobody CHECK (name_on_account IS NULL)")
        )
    assert command("import", str(good)) == 1
    assert_nothing_leaked()


def test_an_import_of_a_file_without_a_header_does_not_take_the_first_payee_for_one(
    mint: Mint, tmp_path: Path, command: Callable[..., int], assert_nothing_leaked: Callable[[], None]
) -> None:
    assert (
        command("import", str(rows.write_csv(tmp_path / "refunds.csv", rows.single_rows(mint), header=False)))
        == 2
    )
    assert_nothing_leaked()


def test_commands_that_are_used_wrongly_show_no_password_and_no_key(
    world: World,
    command: Callable[..., int],
    postgres: PostgresServer,
    api_key: str,
    assert_nothing_leaked: Callable[[], None],
) -> None:
    password = postgres.password
    key = world.settings.encryption_keys[0].get_secret_value()
    urls = [
        f"postgresql://u:{password}@127.0.0.1:1/x",
        f"postgresql://u:{password}@h:port/x",
        f"postgresql://postgres:{password}@127.0.0.1:{postgres.port}/no_such_database",
        f"postgresql://u:{password}@127.0.0.1:{postgres.port}/x?options={password}&nonsense={password}",
        f"mysql://u:{password}@h/x",
        f"{{'password': '{password}'}}",
        json.dumps({"conn_type": "postgres", "password": password, "port": password}),
        password,
    ]
    for url in urls:
        for arguments in (("status",), ("migrate",), ("show", "1"), ("pause", *WHO["ann"])):
            assert command(*arguments, PAYROC_REFUNDS_LEDGER_URL=url) == 2
        assert command("status", "--ledger-url", url) == 2
        assert command("status", PAYROC_REFUNDS_LEDGER_URL="", AIRFLOW_CONN_REFUNDS_LEDGER=url) == 2
    wrong = [
        {"PAYROC_REFUNDS_ENCRYPTION_KEYS": f"{key}x"},
        {"PAYROC_REFUNDS_ENCRYPTION_KEYS": ""},
        {"PAYROC_REFUNDS_FINGERPRINT_KEY": key[:31]},
        {"PAYROC_REFUNDS_RETRIES": key},
        {"AIRFLOW_CONN_PAYROC_DEFAULT": f'{{"password": "{api_key}"'},
        {"AIRFLOW_CONN_PAYROC_DEFAULT": f"payroc://:{api_key}@h:port/"},
    ]
    for environment in wrong:
        assert command("reissue", "1", *WHO["ann"], **environment) == 2
    for arguments in (
        ("show",),
        ("show", "--nonsense"),
        ("resolve", "x"),
        ("verify", "--from", "then", "--to", "now"),
        ("nonsense",),
    ):
        assert command(*arguments) == 2
    assert_nothing_leaked()


def test_commands_about_refunds_show_no_bank_data_whatever_payroc_answers(
    world: World,
    mint: Mint,
    talk: Talk,
    command: Callable[..., int],
    assert_nothing_leaked: Callable[[], None],
) -> None:
    paid, refused, odd = (
        world.released(ending, **mint.payee(ending).columns()) for ending in ("4321", "9002", "9013")
    )
    for refund_id in (paid, refused, odd):
        world.send(refund_id)
    row = world.row(paid)
    for which in (str(paid), row["source_ref"], row["order_id"], row["payroc_refund_id"]):
        assert command("show", which) == 0
        assert command("show", which, "--json") == 0
    today = ("verify", "--from", "2020-01-01", "--to", "2099-01-01")
    for arguments in (("status",), ("status", "--json"), today, (*today, "--json"), ("show", "no-such")):
        command(*arguments)
    # Payroc is asked by each of them, and answers the first of them in every wrong way.
    known = world.row(odd)["payroc_refund_id"]
    asking = {
        "get": ("resolve", str(odd), "--as", "accepted", "--payroc-refund-id", known),
        "list": ("resolve", str(odd), "--as", "accepted"),
        "reverse": ("reverse", str(paid)),
    }
    for operation, arguments in asking.items():
        for kind in rows.KINDS:
            world.fault(None, kind, operation, **({"seconds": 2 * SHORT} if kind in ("hang", "slow") else {}))
            command(*arguments, *WHO["ann"], PAYROC_REFUNDS_HTTP_TIMEOUT_SECONDS=str(SHORT))
    for refund_id in (paid, refused, odd):
        for who in ("ann", "ann", "bob"):
            command("reissue", str(refund_id), *WHO[who])
            command("resolve", str(refund_id), "--as", "accepted", *WHO[who])
    command("reverse", str(refused), *WHO["ann"])
    assert world.sandbox.get("/_sandbox/faults")["faults"] == []
    assert "replaces refund" in talk.heard()["standard output"]
    assert_nothing_leaked()
