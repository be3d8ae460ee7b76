"""An open image never changes, whatever is synced or dropped; at the last close what was kept for it goes away."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from pathlib import Path

import pytest

from tests.mount.harness import MIB, REDONE, Rig, assert_same, fails, forget, moment, run, spelled, wait_until

pytestmark = pytest.mark.mount

SIZE = 64 * MIB
SEED = 7


def scribble(rig: Rig, rng: random.Random, count: int = 40) -> None:
    """Overwrite parts of the disk, durably."""
    with rig.tap().open("r+b", buffering=0) as tap:
        for _ in range(count):
            os.pwrite(tap.fileno(), rng.randbytes(16384), rng.randrange(SIZE - 16384))
        os.fsync(tap.fileno())


def sync(rig: Rig, rng: random.Random) -> None:
    """Write, then sync, so that the mirror moves."""
    scribble(rig, rng)
    before = rig.status()["mirror"]["seq"]
    rig.dmafs("sync", rig.store)
    assert rig.status()["mirror"]["seq"] > before


def backward_seqs(rig: Rig) -> list[int]:
    """Return the seqs of the journals in the backward directory, hidden ones too; each has to be a pair of files."""
    names = sorted(os.listdir(rig.store / "disk" / "backward"))
    stems = sorted({name.partition(".")[0] for name in names})
    assert len(names) == 2 * len(stems), names
    return [int(stem.partition("-")[0]) for stem in stems]


def snapshot_seqs(rig: Rig) -> list[int]:
    """Return the seqs of the snapshots that users see."""
    folder = rig.mnt / "snapshots"
    names = [name for name in os.listdir(folder) if name != "latest"]
    return sorted(int(os.getxattr(folder / name / "disk.img", "user.dmafs.seq")) for name in names)


def wait_nothing_left(rig: Rig) -> None:
    """Wait until the backward journal holds exactly the snapshots that users see."""
    wait_until(lambda: backward_seqs(rig) == snapshot_seqs(rig), "the drop of what nobody holds", seconds=20)


def copied(rig: Rig, name: str) -> Path:
    """Copy the primary's file as it is now."""
    run("cp", "--sparse=always", rig.primary(), copy := rig.root / name)
    return copy


def assert_reads(fd: int, copy: Path) -> None:
    """Compare what an open descriptor reads, from the daemon, with a copy."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, SIZE, 0) + os.pread(fd, 1, SIZE) == copy.read_bytes()


def begun(rig: Rig, rng: random.Random) -> None:
    rig.create(size=SIZE, content=rng.randbytes(8 * MIB))
    rig.start()
    scribble(rig, rng)


def test_an_open_file_outlives_syncs(rig: Rig) -> None:
    """A moment that is no snapshot stays the same through its descriptor over syncs, then isn't there any more."""
    rng = random.Random(SEED)
    begun(rig, rng)
    copy, when = copied(rig, "copy"), moment()
    scribble(rig, rng)
    with rig.at(when).open("rb", buffering=0) as held:
        seq = int(os.getxattr(held.fileno(), "user.dmafs.seq"))
        for _ in range(3):
            sync(rig, rng)
            assert_reads(held.fileno(), copy)
        assert seq in backward_seqs(rig)
        assert seq not in snapshot_seqs(rig)
    wait_nothing_left(rig)
    fails(errno.ENOENT, rig.at(f"seq:{seq}").stat)
    assert rig.live().read_bytes() == rig.primary().read_bytes()


def test_a_mounted_image_outlives_syncs(rig: Rig) -> None:
    """A filesystem mounted from a past image stays readable and the same over syncs that overwrite its mirror."""
    rng = random.Random(SEED)
    files, past = rig.folder("files"), rig.folder("past")
    rig.create(size=SIZE)
    rig.start()
    device = rig.attach(rig.tap())
    rig.mkfs(device)
    rig.mount(device, files)
    contents = {f"file.{number}": rng.randbytes(rng.randrange(1, MIB)) for number in range(20)}
    for name, content in contents.items():
        (files / name).write_bytes(content)
    run("fsfreeze", "-f", files)
    when = moment()
    run("fsfreeze", "-u", files)
    past_device = rig.attach(rig.at(when), "-r")
    rig.mount(past_device, past, "ro,noload")
    for round_ in range(3):
        for name in contents:
            (files / name).write_bytes(rng.randbytes(rng.randrange(1, MIB)))
        run("sync", "-f", files)
        rig.dmafs("sync", rig.store)
        for name, content in contents.items():
            with (past / name).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert file.read() == content, (round_, name)
    rig.umount(past)
    run("blockdev", "--flushbufs", past_device)
    run("e2fsck", "-fn", past_device)
    rig.detach(past_device)
    wait_nothing_left(rig)
    rig.umount(files)
    rig.detach(device)
    assert_same(rig.primary(), rig.live())


def test_a_dropped_snapshot_stays_for_who_has_it_open(rig: Rig) -> None:
    """Rmdir hides a snapshot at once; its open image and its neighbours keep their bytes; its files go at the close."""
    rng = random.Random(SEED)
    begun(rig, rng)
    copies = {}
    for name in ("older", "dropped", "younger"):
        (rig.mnt / "snapshots" / name).mkdir()
        copies[name] = copied(rig, name)
        sync(rig, rng)
    with rig.snapshot("dropped").open("rb", buffering=0) as held:
        (rig.mnt / "snapshots" / "dropped").rmdir()
        assert sorted(set(os.listdir(rig.mnt / "snapshots")) & {*copies}) == ["older", "younger"]
        fails(errno.ENOENT, rig.snapshot("dropped").stat)
        sync(rig, rng)
        assert_reads(held.fileno(), copies["dropped"])
        assert backward_seqs(rig) != snapshot_seqs(rig)
        # The name is free again, and means another moment.
        (rig.mnt / "snapshots" / "dropped").mkdir()
        again = copied(rig, "again")
        sync(rig, rng)
        assert_reads(held.fileno(), copies["dropped"])
    wait_nothing_left(rig)
    for name, copy in {"older": copies["older"], "younger": copies["younger"], "dropped": again}.items():
        forget(rig.snapshot(name))
        assert_same(copy, rig.snapshot(name))


def test_many_holders_of_one_moment(rig: Rig) -> None:
    """A moment is kept until the last of its holders closes it, in whichever order and by whichever spelling."""
    rng = random.Random(SEED)
    begun(rig, rng)
    copy, when = copied(rig, "copy"), moment()
    scribble(rig, rng)
    seq = os.getxattr(rig.at(when), "user.dmafs.seq").decode()
    names = [spelled(when), f"seq:{seq}", spelled(when) + "~0s"]
    fds = [os.open(rig.at(name), os.O_RDONLY) for name in names]
    sync(rig, rng)
    sync(rig, rng)
    while fds:
        assert_reads(fds[-1], copy)
        assert int(seq) in backward_seqs(rig)
        os.close(fds.pop(rng.randrange(len(fds))))
    wait_nothing_left(rig)


def test_a_sync_while_somebody_reads(rig: Rig) -> None:
    """Reading a past image to its end, chunk by chunk, while syncs pass it gives the bytes of its moment."""
    rng = random.Random(SEED)
    begun(rig, rng)
    copy, when = copied(rig, "copy"), moment()
    scribble(rig, rng)
    found = bytearray()
    with rig.at(when).open("rb", buffering=0) as held:
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead: the daemon is asked in between
        while chunk := held.read(SIZE // 8):
            found += chunk
            sync(rig, rng)
    assert found == copy.read_bytes()
    wait_nothing_left(rig)


def test_what_was_kept_for_a_holder_goes_with_a_killed_daemon(rig: Rig) -> None:
    """A temporary snapshot doesn't survive the daemon: the next one drops it, and the real ones stay."""
    rig.allow(REDONE)
    rng = random.Random(SEED)
    begun(rig, rng)
    (rig.mnt / "snapshots" / "real").mkdir()
    copy = copied(rig, "copy")
    scribble(rig, rng)
    held = os.open(rig.at(moment()), os.O_RDONLY)
    scribble(rig, rng)
    sync(rig, rng)
    assert backward_seqs(rig) != snapshot_seqs(rig)
    rig.kill()
    with contextlib.suppress(OSError):  # nobody is there to be told
        os.close(held)
    rig.start()
    wait_nothing_left(rig)
    assert_same(copy, rig.snapshot("real"))
    assert_same(rig.primary(), rig.live())
