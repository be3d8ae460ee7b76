"""Partition tables, made byte by byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from uuid import UUID

LINUX = UUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4")
SECTOR = 512
Slot = tuple[int, int, int]
"""Type, start and length of an entry of an MBR, in sectors."""


def mbr_sector(slots: Sequence[Slot], *, boot: int = 0) -> bytes:
    """Return an MBR, or a link in the chain of logical partitions."""
    entries = b"".join(struct.pack("<B3xB3xII", boot, *slot) for slot in slots)
    return bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa"


def gpt_entry(first: int, last: int, name: str = "", kind: UUID = LINUX) -> bytes:
    """Return an entry of a GPT: first and last sector."""
    unique = UUID(int=first << 64 | last)
    return struct.pack("<16s16sQQQ72s", kind.bytes_le, unique.bytes_le, first, last, 0, name.encode("utf-16-le"))


def gpt_entries(partitions: Mapping[int, bytes], count: int = 128) -> bytes:
    """Return the entries of a GPT, by their numbers."""
    return b"".join(partitions.get(number, bytes(128)) for number in range(1, count + 1))


def gpt_header(place: int, last: int, at: int, entries: bytes, **changes: int) -> bytes:
    """Return a header of 92 bytes that stands at *place*, its checksums right; *changes* by the names below."""
    fields = {
        "signature": int.from_bytes(b"EFI PART", "little"),
        "revision": 0x10000,
        "length": 92,
        "own": place,
        "other": last if place == 1 else 1,
        "first_usable": 34,
        "last_usable": last - 34,
        "entries_at": at,
        "count": len(entries) // 128,
        "entry_size": 128,
        "checksum": zlib.crc32(entries),
        **changes,
    }
    front = [fields[name] for name in ("signature", "revision", "length")]
    back = [fields[name] for name in ("own", "other", "first_usable", "last_usable")]
    end = [fields[name] for name in ("entries_at", "count", "entry_size", "checksum")]
    return sealed(struct.pack("<QIIII4Q16sQIII", *front, 0, 0, *back, bytes(16), *end))


def sealed(header: bytes) -> bytes:
    """Give a header the checksum that is right for it."""
    length = int.from_bytes(header[12:16], "little")
    blanked = header[:16] + bytes(4) + header[20:]
    return header[:16] + struct.pack("<I", zlib.crc32(blanked[:length])) + header[20:]


def gpt_disk(size: int, partitions: Mapping[int, bytes], sector: int = SECTOR) -> bytearray:
    """Return a disk with a protective MBR, a GPT and its backup."""
    disk = bytearray(size)
    last = size // sector - 1
    entries = gpt_entries(partitions)
    disk[:SECTOR] = mbr_sector([(0xEE, 1, min(last, 2**32 - 1))])
    behind = last - len(entries) // sector
    for place, at in ((1, 2), (last, behind)):
        disk[place * sector : place * sector + 92] = gpt_header(place, last, at, entries)
        disk[at * sector : at * sector + len(entries)] = entries
    return disk
