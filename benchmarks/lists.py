"""Lists of 500 beside plain scripts that do the same without any of the safety, and what a latency of Payroc's leaves of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from benchmarks.figure import Figure, figure_of
from benchmarks.stage import BATCH_SIZE, CONCURRENCY, Payroc, Product, Stage, in_lists, value

# As many processes as the machine has cores. They share the requests in flight, of which the scripts have as many.
AT_A_TIME = 2
_SHARE = 0.8


@dataclass(frozen=True)
class _Size:
    """
    How much is measured.

    :param rounds: how often each of the three is run.
    :param refunds: refunds per run at 0 ms and at 50 ms.
    :param of_httpx: refunds per run of the script that is slow.
    """

    rounds: int
    refunds: int
    of_httpx: int


_FULL = _Size(rounds=5, refunds=4000, of_httpx=1500)
_QUICK = _Size(rounds=3, refunds=2000, of_httpx=300)


def measure(quick: bool) -> list[Figure]:
    """
    Measure the product's lists beside the scripts, in turns, on one database server and one Payroc.

    :param quick: fewer rounds of fewer refunds.
    """
    size = _QUICK if quick else _FULL
    with Stage() as stage, stage.payroc() as payroc:
        race = _Race(stage, payroc, size)
        with stage.product(race.books, payroc, REQUESTS_IN_FLIGHT=str(CONCURRENCY)) as product:
            return list(race.figures(product))


class _Race:
    def __init__(self, stage: Stage, payroc: Payroc, size: _Size) -> None:
        self.stage = stage
        self.payroc = payroc
        self.size = size
        self.books = stage.new_books("lists")
        self.peers = {script: stage.new_books(script).source for script in ("httpx", "aiohttp")}
        self._ids: Iterator[int] = iter(())
        # Of refunds that were approved three days ago.
        self._old: Iterator[int] = iter(())

    def figures(self, product: Product) -> Iterator[Figure]:
        size = self.size
        latencies = (0, 50)
        runs = len(latencies) * size.rounds
        beside_old = size.rounds * size.refunds
        self.stage.approve(self.books.source, runs * size.refunds + beside_old + size.rounds * BATCH_SIZE)
        self.stage.approve(self.peers["aiohttp"], runs * size.refunds)
        self.stage.approve(self.peers["httpx"], size.rounds * size.of_httpx)
        old = size.rounds * size.refunds
        self.stage.approve(self.books.source, old, hours_ago=72)
        # The oldest approval is first.
        released = product.released("bench")["ids"]
        self._old, self._ids = iter(released[:old]), iter(released[old:])
        with self.stage.postgres.connect(self.books.ledger) as ledger:
            for latency in latencies:
                yield from self._beside_scripts(product, ledger, latency)
            yield self._old_beside_new(product, 50)
            yield self._hidden_latency(product, 200)

    def _old_beside_new(self, product: Product, latency: int) -> Figure:
        """Refunds that waited over a weekend next to those of the last hour: each costs one request."""
        ratios, lists = [], []
        for _ in range(self.size.rounds):
            new, _ = self._product(product, latency, self.size.refunds, AT_A_TIME)
            old, _ = self._product(product, latency, self.size.refunds, AT_A_TIME, self._old)
            ratios.append(old / new)
            lists.append(self.payroc.counts().get("list", 0))
        detail = {"latency_ms": latency, "refunds_per_run": self.size.refunds, "lists_asked_for": lists}
        name = f"Lists approved three days ago ÷ an hour ago, {latency} ms"
        return figure_of(name, "≥ 0.97 ×", ratios, "×", detail, lambda ratio: ratio >= 0.97)

    def _beside_scripts(self, product: Product, ledger: psycopg.Connection, latency: int) -> Iterator[Figure]:
        """Run the product and the scripts in turns, so that what else the machine does meets all of them."""
        rates: dict[str, list[float]] = {"product": [], "aiohttp": [], "httpx": []}
        commits: list[_Commits] = []
        cpu: list[float] = []
        database_cpu: dict[str, list[float]] = {"product": [], "aiohttp": []}
        for _ in range(self.size.rounds):
            before, used = _Commits.read(ledger), self.stage.database_cpu()
            rate, cpu_each = self._product(product, latency, self.size.refunds, AT_A_TIME)
            database_cpu["product"].append(self.stage.database_cpu() - used)
            commits.append(_Commits.read(ledger).since(before, self.size.refunds))
            rates["product"].append(rate)
            cpu.append(cpu_each)
            used = self.stage.database_cpu()
            rates["aiohttp"].append(self._script("aiohttp", latency, self.size.refunds))
            database_cpu["aiohttp"].append(self.stage.database_cpu() - used)
            if latency == 0:
                rates["httpx"].append(self._script("httpx", latency, self.size.of_httpx))
        detail = {
            "refunds_per_second": {
                name: [round(rate, 1) for rate in found] for name, found in rates.items() if found
            },
            "latency_ms": latency,
            "concurrency": CONCURRENCY,
            "batch_size": BATCH_SIZE,
            "lists_at_a_time": AT_A_TIME,
            "refunds_per_run": self.size.refunds,
            "cpu_us_per_refund": [round(each * 1e6) for each in cpu],
            "database_cpu_us_per_refund": {
                name: [round(each * 1e6 / self.size.refunds) for each in found]
                for name, found in database_cpu.items()
            },
        }
        if rates["httpx"]:
            ratios = _ratios(rates["product"], rates["httpx"])
            yield figure_of(
                "Lists ÷ httpx script, 0 ms", "≥ 3 ×", ratios, "×", detail, lambda ratio: ratio >= 3
            )
            ratios = _ratios(database_cpu["product"], database_cpu["aiohttp"])
            yield figure_of(
                "Postgres's CPU per refund ÷ aiohttp script, 0 ms",
                "≤ 2.4 ×",
                ratios,
                "×",
                detail,
                lambda ratio: ratio <= 2.4,
            )
        least = 0.52 if latency == 0 else 0.92
        ratios = _ratios(rates["product"], rates["aiohttp"])
        yield figure_of(
            f"Lists ÷ aiohttp script, {latency} ms",
            f"≥ {least:g} ×",
            ratios,
            "×",
            detail,
            lambda ratio: ratio >= least,
        )
        yield figure_of(f"Lists, {latency} ms", "told only", rates["product"], "refunds/s", {})
        if latency == 0:
            durable = [found.durable for found in commits]
            detail = {
                "refunds_per_durable_commit": [round(1 / each, 1) for each in durable],
                "fsyncs_per_refund": [round(found.fsyncs, 4) for found in commits],
                "all_transactions_per_refund": [round(found.all, 4) for found in commits],
            }
            yield figure_of(
                "Durable commits per refund", "≤ 2", durable, "commits", detail, lambda each: each <= 2
            )

    def _hidden_latency(self, product: Product, latency: int) -> Figure:
        """One list, and how near it comes to what that many requests at a time can do at best."""
        best = CONCURRENCY / (latency / 1000)
        rates = [self._product(product, latency, BATCH_SIZE, 1)[0] for _ in range(self.size.rounds)]
        detail = {
            "refunds_per_second": rates,
            "concurrency_by_latency": best,
            "most_in_flight": self.payroc.counts()["most_in_flight"],
            # 500 requests, 64 at a time, are 8 rounds, of which the last one is not full: no list comes nearer than this.
            "highest_possible": BATCH_SIZE / (-(-BATCH_SIZE // CONCURRENCY) * latency / 1000) / best,
        }
        shares = [rate / best for rate in rates]
        name = f"One list at {latency} ms ÷ (concurrency ÷ latency)"
        return figure_of(name, f"≥ {_SHARE:g}", shares, "×", detail, lambda share: share >= _SHARE)

    def _product(
        self,
        product: Product,
        latency: int,
        refunds: int,
        at_a_time: int,
        ids: Iterator[int] | None = None,
    ) -> tuple[float, float]:
        """Return refunds per second and CPU seconds per refund of the product's processes."""
        self.payroc.begin(latency)
        taken = [next(ids or self._ids) for _ in range(refunds)]
        told = product.send("bench", in_lists(taken), at_a_time=at_a_time)
        return refunds / told["seconds"], told["cpu"] / refunds

    def _script(self, which: str, latency: int, refunds: int) -> float:
        self.payroc.begin(latency)
        arguments = (
            "--database",
            self.stage.plain_url(self.peers[which]),
            "--payroc",
            self.payroc.url,
            "--limit",
            str(refunds),
        )
        told: dict[str, Any] = json.loads(
            self.stage.run(f"benchmarks.peers.{which}_script", *arguments, "--concurrency", str(CONCURRENCY))
        )
        if told["refunds"] != refunds:
            raise RuntimeError(f"The script {which} paid {told['refunds']} refunds, not {refunds}.")
        return float(refunds / told["seconds"])


@dataclass(frozen=True)
class _Commits:
    """
    What the ledger's server has counted.

    :param durable: transactions that wrote, each of which has a transaction id.
    :param fsyncs: how often the log was forced to the disk.
    :param all: all transactions of the ledger's database, those that only read included.
    """

    durable: float
    fsyncs: float
    all: float

    @classmethod
    def read(cls, ledger: psycopg.Connection) -> _Commits:
        ledger.execute("SELECT pg_stat_force_next_flush()")
        durable = value(ledger, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        fsyncs = value(ledger, "SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal'")
        every = value(ledger, "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")
        return cls(durable, float(fsyncs), every)

    def since(self, before: _Commits, refunds: int) -> _Commits:
        return _Commits(
            (self.durable - before.durable) / refunds,
            (self.fsyncs - before.fsyncs) / refunds,
            (self.all - before.all) / refunds,
        )


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return round by round how many times as fast we are."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]
