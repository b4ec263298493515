"""The params of a refund run, checked before anything is written."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from include.refunds.ledger import Selection
from include.refunds.printable import printable

MOST = 100_000
"""More refunds than this no run is about."""


class ParamsError(Exception):
    """A run was triggered with a param that does not exist or has an unusable value; the message names it."""


def _number(value: object) -> object:
    # JSON knows one kind of number: 5.0 is 5, as for Airflow. A yes or a text is none.
    if isinstance(value, bool | str):
        raise ValueError
    # pydantic takes no float of more than 64 bits for a whole number.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(value: object) -> object:
    # Neither goes into Postgres, so neither stands in a source_ref.
    if isinstance(value, str) and any(char == "\x00" or "\ud800" <= char <= "\udfff" for char in value):
        raise ValueError
    return value


def _instant(value: object) -> datetime | None:
    if value is None or isinstance(value, datetime):
        instant = value
    elif isinstance(value, str):
        # RFC 3339 allows its letters in lower case.
        instant = datetime.fromisoformat(value.upper())
    else:
        raise ValueError
    if instant is None:
        return None
    # Without its zone it could be any of 26 hours; near the ends of the calendar there is none in UTC.
    if instant.tzinfo is None or not 2000 <= instant.year < 9999:
        raise ValueError
    return instant.astimezone(UTC)


Text = Annotated[str, BeforeValidator(_text)]
Number = Annotated[int, BeforeValidator(_number)]


class RunParams(BaseModel):
    """
    Params of ``payroc_refunds``.

    :param dry_run: show what would be sent, and change nothing.
    :param limit: release at most so many refunds, oldest approval first.
    :param source_refs: release only these; empty means all.
    :param processing_terminal_id: release only this terminal's.
    :param approved_before: release only what was approved before this instant.
    :param batch_size: refunds per send task; ``None`` is one, or as many as the largest number of mapped tasks asks
        for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    dry_run: Annotated[bool, Field(strict=True)] = False
    limit: Annotated[Number, Field(ge=1, le=MOST)] = MOST
    source_refs: tuple[Text, ...] = ()
    processing_terminal_id: Annotated[Text, Field(min_length=4, max_length=50)] | None = None
    approved_before: Annotated[datetime | None, BeforeValidator(_instant)] = None
    # More than all of a run's refunds are all of them.
    batch_size: Annotated[Number, Field(ge=1), AfterValidator(lambda size: min(size, MOST))] | None = None

    @classmethod
    def check(cls, params: dict[str, Any], conf: dict[str, Any] | None = None) -> RunParams:
        """
        Return the params of a run.

        :param params: Airflow's params.
        :param conf: the run's conf, of which Airflow accepts unknown keys silently.
        :raises ParamsError: when a name is unknown or a value unusable; the message names all of them.
        """
        if not isinstance(conf, dict | None):
            raise ParamsError('The run\'s conf is not usable; give a JSON object such as {"limit": 10}.')
        unknown = sorted({*params, *(conf or {})} - set(cls.model_fields))
        if unknown:
            named = ", ".join(printable(name, limit=40) for name in unknown[:10])
            known = ", ".join(cls.model_fields)
            raise ParamsError(f"The run was triggered with unknown params ({named}); known are {known}.")
        if params.get("source_refs", ()) is None:
            params = params | {"source_refs": ()}
        try:
            return cls.model_validate(params)
        except ValidationError as error:
            wrong = dict.fromkeys(str(found["loc"][0]) for found in error.errors(include_input=False))
        sentences = [f"Param {name} is not usable; give {_EXPECTED[name]}." for name in wrong]
        raise ParamsError(" ".join(sentences))

    def selection(self) -> Selection:
        """Return which refunds of the ledger's queue the run is about."""
        return Selection(
            limit=self.limit,
            source_refs=self.source_refs,
            processing_terminal_id=self.processing_terminal_id,
            approved_before=self.approved_before,
        )


_EXPECTED = {
    "dry_run": "true or false",
    "limit": f"a whole number from 1 to {MOST}",
    "source_refs": 'a list of texts such as ["RF-2208"], or null for all',
    "processing_terminal_id": "a text of 4 to 50 characters, or null for all",
    "approved_before": "a date and time with its zone, such as 2026-11-17T00:00:00-05:00, or null",
    "batch_size": "a whole number of at least 1, or null for one refund per task",
}


def in_lists(ids: list[int], batch_size: int | None, most_lists: int) -> list[list[int]]:
    """
    Split ids into the lists that the mapped send tasks take.

    :param batch_size: ids per list; ``None`` is one.
    :param most_lists: Airflow's ``max_map_length``; lists become longer rather than more.
    """
    size = max(batch_size or 1, -(-len(ids) // most_lists))
    return [ids[start : start + size] for start in range(0, len(ids), size)]
