"""Partitions of images as files beside them: found as the kernel finds them, with exactly the bytes of their ranges."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.disklabels import gpt_disk, gpt_entry, mbr_sector
from tests.mount.harness import MIB, Rig, cached_bytes, fails, moment, opened, pread, pwrite, run, spelled, wait_until

pytestmark = pytest.mark.mount

SIZE = 24 * MIB
SECTOR = 512
P1 = range(2 * MIB, 6 * MIB)
P2 = range(8 * MIB, 9 * MIB)


def table(first: range = P1, second: range = P2, *, size: int = SIZE) -> bytes:
    """Return a disk with a GPT of two partitions, p1 and p3, and nothing in them."""
    entries = {
        number: gpt_entry(part.start // SECTOR, part.stop // SECTOR - 1) for number, part in ((1, first), (3, second))
    }
    return bytes(gpt_disk(size, entries))


def view(image: Path, number: int) -> Path:
    return image.with_name(f"{image.stem}.p{number}.img")


def content(seed: int) -> bytes:
    """Return a disk whose partitions have random bytes."""
    disk = bytearray(table())
    for part in (P1, P2):
        disk[part.start : part.stop] = random.Random(seed).randbytes(len(part))
    return bytes(disk)


def clone(rig: Rig, name: str) -> Path:
    (rig.mnt / "clones" / name).mkdir()
    return rig.mnt / "clones" / name / "disk.img"


# --- names and attributes


def test_views_stand_beside_each_image_but_the_tap(rig: Rig) -> None:
    """Listed and looked up in live, at, snapshots and clones; with the range's length, and no other number."""
    disk = content(1)
    rig.create(size=SIZE, content=disk)
    rig.start()
    (rig.mnt / "snapshots" / "kept").mkdir()
    clone(rig, "mine")
    at = rig.at(moment())
    for image in (rig.live(), at, rig.snapshot("kept"), rig.mnt / "clones/mine/disk.img"):
        assert sorted(os.listdir(image.parent)) == ["disk.img", "disk.p1.img", "disk.p3.img"]
        for number, part in ((1, P1), (3, P2)):
            info, whole = view(image, number).stat(), image.stat()
            assert info.st_size == len(part)
            assert (info.st_mode, info.st_mtime_ns) == (whole.st_mode, whole.st_mtime_ns)
            assert info.st_blocks * 512 == min(len(part), whole.st_blocks * 512)
            assert view(image, number).read_bytes() == disk[part.start : part.stop]
            assert os.getxattr(view(image, number), "user.dmafs.offset") == str(part.start).encode()
            assert os.getxattr(view(image, number), "user.dmafs.seq") == os.getxattr(image, "user.dmafs.seq")
            assert "user.dmafs.offset" in os.listxattr(view(image, number))
            fails(errno.ENODATA, os.getxattr, view(image, number), "user.dmafs.digest")
        fails(errno.ENODATA, os.getxattr, image, "user.dmafs.offset")
        for name in (
            "disk.p2.img",
            "disk.p0.img",
            "disk.p01.img",
            "disk.p4.img",
            "disk.p1.p1.img",
            "disk.p1",
            "x.p1.img",
        ):
            fails(errno.ENOENT, os.stat, image.with_name(name))
    assert os.listdir(rig.mnt / "tap") == ["disk.img"]
    for folder in ("tap", "at", "snapshots", "clones", "."):
        fails(errno.ENOENT, os.stat, rig.mnt / folder / "disk.p1.img")


def test_reads_are_bounded_to_the_partition(rig: Rig) -> None:
    """Any pieces, cached or not, small ones near each other too; nothing of what is behind is to be had."""
    disk = content(2)
    rig.create(size=SIZE, content=disk)
    rig.start()
    at = view(rig.at(moment()), 1)
    expected = disk[P1.start : P1.stop]
    size = len(P1)
    for path in (view(rig.live(), 1), at, view(clone(rig, "mine"), 1)):
        for offset, length in ((0, 1), (511, 3), (MIB - 7, 70_000), (size - 1, 4096), (size - 5000, 9000), (size, 1)):
            assert pread(path, length, offset) == expected[offset : offset + length]
        with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
            buffer = mmap.mmap(-1, 2 * MIB)
            assert os.preadv(fd, [buffer], size - MIB) == MIB
            assert buffer[:MIB] == expected[-MIB:]
    rng = random.Random(3)
    with opened(at, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        near = [size - SECTOR * 8 * number for number in range(1, 200)]
        rng.shuffle(near)
        for offset in near:
            assert os.pread(fd, 4096, offset) == expected[offset : offset + 4096]
    wait_until(lambda: cached_bytes(at) > 200 * 4096, "what is around to be stored")
    assert at.read_bytes() == expected, "what was stored unasked is what is there"


def test_spellings_share_a_view(rig: Rig) -> None:
    """All ways to one moment lead to one inode for each range; those of other moments are others."""
    rig.create(size=SIZE, content=content(4))
    rig.start()
    when = moment()
    seq = os.getxattr(rig.at(when), "user.dmafs.seq").decode()
    first = view(rig.at(when), 1)
    assert first.samefile(view(rig.at(f"seq:{seq}"), 1))
    assert not first.samefile(view(rig.at(when), 3))
    pwrite(rig.tap(), b"x", P1.start, sync=True)
    assert not first.samefile(view(rig.at(moment()), 1))


def test_views_of_the_past_are_read_only(rig: Rig) -> None:
    rig.create(size=SIZE, content=content(5))
    rig.start()
    for path in (view(rig.at(moment()), 1), view(rig.live(), 1)):
        fails(errno.EROFS, os.open, path, os.O_RDWR)
        fails(errno.EROFS, os.truncate, path, 0)
        fails(errno.EROFS, os.unlink, path)


def test_images_have_precedence(rig: Rig) -> None:
    """A volume called disk.p1 is itself in every folder; its own partitions have their names."""
    rig.create(size=SIZE, content=content(6))
    rig.create("disk.p1", size=SIZE, content=(other := content(7)))
    rig.start()
    (rig.mnt / "snapshots" / "kept").mkdir()
    clone(rig, "mine")
    names = ["disk.img", "disk.p1.img", "disk.p1.p1.img", "disk.p1.p3.img", "disk.p3.img"]
    for image in (rig.live(), rig.at(moment()), rig.snapshot("kept"), rig.mnt / "clones/mine/disk.img"):
        assert sorted(os.listdir(image.parent)) == names
        assert image.with_name("disk.p1.img").read_bytes() == other
        assert image.with_name("disk.p1.p1.img").read_bytes() == other[P1.start : P1.stop]
        assert image.with_name("disk.p3.img").stat().st_size == len(P2)


# --- tables that change


def test_live_has_the_partitions_of_now(rig: Rig) -> None:
    """A table that comes, moves and goes; who has a view open stays where he was, and past moments keep theirs."""
    disk = bytearray(content(8))
    plain = bytes(disk)
    disk[:MIB] = bytes(MIB)
    disk[-MIB:] = bytes(MIB)
    rig.create(size=SIZE, content=bytes(disk))
    rig.start()
    live = rig.live()
    without = rig.at(moment())
    for _ in range(2):
        fails(errno.ENOENT, os.stat, view(live, 1))
        assert os.listdir(live.parent) == ["disk.img"]
    with opened(rig.tap(), os.O_RDWR) as tap:
        os.pwrite(tap, plain[:MIB], 0)
        os.pwrite(tap, plain[-MIB:], SIZE - MIB)
        os.fsync(tap)
        assert view(live, 1).read_bytes() == plain[P1.start : P1.stop], "found at once"
        having = rig.at(moment())
        with opened(view(live, 1), os.O_RDONLY) as fd:
            inode = os.fstat(fd).st_ino
            os.pwrite(tap, b"live", P1.start)
            assert os.pread(fd, 4, 0) == b"live"
            moved = table(P2, P1)
            os.pwrite(tap, moved[:MIB], 0)
            assert view(live, 1).stat().st_size == len(P2)
            assert view(live, 1).stat().st_ino != inode
            assert os.pread(fd, 4, 0) == b"live", "an open file stays where it was"
            assert os.fstat(fd).st_size == len(P1)
            assert view(live, 3).stat().st_ino == inode, "one range is one inode"
            os.pwrite(tap, bytes(SECTOR), 0)
            fails(errno.ENOENT, os.stat, view(live, 1))
            assert os.listdir(live.parent) == ["disk.img"]
            assert os.pread(fd, 4, 0) == b"live"
        os.fsync(tap)
    assert view(having, 1).read_bytes() == plain[P1.start : P1.stop]
    assert sorted(os.listdir(having.parent)) == ["disk.img", "disk.p1.img", "disk.p3.img"]
    assert os.listdir(without.parent) == ["disk.img"]
    assert os.listdir(rig.at(moment()).parent) == ["disk.img"]


def test_views_outlive_syncs_and_restarts(rig: Rig) -> None:
    """A snapshot's views have the same bytes after a sync, a kill and a start."""
    disk = content(9)
    rig.create(size=SIZE, content=disk)
    rig.start()
    (rig.mnt / "snapshots" / "kept").mkdir()
    pwrite(rig.tap(), random.Random(1).randbytes(SIZE), 0, sync=True)
    with opened(view(rig.snapshot("kept"), 3), os.O_RDONLY) as fd:
        rig.dmafs("sync", rig.store)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, MIB, 0) == disk[P2.start : P2.stop]
    assert os.listdir(rig.live().parent) == ["disk.img"]
    rig.kill()
    rig.start()
    assert view(rig.snapshot("kept"), 1).read_bytes() == disk[P1.start : P1.stop]


# --- clones


def test_a_clone_and_its_views_are_one(rig: Rig) -> None:
    """What is written to either is read from the other at once, also where both were read before; with loop devices."""
    rig.create(size=SIZE, content=(disk := content(10)))
    rig.start()
    image = clone(rig, "mine")
    part = view(image, 1)
    with opened(image, os.O_RDWR) as whole, opened(part, os.O_RDWR) as first:
        assert os.pread(whole, len(P1), P1.start) == os.pread(first, len(P1), 0) == disk[P1.start : P1.stop]
        rng = random.Random(11)
        model = bytearray(disk)
        for number in range(300):
            length = rng.randrange(1, 9000)
            offset = rng.randrange(len(P1) - length)
            data = rng.randbytes(length)
            model[P1.start + offset : P1.start + offset + length] = data
            if number % 2:
                assert os.pwrite(first, data, offset) == length
            else:
                assert os.pwrite(whole, data, P1.start + offset) == length
            begin, around = max(offset - 5000, 0), 20_000
            expected = bytes(model[P1.start + begin : min(P1.start + begin + around, P1.stop)])
            assert os.pread(whole, len(expected), P1.start + begin) == expected
            assert os.pread(first, around, begin) == expected
        os.fsync(first)
        assert image.read_bytes() == model
        assert part.read_bytes() == model[P1.start : P1.stop]
        assert os.pwrite(first, b"z" * 1024, len(P1) - 512) == 512, "up to the end, as a disk"
        fails(errno.ENOSPC, os.pwrite, first, b"z", len(P1))
        model[P1.stop - 512 : P1.stop] = b"z" * 512
        os.pwrite(first, b"stat", 0)
        model[P1.start : P1.start + 4] = b"stat"
        assert image.stat().st_mtime_ns == part.stat().st_mtime_ns
        fails(errno.EBUSY, os.rmdir, image.parent)
    os.truncate(part, 0)
    os.truncate(part, len(P1))
    fails(errno.EINVAL, os.truncate, part, SIZE)
    rig.restart()
    assert image.read_bytes() == model
    assert part.read_bytes() == model[P1.start : P1.stop]
    with opened(part, os.O_PATH) as fd:
        os.rmdir(image.parent)
        fails(errno.ENOENT, os.stat, part)
        clone(rig, "mine")
        fails(errno.ESTALE, os.open, f"/proc/self/fd/{fd}", os.O_RDWR)
    assert part.read_bytes() == disk[P1.start : P1.stop]


def test_a_clones_table_is_its_own(rig: Rig) -> None:
    """A clone's table can be changed: its views are those of its own table, and nothing else notices."""
    rig.create(size=SIZE, content=content(12))
    rig.start()
    image = clone(rig, "mine")
    assert view(image, 1).stat().st_size == len(P1)
    pwrite(image, mbr_sector([(0, 0, 0), (0x83, P2.start // SECTOR, len(P2) // SECTOR)]), 0)
    assert sorted(os.listdir(image.parent)) == ["disk.img", "disk.p2.img"]
    fails(errno.ENOENT, os.stat, view(image, 1))
    assert view(image, 2).stat().st_size == len(P2)
    assert view(rig.live(), 1).stat().st_size == len(P1)


# --- damage


def test_a_damaged_table_hides_no_image(rig: Rig) -> None:
    """Where the store's disk has damaged the table, images are listed, their views aren't, and a look-up is EIO."""
    rig.create(size=SIZE, content=content(13))
    rig.start()
    (rig.mnt / "snapshots" / "kept").mkdir()
    rig.stop()
    pwrite(rig.store / "disk" / "mirror.img", b"damage", 20)
    rig.allow("disk")
    rig.start()
    assert os.listdir(rig.snapshot("kept").parent) == ["disk.img"]
    fails(errno.EIO, os.stat, view(rig.snapshot("kept"), 1))
    assert "partitions of volume disk are not listed" in rig.log()


# --- the whole story


def test_file_systems_on_partitions(rig: Rig) -> None:
    """A disk with ext4 and XFS on partitions: mounted from views of the past, without partitions of the kernel's."""
    size = 400 * MIB
    parts = {1: (MIB, 40 * MIB), 2: (41 * MIB, 358 * MIB)}
    path = rig.root / "table.img"
    with path.open("wb") as file:
        file.truncate(size)
    script = rig.root / "script"
    script.write_text('label: gpt\nstart=1MiB, size=40MiB, name="data"\nsize=358MiB\n')
    run("sh", "-c", f"sfdisk -q {path} < {script}")
    rig.create(size=size)
    rig.start()
    pwrite(rig.tap(), pread(path, MIB, 0), 0)
    pwrite(rig.tap(), pread(path, MIB, size - MIB), size - MIB, sync=True)

    past = rig.folder("past")

    def write_file(number: int, data: bytes, mkfs: Callable[[str], object] | None = None) -> None:
        offset, extent = parts[number]
        device = rig.attach(rig.tap(), "--offset", str(offset), "--sizelimit", str(extent))
        if mkfs is not None:
            mkfs(device)
        rig.mount(device, past)
        (past / "file").write_bytes(data)
        rig.umount(past)
        rig.detach(device)

    data = {number: random.Random(number).randbytes(3 * MIB) for number in parts}
    write_file(1, data[1], rig.mkfs)
    write_file(2, data[2], lambda device: run("mkfs.xfs", "-q", device))
    (rig.mnt / "snapshots" / "kept").mkdir()
    when = moment()
    write_file(1, b"damage")
    write_file(2, b"damage")
    pwrite(rig.tap(), bytes(MIB), 0)
    pwrite(rig.tap(), bytes(MIB), size - MIB, sync=True)
    assert os.listdir(rig.live().parent) == ["disk.img"]
    for image in (rig.at(when), rig.snapshot("kept")):
        assert sorted(os.listdir(image.parent)) == ["disk.img", "disk.p1.img", "disk.p2.img"]
        for number, options in ((1, "ro,noload"), (2, "ro,norecovery,nouuid")):
            part = view(image, number)
            offset, extent = parts[number]
            assert part.stat().st_size == extent
            run("cmp", "--bytes", str(extent), "--ignore-initial", f"0:{offset}", part, image)
            device = rig.attach(part, "--read-only")
            rig.mount(device, past, options)
            assert (past / "file").read_bytes() == data[number]
            rig.umount(past)
            rig.detach(device)
    (rig.mnt / "clones" / f"mine@{spelled(when)}").mkdir()
    device = rig.attach(rig.mnt / "clones/mine/disk.p2.img")
    rig.mount(device, past, "nouuid")
    (past / "file").write_bytes(b"mine")
    rig.umount(past)
    rig.detach(device)
    assert view(rig.at(when), 2).read_bytes()[:4] == b"XFSB"
