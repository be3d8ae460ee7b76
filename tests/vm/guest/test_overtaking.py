"""Claims about FUA writes that overtake plain ones in the log: what the disk has is what images show."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.mount.harness import MIB, opened, run
from tests.vm.guest.naive import FUA, Disk, differing, read
from tests.vm.guest.rig import NODE, TapRig

SIZE: Final = 96 * MIB
PAGE: Final = mmap.PAGESIZE
MAKE: Final = {
    "ext4": ("-N", "4096", "-J", "size=8"),
    "xfs": ("--unsupported", "-d", "agcount=2", "-l", "size=8m"),  # smaller than mkfs.xfs would have it
}
ROUNDS: Final = 60
EACH: Final = 20


@pytest.fixture(scope="module")
def overtaken() -> Iterator[TapRig]:
    """A rig for the tests of overtaking writes, one after the other."""
    with TapRig(keeps_logs=True) as rig:
        rig.protect(SIZE)
        yield rig
        rig.assert_verified()
        rig.stop()
        rig.detach_tap()


def content(number: int, what: str) -> bytes:
    """Return a page."""
    return f"{number} {what}".encode().ljust(64, b".") * (PAGE // 64)


def overwrite(path: Path, numbers: range) -> None:
    """Write pages directly, and write them again; then flush.

    Of the even ones the second write is a FUA write, which comes into the log before the first, that waits for a flush.
    Of the odd ones the first is: there the order of the log is right.
    """
    page = mmap.mmap(-1, PAGE)
    with (
        opened(path, os.O_WRONLY | os.O_DIRECT) as plain,
        opened(path, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC) as fua,
    ):
        for number in numbers:
            descriptors = (plain, fua) if number % 2 == 0 else (fua, plain)
            for descriptor, what in zip(descriptors, ("old", "new"), strict=True):
                page[:] = content(number, what)
                assert os.pwrite(descriptor, page, number * PAGE) == PAGE
        os.fsync(plain)


def overwrite_in_rounds(rig: TapRig, name: str, path: Path) -> list[str]:
    """Do so in rounds with marks behind; return those."""
    marks = []
    for begin in range(0, ROUNDS, EACH):
        overwrite(path, range(begin, begin + EACH))
        marks.append(f"{name}{begin + EACH}")
        rig.mark(marks[-1])
    return marks


def assert_new(file: Path, count: int) -> None:
    """Assert that the first pages of a file are the new ones."""
    with file.open("rb") as opened_file:
        for number in range(count):
            assert opened_file.read(PAGE) == content(number, "new"), (file, number)


def assert_the_log_misleads(rig: TapRig, mark: str) -> None:
    """Assert that a naive replay up to a mark brings old pages back, and that the newest image is the primary."""
    disk = Disk(SIZE)
    for entry in read(rig.logs()[-1]):
        disk.apply(entry)
    wrong = differing(rig.at(mark).read_bytes(), disk.image)
    assert wrong.any(), "the log's order is right"
    assert not (wrong & ~disk.doubtful).any()
    pages = {bytes(disk.image[n * 512 : (n + 1) * 512]) for n in wrong.nonzero()[0].tolist()}
    assert pages <= {content(number, "old")[:512] for number in range(0, ROUNDS, 2)}, "old pages and nothing else"
    assert any(entry.flags & FUA for entry in read(rig.logs()[-1]))
    print(f"{mark}: {wrong.sum()} sectors are wrong in the log")
    copy = rig.copy_primary("primary.copy")
    assert not differing(copy.read_bytes(), rig.live().read_bytes()).any()


def test_overtaking_writes_to_the_device(overtaken: TapRig) -> None:
    """Pages of the raw device that a direct O_DSYNC write wins over a direct write are right at each mark."""
    marks = overwrite_in_rounds(overtaken, "raw", NODE)
    for number, mark in enumerate(marks, 1):
        assert_new(overtaken.at(mark), number * EACH)
    assert_new(overtaken.live(), ROUNDS)
    assert_the_log_misleads(overtaken, marks[-1])


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_overtaking_writes_to_a_file(overtaken: TapRig, kind: str) -> None:
    """So are those of a file."""
    overtaken.make(kind, *MAKE[kind], *(("-f",) if kind == "xfs" else ("-F",)))
    with overtaken.mounted() as files:
        path = files / "file"
        path.write_bytes(bytes(ROUNDS * PAGE))  # else a direct write would have to change the file system as well
        run("sync", path)
        marks = overwrite_in_rounds(overtaken, kind, path)
        assert_the_log_misleads(overtaken, marks[-1])
    for number, mark in enumerate(marks, 1):
        with overtaken.clone(mark) as device, overtaken.replayed(kind, device) as folder:
            assert_new(folder / "file", number * EACH)
    overtaken.mark(f"{kind}-end")
    with overtaken.clone(f"{kind}-end") as device, overtaken.replayed(kind, device) as folder:
        assert_new(folder / "file", ROUNDS)
