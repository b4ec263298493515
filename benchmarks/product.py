"""
The product's tasks without a scheduler: `python -m benchmarks.product`.

It reads one task a line from standard input, as JSON, and prints what became of it. Each task runs in a process of its own, which is forked
from this one as Airflow's executor forks it: with everything imported already, and nothing opened. What a task does is what the task of
`dags/payroc_refunds.py` does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import airflow.sdk
import airflow.sdk.execution_time.supervisor  # noqa: F401 - it is there before a task process is forked
import psutil

# What Airflow alone takes; all that is imported below is the project's.
IMPORT_OF_AIRFLOW_MB = psutil.Process().memory_info().rss / 2**20

import psycopg  # noqa: E402, F401 - of the source

from include.refunds.ledger import Selection  # noqa: E402
from include.refunds.pull import pull  # noqa: E402
from include.refunds.release import release  # noqa: E402
from include.refunds.report import run_report  # noqa: E402
from include.refunds.settings import get_settings  # noqa: E402
from include.refunds.write_back import write_back  # noqa: E402
from payroc_airflow.databases import open_ledger, source_of  # noqa: E402
from payroc_airflow.gateway import HookGateway  # noqa: E402
from payroc_airflow.hooks.payroc import PayrocHook  # noqa: E402
from payroc_airflow.keys import cipher_of  # noqa: E402
from payroc_airflow.operators.refund import PayrocRefundOperator  # noqa: E402

FORK = multiprocessing.get_context("fork")


def _context(run_id: str) -> Any:
    return {
        "ti": SimpleNamespace(dag_id="payroc_refunds", run_id=run_id, map_index=0, try_number=1),
        "run_id": run_id,
    }


def prepare(run_id: str) -> dict[str, Any]:
    """Do `pull_approved`, `approve_run` and `release`."""
    return asyncio.run(_prepare(run_id))


async def _prepare(run_id: str) -> dict[str, Any]:
    settings, context = get_settings(), _context(run_id)
    cipher = cipher_of(settings)
    began = time.perf_counter()
    async with open_ledger(context, settings) as ledger:
        await ledger.runs.return_stale_releases()
        pulled = await pull(source_of(), ledger, cipher, settings)
        candidates = await ledger.runs.candidates(Selection(), standing=pulled.standing)
        await ledger.runs.begin_run(run_id, {}, candidates, {}, pulled.at)
        ids, due = [item.id for item in candidates], await ledger.runs.due()
    pulled_after = time.perf_counter() - began
    began = time.perf_counter()
    async with open_ledger(context, settings) as ledger:
        await ledger.approvals.ask_approval(run_id)
        async with HookGateway(PayrocHook()) as gateway:
            may_go = await release(
                run_id,
                ids,
                due,
                source=source_of(),
                ledger=ledger,
                gateway=gateway,
                cipher=cipher,
                settings=settings,
            )
    return {"ids": may_go, "pull": pulled_after, "release": time.perf_counter() - began}


def send(run_id: str, lists: Sequence[Sequence[int]], at_a_time: int) -> dict[str, Any]:
    """Do `send_refund` for each list, each in a process of its own, so many at a time."""
    began = time.perf_counter()
    with FORK.Pool(at_a_time, maxtasksperchild=1) as pool:
        told = pool.starmap(_send_list, [(run_id, ids) for ids in lists], chunksize=1)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "cpu": sum(cpu for cpu, _ in told),
        "over_airflow_mb": [peak - IMPORT_OF_AIRFLOW_MB for _, peak in told],
    }


def _send_list(run_id: str, ids: Sequence[int]) -> tuple[float, float]:
    """Return the CPU seconds that a list took, and the most memory that its process had, in MB."""
    before = time.process_time()
    try:
        # It raises unless each of them is accepted.
        PayrocRefundOperator(task_id="send_refund", refund_ids=list(ids)).execute(_context(run_id))
    except Exception as error:  # noqa: BLE001 - told to the benchmark, which ends with it
        # Not every exception finds its way to another process.
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    return time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def finish(run_id: str) -> dict[str, Any]:
    """Do `write_back` and `report`."""
    return asyncio.run(_finish(run_id))


async def _finish(run_id: str) -> dict[str, Any]:
    settings, context = get_settings(), _context(run_id)
    began = time.perf_counter()
    async with open_ledger(context, settings) as ledger:
        done = await write_back(source_of(), ledger.write_backs)
        done.raise_trouble()
    written_after = time.perf_counter() - began
    began = time.perf_counter()
    async with open_ledger(context, settings) as ledger:
        await ledger.runs.finish_run(run_id)
        found = await run_report(ledger.engine, settings.source, run_id)
        str(found)
    return {
        "write_back": written_after,
        "report": time.perf_counter() - began,
        "written": done.written,
        "totals": {total.status: total.count for total in found.totals},
        "unfinished": found.unfinished,
    }


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"prepare": prepare, "send": send, "finish": finish}


def _work(order: dict[str, Any], answer: Connection) -> None:
    try:
        told = TASKS[order.pop("task")](**order)
    except Exception as error:  # noqa: BLE001 - told to the benchmark, which ends with it
        answer.send({"error": f"{type(error).__name__}: {error}"})
        return
    answer.send(told)


def main() -> None:
    """Do what standard input asks for, until it ends."""
    # What the product logs is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # As Airflow's executors do before they fork.
    gc.freeze()
    for line in sys.stdin:
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_work, args=(json.loads(line), theirs))
        process.start()
        theirs.close()
        try:
            answer = ours.recv()
        except EOFError:
            answer = {"error": "its process died"}
        process.join()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
