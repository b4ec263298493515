"""The certificates that a connection to Payroc trusts."""

from __future__ import annotations

import re
import ssl
from functools import lru_cache
from pathlib import Path

import certifi

# What `openssl rehash` calls the certificates of a folder; OpenSSL opens no others.
_HASHED = re.compile(r"[0-9a-f]{8}\.[0-9]+")


class NoCertificates(ValueError):
    """A file or folder gives no certificates; the message says why and what to do."""


@lru_cache
def trusted(ca_bundle: str | None) -> ssl.SSLContext:
    """
    Return a context that verifies servers, and takes nothing from the environment.

    :param ca_bundle: PEM file, or folder prepared by ``openssl rehash``; ``None`` takes the usual
        certificates.
    :raises NoCertificates: there are none in it.
    """
    path = Path(ca_bundle or certifi.where())
    context = _context()
    context.set_alpn_protocols(["http/1.1"])
    try:
        if path.is_dir():
            # OpenSSL opens a folder's files only when it looks for one of them, and says nothing when there
            # is none.
            if not any(_loads(_context(), file) for file in path.iterdir() if _HASHED.fullmatch(file.name)):
                raise NoCertificates(
                    "holds no certificate under the name of its hash; run `openssl rehash` on this folder."
                )
            context.load_verify_locations(capath=str(path))
        elif not path.is_file():
            raise NoCertificates("does not exist on this host, or is neither a file nor a folder.")
        elif not _loads(context, path):
            raise NoCertificates(
                "holds no certificate in PEM form, or a broken one; convert it, such as with "
                "`openssl x509 -inform der`."
            )
    except OSError as error:
        raise NoCertificates(f"can't be read ({error.strerror}); let Airflow's user read it.") from None
    return context


def _context() -> ssl.SSLContext:
    # Not ssl.create_default_context, which reads the environment: trusted certificates, and a file to write
    # session keys to.
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _loads(context: ssl.SSLContext, file: Path) -> bool:
    try:
        context.load_verify_locations(cafile=str(file))
    except ssl.SSLError:
        return False
    return context.cert_store_stats()["x509"] > 0
