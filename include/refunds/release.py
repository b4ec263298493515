"""Release: the one door between an approved refund and a POST."""

from __future__ import annotations

from collections.abc import Sequence

from include.payroc.errors import PayrocError
from include.refunds.cipher import Cipher
from include.refunds.classify import EVERYTHING
from include.refunds.gateway import Gateway
from include.refunds.ledger import Ledger, Selection
from include.refunds.pull import source_changes
from include.refunds.settings import Settings
from include.refunds.source import Source


class PreflightFailed(Exception):
    """Payroc did not answer a harmless request, so nothing is released; it may a little later."""


class PreflightRefused(PreflightFailed):
    """Payroc refused a harmless request, so nothing is released until people have mended the configuration."""


async def release(
    run_id: str,
    candidate_ids: Sequence[int],
    due_ids: Sequence[int],
    *,
    source: Source,
    ledger: Ledger,
    gateway: Gateway,
    cipher: Cipher,
    settings: Settings,
) -> list[int]:
    """
    Release the candidates that Payroc is ready for and that the source still stands by.

    :param run_id: the run that releases; the ledger holds its approval of exactly these candidates.
    :param candidate_ids: ids of the run's candidates.
    :param due_ids: ids of refunds in doubt that the run takes up again; they were released before.
    :returns: ids of the refunds that may be sent: those released, oldest approval first, then those that are due.
    :raises PreflightFailed: when Payroc did not answer.
    :raises PreflightRefused: when Payroc refused. A refusal that concerns one terminal pauses that terminal and lets the others
        go on; one that concerns all pauses everything.
    :raises LedgerError: when the run holds no approval of these candidates, or the ledger belongs to another Payroc.
    """
    candidates = await ledger.candidates(Selection(), candidate_ids)
    terminals = {item.processing_terminal_id for item in candidates} | await ledger.terminals(due_ids)
    if terminals:
        await ledger.check_environment(gateway.environment)
        await preflight(terminals, ledger, gateway)
        await ledger.check_environment(gateway.environment, bind=True)
    findings: dict[str, str] = {}
    ids = {item.source_ref: item.id for item in candidates}
    if candidates:
        rows = await source.select_approved()
        findings = source_changes(rows, await ledger.stored(list(ids)), cipher, settings)
    released = await ledger.release(run_id, candidate_ids, {ids[ref]: finding for ref, finding in findings.items()})
    return [*released, *due_ids]


async def preflight(terminals: set[str], ledger: Ledger, gateway: Gateway) -> None:
    """
    Ask Payroc for one refund of each terminal, so that a bad configuration shows before the first POST.

    :raises PreflightRefused: when Payroc refuses more than one terminal.
    :raises PreflightFailed: when no usable answer came.
    """
    try:
        token = await gateway.token()
    except PayrocError as error:
        if error.http_status in (401, 403):
            raise PreflightRefused(
                f"{error}; nothing was released: check the API key and the environment of the connection to Payroc."
            ) from None
        raise PreflightFailed(f"{error}; nothing was released, try again later.") from None
    for terminal in sorted(terminals):
        try:
            async for _ in gateway.list_refunds(token, processing_terminal_id=terminal, limit=1):
                break
        except PayrocError as error:
            scope = _refused_scope(error, terminal)
            if scope is None:
                raise PreflightFailed(f"{error}; nothing was released, try again later.") from None
            await ledger.pause(scope, f"{error}, for terminal {terminal}, before anything was sent.")
            if scope == EVERYTHING:
                raise PreflightRefused(f"{error}; the sending is paused and nothing was released.") from None


def _refused_scope(error: PayrocError, terminal: str) -> str | None:
    """Return the scope that a refusal concerns, or ``None`` when the answer says nothing about our configuration."""
    status = error.http_status
    if status is None or status < 300 or status >= 500 or status in (401, 408, 429):
        return None
    return terminal if error.problem_type and (status in (400, 404) or error.resource is not None) else EVERYTHING
