"""Where people find a run in Airflow's web interface."""

from __future__ import annotations

from urllib.parse import quote

from airflow.sdk.configuration import conf


def run_url(dag_id: str, run_id: str) -> str:
    """Return the address of a run, empty when ``[api] base_url`` does not say where Airflow is."""
    base = str(conf.get("api", "base_url", fallback="") or "").rstrip("/")
    # Airflow's own default may be a path only, which leads nowhere from a mail.
    return (
        f"{base}/dags/{quote(dag_id, safe='')}/runs/{quote(run_id, safe='')}"
        if base.startswith("http")
        else ""
    )


def question_url(dag_id: str, run_id: str, task_id: str) -> str:
    """Return the address of the question that a task asks under Required Actions, or empty as :func:`run_url`."""
    url = run_url(dag_id, run_id)
    return f"{url}/tasks/{quote(task_id, safe='')}/required_actions" if url else ""
