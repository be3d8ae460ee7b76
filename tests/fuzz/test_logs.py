"""Random logs, damaged logs, and logs that are just being written: entries or an error, never anything torn."""

from __future__ import annotations

import os
import tracemalloc
from random import Random
from typing import Final

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmafs.errors import CorruptionError
from dmafs.taps.logformat import Entry, LogFlag, Super
from dmafs.taps.logreader import LoggedWindow, LogReader
from dmafs.units import SECTOR
from tests.logs import DISK_SECTORS, FLUSH, Logged, MemoryFile, discard, log_of, mark, replay, write

SEED: Final = int(os.environ.get("DMAFS_TEST_SEED", "1"))
EXAMPLES: Final = int(os.environ.get("DMAFS_TEST_EXAMPLES", "400"))
MEMORY_MAX: Final = 64 << 20
"""What one damaged log may take: the columns of a window that is as long as windows get, and a batch of data."""

profile = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
sector_sizes = st.sampled_from([512, 1024, 2048, 4096])
words = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), max_size=20)
u64 = st.one_of(st.integers(0, 64), st.integers(0, 2**64 - 1), st.integers(0, 63).map(lambda bit: 1 << bit))


@st.composite
def logs(draw: st.DrawFn) -> tuple[int, list[Logged]]:
    """Return the bytes of a log sector and entries within the tests' disk."""
    sector_bytes = draw(sector_sizes)
    disk = DISK_SECTORS * SECTOR // sector_bytes
    entries = []
    for number in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["write", "write", "write", "discard", "flush", "mark"]))
        sector = draw(st.integers(0, disk - 5))
        count = draw(st.integers(1, 5))
        flags = draw(st.sampled_from([0, 0, LogFlag.FUA, LogFlag.METADATA, LogFlag.FLUSH, LogFlag.FLUSH | LogFlag.FUA]))
        if kind == "write":
            data = bytes([number + 1]) * (count * sector_bytes)  # no zeros: what isn't there yet is told from it
            entries.append(write(sector, data, flags, sector_bytes=sector_bytes))
        elif kind == "discard":
            entries.append(discard(sector, count, flags & LogFlag.FLUSH))
        else:
            entries.append(FLUSH if kind == "flush" else mark(draw(words)))
    return sector_bytes, entries


def drain(reader: LogReader, *, upto: int | None = None) -> list[LoggedWindow]:
    """Return all windows that are complete."""
    found = []
    while (window := reader.scan(upto)) is not None:
        window.check()
        found.append(window)
    return found


def play(reader: LogReader, windows: list[LoggedWindow], disk: bytearray) -> bytearray:
    """Do to a disk what windows say."""
    for window in windows:
        for begin, end in window.batches():
            for start, length, data in reader.read(window, begin, end):
                disk[start * SECTOR : (start + length) * SECTOR] = bytes(length * SECTOR) if data is None else data
    return disk


def blank() -> bytearray:
    """Return the tests' disk."""
    return bytearray(DISK_SECTORS * SECTOR)


@hypothesis.seed(SEED)
@profile
@given(logs())
def test_what_is_read_is_what_was_written(log: tuple[int, list[Logged]]) -> None:
    """A whole log gives all its entries, and the disk that they make."""
    sector_bytes, entries = log
    reader = LogReader(MemoryFile(log_of(entries, sector_bytes=sector_bytes)), size_sectors=DISK_SECTORS)
    windows = drain(reader, upto=len(entries))
    rest = reader.rest()
    windows += [rest] if rest else []
    assert sum(window.entries for window in windows) == reader.number == len(entries)
    assert [window.mark for window in windows if window.closing == "mark"] == [
        entry.mark for entry in entries if entry.flags & LogFlag.MARK
    ]
    assert play(reader, windows, blank()) == replay(entries, blank(), sector_bytes=sector_bytes)


@hypothesis.seed(SEED)
@profile
@given(logs(), st.data())
def test_damaged_logs_give_windows_or_an_error(log: tuple[int, list[Logged]], data: st.DataObject) -> None:
    """Bytes changed anywhere, numbers of any size in any header, the end cut off: no other exception, no hang."""
    sector_bytes, entries = log
    content = bytearray(log_of(entries, sector_bytes=sector_bytes, tail=data.draw(st.integers(0, 2))))
    headers = [0]
    for entry in entries[:-1]:
        headers.append(headers[-1] + len(entry.encode(sector_bytes)))
    for _ in range(data.draw(st.integers(1, 4))):
        field = data.draw(st.integers(0, 3)) * 8
        header = data.draw(st.sampled_from([-sector_bytes, *headers])) + sector_bytes
        at = data.draw(st.sampled_from([header + field, data.draw(st.integers(0, len(content) - 8))]))
        at = min(at, len(content) - 8)
        content[at : at + 8] = data.draw(u64).to_bytes(8, "little")
    del content[data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content)))) :]
    upto = data.draw(st.one_of(st.none(), st.just(len(entries)), u64))
    swallow(bytes(content), upto=upto, fixed=data.draw(st.booleans()))


@hypothesis.seed(SEED)
@profile
@given(st.binary(max_size=8192), st.booleans(), st.one_of(st.none(), u64))
def test_any_bytes_give_windows_or_an_error(content: bytes, with_super: bool, upto: int | None) -> None:  # noqa: FBT001
    """Bytes that never were a log: likewise."""
    swallow(Super(3).encode() + content if with_super else content, upto=upto)


@hypothesis.seed(SEED)
@profile
@given(st.lists(st.tuples(u64, u64, st.one_of(st.integers(0, 31), u64), u64), max_size=20), st.integers(1, 2**54))
def test_headers_of_any_numbers_give_windows_or_an_error(
    headers: list[tuple[int, int, int, int]], size_sectors: int
) -> None:
    """Headers alone, on disks of any size: bounded memory, however much the entries claim."""
    blocks = [Entry(*header).encode().ljust(SECTOR, b"\0") for header in headers]
    swallow(Super(len(headers)).encode() + b"".join(blocks), upto=len(headers), size_sectors=min(size_sectors, 2**44))


def swallow(content: bytes, *, upto: int | None, fixed: bool = False, size_sectors: int = DISK_SECTORS) -> None:
    """Read everything there is; a CorruptionError, which comes again at the same place, is all that may be raised."""
    reader = LogReader(MemoryFile(content), size_sectors=size_sectors, fixed=fixed)
    windows, failed = [], False
    while not failed:
        try:
            window = reader.scan(upto)
        except CorruptionError:
            failed = True
        else:
            if window is None:
                break
            window.check()
            windows.append(window)
    if failed:
        place = reader.position
        with pytest.raises(CorruptionError, match=r"^a\.log at byte \d+: ") as raised:
            reader.scan(upto)
        assert raised.value.hint
        assert reader.position == place
    for window in windows:
        assert reach(window) <= size_sectors
        reader.read(window, 0, min(len(window), 100))


def reach(window: LoggedWindow) -> int:
    """Return the sector behind the last one that a window touches."""
    return int((window.starts + window.lengths).max()) if len(window) else 0


def test_memory_is_bounded() -> None:
    """A sparse log that claims terabytes, in few headers or in many, costs what a window may."""
    size_sectors = 2**44
    file = MemoryFile(Super(0).encode())
    file.truncate(1 << 42)
    file.write([Entry(0, size_sectors, LogFlag.DISCARD).encode()], SECTOR)
    at = 2 * SECTOR
    for number in range(100):
        file.write([Entry(number, (1 << 23) - 1, 0).encode()], at)
        at += (1 << 23) * SECTOR
    file.write([FLUSH.encode(SECTOR)], at)
    tracemalloc.start()
    try:
        reader = LogReader(file, size_sectors=size_sectors, fixed=True)
        windows = drain(reader)
        assert len(windows) == 1
        for begin, end in list(windows[0].batches())[-3:]:
            reader.read(windows[0], begin, end)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_MAX
    finally:
        tracemalloc.stop()


@hypothesis.seed(SEED)
@profile
@given(logs(), st.randoms(use_true_random=False))
def test_nothing_torn_is_consumed(log: tuple[int, list[Logged]], random: Random) -> None:
    """A log that appears piece by piece, within each entry in any order: each window is whole when it is handed out.

    That is all that the kernel promises: an entry's header may come before its data or behind it, in pieces of a
    log sector, but what comes behind the entry is written later.
    """
    sector_bytes, entries = log
    file = MemoryFile(Super(0, sector_bytes).encode())
    file.truncate(len(log_of(entries, sector_bytes=sector_bytes, tail=2)))
    reader = LogReader(file, size_sectors=DISK_SECTORS)
    disk, done, offset = blank(), 0, sector_bytes
    for number, entry in enumerate(entries):
        content = entry.encode(sector_bytes)
        pieces = list(range(0, len(content), sector_bytes))
        random.shuffle(pieces)
        for piece in pieces:
            file.write([content[piece : piece + sector_bytes]], offset + piece)
            windows = drain(reader)
            done += sum(window.entries for window in windows)
            play(reader, windows, disk)
            assert done <= number + 1
            assert disk == replay(entries[:done], blank(), sector_bytes=sector_bytes)
        offset += len(content)
        if random.random() < 0.3:
            file.write([Super(number + 1, sector_bytes).encode()], 0)
    file.write([Super(len(entries), sector_bytes).encode()], 0)
    play(reader, drain(reader), disk)
    closing = [at for at, entry in enumerate(entries) if entry.flags & (LogFlag.FLUSH | LogFlag.MARK)]
    assert disk == replay(entries[: closing[-1] + 1 if closing else 0], blank(), sector_bytes=sector_bytes)
