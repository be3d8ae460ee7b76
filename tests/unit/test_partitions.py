"""Partition tables: what is in them, and that nothing wrong in them is believed."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from dmafs.core.partitions import LINKS_MAX, PARTITIONS_MAX, Partition, find_partitions
from tests.disklabels import LINUX, SECTOR, gpt_disk, gpt_entries, gpt_entry, gpt_header, mbr_sector

SIZE = 4 << 20
SECTORS = SIZE // SECTOR
GPT_KIND = str(LINUX).upper()


def found_in(disk: bytes | bytearray, size: int | None = None) -> list[Partition]:
    """Return the partitions of a disk; all that is read is within it, and little."""
    size = len(disk) if size is None else size

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= size
        assert 0 < length <= 1 << 17
        return bytes(disk[offset : offset + length])

    return find_partitions(read, size)


def mbr_disk(sectors: dict[int, bytes], size: int = SIZE) -> bytearray:
    disk = bytearray(size)
    for number, data in sectors.items():
        disk[number * SECTOR : (number + 1) * SECTOR] = data
    return disk


def ranges(disk: bytes | bytearray) -> list[tuple[int, int, int]]:
    """Return number, start and length of each partition, in sectors."""
    return [(found.number, found.start // SECTOR, found.length // SECTOR) for found in found_in(disk)]


# --- MBR


def test_what_has_no_table() -> None:
    """Empty disks, tiny ones, and a file system's first sector, which has the same signature."""
    assert found_in(b"") == found_in(bytes(511)) == found_in(bytes(512)) == found_in(bytes(SIZE)) == []
    boot_sector = bytearray(mbr_sector([(0x83, 1, 5)] * 4))
    boot_sector[446 + 16] = 0x4E
    assert found_in(bytes(boot_sector).ljust(SIZE, b"\0")) == []
    unsigned = bytearray(mbr_sector([(0x83, 1, 5)]))
    unsigned[511] = 0
    assert found_in(bytes(unsigned).ljust(SIZE, b"\0")) == []


def test_what_cant_be_read_whole_has_none() -> None:
    """A reader that returns less than it is asked for, as at the end of a file that was cut."""
    disk = gpt_disk(SIZE, {1: gpt_entry(64, 127)})
    assert found_in(disk[:1500], SIZE) == []
    assert found_in(disk[:100], SIZE) == []


def test_what_a_reader_raises_is_passed_on() -> None:
    def read(_offset: int, _length: int) -> bytes:
        raise OSError(5, "no")

    with pytest.raises(OSError, match="no"):
        find_partitions(read, SIZE)


def test_primary_partitions_have_the_numbers_of_their_slots() -> None:
    disk = mbr_disk({0: mbr_sector([(0x83, 100, 10), (0, 0, 0), (0x07, 50, 20), (0xA, 1, 1)], boot=0x80)})
    assert found_in(disk) == [
        Partition(1, 51200, 5120, "83", ""),
        Partition(3, 25600, 10240, "07", ""),
        Partition(4, 512, 512, "0a", ""),
    ]


def test_a_partition_ends_where_the_disk_does() -> None:
    """As Linux has it: one that goes on behind the end is cut, one that begins there isn't."""
    slots = [(0x83, SECTORS - 5, 10), (0x83, SECTORS, 1), (0x83, 2**32 - 1, 2**32 - 1), (0x83, 0, 2**32 - 1)]
    assert ranges(mbr_disk({0: mbr_sector(slots)})) == [(1, SECTORS - 5, 5), (4, 0, SECTORS)]


def test_logical_partitions_begin_with_five() -> None:
    """The extended one isn't shown; starts are relative to the link, links to the extended partition."""
    disk = mbr_disk(
        {
            0: mbr_sector([(0x83, 1, 9), (0x05, 1000, 3000)]),
            1000: mbr_sector([(0x83, 10, 90), (0x05, 100, 200)]),
            1100: mbr_sector([(0x82, 20, 180), (0x0F, 500, 100)]),
            1500: mbr_sector([(0x83, 1, 99)]),
        }
    )
    assert ranges(disk) == [(1, 1, 9), (5, 1010, 90), (6, 1120, 180), (7, 1501, 99)]


def test_garbage_in_a_link_is_left_out() -> None:
    """The third and fourth entries of a link count only within the link's room and the extended partition."""
    disk = mbr_disk(
        {
            0: mbr_sector([(0x05, 1000, 3000)]),
            1000: mbr_sector([(0, 0, 0), (0x83, 10, 90), (0x83, 200, 2900), (0x83, 200, 100)]),
        }
    )
    assert ranges(disk) == [(5, 1010, 90), (6, 1200, 100)]


def test_a_chain_that_leads_back_ends() -> None:
    disk = mbr_disk(
        {
            0: mbr_sector([(0x05, 1000, 3000), (0x0F, 1000, 3000)]),
            1000: mbr_sector([(0x83, 10, 90), (0x05, 100, 200)]),
            1100: mbr_sector([(0x83, 20, 80), (0x05, 0, 200)]),
        }
    )
    assert ranges(disk) == [(5, 1010, 90), (6, 1120, 80)]
    itself = mbr_disk({0: mbr_sector([(0x05, 0, 10), (0x83, 1, 1)])})
    assert ranges(itself) == [(2, 1, 1), (5, 1, 1)]


def test_a_chain_that_leads_out_ends() -> None:
    disk = mbr_disk({0: mbr_sector([(0x05, 10, 10)]), 10: mbr_sector([(0x83, 1, 2), (0x05, 2**32 - 1, 1)])})
    assert ranges(disk) == [(5, 11, 2)]
    assert ranges(mbr_disk({0: mbr_sector([(0x05, 2**32 - 1, 10)])})) == []


def test_long_chains_are_bounded() -> None:
    """No more than so many links are read, and no more than 128 partitions listed."""
    reads = 0

    def read_at(full: bool) -> Callable[[int, int], bytes]:  # noqa: FBT001 - one of two
        def read(offset: int, _length: int) -> bytes:
            nonlocal reads
            reads += 1
            if offset == 0:
                return mbr_sector([(0x05, 1, 2**31), (0x05, 5000, 2**31)])
            return mbr_sector([(0x83, 1, 1) if full else (0, 0, 0), (0x05, offset // SECTOR + 1, 1)])

        return read

    assert len(find_partitions(read_at(full=True), 1 << 40)) == PARTITIONS_MAX
    assert reads <= LINKS_MAX + 1
    reads = 0
    assert find_partitions(read_at(full=False), 1 << 40) == []
    assert reads <= LINKS_MAX + 1


# --- GPT


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_gpt(sector: int) -> None:
    """Numbers with holes, labels, types."""
    disk = gpt_disk(
        SIZE, {2: gpt_entry(64, 127, "dätä"), 128: gpt_entry(40, 40), 5: gpt_entry(200, 255, "x" * 36)}, sector
    )
    assert found_in(disk) == [
        Partition(2, 64 * sector, 64 * sector, GPT_KIND, "dätä"),
        Partition(5, 200 * sector, 56 * sector, GPT_KIND, "x" * 36),
        Partition(128, 40 * sector, sector, GPT_KIND, ""),
    ]


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("offset", [0, 20, 72, 91])
def test_the_backup_stands_in(sector: int, offset: int) -> None:
    """For a damaged header, and for damaged entries; where both are damaged there is no table."""
    disk = gpt_disk(SIZE, {1: gpt_entry(64, 127)}, sector)
    disk[sector + offset] ^= 1
    assert [found.start for found in found_in(disk)] == [64 * sector]
    disk[SIZE - sector + offset] ^= 1
    assert found_in(disk) == []
    disk[sector + offset] ^= 1
    assert [found.start for found in found_in(disk)] == [64 * sector]
    disk[2 * sector + 5] ^= 1
    assert found_in(disk) == []
    disk[SIZE - sector + offset] ^= 1
    assert [found.start for found in found_in(disk)] == [64 * sector]


def test_a_protective_mbr_alone_is_no_table() -> None:
    """Nor are the other entries of one, hybrid or not."""
    assert found_in(mbr_disk({0: mbr_sector([(0xEE, 1, SECTORS)])})) == []
    assert found_in(mbr_disk({0: mbr_sector([(0x83, 100, 10), (0xEE, 1, 99)])})) == []
    disk = gpt_disk(SIZE, {1: gpt_entry(64, 127)})
    disk[:SECTOR] = mbr_sector([(0xEE, 2, 99)])
    assert found_in(disk) == [], "it has to begin with the header"
    disk[:SECTOR] = mbr_sector([(0x83, 100, 10), (0xEE, 1, 99)])
    assert ranges(disk) == [(1, 64, 64)], "a hybrid one, whose GPT counts"
    disk[:SECTOR] = mbr_sector([(0x83, 100, 10)])
    assert ranges(disk) == [(1, 100, 10)], "somebody has made an MBR over a GPT"


@pytest.mark.parametrize(
    "changes",
    [
        {"length": 91},
        {"length": 513},
        {"length": 2**32 - 1},
        {"own": 2},
        {"first_usable": SECTORS},
        {"last_usable": SECTORS},
        {"last_usable": 33},
        {"entries_at": SECTORS - 31},
        {"entries_at": 2**64 - 1},
        {"count": 0},
        {"count": 1025},
        {"count": 2**32 - 1},
        {"count": 127},
        {"entry_size": 256},
        {"entry_size": 0},
        {"entry_size": 2**32 - 1},
        {"checksum": 5},
        {"signature": 5},
    ],
)
def test_headers_that_arent_right(changes: dict[str, int]) -> None:
    """Each with a checksum that is."""
    entries = gpt_entries({1: gpt_entry(64, 127)})
    disk = gpt_disk(SIZE, {})
    disk[-SECTOR:] = bytes(SECTOR)
    disk[2 * SECTOR : 2 * SECTOR + len(entries)] = entries
    disk[SECTOR : SECTOR + 92] = gpt_header(1, SECTORS - 1, 2, entries)
    assert ranges(disk) == [(1, 64, 64)]
    disk[SECTOR : SECTOR + 92] = gpt_header(1, SECTORS - 1, 2, entries, **changes)
    assert found_in(disk) == []


def test_entries_that_arent_within_the_disk_are_left_out() -> None:
    last = SECTORS - 1
    odd = {1: (last, last), 2: (0, last + 1), 3: (9, 8), 4: (9, 7), 5: (2**64 - 1, 2**64 - 1), 6: (last + 1, 2**64 - 1)}
    disk = gpt_disk(SIZE, {number: gpt_entry(*odd_range) for number, odd_range in odd.items()})
    assert ranges(disk) == [(1, last, 1)]


def test_not_more_than_so_many_entries_are_listed() -> None:
    entries = gpt_entries({number: gpt_entry(200 + number, 200 + number) for number in range(1, 1025)}, 1024)
    disk = gpt_disk(SIZE, {})
    disk[-SECTOR:] = bytes(SECTOR)
    disk[2 * SECTOR : 2 * SECTOR + len(entries)] = entries
    disk[SECTOR : SECTOR + 92] = gpt_header(1, SECTORS - 1, 2, entries)
    assert [number for number, _, _ in ranges(disk)] == list(range(1, PARTITIONS_MAX + 1))


def test_a_label_may_be_anything() -> None:
    entry = bytearray(gpt_entry(64, 127))
    entry[56:60] = struct.pack("<HH", 0xD800, 0x41)
    (found,) = found_in(gpt_disk(SIZE, {1: bytes(entry)}))
    assert found.name == "\ufffdA"
