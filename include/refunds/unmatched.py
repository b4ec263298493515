"""What a run was asked for and is not about, so that a misspelled param does not look like a quiet day."""

from __future__ import annotations

from collections.abc import Sequence

from include.refunds.ledger import Candidate
from include.refunds.ledger_parts import Stored
from include.refunds.params import RunParams
from include.refunds.printable import printable
from include.refunds.pull import Pulled

_MOST = 50


async def unmatched(
    params: RunParams, pulled: Pulled, candidates: Sequence[Candidate], intake: Stored
) -> list[str]:
    """
    Return a sentence for each value of ``source_refs`` and ``processing_terminal_id`` that matches no
    candidate.

    :param pulled: what the run's pull found.
    :param candidates: what the run is about.
    :returns: the sentences, in the order of the params; of very many the first 50 and the number of the
        others.
    """
    among = {item.source_ref for item in candidates}
    refs = [ref for ref in dict.fromkeys(params.source_refs) if ref not in among]
    named = refs[:_MOST]
    known = await intake.stored([*named, *(ref.strip() for ref in named)]) if named else {}
    notes = []
    for ref in named:
        if ref in pulled.invalid:
            why = "is an invalid row of the source"
        elif ref in pulled.changed:
            why = "changed in the source after it was pulled"
        elif ref not in known:
            why = "is neither in the source nor in the ledger"
            if ref.strip() in {*known, *pulled.invalid}:
                why += "; without the blanks around it, it is"
        elif (status := known[ref]["status"]) not in ("approved", "released"):
            why = f"is {status}"
        elif ref not in pulled.standing:
            why = "is no longer approved in the source"
        else:
            why = f"is {status}, and paused or left out by another param"
        notes.append(f"source_refs: {printable(ref)} {why}.")
    if len(refs) > _MOST:
        notes.append(f"{len(refs) - _MOST:,} more source_refs that the run is not about.")
    if params.processing_terminal_id and not candidates:
        terminal = printable(params.processing_terminal_id)
        notes.append(f"processing_terminal_id: no approved refund is at {terminal}.")
    return notes
