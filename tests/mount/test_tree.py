"""The tree as programs meet it: names, attributes, spellings, refusals, and exact bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone

import pytest
import xxhash

from tests.mount.harness import (
    MIB,
    Rig,
    assert_same,
    fails,
    forget,
    moment,
    opened,
    pread,
    pwrite,
    run,
    spelled,
    wait_until,
)

pytestmark = pytest.mark.mount

SIZE = 16 * MIB
BEGIN = b"primary " * 8192
SEED = 20260728


@dataclass(frozen=True)
class Told:
    """A rig with a short history: before, *first*, the snapshot *kept*, and *last*, each with its expected bytes."""

    rig: Rig
    before_ns: int
    first_ns: int
    first: bytes
    kept: bytes
    last_ns: int
    last: bytes


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    """One daemon for all tests that change nothing."""
    with Rig() as rig:
        before_ns = time.time_ns() - 3600 * 10**9
        rig.create(size=SIZE, content=BEGIN)
        rig.start()
        model = bytearray(BEGIN.ljust(SIZE, b"\0"))

        def write(data: bytes, offset: int) -> bytes:
            pwrite(rig.tap(), data, offset, sync=True)
            model[offset : offset + len(data)] = data
            return bytes(model)

        first = write(b"1" * 70_000, MIB + 512)
        first_ns = moment()
        kept = write(b"2" * 4096, 3 * MIB)
        (rig.mnt / "snapshots" / "kept").mkdir()
        moment()
        last = write(b"3" * 100_000, 5 * MIB + 4096)
        yield Told(rig, before_ns, first_ns, first, kept, moment(), last)


def canonical(rig: Rig, spelling: str) -> str:
    """Return the canonical name of what a spelling means."""
    path = rig.mnt / "at" / spelling
    return os.readlink(path) if path.is_symlink() else path.name


def time_of(rig: Rig, spelling: str) -> int:
    """Return the canonical time of a spelling in ns, by the image's mtime."""
    return rig.at(spelling).stat().st_mtime_ns


# --- what is there


def test_root_has_four_directories(told: Told) -> None:
    """The root lists at, live, snapshots and tap; only snapshots is writable."""
    found = {entry.name: stat.filemode(entry.stat().st_mode) for entry in told.rig.mnt.iterdir()}
    assert found == {
        "at": "dr-xr-x---",
        "clones": "drwxr-x---",
        "live": "dr-xr-x---",
        "snapshots": "drwxr-x---",
        "tap": "dr-xr-x---",
    }


def test_listings_name_landmarks(told: Told) -> None:
    """Folders list what is in them, and all that at/ lists can be entered."""
    rig = told.rig
    assert os.listdir(rig.mnt / "live") == os.listdir(rig.mnt / "tap") == ["disk.img"]
    assert sorted(os.listdir(rig.mnt / "snapshots")) == ["kept", "latest"]
    listed = os.listdir(rig.mnt / "at")
    assert "kept" in listed
    assert canonical(rig, "kept") in listed
    assert canonical(rig, spelled(told.last_ns)) in listed
    assert listed[:-1] == sorted(listed[:-1]), "canonical names sort as times"
    for name in listed:
        assert os.listdir(rig.mnt / "at" / name) == ["disk.img"]


def test_modes_owners_and_sizes(told: Told) -> None:
    """Images are 0440, the tap 0600; all belong to the daemon's user and have the primary's size."""
    rig = told.rig
    images = {rig.live(): 0o440, rig.at(told.first_ns): 0o440, rig.snapshot("kept"): 0o440, rig.tap(): 0o600}
    for path, mode in images.items():
        info = path.stat()
        assert (stat.S_ISREG(info.st_mode), stat.S_IMODE(info.st_mode)) == (True, mode), path
        assert (info.st_size, info.st_nlink, info.st_uid, info.st_gid) == (SIZE, 1, os.getuid(), os.getgid()), path


def test_blocks_are_what_holds_data(told: Told) -> None:
    """st_blocks tells sparse images from full ones, so du is right and cp makes a sparse copy of the same bytes."""
    rig = told.rig
    for path in (rig.at(told.first_ns), rig.snapshot("kept"), rig.live(), rig.tap()):
        allocated = path.stat().st_blocks * 512
        assert 64 << 10 <= allocated <= MIB, path
    assert rig.at(told.first_ns).stat().st_blocks * 512 >= len(BEGIN) + 70_000
    copy = rig.root / "copy"
    run("cp", rig.at(told.first_ns), copy)
    assert_same(copy, rig.at(told.first_ns))
    assert copy.stat().st_blocks * 512 <= MIB


def test_bytes_are_those_of_the_moment(told: Told) -> None:
    """Each moment has the bytes of its time, whatever was written later; reading goes in any pieces."""
    rig = told.rig
    for path, expected in {
        rig.at(told.first_ns): told.first,
        rig.snapshot("kept"): told.kept,
        rig.at("kept"): told.kept,
        rig.at(told.last_ns): told.last,
        rig.live(): told.last,
        rig.tap(): told.last,
    }.items():
        assert path.read_bytes() == expected, path
        for offset, length in (
            (0, 1),
            (MIB + 511, 3),
            (MIB + 70_000, 1025),
            (SIZE - 1, 4096),
            (SIZE, 10),
            (SIZE + 9, 1),
        ):
            assert pread(path, length, offset) == expected[offset : offset + length]


def test_mtime_is_the_last_events_time(told: Told) -> None:
    """An image's mtime is the time of its last event, to the nanosecond, and is its folder's name."""
    rig = told.rig
    for when in (told.first_ns, told.last_ns):
        mtime_ns = rig.at(when).stat().st_mtime_ns
        assert when - 10 * 10**9 < mtime_ns < when
        second = datetime.fromtimestamp(mtime_ns // 10**9, UTC)
        name = f"{second:%Y-%m-%dT%H%M%S}.{mtime_ns % 10**9:09}Z"
        assert canonical(rig, spelled(when)) == name
        assert (rig.mnt / "at" / name).stat().st_mtime_ns == mtime_ns
        assert (rig.mnt / "at" / name).stat().st_ino == (rig.mnt / "at" / spelled(when)).stat().st_ino


def test_extended_attributes(told: Told) -> None:
    """Images carry seq, time, volume, consistency; the digest is the content's xxh3-128, equal for all spellings."""
    rig = told.rig
    image = rig.at(told.first_ns)
    names = ["user.dmafs.seq", "user.dmafs.time", "user.dmafs.volume", "user.dmafs.consistency"]
    assert sorted(os.listxattr(image)) == sorted(names)
    seq, when, volume, consistency = (os.getxattr(image, name).decode() for name in names)
    assert image.samefile(rig.at(f"seq:{seq}"))
    assert time_of(rig, when) == image.stat().st_mtime_ns
    assert (volume, consistency) == ("disk", "exact")
    digest = os.getxattr(image, "user.dmafs.digest").decode()
    assert digest == xxhash.xxh3_128_hexdigest(told.first)
    assert os.getxattr(rig.at(f"seq:{seq}"), "user.dmafs.digest").decode() == digest
    kept = os.getxattr(rig.snapshot("kept"), "user.dmafs.digest").decode()
    assert kept == os.getxattr(rig.at("kept"), "user.dmafs.digest").decode() == xxhash.xxh3_128_hexdigest(told.kept)
    assert os.getxattr(rig.live(), "user.dmafs.seq") == os.getxattr(rig.at(told.last_ns), "user.dmafs.seq")
    fails(errno.ENODATA, os.getxattr, image, "user.dmafs.nothing")
    fails(errno.ENODATA, os.getxattr, image, "user.other")
    fails(errno.EROFS, os.setxattr, image, "user.dmafs.seq", b"1")


def test_an_unflushed_moment_is_crash_consistent(rig: Rig) -> None:
    """Between two writes without a flush an image says crash; where a flush stands it says exact."""
    rig.create()
    rig.start()
    with rig.tap().open("r+b", buffering=0) as tap:
        for value in (b"a", b"b"):
            tap.seek(0)
            tap.write(value * 4096)
        os.fsync(tap.fileno())
    seq = int(os.getxattr(rig.live(), "user.dmafs.seq"))
    found = [os.getxattr(rig.at(f"seq:{number}"), "user.dmafs.consistency") for number in (seq - 1, seq)]
    assert found == [b"crash", b"exact"]


def test_statfs_is_the_stores(told: Told) -> None:
    """Df on the mount shows the space of the store."""
    here, there = os.statvfs(told.rig.mnt), os.statvfs(told.rig.store)
    assert here.f_blocks * here.f_frsize == pytest.approx(there.f_blocks * there.f_frsize, rel=0.01)
    assert here.f_bavail * here.f_frsize == pytest.approx(there.f_bavail * there.f_frsize, rel=0.2)


# --- spellings


def test_every_spelling_is_one_folder(told: Told) -> None:
    """All spellings of a moment are links to one canonical folder, with one inode for its image."""
    rig = told.rig
    time_ns = rig.snapshot("kept").stat().st_mtime_ns
    utc = datetime.fromtimestamp(time_ns // 10**9, UTC)
    fraction = f"{time_ns % 10**9:09}"
    seq = os.getxattr(rig.snapshot("kept"), "user.dmafs.seq").decode()
    east = utc.astimezone(timezone(timedelta(hours=5, minutes=30)))
    spellings = [
        f"{utc:%Y-%m-%dT%H:%M:%S}.{fraction}Z",
        f"{utc:%Y-%m-%d %H:%M:%S}.{fraction}Z",
        f"{utc:%Y-%m-%dT%H:%M:%S},{fraction}Z",
        f"{utc:%Y-%m-%dT%H:%M:%S}.{fraction}+00:00",
        f"{east:%Y-%m-%dT%H:%M:%S}.{fraction}+05:30",
        f"{east:%Y%m%dT%H%M%S}.{fraction}+0530",
        f"{utc:%Y%m%dT%H%M%S}.{fraction}Z",
        f"{utc.astimezone():%Y-%m-%d %H:%M:%S}.{fraction}",
        f"@{time_ns // 10**9}.{fraction}",
        f"@{(time_ns + 10**6) // 10**9}.{(time_ns + 10**6) % 10**9:09}~1ms",
        f"seq:{seq}",
        f"seq:{seq}~0s",
        "kept",
        "kept~0s",
        "latest",
    ]
    folder = f"{utc:%Y-%m-%dT%H%M%S}.{fraction}Z"
    assert (rig.mnt / "at" / folder).is_dir()
    assert not (rig.mnt / "at" / folder).is_symlink()
    inode = rig.snapshot("kept").stat().st_ino
    for spelling in spellings:
        assert os.readlink(rig.mnt / "at" / spelling) == folder, spelling
        assert rig.at(spelling).stat().st_ino == inode, spelling
    assert os.readlink(rig.mnt / "snapshots" / "latest") == "kept"


def test_a_time_between_events_is_the_event_before(told: Told) -> None:
    """A nanosecond before an event is the state before it; from it to the next event all is one moment."""
    rig = told.rig
    kept_ns = rig.snapshot("kept").stat().st_mtime_ns
    first_ns = rig.at(told.first_ns).stat().st_mtime_ns
    assert time_of(rig, spelled(kept_ns)) == kept_ns
    assert time_of(rig, spelled(kept_ns - 1)) == first_ns
    assert time_of(rig, spelled(kept_ns + 1)) == kept_ns
    assert rig.at(kept_ns - 1).samefile(rig.at(told.first_ns))
    assert time_of(rig, "kept~1ns") == first_ns


def test_relative_spellings(told: Told) -> None:
    """`0s ago` and `1ms ago` are the newest state of a disk at rest; an hour ago there was nothing."""
    rig = told.rig
    for spelling in ("1ms ago", "0s ago", "1us ago~0s"):
        assert rig.at(spelling).samefile(rig.at(told.last_ns))
    fails(errno.ENOENT, rig.at("1h ago").stat)
    fails(errno.ENOENT, rig.at("yesterday 14:00").stat)


BAD_NAMES = [
    "garbage",
    "2026",
    "2026-07-28",
    "2026-13-01T00:00Z",
    "2026-07-28T25:00Z",
    "2262-04-11T23:47:16Z",
    "9999-12-31T235959.999999999Z",
    "1970-01-01T000000.000000000Z",
    "0000-00-00T000000.000000000Z",
    "@",
    "@-1",
    "@1e9",
    "@99999999999999999999",
    "@1",
    "seq:",
    "seq:-1",
    "seq:999999",
    "seq:99999999999999999999999",
    "seq:0x1",
    "kept~",
    "kept~5m",
    "kept~99999999w",
    "kept~1h~1h",
    "~1h",
    "5 ago",
    "tomorrow 14:00",
    "yesterday",
    "now",
    "KEPT",
    "kept ",
    " kept",
    "kept\n",
    "\n",
    "new\nline",
    "\t",
    "%s%n",
    "...",
    "-",
    "é",
    "\uff12\uff10\uff12\uff16-07-28T00:00Z",
    "時間",
    "\u202e",
    "\udcff\udcfe",
    "x" * 255,
    "9" * 255,
    "@" + "9" * 254,
    "é" * 127,
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_names_are_not_there(told: Told, name: str) -> None:
    """What is no point is ENOENT below at/ and snapshots/, and beside the image."""
    rig = told.rig
    for folder in (rig.mnt / "at", rig.mnt / "snapshots", rig.mnt, rig.mnt / "live", rig.mnt / "at" / "kept"):
        fails(errno.ENOENT, (folder / name).lstat)
    fails(errno.ENOENT, rig.at(name).stat)


def test_names_at_the_edges(told: Told) -> None:
    """Dots stay in the tree, names too long aren't there, files aren't folders, and the future isn't there."""
    rig = told.rig
    at = rig.mnt / "at"
    assert os.stat(at / "..").st_ino == rig.mnt.stat().st_ino
    assert os.stat(at / "kept" / "..").st_ino == at.stat().st_ino
    assert os.stat(at / ".").st_ino == at.stat().st_ino
    assert os.stat(rig.mnt / "..").st_ino == rig.root.stat().st_ino
    fails(errno.ENOENT, os.stat, at / ("x" * 256))
    fails(errno.ENAMETOOLONG, os.stat, at / ("x" * 4096))
    fails(errno.ENOTDIR, os.stat, at / "kept" / "disk.img" / "x")
    fails(errno.ENOENT, os.stat, rig.at(time.time_ns() + 60 * 10**9))
    fails(errno.ENOENT, os.stat, rig.at(told.before_ns))
    fails(errno.ENOENT, os.stat, at / "kept" / "other.img")
    fails(errno.ENOENT, os.stat, at / "kept" / "disk")


# --- refusals


def test_past_and_live_cannot_be_written(told: Told) -> None:
    """Images of the past and the live image refuse every way to write, and stay as they are."""
    rig = told.rig
    for path in (rig.at(told.first_ns), rig.snapshot("kept"), rig.live()):
        before = path.read_bytes()
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND):
            fails(errno.EROFS, os.open, path, flags)
        fails(errno.EROFS, os.truncate, path, 0)
        fails(errno.EROFS, os.chmod, path, 0o600)
        fails(errno.EROFS, os.utime, path)
        assert path.read_bytes() == before


def test_the_tree_has_no_other_changes(told: Told) -> None:
    """Making, removing, renaming and linking anything is EROFS everywhere, but for snapshots and clones themselves."""
    rig = told.rig
    mnt = rig.mnt
    folders = [
        mnt,
        mnt / "at",
        mnt / "live",
        mnt / "tap",
        mnt / "snapshots",
        mnt / "at" / "kept",
        mnt / "snapshots/kept",
    ]
    for folder in folders:
        new = folder / "new"
        fails(errno.EROFS, os.open, new, os.O_CREAT | os.O_WRONLY)
        fails(errno.EROFS, os.mknod, new)
        fails(errno.EROFS, os.mkfifo, new)
        fails(errno.EROFS, os.symlink, "x", new)
        fails(errno.EROFS, os.link, rig.tap(), new)
        if folder != mnt / "snapshots":
            fails(errno.EROFS, os.mkdir, new)
    for path in (rig.tap(), rig.live(), rig.snapshot("kept"), rig.at("kept")):
        fails(errno.EROFS, os.unlink, path)
        fails(errno.EROFS, os.rename, path, path.parent / "new")
    for path in (mnt / "at" / "kept", mnt / "snapshots" / "latest"):
        fails(errno.EROFS, os.unlink, path)
    fails(errno.EROFS, os.rename, mnt / "snapshots" / "kept", mnt / "at" / "new")
    for path in (mnt / "at", mnt / "tap", rig.at(told.first_ns).parent.resolve()):
        fails(errno.EROFS, os.rmdir, path)
    fails(errno.EPERM, os.chmod, rig.tap(), 0o644)
    fails(errno.EPERM, os.chown, rig.tap(), 1, 1)


# --- snapshots


@pytest.mark.parametrize(
    "name", ["latest", "now", "2026-07-28", "a b", "x" * 65, "é", "disk.img", "-x", "@1", "seq:1", "a~1h", ".hidden"]
)
def test_snapshots_with_bad_names_are_refused(told: Told, name: str) -> None:
    """A name that could be mistaken is EINVAL, or EEXIST where it is one already; no snapshot appears."""
    code = errno.EEXIST if name == "latest" else errno.EINVAL
    fails(code, os.mkdir, told.rig.mnt / "snapshots" / name)
    assert sorted(os.listdir(told.rig.mnt / "snapshots")) == ["kept", "latest"]


def test_snapshots_are_renamed(rig: Rig) -> None:
    """By mv and by the command, with and without a daemon: at once, durably, and for those who have them open."""
    rig.create(size=MIB)
    rig.start()
    folder = rig.mnt / "snapshots"
    for name in ("one", "two"):
        pwrite(rig.tap(), name.encode() * 512, 0)
        (folder / name).mkdir()
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY), opened(folder / "one" / "disk.img", os.O_RDONLY) as image:
        inode = (folder / "one").stat().st_ino
        os.rename(folder / "one", folder / "first")
        assert (folder / "first").stat().st_ino == inode
        assert os.pread(image, 6, 0) == b"oneone"
    fails(errno.ENOENT, (folder / "one").lstat)
    assert rig.snapshot("first").read_bytes()[:6] == b"oneone"
    for target, code in (("two", errno.EEXIST), ("latest", errno.ENOTDIR), ("2026-07-28", errno.EINVAL)):
        fails(code, os.rename, folder / "first", folder / target)
    fails(errno.ENOENT, os.rename, folder / "never", folder / "other")
    fails(errno.EROFS, os.rename, folder / "first", rig.mnt / "clones" / "first")
    assert rig.dmafs("snapshot", "rename", rig.store, "two", "second").stdout == "snapshot two is called second now\n"
    assert sorted(os.listdir(folder)) == ["first", "latest", "second"]
    rig.dmafs("sync", rig.store)
    os.rename(folder / "second", folder / "two")
    rig.kill()
    rig.start()
    assert {"first", "latest", "two"} < set(os.listdir(folder)), "and the mirror of before"
    assert rig.snapshot("two").read_bytes()[:6] == b"twotwo"
    rig.stop()
    rig.dmafs("snapshot", "rename", rig.store, "two", "second")
    rig.dmafs("snapshot", "drop", rig.store, "first")
    assert [one["id"] for one in json.loads(rig.dmafs("snapshot", "list", "--json", rig.store).stdout)["snapshots"]][
        -1
    ] == "second"


def test_snapshots_come_and_go(rig: Rig) -> None:
    """Mkdir takes a snapshot, which is there at once; a second one of the name is EEXIST; rmdir drops it, once."""
    rig.create()
    rig.start()
    folder = rig.mnt / "snapshots"
    fails(errno.ENOENT, (folder / "latest").lstat)
    pwrite(rig.tap(), b"x" * 512, 0)
    (folder / "one").mkdir()
    pwrite(rig.tap(), b"y" * 512, 0)
    fails(errno.EEXIST, os.mkdir, folder / "one")
    assert rig.snapshot("one").read_bytes()[:512] == b"x" * 512
    (folder / "two").mkdir()
    assert os.readlink(folder / "latest") == "two"
    assert (folder / "latest" / "disk.img").samefile(rig.snapshot("two"))
    rig.dmafs("sync", rig.store)
    forget(rig.snapshot("one"))
    assert rig.snapshot("one").read_bytes()[:512] == b"x" * 512
    assert rig.snapshot("two").read_bytes()[:512] == b"y" * 512
    (folder / "two").rmdir()
    assert os.readlink(folder / "latest") == "one"
    fails(errno.ENOENT, (folder / "two").lstat)
    fails(errno.ENOENT, os.rmdir, folder / "two")
    fails(errno.ENOENT, os.rmdir, folder / "never")
    pwrite(rig.tap(), b"z" * 512, 0)
    (folder / "two").mkdir()
    assert rig.snapshot("two").read_bytes()[:512] == b"z" * 512, "the name means the new one"
    assert rig.snapshot("two").samefile(rig.at("two"))


# --- the tap


def test_small_writes_are_captured_exactly(rig: Rig) -> None:
    """Writes of any length at any offset are exact on the tap, live, the primary and in every moment between them."""
    rng = random.Random(SEED)
    rig.create(content=rng.randbytes(MIB))
    rig.start()
    model = bytearray(rig.primary().read_bytes())
    moments: list[tuple[int, bytes]] = []
    cases = [(1, 0), (1, 511), (2, 511), (700, 513), (1, SIZE - 1), (511, 512), (513, 1023), (4097, 4095), (99_999, 77)]
    cases += [(rng.randrange(1, 9000), rng.randrange(SIZE - 9000)) for _ in range(30)]
    for length, offset in cases:
        data = rng.randbytes(length)
        pwrite(rig.tap(), data, offset)
        model[offset : offset + length] = data
        moments.append((moment(), bytes(model)))
        assert pread(rig.live(), length + 20, offset) == model[offset : offset + length + 20]
    for path in (rig.tap(), rig.live(), rig.primary()):
        assert path.read_bytes() == model, path
    for when, expected in moments:
        assert rig.at(when).read_bytes() == expected
        (begin,) = rig.at(when).parents[:1]
        assert os.listdir(begin) == ["disk.img"]


def test_live_follows_the_primary_at_once(rig: Rig) -> None:
    """What a write has put on the disk is in live at the next read, through a descriptor that was open before."""
    rig.create()
    rig.start()
    with rig.live().open("rb", buffering=0) as live, rig.tap().open("r+b", buffering=0) as tap:
        for number in range(200):
            data = number.to_bytes(4, "little") * 1024
            assert os.pwrite(tap.fileno(), data, 8192) == len(data)
            assert os.pread(live.fileno(), len(data), 8192) == data
            assert os.pread(tap.fileno(), len(data), 8192) == data


def test_truncation_leaves_a_disk_as_it_is(rig: Rig) -> None:
    """O_TRUNC changes neither size nor bytes of the tap; other sizes are EINVAL; past the end is ENOSPC."""
    content = random.Random(SEED).randbytes(2 * MIB)
    rig.create(content=content)
    rig.start()
    tap = rig.tap()
    assert tap.read_bytes()[: len(content)] == content
    run("dd", "if=/dev/zero", f"of={tap}", "bs=4096", "count=1")
    content = bytes(4096) + content[4096:]
    assert tap.stat().st_size == SIZE
    assert pread(tap, 100, SIZE - 100) == bytes(100)
    assert tap.read_bytes() == content.ljust(SIZE, b"\0")
    os.truncate(tap, 0)
    assert (tap.stat().st_size, os.stat(tap).st_size) == (SIZE, SIZE)
    assert tap.read_bytes() == content.ljust(SIZE, b"\0")
    os.truncate(tap, SIZE)
    for size in (1, SIZE - 1, SIZE + 1, 2 * SIZE):
        fails(errno.EINVAL, os.truncate, tap, size)
    for offset in (SIZE, SIZE + 4096):
        fails(errno.ENOSPC, pwrite, tap, b"x", offset)
    with tap.open("r+b", buffering=0) as file:
        file.seek(SIZE - 1)
        assert file.write(b"xy") == 1, "what fits is written"
        fails(errno.ENOSPC, file.write, b"y")
    assert tap.stat().st_size == SIZE
    assert pread(rig.live(), 2, SIZE - 1) == b"x"
    assert_same(rig.primary(), rig.live())
    assert rig.tap().read_bytes() == rig.primary().read_bytes()


def test_zeros_and_holes(rig: Rig) -> None:
    """Zeros written over data are zeros in their moment and data before; holes of the primary cost no space."""
    rig.create(size=256 * MIB, content=b"d" * MIB)
    rig.start()
    before = moment()
    pwrite(rig.tap(), bytes(MIB), 0, sync=True)
    zeroed = moment()
    assert pread(rig.at(before), MIB, 0) == b"d" * MIB
    assert pread(rig.at(zeroed), MIB, 0) == bytes(MIB)
    assert pread(rig.live(), MIB, 0) == bytes(MIB)
    (rig.mnt / "snapshots" / "zeroed").mkdir()
    rig.dmafs("sync", rig.store)
    assert pread(rig.snapshot("zeroed"), MIB, 0) == bytes(MIB)
    assert rig.at(before).stat().st_blocks * 512 < 4 * MIB
    used = sum(path.stat().st_blocks * 512 for path in rig.store.rglob("*"))
    assert used < 16 * MIB, "a store of a sparse disk is small"


def test_fallocate_is_not_taken_for_a_write(rig: Rig) -> None:
    """Punching a hole into the tap is refused as not supported, and nothing changes; programs then write zeros."""
    rig.create(content=b"d" * MIB)
    rig.start()
    done = run("fallocate", "-p", "-o", "0", "-l", "4096", rig.tap(), code=None)
    assert done.returncode == 1
    assert "unsupported" in done.stderr
    assert rig.live().read_bytes()[:MIB] == b"d" * MIB
    device = rig.attach(rig.tap())
    run("blkdiscard", "-z", "-o", "0", "-l", "65536", device)
    rig.detach(device)
    assert rig.live().read_bytes()[:MIB] == bytes(65536) + b"d" * (MIB - 65536)
    assert_same(rig.primary(), rig.live())


# --- several volumes


def test_volumes_of_one_store_are_one_moment(rig: Rig) -> None:
    """A folder shows all volumes at one instant, each with its own size; a snapshot takes all of them."""
    rig.create("data", size=4 * MIB)
    rig.create("log", size=8 * MIB)
    rig.start()
    points = []
    for number in range(1, 6):
        pwrite(rig.tap("log"), bytes([number]) * 512, 0)
        between = moment()
        pwrite(rig.tap("data"), bytes([number]) * 512, 0)
        points.append((number, between, moment()))
    (rig.mnt / "snapshots" / "both").mkdir()
    for folder in ("live", "tap", f"at/{spelled(points[2][1])}", "snapshots/both"):
        assert sorted(os.listdir(rig.mnt / folder)) == ["data.img", "log.img"]
        sizes = [(rig.mnt / folder / name).stat().st_size for name in ("data.img", "log.img")]
        assert sizes == [4 * MIB, 8 * MIB]

    def first_bytes(when: int) -> tuple[int, int]:
        return pread(rig.at(when, "data"), 1, 0)[0], pread(rig.at(when, "log"), 1, 0)[0]

    for number, between, after in points:
        assert first_bytes(between) == (number - 1, number)
        assert first_bytes(after) == (number, number)
    fails(errno.ENOENT, rig.at("seq:1", "data").stat)  # another moment in each volume
    pwrite(rig.tap("log"), b"later" * 512, 0)
    rig.dmafs("sync", rig.store)
    for volume in ("data", "log"):
        assert rig.at("both", volume).samefile(rig.snapshot("both", volume))
        assert pread(rig.snapshot("both", volume), 512, 0) == b"\x05" * 512


# --- storm


def random_name(rng: random.Random) -> bytes:
    """Return a name that is nearly, but hardly ever, a point."""
    kind = rng.randrange(4)
    if kind == 0:
        name = rng.randbytes(rng.randrange(1, 255))
    elif kind == 1:
        name = "".join(rng.choices("0123456789-T:.Z+@~seq hmin ago", k=rng.randrange(1, 60))).encode()
    elif kind == 2:
        name = rng.choice(BAD_NAMES).encode(errors="surrogateescape")
    else:
        good = bytearray(rng.choice([b"2026-07-28T143005.123456789Z", b"@1785249005.5", b"seq:12", b"kept~5min"]))
        good[rng.randrange(len(good))] = rng.randrange(1, 256)
        name = bytes(good)
    name = name.replace(b"/", b"_").replace(b"\0", b"_")[:255]
    return name if name not in (b".", b"..") else b"..."


def test_a_storm_of_garbage_ends_nothing(told: Told) -> None:
    """Thousands of random names in random operations get an errno of the file system's, never EIO, and harm nothing."""
    rng = random.Random(SEED)
    mnt = os.fsencode(told.rig.mnt)
    folders = [mnt + part for part in (b"", b"/at", b"/snapshots", b"/tap", b"/live", b"/at/kept", b"/snapshots/kept")]
    operations: list[Callable[[bytes], object]] = [
        os.lstat,
        os.stat,
        os.listdir,
        os.readlink,
        os.unlink,
        os.rmdir,
        lambda path: os.open(path, os.O_RDWR),
        lambda path: os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        lambda path: os.rename(path, path + b"x"),
        lambda path: os.symlink(path, path),
        lambda path: os.truncate(path, 1),
        lambda path: os.getxattr(path, b"user.dmafs.seq"),
        lambda path: os.stat(path + b"/disk.img"),
    ]
    usual = {errno.ENOENT, errno.EROFS, errno.EINVAL, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.EEXIST}
    seen: set[int] = set()
    for _ in range(6000):
        path = rng.choice(folders) + b"/" + random_name(rng)
        try:
            rng.choice(operations)(path)
        except OSError as error:
            seen.add(error.errno or 0)
    assert errno.ENOENT in seen
    assert seen <= usual, {errno.errorcode[number] for number in seen}
    assert told.rig.status()["state"] == "protected"
    assert sorted(os.listdir(told.rig.mnt / "snapshots")) == ["kept", "latest"]
    forget(told.rig.snapshot("kept"))
    assert told.rig.snapshot("kept").read_bytes() == told.kept


def test_past_images_stay_in_the_page_cache(told: Told) -> None:
    """A second reader of a past image is served by the kernel, whichever way it comes."""
    rig = told.rig
    image = rig.at(told.first_ns)
    assert image.read_bytes() == told.first

    def cached() -> int:
        return int(run("fincore", "--noheadings", "--bytes", "--output", "RES", image).stdout)

    assert cached() == SIZE
    forget(image)
    rig.at(spelled(told.first_ns)).read_bytes()
    wait_until(lambda: cached() == SIZE, "the image in the page cache", seconds=5)
