"""A log-writes target over a file, in this process: what ``MappedTap`` has of the kernel, with real logs.

As the kernel's: a write is on the primary at once; a plain one comes into the log with the next flush, a FUA write and
a mark right away; a log never wraps, and when it is full logging stops for good while everything else goes on.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from dmafs.core.ondisk import LOG_DIRECTORY
from dmafs.core.storage import RealFile
from dmafs.errors import SourceBusyError, TapBusyError, TapError
from dmafs.taps import mapped
from dmafs.taps.logformat import END_MARK, LogFlag, Super
from dmafs.taps.mapped import Lsn, TapStatus, first_of, log_paths
from dmafs.units import SECTOR
from tests.logs import FLUSH, Logged, discard, mark, write


class PlainFile(RealFile):
    """A file where a block device is expected."""

    grain = SECTOR


def open_plainly(path: Path) -> PlainFile:
    """Open a file where a block device is expected."""
    return PlainFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path))


class Kernel:
    """The primary, and the device over it while it is attached; stands for ``MappedTap`` itself."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.disk = bytearray(source.read_bytes())
        self.device: Target | None = None
        self.busy = False
        """Whether the source is in use, so that nothing can be attached."""
        self.entries: list[Logged] = []
        """All that was ever logged, whatever became of the log."""
        self.lock = threading.RLock()
        self._unflushed: list[Logged] = []

    # -- what MappedTap's class methods are

    def attach(self, directory: Path, *, log_bytes: int, first: Lsn, **_identity: Any) -> Target:
        assert self.device is None
        if self.busy:
            raise SourceBusyError(f"source {self.source} is in use")
        self.device = Target(self, directory, log_bytes, first)
        return self.device

    def find(self, directory: Path, **_identity: Any) -> Target | None:
        if self.device is not None:
            for path in log_paths(directory):
                assert path.name <= self.device.log.name
        return self.device

    # -- what whoever uses the device does

    def write(self, sector: int, data: bytes, *, fua: bool = False, logged: bool = True) -> None:
        """Write; *logged* is false for what goes past the device."""
        with self.lock:
            self._store(sector, data)
            if logged:
                self._enter(write(sector, data, LogFlag.FUA if fua else 0))

    def discard(self, sector: int, sectors: int) -> None:
        with self.lock:
            self._store(sector, bytes(sectors * SECTOR))
            self._enter(discard(sector, sectors))

    def flush(self) -> None:
        with self.lock:
            for entry in [*self._unflushed, FLUSH]:
                self.log(entry)
            self._unflushed.clear()

    def _store(self, sector: int, data: bytes) -> None:
        self.disk[sector * SECTOR : sector * SECTOR + len(data)] = data
        with self.source.open("r+b") as file:
            file.seek(sector * SECTOR)
            file.write(data)

    def _enter(self, entry: Logged) -> None:
        if self.device is not None:
            self.device.written += entry.sectors
        if entry.flags & LogFlag.FUA:
            self.log(entry)
        else:
            self._unflushed.append(entry)

    def log(self, entry: Logged) -> None:
        if self.device is not None:
            self.device.append(entry)


class Target:
    """The device."""

    discards = True
    sector_bytes = SECTOR

    def __init__(self, kernel: Kernel, directory: Path, log_bytes: int, first: Lsn) -> None:
        self.node = kernel.source
        self.log_bytes = log_bytes
        self.written = 0
        self.marks: list[str] = []
        self.punched: list[int] = []
        self.users = 0
        self.held = threading.Event()
        """Cleared while a flush of the device takes a long time."""
        self.held.set()
        self.fails = ""
        """Why a flush of the device fails."""
        self.damages = False
        """Whether the next entry of a flush is damaged on its way to the log."""
        self._kernel = kernel
        self.asked = 0
        self._known: int | None = None
        self._directory = directory
        self._begin(first)

    def _begin(self, first: Lsn) -> None:
        self.log = mapped._make_log(self._directory / LOG_DIRECTORY, first, self.log_bytes)
        self.disabled = False
        self._next, self._entries = SECTOR, 0

    def append(self, entry: Logged) -> None:
        """Log an entry, if there is space."""
        data = entry.encode(SECTOR)
        if self.damages and entry.flags & LogFlag.FLUSH:
            self.damages = False
            data = b"\xff" * 32 + data[32:]
        if self.disabled or self._next + len(data) > self.log.stat().st_size:
            self.disabled = True
            return
        self._kernel.entries.append(entry)
        with self.log.open("r+b") as file:
            file.seek(self._next)
            file.write(data)
            self._next += len(data)
            self._entries += 1
            if entry.flags & (LogFlag.FUA | LogFlag.MARK):
                file.seek(0)
                file.write(Super(self._entries).encode())

    # -- what MappedTap has

    def status(self) -> TapStatus:
        with self._kernel.lock:
            if self._kernel.device is not self:
                raise TapError("no log-writes device any more")
            limit = self.log.stat().st_size // SECTOR
            return TapStatus(self._entries, self._next // SECTOR, limit, self.disabled, self.users)

    def has_stopped_logging(self) -> bool:
        with self._kernel.lock:
            return self._kernel.device is self and self.disabled

    def has_written(self) -> bool:
        before, self._known = self._known, self.written
        self.asked += 1
        return before != self.written

    def fsync(self) -> None:
        assert self.held.wait(10)
        if self.fails:
            raise TapError(self.fails)
        self._kernel.flush()

    def mark(self, text: str) -> None:
        assert mapped._MARK.fullmatch(text), text
        with self._kernel.lock:
            self.marks.append(text)
            self.append(mark(text))

    def rotate(self, first: Lsn) -> Path:
        with self._kernel.lock:
            assert first >= first_of(self.log) + self.log.stat().st_size // SECTOR
            self.append(mark(END_MARK))
            self._begin(first)
            return self.log

    def detach(self) -> None:
        if self.users:
            raise TapBusyError("the device is in use")
        with self._kernel.lock:
            self._kernel.flush()
            self.append(mark(END_MARK))
            self._kernel.device = None

    def close(self) -> None:
        """Nothing of it is ours."""
