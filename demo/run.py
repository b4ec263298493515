"""`make demo`: pay the sample refunds through Airflow and the local Payroc, and show what became of each."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from rich.markup import escape

from demo import processes
from demo.console import console, say, step
from demo.errors import DemoError
from demo.result import (
    UNFINISHED,
    compare_with_payroc,
    count_by_status,
    money,
    read_rows,
    sent,
    table_of,
    totals_of,
)
from demo.stack import Stack, telling_lines
from demo.state import State
from include.refunds.printable import printable

DAG = "payroc_refunds"

# What the retries of one run leave over, the next run does, as the schedule would have it. One run is paused, and three more are
# enough for anything that the local Payroc can do to a refund of the sample, or that a cut-off run left behind.
_MOST_RUNS = 4
# One refund of the sample is larger.
_LARGEST_REFUND = 500_000
# While refunds go out, a person pauses sending: after so many.
_PAUSE_AFTER = 8
_BY = "Fiona (finance)"
_LONGEST_WAIT_SECONDS = 60
_REPORT_EVERY_SECONDS = 5


def run(state: State) -> int:
    """
    Run the demo.

    :return: exit code: 0 when every refund has ended and Payroc's record agrees with the ledger.
    """
    with state.locked("make demo"), Stack(state) as stack:
        received_before = _requests_at_payroc(stack)
        _resume(stack)
        _set_limit(stack)
        for number in range(1, _MOST_RUNS + 1):
            succeeded = _run_dag(stack, number)
            if _resume(stack):
                continue
            if not _unfinished(stack):
                break
            if number < _MOST_RUNS:
                _wait_until_due(stack)
        return _show_result(stack, succeeded=succeeded, received_before=received_before)


def _set_limit(stack: Stack) -> None:
    """Let no refund pass by itself that is larger than this; a person decides about it."""
    if stack.limit("largest_refund") is None:
        with step(
            f"{_BY} sets a limit: a refund over {money(_LARGEST_REFUND, 'USD')} is held until a person has looked at it"
        ):
            _command(
                stack,
                "limit",
                "largest_refund",
                str(_LARGEST_REFUND),
                "--reason",
                "Larger ones are looked at.",
            )


def _resume(stack: Stack) -> bool:
    """Let the sending go on after the demo's own pause; ``False`` when there is none."""
    with stack.ledger() as ledger:
        query = "SELECT FROM refund_ledger.pauses WHERE scope = '*' AND paused_by = %s AND ended_at IS NULL LIMIT 1"
        if ledger.execute(query, [_BY]).fetchone() is None:
            return False
    with step(f"{_BY} resumes sending; the next run goes on where the paused one stopped"):
        _command(stack, "resume", "--reason", "All is well.")
    return True


def _command(stack: Stack, name: str, *arguments: str) -> None:
    stack.run(f"command-{name}", "include.refunds", name, *arguments, "--by", _BY)


def _run_dag(stack: Stack, number: int) -> bool:
    log = f"run-{number}"
    say()
    say(f"Airflow runs the DAG [bold]{DAG}[/]. Its full log: {escape(str(stack.log(log)))}")
    begin = time.monotonic()
    process = stack.start(log, "airflow", "dags", "test", DAG)
    try:
        _follow(stack, process, may_pause=number == 1)
    finally:
        processes.stop(process)
    took = time.monotonic() - begin
    if process.returncode == 0:
        say(f"[green]✓[/] The run has ended [dim]({took:.0f} s)[/]")
        return True
    say(f"[yellow]•[/] Airflow marks the run as failed [dim]({took:.0f} s)[/]")
    return False


def _follow(stack: Stack, process: subprocess.Popen[bytes], *, may_pause: bool) -> None:
    """Show how many refunds have which status until the run has ended."""
    show = _status_line() if console.is_terminal else _occasional_lines()
    with stack.ledger() as ledger, console.status("Airflow is starting …") as status:
        to_pause = sent(count_by_status(ledger)) + _PAUSE_AFTER
        while not processes.has_ended(process):
            counts = count_by_status(ledger)
            if may_pause and sent(counts) >= to_pause:
                say(f"{_BY} pauses sending: no POST goes out any more, in the middle of the run")
                _command(stack, "pause", "--reason", "A look at the first ones.")
                may_pause = False
            if counts:
                text = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
                status.update(f"{sum(counts.values())} refunds: {text}")
                show(text)
            time.sleep(0.3)


def _status_line() -> Callable[[str], None]:
    return lambda text: None


def _occasional_lines() -> Callable[[str], None]:
    """Without a terminal there is no line to update: print one now and then, when something has changed."""
    last_text, last_time = "", 0.0

    def show(text: str) -> None:
        nonlocal last_text, last_time
        if text != last_text and time.monotonic() - last_time >= _REPORT_EVERY_SECONDS:
            say(f"  {text}")
            last_text, last_time = text, time.monotonic()

    return show


def _unfinished(stack: Stack) -> int:
    with stack.ledger() as ledger:
        counts = count_by_status(ledger)
    return sum(counts.get(status, 0) for status in UNFINISHED)


def _wait_until_due(stack: Stack) -> None:
    """Wait until an unfinished refund may be sent again: its lease is over, or the wait after an unknown outcome."""
    with stack.ledger() as ledger:
        row = ledger.execute(
            "SELECT count(*), COALESCE(EXTRACT(epoch FROM max(greatest(lease_until, next_attempt_at)) - now()), 0)::float "
            "FROM refund_ledger.refunds WHERE status = ANY(%s)",
            [list(UNFINISHED)],
        ).fetchone()
    count, seconds = row or (0, 0.0)
    seconds = min(max(seconds, 0), _LONGEST_WAIT_SECONDS)
    are = "refund is" if count == 1 else "refunds are"
    with step(f"{count} {are} not certain yet. The next run asks Payroc about them, in {seconds:.0f} s"):
        time.sleep(seconds)


def _show_result(stack: Stack, *, succeeded: bool, received_before: int) -> int:
    with stack.ledger() as ledger:
        rows = read_rows(ledger)
    if not rows:
        log = stack.log("run-1")
        raise DemoError(f"The run stored no refund. From its log ({log}):\n{telling_lines(log)}")
    theirs = stack.sandbox_get("/_sandbox/refunds")["refunds"]
    received = _requests_at_payroc(stack) - received_before
    complaints = compare_with_payroc(rows, theirs)
    open_refunds = [row for row in rows if row.status in (*UNFINISHED, "review", "approved")]
    held = [row for row in rows if row.status == "held"]

    say()
    console.print(table_of(rows))
    say()
    console.print(totals_of(rows))
    say()
    if received == 0:
        say(
            "[green]✓[/] Nothing was sent in this run: every one of these refunds was sent before, and Payroc got no request to pay."
        )
    for complaint in complaints:
        say(f"[bold red]✗[/] {complaint}")
    if not complaints:
        declined = sum(refund["status"] == "declined" for refund in theirs)
        exist = f"{len(theirs)} refunds exist at Payroc" + (
            f" ({declined} of them declined)" if declined else ""
        )
        say(f"[green]✓[/] {exist}, none twice. Each is in the ledger with the same order and amount.")
    for row in held:
        say(
            f"[yellow]•[/] {printable(row.order_id)} is held, {money(row.amount, row.currency)}, until a person releases or cancels it."
        )
    if open_refunds:
        say(
            f"[bold yellow]•[/] {len(open_refunds)} refunds have not ended: {', '.join(printable(row.order_id) for row in open_refunds)}."
        )
    if not succeeded:
        log = max(stack.state.logs.glob("run-*.log"), key=lambda log: log.stat().st_mtime)
        say(f"[bold yellow]•[/] Airflow marked the last run as failed. From its log ({escape(str(log))}):")
        console.print(telling_lines(log), markup=False)
    say()
    _show_next_steps(stack)
    return 0 if succeeded and not complaints and not open_refunds else 1


def _requests_at_payroc(stack: Stack) -> int:
    """Return how many requests to pay Payroc has received, over all runs, by its own record."""
    return int(stack.sandbox_get("/_sandbox/requests?operation=create")["count"])


def _show_next_steps(stack: Stack) -> None:
    say("[bold]What to do next[/]")
    say("  make demo    runs it again: every refund is known by now, so nothing is sent twice")
    say("  make up      opens the same in Airflow's web interface")
    say("  make reset   removes the demo's data, so that it starts afresh")
    say(
        f"  demo/sample_refunds.csv holds the refunds, docs/ explains them. Logs: {escape(str(stack.state.logs))}"
    )
