"""``public.refund_requests``: the source table of the demo, and of users who have no table yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from include.refunds.quiet import QUIET
from include.refunds.roles import APPROVER, PAYER, REQUESTER, create_roles, told_in_one_sentence
from include.refunds.source import COLUMNS

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
    """Result of an import: how many lines are new, how many were known, and the errors by line number."""

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


def import_lines(url: URL, lines: Sequence[dict[str, str]], *, advance: Callable[[], None]) -> Imported:
    """
    Insert the lines of a CSV file. Whether a row makes a valid refund is judged by the pull, not here.

    :param url: the source's database.
    :param lines: one mapping per line; an empty text is NULL.
    :param advance: called after each line.
    :raises ImportFailed: when a column or the table is missing.
    """
    # The reader puts what a line has too much under no name.
    header = [name for name in lines[0] if name is not None] if lines else []
    if header and not set(header) & set(COLUMNS):
        # The first line may be a payee, and is not repeated.
        raise ImportFailed(
            "The first line of the CSV file names none of the columns of include/sql/select_approved.sql: add a header."
        )
    # A value that slipped into the header is not repeated either.
    unknown = sorted(
        name if re.fullmatch(r"[A-Za-z_]{1,30}", name) else "a name that is none"
        for name in set(header) - set(COLUMNS)
    )
    missing = sorted(set(COLUMNS) - set(header)) if header else []
    if unknown or missing:
        raise ImportFailed(
            "The header of the CSV file does not fit: "
            + "; ".join(
                part
                for part in (
                    missing and f"missing {', '.join(missing)}",
                    unknown and f"unknown {', '.join(unknown)}",
                )
                if part
            )
            + ". Use the columns of include/sql/select_approved.sql."
        )
    insert = text(
        f"INSERT INTO public.refund_requests ({', '.join(COLUMNS)}) VALUES ({', '.join(f':{name}' for name in COLUMNS)}) "
        "ON CONFLICT (source_ref) DO NOTHING"
    )
    result = Imported()
    engine = create_engine(url, **QUIET)
    try:
        with engine.begin() as connection:
            for number, line in enumerate(lines, start=2):
                try:
                    with connection.begin_nested():
                        stored = connection.execute(insert, _typed(line)).rowcount
                except ValueError as error:
                    result.errors[number] = str(error)
                except ProgrammingError:
                    raise ImportFailed(
                        "The source has no table public.refund_requests: run `python -m include.refunds migrate --demo-source`."
                    ) from None
                except DBAPIError as error:
                    result.errors[number] = _column_of(error)
                else:
                    result.imported += stored
                    result.known += 1 - stored
                advance()
    finally:
        engine.dispose()
    return result


def _typed(line: dict[str, str]) -> dict[str, str | int | None]:
    values: dict[str, str | int | None] = {
        name: line[name].strip() or None if line[name] is not None else None for name in COLUMNS
    }
    if None in line:
        raise ValueError("has more fields than the header")
    if None in line.values():
        raise ValueError("has fewer fields than the header")
    if not values["source_ref"]:
        raise ValueError("source_ref is missing")
    try:
        values["amount"] = int(str(values["amount"]))
    except ValueError:
        raise ValueError("amount must be a whole number in minor units, such as 4999 for 49.99") from None
    return values


def _column_of(error: DBAPIError) -> str:
    # The driver's message quotes the value; the column is what a person needs.
    column = getattr(getattr(error.orig, "diag", None), "column_name", None)
    return (
        f"{column} is missing or has a wrong form"
        if column
        else "a value has a wrong form, such as an instant that is none"
    )
