"""Claims about what the dm tap captures under load: file systems, databases and raw blocks, at every kind of moment.

The daemons here let go of no log, so that a reader that knows nothing of dmafs can replay all of it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from tests.mount.harness import MIB, run, wait_until
from tests.vm.guest.naive import DISCARD, Disk, differing, read
from tests.vm.guest.rig import TapRig

SIZE: Final = 96 * MIB
MOMENTS: Final = 5
"""Of each file system, with a copy of the primary."""
BOUNDARIES: Final = {"ext4": 208, "xfs": 96}
"""So many are looked at of each file system."""
STRETCH: Final = 16
"""So many of them one behind the other."""
MAKE: Final = {
    "ext4": ("-N", "4096", "-J", "size=8"),
    "xfs": ("--unsupported", "-d", "agcount=2", "-l", "size=8m"),  # smaller than mkfs.xfs would have it
}
JOURNAL: Final = {"ext4": "delete", "xfs": "wal"}
LOGS: Final = 'log_size = "64MiB"\n'
"""The device gets a new log when one is half full, so there are several."""
TREE: Final = Path(__file__).parents[3]


# --- the load


class Database(threading.Thread):
    """Commits one row after the other, until it is stopped."""

    def __init__(self, path: Path, journal: str) -> None:
        super().__init__()
        self.committed = 0
        self.stopped = threading.Event()
        self.failed = False
        self._command = [sys.executable, "-m", "tests.vm.guest.committer", str(path), journal]

    def run(self) -> None:
        with subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            while not self.stopped.is_set() and not self.failed:
                process.stdin.write("\n")
                process.stdin.flush()
                self.failed = process.stdout.readline() != f"{self.committed + 1}\n"
                self.committed += not self.failed
                time.sleep(0.01)  # one processor is all there is
            process.stdin.close()

    def wait_for(self, more: int) -> int:
        """Wait until so many more rows are committed; return how many there are."""
        wanted = self.committed + more
        wait_until(lambda: self.failed or self.committed >= wanted, f"{more} more rows")
        assert not self.failed
        return self.committed


def fio(files: Path) -> None:
    """Write, flush, and read what was written, with and without the page cache; fio verifies it."""
    run(
        *("fio", "--thread", f"--directory={files}", "--rw=randwrite", "--size=6m", "--loops=2", "--verify=crc32c"),
        *("--name=direct", "--direct=1", "--bs=4k", "--fsync=64"),
        *("--name=buffered", "--bs=512-32k", "--bs_unaligned", "--fsync=32", "--loops=3"),
    )


def trees(files: Path) -> None:
    """Unpack a tree, put it into a repository, pack that, and remove the tree."""
    run("tar", "-C", TREE, "-cf", files / "tree.tar", "dmafs", "man", "README.md")
    tree = files / "tree"
    tree.mkdir()
    run("tar", "-C", tree, "-xf", files / "tree.tar")
    git = ("git", "-C", tree, "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "core.fsync=added,index")
    run(*git, "init", "-q")
    run(*git, "add", "dmafs/core", "man")
    run(*git, "commit", "-qm", "some")
    run(*git, "add", ".")
    run(*git, "commit", "-qm", "all")
    run(*git, "gc", "-q")
    run("rm", "-r", tree / "dmafs")
    run("fstrim", files)
    run(*git, "checkout", "-qf", ".")
    run(*git, "fsck", "--full")


@dataclass
class Loaded:
    """A file system that was under load, and what is known of its moments."""

    kind: str
    rig: TapRig
    copies: dict[str, Path] = field(default_factory=dict)
    """Of the primary, by mark."""
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    """How many rows were committed before a mark, and how many after it, by mark."""
    begun_ns: int = 0
    """The file system is made since then."""


def load(kind: str, rig: TapRig) -> Loaded:
    """Make a file system and put it under load; set marks meanwhile, half of them while it is frozen."""
    rig.protect(SIZE, configuration=LOGS)
    rig.make(kind, *MAKE[kind])
    with rig.mounted() as files:
        run("sync", "-f", files)
        rig.mark("made")
        found = Loaded(kind, rig, begun_ns=time.time_ns())
        database = Database(files / "database", JOURNAL[kind])
        works = [Work(fio, files), Work(trees, files)]
        for thread in (database, *works):
            thread.start()
        try:
            for number in range(MOMENTS):
                frozen_moment(found, files, database, f"frozen{number}")
                moving_moment(found, database, f"moving{number}")
            for work in works:
                work.done()
        finally:
            database.stopped.set()
            for thread in (database, *works):
                thread.join()
        assert not database.failed
    rig.mark("end")
    return found


class Work(threading.Thread):
    """A part of the load."""

    def __init__(self, work: Callable[[Path], None], files: Path) -> None:
        super().__init__()
        self._work = work
        self._files = files
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work(self._files)
        except BaseException as error:  # noqa: BLE001 - done() raises it
            self._error = error

    def done(self) -> None:
        """Wait until it is done."""
        self.join()
        if self._error is not None:
            raise self._error


def frozen_moment(found: Loaded, files: Path, database: Database, mark: str) -> None:
    database.wait_for(5)
    with found.rig.frozen(files):
        before = database.committed
        found.rig.mark(mark)
        found.copies[mark] = found.rig.copy_primary(f"{mark}.copy")
    found.rows[mark] = before, before + 1  # the commit that waited may have been on the disk


def moving_moment(found: Loaded, database: Database, mark: str) -> None:
    before = database.wait_for(5)
    found.rig.mark(mark)
    found.rows[mark] = before, database.committed + 1


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def loaded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    """A file system after its load, with the daemon still there."""
    with TapRig(keeps_logs=True) as rig:
        yield load(request.param, rig)
        rig.assert_verified()
        rig.stop()
        rig.detach_tap()


# --- claims


def test_frozen_moments_are_the_primarys(loaded: Loaded) -> None:
    """Five moments under load are byte for byte what the primary held when the file system was frozen there."""
    assert len(loaded.copies) == MOMENTS
    contents = {copy.read_bytes() for copy in loaded.copies.values()}
    assert len(contents) == MOMENTS, "they differ"
    for mark, copy in loaded.copies.items():
        found = differing(loaded.rig.at(mark).read_bytes(), copy.read_bytes())
        assert not found.any(), f"{mark}: {found.sum()} sectors"


def test_a_naive_replay_of_the_logs_agrees_at_each_mark(loaded: Loaded) -> None:
    """Replaying the logs entry by entry gives the image at each mark; where it doesn't, a FUA write was overtaking.

    That such an image is right there, others claim: it is the primary's while frozen.
    """
    logs = loaded.rig.logs()
    assert len(logs) > 1, "there was a rotation"
    disk, seen, corrected, discards = Disk(SIZE), [], 0, 0
    for entry in (entry for log in logs for entry in read(log)):
        disk.apply(entry)
        discards += entry.flags & DISCARD > 0
        mark = entry.text.rpartition(":")[2]
        if mark in {*loaded.rows, "end"}:
            seen.append(mark)
            wrong = differing(loaded.rig.at(mark).read_bytes(), disk.image)
            assert not (wrong & ~disk.doubtful).any(), f"{mark}: {(wrong & ~disk.doubtful).sum()} sectors"
            corrected += int(wrong.sum())
    assert seen == [*loaded.rows, "end"], seen
    assert discards
    print(f"{loaded.kind}: {len(logs)} logs, {len(seen)} marks, {discards} discards, {corrected} sectors corrected")


def test_the_file_system_at_each_flush_boundary_is_clean(loaded: Loaded) -> None:
    """A clone of each of so many flush boundaries, its journal replayed by the kernel, is a clean file system."""
    times = [time_ns for _, time_ns in loaded.rig.boundaries() if time_ns > loaded.begun_ns]
    wanted = BOUNDARIES[loaded.kind]
    count = wanted // STRETCH
    assert len(times) >= wanted
    gap = (len(times) - STRETCH) / (count - 1)
    chosen = [time_ns for n in range(count) for time_ns in times[round(n * gap) :][:STRETCH]]
    assert len(set(chosen)) == wanted
    begun = time.perf_counter()
    for time_ns in chosen:
        with loaded.rig.clone(time_ns) as device:
            with loaded.rig.replayed(loaded.kind, device):
                pass
            loaded.rig.fsck(loaded.kind, device)
    print(f"{loaded.kind}: {wanted} of {len(times)} boundaries in {time.perf_counter() - begun:.0f} s")


def test_a_database_at_each_mark_is_whole(loaded: Loaded) -> None:
    """Mounted from a clone of a mark, it passes its check, and has all rows committed before and none from later."""
    assert len(loaded.rows) == 2 * MOMENTS
    for mark, (least, most) in loaded.rows.items():
        with (
            loaded.rig.clone(mark) as device,
            loaded.rig.replayed(loaded.kind, device) as folder,
            contextlib.closing(sqlite3.connect(folder / "database")) as database,
        ):
            assert database.execute("pragma integrity_check").fetchall() == [("ok",)], mark
            count, last = database.execute("select count(*), max(id) from rows").fetchone()
            assert least <= count == last <= most, mark
