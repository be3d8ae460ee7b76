"""A reader of dm-log-writes logs for tests: it reads a whole log at once, trusts it, and knows nothing of dmafs."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAGIC: Final = 0x6A736677736872
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


def entries(path: Path) -> list[Entry]:
    """Return all entries that a closed log's super block counts."""
    content = path.read_bytes()
    magic, version, count, block = struct.unpack_from("<QQQI", content)
    assert (magic, version) == (MAGIC, 1), path
    found, at = [], block
    for _ in range(count):
        sector, sectors, flags, text = struct.unpack_from("<QQQQ", content, at)
        begin, length = sector * block, sectors * block
        at += block
        if flags & MARK:
            found.append(Entry(0, 0, flags, content[at - block + 32 :][:text]))
        elif flags & DISCARD:
            found.append(Entry(begin, length, flags, b""))
        else:
            found.append(Entry(begin, length, flags, content[at : at + length]))
            assert len(found[-1].data) == length
            at += length
    return found


def replay(image: bytearray, log: list[Entry]) -> None:
    """Do what the entries say."""
    for entry in log:
        if entry.flags & DISCARD:
            image[entry.begin : entry.begin + entry.length] = bytes(entry.length)
        elif not entry.flags & MARK:
            image[entry.begin : entry.begin + entry.length] = entry.data
