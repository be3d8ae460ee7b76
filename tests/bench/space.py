"""``contrib/bench space``: what history takes on disk and in memory, and how soon it can be had.

The same history as ``read``'s. Bytes on disk are those that files take, holes left out. What a sync has to save is what
the snapshots' images differ in by the maps (``dmafs diff``), less what had no data before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

from dmafs.client import connect
from dmafs.core.ondisk import HEADER_SIZE, Flag, Header, decode_records
from dmafs.units import SECTOR
from tests.bench import chains, history
from tests.bench.cache import settle
from tests.bench.chains import Chains, image
from tests.bench.history import VOLUME, History
from tests.bench.report import Result, at_most, machine, progress, show, spread, timed, told
from tests.bench.system import DMAFS, process, wait_until

SAVED_GOAL: Final = 1.02
DESCRIPTORS_GOAL: Final = 0.03
START_GOAL_S: Final = 1.0
MEMORY_GOAL_MIB: Final = 120.0
FULL_ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2

_POLL_S: Final = 0.002
_SETTLED_S: Final = 0.5
_SETTLED_TICKS: Final = 2
"""Of the processor's time, in so many seconds: what a daemon needs that only waits."""


def space(made: History, others: Chains) -> Iterator[Result]:
    """Count bytes on disk."""
    progress("counting bytes")
    backward, forward = (made.store / VOLUME / name for name in ("backward", "forward"))
    names = [name for name, _ in made.snapshots]
    with connect(made.store) as asked:
        written = sum(asked.diff(VOLUME, a, b)["bytes"] for a, b in pairwise([*names, f"seq:{made.mirror_seq}"]))
    overwritten = written - sum(_empty_bytes(path) for path in backward.glob("*.ext"))
    saved, described = allocated(backward.glob("*.dat")), allocated(backward.glob("*.ext"))
    details = {"overwritten_bytes": overwritten, "written_bytes": written, "saved_bytes": saved}
    yield at_most("backward journal: data / what syncs overwrote", saved / overwritten, "ratio", SAVED_GOAL, **details)
    yield told("backward journal: data", saved / (1 << 20), "MiB")
    yield told("backward journal: descriptors", described / (1 << 20), "MiB")
    data, descriptors = allocated(forward.glob("*.dat")), allocated(forward.glob("*.ext"))
    yield at_most(
        "forward journal: descriptors / data, events of 4 KiB",
        descriptors / data,
        "ratio",
        DESCRIPTORS_GOAL,
        descriptor_bytes=descriptors,
        data_bytes=data,
    )
    overlays = allocated(others.overlay(number) for number in range(1, others.count + 1))
    yield told("qcow2 overlays with the history of the backward journal", overlays / (1 << 20), "MiB")
    yield told("backward journal / qcow2 overlays", (saved + described) / overlays, "ratio")


def allocated(paths: Iterable[Path]) -> int:
    """Return what files take, in bytes."""
    return sum(path.stat().st_blocks * 512 for path in paths)


def _empty_bytes(path: Path) -> int:
    """Return how much a snapshot has of what had no data."""
    content = path.read_bytes()
    header = Header.decode(content[:HEADER_SIZE], str(path))
    records = decode_records(content[HEADER_SIZE:], header.salt, next_seq=1)
    return int(records["length"][records["flags"] == int(Flag.ZERO)].sum()) * SECTOR


def starts(made: History, rounds: int) -> Iterator[Result]:
    """Start the daemon, look at old images, and see what memory it has once it only waits."""
    seconds: list[float] = []
    oldest_s: list[float] = []
    idle_mib: list[float] = []
    memory_mib: list[float] = []
    mnt = made.folder / "mnt"
    mnt.mkdir(exist_ok=True)
    for turn in range(rounds):
        progress(f"starting a daemon, round {turn + 1} of {rounds}")
        settle(path for path in (made.store / VOLUME).rglob("*") if path.is_file())
        begun = perf_counter()
        with process(*DMAFS, "serve", made.store, mnt, log=made.folder / "mnt.log") as daemon:
            live = mnt / "live" / f"{VOLUME}.img"
            wait_until(live.exists, "the daemon's tree", every=_POLL_S)
            seconds.append(perf_counter() - begun)
            oldest_s.append(timed(lambda: _look_at(mnt, made.snapshots[0][0]))[0])
            idle_mib.append(_settled_mib(daemon.pid))
            for name in (f"seq:{made.backward[1]}", f"seq:{made.forward_seq}"):
                _look_at(mnt, name)
            memory_mib.append(_settled_mib(daemon.pid))
    yield at_most(
        "daemon: start to the first answer of its tree", median(seconds), "s", START_GOAL_S, **spread(seconds)
    )
    yield told("daemon: the oldest image opened right then", median(oldest_s), "s", **spread(oldest_s))
    yield told("daemon: memory with the oldest image", median(idle_mib), "MiB", **spread(idle_mib))
    name = "daemon: memory with an image of each journal too"
    yield at_most(name, median(memory_mib), "MiB", MEMORY_GOAL_MIB, **spread(memory_mib))


def _look_at(mnt: Path, name: str) -> None:
    with image(mnt, name).open("rb", buffering=0) as file:
        file.read(1)


def _settled_mib(pid: int) -> float:
    """Return a process' resident memory once it does nothing but wait."""

    def is_waiting() -> bool:
        before = _ticks(pid)
        time.sleep(_SETTLED_S)
        return _ticks(pid) - before <= _SETTLED_TICKS

    wait_until(is_waiting, f"process {pid} to settle")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def _ticks(pid: int) -> int:
    """Return how much of the processor's time a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="contrib/bench space", description="Measure space, memory and starts.")
    history.add_options(parser)
    options = parser.parse_args()
    begun = perf_counter()
    with history.prepared(options.fixture, history.QUICK if options.quick else history.FULL) as made:
        report = {"machine": machine(made.folder), "quick": options.quick}
        others = chains.prepared(made)
        results = [*space(made, others), *starts(made, QUICK_ROUNDS if options.quick else FULL_ROUNDS)]
    show(report, results, begun, as_json=options.json)


if __name__ == "__main__":
    main()
