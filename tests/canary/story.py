"""What happens in the canary run: imports, runs, follow-ups and commands, with everything that can go wrong in them."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from psycopg.rows import dict_row

from demo.postgres import PostgresServer
from tests.canary import rows
from tests.canary.api import everything_told
from tests.canary.deployment import FOLLOW_UP_DAG, LOUD_DAG, TalkativeDeployment
from tests.canary.payees import Mint
from tests.conftest import ROOT
from tests.patience import PATIENCE_SECONDS, eventually
from tests.processes.line import Handler, Line
from tests.scheduler.deployment import DAG, OVERLAPPING_DAG

# What goes wrong in the merchant's database when something is written back: Postgres quotes the whole row, and a value.
ROW_IS_QUOTED = (
    "ALTER TABLE refund_requests ADD CONSTRAINT nothing_is_written_back CHECK (updated_at IS NULL) NOT VALID"
)
VALUE_IS_QUOTED = """
    ALTER TABLE refund_requests DROP CONSTRAINT nothing_is_written_back;
    CREATE FUNCTION stumble() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM NEW.name_on_account::integer; RETURN NEW; END';
    CREATE TRIGGER stumbles BEFORE UPDATE ON refund_requests FOR EACH ROW EXECUTE FUNCTION stumble()"""

# What Payroc makes of refunds that it has accepted.
PAYROC_STATUSES = ("complete", "returned", "reversal", "frozen")

WHO = {who: ("--by", who, "--reason", "looked into it") for who in ("ann", "bob")}


def keep_tokens(line: Line) -> list[str]:
    """Return a list that gets every bearer token which passes this line."""
    tokens: list[str] = []

    def hand_on(handler: Handler, answer_of_payroc: Callable[[], bytes | None]) -> None:
        answer = answer_of_payroc()
        if answer is not None:
            tokens.extend(token.decode() for token in re.findall(rb'"access_token": ?"([^"]+)"', answer))
            handler.wfile.write(answer)

    line.fault = hand_on
    return tokens


class Story:
    """
    The canary run.

    :param airflow: not started yet.
    :param folder: for the merchant's own files, which are not searched.
    :param tokens: gets every bearer token that is issued.
    """

    def __init__(
        self,
        airflow: TalkativeDeployment,
        postgres: PostgresServer,
        mint: Mint,
        folder: Path,
        tokens: list[str],
    ) -> None:
        self.airflow = airflow
        self.postgres = postgres
        self.mint = mint
        self.folder = folder
        self.tokens = tokens
        self.faults = 0
        self.faults_left: list[dict[str, Any]] = []
        self.journal: list[dict[str, Any]] = []
        self.runs: list[tuple[str, str]] = []
        self.outputs: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self.answers: dict[str, httpx.Response] = {}

    def play(self) -> None:
        with ThreadPoolExecutor(1) as meanwhile:
            imported = meanwhile.submit(self.import_rows)
            self.airflow.start()
        imported.result()
        self.queue_faults()
        self.pay()
        self.pay_the_rest()
        self.follow_up()
        self.answers = everything_told(self.airflow.client, self.runs, self.airflow.connections)
        self.journal = self.airflow.sandbox.get("/_sandbox/requests")["requests"]
        self.faults_left = self.airflow.sandbox.get("/_sandbox/faults")["faults"]

    # -- before the runs -------------------------------------------------------------------------------------------

    def import_rows(self) -> None:
        self.command("limit", "largest_refund", str(rows.LARGEST), *WHO["ann"])
        listed = rows.listed_rows(self.mint)
        invalid, broken = rows.invalid_rows(self.mint), rows.broken_lines(self.mint)
        good = rows.write_csv(
            self.folder / "refunds.csv", [*listed, *rows.single_rows(self.mint), *invalid, *broken]
        )
        self.command("import", str(good))
        # The import takes no invalid row, so an application of the merchant's has written them.
        with self.postgres.connect(str(self.airflow.source.database)) as source:
            rows.write_unchecked(source, invalid)

    def queue_faults(self) -> None:
        """Let creates go wrong in every way, and then the look-ups that follow them."""
        for number, fault in enumerate(rows.FAULTS):
            for operation in ("create", "list"):
                self.fault(operation, fault | {"orderId": f"OL{70 * number + 8}"})

    def fault(self, operation: str, fault: dict[str, Any]) -> None:
        self.airflow.sandbox.post("/_sandbox/faults", {"operation": operation, **fault})
        self.faults += 1

    # -- the runs --------------------------------------------------------------------------------------------------

    def pay(self) -> None:
        """Pay a thousand refunds in lists of a hundred and some in small ones with the loudest loggers, and rehearse it all beside them."""
        client = self.airflow.client
        runs = [
            (DAG, client.trigger(DAG, processing_terminal_id=rows.LISTED_TERMINAL, batch_size=100)),
            (LOUD_DAG, client.trigger(LOUD_DAG, source_refs=rows.SINGLE_REFS, batch_size=3)),
            (OVERLAPPING_DAG, client.trigger(OVERLAPPING_DAG, dry_run=True)),
        ]
        eventually(self.has_sent, "a refund is sent", pause=0.5)
        for fault in rows.FAULTS:
            self.fault("authorize", fault)
        eventually(lambda: self.refunds("rejected"), "a refund is rejected", pause=1)
        self.commands([("status",), ("show", "S9003")])
        # A reissue first asks Payroc, whose next token may be one that goes wrong.
        eventually(self.is_reissued, "it is reissued", pause=0)
        self.wait_for(runs)

    def has_sent(self) -> bool:
        return bool(self.airflow.sandbox.get("/_sandbox/requests?operation=create")["count"])

    def is_reissued(self) -> bool:
        rejected = self.refunds("rejected")[0]["id"]
        self.commands([("reissue", f"{rejected}", *WHO[who]) for who in ("ann", "bob")])
        return any(refund["replaces"] == rejected for refund in self.refunds("approved"))

    def pay_the_rest(self) -> None:
        """Pay what is left one by one after a person's yes, and follow up, while the source refuses what is written back."""
        client = self.airflow.client
        self.commands(
            *([("resume", "--terminal", terminal, *WHO["ann"])] for terminal in ("7701018", "7701019")),
            [("limit", "approval_count", "0", *WHO["ann"])],
        )
        self.change_source(ROW_IS_QUOTED)
        for status, refund in zip(PAYROC_STATUSES, self.refunds("accepted"), strict=False):
            self.airflow.sandbox.patch(f"/_sandbox/refunds/{refund['payroc_refund_id']}", {"status": status})
        runs = [(DAG, client.trigger(DAG)), (FOLLOW_UP_DAG, client.trigger(FOLLOW_UP_DAG))]
        self.commands([("status", "--json"), ("show", "S9006", "--json")])
        self.approve(*runs[0])
        self.wait_for(runs)

    def follow_up(self) -> None:
        """Follow up once more, while the source stumbles over a value when something is written back."""
        self.change_source(VALUE_IS_QUOTED)
        self.wait_for([(FOLLOW_UP_DAG, self.airflow.client.trigger(FOLLOW_UP_DAG))])

    def approve(self, dag_id: str, run_id: str) -> None:
        """Answer a run's question. Airflow may lose an answer that comes within seconds; then it asks again."""
        client = self.airflow.client
        client.question(dag_id, run_id)

        def is_read() -> bool:
            state = client.task_instances(dag_id, run_id)["approve_run", -1].state
            if state == "awaiting_input":
                client.as_user("frank").answer(dag_id, run_id, "Approve")
            return state in ("success", "failed")

        eventually(is_read, "the answer is read", pause=2)

    def wait_for(self, runs: list[tuple[str, str]]) -> None:
        client = self.airflow.client
        for run in runs:
            client.wait_for_run(*run, "success", "failed")
        self.runs += runs

    def refunds(self, status: str) -> list[dict[str, Any]]:
        """Return the ledger's refunds of a status, by id."""
        with self.postgres.connect(str(self.airflow.ledger.database)) as connection:
            connection.row_factory = dict_row
            return connection.execute(
                "SELECT * FROM refund_ledger.refunds WHERE status = %s ORDER BY id", [status]
            ).fetchall()

    def change_source(self, statements: str) -> None:
        with self.postgres.connect(str(self.airflow.source.database)) as connection:
            connection.execute(statements)

    # -- commands --------------------------------------------------------------------------------------------------

    def commands(self, *rows_of_commands: list[tuple[str, ...]]) -> None:
        """Run commands, those of one list one after the other."""
        with ThreadPoolExecutor(len(rows_of_commands)) as at_once:
            list(at_once.map(lambda row: [self.command(*arguments) for arguments in row], rows_of_commands))

    def command(self, *arguments: str) -> None:
        """Run a command as people do, and keep what it says."""
        done = subprocess.run(
            [sys.executable, "-m", "include.refunds", *arguments],
            cwd=ROOT,
            env=self.airflow.env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        said = f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        self.outputs[f"command {next(self._numbers)}, {arguments[0]}"] = said
