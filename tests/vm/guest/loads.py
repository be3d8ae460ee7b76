"""What writes to a mapped device in tests of what may go wrong, and knows what has to be there afterwards."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.mount.harness import wait_until

BLOCK: Final = 4096
RUN_MAX: Final = 8
"""Blocks of one write."""
RECORD: Final = 16
PAUSE_S: Final = 0.03
"""Between two records: a commit of a file system is some windows of the log."""


class Load(threading.Thread):
    """Something that goes on until its end as a context manager; what went wrong in it is raised there."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ending = threading.Event()
        self._failure: BaseException | None = None

    def step(self) -> None:
        """Do a bit."""
        raise NotImplementedError

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                self.step()
        except BaseException as error:  # noqa: BLE001 - raised in the thread of the test
            self._failure = error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self.join(60)
        assert not self.is_alive(), "the load hangs"
        if self._failure is not None and error is None:
            raise self._failure


class Blocks(Load):
    """Writes random runs of blocks, past the page cache, one after the other, so that it knows what the device holds.

    One in four is a FUA write, most go to few places again and again, and after each sixteenth everything is flushed.
    """

    def __init__(
        self, node: Path, content: bytes | bytearray | int, *, seed: int, begin: int = 0, pause_s: float = 0.005
    ) -> None:
        """Write from byte *begin* on; the device holds *content*, or so many zeros. Pause after each write."""
        super().__init__()
        self.content = bytearray(content)
        """What the device holds, at rest."""
        self.count = 0
        self.durations: list[tuple[float, float]] = []
        """When each write began, by the monotonic clock, and how long it took."""
        self._begin = begin
        self._pause_s = pause_s
        self._random = random.Random(seed)
        self._page = mmap.mmap(-1, RUN_MAX * BLOCK)
        self._plain = os.open(node, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._fua = os.open(node, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC | os.O_CLOEXEC)
        self._lock = threading.Lock()

    def step(self) -> None:
        with self._lock:
            self.write()
        time.sleep(self._pause_s)

    def write(self) -> None:
        blocks = (len(self.content) - self._begin) // BLOCK
        length = self._random.randint(1, RUN_MAX)
        most = min(blocks, 256) if self._random.random() < 0.75 else blocks
        offset = self._begin + self._random.randrange(most - length) * BLOCK
        data = self._random.randbytes(16) * (BLOCK // 16) * length
        self._page[: len(data)] = data
        fd = self._fua if self._random.random() < 0.25 else self._plain
        begun = time.monotonic()
        with memoryview(self._page)[: len(data)] as view:
            assert os.pwrite(fd, view, offset) == len(data)
        self.durations.append((begun, time.monotonic() - begun))
        self.content[offset : offset + len(data)] = data
        self.count += 1
        if self.count % 16 == 0:
            os.fsync(self._plain)

    def wait_for(self, more: int) -> None:
        """Wait until so many more writes are done."""
        count = self.count
        wait_until(lambda: self.count >= count + more or self._failure, "the load to go on")

    def burst(self, goes_on: Callable[[], bool]) -> None:
        """Write at full speed, some MiB at least, for as long as that holds."""
        length = 1 << 20
        page = mmap.mmap(-1, length)
        with self._lock:
            for number in itertools.count():
                if number % 4 == 0 and not goes_on():
                    return
                offset = number * length % (len(self.content) // length * length)
                if offset < self._begin:
                    continue
                page[:] = self._random.randbytes(16) * (length // 16)
                assert os.pwrite(self._plain, page, offset) == length
                os.fsync(self._plain)
                self.content[offset : offset + length] = page

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[bytes]:
        """Have no write be under way; yields what the device holds."""
        with self._lock:
            yield bytes(self.content)

    def longest_s(self, begin: float, end: float) -> float:
        """Return the longest that a write took which began between two times of the monotonic clock."""
        return max((took for begun, took in self.durations if begin <= begun < end), default=0.0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        os.close(self._plain)
        os.close(self._fua)


class Ledger(Load):
    """Appends numbered records to a file, has each be durable, and only then counts it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.acknowledged = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def step(self) -> None:
        os.write(self._fd, record(self.acknowledged + 1))
        os.fsync(self._fd)
        self.acknowledged += 1
        time.sleep(PAUSE_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        os.close(self._fd)


def record(number: int) -> bytes:
    return b"%015d\n" % number


def recorded(path: Path) -> int:
    """Return how many records a ledger has; AssertionError unless they are the first ones, whole and in order."""
    content = path.read_bytes()
    count = len(content) // RECORD
    assert content == b"".join(record(number) for number in range(1, count + 1)), f"a ledger is damaged: {path}"
    return count


@contextlib.contextmanager
def churn(folder: Path) -> Iterator[None]:
    """Have fio overwrite a file, with fsyncs, at a rate that leaves the daemon time to start."""
    fio = subprocess.Popen(
        [
            "fio", "--name=churn", f"--directory={folder}", "--rw=randwrite", "--bsrange=4k-64k", "--size=16m",
            "--fsync=8", "--rate_iops=150", "--ioengine=psync", "--time_based", "--runtime=600",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield
        assert fio.poll() is None, "fio has ended"
    finally:
        fio.terminate()
        fio.wait(60)
