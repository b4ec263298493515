"""
### The floor: a mapped task that does nothing

What it costs is Airflow's own, and every mapped task pays it.
"""

from __future__ import annotations

from airflow.sdk import DAG, get_current_context, task

with DAG("empty_task", doc_md=__doc__, schedule=None) as dag:

    @task
    def numbers() -> list[int]:
        """Hand on as many numbers as there shall be tasks."""
        conf = get_current_context()["dag_run"].conf or {}
        return list(range(conf["count"]))

    @task
    def empty(number: int) -> None:
        """Do nothing."""

    empty.expand(number=numbers())
