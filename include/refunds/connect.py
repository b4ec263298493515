"""The way to Payroc for the commands: an installed package says how, because nothing here knows Airflow."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points

from include.refunds.gateway import Gateway

GROUP = "payroc_refunds.gateway"
_INSTALL = "run `pip install --no-deps --editable .` in the project's folder, with the Python that runs this command"


class NoGateway(Exception):
    """No way to Payroc is installed; the message says what to run."""


def connect(conn_id: str) -> Gateway:
    """
    Return the gateway behind a connection, by the factory that is installed as an entry point of the group ``payroc_refunds.gateway``.

    :param conn_id: name of the connection to Payroc.
    :raises NoGateway: when none is installed, or more than one, or it can't be imported.
    :raises PayrocConfigurationError: when the connection can't be used.
    """
    found = list(entry_points(group=GROUP))
    if len(found) != 1:
        what = "No way to Payroc is installed" if not found else f"More than one package offers a way to Payroc ({len(found)})"
        raise NoGateway(f"{what} (entry point {GROUP}): {_INSTALL}.")
    # What is imported here may greet people on the terminal; the output belongs to the command.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            factory = found[0].load()
        except (ImportError, AttributeError) as error:
            raise NoGateway(f"The way to Payroc ({found[0].value}) can't be imported ({error}): {_INSTALL}.") from None
        gateway: Gateway = factory(conn_id)
    return gateway
