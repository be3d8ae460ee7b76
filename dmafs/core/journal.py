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

One thread appends and reads the columns; the calls of what ``take_dirty`` returns may run in others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from dmafs.core.columns import Indicator
from dmafs.core.extent import MAX_EXTENT_SECTORS, MAX_ZERO_SECTORS
from dmafs.core.forward import ForwardMaps
from dmafs.core.limits import IndexLimits, SegmentLimits
from dmafs.core.ondisk import Flag, Header, Kind, new_salt
from dmafs.core.part import Part
from dmafs.core.recovery import DIRECTORY, stem
from dmafs.core.reopening import Recovery, last_indicated
from dmafs.core.segment import Segment
from dmafs.core.storage import File, Storage, close_all
from dmafs.core.window import Beginning, Window
from dmafs.core.work import Datasync, Work


@dataclass(frozen=True, slots=True)
class Gap:
    """An interval in which capture was not complete; *end* is None while it lasts."""

    begin: int
    begin_time_ns: int
    end: int | None = None
    end_time_ns: int = 0


class ForwardJournal(ForwardMaps):
    """The journal of one volume. Made by ``recover``."""

    def __init__(
        self,
        storage: Storage,
        uuid: UUID,
        limits: SegmentLimits,
        clock: Callable[[], int],
        *,
        index: IndexLimits,
        windowed: bool = False,
    ) -> None:
        """Begin without segments, at seq 0; *clock* returns UTC nanoseconds.

        *windowed* if events come from a log.
        """
        super().__init__(storage, uuid, index, windowed=windowed)
        self._limits = limits
        self._clock = clock
        self.head_time_ns = 0
        self.durable = 0
        self.gaps: list[Gap] = []
        self.gaps_begun = 0
        """How many since the volume was opened."""
        self.position = 0
        """Up to where the log that events come from has been read."""
        self.retained = 0
        """From where on that log is of use: for what may still overlap what follows."""
        self.durable_retained = 0
        """The same, as the records that are durable say it: what lies before is needed by nobody any more."""
        self._indicated: Part | None = None  # the one with the last indicator that is durable
        self._window: Window | None = None
        self._noted = self._noted_retained = 0  # what the records say of position and retained
        self._dirty: list[Part] = []
        self._new_names = False

    # -- recovery -----------------------------------------------------------------------------------------------

    def recover(self, *, tail: int, tail_time_ns: int, durable: int) -> None:
        """Read the segments behind *tail*, cut off a torn end, and make the rest durable.

        *durable* is the head of the pointers. Raises CorruptionError when something durable is missing.
        """
        self.tail = tail
        found = Recovery(self._storage, self._uuid, tail, tail_time_ns, windowed=self.windowed)
        self.durable = found.read(durable)
        self.parts, self.head, self.head_time_ns = found.parts, found.head, found.head_time_ns
        for part in self.parts:
            for indicator in part.landmarks(Flag.GAP, Flag.RESYNCED):
                self._note_gap(indicator)
            if part.has_indicator:
                self.position, retained = part.place_in_log()
                self.retained = retained or self.retained
        for slot in range(len(self.parts) - 1):
            self._tree.add(slot)
        self.gaps_begun = 0
        self._noted = self.position
        self._noted_retained = self.durable_retained = self.retained
        self._filled = [part for part in self.parts[:-1] if part.segment is not None]
        self._indicated = self._last_indicated()

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
        last = self.newest
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
            if segment is not self.newest:
                self._add_segment(segment)
            segment.publish(records)
            self._mark_dirty()
        self.position, self.retained = window.position, window.retained
        if window.noted:
            self._noted, self._noted_retained = window.position, window.retained
            self.head, self.head_time_ns = self.head + window.count, window.time_ns

    def abandon(self, window: Window) -> None:
        """Take away what a window has written; nothing of it counts."""
        assert window is self._window
        window.discard()
        self._storage.sync_directory(DIRECTORY)  # what is removed doesn't come back in place of what follows
        self._window = None

    def note_position(self, position: int, retained: int) -> None:
        """Go on elsewhere in the log, or in another one; durable after the next flush."""
        self.position, self.retained = position, retained
        self._indicate(Flag.TICK)

    def _note_gap(self, indicator: Indicator) -> None:
        """Keep the list of gaps: one begins (unless one is open already) or ends."""
        is_open = bool(self.gaps) and self.gaps[-1].end is None
        if indicator.flag == Flag.GAP and not is_open:
            self.gaps.append(Gap(indicator.seq, indicator.time_ns))
            self.gaps_begun += 1
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
        last = self.newest
        full = (
            last is not None
            and len(last) > 0
            and (fresh or self._limits.is_full(last.records, last.data_sectors + sectors))
        )
        if last is None or full:
            last = self._begin_segment(self.head + 1)
            self._add_segment(last)
        self._mark_dirty()
        return last

    def _add_segment(self, segment: Segment) -> None:
        if self.parts:
            self._tree.add(self._slot + len(self.parts) - 1)
            self._filled.append(self.parts[-1])
        self.parts.append(Part(segment.stem, segment.header.first, segment=segment))
        self._new_names = True

    def _mark_dirty(self) -> None:
        if not self._dirty or self._dirty[-1] is not self.parts[-1]:
            self._dirty.append(self.parts[-1])

    # -- making durable -----------------------------------------------------------------------------------------

    def take_dirty(self, *others: File) -> Work[None]:
        """Return work that makes durable all that was appended until now, and *others*, and seals what is full.

        In whatever order: only the data of records that a later record calls durable is believed unread. A segment is
        sealed only after what stands behind it is durable, too: so nothing that is sealed is ever cut off.
        """
        self._note_sealed()
        dirty = [part.segment for part in self._dirty if part.segment is not None]
        files = (*(file for segment in dirty for file in segment.files), *others)
        new_names, retained = self._new_names, self._noted_retained
        filled, head = list(self._filled), self.head
        indicated = self._last_indicated()
        self._dirty, self._new_names = [], False

        def finish() -> None:
            if new_names:
                self._storage.sync_directory(DIRECTORY)
            for part in filled:
                if part.segment is not None:
                    part.seal = part.segment.finish(head)

        def work() -> Work[None]:
            newest = self.newest
            if dirty and newest is dirty[-1] and not self.windowed:
                newest.write_ahead(self._limits)
            yield Datasync(files, finish if new_names or filled else None)
            self.durable_retained = retained
            self._indicated = indicated

        return work()

    def trim(self) -> None:
        """Take away what is written ahead of the head."""
        if self.newest is not None and not self.windowed:
            self.newest.trim()

    def _last_indicated(self) -> Part | None:
        number = last_indicated(self.parts)
        return self.parts[number] if number >= 0 else None

    def pending_ns(self) -> int:
        """Return the age of the oldest event that isn't durable, 0 if all are. In memory: it isn't sealed."""
        return max(0, self._clock() - self.time_of(self.durable + 1)) if self.durable < self.head else 0

    def is_clean(self) -> bool:
        """Say whether all is durable and a sync indicator stands at the head: a flush would have nothing to do."""
        return not self._dirty and self.durable == self.head and self.is_indicated(self.head)

    # -- housekeeping -------------------------------------------------------------------------------------------

    def release(self, tail: int) -> list[Part]:
        """Take out the segments whose events all are at or before *tail*; the caller removes and closes them.

        A last segment with a gap's beginning or a mark at the tail stays: they are still of use. So does, of a windowed
        journal, the one with the last indicator that is durable.
        """
        self.tail = tail
        count = 0
        end = len(self.parts) - 1
        if self.windowed:
            end = self.parts.index(self._indicated) if self._indicated in self.parts else 0
        while count < end and self.parts[count].next_seq - 1 <= tail:
            count += 1
        self.gaps = [gap for gap in self.gaps if gap.end is None or gap.end > tail]
        if (
            count + 1 == len(self.parts)
            and self.head == tail
            and not self.windowed
            and self._is_done(self.parts[count])
        ):
            count += 1
        released = self.parts[:count]
        self.parts = self.parts[count:]
        self._slot += count
        self._tree.release(self._slot - 1)
        self._dirty = [part for part in self._dirty if part not in released]
        self._filled = [part for part in self._filled if part not in released]
        for part in released:
            self._loaded.pop(part.first, None)
        self._unread = [first for first in self._unread if first in self._loaded]
        return released

    def _is_done(self, last: Part) -> bool:
        """Say whether nothing in the last segment is of use any more once all its events are in the mirror."""
        return len(last) > 0 and not self.gaps and not any(mark.seq == self.head for mark in last.landmarks(Flag.MARK))

    def close(self) -> None:
        """Close all segments, those of a window that wasn't ended too."""
        pending = [segment for segment, _ in self._window.parts] if self._window else []
        loaded = [part.segment for part in self.parts if part.segment is not None]
        close_all(file for segment in [*loaded, *pending] for file in (segment.ext, segment.dat))

    def check(self) -> None:
        """Assert the invariants; reads all descriptors."""
        expected = self.parts[0].first if self.parts else self.head + 1
        last_time = 0
        for part in self.parts:
            assert part.first == expected, "segments follow each other"
            assert part.segment is not None or part is not self.parts[-1], "the last one is in memory"
            columns = self._columns(part)
            if part.segment is not None and part.next_seq - 1 > self.tail:
                part.segment.check()
            same = set(np.flatnonzero(np.diff(np.array([last_time, *columns.times], np.int64)) == 0).tolist())
            assert self.windowed or not same, "times of events are distinct"
            ends = [seq + 1 - part.first for seq in columns.indicator_seqs]
            assert same.isdisjoint(ends), "a window ends at an indicator"
            last_time = max([last_time, *columns.times[-1:]])
            expected = part.next_seq
        assert expected == self.head + 1, "the last segment ends at the head"
        self._tree.check()
        assert {part.first for part in self._loaded.values()} == {
            part.first for part in self.parts if part.segment is not None and part.seal is not None
        } - {part.first for part in self._filled}
        assert self.durable <= self.head
        assert last_time <= self.head_time_ns
