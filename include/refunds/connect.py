"""What the commands need of Airflow, by entry points of an installed package, because nothing here knows Airflow."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points
from typing import Any

from include.refunds.cipher import Cipher
from include.refunds.gateway import Gateway
from include.refunds.settings import Settings
from include.refunds.source import Source

GATEWAY = "payroc_refunds.gateway"
KEYS = "payroc_refunds.keys"
SOURCE = "payroc_refunds.source"
_INSTALL = (
    "run `pip install --no-deps --editable .` in the project's folder, with the Python that runs this command"
)


class NoGateway(Exception):
    """The installed package that knows Airflow is missing; the message says what to run."""


def connect(conn_id: str) -> Gateway:
    """
    Return the gateway behind a connection to Payroc.

    :param conn_id: name of the connection.
    :raises NoGateway: when nothing is installed that knows it.
    :raises PayrocConfigurationError: when the connection can't be used.
    """
    gateway: Gateway = _call(GATEWAY, conn_id)
    return gateway


def connect_source(conn_id: str) -> Source:
    """
    Return the source behind a connection.

    :param conn_id: name of the connection.
    :raises NoGateway: when nothing is installed that knows it.
    :raises SourceError: when the connection can't be used.
    """
    source: Source = _call(SOURCE, conn_id)
    return source


def cipher_of(settings: Settings) -> Cipher:
    """
    Return the cipher of the ledger's requests; only keys that the settings leave to a secrets backend are looked for in one.

    :raises SettingsError: when a key is missing or malformed.
    :raises NoGateway: when nothing is installed that knows the backend.
    """
    if settings.encryption_keys_secret or settings.fingerprint_key_secret:
        cipher: Cipher = _call(KEYS, settings)
        return cipher
    return Cipher(settings)


def _call(group: str, argument: Any) -> Any:
    """Call what is installed as the one entry point of a group."""
    found = list(entry_points(group=group))
    if len(found) != 1:
        what = (
            "Nothing that knows Airflow is installed"
            if not found
            else f"More than one package offers it ({len(found)})"
        )
        raise NoGateway(f"{what} (entry point {group}): {_INSTALL}.")
    # What is imported here may greet people on the terminal; the output belongs to the command.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            factory: Callable[[Any], Any] = found[0].load()
        except (ImportError, AttributeError) as error:
            raise NoGateway(
                f"The entry point {group} ({found[0].value}) can't be imported ({error}): {_INSTALL}."
            ) from None
        return factory(argument)
