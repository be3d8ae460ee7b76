"""``contrib/bench capture``: how fast a log is consumed, and how far behind capture is.

The rate is that of ``capture`` with everything it does (checksums, descriptors, both queues of the journal, the live
image's map), beside a plain reader of the same log that parses it and copies its data to another file, in turns. The
lag is measured in a guest with device-mapper: fio writes 4 KiB at full speed to the mapped device, beside it a clock is
written there every some milliseconds, and read again in the live image.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

import numpy as np
import trio

from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.volume import Volume
from dmafs.service.driver import Driver
from dmafs.taps.capture import Log, LoggedTap, Scanned
from dmafs.taps.dm import drain
from dmafs.taps.logformat import Entry, LogFlag, Super
from dmafs.taps.logreader import LogReader
from dmafs.units import SECTOR
from tests.bench.report import Result, add_options, at_least, at_most, machine, progress, show, told

DISK_SECTORS: Final = 1 << 21
BLOCK_SECTORS: Final = 8
FLUSH_EVERY: Final = 100
"""Writes between two flushes, as a busy file system has them."""
ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything."""

    writes: int
    rounds: int
    seconds: int


FULL = Sizes(writes=200_000, rounds=5, seconds=30)
QUICK = Sizes(writes=20_000, rounds=2, seconds=5)


class RecordedTap(LoggedTap):
    """A tap with one log, all of which is there."""

    def __init__(self, path: Path, primary: Path, size_sectors: int) -> None:
        """Read the log in *path* from its beginning."""
        super().__init__(open_source(primary, writable=False), size_sectors)
        file = RealFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path))
        self._log = Log(file, 0, LogReader(file, size_sectors=size_sectors))

    def begin(self, position: int, retained: int) -> None:
        """See ``LoggedTap``."""

    def scan(self) -> Scanned | None:
        """See ``LoggedTap``."""
        window = self._log.reader.scan()
        return None if window is None else Scanned(self._log, window)

    def check(self) -> None:
        """See ``LoggedTap``."""

    def restart(self) -> int:
        """See ``LoggedTap``."""
        raise AssertionError("a recorded log isn't lost")

    def release(self, place: int) -> None:
        """See ``LoggedTap``."""

    def close(self) -> None:
        """See ``LoggedTap``."""
        self._log.file.close()
        self.primary.close()


def write_log(path: Path, writes: int) -> None:
    """Write a log of random 4 KiB writes and flushes."""
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, DISK_SECTORS // BLOCK_SECTORS, writes).tolist()
    data = generator.bytes(1 << 20)
    size = BLOCK_SECTORS * SECTOR
    with path.open("wb") as file:
        file.write(Super(writes + writes // FLUSH_EVERY).encode())
        for number, block in enumerate(blocks):
            at = number * 512 % ((1 << 20) - size)
            file.write(Entry(block * BLOCK_SECTORS, BLOCK_SECTORS, 0, size).encode().ljust(SECTOR, b"\0"))
            file.write(data[at : at + size])
            if (number + 1) % FLUSH_EVERY == 0:
                file.write(Entry(0, 0, int(LogFlag.FLUSH)).encode().ljust(SECTOR, b"\0"))


def plain_reader(log: Path, copy: Path) -> int:
    """Parse a log and copy its data to a file, as simply as can be; return the number of entries."""
    header, count = struct.Struct("<QQQQ"), 0
    source, target = os.open(log, os.O_RDONLY), os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        *_, entries, sector = struct.unpack("<QQQI", os.pread(source, 28, 0))
        at = sector
        while count < entries:
            _, sectors, flags, _ = header.unpack(os.pread(source, 32, at))
            at += sector
            if not flags & (LogFlag.DISCARD | LogFlag.MARK) and sectors:
                os.write(target, os.pread(source, sectors * sector, at))
                at += sectors * sector
            count += 1
    finally:
        os.close(source)
        os.close(target)
    return count


def captured(scratch: Path, log: Path, writes: int) -> float:
    """Return the seconds that capturing a log takes."""
    path, primary = scratch / "volume", scratch / "primary"
    path.mkdir()
    primary.touch()
    os.truncate(primary, DISK_SECTORS * SECTOR)
    Volume.create(RealStorage(path), name="disk", size_sectors=DISK_SECTORS, source=primary, tap="log", created_ns=1)
    volume = Volume(RealStorage(path))
    tap = RecordedTap(log, primary, DISK_SECTORS)
    begun = perf_counter()
    trio.run(_drained, volume, tap)
    seconds = perf_counter() - begun
    assert volume.journal.head == writes
    tap.close()
    volume.close()
    shutil.rmtree(path)
    return seconds


async def _drained(volume: Volume, tap: LoggedTap) -> None:
    """Drive capture as the daemon does: what may block runs in threads."""
    await Driver(trio.CapacityLimiter(8)).drive(drain(volume, tap))


def rates(scratch: Path, sizes: Sizes) -> Iterator[Result]:
    """Consume one log in turns, plainly and wholly."""
    progress(f"consuming a log of {sizes.writes} writes")
    log = scratch / "log"
    write_log(log, sizes.writes)
    plain, ours = [], []
    for _ in range(sizes.rounds):
        begun = perf_counter()
        entries = plain_reader(log, scratch / "copy")
        plain.append(entries / (perf_counter() - begun))
        (scratch / "copy").unlink()
        ours.append(entries / captured(scratch, log, sizes.writes))
    yield told("plain reader of a log: parse, copy the data", median(plain), "entries/s", rounds=plain)
    yield told("capture of the same log into a journal", median(ours), "entries/s", rounds=ours)
    ratios = [one / other for one, other in zip(ours, plain, strict=True)]
    yield at_least("capture / plain reader", median(ratios), "ratio", 0.5, rounds=ratios)


def lags(sizes: Sizes) -> Iterator[Result]:
    """Measure the lag in a guest."""
    progress(f"writing for {sizes.seconds} s in a guest with device-mapper")
    command = [sys.executable, "-m", "tests.bench.lag", str(sizes.seconds)]
    done = subprocess.run(
        [ROOT / "contrib" / "uml" / "run", "--memory", "1536", "--seconds", str(sizes.seconds + 120), "--", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"bench: the guest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    yield told("4 KiB writes of fio meanwhile", found["writes_per_s"], "writes/s")
    yield told("lag of capture, median", found["median_s"], "s", tick_s=found["tick_s"], samples=found["samples"])
    yield at_most("lag of capture, greatest, in ticks", found["greatest_s"] / found["tick_s"], "ticks", 2, **found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="contrib/bench capture", description="Measure capture beside its goals.")
    add_options(parser)
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    begun = perf_counter()
    with tempfile.TemporaryDirectory(prefix="dmafs-bench.", dir=os.environ.get("TMPDIR", "/var/tmp")) as name:  # noqa: S108
        report = {"machine": machine(Path(name)), "quick": options.quick}
        results = [*rates(Path(name), sizes), *lags(sizes)]
    show(report, results, begun, as_json=options.json)


if __name__ == "__main__":
    main()
