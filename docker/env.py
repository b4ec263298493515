"""
``make env``: write the secrets of a deployment, each drawn afresh, into a file that only its owner can read.

It needs the standard library alone, so that it runs before anything is installed.
"""

from __future__ import annotations

import base64
import difflib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

FILE = Path(".env")
COMPOSE_FILE = Path(__file__).resolve().parent.parent / "docker-compose.yaml"

_HEAD = """\
# Secrets and settings of docker-compose.yaml, written by `make env`. Keep a copy where your other secrets are: without the two keys of the
# ledger what waits in it can't be sent. docs/deploy/compose.md says how to change each.
"""
_SETTINGS = """
# --- settings, all optional -------------------------------------------------------------------------------------------------
# Sample refunds and a local Payroc:
#COMPOSE_PROFILES=demo
# A broker and workers:
#COMPOSE_PROFILES=celery
#AIRFLOW_EXECUTOR=CeleryExecutor
# The port of Airflow's web interface on this machine, and the address that people use:
#AIRFLOW_PORT=8080
#AIRFLOW_BASE_URL=http://localhost:8080
# The Test button of the Connections page:
#AIRFLOW_TEST_CONNECTION=Enabled
# Approved refunds in a database of your own, as include/sql/select_approved.sql reads them:
#AIRFLOW_CONN_REFUNDS_SOURCE='postgres://login:password@db.example:5432/shop'
# Each setting PAYROC_REFUNDS_… of include/refunds/settings.py may stand here:
#PAYROC_REFUNDS_SCHEDULE='0 7 * * 1-5'
#PAYROC_REFUNDS_APPROVERS=2,3
"""


def main(arguments: list[str]) -> int:
    """
    Write the file; of one that is there already, name what nothing reads.

    :param arguments: the file, else ``.env`` in the working folder.
    :return: the exit code: 1 when the file is there already. It may hold the only copy of the ledger's keys.
    """
    file = Path(arguments[0]) if arguments else FILE
    try:
        # With its rights from the first moment on.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        sys.stderr.write(
            f"{file} is there already, and its keys may be the only ones: nothing was written. "
            "Move it away for a new one.\n"
        )
        for sentence in complaints(file):
            sys.stderr.write(f"{sentence}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{file} can't be written ({error.strerror}): give another with ENV_FILE=….\n")
        return 1
    with os.fdopen(descriptor, "w", encoding="utf-8") as written:
        written.write(content())
    sys.stdout.write(f"Wrote {file} with fresh secrets. Keep a copy of it in a safe place.\n")
    return 0


def complaints(file: Path) -> list[str]:
    """Return a sentence for each setting that Compose hands on to no service, and one for line ends of Windows."""
    try:
        content = file.read_bytes()
    except OSError as error:
        return [f"{file} can't be read ({error.strerror})."]
    known = sorted(set(re.findall("PAYROC_REFUNDS_[A-Z_]+[A-Z]", COMPOSE_FILE.read_text(encoding="utf-8"))))
    lines = content.decode("utf-8", "replace").lstrip("\ufeff").splitlines()
    names = [re.match(r"\s*(?:export\s+)?(PAYROC_REFUNDS_\w{0,60})", line, re.IGNORECASE) for line in lines]
    found = [
        f"{name[1]} in {file} is handed on to nobody; the nearest is "
        f"{difflib.get_close_matches(name[1].upper(), known, n=1, cutoff=0)[0]}."
        for name in names
        if name and name[1] not in known
    ]
    if b"\r\n" in content:
        found.append(
            f"{file} has line ends of Windows, which some readers take for a part of each value: convert it."
        )
    return found


def content() -> str:
    """Return the file's text; each call draws new secrets."""
    groups: list[tuple[str, dict[str, str]]] = [
        ("The database's superuser. Used by the service init alone.", {"POSTGRES_PASSWORD": _password()}),
        (
            "Logins of the database; init sets them to what stands here.",
            {
                name: _password()
                for name in (
                    "AIRFLOW_DATABASE_PASSWORD",
                    "CELERY_DATABASE_PASSWORD",
                    "REFUNDS_OWNER_PASSWORD",
                    "REFUNDS_PAYER_PASSWORD",
                    "REFUNDS_OPERATOR_PASSWORD",
                )
            },
        ),
        ("The broker of Celery.", {"BROKER_PASSWORD": _password()}),
        (
            "The first user of Airflow, `admin`. Used once: init makes the user when Airflow has none.",
            {"AIRFLOW_ADMIN_PASSWORD": _password()},
        ),
        ("Airflow: connections in its database, tokens of its API, sessions.", _airflow_keys()),
        (
            "The ledger. Without the first, what waits in it can't be sent; the second is never changed.",
            _ledger_keys(),
        ),
        (
            "Payroc: here the local one of the profile demo, which takes any key. For UAT:\n"
            """# AIRFLOW_CONN_PAYROC_DEFAULT='{"conn_type":"payroc","password":"<API key>","extra":{"environment":"uat"}}'\n"""
            "# A ledger belongs to the Payroc that first answered it: another one takes another ledger.",
            {"AIRFLOW_CONN_PAYROC_DEFAULT": f"'{_local_payroc()}'"},
        ),
    ]
    return _HEAD + "".join(_group(comment, values) for comment, values in groups) + _SETTINGS


def _group(comment: str, values: dict[str, str]) -> str:
    return f"\n# {comment}\n" + "".join(f"{name}={value}\n" for name, value in values.items())


def _airflow_keys() -> dict[str, str]:
    draw: dict[str, Callable[[], str]] = {
        "AIRFLOW_FERNET_KEY": _fernet_key,
        "AIRFLOW_JWT_SECRET": lambda: secrets.token_hex(64),
        "AIRFLOW_SECRET_KEY": lambda: secrets.token_hex(32),
    }
    return {name: each() for name, each in draw.items()}


def _ledger_keys() -> dict[str, str]:
    # What `python -m include.refunds generate-keys` prints.
    return {
        "PAYROC_REFUNDS_ENCRYPTION_KEYS": _fernet_key(),
        "PAYROC_REFUNDS_FINGERPRINT_KEY": secrets.token_urlsafe(48),
    }


def _local_payroc() -> str:
    sandbox = "http://sandbox:8089"
    connection = {
        "conn_type": "payroc",
        "password": secrets.token_hex(16),
        "host": f"{sandbox}/v1",
        "extra": {"identity_url": sandbox, "allow_http": True},
    }
    return json.dumps(connection, separators=(",", ":"))


def _password() -> str:
    # Digits and letters a to f: they need no quotes, neither in URLs nor in this file.
    return secrets.token_hex(24)


def _fernet_key() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
