"""Everything that Airflow's API server tells about runs: what its web interface shows comes from there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import httpx

from tests.scheduler.client import AirflowClient

# What the pages ask for; the API's own description leaves these out.
_PAGES = (
    "/ui/config",
    "/ui/connections/hook_meta",
    "/ui/dags",
    "/ui/dags/{dag_id}/latest_run",
    "/ui/dags/{dag_id}/dagRuns/{dag_run_id}/stats",
    "/ui/dashboard/dag_stats",
    "/ui/dependencies",
    "/ui/gantt/{dag_id}/{dag_run_id}",
    "/ui/grid/runs/{dag_id}",
    "/ui/grid/structure/{dag_id}",
    "/ui/grid/ti_summaries/{dag_id}",
    "/ui/structure/structure_data?dag_id={dag_id}",
)
# Signing out would end it, and logs are asked for try by try.
_NOT = re.compile("/auth/|/logs/")
_ALL = "limit=10000"


def everything_told(
    client: AirflowClient, runs: Iterable[tuple[str, str]], connections: Iterable[str]
) -> dict[str, httpx.Response]:
    """
    Ask for everything that can be asked for with a GET, and return the answers by path.

    :param runs: DAG ids and run ids.
    :param connections: ids of connections.
    """
    told: dict[str, httpx.Response] = {}

    def ask(path: str) -> httpx.Response:
        if path not in told:
            headers = {
                "Authorization": f"Bearer {client._token}",
                "Accept": "application/json, application/x-ndjson, */*",
            }
            told[path] = client._http.get(path, headers=headers)
        return told[path]

    described = ask("/openapi.json").json()["paths"]
    paths = [
        path.replace(":path", "")
        for path, operations in described.items()
        if "get" in operations and not _NOT.search(path)
    ]
    instances = []
    for dag_id, run_id in runs:
        of_run = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances"
        found = ask(f"{of_run}?{_ALL}").json()["task_instances"]
        instances += found
        for ti in found:
            for number in range(1, ti["try_number"] + 1):
                ask(f"{of_run}/{ti['task_id']}/logs/{number}?map_index={ti['map_index']}&full_content=true")
    for known in [*_samples(instances), *({"connection_id": conn_id} for conn_id in connections)]:
        for path in (*paths, *_PAGES):
            if set(re.findall(r"{(\w+)}", path)) <= set(known):
                ask(f"{path.format(**known)}{'&' if '?' in path else '?'}{_ALL}")
    return told


def _samples(instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what stands in paths, for one instance of each task."""
    of_each_task = {(ti["dag_id"], ti["task_id"]): ti for ti in instances}
    return [
        {name: ti[name] for name in ("dag_id", "dag_run_id", "task_id", "map_index", "try_number")}
        | {
            "task_try_number": ti["try_number"],
            "xcom_key": "return_value",
            "pool_name": ti["pool"],
            "version_number": 1,
            "event_log_id": 1,
        }
        for ti in of_each_task.values()
    ]
