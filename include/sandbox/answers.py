"""What goes back to the client: an answer, or deliberately none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

JSON = "application/json"
HTML = "text/html"


@dataclass(frozen=True, slots=True)
class Answer:
    """
    One answer, complete before the first byte of it is sent.

    :param status: HTTP status; None leaves the request without an answer.
    :param problem: fragment of the problem type when the body is one of Payroc's problem documents.
    :param hold_seconds: with status None, the seconds for which the connection is held open before it is closed.
    """

    status: int | None
    body: str | bytes = ""
    media_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None
    hold_seconds: float = 0.0

    @property
    def is_verdict(self) -> bool:
        """
        Whether the answer is saved under the idempotency key: a success, or a refusal of the body itself.

        Everything else is about the moment, the caller or the terminal and can be different on the next request.
        """
        return self.status is not None and (200 <= self.status < 300 or self.problem == "bad-request")


class Refusal(Exception):
    """Ends the processing of a request with this answer; raised only before anything was written."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.problem)
        self.answer = answer
