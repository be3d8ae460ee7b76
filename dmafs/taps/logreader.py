"""Reading a log in dm-log-writes format, window by window, also while it grows.

A *window* is what stands between two closing entries (a flush, a mark), the closing one included: what a power cut
after it would have left is in all windows up to it. ``scan`` finds the next complete window and reads headers only;
``read`` reads the data of some of its rows.

Invariants:

1. *Nothing torn is consumed.* A writer's header can be visible before its data. So an entry with data counts only
   once the header behind it is visible, or the super block counts it; one without data once its own header was seen
   twice alike. A header of zeros is "not yet", and so is one behind the end of a file that grows.
   Of a writer that has several entries under way at once neither holds: then the caller says up to which number.
2. Each header is parsed once, but for that of a last entry which doesn't count yet.
3. Memory is bounded by ``WINDOW_ROWS`` (and the rows of one entry): a longer window is closed without a closing entry.
4. After an error the reader is where it was: before the entry that it is about.

The file may be punched before ``position``, its super block too if the caller knows the size of a log sector.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from dmafs.core.extent import MAX_EXTENT_SECTORS, MAX_ZERO_SECTORS, Ints
from dmafs.core.storage import File
from dmafs.errors import CorruptionError
from dmafs.taps.logformat import (
    END_MARK,
    ENTRY,
    HEADER_BYTES,
    SUPER,
    Entry,
    LogFlag,
    Super,
    decode_mark,
    require_sector_bytes,
)
from dmafs.units import SECTOR

WINDOW_ROWS: Final = 1 << 20
"""A window with more rows is closed early: 32 MiB of columns."""
CHUNK_BYTES: Final = 1 << 20
"""What is read at once where entries are small: their data is read along, which is cheaper than a call for each."""
TAIL_BYTES: Final = 4096
"""What is read at once at first, and after data that was skipped: there may be nothing more yet."""
BATCH_BYTES: Final = 2 << 20
"""What of a window is read at once: not much more than the processor's caches hold, since it is read to be written."""
SKIP_BYTES: Final = 128 << 10
"""Data of this length isn't read along."""

_SLOW: Final = ~int(LogFlag.FUA | LogFlag.METADATA)
_DISCARD: Final = int(LogFlag.DISCARD)
_CLOSING: Final = int(LogFlag.FLUSH | LogFlag.MARK)
_GROWTH: Final = 16  # of chunks, from TAIL_BYTES to CHUNK_BYTES in two steps

Closing = Literal["flush", "mark", "end", "full"]
LoggedExtent = tuple[int, int, memoryview | None]


@dataclass(frozen=True, slots=True)
class LoggedWindow:
    """The writes and discards of one window in log order, each a row, or several if it is longer than an event can be.

    ``starts`` and ``lengths`` in sectors of 512 bytes, ``flags`` of the entries, ``offsets`` of the data in the log.
    A flush that has data is its window's last row, and closes it.
    """

    starts: Ints
    lengths: Ints
    flags: Ints
    offsets: Ints
    closing: Closing
    mark: str
    begin: int
    """Byte offset in the log of the first entry."""
    end: int
    """Byte offset behind the last entry: where a reader goes on."""
    entries: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts)

    def data_bytes(self, begin: int = 0, end: int | None = None) -> Ints:
        """Return the bytes of data of each row of ``[begin, end)``, 0 of discards."""
        return np.where(self.flags[begin:end] & _DISCARD, 0, self.lengths[begin:end] * SECTOR)

    def batches(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Cut rows ``[begin, end)`` into runs that span BATCH_BYTES of the log at most."""
        offsets = self.offsets[begin:end]
        ends = offsets + self.data_bytes(begin, end)
        first = 0
        while first < len(offsets):
            last = max(int(np.searchsorted(ends, offsets[first] + BATCH_BYTES, "right")), first + 1)
            yield begin + first, begin + last
            first = last

    def check(self) -> None:
        """Assert the invariants of the columns."""
        assert len(self.starts) == len(self.lengths) == len(self.flags) == len(self.offsets)
        assert np.all(self.lengths > 0)
        assert np.all(self.lengths <= np.where(self.flags & _DISCARD, MAX_ZERO_SECTORS, MAX_EXTENT_SECTORS))
        ends = self.offsets + self.data_bytes()
        assert np.all(ends[:-1] <= self.offsets[1:]), "rows are in the order of the log"
        assert not len(self) or (self.begin < self.offsets[0] and ends[-1] <= self.end)


class LogReader:
    """A position in a log, and what has been found of the window that begins before it."""

    def __init__(
        self,
        file: File,
        *,
        size_sectors: int,
        position: int = 0,
        number: int | None = None,
        sector_bytes: int | None = None,
        fixed: bool = False,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        """Begin at byte *position* of a log, which has to be an entry's; 0 means the first one.

        *size_sectors* is the size of the disk in sectors of 512 bytes. *number* says how many entries come before
        *position*; without it the super block's count is of no use behind the first one. *sector_bytes* is the size of
        a log sector, where it is known before there is a super block. A *fixed* file doesn't grow: entries have to end
        in it.
        """
        self.file = file
        self._size_bytes = size_sectors * SECTOR
        self._fixed = fixed
        self._rows = window_rows
        self._sector_bytes = 0
        self._numbered = number is not None or not position
        self.number = number or 0
        """Entries before ``position``, if they could be counted."""
        self.position = position
        """Byte offset of the next entry."""
        self._begin = position
        self._first = self.number
        self._unsure: int | None = None  # offset of the last entry's header, while its data may be incomplete
        self._buffer = bytearray(CHUNK_BYTES)
        self._base = self._filled = 0
        self._step = TAIL_BYTES
        self._fresh = False  # the buffer was filled while a window was found that ``scan`` has just returned
        self._upto: int | None = None  # of the last scan
        self._stale = False  # likewise, and ``scan`` has been called again: zeros in it may be something by now
        self._clear()
        if position > file.size():
            raise CorruptionError(
                f"{file.name} has {file.size()} bytes, its next entry should be at byte {position}",
                hint="the log was cut off or replaced by another one",
            )
        if sector_bytes is not None:
            require_sector_bytes(sector_bytes, file.name)
            self._set_sector_bytes(sector_bytes)

    def _clear(self) -> None:
        self._starts, self._counts, self._flags, self._offsets = (array("q") for _ in range(4))

    def _set_sector_bytes(self, sector_bytes: int) -> None:
        if self.position % sector_bytes:
            raise CorruptionError(
                f"{self.file.name} can't have an entry at byte {self.position}: its log sectors have "
                f"{sector_bytes} bytes",
                hint="the log was replaced by another one",
            )
        self._sector_bytes = sector_bytes
        self.position = self._begin = max(self.position, sector_bytes)

    @property
    def pending(self) -> int:
        """Return how many rows the window has so far that ``scan`` couldn't complete."""
        return len(self._starts)

    def read_super(self) -> Super | None:
        """Return the super block as it is now; None if it isn't written yet."""
        if self.file.size() < SUPER.size:
            return None
        data = bytearray(SUPER.size)
        self.file.read_into(data, 0)
        found = Super.decode(data, self.file.name)
        if found is not None and self._sector_bytes and found.sector_bytes != self._sector_bytes:
            raise CorruptionError(
                f"{self.file.name} at byte 24: log sectors of {found.sector_bytes} bytes instead of "
                f"{self._sector_bytes}",
                hint="the log was replaced by another one",
            )
        return found

    # -- scanning -----------------------------------------------------------------------------------------------

    def scan(self, upto: int | None = None) -> LoggedWindow | None:
        """Return the next window, or None if it isn't complete yet; the next call goes on where this one stopped.

        With *upto* exactly the entries whose number is less count, whatever is visible of others; they are complete.
        """
        assert upto is None or self._numbered
        if not self._begin_scan(upto):
            return None
        sure = upto is not None
        while upto is None or self.number < upto:
            if not self._header_visible():
                break
            self._unsure = None
            room = self._rows - len(self._starts)
            if room <= 0:
                return self._close("full")
            if self._take_writes(room if upto is None else min(room, upto - self.number)):
                continue
            entry = Entry.decode(self._buffer, self.position - self._base)
            if not sure and not self._is_settled(entry):
                break
            mark = self._take_special(entry)
            if entry.flags & _CLOSING:
                if not self._is_whole(sure=sure):
                    break
                flush = entry.flags & LogFlag.FLUSH
                return self._close("flush" if flush else "end" if mark == END_MARK else "mark", mark)
        self._retreat(sure=sure)
        return None

    def _begin_scan(self, upto: int | None) -> bool:
        """Make sure that it is known what a log sector is; say whether it is."""
        if not self._sector_bytes:
            found = self.read_super()
            if found is None:
                return False
            self._set_sector_bytes(found.sector_bytes)
        if not self._fresh or upto != self._upto:
            self._filled = 0  # what was read before may have changed
        self._stale, self._fresh, self._upto = self._fresh, False, upto
        return True

    def rest(self) -> LoggedWindow | None:
        """Return what was found behind the last closing entry as a window, where the log has ended without one."""
        return self._close("end") if self.pending else None

    def _close(self, closing: Closing, mark: str = "") -> LoggedWindow:
        """Return the window, and begin the next one."""
        scale = self._sector_bytes // SECTOR
        starts, counts, flags, offsets = (
            np.array(column, np.int64) for column in (self._starts, self._counts, self._flags, self._offsets)
        )
        entries = self.number - self._first
        window = LoggedWindow(
            starts * scale, counts * scale, flags, offsets, closing, mark, self._begin, self.position, entries
        )
        self._clear()
        self._unsure, self._fresh = None, True
        self._begin, self._first = self.position, self.number
        return window

    def _take_writes(self, room: int) -> int:
        """Take up to *room* plain short writes whose headers are in the buffer, and return how many; the tight loop."""
        unpack, buffer, base = ENTRY.unpack_from, self._buffer, self._base
        add_start, add_count = self._starts.append, self._counts.append
        add_flags, add_offset = self._flags.append, self._offsets.append
        size = self._size_bytes // self._sector_bytes
        longest = MAX_EXTENT_SECTORS * SECTOR // self._sector_bytes
        shift = self._sector_bytes.bit_length() - 1
        at, last, before = self.position - base, self._filled - HEADER_BYTES, len(self._starts)
        header = at
        for _ in range(room):
            if at > last:
                break
            start, count, flags, data_bytes = unpack(buffer, at)
            if flags & _SLOW or not 0 < count <= longest or start + count > size or data_bytes > count << shift:
                break
            add_start(start)
            add_count(count)
            add_flags(flags)
            header = at
            at += 1 << shift
            add_offset(base + at)
            at += count << shift
        taken = len(self._starts) - before
        if taken:
            self.number += taken
            self.position = base + at
            self._unsure = base + header
        return taken

    def _take_special(self, entry: Entry) -> str:
        """Take the entry at the position, which isn't a plain short write; return a mark's text."""
        where = f"{self.file.name} at byte {self.position}"
        entry.check(sector_bytes=self._sector_bytes, size_bytes=self._size_bytes, where=where)
        mark = self._mark_text(entry, where) if entry.flags & LogFlag.MARK else ""
        self._unsure = self.position if entry.data_sectors else None
        self._add_rows(entry)
        self.position += (1 + entry.data_sectors) * self._sector_bytes
        self.number += 1
        return mark

    def _add_rows(self, entry: Entry) -> None:
        """Add an entry's rows, none of them longer than an event can be."""
        discard = bool(entry.flags & _DISCARD)
        limit = (MAX_ZERO_SECTORS if discard else MAX_EXTENT_SECTORS) * SECTOR // self._sector_bytes
        offset = self.position + self._sector_bytes
        for done in range(0, entry.sectors, limit):
            self._starts.append(entry.sector + done)
            self._counts.append(min(limit, entry.sectors - done))
            self._flags.append(entry.flags)
            self._offsets.append(offset if discard else offset + done * self._sector_bytes)

    def _is_settled(self, entry: Entry) -> bool:
        """Say whether the header at the position is still as it was read: it may have been just being written."""
        again = bytearray(HEADER_BYTES)
        self.file.read_into(again, self.position)
        return again == entry.encode()

    def _mark_text(self, entry: Entry, where: str) -> str:
        text = bytearray(entry.data_bytes)
        if text:
            self.file.read_into(text, self.position + HEADER_BYTES)
        return decode_mark(text, where)

    def _is_whole(self, *, sure: bool) -> bool:
        """Say whether the last entry counts (invariant 1); *sure*: if it is in the file at all."""
        if self._unsure is None:
            return True
        if self.position > self.file.size():
            if self._fixed:
                self._refuse()
            return False
        return sure or self._header_visible() or self._is_counted(self.number - 1)

    def _retreat(self, *, sure: bool) -> None:
        """Give back the last entry if it doesn't count."""
        if not self._is_whole(sure=sure) and self._unsure is not None:
            self._undo()
        self._unsure = None

    def _refuse(self) -> None:
        """Give back the last entry, and raise CorruptionError if it still isn't in the file."""
        self._undo()
        header, size = bytearray(HEADER_BYTES), self.file.size()
        self.file.read_into(header, self.position)
        end = self.position + (1 + Entry.decode(header).data_sectors) * self._sector_bytes
        if end > size:
            raise CorruptionError(
                f"{self.file.name} at byte {self.position}: an entry ends at byte {end} of {size}",
                hint="the log is damaged, or not in the format of dm-log-writes",
            )

    def _undo(self) -> None:
        """Give back the last entry."""
        assert self._unsure is not None
        self.position, self._unsure = self._unsure, None
        self.number -= 1
        while self._offsets and self._offsets[-1] > self.position:
            for column in (self._starts, self._counts, self._flags, self._offsets):
                column.pop()

    def _is_counted(self, number: int) -> bool:
        """Say whether the super block counts the entry of a number, which the writer does once it is complete."""
        if not self._numbered:
            return False
        found = self.read_super()
        return found is not None and found.entries > number

    # -- the buffer ---------------------------------------------------------------------------------------------

    def _in_buffer(self, offset: int) -> bool:
        return self._base <= offset and offset + HEADER_BYTES <= self._base + self._filled

    def _header_visible(self) -> bool:
        """Say whether there is a header at the position that isn't all zeros; then it is in the buffer."""
        if not self._in_buffer(self.position) and not self._load():
            return False
        at = self.position - self._base
        if not any(self._buffer[at : at + HEADER_BYTES]) and self._stale:  # it may have been written since
            self._filled = 0
            return self._load() and any(self._buffer[:HEADER_BYTES])
        return any(self._buffer[at : at + HEADER_BYTES])

    def _load(self) -> bool:
        """Read from the position on; say whether a header could be read."""
        at = self.position
        rest = (self.file.size() - at) // self._sector_bytes * self._sector_bytes
        if rest <= 0:
            return False
        skipped = at - (self._base + self._filled) >= SKIP_BYTES
        self._step = TAIL_BYTES if skipped or not self._filled else min(self._step * _GROWTH, CHUNK_BYTES)
        length = min(self._step, rest)
        self.file.read_into(memoryview(self._buffer)[:length], at)
        self._base, self._filled, self._stale = at, length, False
        return True

    # -- data ---------------------------------------------------------------------------------------------------

    def read(
        self, window: LoggedWindow, begin: int, end: int, *, buffer: bytearray | None = None
    ) -> list[LoggedExtent]:
        """Return rows ``[begin, end)`` with their data, None of discards; one read per BATCH_BYTES. Any thread may.

        The data of one batch can be read into a *buffer*, which has to be long enough.
        """
        found: list[LoggedExtent] = []
        for first, last in window.batches(begin, end):
            base = int(window.offsets[first])
            sizes = window.data_bytes(first, last).tolist()
            offsets = (window.offsets[first:last] - base).tolist()
            size = offsets[-1] + sizes[-1]
            data = memoryview(bytearray(size) if buffer is None else buffer)[:size]
            if data:
                self.file.read_into(data, base)
            rows = zip(
                window.starts[first:last].tolist(), window.lengths[first:last].tolist(), offsets, sizes, strict=True
            )
            found += [(start, length, data[at : at + size] if size else None) for start, length, at, size in rows]
        return found
