"""The server: one listening socket on the loopback interface, stopped at once by SIGTERM even while requests hang."""

from __future__ import annotations

import ipaddress
import json
import socket

import uvicorn

from include.sandbox.app import create_app
from include.sandbox.connections import Protocol
from include.sandbox.pipeline import Sandbox

# Longer than clients keep idle connections, so that a reused one is never found closed: such failures are asked for, not random.
KEEP_ALIVE_SECONDS = 75
SHUTDOWN_SECONDS = 1


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """
    Bind the socket to serve on.

    :param port: 0 picks a free one.
    :raises OSError: the port is in use, or the host is not an address of this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # Now, not when the server starts: the address must answer as soon as it is printed, and a second sandbox must fail here.
        bound.listen(socket.SOMAXCONN)
    except OSError:
        bound.close()
        raise
    return bound


def base_url(host: str, port: int) -> str:
    """Write the URL of a host and port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def connection_line(url: str, password: str) -> str:
    """Write the shell line that points the Airflow connection ``payroc_default`` to a sandbox."""
    connection = {
        "conn_type": "payroc",
        "password": password,
        "host": f"{url}/v1",
        "extra": {"identity_url": url},
    }
    return f"export AIRFLOW_CONN_PAYROC_DEFAULT='{json.dumps(connection, separators=(',', ':'))}'"


class Server(uvicorn.Server):
    """uvicorn's server, which would wait for hanging requests before it stops."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(sandbox),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        self._sandbox = sandbox

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the held connections, then stop."""
        self._sandbox.held.release()
        await super().shutdown(sockets)
