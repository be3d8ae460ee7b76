"""The two files of a segment, and how what they hold is read: each datum is compared with its checksum (promise 5)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Final

from dmafs.core.batch import name_of
from dmafs.core.columns import Columns, Indicator
from dmafs.core.ondisk import HEADER_SIZE, RECORD_SIZE, Flag, Header, checksum
from dmafs.core.storage import File
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR

log = logging.getLogger(__name__)

RUN_SECTORS: Final = (1 << 20) // SECTOR
"""How much data of neighbouring events is read at once."""
RUN_GAP_SECTORS: Final = 16
"""Data that isn't wanted is read along up to this length: 8 KiB cost less than another system call."""


class Pair(Columns):
    """Descriptors in memory, and the open files that they come from and point into."""

    def __init__(self, header: Header, ext: File, dat: File) -> None:
        """Take ownership of two open files."""
        super().__init__(header.first)
        self.header = header
        self.ext = ext
        self.dat = dat

    @property
    def ext_size(self) -> int:
        """Return the number of bytes of the descriptor queue that count."""
        return HEADER_SIZE + self.records * RECORD_SIZE

    def read_into(self, index: int, skip: int, buffer: memoryview, *, nowait: bool = False) -> None:
        """Fill *buffer* from event number *index*, beginning *skip* sectors into it.

        Raises CorruptionError when the event's data doesn't match its checksum; with *nowait* BlockingIOError when
        the data isn't in the page cache.
        """
        if self.is_zero(index):
            buffer[:] = bytes(len(buffer))
        elif self.verified[index] or len(buffer) == self.lengths[index] * SECTOR:
            self._read(buffer, self.physicals[index] + skip, nowait=nowait)
            if not self.verified[index]:
                self._compare(index, buffer)
        else:
            whole = self.verify(index, nowait=nowait)
            buffer[:] = memoryview(whole)[skip * SECTOR : skip * SECTOR + len(buffer)]

    def _read(self, buffer: bytearray | memoryview, physical: int, *, nowait: bool) -> None:
        if nowait:
            self.dat.read_into_nowait(buffer, physical * SECTOR)
        else:
            self.dat.read_into(buffer, physical * SECTOR)

    def prefetch(self, index: int) -> None:
        """Have the system begin to read the data of event number *index*."""
        if not self.is_zero(index):
            self.dat.prefetch(self.physicals[index] * SECTOR, self.lengths[index] * SECTOR)

    def verify(self, index: int, *, nowait: bool = False) -> bytearray:
        """Read all data of event number *index*, check it (promise 5) and return it."""
        whole = bytearray(self.lengths[index] * SECTOR)
        if self.is_zero(index):
            return whole
        self._read(whole, self.physicals[index], nowait=nowait)
        self._compare(index, whole)
        return whole

    def _compare(self, index: int, data: bytearray | memoryview) -> None:
        """Compare the data of event number *index* with its checksum; CorruptionError if it doesn't match."""
        if checksum(data) != self.checksums[index]:
            start, offset = self.starts[index], self.physicals[index] * SECTOR
            raise CorruptionError(
                f"checksum of {self.dat.name} at byte {offset} doesn't match "
                f"(extent {start}+{self.lengths[index]} sectors, seq {self.header.first + index})",
                hint="the storage below the store is damaged; moments that need this extent can't be read",
            )
        self.verified[index] = 1

    def read_run(self, indexes: Sequence[int]) -> Iterator[memoryview | None]:
        """Yield the verified data of events with data, given by ascending numbers; neighbours are read at once.

        None stands for data that is damaged.
        """
        at = 0
        while at < len(indexes):
            begin = self.physicals[indexes[at]]
            stop, end = at, begin
            while stop < len(indexes):
                physical = self.physicals[indexes[stop]]
                after = physical + self.lengths[indexes[stop]]
                if stop > at and (physical > end + RUN_GAP_SECTORS or after > begin + RUN_SECTORS):
                    break
                stop, end = stop + 1, after
            data = memoryview(bytearray((end - begin) * SECTOR))
            self.dat.read_into(data, begin * SECTOR)
            for index in indexes[at:stop]:
                first = (self.physicals[index] - begin) * SECTOR
                part = data[first : first + self.lengths[index] * SECTOR]
                try:
                    self._compare(index, part)
                except CorruptionError as error:
                    log.error("%s", error.message)
                    yield None
                else:
                    yield part
            at = stop

    def indicators(self) -> Iterator[Indicator]:
        """Yield all indicators in order."""
        return (self.indicator(index) for index in range(len(self.indicator_seqs)))

    def indicator(self, index: int) -> Indicator:
        """Return one indicator."""
        name = ""
        if index in self.mark_places:
            physical, length, digest = self.mark_places[index]
            text = bytearray(length * SECTOR)
            self.dat.read_into(text, physical * SECTOR)
            if length and checksum(text) != digest:
                raise CorruptionError(
                    f"checksum of a mark in {self.dat.name} at byte {physical * SECTOR} doesn't match",
                    hint="the storage below the store is damaged",
                )
            name = name_of(text)
        flag = Flag(self.indicator_flags[index])
        return Indicator(self.indicator_seqs[index], self.indicator_times[index], flag, name)

    def marks(self) -> Iterator[Indicator]:
        """Yield the named marks."""
        for index in list(self.mark_places):
            yield self.indicator(index)

    def close(self) -> None:
        """Close both files."""
        self.ext.close()
        self.dat.close()
