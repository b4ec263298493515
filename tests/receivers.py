"""What receives mail and metrics in tests: a mail server and a StatsD listener on this machine, which keep all that they get."""

from __future__ import annotations

import email
import email.policy
import json
import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

HOST = "127.0.0.1"


class Refusing:
    """A web server that knows no address, and quotes the one that it was asked for."""

    def __init__(self) -> None:
        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.send_error(404, explain=f"Cannot POST {self.path}")

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((HOST, 0), Answer)
        self.url = f"http://{HOST}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Mailbox:
    """A mail server that takes every mail."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        box = self

        class Session(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self._say("220 ready")
                for line in iter(self.rfile.readline, b""):
                    verb = line[:4].upper().strip()
                    if verb == b"DATA":
                        self._say("354 go on")
                        data = b"".join(iter(self.rfile.readline, b".\r\n"))
                        box.mails.append(
                            email.message_from_bytes(
                                data.replace(b"\r\n..", b"\r\n."), policy=email.policy.default
                            )
                        )
                    self._say("221 bye" if verb == b"QUIT" else "250 fine")
                    if verb == b"QUIT":
                        return

            def _say(self, words: str) -> None:
                self.wfile.write(f"{words}\r\n".encode())

        self._server = socketserver.ThreadingTCPServer((HOST, 0), Session)
        self._server.daemon_threads = True

    @property
    def connection(self) -> str:
        """The Airflow connection that leads here, as JSON."""
        extra = {
            "disable_ssl": True,
            "disable_tls": True,
            "from_email": "airflow@merchant.example",
            "timeout": 60,
            "retry_limit": 1,
        }
        return json.dumps(
            {"conn_type": "smtp", "host": HOST, "port": self._server.server_address[1], "extra": extra}
        )

    def about(self, words: str) -> list[EmailMessage]:
        """Return the mails that hold these words."""
        return [mail for mail in self.mails if words in body_of(mail)]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def body_of(mail: EmailMessage) -> str:
    """Return the HTML of a mail."""
    part = mail.get_body(("html",))
    assert part is not None, f"no HTML in {mail}"
    return str(part.get_content())


class StatsD:
    """A StatsD server that keeps what it gets."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        told = self.lines

        class Datagram(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                told.extend(self.request[0].decode().splitlines())

        self._server = socketserver.ThreadingUDPServer((HOST, 0), Datagram)
        self._server.daemon_threads = True

    @property
    def environment(self) -> dict[str, str]:
        """The settings of an Airflow that sends its metrics here."""
        return {
            "AIRFLOW__METRICS__STATSD_ON": "True",
            "AIRFLOW__METRICS__STATSD_HOST": HOST,
            "AIRFLOW__METRICS__STATSD_PORT": str(self._server.server_address[1]),
        }

    def values(self, name: str) -> list[float]:
        """Return what was told of a metric of the project."""
        found = [
            re.fullmatch(rf"airflow\.payroc_refunds\.{re.escape(name)}:([0-9.]+)\|(?:c|g|ms)", line)
            for line in self.lines
        ]
        return [float(match[1]) for match in found if match]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def receivers() -> Iterator[tuple[Mailbox, StatsD]]:
    """Yield a mailbox and a StatsD server."""
    with Mailbox() as mailbox, StatsD() as statsd:
        yield mailbox, statsd
