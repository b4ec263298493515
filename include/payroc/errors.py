"""What can go wrong between us and Payroc, as exceptions that carry facts and never a body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Self

OBJECTS_NAMED: Final = 100
"""How many objects that can't be understood are named; all are counted."""


class PayrocError(Exception):
    """
    A call to Payroc that did not return a usable object.

    The message names the operation, the HTTP status and the problem type. It never holds a request or response body,
    a token or an API key, so it may be logged, stored and shown.

    :param operation: Payroc's operation in words, for example ``create refund``.
    :param detail: one short phrase of our own about what happened.
    :param http_status: HTTP status of the answer, ``None`` when no answer came.
    :param problem_type: fragment of the problem document's ``type``, for example ``bad-request``.
    :param instance: ``instance`` of the problem document.
    :param resource: ``resource`` of the problem document (sent with 403 and 404).
    :param parameters: names of the request fields that the problem's ``errors[]`` complain of.
    :param retry_after: seconds that Payroc asked us to wait (``Retry-After``), ``None`` when it did not.
    """

    def __init__(
        self,
        operation: str,
        detail: str,
        *,
        http_status: int | None = None,
        problem_type: str | None = None,
        instance: str | None = None,
        resource: str | None = None,
        parameters: tuple[str, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        self.operation = operation
        self.detail = detail
        self.http_status = http_status
        self.problem_type = problem_type
        self.instance = instance
        self.resource = resource
        self.parameters = parameters
        self.retry_after = retry_after
        super().__init__(operation, detail)

    def __str__(self) -> str:
        status = f" (HTTP {self.http_status})" if self.http_status is not None else ""
        return f"Payroc, {self.operation}: {self.detail}{status}"


class PayrocProblem(PayrocError):
    """Payroc answered with a problem document (``application/problem+json``, API reference section 5)."""


class PayrocUnexpectedAnswer(PayrocError):
    """An answer came that is not in Payroc's format: a redirect, HTML, an empty 201, a wrong or too large body."""


class PayrocIncompleteList(PayrocUnexpectedAnswer):
    """
    A list was read to its end, but it holds objects that can't be understood; the others were handed out
    before.

    :param missing: number of these objects.
    :param objects: their names, up to :data:`OBJECTS_NAMED`: ``refund CD3HN88U9F``, ``order SO-1041`` or
        ``object 3 of page 2``.
    """

    def __init__(self, operation: str, missing: int, objects: Sequence[str]) -> None:
        self.missing = missing
        self.objects = tuple(objects[:OBJECTS_NAMED])
        super().__init__(
            operation, f"{objects_named(missing, self.objects)} can't be understood", http_status=200
        )

    def __reduce__(self) -> tuple[type[Self], tuple[str, int, tuple[str, ...]]]:
        """Pickle by its own arguments: other errors are made of operation and detail."""
        return type(self), (self.operation, self.missing, self.objects)


def objects_named(count: int, names: Sequence[str]) -> str:
    """Return a number of objects with the names of the first ten: ``2 objects (order SO-1041, 1 more)``."""
    shown = list(names[:10])
    if count > len(shown):
        shown.append(f"{count - len(shown)} more")
    return f"{count} {'object' if count == 1 else 'objects'} ({', '.join(shown)})"


class PayrocNoAnswer(PayrocError):
    """No answer came: refused, reset or timed out. Payroc may or may not have acted on the request."""


class PayrocConfigurationError(Exception):
    """The connection or the settings can't be used; the message names the connection, the field and the remedy."""
