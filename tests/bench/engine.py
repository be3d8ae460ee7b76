"""``contrib/bench engine``: the core's speed and memory, beside the goals. Run as ``python -m tests.bench.engine``.

Everything is measured in one run, on stores made for it in a scratch folder. What is compared is measured in turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from tests.bench.maps import lookups, net_changes, openings_in_journal, openings_of_snapshots
from tests.bench.report import Result, add_options, machine, progress, show
from tests.bench.stores import allow_open_files, with_events, with_snapshots
from tests.bench.syncs import syncs


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything."""

    events: int
    snapshots: int
    lookups: int
    synced: int
    stores: tuple[int, ...]
    rounds: int


FULL = Sizes(events=1_000_000, snapshots=1_000, lookups=100_000, synced=100_000, stores=(10, 1_000, 10_000), rounds=5)
QUICK = Sizes(events=100_000, snapshots=100, lookups=10_000, synced=10_000, stores=(1, 100, 1_000), rounds=2)


def measure(scratch: Path, sizes: Sizes) -> Iterator[Result]:
    """Make stores and measure them, one kind after the other."""
    yield from net_changes(sizes.events, sizes.rounds)
    progress(f"making a store with {sizes.events} events")
    path = scratch / "events"
    starts = with_events(path, sizes.events)
    yield from openings_in_journal(path, starts, sizes.rounds)
    yield from lookups(path, sizes.lookups)
    progress(f"making a store with {sizes.snapshots} snapshots")
    path = scratch / "snapshots"
    starts = with_snapshots(path, sizes.snapshots, sizes.events)
    yield from openings_of_snapshots(path, starts, sizes.rounds)
    yield from syncs(scratch, sizes.synced, sizes.stores, sizes.rounds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="contrib/bench engine", description="Measure the core beside its goals.")
    add_options(parser)
    options = parser.parse_args()
    allow_open_files()
    begun = perf_counter()
    with tempfile.TemporaryDirectory(prefix="dmafs-bench.", dir=os.environ.get("TMPDIR", "/var/tmp")) as name:  # noqa: S108
        report = {"machine": machine(Path(name)), "quick": options.quick}
        results = list(measure(Path(name), QUICK if options.quick else FULL))
    show(report, results, begun, as_json=options.json)


if __name__ == "__main__":
    main()
