"""A store that really runs full: what becomes of writes, by ``when_full``, and what is there when it has space again.

The store is on a small file system, most of which somebody else has taken; a snapshot that has a name keeps the old
content, which no sync or drop can make room for.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path
from typing import Final

import pytest

from dmafs.cli.output import both
from dmafs.client import connect
from tests.mount.harness import MIB, REDONE, Rig, assert_same, fails, moment, opened, pread, pwrite, wait_until

pytestmark = pytest.mark.mount

SIZE: Final = 32 * MIB
BLOCK: Final = 256 << 10
RUNS_FULL: Final = r"runs full, .* free: "
GAP: Final = r"volume disk: a gap has begun: store of volume disk is full"
GAP_ENDS: Final = r"gap ended, .* of the source differed"
OPEN_GAP: Final = r"a gap is open"


class Disk:
    """What the disk has to be, by the writes that were acknowledged."""

    def __init__(self, rig: Rig, when_full: str) -> None:
        """Protect a disk in a store whose file system has 8 MiB left beside the reserve of 16."""
        self.rig = rig
        self.rng = random.Random(5)
        self.expected = bytearray(self.rng.randbytes(SIZE))
        self.place = rig.put_store_on_disk(128 * MIB)
        rig.create(size=SIZE, content=bytes(self.expected))
        rig.configure(f'segment_size = "1MiB"\nreserve = "16MiB"\ntick_s = 0.2\nwhen_full = "{when_full}"\n')
        rig.start()
        (rig.mnt / "snapshots" / "old").mkdir()
        self.old = bytes(self.expected)
        self.filler = self.place / "filler"
        info = os.statvfs(self.place)
        with self.filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, info.f_bavail * info.f_frsize - 24 * MIB)

    def write(self, fd: int) -> None:
        """Write somewhere, and flush; only what is acknowledged is expected."""
        data, offset = self.rng.randbytes(BLOCK), self.rng.randrange(SIZE // BLOCK) * BLOCK
        os.pwrite(fd, data, offset)
        self.expected[offset : offset + BLOCK] = data
        os.fsync(fd)

    def assert_there(self) -> None:
        """Assert that the primary has all that was acknowledged, and nothing else, and the old image what it had."""
        assert self.rig.primary().read_bytes() == self.expected
        assert pread(self.rig.tap(), MIB, MIB) == self.expected[MIB : 2 * MIB]
        assert self.rig.snapshot("old").read_bytes() == self.old

    def assert_exact(self) -> None:
        """Assert that the newest image is the primary: by a verify, and by its bytes."""
        self.rig.dmafs("verify", self.rig.store)
        assert_same(self.rig.primary(), self.rig.live())
        self.assert_there()

    def end(self) -> None:
        self.rig.stop()
        self.rig.umount(self.place)


def test_refused_writes_reach_nothing_and_go_on_by_themselves(rig: Rig) -> None:
    """Refuse: ENOSPC for the writer, nothing of it on the primary, all reads go on; with space writing goes on."""
    rig.allow(RUNS_FULL, "write_tap: store of volume disk is full", "write: store of volume disk is full")
    disk = Disk(rig, "refuse")
    with opened(rig.tap(), os.O_WRONLY) as fd:
        for _ in range(1000):
            try:
                disk.write(fd)
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017 - how many go before doesn't matter
                break
        else:
            raise AssertionError("never refused")
        for _ in range(3):
            fails(errno.ENOSPC, disk.write, fd)
        disk.assert_there()
        assert_same(rig.primary(), rig.live())
        status = rig.status()
        assert (status["state"], status["gaps"], status["loss"]) == ("protected", [], "")
        written = threading.Event()

        def go_on() -> None:
            while not written.is_set():
                try:
                    disk.write(fd)
                    written.set()
                except OSError as error:
                    assert error.errno == errno.ENOSPC  # noqa: PT017 - until it is taken

        writer = threading.Thread(target=go_on, daemon=True)
        writer.start()
        disk.filler.unlink()
        writer.join(30)
        assert written.is_set(), "writing goes on by itself"
        disk.write(fd)
    disk.assert_exact()
    assert rig.status()["gaps"] == []
    disk.end()


def write_into_gap(disk: Disk) -> str:
    """Write until a gap has begun, and then some; return a time within it. No write may fail."""
    rig = disk.rig
    with opened(rig.tap(), os.O_WRONLY) as fd:
        for _ in range(1000):
            disk.write(fd)
            if rig.status()["loss"]:
                break
        else:
            raise AssertionError("never full")
        for _ in range(8):
            disk.write(fd)
        when = moment()
        for _ in range(8):
            disk.write(fd)
    return f"@{when // 10**9}.{when % 10**9:09}"


def within(rig: Rig, when: str) -> Path:
    """Return what a time within the gap means: the gap's beginning."""
    (gap,) = rig.status()["gaps"]
    image = Path(os.path.realpath(rig.at(when)))
    assert os.getxattr(image, "user.dmafs.seq").decode() == str(gap["begin"]["seq"])
    return image


def test_a_gap_hides_a_full_store_from_writers(rig: Rig) -> None:
    """Gap: no error, the primary has it all, status says since when; with space a resync makes the image exact."""
    rig.allow(RUNS_FULL, GAP, GAP_ENDS, "mkdir: volume disk: a gap has begun")
    disk = Disk(rig, "gap")
    when = write_into_gap(disk)
    disk.assert_there()
    status = rig.status()
    (gap,) = status["gaps"]
    assert status["loss"].startswith("store of volume disk is full")
    assert gap["end"] is None
    shown = rig.dmafs("status", rig.store, code=1).stdout
    assert (
        f"  gap       {both(gap['begin']['time'])} to now: writes are not captured: store of volume disk is full"
        in shown
    )
    assert "alarm     volume disk: a gap has begun: store of volume disk is full" in shown
    begun = within(rig, when).read_bytes()
    assert begun != disk.expected
    fails(errno.EIO, os.mkdir, rig.mnt / "snapshots" / "later")
    disk.filler.unlink()
    rig.wait_protected()
    (gap,) = rig.status()["gaps"]
    assert gap["end"] is not None
    assert rig.status()["loss"] == ""
    disk.assert_exact()
    assert within(rig, when).read_bytes() == begun
    pwrite(rig.tap(), b"after".ljust(4096), 0, sync=True)
    disk.expected[:4096] = b"after".ljust(4096)
    (rig.mnt / "snapshots" / "later").mkdir()
    assert_same(rig.primary(), rig.snapshot("later"))
    disk.assert_exact()
    with connect(rig.store) as asked:
        asked.sync()
    assert rig.status()["gaps"] == []
    assert "a gap has begun" not in rig.dmafs("status", rig.store, code=1).stdout, "that space was short is told on"
    disk.end()


def test_a_kill_in_a_gap_takes_nothing_from_the_primary(rig: Rig) -> None:
    """Kill -9 while writes go past the journal: nothing older is written over them, and the gap goes on to its end."""
    rig.allow(RUNS_FULL, GAP, GAP_ENDS, REDONE, OPEN_GAP, "resync failed: store of volume disk is full")
    disk = Disk(rig, "gap")
    when = write_into_gap(disk)
    rig.kill()
    assert rig.primary().read_bytes() == disk.expected
    rig.start(protected=False)
    disk.assert_there()
    with opened(rig.tap(), os.O_WRONLY) as fd:
        for _ in range(8):
            disk.write(fd)
    disk.assert_there()
    disk.filler.unlink()
    wait_until(lambda: rig.status()["state"] == "protected", "the end of the gap")
    disk.assert_exact()
    within(rig, when)
    disk.end()
