"""``python -m include.sandbox``: run a local Payroc."""

from __future__ import annotations

import argparse
import errno
import os
import sqlite3
import sys
from collections.abc import Sequence

from include.sandbox.pipeline import Options, Sandbox
from include.sandbox.server import Server, base_url, connection_line, is_loopback, listen
from include.sandbox.store import Store
from include.sandbox.triggers import as_text

DEFAULT_PORT = 8089
DEFAULT_KEY = "sandbox-key"
KEY_VARIABLE = "PAYROC_SANDBOX_API_KEY"


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    described = argparse.ArgumentParser(
        prog="python -m include.sandbox",
        description="A local Payroc: identity, bank transfer refunds and closing of batches, with failures on demand.",
        epilog="Behaviour on demand, by the last four digits of the account number or of the secure token:\n"
        + as_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    described.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    described.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        help="port to listen on; 0 picks a free one (default: %(default)s)",
    )
    described.add_argument(
        "--allow-remote",
        action="store_true",
        help="listen on an address that other machines reach; nothing is protected",
    )
    described.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"accept this API key, and the one in {KEY_VARIABLE}; repeatable (default: every key but wrong…)",
    )
    described.add_argument(
        "--token-seconds",
        type=int,
        default=3600,
        metavar="N",
        help="lifetime of access tokens (default: %(default)s)",
    )
    described.add_argument(
        "--state", metavar="FILE", help="keep the state in this SQLite file (default: in memory)"
    )
    described.add_argument(
        "--hang-seconds",
        type=float,
        default=60.0,
        metavar="N",
        help="how long a hanging request is held (default: %(default)s)",
    )
    described.add_argument(
        "--schema-only", action="store_true", help="accept a create without secCode, as the schema does"
    )
    return described


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the sandbox until it is stopped.

    :return: the exit code: 0 after Ctrl+C, 2 when it cannot start, with one sentence on standard error.
    """
    asked = parser().parse_args(arguments)
    # By the environment a key gets in that must not stand in the list of processes.
    keys = frozenset([*asked.api_key, *filter(None, [os.environ.get(KEY_VARIABLE)])])
    if not (is_loopback(asked.host) or asked.allow_remote):
        return _cannot_start(
            f"{asked.host} can be reached by other machines and the sandbox protects nothing: add --allow-remote to do it."
        )
    if not 0 <= asked.port <= 65535 or asked.token_seconds < 1 or asked.hang_seconds < 0:
        return _cannot_start(
            "--port must be 0 to 65535, --token-seconds at least 1 and --hang-seconds not negative."
        )
    try:
        bound = listen(asked.host, asked.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _cannot_start(
                f"Port {asked.port} on {asked.host} is in use: stop what runs there, or choose another with --port."
            )
        return _cannot_start(f"Cannot listen on {asked.host}, port {asked.port}: {error.strerror}.")
    try:
        store = Store(asked.state or ":memory:")
    except sqlite3.Error as error:
        bound.close()
        return _cannot_start(
            f"Cannot use {asked.state} as the state file (is another sandbox using it?): {error}."
        )

    options = Options(
        api_keys=keys,
        token_seconds=asked.token_seconds,
        hang_seconds=asked.hang_seconds,
        demand_sec_code=not asked.schema_only,
    )
    url = base_url(asked.host, bound.getsockname()[1])
    # Printed before the server starts: the socket listens already, so the first request waits instead of failing.
    print(f"Payroc sandbox: {url}")
    print(f"  page with its refunds: {url}/")
    print(f"  state: {asked.state or 'in memory, gone when it stops'}")
    print("  to point Airflow to it:")
    print(connection_line(url, "<your API key>" if keys else DEFAULT_KEY), flush=True)
    try:
        Server(Sandbox(store, options)).run(sockets=[bound])
    except KeyboardInterrupt:
        return 0
    finally:
        store.close()
    return 0


def _cannot_start(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
