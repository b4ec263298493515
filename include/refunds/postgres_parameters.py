"""
The parameters of a connection to Postgres, as libpq names them: checked before a driver sees them.

libpq and asyncpg drop some that they can't use, a missing client certificate for example, and report others
in ways that look like a server that does not answer.
https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "ssl_min_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
    "ssl_max_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
}
_NUMBERS = {
    "connect_timeout": "seconds, or 0 to wait without a limit",
    "keepalives": "0 or 1",
    "keepalives_idle": "seconds",
    "keepalives_interval": "seconds",
    "keepalives_count": "how many may stay unanswered",
    "tcp_user_timeout": "milliseconds",
}
# What these say while they connect; the English words of libpq, asyncpg, OpenSSL and the server.
_REFUSALS = (
    (
        r"does not match host name|Hostname mismatch|IP address mismatch",
        "the server's certificate is for another host name: connect by the name in it, or correct `sslmode`",
    ),
    (
        r"root certificate file",
        "`sslmode` asks for the certificate of an authority: give its file as `sslrootcert`",
    ),
    (
        r"certificate verify failed",
        "the server's certificate is not signed by the authority in `sslrootcert`: give the right one",
    ),
    (
        r"does not support SSL|rejected SSL upgrade",
        "the server has no TLS, which `sslmode` demands: switch it on there, or correct `sslmode`",
    ),
    (
        r"private key file|could not read certificate file|PEM lib|KEY_VALUES_MISMATCH",
        "`sslcert` and `sslkey` are refused: check both files, `sslpassword`, and that nobody else may "
        "read the key",
    ),
    (
        r"unrecognized configuration parameter|invalid command-line argument|permission denied to set param",
        "`options` has a setting that the server refuses: correct or remove it",
    ),
)


class UnusableParameter(Exception):
    """
    A parameter can't be used; the message names it, never its value, and says what to give. It has no full
    stop.
    """


def checked(
    parameters: Mapping[str, Any], known: Collection[str], *, system_authorities: bool
) -> dict[str, str]:
    """
    Return the parameters as texts, without those that are empty, as Airflow's form sends them.

    :param known: the names that may be given.
    :param system_authorities: whether ``sslrootcert`` may be ``system``.
    :raises UnusableParameter: at the first that is not known, or whose value can't be used.
    """
    given = {name: value for name, value in parameters.items() if value not in (None, "")}
    if unknown := [name for name in given if name not in known]:
        usable = ", ".join(known) if len(known) < 25 else "those of libpq"
        raise UnusableParameter(f"{shown(unknown[0])} can't be used here: remove it; usable are {usable}")
    texts = {name: text_of(name, value) for name, value in given.items()}
    for name, value in texts.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UnusableParameter(f"`{name}` is none of {', '.join(_CHOICES[name])}: give one of them")
        if name in _NUMBERS and not re.fullmatch("[0-9]{1,6}", value):
            raise UnusableParameter(f"`{name}` is no whole number: give {_NUMBERS[name]}")
    _check_files(texts, system_authorities=system_authorities)
    return texts


def shown(name: str) -> str:
    """
    Return the name of a parameter for a message: of a URL that is written wrong, it may be a part of the
    password.
    """
    return (
        f"`{name}`" if re.fullmatch(r"[A-Za-z][A-Za-z_-]{1,39}", name) else "a parameter whose name is none"
    )


def text_of(name: str, value: Any) -> str:
    """
    Return the value of a parameter as text.

    :raises UnusableParameter: when it is neither text nor a number, or has a control character.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UnusableParameter(f"{shown(name)} is neither text nor a whole number: give one of these")
    text = str(value)
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise UnusableParameter(f"{shown(name)} has a control character: remove it")
    return text


def refusal(error: BaseException) -> str | None:
    """
    Return which setting is to blame when a driver could not connect, and what to do; ``None`` when none is.

    :param error: an error of psycopg, asyncpg or OpenSSL.
    """
    words = str(error)
    return next((sentence for pattern, sentence in _REFUSALS if re.search(pattern, words)), None)


def _check_files(texts: Mapping[str, str], *, system_authorities: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name, what in (("sslrootcert", "certificates"), ("sslcrl", "a revocation list")):
        file = texts.get(name)
        if file is None or (name, file, system_authorities) == ("sslrootcert", "system", True):
            continue
        try:
            context.load_verify_locations(cafile=file)
        except (OSError, ValueError):
            raise UnusableParameter(
                f"`{name}` names no file of {what} in PEM form that can be read: give its path"
            ) from None
    if "sslcert" in texts and "sslkey" in texts:
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(texts["sslcert"], texts["sslkey"], lambda: texts.get("sslpassword", ""))
        except (OSError, ValueError):
            raise UnusableParameter(
                "`sslcert` and `sslkey` name no certificate and key in PEM form that belong together: "
                "check both files and `sslpassword`"
            ) from None
    for name in ("sslcert", "sslkey", "passfile"):
        if name in texts:
            try:
                Path(texts[name]).read_bytes()
            except (OSError, ValueError):
                raise UnusableParameter(f"`{name}` names no file that can be read: give its path") from None
