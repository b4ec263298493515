"""What goes wrong with the merchant's database, as errors that quote no value of a row."""

from __future__ import annotations

from include.refunds.database_errors import describe


class SourceError(Exception):
    """The source can't be read or written; the message names the file or connection and what to do."""


class SourceUnavailable(SourceError):
    """The source's database does not answer; it may a little later."""


def failed(file: str, error: BaseException) -> SourceError:
    """Return the error to raise for the statement of a file that a database refused."""
    failure = describe(error)
    kind = SourceUnavailable if failure.kind.is_transient else SourceError
    return kind(f"{file} failed on the connection refunds_source: {failure}; {failure.remedy}.")
