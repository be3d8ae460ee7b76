"""A reader of dm-log-writes logs for tests: it trusts a log, and knows nothing of dmafs."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

MAGIC: Final = 0x6A736677736872
SECTOR: Final = 512
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8


@dataclass(frozen=True)
class Entry:
    """Positions are in bytes here; the log counts sectors of the size that its super block says."""

    begin: int
    length: int
    flags: int
    data: bytes

    @property
    def text(self) -> str:
        """The text of a mark."""
        return self.data.split(b"\0", 1)[0].decode() if self.flags & MARK else ""


def read(path: Path) -> Iterator[Entry]:
    """Yield all entries that a log's super block counts: of a closed log, or one whose last entry is a mark, all."""
    with path.open("rb") as file:
        magic, version, count, block = struct.unpack_from("<QQQI", file.read(4096))
        assert (magic, version) == (MAGIC, 1), path
        file.seek(block)
        for _ in range(count):
            header = file.read(block)
            sector, sectors, flags, text = struct.unpack_from("<QQQQ", header)
            begin, length = sector * block, sectors * block
            if flags & MARK:
                yield Entry(0, 0, flags, header[32:][:text])
            else:
                data = b"" if flags & DISCARD else file.read(length)
                assert flags & DISCARD or len(data) == length, path
                yield Entry(begin, length, flags, data)


def entries(path: Path) -> list[Entry]:
    """Return all of them."""
    return list(read(path))


def replay(image: bytearray, log: Iterable[Entry]) -> None:
    """Do what the entries say."""
    for entry in log:
        if entry.flags & DISCARD:
            image[entry.begin : entry.begin + entry.length] = bytes(entry.length)
        elif not entry.flags & MARK:
            image[entry.begin : entry.begin + entry.length] = entry.data


class Disk:
    """A disk of zeros to which logs are replayed; it knows where the order of a log can't be relied on.

    A plain write that was complete before a FUA write is logged by the flush that comes next, or one that began after
    that. So it is behind the FUA write, and OVERTAKEN flushes later at most.
    """

    OVERTAKEN: Final = 4

    def __init__(self, size: int) -> None:
        self.image = bytearray(size)
        self.doubtful = np.zeros(size // SECTOR, np.bool_)
        """The sectors that a plain write has, although a FUA write stands not far before it."""
        self._flushes = self.OVERTAKEN + 1
        self._fua = np.zeros(size // SECTOR, np.int64)  # the number of the flush before the last FUA write

    def apply(self, entry: Entry) -> None:
        """Do what an entry says."""
        replay(self.image, (entry,))
        self._flushes += entry.flags & FLUSH
        place = slice(entry.begin // SECTOR, (entry.begin + entry.length) // SECTOR)
        if entry.flags & FUA:
            self._fua[place] = self._flushes
            self.doubtful[place] = False
        else:
            self.doubtful[place] = self._flushes - self._fua[place] <= self.OVERTAKEN


def differing(one: bytes | bytearray, other: bytes | bytearray) -> npt.NDArray[np.bool_]:
    """Return which sectors differ."""
    if one == other:  # which is much faster
        return np.zeros(len(one) // SECTOR, np.bool_)
    pair = (np.frombuffer(data, np.uint64).reshape(-1, SECTOR // 8) for data in (one, other))
    return np.asarray(np.not_equal(*pair).any(axis=1), np.bool_)
