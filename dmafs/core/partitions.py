"""Partition tables: which ranges of a disk's bytes its GPT or MBR calls partitions.

Numbers and ranges are those that Linux gives, with three exceptions: the extended partition of an MBR, which Linux
shows as its first two sectors, isn't listed; a damaged primary GPT header has its backup at the end of the disk asked,
as the tools do; and a chain of logical partitions that leads back to itself ends there.

What is in a table comes from outside. Nothing of it is believed: reads are few, small and within the disk, and a table
that isn't right is no table.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Generator
from typing import Final, NamedTuple
from uuid import UUID

from dmafs.units import SECTOR

PARTITIONS_MAX: Final = 128
"""So many are listed of a table, at most: those with the lowest numbers."""
ENTRIES_MAX: Final = 1024
"""Entries of a GPT, used or not; tools make 128. A table that has more is no table."""
LINKS_MAX: Final = 256
"""Sectors of an MBR's chains of logical partitions that are read, at most."""
GPT_SECTORS: Final = (SECTOR, 4096)
"""A GPT counts in sectors of the disk it was made on: both are tried."""

_SIGNATURE: Final = b"\x55\xaa"
_SLOTS: Final = slice(446, 510)
_SLOT: Final = struct.Struct("<B3xB3xII")
_FIRST_LOGICAL: Final = 5
_PROTECTIVE: Final = 0xEE
_EXTENDED: Final = (0x05, 0x0F, 0x85)
_BOOT_FLAGS: Final = (0, 0x80)
_HEADER: Final = struct.Struct("<8s4I4Q16xQ3I")
_ENTRY: Final = struct.Struct("<16s16xQQ8x72s")
_HEADER_CRC: Final = slice(16, 20)


class Partition(NamedTuple):
    """A partition: *start* and *length* in bytes.

    *kind* is the GUID of a GPT's type, in capitals, or the type byte of an MBR as two hex digits. *name* is a GPT's
    label, else empty: whatever somebody wrote there.
    """

    number: int
    start: int
    length: int
    kind: str
    name: str


class _Slot(NamedTuple):
    """One of the four entries of an MBR, in sectors."""

    boot: int
    kind: int
    start: int
    length: int


Scan = Generator[tuple[int, int], bytes, list[Partition]]
"""Yields which bytes it has to see, as offset and length; is sent them, or fewer if there are no more."""


def find_partitions(read: Callable[[int, int], bytes], size: int) -> list[Partition]:
    """Return the partitions of a disk of *size* bytes by number; empty if it has no valid table.

    *read* returns the bytes at an offset, of a length, always within the disk; what it raises is passed on.
    """
    scan = scanned(size)
    try:
        wanted = next(scan)
        while True:
            wanted = scan.send(read(*wanted))
    except StopIteration as stop:
        found: list[Partition] = stop.value
        return found


def scanned(size: int) -> Scan:
    """Do what ``find_partitions`` does, with the reading left to the caller."""
    if size < SECTOR:
        return []
    slots = _slots((yield 0, SECTOR))
    if any(slot.kind == _PROTECTIVE for slot in slots):
        if any(slot.kind == _PROTECTIVE and slot.start == 1 for slot in slots):
            for sector in GPT_SECTORS:
                found = yield from _gpt(size, sector)
                if found is not None:
                    return found
        return []
    if any(slot.boot not in _BOOT_FLAGS for slot in slots):  # the first sector of a file system, most often
        return []
    return (yield from _mbr(slots, size))


# -- MBR ---------------------------------------------------------------------------------------------------------------


def _slots(sector: bytes) -> list[_Slot]:
    """Return the entries of an MBR, or of one link in the chain of logical partitions; none without its signature."""
    if len(sector) != SECTOR or sector[510:] != _SIGNATURE:
        return []
    return [_Slot(*fields) for fields in _SLOT.iter_unpack(sector[_SLOTS])]


def _mbr(slots: list[_Slot], size: int) -> Scan:
    found: list[Partition] = []
    links: set[int] = set()
    logical = _FIRST_LOGICAL
    for number, slot in enumerate(slots, 1):
        if slot.length and slot.kind in _EXTENDED:
            logicals = yield from _logicals(slot, size, links)
            for kind, start, length in logicals:
                found += _within(logical, kind, start, length, size)
                logical += 1
        elif slot.length:
            found += _within(number, slot.kind, slot.start, slot.length, size)
    return sorted(found)[:PARTITIONS_MAX]


def _within(number: int, kind: int, start: int, length: int, size: int) -> list[Partition]:
    """Return a partition, given in sectors, as far as it is within the disk."""
    begin = start * SECTOR
    length = min(length * SECTOR, size // SECTOR * SECTOR - begin)
    return [Partition(number, begin, length, f"{kind:02x}", "")] if length > 0 else []


def _logicals(
    extended: _Slot, size: int, links: set[int]
) -> Generator[tuple[int, int], bytes, list[tuple[int, int, int]]]:
    """Follow the chain of an extended partition; return type, start and length of what is in it, in sectors.

    *links* are the sectors that any chain was at. Of an entry the start is relative to its link, of the next link to
    the extended partition. The first two entries of a link are used; the others may be garbage.
    """
    found: list[tuple[int, int, int]] = []
    end = extended.start + extended.length
    link, room = extended.start, extended.length
    while link not in links and len(links) < LINKS_MAX and (link + 1) * SECTOR <= size:
        links.add(link)
        slots = _slots((yield link * SECTOR, SECTOR))
        following = None
        for index, slot in enumerate(slots):
            if slot.length and slot.kind in _EXTENDED:
                following = following or slot
            elif slot.length:
                start = link + slot.start
                if index < 2 or (slot.start + slot.length <= room and start + slot.length <= end):  # noqa: PLR2004
                    found.append((slot.kind, start, slot.length))
        if following is None:
            break
        link, room = extended.start + following.start, following.length
    return found


# -- GPT ---------------------------------------------------------------------------------------------------------------


def _gpt(size: int, sector: int) -> Generator[tuple[int, int], bytes, list[Partition] | None]:
    """Return what a GPT lists, by its header or else the backup at the end of the disk; None if neither is valid."""
    last = size // sector - 1
    for place in (1, last):
        if not 0 < place <= last:
            continue
        table = _header((yield place * sector, sector), place, last, sector)
        if table is None:
            continue
        offset, length, checksum = table
        entries = yield offset, length
        if len(entries) == length and zlib.crc32(entries) == checksum:
            return _entries(entries, last, sector)
    return None


def _header(data: bytes, place: int, last: int, sector: int) -> tuple[int, int, int] | None:
    """Return offset and length of the entries that a header names, in bytes, and their checksum; None if invalid."""
    if len(data) != sector:
        return None
    fields = _HEADER.unpack_from(data)
    signature, _, length, checksum, _, own, _, first_usable, last_usable, entries, count, entry_size, crc = fields
    if signature != b"EFI PART" or not _HEADER.size <= length <= sector:
        return None
    blanked = bytearray(data[:length])
    blanked[_HEADER_CRC] = bytes(4)
    valid = (
        zlib.crc32(blanked) == checksum
        and own == place
        and first_usable <= last_usable <= last
        and entry_size == _ENTRY.size
        and 0 < count <= ENTRIES_MAX
        and entries * sector + count * entry_size <= (last + 1) * sector
    )
    return (entries * sector, count * entry_size, crc) if valid else None


def _entries(entries: bytes, last: int, sector: int) -> list[Partition]:
    """Return the entries that are used and within the disk."""
    found: list[Partition] = []
    for number, (kind, start, stop, name) in enumerate(_ENTRY.iter_unpack(entries), 1):
        if any(kind) and start <= stop <= last and len(found) < PARTITIONS_MAX:
            label = name.decode("utf-16-le", "replace").partition("\0")[0]
            guid = str(UUID(bytes_le=kind)).upper()
            found.append(Partition(number, start * sector, (stop - start + 1) * sector, guid, label))
    return found
