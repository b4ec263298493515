"""
Who is told what: our notifiers, which Airflow calls, build one message and hand it to the notifiers of the setting.

Telling never disturbs the paying. Whatever is wrong with a notifier is one sentence in the log, and in the notes of the report; one that
hangs is left behind.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from airflow.sdk import BaseNotifier
from airflow.sdk.log import mask_secret

from include.refunds.printable import printable, visible
from payroc_airflow.links import question_url, run_url

if TYPE_CHECKING:
    from airflow.sdk import Context

    from include.refunds.approval import Question
    from include.refunds.message import Message
    from include.refunds.report import Report

log = logging.getLogger(__name__)

# Under these names a task leaves in its context what its notifier tells, and that the run before has told the same.
REPORT, QUESTION, NO_NEWS = "refunds_report", "refunds_question", "refunds_no_news"

# For so long a notifier is waited for, in seconds, and for so long all of them: Airflow kills a task 20 s after its end.
EACH_SECONDS, ALL_SECONDS = 8.0, 16.0

# The XCom by which a run of the follow-up tells the next one what was open.
_OPEN = "open"

# What a notifier is given of a message when the setting says nothing else, by the name of its argument.
_GIVEN = {
    "subject": "{{ refunds.subject }}",
    "html_content": "{{ refunds.html }}",
    "text": "{{ refunds.text }}",
}

_VARIABLE = "PAYROC_REFUNDS_NOTIFIERS"
_EXAMPLE = (
    '[{"notifier": "airflow.providers.smtp.notifications.smtp.SmtpNotifier", "to": "finance@example.com"}]'
)


# A part of a value of the setting that may be a secret, such as one between two slashes of an address: twelve
# characters or more, a digit among them, outside of templates. An address of mail is none.
_TEMPLATE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
_PART = re.compile(r"""[^\s/?&=:,;'"()]+""")
_MAY_BE_SECRET = re.compile(r"(?=.*[0-9])[^@]{12,}")


class NotifierMistake(Exception):
    """The setting of the notifiers has a mistake; the message names it and what to do, without a value of the setting."""


class _Unread(Exception):
    """The ledger can't be read; the message says why."""


class _OurNotifier(BaseNotifier):
    """Builds a message, and hands it to the notifiers of the setting. It never raises: whoever calls it has money to move."""

    def notify(self, context: Context) -> None:
        """Tell people, if there is something to tell and somebody to be told."""
        from include.refunds.settings import SettingsError, get_settings

        try:
            if get_settings().notifiers is None:
                return
            message = self.message(context)
            if message is not None:
                tell(message, context)
        except SettingsError as error:
            log.error("Nobody was told of this: %s", error)
        except Exception as error:  # noqa: BLE001 - no message is worth a task, and the text of an error may quote a secret
            log.error("Nobody was told of this: the message could not be made (%s).", type(error).__name__)
            log.debug("Where the message could not be made:\n%s", _frames(error))

    def message(self, context: Context) -> Message | None:
        """Return what to tell; ``None`` when there is nothing."""
        raise NotImplementedError


class RunEnded(_OurNotifier):
    """
    Tells how a run ended: a callback of its last task, ``report``.

    :param failed: the task failed, and with it the run. Else people are told only when something waits for them.
    :param following: it is a run of the follow-up.
    """

    def __init__(self, *, failed: bool, following: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.failed = failed
        self.following = following

    def message(self, context: Context) -> Message | None:
        """Return what the report says; of a report that was killed or could not read the ledger, what can be known."""
        from include.refunds.message import run_ended
        from include.refunds.report import Report

        if not self.failed and context["params"].get("dry_run"):
            return None
        if context.get(NO_NEWS):
            log.info("The same was open in the run before, and people were told today.")
            return None
        run_id = context["run_id"]
        report = context.get(REPORT)
        if not isinstance(report, Report):
            try:
                report = _read(run_id, following=self.following)
            except _Unread as error:
                title = f"{'Follow-up' if self.following else 'Refund run'} {printable(run_id)}"
                report = Report(title, unfinished=[str(error)])
            report.unfinished.insert(0, _why("report", context.get("exception")))
        what = "follow-up" if self.following else "run"
        return run_ended(report, what=what, failed=self.failed, url=run_url(context["ti"].dag_id, run_id))


class ApprovalNeeded(_OurNotifier):
    """Tells that a run waits for a person: a notifier of the operator that asks, which leaves its question in the context."""

    def message(self, context: Context) -> Message | None:
        """Return the question's counts and sums, and where it is answered."""
        from include.refunds.message import approval_needed

        question: Question = context[QUESTION]  # type: ignore[literal-required]
        ti = context["ti"]
        return approval_needed(
            question, context["run_id"], question_url(ti.dag_id, context["run_id"], ti.task_id)
        )


class SummaryFailed(_OurNotifier):
    """Tells that there is no summary: a callback of the task ``summary``."""

    def message(self, context: Context) -> Message | None:
        """Return why."""
        from include.refunds.message import run_ended
        from include.refunds.report import Report

        run_id = context["run_id"]
        report = Report(
            f"Daily summary {printable(run_id)}", unfinished=[_why("summary", context.get("exception"))]
        )
        return run_ended(report, what="summary", failed=True, url=run_url(context["ti"].dag_id, run_id))


class DeadlineMissed(_OurNotifier):
    """Tells that a run has not ended by its deadline: the callback of a ``DeadlineAlert``, on an executor."""

    def message(self, context: Context) -> Message | None:
        """Return since when it is due; nothing of a run that has ended: Airflow keeps the deadline of one that has failed."""
        from include.refunds.message import deadline_missed

        run: Any = context["dag_run"]
        if run["state"] not in ("queued", "running"):
            return None
        dag_id, run_id = run["dag_id"], run["dag_run_id"]
        try:
            report = _read(run_id)
        except _Unread as error:
            log.error("%s", error)
            report = None
        due = datetime.fromisoformat(run["logical_date"] or run["run_after"])
        return deadline_missed(report, run_id, due=due, now=datetime.now(UTC), url=run_url(dag_id, run_id))


def leave_for_notifier(report: Report, context: Context) -> None:
    """
    Leave a report of the follow-up in the context of its task, and whether it is news.

    It is none when the run before ended with the same sentences and the same refunds in review on the same day. So what stays open is
    told once a day. A run without a logical date knows of no run before, and whoever triggered it is told.
    """
    from include.refunds.settings import get_settings

    ti: Any = context["ti"]
    today = datetime.now(ZoneInfo(get_settings().timezone)).date()
    in_review = [line.id for line in report.refunds if line.status == "review"]
    is_open = sha256(json.dumps([str(today), in_review, sorted(report.unfinished)]).encode()).hexdigest()
    before = ti.get_previous_dagrun()
    no_news = (
        before is not None and ti.xcom_pull(run_id=before.run_id, task_ids=ti.task_id, key=_OPEN) == is_open
    )
    ti.xcom_push(key=_OPEN, value=is_open)
    left: Any = context
    left[REPORT], left[NO_NEWS] = report, no_news


def tell(message: Message, context: Context) -> None:
    """
    Hand a message to each notifier of the setting. One that fails or hangs is logged, and keeps no other from being called.

    :param context: what a notifier's templates may use, with the message as ``refunds`` in it.
    """
    until = time.monotonic() + ALL_SECONDS
    configured = list(_configured())
    for number, (notifier, mistake) in enumerate(configured):
        if notifier is None:
            log.error("A message was not sent (%s): %s", message.subject, mistake)
            continue
        # What the earlier ones have not used is for all that come.
        seconds = min(EACH_SECONDS, (until - time.monotonic()) / (len(configured) - number))
        handing = _Handing(notifier, {**context, "refunds": message})
        handing.start()
        handing.join(seconds)
        name, error = type(notifier).__name__, handing.error
        if handing.is_alive():
            log.error(
                "%s has not ended after %.0f s and is left behind, it may have sent or not: %s.",
                name,
                seconds,
                message.subject,
            )
        elif isinstance(error, NotifierMistake):
            log.error("A message was not sent (%s): %s", message.subject, error)
        elif error is not None:
            log.error(
                "%s failed (%s), so a message was not sent: %s. Check its connection.",
                name,
                type(error).__name__,
                message.subject,
            )
            log.debug("Where %s failed:\n%s", name, _frames(error))
        else:
            log.info("%s was given a message: %s", name, message.subject)


class _Handing(threading.Thread):
    """Hands a message to one notifier, in a thread that ends with the process at the latest: a notifier may have no time limit."""

    def __init__(self, notifier: BaseNotifier, context: Any) -> None:
        super().__init__(daemon=True, name=f"notifier {type(notifier).__name__}")
        self.error: Exception | None = None
        self._notifier = notifier
        self._known = context
        # Airflow knows by these variables whose log and whose connections they are.
        self._variables = copy_context()

    def run(self) -> None:
        try:
            self._variables.run(self._hand_over)
        except Exception as error:  # noqa: BLE001 - a notifier may raise anything
            self.error = error

    def _hand_over(self) -> None:
        # Not by calling it, which logs the text of an error: that may quote an address with a secret in it.
        with _templates_unlogged():
            _render(self._notifier, self._known)
            self._notifier.notify(self._known)


def _render(notifier: BaseNotifier, known: Any) -> None:
    """
    Render a notifier's templates, as its ``render_template_fields`` does, which logs the one that it can't render.

    :raises NotifierMistake: when one can't be rendered; it names the argument.
    """
    from jinja2 import StrictUndefined

    environment = notifier.get_template_env(dag=known.get("dag"))
    # What a template misspells would be empty otherwise: a mail to nobody.
    environment.undefined = StrictUndefined
    for name in notifier.template_fields:
        template = getattr(notifier, name, None)
        try:
            setattr(notifier, name, notifier.render_template(template, known, environment))
        except Exception as error:  # noqa: BLE001 - a template may call anything
            raise NotifierMistake(
                f"the argument `{name}` of {type(notifier).__name__} can't be rendered ({type(error).__name__}): "
                f"correct its template in {_VARIABLE}."
            ) from None


# Set while Airflow must not log the templates that it works on.
_unlogged: ContextVar[bool] = ContextVar("unlogged", default=False)


@contextmanager
def _templates_unlogged() -> Iterator[None]:
    """Keep Airflow from logging a template that it can't render, or the name of a file that it can't find."""
    before = _unlogged.set(True)
    try:
        yield
    finally:
        _unlogged.reset(before)


class _TemplatesUnlogged(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _unlogged.get()


logging.getLogger(BaseNotifier.render_template.__module__).addFilter(_TemplatesUnlogged())


def mistakes() -> list[str]:
    """Return what is wrong with the setting of the notifiers, a sentence each."""
    return [mistake for _, mistake in _configured() if mistake]


def _configured() -> Iterator[tuple[BaseNotifier | None, str]]:
    """Yield each notifier of the setting, or the sentence that says why it is none."""
    from include.refunds.settings import get_settings

    setting = get_settings().notifiers
    if setting is None:
        return
    try:
        entries = json.loads(setting.get_secret_value())
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("notifier"), str) for entry in entries
    ):
        yield (
            None,
            f"{_VARIABLE} is not usable, so nobody is told: it has to be a JSON list such as {_EXAMPLE}.",
        )
        return
    for number, entry in enumerate(entries, start=1):
        _mask(entry)
        try:
            yield _made(dict(entry)), ""
        except NotifierMistake as error:
            yield None, f"{_VARIABLE}, entry {number}: {error}"


def _mask(value: Any, name: str = "") -> None:
    """Let Airflow mask what may be a secret in its logs: a notifier's may quote the address that it calls."""
    match value:
        case dict():
            for name, item in value.items():
                _mask(item, name)
        case list():
            for item in value:
                _mask(item, name)
        case str() if name != "notifier" and not name.endswith("conn_id"):
            for part in _PART.findall(_TEMPLATE.sub(" ", value)):
                if _MAY_BE_SECRET.fullmatch(part):
                    mask_secret(part)


def _made(arguments: dict[str, Any]) -> BaseNotifier:
    import inspect
    from importlib import import_module

    path = arguments.pop("notifier")
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except Exception as error:  # noqa: BLE001 - a module may raise anything when it is imported
        raise NotifierMistake(
            f"{printable(path)} can't be imported ({type(error).__name__}): correct the path, or install the provider "
            "that has it."
        ) from None
    if not (inspect.isclass(kind) and issubclass(kind, BaseNotifier)):
        raise NotifierMistake(
            f"{printable(path)} is no notifier: give the path of a class that is an airflow.sdk.BaseNotifier."
        )
    accepted = inspect.signature(kind).parameters
    given = {
        name: template
        for name, template in _GIVEN.items()
        if name in accepted and name in kind.template_fields
    }
    try:
        with _templates_unlogged():
            return kind(**given | arguments)
    except Exception as error:  # noqa: BLE001 - a notifier may raise anything
        # Python's own words about arguments name no value.
        names_no_value = isinstance(error, TypeError) and re.search(
            r"unexpected keyword argument '\w+'$|missing \d+ required", str(error)
        )
        why = str(error) if names_no_value else type(error).__name__
        raise NotifierMistake(
            f"{kind.__name__} does not take these arguments ({why}): correct them."
        ) from None


def _read(run_id: str, *, following: bool = False) -> Report:
    """
    Return what the ledger says of a run.

    :raises _Unread: when the ledger can't be read.
    """
    from include.refunds.ledger import LedgerError
    from include.refunds.ledger.connection import DATABASE_ERRORS
    from include.refunds.ledger_url import UrlError

    try:
        return asyncio.run(_report(run_id, following))
    except (LedgerError, UrlError, *DATABASE_ERRORS) as error:
        why = (
            str(error)
            if isinstance(error, LedgerError | UrlError)
            else f"The ledger can't be read ({type(error).__name__})."
        )
        raise _Unread(f"{why} So this message has no counts.") from None


async def _report(run_id: str, following: bool) -> Report:
    from include.refunds.report import follow_up_report, run_report
    from include.refunds.settings import get_settings
    from payroc_airflow.databases import ledger_as

    settings = get_settings()
    async with ledger_as(f"message about {run_id}", settings) as ledger:
        if following:
            return await follow_up_report(ledger.engine, settings.source)
        return await run_report(ledger.engine, settings.source, run_id)


def _why(task_id: str, error: BaseException | str | None) -> str:
    if error is None:
        return f"The task {task_id} was ended from outside before it could report."
    # Our own errors are sentences for people; the text of any other one may quote what nobody should read in a mail.
    ours = type(error).__module__.partition(".")[0] in ("include", "payroc_airflow")
    return f"The task {task_id} failed: {visible(str(error)) if ours else type(error).__name__}"


def _frames(error: BaseException) -> str:
    """Return where an error comes from, without its text and without code, which may quote a secret."""
    return "\n".join(
        f"{frame.filename}, line {frame.lineno}, in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    )
