"""
Who is told what: our notifiers, which Airflow calls, build one message and hand it to the notifiers of the setting.

Telling never disturbs the paying. Whatever is wrong with a notifier is one sentence in the log, and in the notes of the report.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseNotifier

from payroc_airflow.links import question_url, run_url

if TYPE_CHECKING:
    from airflow.sdk import Context

    from include.refunds.approval import Question
    from include.refunds.message import Message
    from include.refunds.report import Report

log = logging.getLogger(__name__)

# Under these names a task leaves in its context what its notifier tells.
REPORT, QUESTION = "refunds_report", "refunds_question"

# What a notifier is given of a message when the setting says nothing else, by the name of its argument.
_GIVEN = {"subject": "{{ refunds.subject }}", "html_content": "{{ refunds.html }}", "text": "{{ refunds.text }}"}

_VARIABLE = "PAYROC_REFUNDS_NOTIFIERS"
_EXAMPLE = '[{"notifier": "airflow.providers.smtp.notifications.smtp.SmtpNotifier", "to": "finance@example.com"}]'


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
        except Exception as error:  # no message is worth a task, and the text of an error may quote a secret
            log.error("Nobody was told of this: the message could not be made (%s).", type(error).__name__)
            log.debug("Why the message could not be made", exc_info=error)

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
        run_id = context["run_id"]
        report = context.get(REPORT)
        if not isinstance(report, Report):
            try:
                report = _read(run_id, following=self.following)
            except _Unread as error:
                report = Report(f"{'Follow-up' if self.following else 'Refund run'} {run_id}", unfinished=[str(error)])
            report.unfinished.insert(0, _why_without_report(context.get("exception")))
        what = "follow-up" if self.following else "run"
        return run_ended(report, what=what, failed=self.failed, url=run_url(context["ti"].dag_id, run_id))


class ApprovalNeeded(_OurNotifier):
    """Tells that a run waits for a person: a notifier of the operator that asks, which leaves its question in the context."""

    def message(self, context: Context) -> Message | None:
        """Return the question's counts and sums, and where it is answered."""
        from include.refunds.message import approval_needed

        question: Question = context[QUESTION]  # type: ignore[literal-required]
        ti = context["ti"]
        return approval_needed(question, context["run_id"], question_url(ti.dag_id, context["run_id"], ti.task_id))


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


def tell(message: Message, context: Context) -> None:
    """
    Hand a message to each notifier of the setting. One that fails is logged, and keeps no other from being called.

    :param context: what a notifier's templates may use, with the message as ``refunds`` in it.
    """
    for notifier, mistake in _configured():
        if notifier is None:
            log.error("A message was not sent (%s): %s", message.subject, mistake)
            continue
        name = type(notifier).__name__
        try:
            # Not by calling it, which logs the text of an error: that may quote an address with a secret in it.
            known: Any = {**context, "refunds": message}
            notifier.render_template_fields(known)
            notifier.notify(known)
        except Exception as error:  # a notifier may raise anything
            log.error("%s failed (%s), so a message was not sent: %s. Check its connection.", name, type(error).__name__, message.subject)
            log.debug("Why a notifier failed", exc_info=error)
        else:
            log.info("%s was given a message: %s", name, message.subject)


def mistakes() -> list[str]:
    """Return what is wrong with the setting of the notifiers, a sentence each."""
    return [mistake for _, mistake in _configured() if mistake]


def _configured() -> Iterator[tuple[BaseNotifier | None, str]]:
    """Yield each notifier of the setting, or the sentence that says why it is none."""
    import json

    from include.refunds.settings import get_settings

    setting = get_settings().notifiers
    if setting is None:
        return
    try:
        entries = json.loads(setting.get_secret_value())
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and isinstance(entry.get("notifier"), str) for entry in entries):
        yield None, f"{_VARIABLE} is not usable, so nobody is told: it has to be a JSON list such as {_EXAMPLE}."
        return
    for number, entry in enumerate(entries, start=1):
        try:
            yield _made(dict(entry)), ""
        except NotifierMistake as error:
            yield None, f"{_VARIABLE}, entry {number}: {error}"


def _made(arguments: dict[str, Any]) -> BaseNotifier:
    import inspect
    import re
    from importlib import import_module

    path = arguments.pop("notifier")
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except Exception as error:  # noqa: BLE001 - a module may raise anything when it is imported
        raise NotifierMistake(
            f"{path} can't be imported ({type(error).__name__}): correct the path, or install the provider that has it."
        ) from None
    if not (inspect.isclass(kind) and issubclass(kind, BaseNotifier)):
        raise NotifierMistake(f"{path} is no notifier: give the path of a class that is an airflow.sdk.BaseNotifier.")
    accepted = inspect.signature(kind).parameters
    given = {name: template for name, template in _GIVEN.items() if name in accepted and name in kind.template_fields}
    try:
        return kind(**given | arguments)
    except Exception as error:  # noqa: BLE001 - a notifier may raise anything
        # Python's own words about arguments name no value.
        names_no_value = isinstance(error, TypeError) and re.search(r"unexpected keyword argument '\w+'$|missing \d+ required", str(error))
        why = str(error) if names_no_value else type(error).__name__
        raise NotifierMistake(f"{kind.__name__} does not take these arguments ({why}): correct them.") from None


def _read(run_id: str, *, following: bool = False) -> Report:
    """
    Return what the ledger says of a run.

    :raises _Unread: when the ledger can't be read.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from include.refunds.ledger import LedgerError
    from include.refunds.ledger_url import UrlError

    try:
        return asyncio.run(_report(run_id, following))
    except (LedgerError, UrlError, SQLAlchemyError, OSError) as error:
        why = str(error) if isinstance(error, LedgerError | UrlError) else f"The ledger can't be read ({type(error).__name__})."
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


def _why_without_report(error: BaseException | str | None) -> str:
    if error is None:
        return "The task report was ended from outside before it could report."
    # Our own errors are sentences for people; the text of any other one may quote what nobody should read in a mail.
    ours = type(error).__module__.partition(".")[0] in ("include", "payroc_airflow")
    return f"The task report failed: {error if ours else type(error).__name__}"
