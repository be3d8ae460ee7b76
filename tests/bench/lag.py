"""The part of ``contrib/bench capture`` that runs in a guest: ``python -m tests.bench.lag SECONDS``; prints JSON.

A volume with the dm tap, a daemon, fio on its mapped device; and a clock: a process writes the time into a sector past
what fio writes, directly, and reads it in the live image. What it finds there is older than now by the lag.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Final

TICK_S: Final = 1.0
EVERY_S: Final = 0.05
DISK_MIB: Final = 256
CLOCK_OFFSET: Final = (DISK_MIB - 1) << 20
WAIT_S: Final = 60
STORE: Final = Path("/var/tmp/store")  # noqa: S108 - a disk of the guest's own
MOUNT: Final = Path("/mnt/dmafs")
DMAFS: Final = Path(sys.executable).with_name("dmafs")
DEVICE: Final = "/dev/mapper/dmafs-disk"


def run(*command: str | Path) -> str:
    """Run a command and return its output."""
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def protect() -> subprocess.Popen[bytes]:
    """Make a volume on a loop device, and start its daemon; return that once the volume is protected."""
    primary = Path("/var/tmp/primary.img")  # noqa: S108 - likewise
    primary.touch()
    os.truncate(primary, DISK_MIB << 20)
    source = run("losetup", "--find", "--show", primary).strip()
    run(DMAFS, "create", STORE, "--source", source, "--tap", "dm")
    MOUNT.mkdir()
    daemon = subprocess.Popen([DMAFS, "serve", STORE, MOUNT])
    deadline = time.monotonic() + WAIT_S
    while "protected" not in run(DMAFS, "status", STORE):
        if time.monotonic() > deadline:
            sys.exit("the volume isn't protected in time")
        time.sleep(0.2)
    return daemon


def sample(seconds: int) -> list[float]:
    """Write clocks and read them in the live image; return the lags found."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    target = os.open(DEVICE, os.O_WRONLY | os.O_DIRECT)
    live = os.open(MOUNT / "live" / "disk.img", os.O_RDONLY | os.O_DIRECT)
    found, end = [], time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            page[:8] = struct.pack("<d", time.time())
            os.pwrite(target, page, CLOCK_OFFSET)
            there = mmap.mmap(-1, mmap.PAGESIZE)
            os.preadv(live, [there], CLOCK_OFFSET)
            (seen,) = struct.unpack("<d", there[:8])
            if seen:
                found.append(time.time() - seen)
            time.sleep(EVERY_S)
    finally:
        os.close(target)
        os.close(live)
    return found


def main() -> None:
    """Measure."""
    seconds = int(sys.argv[1])
    daemon = protect()
    fio = subprocess.Popen(
        ["fio", "--name=load", f"--filename={DEVICE}", "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=psync",
         f"--size={DISK_MIB - 2}m", "--time_based", f"--runtime={seconds}", "--output-format=json"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    lags = sample(seconds)
    output, _ = fio.communicate()
    job = json.loads(output)["jobs"][0]["write"]
    time.sleep(2 * TICK_S)
    run(DMAFS, "verify", STORE)
    daemon.terminate()
    daemon.wait()
    run(DMAFS, "tap", "detach", STORE)
    print(
        json.dumps(
            {
                "median_s": median(lags),
                "greatest_s": max(lags),
                "samples": len(lags),
                "tick_s": TICK_S,
                "writes_per_s": job["iops"],
                "writes": job["total_ios"],
            }
        )
    )


if __name__ == "__main__":
    main()
