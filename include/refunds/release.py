"""Release: the one door between an approved refund and a POST."""

from __future__ import annotations

from collections.abc import Sequence

from include.payroc.errors import PayrocError
from include.payroc.models import AccessToken
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
    candidates = await ledger.candidates(Selection(), ids=candidate_ids)
    terminals = {item.processing_terminal_id for item in candidates} | await ledger.terminals(due_ids)
    if terminals:
        await ledger.check_environment(gateway.environment)
        await preflight(terminals, ledger, gateway)
        await ledger.check_environment(gateway.environment, bind=True)
    findings: dict[str, str] = {}
    # A reissue has no row in the source that could have changed; two people approved it in the ledger.
    ids = {item.source_ref: item.id for item in candidates if item.replaces is None}
    if ids:
        rows = await source.select_approved()
        findings = source_changes(rows, await ledger.stored(list(ids)), cipher, settings)
    withdrawn = {ids[ref]: finding for ref, finding in findings.items()}
    standing = [item.id for item in candidates if item.id not in withdrawn]
    released = await ledger.release(run_id, candidate_ids, standing, withdrawn)
    return [*released, *due_ids]


async def preflight(terminals: set[str], ledger: Ledger, gateway: Gateway) -> None:
    """
    Ask Payroc for one refund of each terminal, so that a bad configuration shows before the first POST.

    A terminal that Payroc refuses is paused, and the others go on.

    :raises PreflightRefused: when Payroc refuses the API key, or in a way that concerns more than one terminal; that pauses everything.
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
            await _judge_preflight(error, terminal, ledger)


async def _token(gateway: Gateway, *, younger_than: float | None = None) -> AccessToken:
    try:
        return await gateway.token(younger_than=younger_than)
    except PayrocError as error:
        if error.http_status in (401, 403):
            raise PreflightRefused(f"{error}; nothing was released: {_CHECK_THE_KEY}.") from None
        raise PreflightFailed(f"{error}; nothing was released, try again later.") from None


async def _list_one(terminal: str, token: AccessToken, gateway: Gateway) -> None:
    async for _ in gateway.list_refunds(token, processing_terminal_id=terminal, limit=1):
        return


async def _judge_preflight(error: PayrocError, terminal: str, ledger: Ledger) -> None:
    status = error.http_status
    if status is not None and 200 <= status < 300:
        # Payroc let us read. That an object of somebody else's can't be understood says nothing about our configuration.
        return
    if status == 401:
        raise PreflightRefused(
            f"{error}, with a new token too; nothing was released: {_CHECK_THE_KEY}."
        ) from None
    if status is None or status >= 500 or status in (408, 429):
        raise PreflightFailed(f"{error}; nothing was released, try again later.") from None
    if error.problem_type and (status in (400, 404) or error.resource is not None):
        await ledger.pause(terminal, f"{error}, before anything was sent.")
        return
    await ledger.pause(EVERYTHING, f"{error}, for terminal {terminal}, before anything was sent.")
    raise PreflightRefused(f"{error}; the sending is paused and nothing was released.") from None


_CHECK_THE_KEY = "check the API key and the environment of the connection to Payroc"
