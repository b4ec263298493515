"""
Replay the events, and compare the ledger with what they say.

The database writes an event with every change of a refund's state, an attempt, a run's answer, a limit, a pause and a
binding, and puts the new values into it (the triggers of ``schema.sql``). So the events alone say what these tables
hold. A row that was changed past its triggers, or whose trigger was taken away, holds something else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from include.refunds.ledger.connection import Connection, Row
from include.refunds.printable import printable

REPLAYED: Mapping[str, Any] = {
    "status": None,
    "reason": None,
    "holds": [],
    "released_holds": [],
    "run_rejected_by": None,
    "released_by": None,
    "released_run": None,
    "attempts": 0,
    "fence_until": None,
    "payroc_refund_id": None,
}
"""The columns of ``refund_states`` that the events say, each with its value before the first event."""

DERIVED: Mapping[str, str] = {
    "refund_id": "each instruction has one state",
    "released_at": "in the transaction of the last release's event",
    "first_sent_at": "no later than the last check of any attempt that may have reached Payroc",
}
"""Columns of ``refund_states`` that follow from an event."""

NOT_COVERED: Mapping[str, str] = {
    "sent_with": "a hash of the API host and key of the first attempt",
    "lease_until": "until when the refund is the attempt's that is under way",
    "next_attempt_at": "when the next attempt may begin",
    "payroc_status": "Payroc's word, which `verify` compares with Payroc",
    "payroc_seen_at": "when Payroc's list last showed the refund",
    "updated_at": "the write-back's mark of the newest change",
    "written_back_at": "the write-back's mark of what the source has",
}
"""Columns of ``refund_states`` that no event says."""

# From here on a refund counts against the limits.
_COUNTED = ("released", "accepted", "settled", "returned", "reversed")

# Times in an event's detail, which JSON has as text.
_TIMES = ("fence_until", "posting_at", "restored_to")

_ANSWER = ("approved_by", "approved_hash", "rejected_by")
# `posting_at` is the last check's, which fires no trigger: the event of the outcome has it.
_OUTCOME = ("posting_at", "outcome", "http_status", "problem_type")
_NEVER_PROCESSED = ("configuration", "not_sent")

# A row has the time at which its transaction began, and its event the time of the change. Time limits end a
# transaction within minutes.
_TRANSACTION = timedelta(hours=1)

# A batch ends with the refund that brings it to so many events, or to so many refunds.
_AT_ONCE = 20_000


async def replay(connection: Connection) -> AsyncIterator[str]:
    """
    Yield a sentence for everything that the ledger holds and its events do not say.

    :param connection: in a transaction with one snapshot.
    """
    events: dict[str, list[Row]] = defaultdict(list)
    for event in await connection.execute(_EVENTS_OF_NO_REFUND):
        events[_TABLES[event.event]].append(event)
    runs = _replay_runs(events["runs"])
    for findings in (
        _compare_runs(runs, await connection.execute(_RUNS)),
        _compare_limits(events["limits"], (await connection.execute(_LIMITS)).scalar_one()),
        _compare_pauses(events["pauses"], await connection.execute(_PAUSES)),
        _compare_bindings(events["bindings"], await connection.execute(_BINDINGS)),
    ):
        for finding in findings:
            yield finding
    after: int | None = 0
    while after is not None:
        refunds, after = await _batch(connection, after)
        for refund_id, refund in sorted(refunds.items()):
            for finding in _compare_refund(refund_id, refund, runs):
                yield finding


# The table that an event of no refund is about.
_TABLES = {
    **dict.fromkeys(("run", "approval", "rejection"), "runs"),
    **dict.fromkeys(("pause", "restore", "resume"), "pauses"),
    **dict.fromkeys(("environment", "source", "fingerprint_check"), "bindings"),
    "limit": "limits",
}
_EVENTS_OF_NO_REFUND = f"""
    SELECT id, at, event, actor, reason, detail FROM refund_ledger.refund_events
    WHERE refund_id IS NULL AND event IN ({", ".join(f"'{event}'" for event in _TABLES)}) ORDER BY id"""


# -- refunds -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Refund:
    """What the ledger holds of a refund."""

    instruction: Row | None = None
    state: Row | None = None
    first_release: Row | None = None
    attempts: dict[int, Row] = field(default_factory=dict)
    events: list[Row] = field(default_factory=list)


class _Replayed:
    """What the events of a refund say; they are applied in their order."""

    def __init__(self, events: Iterable[Row]) -> None:
        self.instruction: str | None = None
        self.state = dict(REPLAYED)
        self.attempts: dict[int, dict[str, Any]] = {}
        self.first_release: tuple[Row, str | None] | None = None
        self.last_release: Row | None = None
        self.out_of_order: int | None = None
        for event in events:
            self._apply(event, _detail(event))

    def _apply(self, event: Row, detail: Mapping[str, Any]) -> None:
        if event.event == "attempt" and isinstance(number := detail.get("attempt"), int):
            # It has ended with its outcome; `http_status` alone says nothing of that.
            finished = event.at if detail.get("outcome") else None
            self.attempts.setdefault(number, {}).update(_outcome(detail), finished=finished)
        elif event.event in ("status", "change"):
            if event.event == "status":
                self._move(event, detail)
            self.state |= {name: _value(detail, name) for name in detail if name in REPLAYED}
        # The others are decisions, which change no row.

    def _move(self, event: Row, detail: Mapping[str, Any]) -> None:
        if event.from_status != self.state["status"] and self.out_of_order is None:
            self.out_of_order = event.id
        self.state |= {"status": event.to_status, "reason": event.reason}
        if event.from_status is None:
            self.instruction = detail.get("instruction")
        if isinstance(number := detail.get("attempts"), int):
            self.attempts[number] = _outcome({}) | {"claimed": event.at, "finished": None}
        if (event.from_status, event.to_status) == ("approved", "released"):
            self.last_release = event
            # Unless the event's detail has another one.
            self.state["released_by"] = event.actor
        if event.to_status in _COUNTED and self.first_release is None:
            self.first_release = event, detail.get("released_run")


def _outcome(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _value(values, name) for name in _OUTCOME}


def _compare_refund(refund_id: int, refund: _Refund, runs: Mapping[str, _Run]) -> Iterator[str]:
    said = _Replayed(refund.events)
    if not refund.events:
        yield f"Refund {refund_id} has no events."
        return
    if said.out_of_order is not None:
        yield f"Refund {refund_id}: event {said.out_of_order} does not follow from the events before it."
    if refund.instruction is None:
        yield f"Refund {refund_id} has events, but its instruction was removed."
    elif refund.instruction.hash != said.instruction:
        yield f"Refund {refund_id}: its instruction (what was approved) was changed."
    if refund.state is None:
        yield f"Refund {refund_id} has events, but its state was removed."
    else:
        yield from _compare_state(refund_id, refund.state, said, _last_checks(refund.attempts, said.attempts))
    yield from _compare_attempts(refund_id, refund.attempts, said.attempts)
    yield from _compare_first_release(refund_id, refund, said, runs)


def _last_checks(attempts: Mapping[int, Row], said: Mapping[int, dict[str, Any]]) -> dict[datetime, bool]:
    """Return when attempts passed their last check, and whether they may have reached Payroc."""
    found = {}
    for number in {*attempts, *said}:
        # Only its outcome has an event. One that is under way is as its row says.
        ended = said.get(number, {}).get("finished")
        values = said[number] if ended or number not in attempts else attempts[number]
        if values["posting_at"] is not None:
            found[values["posting_at"]] = values["outcome"] not in _NEVER_PROCESSED
    return found


def _compare_state(
    refund_id: int, state: Row, said: _Replayed, last_checks: Mapping[datetime, bool]
) -> Iterator[str]:
    if state.status != said.state["status"]:
        yield f"Refund {refund_id} is {state.status}, and its last event says {said.state['status'] or 'nothing'}."
    differing = [name for name, value in said.state.items() if name != "status" and state[name] != value]
    if not _is_of(said.last_release, state.released_at):
        differing.append("released_at")
    first, counted = state.first_sent_at, [at for at, counts in last_checks.items() if counts]
    # A last check that took long is made again, and keeps the beginning of the key window.
    if (first is not None and not last_checks) or (counted and (first is None or first > min(counted))):
        differing.append("first_sent_at")
    for name in differing:
        yield f"Refund {refund_id}: `{name}` is not what its events say."


def _compare_attempts(
    refund_id: int, attempts: Mapping[int, Row], said: Mapping[int, dict[str, Any]]
) -> Iterator[str]:
    for number in sorted({*attempts, *said}):
        which = f"Attempt {number} of refund {refund_id}"
        if number not in attempts:
            yield f"{which} was removed."
        elif number not in said or "claimed" not in said[number]:
            yield f"{which} was inserted without a claim."
        else:
            row, values = attempts[number], said[number]
            times = {"started_at": values["claimed"], "finished_at": values["finished"]}
            compared = _OUTCOME if values["finished"] else _OUTCOME[1:]
            differing = [name for name in compared if row[name] != values[name]]
            differing += [name for name, at in times.items() if not _is_at(at, row[name])]
            for name in differing:
                yield f"{which}: `{name}` is not what its events say."


def _compare_first_release(
    refund_id: int, refund: _Refund, said: _Replayed, runs: Mapping[str, _Run]
) -> Iterator[str]:
    row = refund.first_release
    if row is None or said.first_release is None:
        if row is not None or said.first_release is not None:
            done = "inserted" if said.first_release is None else "removed"
            yield f"Refund {refund_id}: its first release, which the limits count, was {done}."
        return
    event, run = said.first_release
    approver = runs[run].approver_before(event.id) if run is not None and run in runs else None
    paid = refund.instruction
    if (
        (row.run, row.approver) != (run, approver)
        or not _is_of(event, row.at)
        or (
            paid is not None
            and (row.payee_fingerprint, row.amount, row.currency)
            != (paid.payee_fingerprint, paid.amount, paid.currency)
        )
    ):
        yield f"Refund {refund_id}: its first release, which the limits count, was changed."


def _is_of(event: Row | None, at: datetime | None) -> bool:
    return _is_at(event.at if event else None, at)


def _is_at(event_at: datetime | None, at: datetime | None) -> bool:
    """Tell whether a row's time is that of its event's transaction; ``None`` is no event, and no time."""
    if event_at is None or at is None:
        return event_at is at
    return abs(event_at - at) <= _TRANSACTION


async def _batch(connection: Connection, after: int) -> tuple[dict[int, _Refund], int | None]:
    """Return the next refunds after an id, and the last id of them; ``None`` when there are no more."""
    last: int | None = (
        await connection.execute(_LAST_OF_BATCH, {"after": after, "most": _AT_ONCE})
    ).scalar_one()
    values = {"after": after, "last": last if last is not None else 2**63 - 1}
    refunds: dict[int, _Refund] = defaultdict(_Refund)
    for row in await connection.execute(_INSTRUCTIONS, values):
        refunds[row.refund_id].instruction = row
    for row in await connection.execute(_STATES, values):
        refunds[row.refund_id].state = row
    for row in await connection.execute(_FIRST_RELEASES, values):
        refunds[row.refund_id].first_release = row
    for row in await connection.execute(_ATTEMPTS, values):
        refunds[row.refund_id].attempts[row.attempt] = row
    for row in await connection.execute(_EVENTS, values):
        refunds[row.refund_id].events.append(row)
    return refunds, last


_LAST_OF_BATCH = """
    SELECT LEAST(
        (SELECT refund_id FROM refund_ledger.refund_events WHERE refund_id > :after
         ORDER BY refund_id OFFSET :most LIMIT 1),
        (SELECT refund_id FROM refund_ledger.refund_states WHERE refund_id > :after
         ORDER BY refund_id OFFSET :most LIMIT 1))"""
_OF_BATCH = "refund_id > :after AND refund_id <= :last"
# What the trigger make_states hashes.
_INSTRUCTIONS = """
    SELECT id AS refund_id, payee_fingerprint, amount, currency, encode(sha256(record_send(instruction)), 'hex') AS hash
    FROM (SELECT id, source, source_ref, source_ref_folded, processing_terminal_id, order_id, description, amount,
                 currency, payee_last4, payee_fingerprint, request_sha256, requested_by, requested_by_folded,
                 approved_by, approved_by_folded, approved_at, idempotency_key, replaces, reissue_reason, created_at
          FROM refund_ledger.refund_instructions WHERE id > :after AND id <= :last) AS instruction"""
_STATES = f"""
    SELECT refund_id, {", ".join(REPLAYED)}, released_at, first_sent_at
    FROM refund_ledger.refund_states WHERE {_OF_BATCH}"""
_FIRST_RELEASES = f"""
    SELECT refund_id, payee_fingerprint, amount, currency, run, approver, at
    FROM refund_ledger.first_releases WHERE {_OF_BATCH}"""
_ATTEMPTS = f"""
    SELECT refund_id, attempt, started_at, finished_at, {", ".join(_OUTCOME)}
    FROM refund_ledger.refund_attempts WHERE {_OF_BATCH}"""
_EVENTS = f"""
    SELECT refund_id, id, at, event, from_status, to_status, actor, reason, detail
    FROM refund_ledger.refund_events WHERE {_OF_BATCH} ORDER BY refund_id, id"""


# -- runs --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """
    What the events say of a run's approval.

    :param approvers: who had approved it from which event on.
    """

    answer: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_ANSWER))
    approvers: list[tuple[int, str | None]] = field(default_factory=list)

    def approver_before(self, event_id: int) -> str | None:
        """Return who had approved the run before an event."""
        return next((by for first, by in reversed(self.approvers) if first < event_id), None)


_RUNS = f"SELECT run_id, {', '.join(_ANSWER)} FROM refund_ledger.refund_runs ORDER BY run_id"


def _replay_runs(events: Iterable[Row]) -> dict[str, _Run]:
    runs: dict[str, _Run] = defaultdict(_Run)
    for event in events:
        detail = _detail(event)
        run = runs[detail.get("run_id", "")]
        run.answer = {name: detail.get(name) for name in _ANSWER}
        run.approvers.append((event.id, run.answer["approved_by"]))
    return runs


def _compare_runs(runs: Mapping[str, _Run], rows: Iterable[Row]) -> Iterator[str]:
    removed = {*runs}
    for row in rows:
        removed.discard(row.run_id)
        answer = runs[row.run_id].answer if row.run_id in runs else dict.fromkeys(_ANSWER)
        if any(row[name] != value for name, value in answer.items()):
            yield f"Run {printable(row.run_id)}: its approval is not what its events say."
    for run_id in sorted(removed):
        yield f"Run {printable(run_id)} has events, but its row was removed."


# -- limits, pauses, bindings ------------------------------------------------------------------------------

_LIMITS = "SELECT to_jsonb(t) - 'only_row' FROM refund_ledger.refund_limits AS t"
_PAUSES = "SELECT * FROM refund_ledger.pauses ORDER BY id"
_BINDINGS = "SELECT name, value FROM refund_ledger.bindings ORDER BY name"


def _compare_limits(events: Iterable[Row], limits: Mapping[str, Any]) -> Iterator[str]:
    said = {_detail(event).get("limit"): _detail(event).get("to") for event in events}
    for name, value in limits.items():
        if value != said.get(name):
            yield f"The limit {name} is {_limit(value)}, and its events say {_limit(said.get(name))}."


def _limit(value: int | None) -> str:
    return "unset" if value is None else f"{value:,}"


_PAUSE_TIMES = ("paused_at", "compared_at", "ended_at")
_PAUSE = ("scope", "paused_by", "reason", "restored_to", "ended_by", "end_reason")


def _compare_pauses(events: Iterable[Row], pauses: Iterable[Row]) -> Iterator[str]:
    said: dict[Any, dict[str, Any]] = defaultdict(dict)
    for event in events:
        detail = _detail(event)
        pause = said[detail.get("pause")]
        if event.event == "pause":
            pause |= {"scope": detail.get("scope"), "paused_by": event.actor, "reason": event.reason}
            pause |= {"paused_at": event.at, "restored_to": _value(detail, "restored_to")}
        elif event.event == "restore":
            pause["compared_at"] = event.at
        else:
            pause |= {"ended_at": event.at, "ended_by": event.actor, "end_reason": event.reason}
    for row in pauses:
        values = said.pop(row.id, {})
        same = all(row[name] == values.get(name) for name in _PAUSE)
        if not same or not all(_is_at(values.get(name), row[name]) for name in _PAUSE_TIMES):
            yield f"Pause {row.id} is not what its events say."
    for number in sorted(said, key=str):
        yield f"Pause {number} has events, but its row was removed."


def _compare_bindings(events: Iterable[Row], rows: Iterable[Row]) -> Iterator[str]:
    said = {event.event: event.reason for event in events}
    bound = {row.name: row.value for row in rows}
    for name in sorted(name for name in {*said, *bound} if said.get(name) != bound.get(name)):
        yield f"The ledger's {name} is not the one that its event says."


def _value(detail: Mapping[str, Any], name: str) -> Any:
    """Return a value of an event's detail; a time that can't be read is ``None``, which the row is not."""
    value = detail.get(name)
    if name not in _TIMES or value is None:
        return value
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None


def _detail(event: Row) -> Mapping[str, Any]:
    return event.detail if isinstance(event.detail, dict) else {}
