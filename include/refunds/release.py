"""Release: the one door between an approved refund and a POST."""

from __future__ import annotations

from collections.abc import Sequence

from include.payroc.errors import PayrocError
from include.refunds.cipher import Cipher
from include.refunds.classify import EVERYTHING
from include.refunds.gateway import Gateway
from include.refunds.ledger import Candidate, Ledger
from include.refunds.pull import source_changes
from include.refunds.settings import Settings
from include.refunds.source import Source


class PreflightFailed(Exception):
    """Payroc did not answer a harmless request, so nothing is released; the message says which and why."""


async def release(
    run_id: str, candidates: Sequence[Candidate], *, source: Source, ledger: Ledger, gateway: Gateway, cipher: Cipher, settings: Settings
) -> list[int]:
    """
    Release the candidates that Payroc is ready for and that the source still stands by.

    :param run_id: the run that releases; the ledger holds its approval.
    :param candidates: the run's candidates.
    :returns: ids of the refunds that may be sent, oldest approval first.
    :raises PreflightFailed: when Payroc refused or did not answer; a configuration error pauses the sending before it is raised,
        or, when it concerns one terminal, pauses that and lets the others go on.
    :raises LedgerError: when the run holds no approval of these candidates, or the ledger belongs to another Payroc.
    """
    if not candidates:
        return await ledger.release(run_id, [], {})
    await ledger.bind_environment(gateway.environment)
    await preflight({item.processing_terminal_id for item in candidates}, ledger, gateway)
    rows = await source.select_approved()
    ids = {item.source_ref: item.id for item in candidates}
    stored = await ledger.stored(list(ids))
    findings = source_changes(rows, stored, cipher, settings)
    return await ledger.release(run_id, list(ids.values()), {ids[ref]: finding for ref, finding in findings.items()})


async def preflight(terminals: set[str], ledger: Ledger, gateway: Gateway) -> None:
    """
    Ask Payroc for one refund of each terminal, so that a bad configuration shows before the first POST.

    :raises PreflightFailed: when the answer concerns more than one terminal, or none came.
    """
    try:
        token = await gateway.token()
    except PayrocError as error:
        hint = "check the API key and the environment of the connection" if error.http_status in (401, 403) else "try again later"
        raise PreflightFailed(f"{error}; nothing was released, {hint}.") from None
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
                raise PreflightFailed(f"{error}; the sending is paused and nothing was released.") from None


def _refused_scope(error: PayrocError, terminal: str) -> str | None:
    """Return the scope that a refusal concerns, or ``None`` when the answer says nothing about our configuration."""
    status = error.http_status
    if status is None or status < 300 or status >= 500 or status in (401, 408, 429):
        return None
    return terminal if error.problem_type and (status in (400, 404) or error.resource is not None) else EVERYTHING
