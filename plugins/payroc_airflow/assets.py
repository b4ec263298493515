"""The assets by which other DAGs can follow a finished run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import Asset, AssetAlias

if TYPE_CHECKING:
    from airflow.sdk import Context

    from include.refunds.report import Report

# An event of an alias is added by the task that has it, or not: a dry run is no news to anybody.
RUN = AssetAlias("payroc_refunds_run")
FOLLOWUP_RUN = AssetAlias("payroc_refunds_followup_run")


def has_finished(alias: AssetAlias, context: Context, report: Report) -> None:
    """
    Tell whoever waits for the asset of the same name that a run has finished.

    :param alias: an outlet of the running task. Airflow emits the event when the task succeeds.
    :param report: its totals go along, counts and sums.
    """
    extra = {
        "dag_id": context["ti"].dag_id,
        "run_id": context["run_id"],
        "totals": report.as_dict()["totals"],
    }
    context["outlet_events"][alias].add(Asset(alias.name), extra=extra)
