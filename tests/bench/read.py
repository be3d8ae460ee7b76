"""``contrib/bench read``: how fast past moments are read, beside other ways to have them.

The image in the middle of the backward journal and the one in the middle of the forward journal are read by ordinary
programs. The same bytes are read from a raw file, from that file and from a chain of qcow2 overlays with the same
history behind QEMU's storage daemon (FUSE, as dmafs), and, the former image, from borg's archive of it. All are
compared before anything is timed, then they take turns.

Each reading but ``dd again`` and ``dd by its other name`` is of a cold image: no loop device has it and next to nothing
of it is in the page cache, which is looked at each time; all files that it is made from are in there. The raw file is
made from nothing but itself, so it is in the page cache always: what is set in relation to it is compared with
memory. ``tar`` and ``find`` read a read-only mount on a buffered loop device, all others the image file.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Final

from tests.bench import chains, history, peers
from tests.bench.chains import Chains
from tests.bench.history import History
from tests.bench.peers import BORG, CHAIN, DMAFS, EXPORT, RAW
from tests.bench.readings import READINGS, tar
from tests.bench.report import AT_LEAST, AT_MOST, Result, machine, progress, show, told
from tests.bench.system import run

MOMENTS: Final = ("backward", "forward")
FULL_ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2
AGAIN: Final = "dd again"

Rounds = dict[tuple[str, str], list[float]]
"""Samples by what was measured and peer."""


@dataclass(frozen=True)
class Goal:
    """What dmafs is compared with, in one measure of its own and one of a peer's."""

    measure: str
    peer: str
    sense: str | None = None
    goal: float | None = None
    of: str | None = None
    """The peer's measure, if it isn't the same one."""


GOALS: Final = (
    Goal("tar", CHAIN, AT_MOST, 0.6),
    Goal("tar", RAW, AT_MOST, 1.3),
    Goal("tar", EXPORT),
    Goal("tar", BORG),
    Goal("find", CHAIN, AT_MOST, 1.0),
    Goal("find", EXPORT),
    Goal("find", BORG),
    Goal("e2fsck", CHAIN, AT_MOST, 1.0),
    Goal("e2fsck", EXPORT),
    Goal("e2fsck", BORG),
    Goal("dd", CHAIN, AT_LEAST, 1.5),
    Goal("dd", EXPORT),
    Goal("dd", BORG),
    Goal(AGAIN, RAW, AT_LEAST, 0.9),
    Goal("dd by its other name", RAW, AT_LEAST, 0.9, of=AGAIN),
    Goal("fio, 1 jobs", CHAIN, AT_LEAST, 1.0),
    Goal("fio, 1 jobs", EXPORT),
    Goal("fio, 1 jobs", BORG),
    Goal("fio, 8 jobs", CHAIN, AT_LEAST, 0.8),
    Goal("fio, 8 jobs", EXPORT),
    Goal("fio, 8 jobs", BORG),
)
UNITS: Final = {"tar": "s", "find": "s", "e2fsck": "s", "dd": "MiB/s", "fio": "reads/s"}


def measure(made: History, others: Chains, moment: str, only: list[str], rounds: int) -> Iterator[Result]:
    """Compare all that show one moment, and read from each in turn."""
    folder = made.folder / "past"
    with contextlib.ExitStack() as stack:
        shown = [
            peers.raw(others, moment),
            stack.enter_context(peers.export(others, moment)),
            stack.enter_context(peers.chain(others, moment)),
        ]
        slow = [stack.enter_context(peers.borg(others))] if moment == "backward" else []
        progress(f"{moment}: comparing all images")
        with peers.dmafs(made, moment) as seen:
            peers.require_equal([*shown, *slow, seen])
        own = stack.enter_context(peers.dmafs(made, moment))
        if "tar" in only:
            first = tar(own, folder, 0)["tar"]
            yield told(f"{moment}: tar, dmafs, first reading of a fresh daemon", first, "s")
        samples: Rounds = defaultdict(list)
        for turn in range(rounds):
            # borg takes its time, so it has one round only.
            taking = [*shown, own, *(slow if turn == 0 else [])]
            for name in only:
                progress(f"{moment}: {name}, round {turn + 1} of {rounds}")
                for place in range(len(taking)):  # each comes first, second ... in turn
                    peer = taking[(place + turn) % len(taking)]
                    for measured, value in READINGS[name](peer, folder, turn + 1).items():
                        samples[measured, peer.name].append(value)
    yield from judged(moment, samples)


def judged(moment: str, samples: Rounds) -> Iterator[Result]:
    """Tell all medians, then the ratios of dmafs' to its peers'."""
    for (name, peer), values in samples.items():
        yield told(f"{moment}: {name}, {peer}", median(values), UNITS[name.split()[0].rstrip(",")], rounds=values)
    for goal in GOALS:
        own, others = samples.get((goal.measure, DMAFS)), samples.get((goal.of or goal.measure, goal.peer))
        if own and others:
            name = f"{moment}: {goal.measure}, dmafs / {goal.peer}"
            yield Result(name, median(own) / median(others), "ratio", goal.sense, goal.goal)


def versions() -> dict[str, str]:
    """Return the versions of the programs that are compared, and of those that read."""
    commands = {"qemu": "qemu-storage-daemon --version", "borg": "borg --version", "fio": "fio --version"}
    return {name: run(*command.split()).splitlines()[0] for name, command in commands.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="contrib/bench read", description="Measure reading beside other programs.")
    history.add_options(parser)
    parser.add_argument("--only", metavar="LIST", default=",".join(READINGS), help="which of %(default)s")
    parser.add_argument("--rounds", metavar="N", type=int, help=f"how often (default {FULL_ROUNDS})")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(READINGS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are: {', '.join(READINGS)}")
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else FULL_ROUNDS)
    begun = perf_counter()
    with history.prepared(options.fixture, history.QUICK if options.quick else history.FULL) as made:
        report = {"machine": {**machine(made.folder), **versions()}, "quick": options.quick, "rounds": rounds}
        others = chains.prepared(made)
        results = [result for moment in MOMENTS for result in measure(made, others, moment, only, rounds)]
    show(report, results, begun, as_json=options.json)


if __name__ == "__main__":
    main()
