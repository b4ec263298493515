"""The database roles, each with the least rights that its work needs. docs/security.md says who gets which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import Connection, text
from sqlalchemy.exc import ProgrammingError

REQUESTER = "refunds_requester"
APPROVER = "refunds_approver"
PAYER = "refunds_payer"
OPERATOR = "refunds_operator"
AUDITOR = "refunds_auditor"
KEY_ROTATOR = "refunds_key_rotator"
MIGRATOR = "refunds_migrator"

ROLES = (REQUESTER, APPROVER, PAYER, OPERATOR, AUDITOR, KEY_ROTATOR, MIGRATOR)

# Another database of the server may do the same at this moment.
_CREATE = """
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN CREATE ROLE {role} NOLOGIN; END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END $$"""
_JOIN = """
DO $$ BEGIN
    IF NOT pg_has_role(current_user, '{role}', 'USAGE') THEN GRANT {role} TO CURRENT_USER; END IF;
EXCEPTION WHEN unique_violation THEN NULL;
END $$"""


class RolesMissing(Exception):
    """A login may not do what making the schema or the roles takes; the message says who can and how."""


def create_roles(connection: Connection, roles: Sequence[str] = ROLES, *, join: bool = True) -> None:
    """
    Create the roles that the server does not have yet.

    Roles belong to the server, not to one database, so another ledger or source may have made them before. They can't log in: people
    and services get logins of their own, which are granted one of these.

    :param join: let this login act as each of them: so a ledger with one login for everything goes on working, because the login that
        migrates may do all.
    :raises RolesMissing: when this login may neither create nor grant them.
    """
    with told_in_one_sentence(
        f"The database roles ({', '.join(roles)}) do not exist, or are not granted to this login, and it may not change that: "
        "let a login with CREATEROLE run this command once, or create and grant them as docs/security.md shows."
    ):
        for role in roles:
            for statement in (_CREATE, _JOIN) if join else (_CREATE,):
                connection.execute(text(statement.format(role=role)))


@contextmanager
def told_in_one_sentence(sentence: str) -> Iterator[None]:
    """
    Turn the database's refusal for want of a right into a sentence that says what to do.

    :raises RolesMissing: with the sentence.
    """
    try:
        yield
    except ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) != "42501":
            raise
        raise RolesMissing(sentence) from None
