"""Airflow's REST API, with what a person does in a new deployment."""

from __future__ import annotations

from typing import Any

from tests.deployment.native import NativeDeployment
from tests.scheduler.client import AirflowClient


class FreshClient(AirflowClient):
    """
    A client of a deployment in which nobody has done anything yet.

    :param password: of the user that init has made.
    """

    def __init__(self, deployment: NativeDeployment, password: str) -> None:
        self.address = deployment.address("api-server", 8080)
        super().__init__(self.address, {"admin": password}, "admin")

    def unpause(self, dag_id: str) -> None:
        """Let a DAG run."""
        self._request("PATCH", f"/dags/{dag_id}", json={"is_paused": False})

    def is_paused(self, dag_id: str) -> bool:
        """Tell whether a DAG waits for a person to let it run."""
        return bool(self._request("GET", f"/dags/{dag_id}").json()["is_paused"])

    def pool_slots(self, name: str) -> int:
        """Return the size of a pool."""
        return int(self._request("GET", f"/pools/{name}").json()["slots"])

    def connection_form(self, conn_type: str) -> dict[str, Any]:
        """Return the form of a connection type, as the web interface gets it."""
        # Beside the public API, under the same login.
        answer = self._http.get(
            "/ui/connections/hook_meta", headers={"Authorization": f"Bearer {self._token}"}
        )
        assert answer.is_success, f"hook_meta answered {answer.status_code}: {answer.text}"
        return next(dict(form) for form in answer.json() if form["connection_type"] == conn_type)
