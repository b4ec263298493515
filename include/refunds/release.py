"""Release: the one gate between an approved refund and a POST."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from include.payroc.errors import PayrocError, PayrocIncompleteList
from include.payroc.models import AccessToken
from include.refunds.cipher import Cipher
from include.refunds.classify import EVERYTHING, NO_SUCH_ADDRESS, refuses_terminal
from include.refunds.continuity import READ_BY_RELEASE_AFTER, ListLedger, lists_due, note_failed, read_on
from include.refunds.gateway import Gateway
from include.refunds.ledger import KNOWN_FOR, Selection
from include.refunds.ledger_parts import Candidates, ChecksEnvironment, Stored
from include.refunds.listing import Known
from include.refunds.pull import source_changes
from include.refunds.reader import FreshTokenReader
from include.refunds.settings import Settings
from include.refunds.source import Source


class PreflightFailed(Exception):
    """Payroc did not answer a harmless request, so nothing is released; it may a little later."""


class PreflightRefused(PreflightFailed):
    """Payroc refused a harmless request, or something else answered it: fix the configuration first."""


class _Refunds(Known, Protocol):
    async def terminals(self, refund_ids: Sequence[int]) -> set[str]: ...


class _Runs(Candidates, Protocol):
    async def note(self, run_id: str, findings: dict[str, Any]) -> None: ...


class _Gate(Protocol):
    async def release(
        self,
        run_id: str,
        candidate_ids: Sequence[int],
        standing_ids: Sequence[int],
        withdrawn: dict[int, str],
    ) -> list[int]: ...


class _Pauses(Protocol):
    async def pause(self, scope: str, reason: str) -> None: ...


class ReleaseLedger(ListLedger, Protocol):
    """What a release needs of the ledger."""

    @property
    def bindings(self) -> ChecksEnvironment: ...

    @property
    def gate(self) -> _Gate: ...

    @property
    def intake(self) -> Stored: ...

    @property
    def pauses(self) -> _Pauses: ...

    @property
    def refunds(self) -> _Refunds: ...

    @property
    def runs(self) -> _Runs: ...


async def release(
    run_id: str,
    candidate_ids: Sequence[int],
    due_ids: Sequence[int],
    *,
    source: Source,
    ledger: ReleaseLedger,
    gateway: Gateway,
    cipher: Cipher,
    settings: Settings,
) -> list[int]:
    """
    Release the candidates that Payroc is ready for and that the source still stands by.

    Before that Payroc's lists are read on, of all terminals, where they are not known up to now: what the
    ledger has forgotten it finds there. A list that can't be read leaves the refunds of its terminal
    approved; those of others are released.

    :param run_id: the run that releases; the ledger holds its approval of exactly these candidates.
    :param candidate_ids: ids of the run's candidates.
    :param due_ids: ids of refunds in doubt that the run takes up again; they were released before.
    :returns: ids of the refunds that may be sent: those released, oldest approval first, then those that are
        due.
    :raises PreflightFailed: when Payroc did not answer.
    :raises PreflightRefused: when Payroc refused. A refusal that concerns one terminal pauses that terminal
        and lets the others go on; one that concerns all pauses everything.
    :raises LedgerError: when the run holds no approval of these candidates, or the ledger belongs to another
        Payroc.
    """
    candidates = await ledger.runs.candidates(Selection(), ids=candidate_ids)
    terminals = {item.processing_terminal_id for item in candidates} | await ledger.refunds.terminals(due_ids)
    known: set[str] = set()
    if terminals:
        await ledger.bindings.check_environment(gateway.environment)
        notes = await _ask_payroc(terminals, ledger, gateway, settings)
        await ledger.bindings.check_environment(gateway.environment, bind=True)
        if notes:
            await ledger.runs.note(run_id, {"lists": notes})
        known = await _known_terminals(ledger, gateway)
    findings: dict[str, str] = {}
    # A reissue has no row in the source that could have changed; two people approved it in the ledger.
    ids = {item.source_ref: item.id for item in candidates if item.replaces is None}
    if ids:
        rows = await source.select_approved()
        stored = await ledger.intake.stored(list(ids))
        findings = source_changes(rows, stored, cipher, settings, await ledger.now())
    withdrawn = {ids[ref]: finding for ref, finding in findings.items()}
    standing = [
        item.id for item in candidates if item.id not in withdrawn and item.processing_terminal_id in known
    ]
    released = await ledger.gate.release(run_id, candidate_ids, standing, withdrawn)
    return [*released, *due_ids]


async def _ask_payroc(
    terminals: set[str], ledger: ReleaseLedger, gateway: Gateway, settings: Settings
) -> list[str]:
    """
    Read the lists that are due, and ask for one refund of each other terminal at which something is to be
    sent.

    :returns: sentences about the lists, for the report.
    :raises PreflightFailed: when no terminal of these got a usable answer; for the rest see
        :func:`preflight`.
    """
    due = {
        item.terminal: item
        for item in await lists_due(
            ledger,
            settings,
            sent_with=gateway.sent_with,
            known_for=READ_BY_RELEASE_AFTER,
            needed=terminals,
        )
    }
    await preflight(terminals - due.keys(), ledger, gateway)
    reader = FreshTokenReader(gateway)
    notes: list[str] = []
    failures: list[PayrocError] = []
    for terminal, item in due.items():
        try:
            found = await read_on(item, ledger=ledger, reader=reader, settings=settings)
        except PayrocError as error:
            await note_failed(item, error, ledger)
            if terminal not in terminals:
                continue
            if _may_answer_later(error):
                failures.append(error)
            elif _is_not_payrocs(error):
                # Whether it is not Payroc that answers, or only a later page is odd, a shorter question
                # shows.
                await preflight({terminal}, ledger, gateway)
            else:
                await _judge_preflight(error, terminal, ledger, gateway)
        else:
            notes += found.notes(terminal)
            if found.incomplete is not None:
                await note_failed(item, found.incomplete, ledger)
    if failures and len(failures) == len(terminals):
        raise PreflightFailed(f"{failures[0]}; nothing was released, try again later.")
    return notes


async def _known_terminals(ledger: ReleaseLedger, gateway: Gateway) -> set[str]:
    """Return the terminals whose list is known well enough for a first attempt."""
    since = await ledger.now() - KNOWN_FOR
    return {
        item.terminal
        for item in await ledger.lists.terminal_lists()
        if item.is_known(since, gateway.sent_with)
    }


async def preflight(terminals: set[str], ledger: ReleaseLedger, gateway: Gateway) -> None:
    """
    Ask Payroc for one refund of each terminal, so that a bad configuration shows before the first POST.

    A terminal that Payroc refuses is paused, and the others go on. An answer counts only when it is Payroc's
    own token or list, read as the answers to the POSTs will be read: what would make each of them unknown
    stops before the first one.

    :raises PreflightRefused: when Payroc refuses the API key, when a 2xx is not Payroc's, or in a way that
        concerns more than one terminal; that pauses everything.
    :raises PreflightFailed: when no usable answer came.
    """
    token = await _token(gateway)
    for terminal in sorted(terminals):
        try:
            try:
                await _list_one(terminal, token, gateway)
            except PayrocError as error:
                if error.http_status != 401:
                    raise
                # The token may have been taken back; one that is surely newer tells whether it was that.
                token = await _token(gateway, younger_than=0)
                await _list_one(terminal, token, gateway)
        except PayrocError as error:
            await _judge_preflight(error, terminal, ledger, gateway)


async def _token(gateway: Gateway, *, younger_than: float | None = None) -> AccessToken:
    try:
        return await gateway.token(younger_than=younger_than)
    except PayrocError as error:
        if _is_not_payrocs(error):
            raise PreflightRefused(_not_payrocs(error, gateway)) from None
        if error.http_status in (401, 403):
            raise PreflightRefused(f"{error}; nothing was released: {_CHECK_THE_KEY}.") from None
        raise PreflightFailed(f"{error}; nothing was released, try again later.") from None


async def _list_one(terminal: str, token: AccessToken, gateway: Gateway) -> None:
    try:
        async for _ in gateway.list_refunds(token, processing_terminal_id=terminal, limit=1):
            return
    except PayrocIncompleteList:
        # The list is Payroc's. That an object of somebody else's can't be understood says nothing about our
        # configuration.
        return


def _may_answer_later(error: PayrocError) -> bool:
    status = error.http_status
    return status is None or status >= 500 or status in (408, 429)


def _is_not_payrocs(error: PayrocError) -> bool:
    return error.http_status is not None and 200 <= error.http_status < 300


def _not_payrocs(error: PayrocError, gateway: Gateway) -> str:
    return (
        f"{error}; nothing was released: check host, extra identity_url and extra proxy of "
        f"{gateway.connection}, because what answers there is not Payroc."
    )


async def _judge_preflight(
    error: PayrocError, terminal: str, ledger: ReleaseLedger, gateway: Gateway
) -> None:
    status = error.http_status
    if _is_not_payrocs(error):
        raise PreflightRefused(_not_payrocs(error, gateway)) from None
    if status == 401:
        raise PreflightRefused(
            f"{error}, with a new token too; nothing was released: {_CHECK_THE_KEY}."
        ) from None
    if _may_answer_later(error):
        raise PreflightFailed(f"{error}; nothing was released, try again later.") from None
    if refuses_terminal(error):
        await ledger.pauses.pause(terminal, f"{error}, before anything was sent.")
        return
    advice = f"; {NO_SUCH_ADDRESS}" if status == 404 else ""
    await ledger.pauses.pause(
        EVERYTHING, f"{error}, for terminal {terminal}, before anything was sent{advice}."
    )
    raise PreflightRefused(
        f"{error}; sending is paused and nothing was released{advice} ({gateway.connection})."
    ) from None


_CHECK_THE_KEY = "check the API key and the environment of the connection to Payroc"
