"""Airflow as people drive it: its REST API."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import httpx

from tests.patience import PATIENCE_SECONDS, eventually

_ENDED = ("success", "failed")
_run_numbers = itertools.count(1)


@dataclass(frozen=True)
class TaskInstance:
    """
    A task instance, as Airflow tells it.

    :param id: changes with each try.
    :param map_index: -1 for a task that is not mapped, or not yet expanded.
    :param pid: process of the task itself; its parent is the supervisor.
    """

    id: str
    task_id: str
    map_index: int
    state: str | None
    try_number: int
    pid: int | None


class AirflowClient:
    """
    A client of a running deployment.

    :param address: base URL of the API server.
    :param passwords: the users' passwords.
    :param user: who asks.
    """

    def __init__(self, address: str, passwords: Mapping[str, str], user: str) -> None:
        self.address = address
        self.passwords = passwords
        self._user = user
        # A proxy for the internet has no part in calls to this machine.
        self._http = httpx.Client(base_url=address, trust_env=False, timeout=PATIENCE_SECONDS)
        self._token = ""

    def as_user(self, user: str) -> AirflowClient:
        """Return a client of another user, over the same connections."""
        other = copy(self)
        other._user = user
        other._token = ""
        return other

    def close(self) -> None:
        self._http.close()

    # -- the deployment --------------------------------------------------------------------------------------------

    def is_ready(self, *dag_ids: str) -> bool:
        """Tell whether API server, scheduler and DAG processor are up, and know these DAGs."""
        try:
            health = self._http.get("/api/v2/monitor/health").json()
            if any(
                health[part]["status"] != "healthy" for part in ("metadatabase", "scheduler", "dag_processor")
            ):
                return False
            return all(
                self._request("GET", f"/dags/{dag_id}", may_fail=True).status_code == 200
                for dag_id in dag_ids
            )
        except (httpx.TransportError, ValueError):
            return False

    def answers(self) -> bool:
        """Tell whether the API server answers."""
        try:
            return self._http.get("/api/v2/version").status_code == 200
        except httpx.TransportError:
            return False

    def create_pool(self, name: str, slots: int) -> None:
        self._request("POST", "/pools", json={"name": name, "slots": slots})

    # -- runs ------------------------------------------------------------------------------------------------------

    def trigger(self, dag_id: str, **conf: Any) -> str:
        """Trigger a run with its params and return its id."""
        run_id = f"run-{next(_run_numbers)}"
        self._request(
            "POST", f"/dags/{dag_id}/dagRuns", json={"dag_run_id": run_id, "logical_date": None, "conf": conf}
        )
        return run_id

    def run_state(self, dag_id: str, run_id: str) -> str:
        return str(self._request("GET", f"/dags/{dag_id}/dagRuns/{run_id}").json()["state"])

    def wait_for_run(self, dag_id: str, run_id: str, *expected: str) -> str:
        """Wait until a run has ended, in one of the expected states, and return its state."""
        try:
            eventually(
                lambda: self.run_state(dag_id, run_id) in _ENDED, f"{dag_id} {run_id} has ended", pause=0.2
            )
        except AssertionError as error:
            error.add_note(str(self.task_instances(dag_id, run_id)))
            raise
        state = self.run_state(dag_id, run_id)
        assert state in expected, f"{dag_id} {run_id} has ended as {state}:\n{self.errors(dag_id, run_id)}"
        return state

    def errors(self, dag_id: str, run_id: str) -> str:
        """Return what the logs of a run's failed tasks say went wrong, for the message of a test that fails."""
        told = []
        for (task_id, map_index), ti in self.task_instances(dag_id, run_id).items():
            if ti.state != "failed":
                continue
            path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{ti.try_number}"
            lines = (
                self._request("GET", path, params={"map_index": map_index}, may_fail=True)
                .json()
                .get("content", [])
            )
            errors = [error for line in lines for error in line.get("error_detail") or ()]
            told += [f"{task_id} {map_index}: {error['exc_type']}: {error['exc_value']}" for error in errors]
        return "\n".join(told)

    def has_open_runs(self) -> bool:
        """Tell whether a run is queued or running."""
        return bool(self._open_runs())

    def fail_open_runs(self) -> None:
        """Mark what is queued or running as failed, which ends its tasks."""
        for run in self._open_runs():
            # It may collide with the scheduler, which works on the same rows: then the caller tries again.
            self._request(
                "PATCH",
                f"/dags/{run['dag_id']}/dagRuns/{run['dag_run_id']}",
                may_fail=True,
                json={"state": "failed"},
            )

    def _open_runs(self) -> list[dict[str, Any]]:
        return list(
            self._request("GET", "/dags/~/dagRuns", params={"state": ["queued", "running"]}).json()[
                "dag_runs"
            ]
        )

    # -- task instances --------------------------------------------------------------------------------------------

    def task_instances(self, dag_id: str, run_id: str) -> dict[tuple[str, int], TaskInstance]:
        """Return the task instances of a run, by task id and map index."""
        found = self._request(
            "GET", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances", params={"limit": 200}
        ).json()["task_instances"]
        names = TaskInstance.__dataclass_fields__
        return {
            (ti["task_id"], ti["map_index"]): TaskInstance(**{name: ti[name] for name in names})
            for ti in found
        }

    def clear(
        self, dag_id: str, run_id: str, *tasks: str | tuple[str, int], downstream: bool = False
    ) -> None:
        """Clear tasks, mapped ones by task id and map index, so that they run again."""
        body = {
            "dag_run_id": run_id,
            "task_ids": list(tasks),
            "include_downstream": downstream,
            "only_failed": False,
            "dry_run": False,
        }
        answer = self._request("POST", f"/dags/{dag_id}/clearTaskInstances", json=body).json()
        assert answer["total_entries"] >= len(tasks), f"cleared only {answer['total_entries']} of {tasks}"

    def set_state(
        self, dag_id: str, run_id: str, task_id: str, state: str, map_index: int | None = None
    ) -> None:
        """Mark a task instance as success or failed."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}" + (
            "" if map_index is None else f"/{map_index}"
        )
        self._request("PATCH", path, json={"new_state": state})

    # -- the approval of a run -------------------------------------------------------------------------------------

    def question(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Wait until a run asks for its approval, and return the question."""

        def is_asked() -> bool:
            state = self.task_instances(dag_id, run_id)["approve_run", -1].state
            assert state not in ("success", "failed", "upstream_failed"), (
                f"{dag_id} {run_id} does not ask: approve_run is {state}. {self.errors(dag_id, run_id)}"
            )
            return state == "awaiting_input"

        eventually(is_asked, f"{dag_id} {run_id} asks", pause=0.3)
        return self.asked(dag_id, run_id)

    def asked(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Return the question that a run asks or has asked."""
        return dict(self._request("GET", self._question_path(dag_id, run_id)).json())

    def answer(self, dag_id: str, run_id: str, option: str) -> int:
        """Answer a run's question, and return the HTTP status."""
        path, body = self._question_path(dag_id, run_id), {"chosen_options": [option]}
        return self._request("PATCH", path, may_fail=True, json=body).status_code

    @staticmethod
    def _question_path(dag_id: str, run_id: str) -> str:
        return f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/approve_run/-1/hitlDetails"

    # -- what tasks hand on ----------------------------------------------------------------------------------------

    def xcom(self, dag_id: str, run_id: str, task_id: str) -> Any:
        """Return what a task handed on."""
        return self._request("GET", self._xcom_path(dag_id, run_id, task_id)).json()["value"]

    def set_xcom(self, dag_id: str, run_id: str, task_id: str, value: Any) -> None:
        """Change what a task handed on."""
        self._request("PATCH", self._xcom_path(dag_id, run_id, task_id), json={"value": value})

    @staticmethod
    def _xcom_path(dag_id: str, run_id: str, task_id: str) -> str:
        return f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/return_value"

    def _request(self, method: str, path: str, *, may_fail: bool = False, **more: Any) -> httpx.Response:
        if not self._token:
            body = {"username": self._user, "password": self.passwords[self._user]}
            self._token = self._http.post("/auth/token", json=body).json()["access_token"]
        headers = {"Authorization": f"Bearer {self._token}"}
        try:
            answer = self._http.request(method, f"/api/v2{path}", headers=headers, **more)
        except httpx.TransportError:
            if method != "GET":
                raise
            # A server that has just been restarted closes old connections, and is slow at first.
            answer = self._http.request(method, f"/api/v2{path}", headers=headers, **more)
        assert may_fail or answer.is_success, f"{method} {path} answered {answer.status_code}: {answer.text}"
        return answer
