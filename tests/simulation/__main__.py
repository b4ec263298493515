"""``make simulate``: run many histories, or tell one step by step."""

from __future__ import annotations

import argparse
import secrets
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tests.simulation.history import tell
from tests.simulation.many import Outcome, run_many
from tests.simulation.mutants import MUTANTS, noticed

_MOST_TOLD = 3


def main() -> int:
    """Run the command; the exit code is 1 when an invariant was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many histories (default: %(default)s)")
    parser.add_argument(
        "--from",
        type=int,
        default=0,
        dest="first",
        help="the first seed (default: %(default)s); -1 draws one",
    )
    parser.add_argument("--seed", type=int, help="tell this one history step by step")
    parser.add_argument(
        "--mutants",
        action="store_true",
        help="break the protocol in each known way, and say which history notices it",
    )
    asked = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    if asked.seed is not None:
        lines = tell(asked.seed)
        console.print("\n".join(lines), markup=False)
        return int(lines[-1].startswith("VIOLATION"))
    if asked.mutants:
        return show_mutants(console)
    first = secrets.randbelow(2**48) if asked.first < 0 else asked.first
    columns = (
        TextColumn("Histories"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("histories", total=asked.seeds)
        outcome = run_many(
            range(first, first + asked.seeds), progress=lambda count: progress.advance(task, count)
        )
    show(outcome, first, asked.seeds, console)
    return int(bool(outcome.violations))


def show_mutants(console: Console) -> int:
    """Print for each mutant how many histories it took, and what the last of them says; the exit code is 1 when one got through."""
    alive = 0
    for mutant in MUTANTS:
        histories, sentence = noticed(mutant)
        if sentence is None and not mutant.harmless:
            alive += 1
        console.print(
            f"{histories:5}  {mutant.name}: {sentence or mutant.harmless or 'NOT NOTICED'}", markup=False
        )
    return int(alive > 0)


def show(outcome: Outcome, first: int, seeds: int, console: Console) -> None:
    """Print what the histories came to; the first that broke an invariant are told step by step."""
    counts = outcome.counts
    console.print(
        f"{seeds:,} histories (seeds {first} to {first + seeds - 1}) in {outcome.seconds:.1f} s: {seeds / outcome.seconds:,.0f} a second"
    )
    console.print(
        f"  {counts.refunds:,} refunds approved, {counts.runs:,} runs, {counts.steps:,} steps, {counts.posts:,} POSTs"
    )
    console.print(
        f"  {counts.posts_beside:,} POSTs, in {counts.with_lists:,} histories, went out while another of their list was under way"
    )
    console.print(
        f"  {counts.paid:,} refunds exist at Payroc, {counts.asked_people:,} wait for people at the end, {counts.decisions:,} were decided"
    )
    console.print(
        f"  {counts.deaths:,} processes killed, {counts.freezes:,} stood still, {counts.failures:,} calls of a database or network failed"
    )
    for title, found in (("what Payroc did to POSTs", counts.faults), ("what else happened", counts.events)):
        console.print(
            f"  {title}: " + ", ".join(f"{count:,} {name}" for name, count in sorted(found.items()))
        )
    for seed, _ in outcome.violations[:_MOST_TOLD]:
        console.print(f"\nSeed {seed}:", style="red")
        console.print("\n".join(tell(seed)), markup=False)
        console.print(f"Tell it again: python -m tests.simulation --seed {seed}")
    if outcome.violations:
        console.print(f"\n{len(outcome.violations)} histories broke an invariant.", style="red")
    else:
        console.print("No refund was paid twice, none was lost, and no other invariant was broken.")


if __name__ == "__main__":
    sys.exit(main())
