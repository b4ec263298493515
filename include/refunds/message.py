"""Messages to people: counts and sums, what needs them, and where to look. One per run, never bank data, and no line per refund."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from include.refunds.approval import Question
from include.refunds.money import money, sums
from include.refunds.printable import printable, visible
from include.refunds.report import Report, Total

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

# A message stays short; the log of the task report has all notes.
_MOST_NOTES = 10

# What stands in a subject, in this order.
_TELLING = ("review", "held", "unknown", "sending")


@dataclass(frozen=True, slots=True)
class Message:
    """
    What people are told.

    :param subject: one line.
    :param text: all of it as plain text, for chats and logs.
    :param html: all of it as HTML with inline styles, for mail.
    :param url: where to go on, empty when Airflow has no address of its own.
    """

    subject: str
    text: str
    html: str
    url: str = ""


def run_ended(report: Report, *, what: str, failed: bool, url: str) -> Message | None:
    """
    Return the message about the end of a run, or ``None`` when it ended as it should and nothing waits for people.

    :param report: what the ledger says.
    :param what: which run, such as ``refund run``.
    :param failed: the run is red.
    :param url: the run in Airflow.
    """
    words = ([f"{what} failed"] if failed else []) + _needs(report)
    if not words:
        return None
    color = "#b42318" if failed else "#b54708"
    return _message(
        words, report.title, color, report.unfinished, report.totals, report.notes, "Open the run", url
    )


def approval_needed(question: Question, run_id: str, url: str) -> Message:
    """Return the message that a run waits for a person's approval."""
    totals = question.basis["totals"]
    largest = "; ".join(money(entry["largest"], currency) for currency, entry in sorted(totals.items()))
    sentences = [
        f"The run would release {sums(totals)}. The largest is {largest}."
        if totals
        else "The run would release refunds again.",
        f"Payees to whom nothing was released before: {question.basis['new_payees']:,}.",
        f"{question.why} Nothing is sent until a person who did not trigger the run has approved it.",
    ]
    if question.basis["again"]:
        sentences.insert(
            1, f"Beside these, {question.basis['again']:,} that were released before and not sent."
        )
    title = f"Refund run {printable(run_id)} waits for approval"
    return _message(
        ["approval needed", sums(totals)], title, "#175cd3", sentences, [], [], "Answer the question", url
    )


def deadline_missed(report: Report | None, run_id: str, *, due: datetime, now: datetime, url: str) -> Message:
    """
    Return the message that a run has not ended by its deadline.

    :param report: what the ledger says of it so far, ``None`` when the ledger can't be read.
    :param due: when the run was due to begin.
    """
    hours = (now - due).total_seconds() / 3600
    long = f"{hours:.0f} hours" if hours >= 2 else f"{hours * 60:.0f} minutes"
    sentences = [
        f"It was due to begin {long} ago ({due:%Y-%m-%d %H:%M %Z}) and has not ended. It may wait for an approval or for Payroc."
    ]
    if report is None:
        sentences.append("The ledger could not be read.")
    title = f"Refund run {printable(run_id)} has not finished by its deadline"
    totals = report.totals if report else []
    return _message(
        ["run not finished by its deadline"], title, "#b54708", sentences, totals, [], "Open the run", url
    )


def environment() -> Environment:
    """Return the templates' environment: whatever is put into HTML is escaped."""
    return _environment()


@lru_cache(maxsize=1)
def _environment() -> Environment:
    # Only who has something to tell pays for the import.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"money": money, "code": _code}
    return environment


def _code(sentence: str) -> Markup:
    """Return a sentence as HTML, and what stands between backticks in it as code."""
    from markupsafe import Markup

    parts = sentence.split("`")
    if len(parts) % 2 == 0:
        return Markup.escape(sentence)
    marked = [
        Markup("<code>{}</code>").format(part) if number % 2 else Markup.escape(part)
        for number, part in enumerate(parts)
    ]
    return Markup("").join(marked)


def _needs(report: Report) -> list[str]:
    """Return in few words what waits for people or for time."""
    counts: dict[str, int] = {}
    for total in report.totals:
        counts[total.status] = counts.get(total.status, 0) + total.count
    words = [
        f"{counts[status]:,} {'in review' if status == 'review' else status}"
        for status in _TELLING
        if status in counts
    ]
    if report.unwritten:
        words.append(f"{report.unwritten:,} not written back")
    flags: Mapping[str, bool] = {
        "sending paused": report.paused,
        "run rejected": report.rejected,
        "refunds wait for room": report.waiting,
    }
    return words + [word for word, holds in flags.items() if holds]


def _message(
    words: Sequence[str],
    title: str,
    color: str,
    sentences: Sequence[str],
    totals: Sequence[Total],
    notes: Sequence[str],
    link: str,
    url: str,
) -> Message:
    shown = list(notes[:_MOST_NOTES])
    if len(notes) > len(shown):
        shown.append(f"{len(notes) - len(shown)} more notes stand in the log of the task report.")
    parts: dict[str, Any] = {
        "title": visible(title),
        "sentences": [*map(visible, sentences)],
        "totals": totals,
        "notes": [*map(visible, shown)],
    }
    html = environment().get_template("message.html").render(**parts, color=color, link=link, url=url)
    return Message(visible(f"Payroc refunds: {', '.join(words)}"), _text(**parts, url=url), html, url)


def _text(
    title: str, sentences: Sequence[str], totals: Sequence[Total], notes: Sequence[str], url: str
) -> str:
    lines = [title, "", *sentences]
    if totals:
        lines += ["", *(f"{t.status:<10} {t.count:>6,}  {money(t.amount, t.currency):>18}" for t in totals)]
    if notes:
        lines += ["", *(f"Note: {note}" for note in notes)]
    return "\n".join([*lines, *(["", url] if url else [])]) + "\n"
