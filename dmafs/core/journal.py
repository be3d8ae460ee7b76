"""The forward journal (fig. 7): all write events since the mirror's seq, as a row of segments.

The circular queue of the figure is a row of segment files: added at the head, unlinked at the tail. Head and tail are
persisted in the pointer slots only.

Invariants:

1. Events have dense seqs ``tail+1 .. head``; each segment's first seq is the one before's next seq.
2. Times of events strictly increase, but within a *window*: events that were captured together and have one time. So a
   canonical time names exactly one event, the last one with it, and a point never splits a window. An indicator's time
   isn't less than that of the event before it.
3. Each record says up to which seq journal and primary were durable when it was written. So an invalid record that a
   later one calls durable is damage and an error; anything else invalid is the torn end of an unclean stop.
4. A *gap* is an interval in which capture was not complete: from the indicator GAP on nothing is a point until
   RESYNCED says that the journal agrees with the primary again. GAP is the first record of its segment, so it stays
   as long as an event behind it does.
5. A journal fed from a log (*windowed*) has a sync indicator behind each window, which says up to where the log has
   been read. So journal and place in the log are one transaction: events behind the last indicator are read from the
   log again. The segment with the last indicator stays.
6. What ``recover`` cut off is truncated durably before anything is appended, and no file is changed before it is known
   that nothing durable is missing: damage is reported each time.

One thread appends and reads the columns; ``datasync`` of taken segments may run in another one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from uuid import UUID

import numpy as np

from dmafs.core.columns import Indicator
from dmafs.core.extent import MAX_EXTENT_SECTORS, MAX_ZERO_SECTORS, Ints
from dmafs.core.layers import Growing, Layer, LayerTree, Selectable, entries, net_layer, stacked
from dmafs.core.limits import SegmentLimits
from dmafs.core.ondisk import Flag, Header, Kind, new_salt
from dmafs.core.recovery import DIRECTORY, Recovery, last_indicated, stem
from dmafs.core.segment import Segment
from dmafs.core.storage import Storage, close_all
from dmafs.core.window import Beginning, Window
from dmafs.core.work import Work
from dmafs.units import SECTOR


@dataclass(frozen=True, slots=True)
class Gap:
    """An interval in which capture was not complete; *end* is None while it lasts."""

    begin: int
    begin_time_ns: int
    end: int | None = None
    end_time_ns: int = 0


class ForwardJournal:
    """The journal of one volume. Made by ``recover``."""

    def __init__(
        self,
        storage: Storage,
        uuid: UUID,
        limits: SegmentLimits,
        clock: Callable[[], int],
        *,
        index_bytes: int,
        windowed: bool = False,
    ) -> None:
        """Begin without segments, at seq 0; *clock* returns UTC nanoseconds, *index_bytes* limits merged layers.

        *windowed* if events come from a log.
        """
        self._storage = storage
        self._uuid = uuid
        self._limits = limits
        self._clock = clock
        self.segments: list[Segment] = []
        self.head = 0
        self.head_time_ns = 0
        self.durable = 0
        self.gaps: list[Gap] = []
        self.windowed = windowed
        self.position = 0
        """Up to where the log that events come from has been read."""
        self.retained = 0
        """From where on that log is of use: for what may still overlap what follows."""
        self.durable_retained = 0
        """The same, as the records that are durable say it: what lies before is needed by nobody any more."""
        self._window: Window | None = None
        self._noted = self._noted_retained = 0  # what the records say of position and retained
        self._dirty: list[Segment] = []
        self._new_names = False
        self._slot = 0  # of the first segment; all but the last segment are slots of the tree
        self._tree = LayerTree(self._leaf, later_wins=True, limit_bytes=index_bytes)

    # -- recovery -----------------------------------------------------------------------------------------------

    def recover(self, *, tail: int, tail_time_ns: int, durable: int) -> None:
        """Read the segments behind *tail*, cut off a torn end, and make the rest durable.

        *durable* is the head of the pointers. Raises CorruptionError when something durable is missing.
        """
        found = Recovery(self._storage, self._uuid, tail, tail_time_ns, windowed=self.windowed)
        self.durable = found.read(durable)
        if self.windowed:
            found.drop_unclosed()
        self.segments, self.head, self.head_time_ns = found.segments, found.head, found.head_time_ns
        for segment in self.segments:
            segment.trim()
            for index in segment.indicators_of(Flag.GAP, Flag.RESYNCED):
                self._note_gap(segment.indicator(index))
        for slot in range(len(self.segments) - 1):
            self._tree.add(slot)
        self._storage.sync_directory(DIRECTORY)
        for segment in self.segments:
            if len(segment.indicator_seqs):
                self.position = self._noted = segment.indicator_positions[-1]
                self.retained = next((value for value in reversed(segment.indicator_retained) if value), self.retained)
        self._noted_retained = self.durable_retained = self.retained

    # -- appending ----------------------------------------------------------------------------------------------

    def append(self, start: int, length: int, data: memoryview | bytes | None) -> int:
        """Append a write (or, with data None, a discard) of *length* sectors; return its seq.

        After an exception nothing was appended. At most MAX_EXTENT_SECTORS with data, MAX_ZERO_SECTORS without.
        """
        assert 0 < length <= (MAX_ZERO_SECTORS if data is None else MAX_EXTENT_SECTORS)
        segment = self._writable_segment(length if data is not None else 0)
        time_ns = max(self._clock(), self.head_time_ns + 1)
        segment.append_event(time_ns=time_ns, start=start, length=length, data=data, durable=self.durable)
        self.head += 1
        self.head_time_ns = time_ns
        return self.head

    def indicate(self, flag: Flag, name: str = "") -> None:
        """Append a sync indicator; one without a name is left out where no event follows the one before."""
        if flag in (Flag.FLUSH, Flag.TICK) and self.is_indicated(self.head):
            return
        self._indicate(flag, name)

    def _indicate(self, flag: Flag, name: str = "") -> None:
        segment = self._writable_segment(0, fresh=flag == Flag.GAP)
        self.head_time_ns = max(self._clock(), self.head_time_ns)
        segment.append_indicator(
            flag,
            time_ns=self.head_time_ns,
            durable=self.durable,
            name=name,
            position=self.position,
            retained=self.retained,
        )
        self._noted = self.position
        if flag != Flag.MARK:  # a mark doesn't say it
            self._noted_retained = self.retained
        self._note_gap(Indicator(self.head, self.head_time_ns, flag))

    # -- windows ------------------------------------------------------------------------------------------------

    def begin_window(self) -> Window:
        """Return a window at the head, for events that come from a log; until it ends nothing else is appended."""
        assert self.windowed
        assert self._window is None
        last = self.segments[-1] if self.segments else None
        time_ns = max(self._clock(), self.head_time_ns + 1)
        begin = Beginning(self.head + 1, time_ns, self.durable, self._noted)
        self._window = Window(self._begin_segment, self._limits, last, begin)
        return self._window

    def _begin_segment(self, first: int) -> Segment:
        header = Header(Kind.FORWARD, self._uuid, new_salt(), first)
        return Segment.create(self._storage, stem(first), header)

    def publish(self, window: Window) -> None:
        """Have the events of a window that is closed count, all at once, and its indicator. Touches memory only."""
        assert window is self._window
        self._window = None
        for segment, records in window.parts:
            if not self.segments or segment is not self.segments[-1]:
                self._add_segment(segment)
            segment.publish(records)
            self._mark_dirty(segment)
        self.position, self.retained = window.position, window.retained
        if window.noted:
            self._noted, self._noted_retained = window.position, window.retained
            self.head, self.head_time_ns = self.head + window.count, window.time_ns

    def abandon(self, window: Window) -> None:
        """Take away what a window has written; nothing of it counts."""
        assert window is self._window
        self._window = None
        window.discard()

    def note_position(self, position: int, retained: int) -> None:
        """Go on elsewhere in the log, or in another one; durable after the next flush."""
        self.position, self.retained = position, retained
        self._indicate(Flag.TICK)

    def _note_gap(self, indicator: Indicator) -> None:
        """Keep the list of gaps: one begins (unless one is open already) or ends."""
        is_open = bool(self.gaps) and self.gaps[-1].end is None
        if indicator.flag == Flag.GAP and not is_open:
            self.gaps.append(Gap(indicator.seq, indicator.time_ns))
        elif indicator.flag == Flag.RESYNCED and is_open:
            begin = self.gaps.pop()
            self.gaps.append(Gap(begin.begin, begin.begin_time_ns, indicator.seq, indicator.time_ns))

    def gap_around(self, seq: int) -> Gap | None:
        """Return the gap that *seq* is inside of, behind its beginning and before its end."""
        for gap in self.gaps:
            if gap.begin < seq and (gap.end is None or seq < gap.end):
                return gap
        return None

    def _writable_segment(self, sectors: int, *, fresh: bool = False) -> Segment:
        """Return the last segment, marked dirty; begin a new one if it is full or a *fresh* one is wanted."""
        assert self._window is None, "nothing is appended while a window is written"
        last = self.segments[-1] if self.segments else None
        full = (
            last is not None
            and len(last) > 0
            and (fresh or self._limits.is_full(last.records, last.data_sectors + sectors))
        )
        if last is None or full:
            last = self._begin_segment(self.head + 1)
            self._add_segment(last)
        self._mark_dirty(last)
        return last

    def _add_segment(self, segment: Segment) -> None:
        if self.segments:
            self._tree.add(self._slot + len(self.segments) - 1)
        self.segments.append(segment)
        self._new_names = True

    def _mark_dirty(self, segment: Segment) -> None:
        if not self._dirty or self._dirty[-1] is not segment:
            self._dirty.append(segment)

    # -- making durable -----------------------------------------------------------------------------------------

    def take_dirty(self) -> Callable[[], None]:
        """Return a call, for any thread, that makes durable all that was appended until now."""
        segments, new_names, retained = self._dirty, self._new_names, self._noted_retained
        self._dirty, self._new_names = [], False

        def datasync() -> None:
            for segment in segments:
                segment.datasync()
            if new_names:
                self._storage.sync_directory(DIRECTORY)
            self.durable_retained = retained

        return datasync

    def is_clean(self) -> bool:
        """Say whether all is durable and a sync indicator stands at the head: a flush would have nothing to do."""
        return not self._dirty and self.durable == self.head and self.is_indicated(self.head)

    def splits_window(self, seq: int) -> bool:
        """Say whether *seq* isn't the last event of its window: no point then."""
        if seq >= self.head or not self.segments or seq < self.segments[0].header.first:
            return False
        return self.time_of(seq) == self.time_of(seq + 1)

    # -- looking up ---------------------------------------------------------------------------------------------

    def segment_of(self, seq: int) -> Segment:
        """Return the segment that holds event *seq*. O(log segments)."""
        number = bisect_right(self.segments, seq, key=lambda segment: segment.header.first) - 1
        segment = self.segments[number]
        assert segment.header.first <= seq < segment.next_seq, f"seq {seq} isn't in the forward journal"
        return segment

    def time_of(self, seq: int) -> int:
        """Return the time_ns of event *seq*."""
        segment = self.segment_of(seq)
        return segment.times[seq - segment.header.first]

    def seq_at(self, time_ns: int, *, default: int) -> int:
        """Return the seq of the last event with a time not after *time_ns*, or *default*. O(log events)."""
        for segment in reversed(self.segments):
            if len(segment) and segment.times[0] <= time_ns:
                return segment.header.first + bisect_right(segment.times, time_ns) - 1
        return default

    def last_indicator(self, seq: int) -> Indicator | None:
        """Return the last sync indicator at or before *seq*."""
        for segment in reversed(self.segments):
            index = bisect_right(segment.indicator_seqs, seq) - 1
            if index >= 0:
                return segment.indicator(index)
        return None

    def is_indicated(self, seq: int) -> bool:
        """Say whether a sync indicator stands right after event *seq*."""
        found = self.last_indicator(seq)
        return found is not None and found.seq == seq

    def marks(self) -> Iterator[Indicator]:
        """Yield the named marks in order."""
        for segment in self.segments:
            yield from segment.marks()

    def indicators(self, after: int, upto: int) -> tuple[Ints, Ints, Ints]:
        """Return the sync indicators with *after* < seq <= *upto*: seqs, times, bytes of data behind each. O(n)."""
        parts = [(np.empty(0, np.int64),) * 3]
        behind = self.data_bytes() // SECTOR
        for segment in self.segments:
            behind -= segment.data_sectors  # of the segments after this one
            begin = bisect_right(segment.indicator_seqs, after)
            end = bisect_right(segment.indicator_seqs, upto)
            if begin < end:
                seqs = np.array(segment.indicator_seqs[begin:end], np.int64)
                first = int(seqs[0]) + 1 - segment.header.first
                physicals = np.append(np.array(segment.physicals[first:], np.int64), segment.data_sectors)
                left = behind + segment.data_sectors - physicals[seqs - seqs[0]]
                parts.append((seqs, np.array(segment.indicator_times[begin:end], np.int64), left * SECTOR))
        seqs, times, left = (np.concatenate(column) for column in zip(*parts, strict=True))
        return seqs, times, left

    def data_after(self, seq: int) -> int:
        """Return the bytes of data of the events after *seq*. O(segments)."""
        sectors = 0
        for segment in self.segments:
            if segment.header.first > seq + 1:
                sectors += segment.data_sectors
            elif segment.next_seq > seq + 1:
                sectors += segment.data_sectors - segment.physicals[seq + 1 - segment.header.first]
        return sectors * SECTOR

    def extents(self, after: int, upto: int) -> tuple[Ints, Ints]:
        """Return copies of starts and stops of the events *after*+1 .. *upto*; index 0 is event *after*+1."""
        parts = []
        for segment in self.segments:
            begin = max(after + 1 - segment.header.first, 0)
            end = min(upto + 1 - segment.header.first, len(segment))
            if begin < end:
                parts.append(segment.extents(begin, end))
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    # -- layers -------------------------------------------------------------------------------------------------

    def layers_nowait(self, upto: int) -> list[Selectable] | None:
        """Return layers that hold all events up to *upto*, later ones winning; None if one isn't made yet.

        What they hold of events behind the tail is on the mirror.
        """
        slot, rest = self._slots(upto)
        layers = self._tree.layers_nowait(0, slot)
        if layers is None:
            return None
        if not rest:
            return [*layers]
        segment = self.segments[slot - self._slot]
        return [*layers, Growing(segment, base=segment.header.first, end=rest)]

    def prepare(self, upto: int) -> Work[None]:
        """Make the layers that hold all events up to *upto*."""
        yield from self._tree.prepare(0, self._slots(upto)[0])

    def _slots(self, upto: int) -> tuple[int, int]:
        """Return the slot of the segment that event *upto* is in, and how many of its events count.

        A segment of which all count, and that isn't the last one, is left out: then it is the slot behind, and none.
        """
        number = bisect_right(self.segments, upto, key=lambda segment: segment.header.first) - 1
        if number < 0:
            return self._slot, 0
        rest = upto + 1 - self.segments[number].header.first
        if number < len(self.segments) - 1 and rest >= len(self.segments[number]):
            return self._slot + number + 1, 0
        return self._slot + number, min(rest, len(self.segments[number]))

    def _leaf(self, slot: int) -> Work[Layer]:
        """Make the layer of a whole segment."""
        if slot < self._slot:  # released meanwhile
            return net_layer(*stacked([]))
        segment = self.segments[slot - self._slot]
        columns = entries(segment, segment.header.first, 0, len(segment))
        layer: Layer = yield partial(net_layer, *columns)
        return layer

    def rebuilt(self, upto: int) -> list[Selectable]:
        """Return layers that hold all events up to *upto*, from their descriptors alone."""
        return [
            Growing(segment, base=segment.header.first, end=min(upto + 1 - segment.header.first, len(segment)))
            for segment in self.segments
            if segment.header.first <= upto
        ]

    def data_bytes(self) -> int:
        """Return the bytes of data in all segments."""
        return sum(segment.data_sectors for segment in self.segments) * SECTOR

    # -- housekeeping -------------------------------------------------------------------------------------------

    def release(self, tail: int) -> list[Segment]:
        """Take out the segments whose events all are at or before *tail*; the caller removes and closes them.

        A last segment with a gap's beginning or a mark at the tail stays: they are still of use. So does, of a windowed
        journal, the one with the last indicator.
        """
        count = 0
        end = max(last_indicated(self.segments), 0) if self.windowed else len(self.segments) - 1
        while count < end and self.segments[count].next_seq - 1 <= tail:
            count += 1
        self.gaps = [gap for gap in self.gaps if gap.end is None or gap.end > tail]
        if (
            count + 1 == len(self.segments)
            and self.head == tail
            and not self.windowed
            and self._is_done(self.segments[count])
        ):
            count += 1
        released = self.segments[:count]
        self.segments = self.segments[count:]
        self._slot += count
        self._tree.release(self._slot - 1)
        self._dirty = [segment for segment in self._dirty if segment not in released]
        return released

    def _is_done(self, last: Segment) -> bool:
        """Say whether nothing in the last segment is of use any more once all its events are in the mirror."""
        return len(last) > 0 and not self.gaps and not any(mark.seq == self.head for mark in last.marks())

    def close(self) -> None:
        """Close all segments."""
        close_all(file for segment in self.segments for file in (segment.ext, segment.dat))

    def check(self) -> None:
        """Assert the invariants."""
        expected = self.segments[0].header.first if self.segments else self.head + 1
        last_time = 0
        for segment in self.segments:
            segment.check()
            assert segment.header.first == expected, "segments follow each other"
            same = set(np.flatnonzero(np.diff(np.array([last_time, *segment.times], np.int64)) == 0).tolist())
            assert self.windowed or not same, "times of events are distinct"
            ends = [seq + 1 - segment.header.first for seq in segment.indicator_seqs]
            assert same.isdisjoint(ends), "a window ends at an indicator"
            last_time = max([last_time, *segment.times[-1:]])
            expected = segment.next_seq
        assert expected == self.head + 1, "the last segment ends at the head"
        self._tree.check()
        assert self.durable <= self.head
        assert last_time <= self.head_time_ns
