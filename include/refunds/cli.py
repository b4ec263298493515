"""The commands of ``python -m include.refunds``."""

from __future__ import annotations

import asyncio
import csv
import getpass
import json
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from cryptography.fernet import Fernet
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool

from include.refunds import demo_source
from include.refunds.classify import EVERYTHING
from include.refunds.ledger import Ledger, LedgerError, create_ledger_engine
from include.refunds.ledger_url import UrlError, ledger_url, source_url
from include.refunds.report import details, money, status_report
from include.refunds.settings import SettingsError, get_settings

T = TypeVar("T")

EXIT_TROUBLE = 1  # the command ran, and something needs people
EXIT_UNUSABLE = 2  # the command could not run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="""The refund ledger: migrate it, look into it, stop and resume the sending.

The ledger is --ledger-url, else PAYROC_REFUNDS_LEDGER_URL, else AIRFLOW_CONN_REFUNDS_LEDGER (a URI or JSON). Exit codes:
0 all is well, 1 something needs people (for status: a refund is sending, unknown or in review, or the sending is paused),
2 the command could not run.""",
)

LedgerUrl = Annotated[str | None, typer.Option("--ledger-url", help="URL of the ledger's database, postgresql://…", show_default=False)]
SourceUrl = Annotated[str | None, typer.Option("--source-url", help="URL of the source's database, postgresql://…", show_default=False)]
By = Annotated[str, typer.Option("--by", help="Who does this, for the audit trail.", default_factory=getpass.getuser)]

console = Console()


@app.command()
def migrate(
    url: LedgerUrl = None,
    demo: Annotated[bool, typer.Option("--demo-source", help="Also create the table public.refund_requests in the source.")] = False,
    source: SourceUrl = None,
) -> None:
    """Create the ledger's schema, or bring it to this version. Harmless to run again."""
    from include.refunds.migrations import migrate as migrate_ledger  # Alembic takes half a second that only this command needs

    revision = migrate_ledger(ledger_url(url))
    console.print(f"The ledger is at revision {revision}.")
    if demo:
        demo_source.create_table(source_url(source))
        console.print("The source has the table public.refund_requests.")


@app.command("import")
def import_csv(
    file: Annotated[Path, typer.Argument(help="CSV with a header of column names.", exists=True, dir_okay=False)],
    source: SourceUrl = None,
) -> None:
    """
    Load approved refunds from a CSV file into public.refund_requests of the source.

    The columns are those of include/sql/select_approved.sql, amounts in minor units. A line that can't be stored is named
    with its number and skipped; a source_ref that is there already is left as it is, so a file may be imported again.
    """
    with file.open(encoding="utf-8-sig", newline="") as opened:
        lines = list(csv.DictReader(opened))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Importing", total=len(lines))
        result = demo_source.import_lines(source_url(source), lines, advance=lambda: progress.advance(task))
    for number, error in result.errors.items():
        console.print(f"Line {number}: {error}", style="red", highlight=False)
    console.print(f"{result.imported} imported, {result.known} there already, {len(result.errors)} with errors.")
    if result.errors:
        raise typer.Exit(EXIT_TROUBLE)


@app.command()
def status(url: LedgerUrl = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show totals per status, what waits, and what needs people."""
    report = _with_engine(url, lambda engine: status_report(engine, get_settings().source))
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        typer.echo(str(report))
    if report.unfinished:
        raise typer.Exit(EXIT_TROUBLE)


@app.command()
def show(
    which: Annotated[str, typer.Argument(help="The ledger's id, an order id, a source_ref or Payroc's refund id.")],
    url: LedgerUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one refund with its attempts and its history."""
    found = _with_engine(url, lambda engine: details(engine, get_settings().source, which))
    if found is None:
        _fail(f"The ledger holds no refund {which!r}: give its id, order id, source_ref or Payroc's refund id.")
    if as_json:
        typer.echo(json.dumps(found))
        return
    console.print(_facts(found))
    console.print(_attempts(found["attempts"]))
    console.print(_events(found["events"]))


@app.command()
def pause(
    reason: Annotated[str, typer.Option("--reason", help="Why.")],
    by: By,
    terminal: Annotated[str | None, typer.Option("--terminal", help="Only this processing terminal.")] = None,
    url: LedgerUrl = None,
) -> None:
    """Stop the sending, at once and for every worker; what is in flight at Payroc can't be called back."""
    _with_ledger(url, by, lambda ledger: ledger.pause(terminal or EVERYTHING, reason))
    console.print(f"The sending is paused{f' for terminal {terminal}' if terminal else ''}.")


@app.command()
def resume(
    reason: Annotated[str, typer.Option("--reason", help="Why it may go on.")],
    by: By,
    terminal: Annotated[str | None, typer.Option("--terminal", help="Only this processing terminal.")] = None,
    url: LedgerUrl = None,
) -> None:
    """Let the sending go on after a pause."""
    if not _with_ledger(url, by, lambda ledger: ledger.resume(terminal or EVERYTHING, reason)):
        _fail(f"The sending was not paused{f' for terminal {terminal}' if terminal else ''}; `status` shows what is.")
    console.print(f"The sending goes on{f' for terminal {terminal}' if terminal else ''}.")


@app.command("generate-keys")
def generate_keys() -> None:
    """Print fresh keys for PAYROC_REFUNDS_ENCRYPTION_KEYS and PAYROC_REFUNDS_FINGERPRINT_KEY. Keep them outside the database."""
    typer.echo(f"PAYROC_REFUNDS_ENCRYPTION_KEYS={Fernet.generate_key().decode()}")
    typer.echo(f"PAYROC_REFUNDS_FINGERPRINT_KEY={secrets.token_urlsafe(48)}")


def main() -> None:
    """Run the command line; trouble that has a sentence ends with it and exit code 2."""
    try:
        app()
    except (LedgerError, SettingsError, UrlError, demo_source.ImportFailed) as error:
        _fail(str(error))
    except (DBAPIError, OSError) as error:
        # A driver's message may quote values; its class and first line without digits tell enough.
        _fail(f"The database can't be used ({type(getattr(error, 'orig', None) or error).__name__}): check its URL and that it runs.")


@asynccontextmanager
async def _engine(url: str | None) -> AsyncIterator[AsyncEngine]:
    engine = create_ledger_engine(ledger_url(url), poolclass=NullPool)
    try:
        yield engine
    finally:
        await engine.dispose()


def _with_engine(url: str | None, work: Callable[[AsyncEngine], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        async with _engine(url) as engine:
            await Ledger(engine, get_settings(), actor="cli").check()
            return await work(engine)

    return asyncio.run(run())


def _with_ledger(url: str | None, by: str, work: Callable[[Ledger], Coroutine[Any, Any, T]]) -> T:
    return _with_engine(url, lambda engine: work(Ledger(engine, get_settings(), actor=by)))


# What people look for first stands first; the rest follows.
_FIRST = ("status", "reason", "amount", "order_id", "source_ref", "payroc_refund_id", "payroc_status", "payee_last4", "attempts so far")


def _facts(found: dict[str, Any]) -> Table:
    facts = {name: value for name, value in found.items() if value is not None and name not in ("id", "attempts", "events", "currency")}
    facts |= {"amount": money(found["amount"], found["currency"]), "attempts so far": len(found["attempts"])}
    table = Table(title=f"Refund {found['id']}", title_justify="left", box=SIMPLE_HEAD, show_header=False)
    for name in sorted(facts, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
        value = _instant(facts[name]) if name.endswith(("_at", "_until")) else str(facts[name])
        table.add_row(name.replace("_", " "), value)
    return table


def _attempts(attempts: list[dict[str, Any]]) -> Table:
    table = Table(title="Attempts (UTC)", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "began", "ended", "outcome", "HTTP", "problem", "run"):
        table.add_column(name, overflow="fold")
    for row in attempts:
        outcome, status = row["outcome"] or "none recorded", str(row["http_status"] or "")
        place = f"{row['run_id']} [{row['map_index']}] try {row['try_number']}"
        began, ended = _instant(row["started_at"]), _instant(row["finished_at"])[-8:]
        table.add_row(str(row["attempt"]), began, ended, outcome, status, row["problem_type"] or "", escape(place))
    return table


def _events(events: list[dict[str, Any]]) -> Table:
    table = Table(title="History (UTC)", title_justify="left", box=SIMPLE_HEAD)
    for name in ("at", "what", "by", "reason"):
        table.add_column(name, overflow="fold")
    for row in events:
        what = row["to_status"] if row["event"] == "status" else row["event"]
        table.add_row(_instant(row["at"]), what, escape(row["actor"]), escape(row["reason"] or ""))
    return table


def _instant(value: str | None) -> str:
    return value[:19].replace("T", " ") if value else ""


def _fail(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(message, style="red", highlight=False)
    raise SystemExit(EXIT_UNUSABLE)
