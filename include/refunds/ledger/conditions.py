"""
The conditions on which a refund may be sent: the safety argument of ``docs/safety.md`` as SQL, and nowhere
else.

The claim asks for all of them, and the last check right before the POST asks again. They are conditions of an
instruction ``i`` and its state ``s``, some with values that the statement has to be given.
"""

from __future__ import annotations

from datetime import timedelta

RELEASE_VALID = timedelta(hours=24)
"""A release is good for so long; what was not sent by then has to pass the gate again."""

KNOWN_FOR = timedelta(days=4)
"""A first attempt leaves only while its terminal's list is known up to less than this ago."""

ITS_TURN = """(status = 'released' AND released_at > :oldest_release
    OR status IN ('unknown', 'sending') AND lease_until <= :now AND next_attempt_at <= :now
       AND (first_sent_at IS NOT NULL OR released_at > :oldest_release))"""
"""It is its turn: it was released not long ago, or the lease and the wait of its last attempt have ended."""

STILL_ITS_TURN = "attempts = attempt AND status = 'sending' AND fence_until > ends"
"""It is still the turn of this attempt: no later one has begun, and the POST ends before the fence."""

NOT_PAUSED = """NOT EXISTS (
    SELECT FROM refund_ledger.pauses WHERE ended_at IS NULL AND scope IN ('*', processing_terminal_id))"""
"""Nothing pauses it, neither everything nor its terminal."""

KEY_IS_GOOD = """(
    first_sent_at IS NULL AND EXISTS (
        SELECT FROM refund_ledger.terminals AS list
        WHERE list.terminal = i.processing_terminal_id AND list.read_to > :known_since
          AND list.read_with = asked_with)
    OR first_sent_at > :window_start AND s.sent_with = asked_with)"""
"""
Its key pays once. Of what was never sent, its terminal's list is known: the ledger has not forgotten that it
was. Of the rest, the key still counts at Payroc, and is sent with the host and API key of before.
"""

REPLACED_STANDS = "(replaces IS NULL OR refund_ledger.ended_unpaid(replaces))"
"""
What it replaces still stands: it replaces none, or of the chain none was paid, or none is any more. A refund
that turned out to be paid after all must not be paid again by a reissue.
"""
