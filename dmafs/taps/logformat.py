"""The dm-log-writes format: the log that the kernel's ``log-writes`` target and QEMU's ``blklogwrites`` driver write.

A log is a super block, then entries one behind the other. Super block and each entry's header take one *log sector*,
and all addresses and lengths in them are in log sectors: 512 to 4096 bytes, a power of two, as the super block says.
All integers are little-endian.

Super block, in the log's first sector::

    offset  bytes  field
         0      8  magic 0x6a736677736872
         8      8  version 1
        16      8  number of entries, as of when the super block was written last
        24      4  bytes of a log sector
        28         anything, up to the end of the log sector

Entry, from the second log sector on, each right behind the one before::

    offset  bytes  field
         0      8  sector: where on the disk
         8      8  sectors: how many
        16      8  flags: 1 flush, 2 FUA, 4 discard, 8 mark, 16 metadata
        24      8  bytes of data; of a mark those of its text, otherwise often 0
        32         text of a mark (no terminating zero), up to the end of the log sector
                   data of a write, from the next log sector on: sectors * bytes of a log sector

A header is valid iff (1) it has no other flags; (2) a mark has no other flag, no sectors, and its text, printable
UTF-8, ends before the last byte of its log sector; (3) anything but a mark or a flush has sectors; (4) its sectors lie
on the disk; (5) data takes less than 4 GiB, since no block layer has longer requests, and not less than the bytes of
data say. Of an entry that is a flush and a write the flush came first. A header of zeros isn't written yet.

There is no checksum, sequence, time or generation in a log: nothing tells an entry from what an earlier log left in
the same file. So only files that were empty can become logs, and what is invalid is damage.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import Final, NamedTuple

from dmafs.errors import CorruptionError
from dmafs.units import SECTOR

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
HEADER_BYTES: Final = 32
SECTOR_BYTES_MAX: Final = 4096
DATA_BYTES_END: Final = 1 << 32
"""No entry has so much data: requests of the kernel count bytes in 32 bits, those of QEMU in 31."""
END_MARK: Final = "dm-log-writes-end"
"""The text of the mark that ends a log: the target was removed, or given another log."""

SUPER: Final = struct.Struct("<QQQI")
ENTRY: Final = struct.Struct("<QQQQ")

_HINT: Final = "the log is damaged, or not in the format of dm-log-writes"


class LogFlag(IntFlag):
    """What an entry is; without DISCARD and MARK, and with sectors, it is a write."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


_ALL_FLAGS: Final = sum(LogFlag)
_MARK: Final = int(LogFlag.MARK)
_DISCARD: Final = int(LogFlag.DISCARD)
_FLUSH: Final = int(LogFlag.FLUSH)


class Super(NamedTuple):
    """The super block of a log."""

    entries: int
    sector_bytes: int = SECTOR

    def encode(self) -> bytes:
        """Return its log sector."""
        return SUPER.pack(MAGIC, VERSION, self.entries, self.sector_bytes).ljust(self.sector_bytes, b"\0")

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview, where: str) -> Super | None:
        """Return the super block at the beginning of *data*, None if it isn't written yet; *where* names the file."""
        if not any(data[: SUPER.size]):
            return None
        magic, version, entries, sector_bytes = SUPER.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise CorruptionError(
                f"{where} at byte 0: magic 0x{magic:x} version {version} instead of 0x{MAGIC:x} version {VERSION}",
                hint="the file is no log of dm-log-writes",
            )
        require_sector_bytes(sector_bytes, where)
        return cls(entries, sector_bytes)


def require_sector_bytes(sector_bytes: int, where: str) -> None:
    """Raise CorruptionError unless a log sector can have so many bytes."""
    if not SECTOR <= sector_bytes <= SECTOR_BYTES_MAX or sector_bytes & (sector_bytes - 1):
        raise CorruptionError(f"{where} at byte 24: log sectors of {sector_bytes} bytes", hint=_HINT)


class Entry(NamedTuple):
    """The header of an entry; sector and sectors in log sectors."""

    sector: int
    sectors: int
    flags: int
    data_bytes: int = 0

    def encode(self) -> bytes:
        """Return the 32 bytes of the header."""
        return ENTRY.pack(*self)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Entry:
        """Return what stands at an offset, valid or not."""
        return cls(*ENTRY.unpack_from(data, offset))

    @property
    def data_sectors(self) -> int:
        """Return how many log sectors of data follow the header."""
        return 0 if self.flags & (_DISCARD | _MARK) else self.sectors

    def check(self, *, sector_bytes: int, size_bytes: int, where: str) -> None:
        """Raise CorruptionError naming *where* (file and offset) if it isn't valid on a disk of *size_bytes*."""
        reason = self._fault(sector_bytes, size_bytes)
        if reason:
            raise CorruptionError(f"{where}: {reason}", hint=_HINT)

    def _fault(self, sector_bytes: int, size_bytes: int) -> str:
        if self.flags & ~_ALL_FLAGS:
            return f"an entry with unknown flags 0x{self.flags:x}"
        if self.flags & _MARK:
            return self._mark_fault(sector_bytes - HEADER_BYTES - 1)
        if not self.sectors:
            return "" if self.flags & _FLUSH else f"an entry at sector {self.sector} without sectors or flush"
        return self._range_fault(sector_bytes, size_bytes)

    def _mark_fault(self, limit: int) -> str:
        if self.flags != _MARK or self.sectors:
            return f"a mark with flags 0x{self.flags:x} and {self.sectors} sectors"
        return f"a mark of {self.data_bytes} bytes, {limit} is the limit" if self.data_bytes > limit else ""

    def _range_fault(self, sector_bytes: int, size_bytes: int) -> str:
        end = (self.sector + self.sectors) * sector_bytes
        if end > size_bytes:
            return f"an entry reaches to byte {end} of a disk of {size_bytes} bytes"
        length = self.data_sectors * sector_bytes
        if length >= DATA_BYTES_END:
            return f"a write of {length} bytes, which is longer than any request"
        if self.data_bytes > self.sectors * sector_bytes:
            return f"an entry of {self.sectors} sectors with {self.data_bytes} bytes of data"
        return ""


def decode_mark(text: bytes | bytearray | memoryview, where: str) -> str:
    """Return the text of a mark; CorruptionError naming *where* if it isn't printable."""
    try:
        decoded = bytes(text).decode()
    except UnicodeDecodeError:
        decoded = "\0"
    if not decoded.isprintable():
        raise CorruptionError(f"{where}: a mark with text {bytes(text[:64])!r}", hint=_HINT)
    return decoded


def encode_mark(text: str, sector_bytes: int = SECTOR) -> bytes:
    """Return the log sector of a mark."""
    data = text.encode()
    assert len(data) < sector_bytes - HEADER_BYTES
    return (Entry(0, 0, _MARK, len(data)).encode() + data).ljust(sector_bytes, b"\0")
