"""
Bearer tokens, shared by the processes of one host.

Each task of a run is a process of its own; without sharing, 1,000 refunds would ask Payroc for 1,000 tokens. The file is read again only
when it has changed: within a process a token costs no more than a look at the file's date.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import stat
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from include.payroc.models import AccessToken
from include.refunds.settings import get_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from payroc_airflow.connection import PayrocConnection

log = logging.getLogger(__name__)

RENEW_BEFORE_END_SECONDS = 120
"""A token is renewed so long before its end, or a fifth of its life before it if that is less."""

LOCK_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class CachedToken:
    """
    A token and when it came.

    :param received_at: seconds since 1970, read *before* Payroc was asked: the token is at most so old, and it was surely issued later.
    """

    token: AccessToken
    received_at: float

    def usable(self, now: float, younger_than: float | None) -> bool:
        """Tell whether the token may be given out; one from the future (the clock was set back) may not."""
        age = now - self.received_at
        margin = min(RENEW_BEFORE_END_SECONDS, self.token.expires_in / 5)
        return 0 <= age < self.token.expires_in - margin and (younger_than is None or age < younger_than)


class TokenCache(Protocol):
    """Keeps one token for one Payroc and one API key."""

    async def get(
        self, fetch: Callable[[], Awaitable[AccessToken]], *, younger_than: float | None = None
    ) -> AccessToken:
        """
        Return the kept token, or fetch one and keep it.

        :param fetch: asks Payroc.
        :param younger_than: seconds; a token that was received at least so long ago is not returned.
        """

    async def evict(self, token: AccessToken) -> None:
        """Forget exactly this token; another one stays."""


class MemoryTokenCache:
    """A cache for one hook."""

    def __init__(self) -> None:
        self._entry: CachedToken | None = None
        self._fetching = False

    async def get(
        self, fetch: Callable[[], Awaitable[AccessToken]], *, younger_than: float | None = None
    ) -> AccessToken:
        """See :class:`TokenCache`."""
        while self._fetching:
            await asyncio.sleep(LOCK_POLL_SECONDS)
        entry = self._entry
        if entry is None or not entry.usable(time.time(), younger_than):
            self._fetching = True
            try:
                asked_at = time.time()
                entry = self._entry = CachedToken(await fetch(), asked_at)
            finally:
                self._fetching = False
        return entry.token

    async def evict(self, token: AccessToken) -> None:
        """See :class:`TokenCache`."""
        if self._entry is not None and _same(self._entry.token, token):
            self._entry = None


class FileTokenCache:
    """
    A cache for all processes of one user on one host.

    One file per Payroc and API key, encrypted with a key made from the API key: who has that can get a token anyway. A lock
    is held while a token is fetched, so that processes which start together ask Payroc once. A file that can't be read,
    decrypted or understood counts as no file.

    :param folder: one that :func:`trouble_with` finds no fault with; it is looked at again before a token is written.
    :param connection: gives the entry's name and key.
    :param lock_seconds: how long to wait for another process that fetches a token; then this one fetches its own and
        keeps it to itself.
    """

    def __init__(self, folder: Path, connection: PayrocConnection, *, lock_seconds: float) -> None:
        name = hashlib.sha256(
            f"{connection.identity_url}\0{connection.api_url}\0{connection.api_key}".encode()
        ).hexdigest()
        self._fernet = seal(name, connection.api_key)
        self._lock_seconds = lock_seconds
        self._entry_path = folder / f"{name}.token"
        self._lock_path = folder / f"{name}.lock"
        self._last: tuple[tuple[int, int, int] | None, CachedToken | None] = None, None
        # What could not be written, and what could not be removed.
        self._unshared: CachedToken | None = None
        self._evicted: AccessToken | None = None

    async def get(
        self, fetch: Callable[[], Awaitable[AccessToken]], *, younger_than: float | None = None
    ) -> AccessToken:
        """See :class:`TokenCache`."""
        entry = self._read()
        if entry is not None and entry.usable(time.time(), younger_than):
            return entry.token
        async with self._locked() as locked:
            entry = self._read()
            if entry is None or not entry.usable(time.time(), younger_than):
                asked_at = time.time()
                entry = CachedToken(await fetch(), asked_at)
                self._unshared = None if locked and self._write(entry) else entry
            return entry.token

    async def evict(self, token: AccessToken) -> None:
        """See :class:`TokenCache`."""
        if self._unshared is not None and _same(self._unshared.token, token):
            self._unshared = None
        if not self._holds(token):
            return
        async with self._locked() as locked:
            # Without the lock a newer token might be written between reading and removing.
            if locked and self._holds(token):
                self._evicted = token
                try:
                    self._entry_path.unlink(missing_ok=True)
                except OSError as error:
                    log.warning("%s can't be removed (%s).", self._entry_path, error.strerror)

    def _holds(self, token: AccessToken) -> bool:
        entry = self._read_file()
        return entry is not None and _same(entry.token, token)

    def _read(self) -> CachedToken | None:
        entries = [
            entry for entry in (self._read_file(), self._unshared) if entry and not self._is_evicted(entry)
        ]
        return max(entries, key=lambda entry: entry.received_at, default=None)

    def _is_evicted(self, entry: CachedToken) -> bool:
        return self._evicted is not None and _same(entry.token, self._evicted)

    def _read_file(self) -> CachedToken | None:
        try:
            found = self._entry_path.stat()
        except OSError:
            return None
        # Each token is a new file.
        version = found.st_ino, found.st_ctime_ns, found.st_size
        last_version, last = self._last
        if version != last_version:
            last = self._open()
            self._last = version, last
        return last

    def _open(self) -> CachedToken | None:
        try:
            content = json.loads(self._fernet.decrypt(self._entry_path.read_bytes()))
            return CachedToken(AccessToken.model_validate(content["token"]), float(content["received_at"]))
        except (OSError, InvalidToken, ValueError, KeyError, TypeError):
            return None

    def _write(self, entry: CachedToken) -> bool:
        token = entry.token.model_dump() | {"access_token": entry.token.access_token.get_secret_value()}
        content = {"token": token, "received_at": entry.received_at}
        sealed = self._fernet.encrypt(json.dumps(content).encode())
        # It may have been removed, and made again by another user.
        if usable(self._entry_path.parent) is None:
            return False
        try:
            # mkstemp makes files that only the owner can open.
            handle, name = tempfile.mkstemp(dir=self._entry_path.parent, prefix=".new-")
            with os.fdopen(handle, "wb") as file:
                file.write(sealed)
            Path(name).replace(self._entry_path)
        except OSError as error:
            log.warning(
                "The token could not be kept for other tasks (%s in %s).",
                error.strerror,
                self._entry_path.parent,
            )
            return False
        return True

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[bool]:
        """Hold the entry's lock and yield True, or yield False when it can't be had in time."""
        try:
            handle = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.warning(
                "Tokens are not shared: the lock can't be opened (%s in %s).",
                error.strerror,
                self._lock_path.parent,
            )
            yield False
            return
        try:
            yield await _lock_within(handle, self._lock_seconds)
        finally:
            os.close(handle)


def seal(name: str, api_key: str) -> Fernet:
    """Return what an entry is encrypted with. Its name goes into the key, so that an entry copied to another name does not open."""
    info = f"payroc-refunds token cache {name}".encode()
    derived = HKDF(SHA256(), length=32, salt=None, info=info).derive(api_key.encode())
    return Fernet(base64.urlsafe_b64encode(derived))


async def _lock_within(handle: int, seconds: float) -> bool:
    ends = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= ends:
                log.warning(
                    "Tokens are not shared this time: another process held the lock for %g s.", seconds
                )
                return False
            await asyncio.sleep(LOCK_POLL_SECONDS)
        except OSError as error:
            # Some network file systems have no locks.
            log.warning("Tokens are not shared: the file system locks no file (%s).", error.strerror)
            return False
        else:
            return True


def token_cache(connection: PayrocConnection, *, lock_seconds: float) -> TokenCache:
    """
    Return the cache that the settings ask for; one in memory when the folder for a shared one can't be used.

    :param connection: gives a shared cache's name and key.
    :param lock_seconds: see :class:`FileTokenCache`.
    """
    folder = shared_folder() if get_settings().token_cache else None
    return (
        MemoryTokenCache()
        if folder is None
        else FileTokenCache(folder, connection, lock_seconds=lock_seconds)
    )


def trouble_with(folder: Path) -> str | None:
    """Make a folder that only this user can open, or return what keeps a folder from being used."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        # What is there in its place is named below.
        if not os.path.lexists(folder):
            return f"can't be made ({error.strerror})"
    try:
        found = folder.lstat()
    except OSError as error:
        return f"can't be looked at ({error.strerror})"
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return "is open to other users"
    return None


def usable(folder: Path) -> Path | None:
    """Return a folder that only this user can open, made when missing; warn and return ``None`` for any other."""
    if (trouble := trouble_with(folder)) is None:
        return folder
    _warn(folder, trouble)
    return None


@lru_cache(maxsize=16)
def _warn(folder: Path, trouble: str) -> None:
    """Warn of a folder, once in each process."""
    log.warning(
        "%s %s, so tasks of this host share no tokens and each keeps to PAYROC_REFUNDS_REQUESTS_IN_FLIGHT and "
        "PAYROC_REFUNDS_REQUESTS_PER_SECOND by itself: set PAYROC_REFUNDS_TOKEN_CACHE_DIR to a folder of this user's "
        "own with rights 0700.",
        folder,
        trouble,
    )


def shared_folder() -> Path | None:
    """
    Return the folder in which the processes of this host share what they know of Payroc.

    :returns: the one that is set, else the default one; ``None``, after a warning, when it can't be used.
    """
    return usable(get_settings().token_cache_dir or default_folder())


def default_folder() -> Path:
    """Return the folder of this user's in the temporary directory."""
    return Path(tempfile.gettempdir()) / f"payroc-refunds-{os.geteuid()}"


def _same(one: AccessToken, other: AccessToken) -> bool:
    return hmac.compare_digest(one.access_token.get_secret_value(), other.access_token.get_secret_value())
