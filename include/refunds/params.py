"""The params of a refund run, checked before anything is written."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from include.refunds.ledger import Selection


class ParamsError(Exception):
    """A run was triggered with a param that does not exist or has an unusable value; the message names it."""


class RunParams(BaseModel):
    """
    Params of ``payroc_refunds``.

    :param dry_run: show what would be sent, and change nothing.
    :param limit: release at most so many refunds, oldest approval first.
    :param source_refs: release only these; empty means all.
    :param processing_terminal_id: release only this terminal's.
    :param approved_before: release only what was approved before this instant, which needs a time zone.
    :param batch_size: refunds per send task; ``None`` is one, or as many as the largest number of mapped tasks asks for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    dry_run: bool = False
    limit: Annotated[int, Field(ge=1, le=100_000)] = 100_000
    source_refs: tuple[str, ...] = ()
    processing_terminal_id: str | None = None
    approved_before: AwareDatetime | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None

    @classmethod
    def check(cls, params: dict[str, Any], conf: dict[str, Any] | None = None) -> RunParams:
        """
        Return the params of a run.

        :param params: Airflow's params.
        :param conf: the run's conf, of which Airflow accepts unknown keys silently.
        :raises ParamsError: when a name is unknown or a value unusable.
        """
        unknown = sorted({*params, *(conf or {})} - set(cls.model_fields))
        if unknown:
            known = ", ".join(cls.model_fields)
            raise ParamsError(
                f"The run was triggered with unknown params ({', '.join(unknown)}); known are {known}."
            )
        try:
            return cls.model_validate(params)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise ParamsError(f"Param {first['loc'][0]} is not usable: {first['msg']}.") from None

    def selection(self) -> Selection:
        """Return which refunds of the ledger's queue the run is about."""
        return Selection(
            limit=self.limit,
            source_refs=self.source_refs,
            processing_terminal_id=self.processing_terminal_id,
            approved_before=self.approved_before,
        )


def in_lists(ids: list[int], batch_size: int | None, most_lists: int) -> list[list[int]]:
    """
    Split ids into the lists that the mapped send tasks take.

    :param batch_size: ids per list; ``None`` is one.
    :param most_lists: Airflow's ``max_map_length``; lists become longer rather than more.
    """
    size = max(batch_size or 1, -(-len(ids) // most_lists))
    return [ids[start : start + size] for start in range(0, len(ids), size)]
