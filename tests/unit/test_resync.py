"""After the kernel stopped, journal and primary are made to agree, and the interval is a gap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from dmafs.core.copy import initial_copy
from dmafs.core.limits import VolumeLimits
from dmafs.core.ondisk import Flag
from dmafs.core.points import landmarks, seq_at
from dmafs.core.resync import begin_after_stop, mend, needs_resync, resync
from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.verify import Differences, Steps, verify
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import NoSuchPointError

SECTORS = 64
BOOT, OTHER_BOOT = UUID(int=1), UUID(int=2)


class Disk:
    """A primary file and its volume, written as the pass-through tap does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "disk"
        self.folder.mkdir()
        self.source = folder / "primary.img"
        self.source.write_bytes(bytes(SECTORS * 512))
        self.time_ns = 10**18
        Volume.create(
            RealStorage(self.folder), name="disk", size_sectors=SECTORS, source=self.source, tap="fuse", created_ns=1
        )
        self.open()
        run(initial_copy(self.volume, self.primary, self.flush, lambda _done: None))
        self.volume.mark_open(BOOT)

    def clock(self) -> int:
        self.time_ns += 1000
        return self.time_ns

    def open(self) -> None:
        self.volume = open_volume(self.folder, limits=VolumeLimits(reserve_bytes=0), clock=self.clock)
        self.primary: RealFile = open_source(self.source, writable=True)

    def close(self) -> None:
        self.volume.close()
        self.primary.close()

    def flush(self, flag: Flag = Flag.FLUSH) -> Work[object]:
        return (yield from self.volume.flush(self.primary, flag=flag))

    def write(self, sector: int, text: bytes) -> None:
        data = text.ljust(512, b".")
        self.volume.write(sector, data)
        self.primary.write([data], sector * 512)

    def live(self) -> bytes:
        return bytes(self.volume.live.read(0, SECTORS * 512))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    disk.write(1, b"one")
    disk.write(2, b"two")
    run(disk.flush())
    disk.close()
    yield disk
    disk.close()


def damage(disk: Disk) -> None:
    """Put writes on the primary that the journal has lost."""
    content = bytearray(disk.source.read_bytes())
    content[2 * 512 : 3 * 512] = b"lost".ljust(512, b"!")
    content[40 * 512 : 41 * 512] = b"new".ljust(512, b"!")
    disk.source.write_bytes(content)


def nothing() -> Work[object]:
    """Settle: the pass-through tap has nothing to wait for."""
    return (yield lambda: None)


def all_of(disk: Disk) -> Work[Differences]:
    """Resync."""
    return resync(disk.volume, disk.primary, disk.flush, Steps(nothing), lambda _done: None)


def finish(work: Work[Differences], answer: object) -> None:
    """Drive work that is under way to its end."""
    try:
        while True:
            answer = work.send(answer)()
    except StopIteration:
        return


def test_a_kill_is_no_gap(disk: Disk) -> None:
    """Under the same boot of the kernel no gap begins: the page cache has kept both sides."""
    disk.open()
    run(begin_after_stop(disk.volume, BOOT, disk.flush))
    assert not needs_resync(disk.volume)


def test_a_clean_stop_is_no_gap(disk: Disk) -> None:
    """After an orderly stop no gap begins, whatever the boot."""
    disk.open()
    run(disk.flush())
    disk.volume.mark_clean()
    disk.close()
    disk.open()
    run(begin_after_stop(disk.volume, OTHER_BOOT, disk.flush))
    assert not needs_resync(disk.volume)


def test_resync_ends_with_the_primary(disk: Disk) -> None:
    """After a resync the newest image is the primary, and only what differed was journaled."""
    damage(disk)
    disk.open()
    head = disk.volume.journal.head
    run(begin_after_stop(disk.volume, OTHER_BOOT, disk.flush))
    assert needs_resync(disk.volume)
    found = run(all_of(disk))
    assert found.extents == [(0, 8), (40, 48)]  # two blocks of 4 KiB
    assert (found.sectors, found.count, found.busy_sectors) == (16, 2, 0)
    assert not needs_resync(disk.volume)
    assert disk.live() == disk.source.read_bytes()
    assert disk.volume.journal.head == head + 2
    disk.volume.check()


def test_moments_inside_a_gap_resolve_to_its_beginning(disk: Disk) -> None:
    """Nothing inside a gap is a point; its beginning and its end are."""
    damage(disk)
    disk.open()
    begin = disk.volume.journal.head
    before = bytes(disk.volume.image(begin).read(0, SECTORS * 512))
    run(begin_after_stop(disk.volume, OTHER_BOOT, disk.flush))
    work = all_of(disk)
    call = next(work)
    disk.write(7, b"while it lasts")
    inside = disk.volume.journal.head
    assert seq_at(disk.volume, disk.time_ns) == begin
    assert not disk.volume.recoverable(inside)
    assert all(disk.volume.recoverable(point.seq) for point in landmarks(disk.volume))
    finish(work, call())
    end = disk.volume.journal.head
    assert end > inside
    assert disk.volume.recoverable(end)
    assert not disk.volume.recoverable(inside)
    assert seq_at(disk.volume, disk.volume.journal.time_of(inside)) == begin
    with pytest.raises(NoSuchPointError):
        disk.volume.image(inside)
    assert bytes(disk.volume.image(begin).read(0, SECTORS * 512)) == before
    assert disk.live() == disk.source.read_bytes()


def test_an_open_gap_survives_everything(disk: Disk) -> None:
    """A gap is kept over kills, syncs up to its beginning and reopening until a resync has ended it."""
    damage(disk)
    disk.open()
    begin = disk.volume.journal.head
    run(begin_after_stop(disk.volume, OTHER_BOOT, disk.flush))
    disk.volume.mark_open(OTHER_BOOT)
    disk.write(9, b"later")
    run(disk.flush())
    assert run(sync(disk.volume)) == begin
    disk.close()
    disk.open()
    assert needs_resync(disk.volume)
    assert not disk.volume.recoverable(disk.volume.journal.head)
    with pytest.raises(NoSuchPointError):
        run(disk.volume.take_snapshot(disk.primary, "inside"))
    run(all_of(disk))
    end = disk.volume.journal.head
    run(disk.flush())
    assert run(sync(disk.volume)) == end
    assert disk.live() == disk.source.read_bytes()
    assert disk.volume.journal.gaps == []
    disk.volume.check()


def test_an_interrupted_copy_starts_again(tmp_path: Path) -> None:
    """When the kernel stopped during the initial copy, nothing of it is trusted."""
    disk = Disk(tmp_path)
    disk.volume.pointers.update(copied=False, copied_sectors=32)
    run(begin_after_stop(disk.volume, OTHER_BOOT, disk.flush))
    assert disk.volume.pointers.now.copied_sectors == 0
    disk.close()


def test_a_mend_is_a_gap_for_what_was_found(disk: Disk) -> None:
    """What a verify has found is journaled between a gap's beginning and its end, and nothing else is looked at."""
    damage(disk)
    disk.open()
    disk.volume.mark_open(BOOT)
    found = run(verify(disk.volume, disk.primary, Steps(nothing), lambda _done: None))
    assert disk.volume.journal.gaps == [], "a verify changes nothing"
    before, head = disk.live(), disk.volume.journal.head
    done: list[int] = []
    mended = run(mend(disk.volume, disk.primary, disk.flush, Steps(nothing), done.append, found=found))
    assert (mended.extents, done) == (found.extents, [8, 16])
    (gap,) = disk.volume.journal.gaps
    assert (gap.begin, gap.end) == (head, head + 2)
    assert disk.live() == disk.source.read_bytes()
    assert bytes(disk.volume.image(head).read(0, SECTORS * 512)) == before
    disk.volume.check()


def test_zeros_are_journaled_without_data(disk: Disk) -> None:
    """Where the primary has zeros a discard is journaled."""
    content = bytearray(disk.source.read_bytes())
    content[0:4096] = bytes(4096)
    disk.source.write_bytes(content)
    disk.open()
    run(begin_after_stop(disk.volume, OTHER_BOOT, disk.flush))
    run(all_of(disk))
    segment = disk.volume.journal.segment_of(disk.volume.journal.head)
    assert segment.is_zero(disk.volume.journal.head - segment.header.first)
    assert disk.live() == bytes(content)


def test_a_write_while_differences_are_decided_is_newer(disk: Disk) -> None:
    """What is written after the primary was read for a difference isn't journaled over."""
    damage(disk)
    disk.open()
    run(begin_after_stop(disk.volume, OTHER_BOOT, disk.flush))
    work = all_of(disk)
    call = next(work)
    written = 0
    try:
        while True:
            answer = call()
            if written or isinstance(answer, np.ndarray):  # the first look has found what differs
                disk.write(40, f"number {written}".encode())
                written += 1
            call = work.send(answer)
    except StopIteration as stop:
        found = stop.value
    assert written > 8
    assert found.extents == [(0, 8)]
    assert found.busy_sectors == 1
    assert disk.live() == disk.source.read_bytes()
