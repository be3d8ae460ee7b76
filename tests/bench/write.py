"""``contrib/bench write``: the speed of writes through the tap, beside peers. Run as ``python -m tests.bench.write``.

The peers are exports of QEMU's storage daemon over FUSE: of a raw file, and of one whose writes ``blklogwrites`` logs,
which keeps the same history. The raw file itself is told. fio writes each workload to all of them in turns, in rounds,
each of which begins with new files; before each turn the disk is synced, so that nobody's writeback is paid by another.
What is compared are the medians of the ratios within rounds. Every round ends with the comparison, byte by byte, of the
newest image with what dmafs has made of its primary.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final, NamedTuple

from tests.bench.report import Result, add_options, at_least, machine, progress, show, spread, told
from tests.mount.harness import MIB, Rig, assert_same, run
from tests.mount.qemu import Qemu

DMAFS: Final = "dmafs"
QEMU: Final = "QEMU, raw"
LOGGED: Final = "QEMU, blklogwrites"
RAW: Final = "the file itself"


class Workload(NamedTuple):
    """What fio does, and what is to be reached beside ``blklogwrites``."""

    name: str
    unit: str
    goal: float
    options: tuple[str, ...]
    timed: bool = True


_RANDOM: Final = ("--rw=randwrite", "--bs=4k", "--norandommap", "--randrepeat=0")
WORKLOADS: Final = (
    Workload("1 MiB sequential", "MiB/s", 1.0, ("--rw=write", "--bs=1M"), timed=False),
    Workload("4 KiB random", "writes/s", 0.8, _RANDOM),
    Workload("4 KiB random, fdatasync after each", "writes/s", 1.0, (*_RANDOM, "--fdatasync=1")),
    Workload("the same by 32 at once", "writes/s", 2.0, (*_RANDOM, "--fdatasync=1", "--numjobs=32", "--thread")),
)


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything."""

    disk_bytes: int
    written_bytes: int
    """By the sequential workload."""
    seconds: float
    """For each of the others."""
    rounds: int


FULL = Sizes(disk_bytes=256 * MIB, written_bytes=1024 * MIB, seconds=4, rounds=5)
QUICK = Sizes(disk_bytes=32 * MIB, written_bytes=128 * MIB, seconds=0.5, rounds=1)


def fio(file: Path, workload: Workload, sizes: Sizes) -> float:
    """Write to a file; return MiB/s or writes/s."""
    amount = (
        ("--time_based", f"--runtime={int(sizes.seconds * 1000)}ms")
        if workload.timed
        else (f"--io_size={sizes.written_bytes}",)
    )
    done = run(
        *("fio", "--name=write", f"--filename={file}", "--ioengine=psync", "--direct=0", f"--size={sizes.disk_bytes}"),
        *("--allow_file_create=0", "--fallocate=none", "--group_reporting", "--output-format=json"),
        *(*workload.options, *amount),
        seconds=sizes.seconds + 300,
    )
    write = json.loads(done.stdout)["jobs"][0]["write"]
    return float(write["iops"]) if workload.timed else write["bw_bytes"] / MIB


def new_disk(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@contextmanager
def contestants(scratch: Path, sizes: Sizes) -> Iterator[tuple[dict[str, Path], Rig]]:
    """Yield what is written to, by name, and the rig that dmafs is in: all new, and taken away afterwards."""
    content = os.urandom(sizes.disk_bytes)
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(dir=scratch))
        stack.callback(shutil.rmtree, folder)
        rig = stack.enter_context(Rig())
        rig.create(size=sizes.disk_bytes, content=content)
        rig.configure("")
        plain = Qemu(new_disk(folder / "plain", content), None, folder / "plain.export")
        logged = Qemu(new_disk(folder / "logged", content), folder / "log", folder / "logged.export")
        raw = new_disk(folder / "raw", content)
        os.sync()
        for qemu in (plain, logged):
            stack.enter_context(qemu)
        rig.start(seconds=3600)
        yield {DMAFS: rig.tap(), QEMU: plain.disk, LOGGED: logged.disk, RAW: raw}, rig
        rig.stop()


def measure(scratch: Path, sizes: Sizes) -> Iterator[Result]:
    """Measure all workloads in rounds."""
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(sizes.rounds):
        progress(f"round {number + 1} of {sizes.rounds}")
        with contestants(scratch, sizes) as (files, rig):
            names = list(files)
            for turn, workload in enumerate(WORKLOADS, number):
                for step in range(len(names)):
                    name = names[(turn + step) % len(names)]
                    os.sync()
                    found.setdefault((workload.name, name), []).append(fio(files[name], workload, sizes))
            run("sync", "--data", rig.tap())
            assert_same(rig.live(), rig.primary())
    for workload in WORKLOADS:
        values = {name: found[workload.name, name] for name in names}
        for name in names:
            yield told(f"{workload.name}: {name}", median(values[name]), workload.unit, **spread(values[name]))
        for peer, goal in ((LOGGED, workload.goal), (QEMU, None)):
            ratios = [one / other for one, other in zip(values[DMAFS], values[peer], strict=True)]
            label = f"{workload.name}: {DMAFS} / {peer}"
            if goal is None:
                yield told(label, median(ratios), "ratio", rounds=ratios)
            else:
                yield at_least(label, median(ratios), "ratio", goal, rounds=ratios)


def version(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="contrib/bench write", description="Measure writes beside those of peers.")
    add_options(parser)
    options = parser.parse_args()
    begun = perf_counter()
    place = os.environ.setdefault("TMPDIR", "/var/tmp")  # noqa: S108
    with tempfile.TemporaryDirectory(prefix="dmafs-bench.", dir=place) as name:
        described = machine(Path(name))
        described |= {"qemu": version("qemu-storage-daemon", "--version"), "fio": version("fio", "--version")}
        report = {"machine": described, "quick": options.quick}
        results = list(measure(Path(name), QUICK if options.quick else FULL))
    show(report, results, begun, as_json=options.json)


if __name__ == "__main__":
    main()
