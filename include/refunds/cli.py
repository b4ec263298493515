"""The commands of ``python -m include.refunds``."""

from __future__ import annotations

import asyncio
import getpass
import json
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from enum import StrEnum
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from cryptography.fernet import Fernet
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from include.payroc.errors import PayrocConfigurationError, PayrocError
from include.refunds import demo_source
from include.refunds.audit import Head, HeadError, verify_audit
from include.refunds.case import DecisionRefused
from include.refunds.classify import EVERYTHING
from include.refunds.connect import NoGateway, cipher_of, connect, connect_source
from include.refunds.csv_lines import CsvError, read_lines
from include.refunds.database_errors import describe
from include.refunds.gateway import Gateway
from include.refunds.ledger import Ledger, LedgerEngine, LedgerError
from include.refunds.ledger.connection import DATABASE_ERRORS
from include.refunds.ledger_url import UrlError, ledger_url, source_url
from include.refunds.limits import LIMITS, Limits
from include.refunds.money import money
from include.refunds.postgres_parameters import refusal
from include.refunds.printable import printable, visible
from include.refunds.reissue import reissue as reissue_refund
from include.refunds.report import Match, details, find, status_report
from include.refunds.resolve import resolve as resolve_refund
from include.refunds.restored import Restored
from include.refunds.restored import restored as after_restore
from include.refunds.reverse import reverse as reverse_refund
from include.refunds.roles import RolesMissing
from include.refunds.rotate import Rotated
from include.refunds.rotate import rotate_keys as rotate_requests
from include.refunds.settings import SettingsError, check_names, get_settings
from include.refunds.source import SourceError
from include.refunds.states import Status
from include.refunds.verify import Comparison, RangeError, read_instant, read_range
from include.refunds.verify import verify as compare

T = TypeVar("T")

EXIT_TROUBLE = 1  # the command ran, and something needs people
EXIT_UNUSABLE = 2  # the command could not run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    # A traceback with the values of variables would show bank data.
    pretty_exceptions_show_locals=False,
    help="""The refund ledger: migrate it, look into it, pause and resume sending, set its limits, decide about single refunds,
compare it with Payroc, check its audit trail.

The ledger is --ledger-url, else PAYROC_REFUNDS_LEDGER_URL, else AIRFLOW_CONN_REFUNDS_LEDGER (a URI or JSON). Exit codes:
0 all is well, 1 something needs people (for status: a refund is sending, unknown, in review or not
written back, or sending is paused;
for resolve and reissue: a second person has to run the command), 2 the command could not run, or was refused.""",
)

LedgerUrl = Annotated[
    str | None,
    typer.Option("--ledger-url", help="URL of the ledger's database, postgresql://…", show_default=False),
]
SourceUrl = Annotated[
    str | None,
    typer.Option("--source-url", help="URL of the source's database, postgresql://…", show_default=False),
]


def _not_blank(value: str) -> str:
    if not value.strip():
        raise typer.BadParameter("must not be blank.")
    return value


By = Annotated[
    str,
    typer.Option(
        "--by",
        help="Who does this, for the audit trail.",
        default_factory=getpass.getuser,
        callback=_not_blank,
    ),
]
Why = Annotated[str, typer.Option("--reason", help="Why, for the audit trail.", callback=_not_blank)]
RefundId = Annotated[int, typer.Argument(help="The ledger's id, as `show` prints it.")]
PayrocConnId = Annotated[str, typer.Option("--payroc-conn-id", help="Airflow connection to Payroc.")]

LimitName = StrEnum("LimitName", {name.upper(): name for name in LIMITS})  # type: ignore[misc]  # made from the ledger's own list

console = Console()


def _seals(command: Callable[..., None]) -> Callable[..., None]:
    """
    Seal the events of a command once it has said what it did.

    A command that is done stays done when its events can't be sealed: that is said, and changes no exit code.
    """

    @wraps(command)
    def sealing(**arguments: Any) -> None:
        try:
            command(**arguments)
        except typer.Exit:
            _seal(arguments["url"])
            raise
        _seal(arguments["url"])

    return sealing


@app.callback()
def _check_environment() -> None:
    # With a misspelled LEDGER_URL a command would work on another database.
    check_names()


@app.command()
def migrate(
    url: LedgerUrl = None,
    demo: Annotated[
        bool,
        typer.Option("--demo-source", help="Also create the table public.refund_requests in the source."),
    ] = False,
    source: SourceUrl = None,
) -> None:
    """Create the ledger's schema, or bring it to this version. Harmless to run again."""
    # Alembic takes half a second that only this command needs.
    from include.refunds.migrations import MigrationRefused
    from include.refunds.migrations import migrate as migrate_ledger

    notes: list[str] = []
    try:
        revision = migrate_ledger(ledger_url(url), say=notes.append)
    except MigrationRefused as error:
        _fail(str(error))
    _say(f"The ledger is at revision {revision}.")
    for note in notes:
        _say(note)
    if demo:
        demo_source.create_table(source_url(source))
        _say("The source has the table public.refund_requests.")


@app.command("import")
def import_csv(
    file: Annotated[
        Path, typer.Argument(help="CSV with a header of column names.", exists=True, dir_okay=False)
    ],
    source: SourceUrl = None,
) -> None:
    """
    Load approved refunds from a CSV file into public.refund_requests of the source.

    The columns are those of include/sql/select_approved.sql, amounts in minor units. A line that breaks a
    rule of docs/boundaries.md is named with its number and left out; a source_ref that is there already is
    left as it is, so a file may be imported again.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise demo_source.ImportFailed(f"{printable(file.name)} can't be read ({error.strerror}).") from None
    lines = read_lines(content)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Importing", total=len(lines))
        result = demo_source.import_lines(
            source_url(source), lines, get_settings(), advance=lambda: progress.advance(task)
        )
    for number, what in result.errors.items():
        _say(f"Line {number}: {what}", red=True)
    _say(f"{result.imported} imported, {result.known} there already, {len(result.errors)} with errors.")
    if result.errors:
        raise typer.Exit(EXIT_TROUBLE)


@app.command()
def status(
    url: LedgerUrl = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show totals per status, what waits, and what needs people."""
    report = _with_engine(url, lambda engine: status_report(engine, get_settings().source))
    if as_json:
        _json(report.as_dict())
    else:
        for line in str(report).splitlines():
            _say(line)
    if report.unfinished:
        raise typer.Exit(EXIT_TROUBLE)


@app.command()
def show(
    which: Annotated[
        str, typer.Argument(help="The ledger's id, an order id, a source_ref or Payroc's refund id.")
    ],
    by_id: Annotated[bool, typer.Option("--id", help="WHICH is the ledger's id, and nothing else.")] = False,
    url: LedgerUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one refund with its attempts and its history. Exit code 2 when it may be one of several, which are listed."""

    async def work(engine: LedgerEngine) -> tuple[list[Match], dict[str, Any] | None]:
        matches = await find(engine, get_settings().source, which, by_id=by_id, limit=_MOST_MATCHES)
        return matches, await details(engine, matches[0].id) if len(matches) == 1 else None

    matches, found = _with_engine(url, work)
    if not matches:
        _fail(
            f"The ledger holds no refund {printable(which)}: give its id, order id, source_ref or Payroc's refund id."
        )
    if found is None:
        _print_matches(matches, as_json=as_json)
        most = "at least " if len(matches) == _MOST_MATCHES else ""
        _fail(
            f"{printable(which)} may be {most}{len(matches)} refunds: give the ledger's id of one of them, as `show ID --id`."
        )
    if as_json:
        _json(found)
        return
    _print(_facts(found))
    _print(_attempts(found["attempts"]))
    _print(_events(found["events"]))


@app.command()
@_seals
def pause(
    reason: Annotated[str, typer.Option("--reason", help="Why.")],
    by: By,
    terminal: Annotated[str | None, typer.Option("--terminal", help="Only this processing terminal.")] = None,
    url: LedgerUrl = None,
) -> None:
    """Pause sending, at once and for every worker; what is in flight at Payroc can't be called back."""
    _with_ledger(url, by, lambda ledger: ledger.pauses.pause(terminal or EVERYTHING, reason))
    _say(f"Sending is paused{f' for terminal {printable(terminal)}' if terminal else ''}.")


@app.command()
@_seals
def resume(
    reason: Annotated[str, typer.Option("--reason", help="Why it may go on.")],
    by: By,
    terminal: Annotated[str | None, typer.Option("--terminal", help="Only this processing terminal.")] = None,
    url: LedgerUrl = None,
) -> None:
    """Resume sending after a pause."""
    if not _with_ledger(url, by, lambda ledger: ledger.pauses.resume(terminal or EVERYTHING, reason)):
        _fail(
            f"Sending was not paused{f' for terminal {printable(terminal)}' if terminal else ''}; `status` shows what is."
        )
    _say(f"Sending has resumed{f' for terminal {printable(terminal)}' if terminal else ''}.")


@app.command()
def limits(
    url: LedgerUrl = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show the limits. No limits are set by default; an unset limit allows everything."""
    found = _with_ledger(url, "limits", lambda ledger: ledger.limits.current())
    if as_json:
        _json(asdict(found))
        return
    _print(_limits(found))


@app.command()
@_seals
def limit(
    name: Annotated[LimitName, typer.Argument(help="As `limits` lists them.", show_default=False)],
    value: Annotated[
        str, typer.Argument(help="Minor units, a number of refunds or days; or none, which lets pass.")
    ],
    reason: Why,
    by: By,
    url: LedgerUrl = None,
) -> None:
    """
    Set a limit, or unset it. It applies from the next refund that reaches the gate.

    Amounts are in minor units (100000 is 1,000.00 USD) and hold for each currency by itself. Set payee_days before the caps per payee.
    """
    if value != "none" and not value.isdecimal():
        raise typer.BadParameter("must be a whole number or none.", param_hint="VALUE")
    number = None if value == "none" else int(value)
    _with_ledger(url, by, lambda ledger: ledger.limits.set_limit(name.value, number, reason))
    _say(f"The limit {name.value} is {'taken away' if number is None else _limit(name.value, number)}.")


@app.command()
@_seals
def unhold(refund_id: RefundId, reason: Why, by: By, url: LedgerUrl = None) -> None:
    """
    Lift the hold of a refund: the next run will send it, and the same limit does not hold it again.

    The requester of the refund may not.
    """
    _with_ledger(url, by, lambda ledger: ledger.decisions.unhold(refund_id, reason))
    _say(f"Refund {refund_id} is approved again; the next run will send it.")


@app.command()
@_seals
def cancel(refund_id: RefundId, reason: Why, by: By, url: LedgerUrl = None) -> None:
    """End a refund that was not sent, held or not. It is never sent; pay it by a new row with a source_ref of its own."""
    _with_ledger(url, by, lambda ledger: ledger.decisions.cancel(refund_id, reason))
    _say(f"Refund {refund_id} is cancelled.")


class Outcome(StrEnum):
    """How a review may end."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"


@app.command()
@_seals
def resolve(
    refund_id: RefundId,
    outcome: Annotated[Outcome, typer.Option("--as", help="What the refund is.")],
    reason: Why,
    by: By,
    payroc_refund_id: Annotated[
        str | None,
        typer.Option(
            "--payroc-refund-id",
            help="For accepted: Payroc's id of the refund, when Payroc's list does not tell.",
        ),
    ] = None,
    conn_id: PayrocConnId = "payroc_default",
    url: LedgerUrl = None,
) -> None:
    """
    End a review. Payroc is asked first: rejected is refused when it holds the refund, accepted needs its refund id.

    It takes two people when money may have moved: the first proposes, and a different one runs the same command within 7 days.
    """
    if outcome is Outcome.REJECTED and payroc_refund_id is not None:
        _fail("--payroc-refund-id goes with --as accepted: a rejected refund has none.")
    status = Status(outcome.value)
    resolution, done = _with_payroc(
        url,
        by,
        conn_id,
        lambda ledger, gateway: resolve_refund(
            refund_id, status, reason, payroc_refund_id=payroc_refund_id, ledger=ledger, gateway=gateway
        ),
    )
    if resolution.note:
        _say(f"Note: {resolution.note}")
    if done:
        _say(f"Refund {refund_id} is {resolution.status}.")
        return
    found = resolution.decision.get("payroc_refund_id")
    _proposed(
        f"resolve {refund_id} --as {outcome.value}"
        + (f" --payroc-refund-id {found}" if payroc_refund_id else "")
    )


@app.command()
@_seals
def reissue(
    refund_id: RefundId, reason: Why, by: By, conn_id: PayrocConnId = "payroc_default", url: LedgerUrl = None
) -> None:
    """
    Pay a refund again that was rejected, returned or reversed: as a new refund, which the next run sends.

    It takes two people: the first proposes, and a different one runs the same command within 7 days.
    """
    settings = get_settings()
    cipher = cipher_of(settings)
    new = _with_payroc(
        url,
        by,
        conn_id,
        lambda ledger, gateway: reissue_refund(
            refund_id, reason, ledger=ledger, gateway=gateway, cipher=cipher, source=settings.source
        ),
    )
    if new is None:
        _proposed(f"reissue {refund_id}")
    _say(f"Refund {new} replaces refund {refund_id}; the next run of payroc_refunds sends it.")


@app.command()
@_seals
def reverse(
    refund_id: RefundId, reason: Why, by: By, conn_id: PayrocConnId = "payroc_default", url: LedgerUrl = None
) -> None:
    """Take an accepted refund out of the open batch, before any money moves. Harmless to run again; a pause does not forbid it."""
    result = _with_payroc(
        url,
        by,
        conn_id,
        lambda ledger, gateway: reverse_refund(refund_id, reason, ledger=ledger, gateway=gateway),
    )
    _say(result.sentence)
    if not result.done:
        raise typer.Exit(EXIT_TROUBLE)


@app.command()
def verify(
    first: Annotated[str, typer.Option("--from", help="First day, in UTC; or an instant with its zone.")],
    last: Annotated[
        str,
        typer.Option("--to", help="Last day, included, in UTC; or an instant with its zone, not included."),
    ],
    terminals: Annotated[
        list[str] | None,
        typer.Option(
            "--terminal",
            help="Ask for this terminal too, though the ledger has no refund of it, as after its loss; repeatable.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    conn_id: PayrocConnId = "payroc_default",
    url: LedgerUrl = None,
) -> None:
    """
    Compare the ledger with Payroc for a range of dates. It only reads.

    Exit codes: 0 they agree, 1 they differ, 2 they could not be compared. Refunds that were not made by this project are counted, and
    are no differences.
    """
    start, end = read_range(first, last)

    def work(ledger: Ledger, gateway: Gateway) -> Coroutine[Any, Any, Comparison]:
        return compare(start, end, terminals=terminals or (), ledger=ledger, gateway=gateway)

    found = _with_payroc(url, "verify", conn_id, work)
    if as_json:
        _json(found.as_dict())
    else:
        _compared(found)
    if found.differences:
        raise typer.Exit(EXIT_TROUBLE)


@app.command()
@_seals
def restored(
    backup_at: Annotated[
        str,
        typer.Option(
            "--backup-at", help="When the backup was made: an instant with its zone, or a day, in UTC."
        ),
    ],
    reason: Why,
    by: By,
    terminals: Annotated[
        list[str] | None,
        typer.Option(
            "--terminal", help="Ask for this terminal too, which neither ledger nor source knows; repeatable."
        ),
    ] = None,
    conn_id: PayrocConnId = "payroc_default",
    accept_not_understood: Annotated[
        bool,
        typer.Option(
            "--accept-not-understood",
            help="End it though Payroc lists objects that can't be understood, or refuses the list of a terminal; "
            "the audit trail keeps this decision with their names.",
        ),
    ] = False,
    source_conn_id: Annotated[
        str, typer.Option("--source-conn-id", help="Airflow connection to the source.")
    ] = "refunds_source",
    url: LedgerUrl = None,
) -> None:
    """
    The first command after the ledger was restored from a backup. Once it was begun, nobody can resume before it has come to its end.

    It pauses sending, takes over what Payroc has and the ledger has forgotten, and compares both. Cut off, run it again. It sends
    nothing. Exit codes: 0 ledger and Payroc agree, 1 they differ, 2 it could not be done.
    """
    settings = get_settings()
    at = read_instant(backup_at)
    source, cipher = connect_source(source_conn_id), cipher_of(settings)

    def work(ledger: Ledger, gateway: Gateway) -> Coroutine[Any, Any, Restored]:
        return after_restore(
            at,
            reason,
            terminals=terminals or (),
            source=source,
            ledger=ledger,
            gateway=gateway,
            cipher=cipher,
            settings=settings,
            accept_not_understood=accept_not_understood,
        )

    found = _with_payroc(url, by, conn_id, work)
    _say(
        f"Sending is paused. What happened since {found.since:%Y-%m-%d %H:%M %Z} may be forgotten, and was looked for."
    )
    _say(f"{found.pulled.new} refunds were pulled anew; {len(found.taken_over)} were taken over from Payroc.")
    for source_ref in sorted({*found.pulled.invalid, *found.pulled.changed}):
        state = "invalid" if source_ref in found.pulled.invalid else "changed"
        _say(f"  Source row {printable(source_ref)} is {state}; the next report says how.")
    for item in found.taken_over:
        _say(f"  {item}")
    for note in found.notes:
        _say(note)
    _compared(found.comparison)
    _say(
        "What no comparison brings back, look at it before you resume: limits, pauses, holds, cancellations and resolutions since then. "
        "`python -m include.refunds resume` resumes sending."
    )
    if found.comparison.differences:
        raise typer.Exit(EXIT_TROUBLE)


@app.command("verify-audit")
def check_audit(
    heads: Annotated[
        list[str] | None,
        typer.Option(
            "--head", help="A head that a report showed, such as 1234:9f86d081884c7d65; repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    url: LedgerUrl = None,
) -> None:
    """
    Check that no event of the audit trail was changed, removed or inserted. It only reads.

    Give heads from reports or Airflow's logs: a trail that was written again, or cut off, does not match them.
    """
    known = [Head.read(head) for head in heads or ()]
    found = _with_engine(url, lambda engine: verify_audit(engine, known))
    if as_json:
        head = str(found.head) if found.head else None
        _json(
            {
                "events": found.events,
                "unsealed": found.unsealed,
                "head": head,
                "findings": found.findings,
            }
        )
    else:
        for finding in found.findings:
            _say(finding)
        unsealed = f", {found.unsealed} more not sealed yet" if found.unsealed else ""
        count = len(found.findings)
        result = f"{count} finding{'' if count == 1 else 's'}" if count else "intact"
        _say(f"{found.events} events, head {found.head or 'none'}{unsealed}: {result}.")
    if found.findings:
        raise typer.Exit(EXIT_TROUBLE)


@app.command("rotate-keys")
@_seals
def rotate_keys(url: LedgerUrl = None) -> None:
    """
    Encrypt all requests anew with the first of PAYROC_REFUNDS_ENCRYPTION_KEYS, while the service goes on.

    Give every process the new key first and the old one after it, then run this; then take the old one away. Cut off, it goes on where
    it stopped.
    """
    cipher = cipher_of(get_settings())
    first, *others = cipher.key_ids

    async def work(ledger: Ledger) -> tuple[Rotated, dict[str, int]]:
        waiting = sum(
            count for key, count in (await ledger.requests.requests_by_key()).items() if key != first
        )
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("Encrypting", total=waiting)
            rotated = await rotate_requests(
                ledger.requests, cipher, advance=lambda count: progress.advance(task, count)
            )
        return rotated, await ledger.requests.requests_by_key()

    rotated, by_key = _with_ledger(url, "rotate-keys", work)
    for sentence in rotated.unreadable:
        _say(sentence, red=True)
    _say(f"{rotated.done} requests were encrypted anew with the key {first}.")
    for key, count in by_key.items():
        role = "the first" if key == first else "another one that is set" if key in others else "not set here"
        _say(f"  key {key} ({role}): {count} requests")
    if set(by_key) - {first}:
        raise typer.Exit(EXIT_TROUBLE)


@app.command("generate-keys")
def generate_keys() -> None:
    """Print fresh keys for PAYROC_REFUNDS_ENCRYPTION_KEYS and PAYROC_REFUNDS_FINGERPRINT_KEY. Keep them outside the database."""
    _say(f"PAYROC_REFUNDS_ENCRYPTION_KEYS={Fernet.generate_key().decode()}")
    _say(f"PAYROC_REFUNDS_FINGERPRINT_KEY={secrets.token_urlsafe(48)}")


def main() -> None:
    """Run the command line; trouble that has a sentence ends with it and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that knows only some characters shows the others by their numbers.
            stream.reconfigure(errors="backslashreplace")
    # Python hands on such bytes as half characters, which no database stores.
    if any("\ud800" <= char <= "\udfff" for argument in sys.argv for char in argument):
        _fail("An argument holds bytes that are no text in UTF-8: write it anew.")
    try:
        app()
    except (
        LedgerError,
        SettingsError,
        UrlError,
        demo_source.ImportFailed,
        CsvError,
        DecisionRefused,
        NoGateway,
        PayrocConfigurationError,
        PayrocError,
        SourceError,
        RangeError,
        HeadError,
        RolesMissing,
    ) as error:
        _fail(str(error))
    except (DBAPIError, *DATABASE_ERRORS) as error:
        blamed = refusal(error.orig) if isinstance(error, DBAPIError) and error.orig else None
        trouble = blamed or f"{describe(error)}; check its URL, its rights, and that it runs"
        _fail(f"The database can't be used: {trouble}.")


@asynccontextmanager
async def _engine(url: str | None) -> AsyncIterator[LedgerEngine]:
    # A command may talk to Payroc for minutes, and what stands between us and the database may drop an idle connection without a word.
    engine = LedgerEngine(ledger_url(url), pool_size=0)
    try:
        yield engine
    finally:
        await engine.dispose()


def _with_engine(url: str | None, work: Callable[[LedgerEngine], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        async with _engine(url) as engine:
            await Ledger(engine, get_settings(), actor="cli").check()
            return await work(engine)

    return asyncio.run(run())


def _seal(url: str | None) -> None:
    async def run() -> list[str]:
        async with _engine(url) as engine:
            return await Ledger(engine, get_settings(), actor="cli").seals.seal_or_say()

    for sentence in asyncio.run(run()):
        _say(sentence, red=True)


def _with_ledger(url: str | None, by: str, work: Callable[[Ledger], Coroutine[Any, Any, T]]) -> T:
    return _with_engine(url, lambda engine: work(Ledger(engine, get_settings(), actor=by)))


def _with_payroc(
    url: str | None, by: str, conn_id: str, work: Callable[[Ledger, Gateway], Coroutine[Any, Any, T]]
) -> T:
    gateway = connect(conn_id)
    return _with_ledger(url, by, lambda ledger: work(ledger, gateway))


def _proposed(command: str) -> NoReturn:
    _say(
        f"Proposed. It takes two: a different person has to run `python -m include.refunds {command} --by … --reason …`."
    )
    raise typer.Exit(EXIT_TROUBLE)


_MEANING = {
    "largest_refund": "one refund; a larger one is held",
    "run_total": "sum of one run; the rest waits",
    "run_count": "refunds of one run; the rest waits",
    "day_total": "sum of one day; the rest waits",
    "day_count": "refunds of one day; the rest waits",
    "payee_total": "sum for one payee within payee_days; what goes over it is held",
    "payee_count": "refunds for one payee within payee_days; what goes over it is held",
    "payee_days": "days of the caps per payee",
    "duplicate_days": "days within which the same payee and amount is held as a possible duplicate",
    "approval_total": "sum released in a day without a person; above it a person approves the run",
    "approval_count": "refunds released in a day without a person; above it a person approves the run",
}


def _limit(name: str, value: int) -> str:
    if name.endswith(("_days", "_count")):
        return f"{value:,} {'days' if name.endswith('_days') else 'refunds'}"
    return f"{value:,} minor units of each currency ({money(value, 'USD')})"


def _limits(found: Limits) -> Table:
    table = Table(title="Limits", title_justify="left", box=SIMPLE_HEAD)
    for name in ("name", "value", "what it means"):
        table.add_column(name, overflow="fold")
    for name, value in asdict(found).items():
        _add(table, name, "unset" if value is None else _limit(name, value), _MEANING[name])
    return table


# Nobody reads more of them.
_MOST_MATCHES = 20

# What people look for first stands first; the rest follows.
_FIRST = (
    "status",
    "reason",
    "amount",
    "order_id",
    "source_ref",
    "payroc_refund_id",
    "payroc_status",
    "payee_last4",
    "attempts so far",
)


def _compared(found: Comparison) -> None:
    _print(_sums(found))
    for currency, total in sorted(found.elsewhere.items()):
        amount = money(total.payroc_amount, currency)
        _say(f"Made elsewhere, not by this project: {total.payroc_count} refunds, {amount}.")
    for item in found.differences:
        _say(item.sentence)
    _say(f"{len(found.differences)} differences." if found.differences else "The ledger and Payroc agree.")


def _sums(found: Comparison) -> Table:
    table = Table(
        title=f"First sent from {found.start} up to {found.end}", title_justify="left", box=SIMPLE_HEAD
    )
    for name in ("status", "ledger", "", "Payroc", ""):
        table.add_column(name, justify="left" if name == "status" else "right")
    for (currency, status), total in sorted(found.sums.items()):
        ledger, payroc = money(total.ledger_amount, currency), money(total.payroc_amount, currency)
        _add(table, status, total.ledger_count, ledger, total.payroc_count, payroc)
    return table


def _facts(found: dict[str, Any]) -> Table:
    facts = {
        name: value
        for name, value in found.items()
        if value is not None and name not in ("id", "attempts", "events", "currency")
    }
    facts |= {"amount": money(found["amount"], found["currency"]), "attempts so far": len(found["attempts"])}
    table = Table(title=f"Refund {found['id']}", title_justify="left", box=SIMPLE_HEAD, show_header=False)
    for name in sorted(facts, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
        value = facts[name]
        if isinstance(value, list):
            value = ", ".join(value)
        elif name.endswith(("_at", "_until")):
            value = _instant(value)
        _add(table, name.replace("_", " "), value)
    return table


def _attempts(attempts: list[dict[str, Any]]) -> Table:
    table = Table(title="Attempts (UTC)", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "began", "ended", "outcome", "HTTP", "problem", "run"):
        table.add_column(name, overflow="fold")
    for row in attempts:
        place = f"{row['run_id']}, task {row['map_index']}, try {row['try_number']}"
        began, ended = _instant(row["started_at"]), _instant(row["finished_at"])[-8:]
        outcome = row["outcome"] or "none recorded"
        _add(table, row["attempt"], began, ended, outcome, row["http_status"], row["problem_type"], place)
    return table


def _events(events: list[dict[str, Any]]) -> Table:
    table = Table(title="History (UTC)", title_justify="left", box=SIMPLE_HEAD)
    for name in ("at", "what", "by", "reason"):
        table.add_column(name, overflow="fold")
    for row in events:
        # The table of attempts has it.
        if row["event"] != "attempt":
            what = row["to_status"] if row["event"] == "status" else row["event"]
            _add(table, _instant(row["at"]), what, row["actor"], row["reason"] or _changed(row))
    return table


def _changed(event: dict[str, Any]) -> str:
    """Return the new values of an event that is a change and nothing else."""
    values = (event["detail"] or {}) if event["event"] == "change" else {}
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def _instant(value: str | None) -> str:
    return value[:19].replace("T", " ") if value else ""


def _print_matches(matches: list[Match], *, as_json: bool) -> None:
    if as_json:
        _json({"matches": [asdict(match) for match in matches]})
        return
    table = Table(title="Refunds that may be meant", title_justify="left", box=SIMPLE_HEAD)
    for name in ("id", "order id", "source_ref", "terminal", "amount", "status"):
        table.add_column(name, overflow="fold")
    for match in matches:
        amount = money(match.amount, match.currency)
        place = match.order_id, match.source_ref, match.processing_terminal_id
        _add(table, match.id, *place, amount, match.status)
    _print(table)


# Everything that is printed leaves by one of these five.


def _say(sentence: str, *, red: bool = False) -> None:
    typer.secho(visible(sentence), fg="red" if red else None)


def _json(value: dict[str, Any]) -> None:
    """Print JSON in ASCII: what is in it is not changed, and can do nothing to a terminal."""
    typer.echo(json.dumps(value))


def _print(table: Table) -> None:
    console.print(table)


def _add(table: Table, *cells: object) -> None:
    # A cell that is no Text would be read as rich's markup.
    table.add_row(*(Text(printable(cell)) for cell in cells))


def _fail(message: str) -> NoReturn:
    typer.secho(visible(message), fg="red", err=True)
    raise SystemExit(EXIT_UNUSABLE)
