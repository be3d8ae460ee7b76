"""The pass-through tap: the primary as a file, each write of which is captured.

Order of a write: journal first, then primary. So whatever is on the primary is in the journal, and after an unclean
stop of this program the events since the last durable flush are written to the primary again (``redo``), after which
both agree. Both are written to the page cache only; a flush makes both durable.

Writes are widened to whole sectors with what the primary holds around them. Reads come from the primary.

While it doesn't *capture*, writes go to the primary alone. Before that all that is journaled has to be durable, and
known to be so after a kill too: what is written again would overwrite what isn't journaled.
"""

from __future__ import annotations

from dmafs.core.extent import MAX_EXTENT_SECTORS
from dmafs.core.storage import File
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import SourceError
from dmafs.units import SECTOR

_REDO_BATCH = 256  # events written again between two yields
_LIMIT = MAX_EXTENT_SECTORS * SECTOR


class PassThroughTap:
    """The tap of one volume. Called on the volume's thread, but for ``read``."""

    def __init__(self, volume: Volume, primary: File) -> None:
        """Capture writes to *primary*; SourceError when its size isn't the volume's."""
        size = volume.info.size_sectors * SECTOR
        if primary.size() != size:
            raise SourceError(
                f"source {primary.name} has {primary.size()} bytes, volume {volume.info.name} {size}",
                hint="a source must keep its size; protect the resized one as a new volume",
            )
        self._volume = volume
        self._gate = volume.gate
        self.primary = primary
        self.size = size
        self.captures = True

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes within the primary, captured first. A long write becomes several events.

        StoreFullError if the journal has no space for it; then the primary has nothing of it that isn't journaled.
        """
        assert offset >= 0
        assert offset + len(data) <= self.size
        lead, tail = offset % SECTOR, -(offset + len(data)) % SECTOR
        if lead or tail:
            data = self._widened(offset, data, lead, tail)
            offset -= lead
        if len(data) <= _LIMIT:
            if data:
                self._write_part(offset, data)
            return
        block = memoryview(data)
        for begin in range(0, len(block), _LIMIT):
            self._write_part(offset + begin, block[begin : begin + _LIMIT])

    def _write_part(self, offset: int, data: bytes | memoryview) -> None:
        if self.captures:
            self._volume.write(offset // SECTOR, data)
        with self._gate(fatal=True):
            self.primary.write((data,), offset)

    def _widened(self, offset: int, data: bytes, lead: int, tail: int) -> bytes:
        before, after = bytearray(lead), bytearray(tail)
        if lead:
            self.primary.read_into(before, offset - lead)
        if tail:
            self.primary.read_into(after, offset + len(data))
        return b"".join((before, data, after))

    def read(self, offset: int, length: int, *, nowait: bool = False) -> bytearray:
        """Return bytes of the primary, fewer at its end; with *nowait* BlockingIOError if that has to wait."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        if nowait:
            self.primary.read_into_nowait(buffer, offset)
        else:
            self.primary.read_into(buffer, offset)
        return buffer

    def close(self) -> None:
        """Close the primary."""
        self.primary.close()

    def redo(self) -> Work[int]:
        """Write the events since the last durable flush to the primary again, durably; return how many there were.

        Done twice it changes nothing. Every event's data is verified first.
        """
        journal = self._volume.journal
        first, last = journal.durable + 1, journal.head
        for begin in range(first, last + 1, _REDO_BATCH):

            def redo(begin: int = begin) -> None:
                for seq in range(begin, min(begin + _REDO_BATCH, last + 1)):
                    self._redo_event(seq)

            with self._gate(fatal=True):
                yield redo
        if first <= last:
            with self._gate(fatal=True):
                yield self.primary.datasync
            journal.durable = last
        return last + 1 - first

    def _redo_event(self, seq: int) -> None:
        segment = self._volume.journal.segment_of(seq)
        index = seq - segment.header.first
        offset = segment.starts[index] * SECTOR
        if segment.is_zero(index):
            self.primary.zero(offset, segment.lengths[index] * SECTOR)
        else:
            self.primary.write([segment.verify(index)], offset)
