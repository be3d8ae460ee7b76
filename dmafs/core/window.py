"""A window: events that were captured together, on their way from a log into the forward journal.

A tap that keeps a log learns of writes when a flush has completed, many at a time and in an order that means something
only as a whole. So they are journaled as a whole: written behind what counts, in a thread, a batch at a time, and
published all at once, with one time. What was written and not published is cut off when the journal is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from dmafs.core.batch import Extent
from dmafs.core.extent import Ints
from dmafs.core.limits import SegmentLimits
from dmafs.core.ondisk import EVENT_FLAGS, RECORD_DTYPE, Flag, Records
from dmafs.core.segment import Segment
from dmafs.core.statistics import Statistics
from dmafs.units import SECTOR

NOTED_SECTORS: Final = (1 << 20) // SECTOR
"""How much of a log without events in it is read again at most after the daemon was killed."""


class Beginning(NamedTuple):
    """What a window begins with: the first seq, its time, what is durable, the place in the log noted last."""

    seq: int
    time_ns: int
    durable: int
    noted: int


class Window:
    """See the module. Made by ``ForwardJournal.begin_window``, which publishes or abandons it."""

    def __init__(
        self, begin_segment: Callable[[int], Segment], limits: SegmentLimits, last: Segment | None, begin: Beginning
    ) -> None:
        """Begin behind the segment *last*; *begin_segment* makes one that begins with a given seq."""
        self._begin_segment = begin_segment
        self._limits = limits
        self._begin = begin
        self.time_ns = begin.time_ns
        self.count = 0
        self.noted = False
        """Whether an indicator stands behind it."""
        self.position = self.retained = 0
        self.parts: list[tuple[Segment, Records]] = []
        self._last = last
        self._records, self._sectors = (last.records, last.data_sectors) if last else (0, 0)
        if last is not None:
            self.parts.append((last, np.empty(0, RECORD_DTYPE)))

    def write(self, extents: Sequence[Extent]) -> None:
        """Write events behind those of the window. May run in a thread, one call at a time."""
        begin = 0
        while begin < len(extents):
            end, sectors = self._fitting(extents, begin)
            if end == begin:
                self._next_segment()
                continue
            segment, pending = self.parts[-1]
            pending = segment.write_behind(pending, extents[begin:end], self.time_ns, durable=self._begin.durable)
            self.parts[-1] = segment, pending
            self._records += end - begin
            self._sectors += sectors
            self.count += end - begin
            begin = end

    def close(self, flag: Flag, *, position: int, retained: int, name: str = "") -> None:
        """Write the indicator that ends the window; a name makes a mark too. May run in a thread.

        *position* is the place in the log behind the window, *retained* from where on the log is still needed. Without
        events that is only noted from time to time.
        """
        self.position, self.retained = position, retained
        if not self.count and not name and position - self._begin.noted <= NOTED_SECTORS:
            return
        if not self.parts:
            self._next_segment()
        segment, pending = self.parts[-1]
        for kind, text in (*([(Flag.MARK, name)] if name else []), (flag, "")):
            pending = segment.write_indicator_behind(
                pending,
                kind,
                self.time_ns,
                durable=self._begin.durable,
                position=position,
                retained=retained,
                name=text,
            )
        self.parts[-1] = segment, pending
        self.noted = True

    def _fitting(self, extents: Sequence[Extent], begin: int) -> tuple[int, int]:
        """Return the end of the run that fits into the present segment, and its sectors of data.

        One event fits into an empty segment whatever its size.
        """
        end, sectors = begin, 0
        events = len(self.parts[-1][0]) + len(self.parts[-1][1]) if self.parts else -1
        while events >= 0 and end < len(extents):
            _, length, data = extents[end]
            more = 0 if data is None else length
            if events and self._limits.is_full(self._records + end - begin, self._sectors + sectors + more):
                break
            end, sectors, events = end + 1, sectors + more, events + 1
        return end, sectors

    def _next_segment(self) -> None:
        self.parts.append((self._begin_segment(self._begin.seq + self.count), np.empty(0, RECORD_DTYPE)))
        self._records = self._sectors = 0

    def extents(self) -> Iterator[tuple[Ints, Ints]]:
        """Yield starts and stops of the events, a part at a time."""
        for _, records in self.parts:
            events = records[np.isin(records["flags"], EVENT_FLAGS)]
            starts = events["start"].astype(np.int64)
            yield starts, starts + events["length"].astype(np.int64)

    def count_into(self, statistics: Statistics) -> None:
        """Have the events counted."""
        for _, records in self.parts:
            statistics.note_events(records)

    def discard(self) -> None:
        """Take away what was written."""
        for segment, _ in self.parts:
            if segment is self._last:
                segment.trim()
            else:
                segment.remove()
                segment.close()
