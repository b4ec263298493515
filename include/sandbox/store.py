"""
What the sandbox knows: refunds, saved responses, tokens, terminals, the journal of requests, and its clock.

One SQLite database holds all of it, in memory or in a file, so that there is one way to read and write. A transaction is committed
before its answer is sent: a killed and restarted sandbox knows everything that it ever answered. Account and routing numbers are
never stored, only their masks; tokens only as hashes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from include.sandbox.answers import Answer

KEY_RETENTION_SECONDS = 7 * 24 * 3600
REFUND_ID_ALPHABET = string.ascii_uppercase + string.digits

SCHEMA = """
CREATE TABLE IF NOT EXISTS refunds (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, refund_id TEXT NOT NULL UNIQUE, terminal TEXT NOT NULL, order_id TEXT NOT NULL,
    name TEXT NOT NULL, last4 TEXT NOT NULL, amount INTEGER NOT NULL, currency TEXT NOT NULL, status TEXT NOT NULL,
    created_at REAL NOT NULL, settled_at REAL, idempotency_key TEXT NOT NULL, digits TEXT NOT NULL, object TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS refunds_terminal ON refunds (terminal, seq);
CREATE INDEX IF NOT EXISTS refunds_order ON refunds (terminal, order_id);
CREATE TABLE IF NOT EXISTS saved_responses (
    idempotency_key TEXT PRIMARY KEY, uri TEXT NOT NULL, fingerprint TEXT NOT NULL, saved_at REAL NOT NULL, refund_id TEXT,
    status INTEGER NOT NULL, body TEXT NOT NULL, media_type TEXT NOT NULL, headers TEXT NOT NULL, problem TEXT);
CREATE TABLE IF NOT EXISTS tokens (
    serial INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL UNIQUE, expires_at REAL NOT NULL, revoked INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS terminals (terminal TEXT PRIMARY KEY, mode TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    n INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, operation TEXT NOT NULL, idempotency_key TEXT, order_id TEXT, refund_id TEXT,
    status INTEGER, created INTEGER NOT NULL, replayed INTEGER NOT NULL, behaviour TEXT, token INTEGER);
CREATE INDEX IF NOT EXISTS requests_key ON requests (idempotency_key);
CREATE TABLE IF NOT EXISTS settings (one INTEGER PRIMARY KEY CHECK (one = 1), value TEXT NOT NULL);
"""
TABLES = ("refunds", "saved_responses", "tokens", "terminals", "requests", "settings")


@dataclass(frozen=True)
class Settings:
    """
    What the admin endpoints set.

    :param clock_offset_seconds: how far the sandbox's clock is ahead of the machine's.
    :param list_lag_seconds: seconds after its creation in which list and get do not show a refund.
    :param list_duplicates: a list shows each refund twice.
    :param retry_after_seconds: Retry-After of a 429.
    """

    clock_offset_seconds: float = 0.0
    list_lag_seconds: float = 0.0
    list_duplicates: bool = False
    retry_after_seconds: int = 2


@dataclass
class Refund:
    """
    One refund: Payroc's refund object, and what the sandbox needs beside it.

    :param name: name on the account.
    :param created_at: seconds since the epoch by the sandbox's clock, like ``settled_at``.
    :param digits: the trigger that it was created with, empty for none.
    :param seq: order of creation, set by the store.
    """

    refund_id: str
    terminal: str
    order_id: str
    name: str
    last4: str
    created_at: float
    idempotency_key: str
    digits: str
    object: dict[str, Any]
    settled_at: float | None = None
    seq: int = 0

    @property
    def status(self) -> str:
        """``transactionResult.status``."""
        return str(self.object["transactionResult"]["status"])

    @property
    def amount(self) -> int:
        """``order.amount`` in minor units."""
        return int(self.object["order"]["amount"])

    @property
    def currency(self) -> str:
        """``order.currency``."""
        return str(self.object["order"]["currency"])


@dataclass(frozen=True)
class SavedResponse:
    """The first response to an idempotency key, and the request that it belongs to."""

    uri: str
    fingerprint: str
    refund_id: str | None
    answer: Answer


@dataclass
class JournalEntry:
    """
    One request in the sandbox's own record.

    :param at: seconds since the epoch by the sandbox's clock.
    :param status: HTTP status that was answered, None when there was no answer.
    :param created: the request created a refund.
    :param replayed: the answer is the saved response of an earlier request.
    :param behaviour: last four digits of the trigger that acted, or ``queued`` for a queued fault.
    :param token: number of the access token that the request came with, counted from 1 as they were issued.
    """

    at: float
    operation: str
    idempotency_key: str | None = None
    order_id: str | None = None
    refund_id: str | None = None
    status: int | None = None
    created: bool = False
    replayed: bool = False
    behaviour: str | None = None
    token: int | None = None


@dataclass(frozen=True)
class Condition:
    """A piece of a WHERE clause and its parameters; the SQL is always a constant of this package."""

    sql: str
    parameters: Sequence[object] = field(default_factory=tuple)


class Store:
    """
    The database.

    :param path: SQLite file, or ``:memory:``. The file is locked for this process.
    :raises sqlite3.Error: the file cannot be used.
    """

    def __init__(self, path: str = ":memory:") -> None:
        self._db = sqlite3.connect(path, isolation_level=None, timeout=1)
        self._db.row_factory = sqlite3.Row
        try:
            self.settings = self._open()
        except sqlite3.Error:
            self._db.close()
            raise

    def _open(self) -> Settings:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        # A kill must lose nothing, a power cut may: this is a tool for demos and tests, and an fsync per request is slow.
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        row = self._db.execute("SELECT value FROM settings").fetchone()
        return Settings(**json.loads(row["value"])) if row else Settings()

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything in the block, or nothing. The block must not await: the connection is shared by all requests."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def now(self) -> float:
        """Seconds since the epoch by the sandbox's clock."""
        return time.time() + self.settings.clock_offset_seconds

    def change_settings(self, **changes: Any) -> None:
        """Change some settings; a restarted sandbox with the same file keeps them."""
        self.settings = replace(self.settings, **changes)
        self._db.execute(
            "INSERT OR REPLACE INTO settings VALUES (1, ?)", (json.dumps(asdict(self.settings)),)
        )

    def reset(self) -> None:
        """Forget everything, tokens and settings too, as if the sandbox had been started anew."""
        with self.transaction():
            for table in TABLES:
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - the names are constants
            self._db.execute("DELETE FROM sqlite_sequence")
        self.settings = Settings()

    # Refunds

    @staticmethod
    def new_refund_id() -> str:
        """Draw a refund id: ten upper-case letters and digits."""
        return "".join(secrets.choice(REFUND_ID_ALPHABET) for _ in range(10))

    def add_refund(self, refund: Refund) -> None:
        """Store a new refund."""
        self._db.execute(
            "INSERT INTO refunds"
            " (refund_id, terminal, order_id, name, last4, amount, currency, status,"
            " created_at, settled_at, idempotency_key, digits, object)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                refund.refund_id,
                refund.terminal,
                refund.order_id,
                refund.name,
                refund.last4,
                refund.amount,
                refund.currency,
                refund.status,
                refund.created_at,
                refund.settled_at,
                refund.idempotency_key,
                refund.digits,
                json.dumps(refund.object),
            ),
        )

    def change_refund(self, refund: Refund) -> None:
        """Store the object and the settlement of a refund that exists."""
        self._db.execute(
            "UPDATE refunds SET status = ?, settled_at = ?, object = ? WHERE refund_id = ?",
            (refund.status, refund.settled_at, json.dumps(refund.object), refund.refund_id),
        )

    def refund(self, refund_id: str) -> Refund | None:
        """Find one refund."""
        found = self.refunds([Condition("refund_id = ?", (refund_id,))])
        return found[0] if found else None

    def refunds(
        self, conditions: Sequence[Condition], *, newest_first: bool = True, limit: int = -1
    ) -> list[Refund]:
        """
        Find refunds in the order of their creation.

        :param conditions: all must hold.
        :param limit: at most so many; negative for all.
        """
        where, parameters = _where(conditions)
        order = "DESC" if newest_first else "ASC"
        rows = self._db.execute(
            f"SELECT * FROM refunds {where} ORDER BY seq {order} LIMIT ?",  # noqa: S608 - see Condition
            (*parameters, limit),
        )
        return [_refund(row) for row in rows]

    def has_refund(self, conditions: Sequence[Condition]) -> bool:
        """Whether any refund meets all conditions."""
        where, parameters = _where(conditions)
        return self._db.execute(f"SELECT 1 FROM refunds {where} LIMIT 1", parameters).fetchone() is not None  # noqa: S608 - see Condition

    def count_refunds(self) -> int:
        """Count all refunds."""
        return int(self._db.execute("SELECT count(*) FROM refunds").fetchone()[0])

    def totals(self) -> list[tuple[str, str, int, int]]:
        """Add up all refunds: status, currency, number of refunds, amount in minor units."""
        # total() and not sum(): the largest amounts of the schema would overflow.
        rows = self._db.execute(
            "SELECT status, currency, count(*) AS refunds, total(amount) AS amount FROM refunds GROUP BY status, currency ORDER BY 1, 2"
        )
        return [(row["status"], row["currency"], int(row["refunds"]), int(row["amount"])) for row in rows]

    # Idempotency keys

    def saved_response(self, key: str) -> SavedResponse | None:
        """Find the first response to a key; None for a new key and for one older than the retention."""
        row = self._db.execute(
            "SELECT * FROM saved_responses WHERE idempotency_key = ? AND saved_at > ?",
            (key, self.now() - KEY_RETENTION_SECONDS),
        ).fetchone()
        if row is None:
            return None
        answer = Answer(
            row["status"], row["body"], row["media_type"], json.loads(row["headers"]), row["problem"]
        )
        return SavedResponse(row["uri"], row["fingerprint"], row["refund_id"], answer)

    def save_response(self, key: str, saved: SavedResponse) -> None:
        """Save the first response to a key."""
        answer = saved.answer
        self._db.execute(
            "INSERT OR REPLACE INTO saved_responses"
            " (idempotency_key, uri, fingerprint, saved_at, refund_id, status, body, media_type, headers, problem)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key,
                saved.uri,
                saved.fingerprint,
                self.now(),
                saved.refund_id,
                answer.status,
                answer.body,
                answer.media_type,
                json.dumps(dict(answer.headers)),
                answer.problem,
            ),
        )

    # Tokens

    def add_token(self, token: str, lifetime_seconds: float) -> int:
        """Remember an issued token by its hash and return its number."""
        cursor = self._db.execute(
            "INSERT INTO tokens (hash, expires_at) VALUES (?, ?)",
            (_hash(token), self.now() + lifetime_seconds),
        )
        return int(cursor.lastrowid or 0)

    def token_serial(self, token: str) -> int | None:
        """Find the number of a token; None when it is unknown, expired or revoked."""
        row = self._db.execute(
            "SELECT serial FROM tokens WHERE hash = ? AND expires_at > ? AND NOT revoked",
            (_hash(token), self.now()),
        ).fetchone()
        return None if row is None else int(row["serial"])

    def revoke_tokens(self) -> int:
        """Revoke all tokens and return how many were valid until now."""
        return self._db.execute(
            "UPDATE tokens SET revoked = 1 WHERE NOT revoked AND expires_at > ?", (self.now(),)
        ).rowcount

    def tokens_issued(self) -> int:
        """Count the tokens ever issued."""
        return int(self._db.execute("SELECT count(*) FROM tokens").fetchone()[0])

    # Terminals

    def terminal_mode(self, terminal: str) -> str:
        """``enabled`` unless it was set otherwise."""
        row = self._db.execute("SELECT mode FROM terminals WHERE terminal = ?", (terminal,)).fetchone()
        return "enabled" if row is None else str(row["mode"])

    def set_terminal_mode(self, terminal: str, mode: str) -> None:
        """Set what a terminal may do."""
        self._db.execute("INSERT OR REPLACE INTO terminals VALUES (?, ?)", (terminal, mode))

    def terminals(self) -> Mapping[str, str]:
        """List the terminals whose mode was set."""
        return {
            row["terminal"]: row["mode"]
            for row in self._db.execute("SELECT terminal, mode FROM terminals ORDER BY terminal")
        }

    # Journal

    def record(self, entry: JournalEntry) -> None:
        """Append one request to the journal."""
        self._db.execute(
            "INSERT INTO requests (at, operation, idempotency_key, order_id, refund_id, status, created, replayed, behaviour, token)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                entry.at,
                entry.operation,
                entry.idempotency_key,
                entry.order_id,
                entry.refund_id,
                entry.status,
                entry.created,
                entry.replayed,
                entry.behaviour,
                entry.token,
            ),
        )

    def has_triggered(self, key: str, digits: str) -> bool:
        """Whether this trigger acted on an earlier request with this key, within the retention of keys."""
        return (
            self._db.execute(
                "SELECT 1 FROM requests WHERE idempotency_key = ? AND behaviour = ? AND at > ? LIMIT 1",
                (key, digits, self.now() - KEY_RETENTION_SECONDS),
            ).fetchone()
            is not None
        )

    def journal(self, conditions: Sequence[Condition] = ()) -> list[tuple[int, JournalEntry]]:
        """List the requests, oldest first, each with its number."""
        where, parameters = _where(conditions)
        entries = []
        for row in self._db.execute(f"SELECT * FROM requests {where} ORDER BY n", parameters):  # noqa: S608 - see Condition
            values = dict(row)
            number = int(values.pop("n"))
            values.update(created=bool(row["created"]), replayed=bool(row["replayed"]))
            entries.append((number, JournalEntry(**values)))
        return entries

    def creates_per_key(self, keys: Sequence[str]) -> Mapping[str, int]:
        """Count the create requests that came with each of these keys."""
        marks = ",".join("?" * len(keys))
        rows = self._db.execute(
            "SELECT idempotency_key, count(*) AS requests FROM requests"  # noqa: S608 - only question marks are inserted
            f" WHERE operation = 'create' AND idempotency_key IN ({marks}) GROUP BY idempotency_key",
            keys,
        )
        return {row["idempotency_key"]: int(row["requests"]) for row in rows}


def _where(conditions: Sequence[Condition]) -> tuple[str, tuple[object, ...]]:
    if not conditions:
        return "", ()
    sql = "WHERE " + " AND ".join(condition.sql for condition in conditions)
    return sql, tuple(parameter for condition in conditions for parameter in condition.parameters)


def _refund(row: sqlite3.Row) -> Refund:
    values = dict(row)
    for shown_in_object in ("amount", "currency", "status"):
        del values[shown_in_object]
    values["object"] = json.loads(values["object"])
    return Refund(**values)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
