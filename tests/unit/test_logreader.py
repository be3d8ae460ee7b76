"""Claims about dmafs.taps.logreader: windows are what the log says, and nothing torn is consumed."""

from __future__ import annotations

from typing import Any

import pytest

from dmafs.core.extent import MAX_EXTENT_SECTORS, MAX_ZERO_SECTORS
from dmafs.errors import CorruptionError
from dmafs.taps.logformat import END_MARK, Entry, LogFlag, Super
from dmafs.taps.logreader import BATCH_BYTES, CHUNK_BYTES, LoggedWindow, LogReader
from dmafs.units import SECTOR
from tests.logs import DISK_SECTORS, FLUSH, Logged, MemoryFile, discard, log_of, mark, replay, write
from tests.unit.tools import fill


def windows_of(reader: LogReader, *, upto: int | None = None) -> list[LoggedWindow]:
    """Return all complete windows, checked."""
    found = []
    while (window := reader.scan(upto)) is not None:
        window.check()
        found.append(window)
    return found


def reader_of(content: bytes, size_sectors: int = DISK_SECTORS, **options: Any) -> LogReader:
    """Return a reader of a log in memory."""
    return LogReader(MemoryFile(content), size_sectors=size_sectors, **options)


def contents(reader: LogReader, window: LoggedWindow) -> list[tuple[int, int, bytes | None]]:
    """Return all rows with their data."""
    rows = reader.read(window, 0, len(window))
    return [(start, length, None if data is None else bytes(data)) for start, length, data in rows]


# -- what windows are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sector_bytes", [512, 1024, 4096])
def test_windows_in_sectors_of_the_disk(sector_bytes: int) -> None:
    """Starts and lengths are 512-byte sectors whatever the log's are; data and order are the log's."""
    scale = sector_bytes // SECTOR
    one, two = fill(1, scale), fill(2, 2 * scale)
    entries = [
        write(3, one, sector_bytes=sector_bytes),
        discard(8, 4),
        write(5, two, LogFlag.FUA | LogFlag.METADATA, sector_bytes=sector_bytes),
        FLUSH,
        write(3, one, sector_bytes=sector_bytes),
        mark("later"),
    ]
    reader = reader_of(log_of(entries, sector_bytes=sector_bytes))
    first, second = windows_of(reader)
    assert contents(reader, first) == [
        (3 * scale, scale, one),
        (8 * scale, 4 * scale, None),
        (5 * scale, 2 * scale, two),
    ]
    assert first.flags.tolist() == [0, LogFlag.DISCARD, LogFlag.FUA | LogFlag.METADATA]
    assert (first.closing, first.mark, first.entries, first.begin) == ("flush", "", 4, sector_bytes)
    assert (second.closing, second.mark, second.entries) == ("mark", "later", 2)
    assert second.begin == first.end
    assert second.end == reader.file.size() == reader.position
    assert reader.number == len(entries)


def test_a_flush_with_data_is_its_windows_last_row() -> None:
    """A journal's commit block belongs to what it commits."""
    reader = reader_of(log_of([write(1, fill(1)), write(2, fill(2), LogFlag.FLUSH | LogFlag.FUA), FLUSH]))
    first, second = windows_of(reader)
    assert contents(reader, first) == [(1, 1, fill(1)), (2, 1, fill(2))]
    assert first.closing == "flush"
    assert len(second) == 0


def test_the_end_mark_is_told_from_others() -> None:
    """``dmsetup remove`` leaves a mark of a text of its own."""
    (window,) = windows_of(reader_of(log_of([write(1, fill(1)), mark(END_MARK)])))
    assert (window.closing, window.mark) == ("end", END_MARK)


def test_long_entries_are_several_rows() -> None:
    """No row is longer than an event of the journal can be; data of each is its part."""
    data = bytes(range(256)) * (2 * (2 * MAX_EXTENT_SECTORS + 1))
    size = 3 * MAX_ZERO_SECTORS
    reader = reader_of(log_of([write(7, data), discard(0, 2 * MAX_ZERO_SECTORS + 5), FLUSH]), size)
    (window,) = windows_of(reader)
    rows = contents(reader, window)
    assert b"".join(part for _, _, part in rows if part) == data
    assert [length for _, length, _ in rows] == [MAX_EXTENT_SECTORS] * 2 + [1, MAX_ZERO_SECTORS, MAX_ZERO_SECTORS, 5]
    starts = [7 + at * MAX_EXTENT_SECTORS for at in range(3)] + [at * MAX_ZERO_SECTORS for at in range(3)]
    assert [start for start, _, _ in rows] == starts
    assert window.entries == 3


def test_batches_are_bounded_and_whole() -> None:
    """Batches cover all rows in order; each spans no more of the log than its bound, so that one read gets it."""
    entries = [write(at, fill(at % 251, 1500)) for at in range(40)]
    reader = reader_of(log_of([*entries, FLUSH]))
    (window,) = windows_of(reader)
    batches = list(window.batches())
    assert [begin for begin, _ in batches] == [0, *[end for _, end in batches[:-1]]]
    assert batches[-1][1] == len(window)
    assert 1 < len(batches) < 25
    for begin, end in batches:
        span = int(window.offsets[end - 1] + window.data_bytes(end - 1, end)[0] - window.offsets[begin])
        assert span <= BATCH_BYTES
    assert list(window.batches(3, 5)) == [(3, 5)]
    parts = [part for begin, end in batches for part in reader.read(window, begin, end)]
    assert [bytes(data or b"") for _, _, data in parts] == [entry.data for entry in entries]


def test_a_long_window_is_closed_early() -> None:
    """Rows are bounded: what is longer becomes several windows, the first ones without a closing entry."""
    reader = reader_of(log_of([*(write(at, fill(at)) for at in range(10)), FLUSH]), window_rows=4)
    found = windows_of(reader)
    assert [(len(window), window.closing) for window in found] == [(4, "full"), (4, "full"), (2, "flush")]
    assert [start for window in found for start in window.starts.tolist()] == list(range(10))


def test_reading_goes_on_at_a_position() -> None:
    """A reader that begins where another one's window ended sees the rest; what is before may be a hole."""
    content = log_of([write(1, fill(1)), FLUSH, write(2, fill(2)), FLUSH], tail=1)
    first, second = windows_of(reader_of(content))
    file = MemoryFile(content)
    file.zero(0, first.end)
    again = LogReader(file, size_sectors=DISK_SECTORS, position=first.end, sector_bytes=SECTOR)
    (window,) = windows_of(again)
    assert contents(again, window) == [(2, 1, fill(2))]
    assert (window.begin, window.end) == (second.begin, second.end)


# -- what counts ---------------------------------------------------------------------------------------------------


def test_a_log_that_begins() -> None:
    """Without a super block nothing counts, unless it is known what a log sector is."""
    file = MemoryFile()
    unknown = LogReader(file, size_sectors=DISK_SECTORS)
    known = LogReader(file, size_sectors=DISK_SECTORS, sector_bytes=SECTOR)
    assert unknown.scan() is known.scan() is None
    file.write([bytes(SECTOR), log_of([write(1, fill(1)), FLUSH])[SECTOR:]], 0)
    assert unknown.scan() is None
    assert known.scan() is not None
    file.write([Super(0).encode()], 0)
    assert unknown.scan() is not None


def test_an_entry_with_data_waits_for_the_next_header() -> None:
    """A header alone doesn't count, with its data neither; the header behind it makes it count."""
    whole = log_of([write(1, fill(1), LogFlag.FLUSH), write(2, fill(2))], counted=0, tail=4)
    file = MemoryFile(whole[: 2 * SECTOR].ljust(len(whole), b"\0"))
    reader = LogReader(file, size_sectors=DISK_SECTORS)
    assert reader.scan() is None
    assert (reader.position, reader.number, reader.pending) == (SECTOR, 0, 0)
    file.write([fill(1)], 2 * SECTOR)
    assert reader.scan() is None
    file.write([Entry(2, 1, 0).encode()], 3 * SECTOR)
    window = reader.scan()
    assert window is not None
    assert contents(reader, window) == [(1, 1, fill(1))]
    assert reader.scan() is None
    assert reader.pending == 0


def test_an_entry_with_data_counts_when_the_super_block_counts_it() -> None:
    """The super block's number vouches for entries, if it is known which number an entry has."""
    content = log_of([FLUSH, write(1, fill(1), LogFlag.FLUSH)], tail=2)
    assert len(windows_of(reader_of(content))) == 2
    behind = reader_of(content, position=2 * SECTOR, number=1)
    assert len(windows_of(behind)) == 1
    assert windows_of(reader_of(content, position=2 * SECTOR)) == []


def test_what_lies_behind_the_end_of_the_file_does_not_count() -> None:
    """Not even if the super block counts it."""
    whole = log_of([write(1, fill(1), LogFlag.FLUSH)])
    file = MemoryFile(whole[:-1])
    reader = LogReader(file, size_sectors=DISK_SECTORS)
    assert reader.scan() is reader.scan(upto=1) is None
    assert reader.number == 0
    file.write([whole[-1:]], len(whole) - 1)
    assert reader.scan() is not None


def test_a_fixed_file_has_to_hold_its_entries() -> None:
    """The kernel writes no entry that wouldn't fit, so one that doesn't is damage, reported each time."""
    reader = LogReader(MemoryFile(log_of([write(1, fill(1, 9))])[:-SECTOR]), size_sectors=DISK_SECTORS, fixed=True)
    for _ in range(2):
        with pytest.raises(CorruptionError, match=r"^a\.log at byte 512: an entry ends at byte 5632 of 5120$"):
            reader.scan()


def test_a_fixed_file_may_be_full() -> None:
    """An entry that ends where the file does counts as soon as the super block says so."""
    reader = LogReader(MemoryFile(log_of([write(1, fill(1), LogFlag.FLUSH)])), size_sectors=DISK_SECTORS, fixed=True)
    assert len(windows_of(reader)) == 1


def test_a_header_that_is_being_written_is_looked_at_again() -> None:
    """A header that differs when it is read once more is not there yet, whatever it seemed to say."""

    class Torn(MemoryFile):
        """Shows the header at byte 512 with flags that no entry has, once."""

        torn = True

        def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
            super().read_into(buffer, offset)
            if self.torn and offset == SECTOR:
                self.torn = False
                buffer[16] = 32

    reader = LogReader(Torn(log_of([FLUSH])), size_sectors=DISK_SECTORS)
    assert reader.scan() is None
    assert reader.scan() is not None


def test_only_as_many_entries_as_said() -> None:
    """With a number, what is visible beyond doesn't count, and what is before counts without a look at the next."""
    entries = [write(1, fill(1)), FLUSH, write(2, fill(2)), FLUSH]
    reader = reader_of(log_of(entries))
    assert len(windows_of(reader, upto=1)) == 0
    assert (reader.number, reader.pending) == (1, 1)
    assert len(windows_of(reader, upto=3)) == 1
    assert reader.pending == 1
    assert len(windows_of(reader, upto=4)) == 1


def test_what_has_no_closing_entry_is_the_rest() -> None:
    """A recorded log may end without a flush."""
    reader = reader_of(log_of([FLUSH, write(1, fill(1))]))
    assert len(windows_of(reader, upto=2)) == 1
    rest = reader.rest()
    assert rest is not None
    assert (rest.closing, rest.entries) == ("end", 1)
    assert contents(reader, rest) == [(1, 1, fill(1))]
    assert reader.rest() is None


def test_a_counted_entry_that_is_missing_is_not_made_up() -> None:
    """Fewer entries than the super block counts: the reader stays where the first one is missing."""
    reader = reader_of(log_of([FLUSH, write(1, fill(1))], counted=4, tail=3))
    assert len(windows_of(reader, upto=4)) == 1
    assert reader.number == 2


# -- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Logged(1, 1, 64, fill(1)), "an entry with unknown flags 0x40"),
        (Logged(DISK_SECTORS, 1, 0, fill(1)), f"an entry reaches to byte {(DISK_SECTORS + 1) * SECTOR}"),
        (Logged(2**64 - 1, 2**64 - 1, 0), "an entry reaches to byte"),
        (Logged(1, 0, LogFlag.FUA), "an entry at sector 1 without sectors"),
        (mark("bad\n"), r"a mark with text b'bad\\n'"),
        (discard(1, 2**62), "an entry reaches to byte"),
    ],
)
def test_damage_is_an_error_each_time(bad: Logged, words: str) -> None:
    """The message names file and offset; the reader keeps what it had and stays before the entry."""
    good = [write(1, fill(1)), FLUSH, write(2, fill(2))]
    reader = reader_of(log_of([*good, bad, FLUSH]))
    assert reader.scan() is not None
    for _ in range(2):
        with pytest.raises(CorruptionError, match=rf"^a\.log at byte 3072: {words}"):
            reader.scan()
        assert (reader.number, reader.pending, reader.position) == (3, 1, 3072)


def test_positions_that_cannot_be() -> None:
    """A position behind the file's end or between two log sectors belongs to another log."""
    content = log_of([FLUSH], sector_bytes=4096)
    with pytest.raises(CorruptionError, match=r"^a\.log has 8192 bytes, its next entry should be at byte 12288$"):
        reader_of(content, position=12288)
    with pytest.raises(CorruptionError, match="can't have an entry at byte 512"):
        reader_of(content, position=512).scan()
    with pytest.raises(CorruptionError, match="log sectors of 4096 bytes instead of 512"):
        reader_of(content, sector_bytes=512).read_super()
    with pytest.raises(CorruptionError, match="log sectors of 100 bytes"):
        reader_of(content, sector_bytes=100)


# -- what it costs -------------------------------------------------------------------------------------------------


def test_long_data_is_not_read_by_scanning() -> None:
    """Of long entries little more than the headers is read."""
    entries = [write(at, fill(1, 1024)) for at in range(20)]
    file = MemoryFile(log_of([*entries, FLUSH]))
    assert len(windows_of(LogReader(file, size_sectors=DISK_SECTORS))) == 1
    assert file.read < 30 * 4096


def test_an_idle_log_costs_one_small_read() -> None:
    """A look that finds nothing new reads one page."""
    file = MemoryFile(log_of([FLUSH], tail=CHUNK_BYTES // SECTOR))
    reader = LogReader(file, size_sectors=DISK_SECTORS)
    windows_of(reader)
    before = file.read
    assert reader.scan() is None
    assert file.read - before == 4096


def test_replaying_windows_is_replaying_the_log() -> None:
    """Doing what the windows say, batch by batch, gives the disk that the entries give."""
    entries = [write(at * 7 % 900, fill(at % 250 + 1, at % 40 + 1)) for at in range(300)]
    for at in range(0, 300, 25):
        entries[at] = discard(at, 11)
        entries[at + 3] = FLUSH
    reader = reader_of(log_of([*entries, FLUSH]))
    disk = bytearray(DISK_SECTORS * SECTOR)
    for window in windows_of(reader):
        for start, length, data in reader.read(window, 0, len(window)):
            disk[start * SECTOR : (start + length) * SECTOR] = bytes(length * SECTOR) if data is None else data
    assert disk == replay(entries, bytearray(len(disk)))


def test_what_came_since_the_last_window_is_seen_at_once() -> None:
    """What was read along with a window isn't the end of a log: None means that there is no other window now."""
    file = MemoryFile(log_of([FLUSH], tail=20))
    reader = LogReader(file, size_sectors=DISK_SECTORS)
    assert reader.scan() is not None
    file.write([log_of([write(3, fill(3)), FLUSH])[SECTOR:]], reader.position)
    window = reader.scan()
    assert window is not None
    assert window.starts.tolist() == [3]
