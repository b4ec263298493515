"""``public.refund_requests``: the source table of the demo, and of users who have no table yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from include.refunds.csv_lines import CsvLine
from include.refunds.quiet import QUIET
from include.refunds.roles import APPROVER, PAYER, REQUESTER, create_roles, told_in_one_sentence
from include.refunds.rows import InvalidRow, RefundRow, sentences
from include.refunds.settings import Settings
from include.refunds.source import COLUMNS
from include.refunds.text import fold

_TABLE = """
CREATE TABLE IF NOT EXISTS public.refund_requests (
    source_ref             text PRIMARY KEY,
    processing_terminal_id text NOT NULL,
    order_id               text,
    description            text,
    amount                 bigint NOT NULL,
    currency               text NOT NULL,
    name_on_account        text,
    account_type           text,
    sec_code               text,
    routing_number         text,
    account_number         text,
    secure_token           text,
    email                  text,
    requested_by           text NOT NULL,
    approved_by            text,
    approved_at            timestamptz,
    withdrawn_at           timestamptz,
    -- what became of it, written by include/sql/write_back.sql
    status                 text,
    payroc_refund_id       text,
    payroc_status          text,
    reason                 text,
    updated_at             timestamptz
)"""

# Rows of a table that is older than this rule stay as they are. The pull calls such a row invalid, and as every UPDATE checks the rule
# anew, the write-back has to be let say so.
_TWO_PEOPLE = """
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint
                   WHERE conrelid = 'public.refund_requests'::regclass AND conname = 'approver_is_not_requester') THEN
        ALTER TABLE public.refund_requests ADD CONSTRAINT approver_is_not_requester CHECK (
            approved_by IS NULL OR lower(btrim(requested_by)) <> lower(btrim(approved_by)) OR status IS NOT DISTINCT FROM 'invalid')
            NOT VALID;
    END IF;
END $$"""

_ENTERED = "source_ref, processing_terminal_id, order_id, description, amount, currency, name_on_account, account_type, sec_code"
_ACCOUNT = "routing_number, account_number, secure_token"
_WRITTEN_BACK = "status, payroc_refund_id, payroc_status, reason, updated_at"

# Who enters a refund can't approve it, who approves sees no account, and who pays changes neither.
_GRANTS = (
    f"GRANT USAGE ON SCHEMA public TO {REQUESTER}, {APPROVER}, {PAYER}",
    f"GRANT INSERT ({_ENTERED}, {_ACCOUNT}, email, requested_by) ON public.refund_requests TO {REQUESTER}",
    f"GRANT SELECT ({_ENTERED}, email, requested_by, approved_by, approved_at, withdrawn_at, {_WRITTEN_BACK}), "
    f"UPDATE (approved_by, approved_at, withdrawn_at) ON public.refund_requests TO {APPROVER}",
    f"GRANT SELECT, UPDATE ({_WRITTEN_BACK}) ON public.refund_requests TO {PAYER}",
)


class ImportFailed(Exception):
    """A file can't be imported at all; the message says why."""


@dataclass(slots=True)
class Imported:
    """How many lines were new, how many were known, and what is wrong with each other one, by its number."""

    imported: int = 0
    known: int = 0
    errors: dict[int, str] = field(default_factory=dict)


def create_table(url: URL) -> None:
    """
    Create the table when it is not there, and give the roles that work with it their rights. Harmless to run again.

    :raises RolesMissing: when this login may not do so.
    """
    engine = create_engine(url, **QUIET)
    try:
        with (
            engine.begin() as connection,
            told_in_one_sentence(
                "This login may not create public.refund_requests or give rights on it: run this as the owner of the table, or of the "
                "source's database."
            ),
        ):
            create_roles(connection, (REQUESTER, APPROVER, PAYER), join=False)
            for statement in (_TABLE, _TWO_PEOPLE, *_GRANTS):
                connection.execute(text(statement))
    finally:
        engine.dispose()


def import_lines(
    url: URL, lines: Sequence[CsvLine], settings: Settings, *, advance: Callable[[], None]
) -> Imported:
    """
    Insert the lines of a CSV file that keep the rules for source rows; name the others.

    A line without ``approved_by`` and ``approved_at`` is a request that waits for its approval.

    :param url: the source's database.
    :param settings: what the rules for rows need, see :meth:`RefundRow.read`.
    :param advance: called after each line.
    :raises ImportFailed: when the table is missing.
    """
    insert = text(
        f"INSERT INTO public.refund_requests ({', '.join(COLUMNS)}) VALUES ({', '.join(f':{name}' for name in COLUMNS)}) "
        "ON CONFLICT (source_ref) DO NOTHING"
    )
    result = Imported()
    first: dict[str, int] = {}
    engine = create_engine(url, **QUIET)
    try:
        with engine.begin() as connection:
            for line in lines:
                problem = _problem(line, settings) or _repeated(line, first)
                if problem is not None:
                    result.errors[line.number] = problem
                    advance()
                    continue
                try:
                    with connection.begin_nested():
                        stored = connection.execute(insert, line.row).rowcount
                except ProgrammingError:
                    raise ImportFailed(
                        "The source has no table public.refund_requests: run `python -m include.refunds migrate --demo-source`."
                    ) from None
                except DBAPIError as error:
                    # The driver's message quotes values.
                    result.errors[line.number] = f"The source refused it ({type(error.orig).__name__})."
                else:
                    result.imported += stored
                    result.known += 1 - stored
                advance()
    finally:
        engine.dispose()
    return result


def _problem(line: CsvLine, settings: Settings) -> str | None:
    """Return what is wrong with a line by the rules of the pull, which reads the row again."""
    if line.error is not None:
        return f"It {line.error}."
    errors = dict(line.errors)
    try:
        RefundRow.read(line.row, settings, datetime.now(UTC))
    except InvalidRow as invalid:
        errors = invalid.errors | errors
    if line.row["approved_by"] is None and line.row["approved_at"] is None:
        errors = {
            column: what for column, what in errors.items() if column not in ("approved_by", "approved_at")
        }
    return sentences(errors) or None


def _repeated(line: CsvLine, first: dict[str, int]) -> str | None:
    """Return a sentence when the source_ref came before in any spelling; ``first`` has the lines so far."""
    number = first.setdefault(fold(line.row["source_ref"]), line.number)
    return None if number == line.number else f"`source_ref` is that of line {number}."
