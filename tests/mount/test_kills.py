"""Kill -9 at random moments, under load: what was acknowledged is there, and nothing hangs.

One store has two volumes: ``disk``, whose tap is written by several writers, and ``files``, which has a file system on
a loop device above its tap. Two more loop devices are over images of the past: one of each. The journal is so small
that the daemon is in the midst of a sync at many a moment, and snapshots are taken and dropped all the time.

``DMAFS_TEST_KILLS`` says how many kills there are, ``DMAFS_TEST_SEED`` chooses the moments. The threads that write
aren't the same each time, so the seed repeats the choice of moments only.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

import pytest
import xxhash

from dmafs.core.mounts import mounts
from tests.mount.harness import MIB, REDONE, Rig, assert_same, is_mounted, run
from tests.mount.kill_loads import (
    BLOCK,
    BLOCKS,
    SLOTS,
    BlockWriter,
    FileWriter,
    Load,
    Reader,
    SnapshotTaker,
    Versions,
    check_blocks,
    check_files,
)

pytestmark = [pytest.mark.mount, pytest.mark.slow]

KILLS: Final = int(os.environ.get("DMAFS_TEST_KILLS", "20"))
SEED: Final = int(os.environ.get("DMAFS_TEST_SEED", "1"))
LIFE_S: Final = 0.8
"""How long a daemon is under load at most before it is killed."""
ANSWER_S: Final = 15.0
WRITERS: Final = 4
FILE_WRITERS: Final = 2
FIXED: Final = "fixed"
"""A file that nobody writes to."""


def answer(*command: str | Path) -> tuple[int, str]:
    """Run a command, which must not hang; return its exit code and what it says. One that does isn't waited for."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
    )
    try:
        _, said = process.communicate(timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"hangs: {command}") from None
    return process.returncode, said.decode()


def helpers_of(daemon: int) -> list[int]:
    """Return the processes that a daemon has started: the one that unmounts when it is gone."""
    return [int(word) for word in Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()]


class Killing:
    """A rig whose daemon is killed again and again."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.rng = random.Random(SEED)
        self.blocks, self.files = Versions(), Versions()
        self.folder, self.past = rig.folder("files"), rig.folder("past")
        self.fixed = self.rng.randbytes(8 * BLOCK)
        self.digests: dict[str, str] = {}
        """Of the volume ``disk`` at the moments of snapshots."""
        self.rounds = 0
        self.loops: list[str] = []

    def prepare(self) -> None:
        """Make the store, and the file system."""
        rig = self.rig
        rig.create("disk", size=WRITERS * BLOCKS * BLOCK)
        rig.create("files", size=32 * MIB)
        rig.configure('segment_size = "1MiB"\ntick_s = 0.2\n[sync]\nage = "0s"\nfree = "0%"\njournal = "4MiB"\n')
        rig.start()
        device = rig.attach(rig.tap("files"))
        rig.mkfs(device)
        rig.mount(device, self.folder)
        (self.folder / FIXED).write_bytes(self.fixed)
        rig.umount(self.folder)
        rig.detach(device)
        rig.stop()

    def live(self, life: int) -> None:
        """Start a daemon, check what the killed one has left, and use it until it is killed, too."""
        rig = self.rig
        rig.start()
        self.check()
        loads = self.load(life)
        for load in loads:
            load.start()
        for load in loads:
            load.wait_begun()
        time.sleep(self.rng.uniform(0, LIFE_S))  # a random moment is what is wanted, not a condition
        acknowledged = dict(self.files.acknowledged)
        self.kill(alone=life % 2 == 0)
        for load in loads:
            load.assert_gone()
            self.rounds += load.rounds if isinstance(load, (BlockWriter, FileWriter)) else 0
        # A file system whose journal has just failed may find nothing to commit, and let an fsync succeed: what it
        # acknowledged after the kill doesn't count.
        self.files.acknowledged = acknowledged
        self.take_down()

    def check(self) -> None:
        """Assert that all that was acknowledged is there, and that history is what it was."""
        rig = self.rig
        assert sum(mount.point == str(rig.mnt) for mount in mounts()) == 1, "one mount, and no dead one below"
        for volume in ("disk", "files"):
            assert_same(rig.primary(volume), rig.live(volume))
            assert rig.status(volume)["gaps"] == []
        check_blocks(rig.primary("disk"), self.blocks)
        for name, digest in self.digests.items():
            assert os.getxattr(rig.snapshot(name), "user.dmafs.digest").decode() == digest
        device = rig.attach(rig.tap("files"))
        rig.mount(device, self.folder)
        self.loops.append(device)
        check_files(self.folder, self.files)
        assert (self.folder / FIXED).read_bytes() == self.fixed

    def load(self, life: int) -> list[Load]:
        """Take a snapshot for later, and return all that is to be under way."""
        rig, snapshots = self.rig, self.rig.mnt / "snapshots"
        run("sync", "-f", self.folder)
        name = f"life-{life}"
        (snapshots / name).mkdir()
        self.digests[name] = xxhash.xxh3_128(rig.primary("disk").read_bytes()).hexdigest()
        if len(self.digests) > 3:
            os.rmdir(snapshots / (oldest := next(iter(self.digests))))
            del self.digests[oldest]
        for stale in snapshots.glob("s*-*"):  # of the taker that was killed
            stale.rmdir()
        raw = rig.attach(rig.snapshot(name, "disk"), "-r", "--direct-io=on")
        device = rig.attach(rig.snapshot(name, "files"), "-r", "--direct-io=on")
        rig.mount(device, self.past, "ro,noload")
        self.loops += [raw, device]
        with rig.primary("disk").open("rb") as file:
            begins = file.read(64 * BLOCK)
        return [
            *(
                BlockWriter(rig.tap("disk"), self.blocks, first=number * BLOCKS, rng=self.part())
                for number in range(WRITERS)
            ),
            *(
                FileWriter(self.folder, self.files, first=number * SLOTS, rng=self.part())
                for number in range(FILE_WRITERS)
            ),
            Reader(Path(raw), begins),
            Reader(self.past / FIXED, self.fixed),
            SnapshotTaker(snapshots, f"s{life}"),
        ]

    def part(self) -> random.Random:
        return random.Random(self.rng.getrandbits(64))

    def kill(self, *, alone: bool) -> None:
        """Kill the daemon: *alone*, or with the process that would clear its mount then.

        That process is libfuse's, and now and then it comes too early to see that the mount is dead: it may stay there
        in either case, for the next daemon to clear.
        """
        rig = self.rig
        assert rig.daemon is not None
        helpers = [] if alone else helpers_of(rig.daemon.pid)
        assert alone or helpers, "what unmounts by itself is a process of its own"
        for helper in helpers:
            os.kill(helper, signal.SIGKILL)
        rig.kill()
        assert alone or is_mounted(rig.mnt), "the dead mount is there"

    def take_down(self) -> None:
        """Assert that what stands on the dead tree answers with errors, and take it away."""
        rig = self.rig
        tap, raw, _ = self.loops
        for command in (
            ["dd", "if=/dev/zero", f"of={tap}", "bs=4096", "count=1", "oflag=direct", "conv=notrunc"],
            ["dd", f"if={raw}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"],
            ["dd", f"if={self.past / FIXED}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"],
        ):
            code, said = answer(*command)
            assert code == 1, command
            assert "Input/output error" in said, said
        assert answer("touch", self.folder / "new")[0] == 1
        assert answer("ls", rig.mnt / "snapshots" / "latest" / "")[0] != 0
        for folder in (self.past, self.folder):
            code, said = answer("umount", folder)
            assert code == 0, said
            rig._mounts.remove(folder)
        for device in reversed(self.loops):
            rig.detach(device)
        self.loops.clear()


@pytest.mark.parametrize("kills", [KILLS])
def test_nothing_acknowledged_is_lost_and_nothing_hangs(rig: Rig, kills: int) -> None:
    """After each of many kills: the dead mount goes, what stood on it gets EIO in time, all that was acknowledged is
    there, the primary is the live image, and snapshots are what they were.
    """
    rig.allow(REDONE)
    killing = Killing(rig)
    killing.prepare()
    begun = time.monotonic()
    for life in range(kills):
        killing.live(life)
    rig.start()
    killing.check()
    print(f"{kills} kills, {killing.rounds} acknowledged rounds, {time.monotonic() - begun:.0f} s")
    rig.umount(killing.folder)
    rig.detach(killing.loops.pop())
    rig.stop()
    run("e2fsck", "-fn", rig.primary("files"))


def test_a_dead_mount_below_a_file_system_is_no_hindrance(rig: Rig) -> None:
    """While a file system is still mounted from the tap of a killed daemon, stores can be made, and daemons started."""
    rig.allow(REDONE)
    rig.create(size=32 * MIB)
    rig.start()
    device, folder = rig.attach(rig.tap()), rig.folder("files")
    rig.mkfs(device)
    rig.mount(device, folder)
    assert rig.daemon is not None
    for helper in helpers_of(rig.daemon.pid):
        os.kill(helper, signal.SIGKILL)
    rig.kill()
    other = rig.root / "other.primary"
    other.write_bytes(bytes(MIB))
    rig.dmafs("create", rig.root / "other", "--source", other)
    rig.start()
    assert_same(rig.primary(), rig.live())
    rig.umount(folder)
    rig.detach(device)
    rig.stop()
