"""One Airflow, one ledger, one source and one local Payroc for all tests of this folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import pytest

from demo.postgres import PostgresServer
from include.refunds.settings import get_settings
from tests.conftest import SCRATCH, NewDatabase, running_sandbox
from tests.patience import eventually
from tests.refunds.conftest import World
from tests.scheduler.client import TaskInstance
from tests.scheduler.deployment import DAG, TOKEN_SECONDS, Deployment

# No worker waits so long for an answer.
HELD_SECONDS = 3600


class Merchant(World):
    """A merchant whose refunds a real Airflow pays."""

    def __init__(self, airflow: Deployment) -> None:
        super().__init__(airflow.ledger, airflow.source, airflow.sandbox)
        self.airflow = airflow

    # -- before and during a run -----------------------------------------------------------------------------------

    def trouble(self, source_ref: str, kind: str, **more: Any) -> None:
        """Queue a failure at the local Payroc for the next create of a refund that need not be in the ledger yet."""
        self.sandbox.post(
            "/_sandbox/faults",
            {"operation": "create", "kind": kind, "orderId": self.order_id(source_ref), **more},
        )

    def hold(self, source_ref: str) -> None:
        """Let the local Payroc keep the next create of a refund unprocessed until :meth:`let_go`."""
        self.trouble(source_ref, "slow", seconds=HELD_SECONDS)

    def let_go(self, source_ref: str) -> None:
        """Let the local Payroc process what it keeps."""
        self.sandbox.delete(f"/_sandbox/faults?orderId={self.order_id(source_ref)}")

    def order_id(self, source_ref: str) -> str:
        return str(self.source_row(source_ref)["order_id"])

    def troubles_left(self, source_ref: str) -> int:
        """Return how many failures still wait for a refund's creates; Payroc takes one when it receives a create."""
        order_id = self.order_id(source_ref)
        return sum(
            fault["left"]
            for fault in self.sandbox.get("/_sandbox/faults")["faults"]
            if fault.get("orderId") == order_id
        )

    def attempt_row(self, source_ref: str) -> dict[str, Any] | None:
        """Return the ledger's row of the refund's last attempt."""
        rows = self.rows(
            "SELECT a.* FROM refund_ledger.refund_attempts AS a JOIN refund_ledger.refunds AS r ON r.id = a.refund_id "
            "WHERE r.source_ref = :ref ORDER BY a.attempt DESC LIMIT 1",
            ref=source_ref,
        )
        return rows[0] if rows else None

    def task_of(self, source_ref: str, dag_id: str = DAG) -> TaskInstance:
        """Return the task instance of the refund's last attempt, as it is now."""
        attempt = self.attempt_row(source_ref)
        assert attempt is not None, f"{source_ref} was never claimed"
        return self.airflow.task_instance(dag_id, attempt["run_id"], "send_refund", attempt["map_index"])

    def wait_until(self, condition: Callable[[], Any], what: str, *, pause: float = 0.05) -> None:
        """Wait until something is true; fail with the ledger's refunds that have not ended."""
        try:
            eventually(condition, what, pause=pause)
        except AssertionError as error:
            query = """
                SELECT source_ref, status, attempts, lease_until, reason FROM refund_ledger.refunds
                WHERE status <> 'accepted'"""
            error.add_note(str(self.rows(query)))
            raise

    def strike(self, source_refs: Sequence[str], blow: Callable[[str], None]) -> None:
        """
        Deal a blow to each refund's worker, at the moment at which Payroc has received its create and has not answered.

        :param source_refs: refunds whose next create is troubled, so that it takes long.
        """
        left = {source_ref: self.troubles_left(source_ref) for source_ref in source_refs}

        def all_are_struck() -> bool:
            for source_ref in [ref for ref, troubles in left.items() if self.troubles_left(ref) < troubles]:
                blow(source_ref)
                del left[source_ref]
            return not left

        self.wait_until(all_are_struck, f"the creates of {list(left)} reach Payroc", pause=0.02)

    # -- afterwards ------------------------------------------------------------------------------------------------

    def creates(self, source_ref: str) -> list[dict[str, Any]]:
        """Return the requests to create this refund, in the order in which Payroc received them."""
        found = self.sandbox.get(f"/_sandbox/requests?operation=create&orderId={self.order_id(source_ref)}")[
            "requests"
        ]
        return sorted(found, key=lambda entry: entry["at"])

    def refunds_at_payroc(self, source_ref: str) -> list[dict[str, Any]]:
        return list(self.sandbox.get(f"/_sandbox/refunds?orderId={self.order_id(source_ref)}")["refunds"])

    def assert_paid_once(self, *source_refs: str) -> None:
        """Each exists once at Payroc, and ledger and source know that one."""
        for source_ref in source_refs:
            theirs = self.refunds_at_payroc(source_ref)
            assert len(theirs) == 1, f"{source_ref} exists {len(theirs)} times at Payroc: {theirs}"
            for row in (self.row(source_ref), self.source_row(source_ref)):
                seen = (row["status"], row["payroc_refund_id"], row["amount"])
                assert seen == ("accepted", theirs[0]["refundId"], theirs[0]["amount"]), (
                    f"{source_ref}: {row}"
                )

    def waits(self, source_ref: str) -> list[float]:
        """Return the seconds between the creates of a refund, as Payroc received them."""
        times = [datetime.fromisoformat(entry["at"]) for entry in self.creates(source_ref)]
        return [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)]


@pytest.fixture(scope="module")
def airflow(
    request: pytest.FixtureRequest, postgres: PostgresServer, new_ledger: NewDatabase, new_source: NewDatabase
) -> Iterator[Deployment]:
    """A running Airflow with a ledger and a source of its own. It ends with the file, for it takes time from other tests."""
    folder = SCRATCH / request.path.stem
    folder.mkdir(mode=0o711)
    # Tokens live so short that leases end while a test waits.
    with running_sandbox(folder / "sandbox.log", "--token-seconds", str(TOKEN_SECONDS)) as sandbox:
        deployment = Deployment(folder, postgres, new_ledger(), new_source(), sandbox)
        try:
            deployment.start()
            yield deployment
        finally:
            deployment.stop()


@pytest.fixture(scope="module")
def merchant(airflow: Deployment) -> Iterator[Merchant]:
    """The merchant. Tests tell their refunds apart by source_ref."""
    with pytest.MonkeyPatch.context() as patched:
        sandbox = airflow.sandbox
        connection = {
            "conn_type": "payroc",
            "password": "sandbox-key",
            "host": sandbox.api_url,
            "extra": {"identity_url": sandbox.url},
        }
        patched.setenv("AIRFLOW_CONN_PAYROC_DEFAULT", json.dumps(connection))
        get_settings.cache_clear()
        merchant = Merchant(airflow)
    yield merchant
    merchant.ledger_engine.dispose()
    merchant.source_engine.dispose()


@pytest.fixture(autouse=True)
def nothing_left_over(merchant: Merchant) -> Iterator[None]:
    """What a test that failed left at work must not reach the next."""
    yield
    merchant.sandbox.delete("/_sandbox/faults")
    client = merchant.airflow.client

    def nothing_is_left() -> bool:
        client.fail_open_runs()
        return not client.has_open_runs() and not merchant.airflow.task_processes()

    merchant.wait_until(nothing_is_left, "all runs and task processes have ended")


@pytest.fixture
def measured(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[..., None]:
    """Return a function that records figures, which then stand at the end of pytest's output."""

    def note(**figures: Any) -> None:
        rounded = {
            name: round(value, 1) if isinstance(value, float) else value for name, value in figures.items()
        }
        test = request.node.name.removeprefix("test_").replace("_", " ")
        record_property(
            test, ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in rounded.items())
        )

    return note
