"""What happens to a cluster: workers die and are added, the broker goes away and comes back."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping

import psutil

from demo import processes
from tests.conftest import Sandbox
from tests.deployment.client import FreshClient
from tests.deployment.native import NativeDeployment, Running
from tests.patience import eventually
from tests.scheduler.client import TaskInstance

DAG = "payroc_refunds"


class Cluster:
    """
    A running deployment with CeleryExecutor.

    :param sandbox: the local Payroc that it pays through.
    :param variables: its ``.env``.
    """

    def __init__(self, deployment: NativeDeployment, sandbox: Sandbox, variables: Mapping[str, str]) -> None:
        self.deployment = deployment
        self.sandbox = sandbox
        self.variables = variables
        self.client = FreshClient(deployment, variables["AIRFLOW_ADMIN_PASSWORD"])

    def wait_until_ready(self) -> None:
        """Wait until Airflow knows the DAG, and let it run."""
        eventually(lambda: self.client.is_ready(DAG), "Airflow knows the DAG")
        self.client.unpause(DAG)

    def add_worker(self) -> str:
        """Do what ``--scale`` does, wait until the new worker is healthy, and return its name."""
        number = 1 + sum(name.startswith("worker-") for name in self.deployment.running)
        self.deployment.wait_until_healthy(self.deployment.start("worker", number=number))
        return f"worker-{number}"

    def worker_of(self, ti: TaskInstance) -> str:
        """Return the name of the worker whose process runs a task."""
        above = {parent.pid for parent in psutil.Process(ti.pid).parents()}
        found = [
            name
            for name, each in self._workers().items()
            if each.process is not None and each.process.pid in above
        ]
        assert len(found) == 1, f"process {ti.pid} of {ti.task_id} {ti.map_index} belongs to no worker"
        return found[0]

    def tasks_begun_by(self, name: str) -> int:
        """Return how many tasks a worker says that it has received."""
        return self._said_of_tasks(name, "received")

    def tasks_done_by(self, name: str) -> int:
        """Return how many tasks a worker says that it has ended well."""
        return self._said_of_tasks(name, "succeeded")

    def kill(self, name: str) -> None:
        """Kill a worker and everything below it, with no chance to say so."""
        process = self._workers()[name].process
        assert process is not None
        processes.stop(process, first=signal.SIGKILL)

    def restart_broker(self) -> None:
        """Kill the broker, and start it again with the data that it has written down."""
        broker = self.deployment.running["broker-1"].process
        assert broker is not None
        processes.stop(broker, first=signal.SIGKILL)
        self.deployment.wait_until_healthy(self.deployment.start("broker"))

    def _said_of_tasks(self, name: str, word: str) -> int:
        return len(re.findall(rf"Task execute_workload\[\S+\] {word}", self._workers()[name].log.read_text()))

    def _workers(self) -> dict[str, Running]:
        return {name: each for name, each in self.deployment.running.items() if each.service.name == "worker"}
