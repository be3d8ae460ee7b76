"""Load for a daemon that is going to be killed: each writer knows what was acknowledged to it and so has to be there.

A writer stamps what it writes with a place and a version. Of each place it knows the version that the last fsync which
has returned covers (*acknowledged*), and the one that it has tried to write last (*attempted*): what is found has to be
one of them or between, whole. What was found after a restart counts as acknowledged from then on.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

from tests.mount.harness import wait_until

BLOCK: Final = 4096
BLOCKS: Final = 512
"""Of each writer to the tap."""
SLOTS: Final = 16
"""Files of each writer to the file system."""
GONE: Final = frozenset({errno.EIO, errno.ENOTCONN, errno.ECONNABORTED, errno.EROFS})
"""What the kernel answers when the daemon has been killed; a file system whose journal has failed is read-only."""
ENDED_S: Final = 30.0


class Load(threading.Thread, ABC):
    """Something that goes on until the daemon is gone; it must then end by itself, with an error, in time."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.rounds = 0
        """How many were acknowledged."""
        self._gone: OSError | None = None
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except OSError as error:
            self._gone = error
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self._failure = error

    @abstractmethod
    def work(self) -> None:
        """Go on until the kernel answers with an error."""

    def wait_begun(self) -> None:
        wait_until(lambda: self.rounds or not self.is_alive(), f"the first round of {self.name}")
        assert self.is_alive(), (self._gone, self._failure)

    def assert_gone(self) -> None:
        """Assert that it has ended with an error of the kernel's, and doesn't hang."""
        self.join(ENDED_S)
        assert not self.is_alive(), f"{self.name} hangs"
        assert self._failure is None, self._failure
        assert self._gone is not None, f"{self.name} ended by itself"
        assert self._gone.errno in GONE, self._gone


class Versions:
    """What is known of some places; it outlives the loads that fill it."""

    def __init__(self) -> None:
        self.acknowledged: dict[int, int] = {}
        self.attempted: dict[int, int] = {}

    def next(self, place: int) -> int:
        """Return the version with which a place is written now."""
        self.attempted[place] = version = self.attempted.get(place, 0) + 1
        return version

    def found(self, place: int, version: int) -> None:
        """Assert that a version is one that may be there."""
        least, most = self.acknowledged.get(place, 0), self.attempted.get(place, 0)
        assert least <= version <= most, f"place {place} has version {version}, not {least} to {most}"
        self.acknowledged[place] = version


def stamped(number: int, version: int) -> bytes:
    return (f"block {number} version {version} ".encode() * 256)[:BLOCK]


class BlockWriter(Load):
    """Writes runs of blocks in an area of its own of the tap, and flushes every few runs."""

    def __init__(self, path: Path, versions: Versions, *, first: int, rng: random.Random) -> None:
        super().__init__(f"writer of blocks from {first} on")
        self._path, self._versions, self._first, self._rng = path, versions, first, rng

    def work(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            while True:
                written: dict[int, int] = {}
                for _ in range(self._rng.randint(1, 6)):
                    begin, count = self._rng.randrange(BLOCKS), self._rng.randint(1, 8)
                    run = [self._first + at for at in range(begin, min(begin + count, BLOCKS))]
                    written |= {number: self._versions.next(number) for number in run}
                    data = b"".join(stamped(number, written[number]) for number in run)
                    assert os.pwrite(fd, data, run[0] * BLOCK) == len(data)
                os.fsync(fd)
                self._versions.acknowledged |= written
                self.rounds += 1
        finally:
            os.close(fd)


def check_blocks(path: Path, versions: Versions) -> None:
    """Assert that all places that were ever written are as they may be in a file."""
    with path.open("rb") as file:
        for number in list(versions.attempted):
            data = os.pread(file.fileno(), BLOCK, number * BLOCK)
            version = int(data.split(maxsplit=4)[3]) if data.startswith(b"block ") else 0
            assert data == (stamped(number, version) if version else bytes(BLOCK)), f"block {number} of {path} is torn"
            versions.found(number, version)


def content(place: int, version: int) -> bytes:
    rng = random.Random(place << 32 | version)
    return f"file {place} version {version} ".encode() + rng.randbytes(rng.randint(BLOCK, 8 * BLOCK))


class FileWriter(Load):
    """Replaces files of a file system, each durably, as programs do that care: a new one, fsync, rename, fsync."""

    def __init__(self, folder: Path, versions: Versions, *, first: int, rng: random.Random) -> None:
        super().__init__(f"writer of files from {first} on")
        self._folder, self._versions, self._first, self._rng = folder, versions, first, rng

    def work(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        new = f"{self._first}.new"
        try:
            while True:
                place = self._first + self._rng.randrange(SLOTS)
                version = self._versions.next(place)
                fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, dir_fd=folder)
                try:
                    data = content(place, version)
                    assert os.write(fd, data) == len(data)
                    os.fsync(fd)
                finally:
                    os.close(fd)
                os.rename(new, str(place), src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
                self._versions.acknowledged[place] = version
                self.rounds += 1
        finally:
            os.close(folder)


def check_files(folder: Path, versions: Versions) -> None:
    """Assert that all files that were ever written are as they may be in a folder."""
    for place in list(versions.attempted):
        path = folder / str(place)
        data = path.read_bytes() if path.exists() else b""
        version = int(data.split(maxsplit=4)[3]) if data else 0
        assert data == (content(place, version) if version else b""), f"file {path} is torn"
        versions.found(place, version)


class Reader(Load):
    """Reads a file past the page cache, again and again; the bytes have to stay what they are."""

    def __init__(self, path: Path, expected: bytes) -> None:
        super().__init__(f"reader of {path}")
        self._path, self._expected = path, expected

    def work(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, len(self._expected)) as buffer:
                while True:
                    assert os.preadv(fd, [buffer], 0) == len(self._expected)
                    assert buffer[:] == self._expected, f"{self._path} has changed"
                    self.rounds += 1
        finally:
            os.close(fd)


class SnapshotTaker(Load):
    """Takes snapshots and drops the older ones, so that a kill may come in the midst of either."""

    def __init__(self, folder: Path, prefix: str) -> None:
        super().__init__("taker of snapshots")
        self._folder, self._prefix = folder, prefix

    def work(self) -> None:
        while True:
            (self._folder / f"{self._prefix}-{self.rounds}").mkdir()
            self.rounds += 1
            if self.rounds > 2:
                os.rmdir(self._folder / f"{self._prefix}-{self.rounds - 3}")
