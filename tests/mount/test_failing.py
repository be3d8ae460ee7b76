"""A store whose disk fails: it can be read, and says what is the matter; what was acknowledged is there afterwards."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from dmafs.cli.output import both
from dmafs.units import AtTime, TimeNs, parse_spelling
from tests.mount.disks import Disk
from tests.mount.harness import (
    MIB,
    REDONE,
    Rig,
    assert_same,
    fails,
    forget,
    moment,
    opened,
    pread,
    pwrite,
    run,
    wait_until,
)

pytestmark = pytest.mark.mount

SIZE: Final = 16 * MIB
BLOCK: Final = 64 << 10
FAILED: Final = (
    r"[Ii]nput/output error|[Rr]ead-only",  # of all that is tried after the first failure
    r"the control socket is left behind",
    r"a gap is open",
    r"(gap ended|resynced), .* of the source differed",
)


class Failing:
    """A volume in a store on a disk that fails when it is told to, and what the source has to be."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.rng = rig, random.Random(3)
        self.disk = Disk(rig)
        self.device, self.place = self.disk.device, self.disk.place
        self.old = self.rng.randbytes(SIZE)
        self.expected = bytearray(self.old)
        rig.create(size=SIZE, content=self.old)
        rig.configure("tick_s = 2\n")
        rig.start()
        (rig.mnt / "snapshots" / "old").mkdir()
        pwrite(rig.tap(), b"acknowledged".ljust(4096), 0, sync=True)
        self.expected[:4096] = b"acknowledged".ljust(4096)
        run("sync", "-f", self.place)

    def write_until_failure(self, fd: int) -> int:
        """Write and flush until that fails; return the errno. What was acknowledged is expected."""
        for _ in range(1000):
            data, offset = self.rng.randbytes(BLOCK), self.rng.randrange(1, SIZE // BLOCK) * BLOCK
            try:
                os.pwrite(fd, data, offset)
                os.fsync(fd)
            except OSError as error:
                return error.errno or 0
            self.expected[offset : offset + BLOCK] = data
        raise AssertionError("the disk never failed")

    def assert_shown(self, begun_ns: int) -> None:
        """Assert that status says what failed, since when and what to do, as JSON and as text."""
        volume = json.loads(self.rig.dmafs("status", "--json", self.rig.store, code=1).stdout)["volumes"][0]
        failure: dict[str, Any] = volume["failure"]
        assert volume["state"] == "read-only"
        assert failure["what"].startswith("input/output error")
        assert f"{self.rig.store}/disk/forward/" in failure["what"], "it names the file"
        since = parse_spelling(failure["since"], now=TimeNs(moment()), timezone="UTC")
        assert isinstance(since, AtTime)
        assert begun_ns < since.time < moment()
        text = self.rig.dmafs("status", self.rig.store, code=1).stdout
        assert "volume disk: read-only, " in text
        assert f"\n  failure   {failure['what']} (since {both(failure['since'])})\n" in text
        assert f"\n  to do     {failure['hint']}\n" in text

    def assert_read(self, when: int) -> None:
        """Assert that images of the past, the newest one and the source can be read."""
        for path in (self.rig.snapshot("old"), self.rig.at(when), self.rig.live(), self.rig.tap()):
            forget(path)
            content = pread(path, SIZE, 0)
            assert content.startswith(b"acknowledged") == (path != self.rig.snapshot("old"))
            assert path in {self.rig.live(), self.rig.tap()} or content[BLOCK:] == self.old[BLOCK:]

    def mend(self) -> None:
        """Have the disk be right again, and its file system repaired, as somebody does who looks after it."""
        self.rig.umount(self.place)
        self.disk.mend()
        done = run("e2fsck", "-fy", self.device, code=None)
        assert done.returncode in {0, 1}, done.stdout
        self.rig.mount(self.device, self.place)

    def assert_kept(self) -> None:
        """Assert that all is there that was acknowledged, and that the newest image is the source."""
        found = self.rig.primary().read_bytes()
        differing = [at for at in range(0, SIZE, BLOCK) if found[at : at + BLOCK] != self.expected[at : at + BLOCK]]
        assert len(differing) <= 1, "only the write that was not acknowledged may be there or not"
        assert_same(self.rig.primary(), self.rig.live())
        self.rig.dmafs("verify", self.rig.store)
        assert self.rig.snapshot("old").read_bytes() == self.old

    def end(self) -> None:
        self.rig.stop()
        self.disk.end()


@pytest.fixture
def failing(rig: Rig) -> Iterator[Failing]:
    made = Failing(rig)
    yield made
    made.end()


@pytest.mark.parametrize("lasts", [True, False])
def test_a_store_whose_disk_fails_is_read_only(rig: Rig, failing: Failing, *, lasts: bool) -> None:
    """EIO for the writer, and from then on EROFS; images are read as before; status says what, since when, what to do.

    After the disk was mended all that was acknowledged is there, and a resync takes over what reached the source only:
    by itself if the disk took a note of it soon after, else when it is told to, as status says.
    """
    rig.allow(REDONE, *FAILED)
    when = moment()
    failing.disk.fail()
    with opened(rig.tap(), os.O_WRONLY) as fd:
        assert failing.write_until_failure(fd) == errno.EIO
        if not lasts:
            failing.disk.mend()
        fails(errno.EROFS, os.pwrite, fd, bytes(4096), 0)
    fails(errno.EROFS, os.mkdir, rig.mnt / "snapshots" / "new")
    failing.assert_shown(when)
    failing.assert_read(when)
    wait_until(lambda: "is read-only from now on" in rig.log(), "the failure to be told")
    rig.stop()
    failing.mend()
    rig.start()
    if lasts:
        assert "the next start can't be told to compare the source" in rig.log()
        rig.dmafs("resync", rig.store)
    assert all(gap["end"] is not None for gap in rig.status()["gaps"])
    assert lasts or rig.status()["gaps"]
    failing.assert_kept()
    pwrite(rig.tap(), b"writable".ljust(4096), 0, sync=True)
    assert_same(rig.primary(), rig.live())
    assert Path(os.path.realpath(rig.at("0s ago"))).read_bytes() == rig.primary().read_bytes()
