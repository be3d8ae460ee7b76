"""Claims about dmafs.taps.logformat: the table says what is there, and what can't be is an error."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmafs.errors import CorruptionError
from dmafs.taps import logformat
from dmafs.taps.logformat import (
    DATA_BYTES_END,
    ENTRY,
    HEADER_BYTES,
    MAGIC,
    Entry,
    LogFlag,
    Super,
    decode_mark,
    encode_mark,
    require_sector_bytes,
)

u64 = st.integers(0, 2**64 - 1)
sector_sizes = st.sampled_from([512, 1024, 2048, 4096])
DISK = 1 << 40


def fault(entry: Entry, sector_bytes: int = 512, size_bytes: int = DISK) -> str:
    """Return the message about an entry, empty if it is valid."""
    try:
        entry.check(sector_bytes=sector_bytes, size_bytes=size_bytes, where="x.log at byte 512")
    except CorruptionError as error:
        return error.message
    return ""


def test_flags_are_the_documented_ones() -> None:
    """The table in the module's docstring gives each flag's number."""
    line = next(line for line in (logformat.__doc__ or "").splitlines() if "flags:" in line)
    documented = {name.upper(): int(number) for number, name in re.findall(r"(\d+) ([a-zA-Z]+)", line.split(":")[1])}
    assert documented == {str(flag.name): int(flag) for flag in LogFlag}


@given(u64, sector_sizes)
def test_super_block_is_what_was_encoded(entries: int, sector_bytes: int) -> None:
    """A super block takes its log sector and decodes to what it was."""
    data = Super(entries, sector_bytes).encode()
    assert len(data) == sector_bytes
    assert Super.decode(data, "x.log") == Super(entries, sector_bytes)


@given(u64, u64, u64, u64)
def test_entry_is_what_was_encoded(sector: int, sectors: int, flags: int, data_bytes: int) -> None:
    """A header of 32 bytes decodes to what it was, valid or not."""
    entry = Entry(sector, sectors, flags, data_bytes)
    assert len(entry.encode()) == HEADER_BYTES == ENTRY.size
    assert Entry.decode(b"before" + entry.encode(), 6) == entry


def test_bytes_are_those_of_the_kernel() -> None:
    """A log's first bytes, written down by hand."""
    assert Super(3).encode()[:32].hex() == "7268737766736a00010000000000000003000000000000000002000000000000"
    assert Entry(1, 2, 17).encode().hex() == "0100000000000000020000000000000011000000000000000000000000000000"


def test_a_super_block_of_zeros_is_not_there_yet() -> None:
    """The kernel writes the super block only at the first FUA write or mark."""
    assert Super.decode(bytes(512), "x.log") is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\1" + Super(1).encode()[1:], "magic 0x6a736677736801 version 1"),
        (MAGIC.to_bytes(8, "little") + b"\2" + bytes(23), "version 2"),
        (Super(1).encode()[:24] + (513).to_bytes(8, "little"), "log sectors of 513 bytes"),
        (Super(1).encode()[:24] + bytes(8), "log sectors of 0 bytes"),
        (Super(1).encode()[:24] + (8192).to_bytes(8, "little"), "log sectors of 8192 bytes"),
    ],
)
def test_a_foreign_super_block_is_refused(data: bytes, words: str) -> None:
    """Magic, version and size of a log sector have to be right; the message names file, offset and value."""
    with pytest.raises(CorruptionError, match=rf"^x\.log at byte \d+: .*{words}"):
        Super.decode(data, "x.log")


@pytest.mark.parametrize("sector_bytes", [512, 1024, 2048, 4096])
def test_log_sectors_of_all_sizes(sector_bytes: int) -> None:
    """A power of two from 512 to 4096."""
    require_sector_bytes(sector_bytes, "x.log")


@pytest.mark.parametrize(
    "entry",
    [
        Entry(0, 1, 0),
        Entry(0, 1, 0, 512),
        Entry(5, 8, LogFlag.FUA | LogFlag.METADATA),
        Entry(0, 0, LogFlag.FLUSH),
        Entry(7, 1, LogFlag.FLUSH | LogFlag.FUA),
        Entry(0, DISK // 512, LogFlag.DISCARD),
        Entry(DISK // 512 - 1, 1, 0),
        Entry(0, 0, LogFlag.MARK, 479),
        Entry(0, DATA_BYTES_END // 512 - 1, 0),
    ],
)
def test_valid_entries(entry: Entry) -> None:
    """Whatever the kernel and QEMU write is valid."""
    assert fault(entry) == ""


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Entry(0, 1, 32), "unknown flags 0x20"),
        (Entry(0, 1, 2**63), "unknown flags 0x8000000000000000"),
        (Entry(9, 0, 0), "at sector 9 without sectors"),
        (Entry(9, 0, LogFlag.DISCARD), "at sector 9 without sectors"),
        (Entry(0, 0, LogFlag.MARK | LogFlag.FLUSH), "a mark with flags 0x9"),
        (Entry(0, 1, LogFlag.MARK), "and 1 sectors"),
        (Entry(0, 0, LogFlag.MARK, 480), "a mark of 480 bytes, 479 is the limit"),
        (Entry(DISK // 512, 1, 0), "reaches to byte 1099511628288"),
        (Entry(2**64 - 1, 1, LogFlag.DISCARD), "reaches to byte"),
        (Entry(0, DATA_BYTES_END // 512, 0), "a write of 4294967296 bytes"),
        (Entry(0, 1, 0, 513), "of 1 sectors with 513 bytes"),
    ],
)
def test_entries_that_cannot_be(entry: Entry, words: str) -> None:
    """What no writer writes is damage; the message names file, offset and value."""
    assert fault(entry).startswith("x.log at byte 512: ")
    assert words in fault(entry)


def test_a_mark_fits_into_its_log_sector() -> None:
    """The text stands behind the header; with longer log sectors it can be longer."""
    block = encode_mark("moment", 4096)
    assert len(block) == 4096
    assert Entry.decode(block) == Entry(0, 0, LogFlag.MARK, 6)
    assert decode_mark(block[HEADER_BYTES : HEADER_BYTES + 6], "x") == "moment"
    assert fault(Entry(0, 0, LogFlag.MARK, 4063), 4096) == ""


@pytest.mark.parametrize("text", [b"\0", b"a\nb", b"\xff", b"\x1b[31m"])
def test_a_mark_is_printable(text: bytes) -> None:
    """A mark's text can be shown on any terminal; else it is damage."""
    with pytest.raises(CorruptionError, match="x at byte 1: a mark with text"):
        decode_mark(text, "x at byte 1")


def test_a_mark_may_be_any_language() -> None:
    """Text is UTF-8."""
    assert decode_mark("später".encode(), "x") == "später"
