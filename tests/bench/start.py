"""``contrib/bench start``: how long a command takes before it does anything, beside the bare interpreter.

``dmafs status``, with and without a daemon, and ``python -c pass``, in turns; each is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

from tests.bench.report import Result, at_most, machine, progress, show, spread, timed, told
from tests.bench.system import DMAFS, ROOT, dmafs, served

GOAL_MS: Final = 150.0
SIZE: Final = 16 << 20
FULL_ROUNDS: Final = 20
QUICK_ROUNDS: Final = 5

_BARE: Final = (sys.executable, "-c", "pass")


def starts(folder: Path, rounds: int) -> Iterator[Result]:
    """Measure, first without a daemon."""
    source, store = folder / "disk.raw", folder / "store"
    with source.open("wb") as file:
        file.truncate(SIZE)
    dmafs("create", "--source", source, store)
    with served(store, folder / "mnt"):
        pass  # the initial copy is made
    yield from _compared("without a daemon", store, rounds)
    with served(store, folder / "mnt"):
        yield from _compared("with a daemon", store, rounds)


def _compared(how: str, store: Path, rounds: int) -> Iterator[Result]:
    progress(f"dmafs status {how}")
    bare, status = [], []
    for _ in range(rounds):
        bare.append(_milliseconds(*_BARE))
        status.append(_milliseconds(*DMAFS, "status", str(store)))
    yield told(f"python -c pass, before status {how}", median(bare), "ms", **spread(bare))
    yield told(f"dmafs status {how}", median(status), "ms", **spread(status))
    yield told(f"dmafs status {how} / python -c pass", median(status) / median(bare), "times")
    yield at_most(f"dmafs status {how} - python -c pass", median(status) - median(bare), "ms", GOAL_MS)


def _milliseconds(*command: str) -> float:
    def run() -> None:
        subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)

    return timed(run)[0] * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="contrib/bench start", description="Measure how soon a command is there.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args()
    begun = perf_counter()
    with tempfile.TemporaryDirectory(prefix="dmafs-bench.", dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:  # noqa: S108
        report = {"machine": machine(Path(folder)), "quick": options.quick}
        results = list(starts(Path(folder), QUICK_ROUNDS if options.quick else FULL_ROUNDS))
    show(report, results, begun, as_json=options.json)


if __name__ == "__main__":
    main()
