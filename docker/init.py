"""
What the service ``init`` of docker-compose.yaml does at each start: logins and databases, both migrations, the pool and the first user.

Everything in it can run again. Passwords become what the environment says, so that a new one in ``.env`` is set by the next start; users of
Airflow, who may have changed theirs or have deleted the first one, are left alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg.sql import SQL, Identifier, Literal

from include.refunds.roles import KEY_ROTATOR, OPERATOR, PAYER

SUPERUSER = "postgres"
LEDGER_OWNER = "refunds_owner"
LEDGER = "refunds"
PAYER_LOGIN = "airflow_payer"
OPERATOR_LOGIN = "refunds_operations"
# Databases that every server has.
COMMON = ("postgres", "template1")

# Login, variable of its password, and the database that is its own.
OWNERS = (
    ("airflow", "AIRFLOW_DATABASE_PASSWORD", "airflow"),
    ("celery", "CELERY_DATABASE_PASSWORD", "celery"),
    (LEDGER_OWNER, "REFUNDS_OWNER_PASSWORD", LEDGER),
)
# Login, variable of its password, and the role that it is granted.
MEMBERS = (
    (PAYER_LOGIN, "REFUNDS_PAYER_PASSWORD", PAYER),
    (OPERATOR_LOGIN, "REFUNDS_OPERATOR_PASSWORD", OPERATOR),
)
POOL = ("payroc_api", "4", "Calls to Payroc at a time")
ADMIN = "admin"


def main() -> int:
    """Do all of it, in the order in which one thing needs the other."""
    create_logins_and_databases()
    migrate_ledger()
    grant_roles()
    prepare_airflow()
    return 0


def create_logins_and_databases() -> None:
    """Create logins and databases that are missing, and set the passwords. Nobody but those who need it may connect to a database."""
    with _connection("postgres", SUPERUSER, "POSTGRES_PASSWORD") as connection:
        for login, variable, _ in (*OWNERS, *MEMBERS):
            if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [login]).fetchone() is None:
                connection.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(login)))
            connection.execute(
                SQL("ALTER ROLE {} PASSWORD {}").format(Identifier(login), Literal(os.environ[variable]))
            )
        # The ledger's first migration makes its roles.
        connection.execute(SQL("ALTER ROLE {} CREATEROLE").format(Identifier(LEDGER_OWNER)))
        for login, _, _ in MEMBERS:
            # A program that stands still in a transaction must not hold up the others for ever.
            connection.execute(
                SQL("ALTER ROLE {} SET idle_in_transaction_session_timeout = '5min'").format(
                    Identifier(login)
                )
            )
        for login, _, database in OWNERS:
            if (
                connection.execute("SELECT FROM pg_database WHERE datname = %s", [database]).fetchone()
                is None
            ):
                connection.execute(
                    SQL("CREATE DATABASE {} OWNER {}").format(Identifier(database), Identifier(login))
                )
        for database in (*(each for _, _, each in OWNERS), *COMMON):
            connection.execute(SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(Identifier(database)))


def migrate_ledger() -> None:
    """Bring the ledger to the newest revision as its owner, with the table ``public.refund_requests`` for those who have none."""
    url = f"postgresql://{LEDGER_OWNER}:{os.environ['REFUNDS_OWNER_PASSWORD']}@{_server()}/{LEDGER}"
    subprocess.run(
        [sys.executable, "-m", "include.refunds", "migrate", "--demo-source"],
        check=True,
        env=os.environ | {"PAYROC_REFUNDS_LEDGER_URL": url, "PAYROC_REFUNDS_SOURCE_URL": url},
    )


def grant_roles() -> None:
    """Give each login its role and the right to connect, and take from the owner what only the logins need."""
    with _connection("postgres", SUPERUSER, "POSTGRES_PASSWORD") as connection:
        for login, _, role in MEMBERS:
            # Not to the role, which every other ledger of the server has, too.
            connection.execute(
                SQL("GRANT CONNECT ON DATABASE {} TO {}").format(Identifier(LEDGER), Identifier(login))
            )
            connection.execute(SQL("GRANT {} TO {}").format(Identifier(role), Identifier(login)))
    with _connection(LEDGER, LEDGER_OWNER, "REFUNDS_OWNER_PASSWORD") as connection:
        # By the owner itself: it has granted them to itself, and only that is taken back.
        for role in (PAYER, OPERATOR, KEY_ROTATOR):
            connection.execute(SQL("REVOKE {} FROM {}").format(Identifier(role), Identifier(LEDGER_OWNER)))


def prepare_airflow() -> None:
    """Bring Airflow's database to the newest revision, and make the pool when it is missing, and the first user when there is none."""
    _airflow("db", "migrate")
    try:
        _airflow("pools", "get", POOL[0])
    except SystemExit:
        # It was not found. One that is there may have got another size by people.
        _airflow("pools", "set", *POOL)
    with _connection("airflow", "airflow", "AIRFLOW_DATABASE_PASSWORD") as connection:
        if connection.execute("SELECT FROM ab_user LIMIT 1").fetchone() is not None:
            return
    password = os.environ["AIRFLOW_ADMIN_PASSWORD"]
    names = ("--username", ADMIN, "--email", "admin@localhost", "--firstname", "First", "--lastname", "User")
    _airflow("users", "create", *names, "--role", "Admin", "--password", password)


def _airflow(*command: str) -> None:
    """Run an Airflow command in this process: Airflow is loaded once, and no password stands in a list of processes."""
    from airflow.cli.cli_parser import get_parser  # noqa: TID251 - the ban is for include/

    asked = get_parser().parse_args(command)
    asked.func(asked)


@contextmanager
def _connection(database: str, login: str, variable: str) -> Iterator[psycopg.Connection]:
    host, port = os.environ["POSTGRES_HOST"], os.environ["POSTGRES_PORT"]
    with psycopg.connect(
        host=host,
        port=port,
        user=login,
        password=os.environ[variable],
        dbname=database,
        autocommit=True,
        connect_timeout=10,
    ) as connection:
        yield connection


def _server() -> str:
    return f"{os.environ['POSTGRES_HOST']}:{os.environ['POSTGRES_PORT']}"


if __name__ == "__main__":
    sys.exit(main())
