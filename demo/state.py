"""Where the demo keeps its databases, keys and logs between two runs, and the lock that lets one run at a time."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

from demo.errors import DemoError
from demo.files import write_private

ROOT = Path(__file__).resolve().parent.parent
# For those who want the state elsewhere, and for tests, which must not meet a demo that a person started.
FOLDER_VARIABLE = "PAYROC_REFUNDS_DEMO_STATE"


def state_folder() -> Path:
    """
    Return the folder of this user and this checkout.

    It is outside the home and the checkout: as root the database server runs as another account, which can reach neither.
    """
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given).absolute()
    checkout = hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:8]
    return Path("/var/tmp") / f"payroc-refunds-{os.geteuid()}-{checkout}"  # noqa: S108 - State.open refuses a folder of another user


@dataclass(frozen=True)
class Keys:
    """The secrets of the demo, drawn once: data encrypted with them has to stay readable."""

    airflow_fernet: str
    airflow_jwt: str
    airflow_session: str
    ledger_encryption: str
    ledger_fingerprint: str
    payroc_api_key: str

    @classmethod
    def draw(cls) -> Keys:
        """Draw new secrets."""
        return cls(
            airflow_fernet=_fernet_key(),
            airflow_jwt=secrets.token_hex(32),
            airflow_session=secrets.token_hex(32),
            ledger_encryption=_fernet_key(),
            ledger_fingerprint=secrets.token_hex(32),
            payroc_api_key=secrets.token_hex(24),
        )


class State:
    """The folder and what is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.postgres = folder / "postgres"
        self.airflow = folder / "airflow"
        self.logs = folder / "logs"
        self.sandbox = folder / "sandbox.sqlite"
        # Each folder has a port of its own, so that demos of several checkouts can run at once; it is below those that
        # systems give to clients, one of which might have it when the demo comes back.
        self.sandbox_port = 20_000 + int(hashlib.sha256(os.fsencode(folder)).hexdigest()[:8], 16) % 10_000
        self._keys = folder / "keys.json"
        self._notes = folder / "notes.json"
        self._lock = folder / "lock"

    @classmethod
    def open(cls) -> State:
        """
        Return this checkout's state, its folders made when missing.

        :raises DemoError: when the folder belongs to another user, who could then read or replace what is in it.
        """
        state = cls(state_folder())
        state.folder.parent.mkdir(parents=True, exist_ok=True)
        # Root's database server runs as another account and has to pass through; it can list nothing.
        mode = 0o711 if os.geteuid() == 0 else 0o700
        try:
            state.folder.mkdir(mode=mode)
        except FileExistsError:
            found = state.folder.lstat()
            ours = (
                stat.S_ISDIR(found.st_mode)
                and found.st_uid == os.geteuid()
                and (state.exists() or not any(state.folder.iterdir()))
            )
            if not ours:
                raise DemoError(
                    f"{state.folder} is there already, and this demo did not make it. Remove it, or name another in {FOLDER_VARIABLE}."
                ) from None
        state.folder.chmod(mode)
        state._lock.touch(mode=0o600)
        for private in (state.airflow, state.logs):
            private.mkdir(mode=0o700, exist_ok=True)
        return state

    def exists(self) -> bool:
        """Return whether the folder is there and was made by :meth:`open`; only then it is ours to remove."""
        return self._lock.is_file()

    def keys(self) -> Keys:
        """
        Return the secrets, drawn at the first call.

        :raises DemoError: when the file is damaged. New ones would not open what the old ones encrypted.
        """
        if not self._keys.exists():
            write_private(self._keys, json.dumps(asdict(Keys.draw()), indent=2))
        try:
            kept = json.loads(self._keys.read_text())
            # An earlier version of the demo may have kept others beside them.
            return Keys(**{field.name: kept[field.name] for field in fields(Keys)})
        except (ValueError, TypeError, KeyError):
            raise DemoError(
                f"{self._keys} is damaged. `make reset` removes the demo's data, and the next start creates it again."
            ) from None

    def note(self, name: str) -> str | None:
        """Return a small fact that an earlier run left, such as the sandbox's port."""
        return self._read_notes().get(name)

    def set_note(self, name: str, value: str) -> None:
        """Leave a small fact for later runs."""
        write_private(self._notes, json.dumps({**self._read_notes(), name: value}, indent=2))

    def _read_notes(self) -> dict[str, str]:
        try:
            return dict(json.loads(self._notes.read_text()))
        except (FileNotFoundError, ValueError):
            return {}

    @contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """
        Hold the lock of this state; the kernel frees it when the process ends, however it ends.

        :param what: the command that holds it, for the sentence that the other one prints.
        :raises DemoError: when another command holds it.
        """
        with self._lock.open("a+") as lock:
            if not _try_lock(lock):
                holder = self.holder()
                by = f"`{holder[1]}` (process {holder[0]})" if holder else "Another command of this demo"
                raise DemoError(
                    f"{by} is at work with this demo's data. Wait until it has ended, or end it with `make down`."
                )
            lock.truncate(0)
            lock.write(json.dumps([os.getpid(), what]))
            lock.flush()
            yield
            lock.truncate(0)

    def holder(self) -> tuple[int, str] | None:
        """Return process id and command of the one that holds the lock."""
        try:
            with self._lock.open("r+") as lock:
                if _try_lock(lock):
                    return None
                lock.seek(0)
                pid, what = json.load(lock)
                return int(pid), str(what)
        except (FileNotFoundError, ValueError):
            return None

    def is_locked(self) -> bool:
        """Return whether a command works on this state."""
        try:
            with self._lock.open("r+") as lock:
                return not _try_lock(lock)
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Remove the folder and everything in it."""
        shutil.rmtree(self.folder)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _fernet_key() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
