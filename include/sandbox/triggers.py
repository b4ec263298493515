"""
Behaviour on demand by the last four digits of the account number or of the secure token.

TRIGGERS is the only list of them: ``--help`` and the table in README.md are made from it (``python -m include.sandbox.triggers``).
Payroc documents no such triggers for bank transfers; these are the sandbox's own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from include.sandbox.faults import Fault


@dataclass(frozen=True)
class Trigger:
    """
    What happens to a create whose account number or token ends in ``digits``.

    :param text: one line for people.
    :param fault: the failure, None when the request itself goes well.
    :param once: the fault hits only the first request with an idempotency key. Faults after commit need no such flag: a repeat is
        answered from the saved response and never gets here.
    :param status: status of the refund that is created.
    :param returns: the refund is returned by the bank at the batch close after the one that settled it.
    :param wrong_amount: the answer shows another ``order.amount`` than the refund has.
    """

    digits: str
    text: str
    fault: Fault | None = None
    once: bool = False
    status: str = "ready"
    returns: bool = False
    wrong_amount: bool = False


TRIGGERS: tuple[Trigger, ...] = (
    Trigger(
        "9001", "declined by the bank: 201 with status `declined` and responseCode `D`", status="declined"
    ),
    Trigger(
        "9002",
        "400 bad-request that names refundMethod.accountNumber",
        Fault(kind="problem", problem="bad-request", parameter="refundMethod.accountNumber"),
    ),
    Trigger(
        "9003",
        "timeout after commit: the refund exists, the first request gets no answer; a repeat is replayed",
        Fault(kind="hang", when="after"),
    ),
    Trigger(
        "9004",
        "timeout before commit: the first request gets no answer, nothing is created; a repeat is processed",
        Fault(kind="hang"),
        once=True,
    ),
    Trigger(
        "9005", "500 api-error once, before commit; a repeat is processed", Fault(kind="problem"), once=True
    ),
    Trigger(
        "9006", "500 api-error once, after commit; a repeat is replayed", Fault(kind="problem", when="after")
    ),
    Trigger("9007", "500 api-error every time, nothing is created", Fault(kind="problem")),
    Trigger(
        "9008",
        "429 with Retry-After once, before commit; a repeat is processed",
        Fault(kind="status", status=429),
        once=True,
    ),
    Trigger(
        "9009",
        "connection closed without an answer once, after commit; a repeat is replayed",
        Fault(kind="close", when="after"),
    ),
    Trigger(
        "9010",
        "201 with an HTML body once, after commit; a repeat is replayed",
        Fault(kind="garbage", when="after"),
    ),
    Trigger(
        "9011",
        "201 with an empty body once, after commit; a repeat is replayed",
        Fault(kind="empty", when="after"),
    ),
    Trigger("9012", "status `pending`: accepted, held back when the batch closes", status="pending"),
    Trigger("9013", "status `admin`: under review by Payroc", status="admin"),
    Trigger(
        "9014",
        "409 resource-already-exists, nothing is created",
        Fault(kind="problem", problem="resource-already-exists"),
    ),
    Trigger(
        "9015",
        "409 idempotency-key-in-use once, before commit; a repeat is processed",
        Fault(kind="problem", problem="idempotency-key-in-use"),
        once=True,
    ),
    Trigger(
        "9016", "accepted; `complete` at the first batch close, `returned` (R01) at the next", returns=True
    ),
    Trigger(
        "9017",
        "401 not-authorized once, before commit; a repeat is processed",
        Fault(kind="problem", problem="not-authorized"),
        once=True,
    ),
    Trigger(
        "9018",
        "403 forbidden with a resource, nothing is created",
        Fault(kind="problem", problem="forbidden", resource="bankTransferRefund"),
    ),
    Trigger(
        "9019",
        "400 capabilities-missing that names processingTerminalId, nothing is created",
        Fault(kind="problem", problem="capabilities-missing", parameter="processingTerminalId"),
    ),
    Trigger(
        "9020",
        "503 with an HTML body once, before commit; a repeat is processed",
        Fault(kind="status", status=503),
        once=True,
    ),
    Trigger(
        "9021",
        "201 whose order.amount differs from the request; the refund has the right amount",
        wrong_amount=True,
    ),
)

NORMAL = Trigger("", "accepted: 201 with status `ready` and responseCode `A`")
_BY_DIGITS = {trigger.digits: trigger for trigger in TRIGGERS}
RETURNING = tuple(trigger.digits for trigger in TRIGGERS if trigger.returns)


def trigger_for(number: str) -> Trigger:
    """Find the trigger of an account number or token; NORMAL when its last four digits are none."""
    return _BY_DIGITS.get(number[-4:], NORMAL)


def as_text() -> str:
    """List the triggers as lines for a terminal."""
    return "\n".join(f"  {trigger.digits}  {trigger.text.replace('`', '')}" for trigger in TRIGGERS)


def as_markdown() -> str:
    """List the triggers as the table of README.md."""
    rows = [f"| {trigger.digits} | {trigger.text} |" for trigger in TRIGGERS]
    return "\n".join(
        [
            "| last four | what happens to the create |",
            "| --- | --- |",
            *rows,
            f"| any other | {NORMAL.text} |",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(as_markdown() + "\n")
