"""A writer of logs in dm-log-writes format, and a naive reader: what the tests compare the real one with."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from dmafs.core.storage import RealFile
from dmafs.taps.logformat import Entry, LogFlag, Super, encode_mark
from dmafs.units import SECTOR

DISK_SECTORS = 1 << 14
"""The size of the tests' disk."""


class MemoryFile(RealFile):
    """A log in memory. Counts the bytes read."""

    def __init__(self, content: bytes = b"", name: str = "a.log") -> None:
        super().__init__(os.memfd_create(name), name)
        self.read = 0
        if content:
            self.write([content], 0)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See ``File``."""
        self.read += len(buffer)
        super().read_into(buffer, offset)

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class Logged:
    """One entry as a test wants it; numbers in log sectors."""

    sector: int = 0
    sectors: int = 0
    flags: int = 0
    data: bytes = field(default=b"", repr=False)
    mark: str = ""

    def encode(self, sector_bytes: int, *, data_bytes: int = 0) -> bytes:
        """Return header and data."""
        if self.flags & LogFlag.MARK:
            return encode_mark(self.mark, sector_bytes)
        header = Entry(self.sector, self.sectors, self.flags, data_bytes).encode()
        return header.ljust(sector_bytes, b"\0") + self.data


def write(sector: int, data: bytes, flags: int = 0, *, sector_bytes: int = SECTOR) -> Logged:
    """Return a write."""
    assert len(data) % sector_bytes == 0
    return Logged(sector, len(data) // sector_bytes, flags, data)


def discard(sector: int, sectors: int, flags: int = 0) -> Logged:
    """Return a discard."""
    return Logged(sector, sectors, flags | LogFlag.DISCARD)


def mark(text: str) -> Logged:
    """Return a mark."""
    return Logged(flags=LogFlag.MARK, mark=text)


FLUSH = Logged(flags=LogFlag.FLUSH)


def log_of(entries: list[Logged], *, sector_bytes: int = SECTOR, counted: int | None = None, tail: int = 0) -> bytes:
    """Return a whole log; the super block counts all entries, or so many; *tail* log sectors of zeros follow."""
    body = b"".join(entry.encode(sector_bytes) for entry in entries)
    count = len(entries) if counted is None else counted
    return Super(count, sector_bytes).encode() + body + bytes(tail * sector_bytes)


def replay(entries: list[Logged], disk: bytearray, *, sector_bytes: int = SECTOR) -> bytearray:
    """Do to a disk what the entries say."""
    for entry in entries:
        begin, length = entry.sector * sector_bytes, entry.sectors * sector_bytes
        if length:
            disk[begin : begin + length] = bytes(length) if entry.flags & LogFlag.DISCARD else entry.data
    return disk
