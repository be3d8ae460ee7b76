"""The forward journal (fig. 7): all write events since the mirror's seq, as a row of segments.

The circular queue of the figure is a row of segment files: added at the head, unlinked at the tail. Head and tail are
persisted in the pointer slots only.

Invariants:

1. Events have dense seqs ``tail+1 .. head``; each segment's first seq is the one before's next seq.
2. Times of events strictly increase, so a canonical time names exactly one event; an indicator's time isn't less than
   that of the event before it.
3. Each record says up to which seq journal and primary were durable when it was written. So an invalid record that a
   later one calls durable is damage and an error; anything else invalid is the torn end of an unclean stop.
4. A *gap* is an interval in which capture was not complete: from the indicator GAP on nothing is a point until
   RESYNCED says that the journal agrees with the primary again. GAP is the first record of its segment, so it stays
   as long as an event behind it does.
5. What ``recover`` cut off is truncated durably before anything is appended, and no file is changed before it is known
   that nothing durable is missing: damage is reported each time.

One thread appends and reads the columns; ``datasync`` of taken segments may run in another one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import UUID

import numpy as np

from dmafs.core.columns import Indicator
from dmafs.core.extent import MAX_EXTENT_SECTORS, MAX_ZERO_SECTORS, Ints
from dmafs.core.layers import Growing, Layer, LayerTree, Selectable, entries, net_layer, stacked
from dmafs.core.ondisk import HEADER_SIZE, Flag, Header, Kind
from dmafs.core.segment import Segment, new_salt
from dmafs.core.storage import Storage, close_all
from dmafs.core.work import Work
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR

DIRECTORY = "forward"
_STEM_DIGITS: Final = 20  # of 2**64 - 1, so that names sort as seqs do


@dataclass(frozen=True, slots=True)
class SegmentLimits:
    """When a new segment begins."""

    data_sectors: int = (64 << 20) // SECTOR
    records: int = 65536


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
        self, storage: Storage, uuid: UUID, limits: SegmentLimits, clock: Callable[[], int], *, index_bytes: int
    ) -> None:
        """Begin without segments, at seq 0; *clock* returns UTC nanoseconds, *index_bytes* limits merged layers."""
        self._storage = storage
        self._uuid = uuid
        self._limits = limits
        self._clock = clock
        self.segments: list[Segment] = []
        self.head = 0
        self.head_time_ns = 0
        self.durable = 0
        self.gaps: list[Gap] = []
        self._dirty: list[Segment] = []
        self._new_names = False
        self._slot = 0  # of the first segment; all but the last segment are slots of the tree
        self._tree = LayerTree(self._leaf, later_wins=True, limit_bytes=index_bytes)
        self._leftovers: list[str] = []  # stems of files that don't count, unlinked once the rest is known to be whole

    # -- recovery -----------------------------------------------------------------------------------------------

    def recover(self, *, tail: int, tail_time_ns: int, durable: int) -> None:
        """Read the segments behind *tail*, cut off a torn end, and make the rest durable.

        *durable* is the head of the pointers. Raises CorruptionError when something durable is missing.
        """
        self.head, self.head_time_ns = tail, tail_time_ns
        stems = self._stems()
        firsts = [int(stem) for stem in stems]
        live = max(bisect_right(firsts, tail + 1) - 1, 0)
        self._leftovers += stems[:live]  # wholly behind the tail: a release that was cut off
        claimed = durable
        for stem in stems[live:]:
            claimed = max(claimed, self._recover_segment(stem, claimed))
        if self.head < claimed:
            raise CorruptionError(
                f"forward journal ends at seq {self.head}, but everything up to seq {claimed} had been made durable",
                hint="a segment is missing or damaged; the newest history is lost, resync from the primary",
            )
        self.durable = claimed
        for stem in self._leftovers:
            self._remove_stem(stem)
        self._drop_torn(claimed)
        for segment in self.segments:
            segment.trim()
            for index in segment.indicators_of(Flag.GAP, Flag.RESYNCED):
                self._note_gap(segment.indicator(index))
        for slot in range(len(self.segments) - 1):
            self._tree.add(slot)
        self._storage.sync_directory(DIRECTORY)

    def _stems(self) -> list[str]:
        """Return the names of all segments without suffix, ascending; data without descriptors is a leftover."""
        stems: dict[str, set[str]] = {".ext": set(), ".dat": set()}
        for name in self._storage.names(DIRECTORY):
            stem, suffix = name[:-4], name[-4:]
            if suffix not in stems or len(stem) != _STEM_DIGITS or not (stem.isascii() and stem.isdigit()):
                raise CorruptionError(f"{DIRECTORY}/{name} is no file of ours", hint="move it out of the store")
            stems[suffix].add(stem)
        self._leftovers = sorted(stems[".dat"] - stems[".ext"])
        return sorted(stems[".ext"])

    def _recover_segment(self, stem: str, durable: int) -> int:
        """Read one segment; return the highest seq that its records call durable.

        A segment that doesn't follow the one before is behind a torn end: it is only asked what it calls durable.
        """
        try:
            segment = Segment.open(self._storage, f"{DIRECTORY}/{stem}", Kind.FORWARD, self._uuid)
        except CorruptionError:
            if self.head < durable or not self._is_blank(stem):
                raise
            self._leftovers.append(stem)  # created after the last durable moment, not even its header was written
            return 0
        claimed = max(segment.claimed_durable, segment.claims_beyond_end())
        if segment.header.first != int(stem):
            segment.close()
            raise CorruptionError(
                f"{segment.ext.name} begins at seq {segment.header.first}", hint="the file was renamed"
            )
        first_is_right = (
            segment.header.first <= self.head + 1 if not self.segments else (segment.header.first == self.head + 1)
        )
        if not first_is_right:
            segment.close()
            if segment.header.first - 1 <= max(claimed, durable):
                raise CorruptionError(
                    f"forward journal has no events {self.head + 1} to {segment.header.first - 1}",
                    hint=f"a segment before {segment.ext.name} is missing or damaged",
                )
            self._leftovers.append(stem)
            return claimed
        self.segments.append(segment)
        self.head = segment.next_seq - 1
        times = [segment.times[-1:], segment.indicator_times[-1:]]
        self.head_time_ns = max(self.head_time_ns, *(time[0] for time in times if time), 0)
        return claimed

    def _is_blank(self, stem: str) -> bool:
        """Say whether the header of a segment was never durable: nothing else in it was then, either."""
        file = self._storage.open(f"{DIRECTORY}/{stem}.ext")
        try:
            data = bytearray(min(file.size(), HEADER_SIZE))
            file.read_into(data, 0)
        finally:
            file.close()
        return len(data) < HEADER_SIZE or not any(data)

    def _drop_torn(self, durable: int) -> None:
        """Cut at the first event that isn't durable and whose data isn't what its checksum says."""
        for number, segment in enumerate(self.segments):
            if segment.next_seq - 1 < durable and number < len(self.segments) - 1:
                continue
            if segment.cut_torn(durable):
                for later in self.segments[number + 1 :]:
                    later.remove()
                    later.close()
                del self.segments[number + 1 :]
                self.head = segment.next_seq - 1
                return

    def _remove_stem(self, stem: str) -> None:
        for suffix in (".ext", ".dat"):
            if self._storage.exists(f"{DIRECTORY}/{stem}{suffix}"):
                self._storage.unlink(f"{DIRECTORY}/{stem}{suffix}")

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
        segment = self._writable_segment(0, fresh=flag == Flag.GAP)
        self.head_time_ns = max(self._clock(), self.head_time_ns)
        segment.append_indicator(flag, time_ns=self.head_time_ns, durable=self.durable, name=name)
        self._note_gap(Indicator(self.head, self.head_time_ns, flag))

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
        last = self.segments[-1] if self.segments else None
        limits = self._limits
        full = (
            last is not None
            and len(last) > 0
            and (fresh or last.data_sectors + sectors > limits.data_sectors or last.records >= limits.records)
        )
        if last is None or full:
            header = Header(Kind.FORWARD, self._uuid, new_salt(), self.head + 1)
            last = Segment.create(self._storage, f"{DIRECTORY}/{self.head + 1:0{_STEM_DIGITS}d}", header)
            if self.segments:
                self._tree.add(self._slot + len(self.segments) - 1)
            self.segments.append(last)
            self._new_names = True
        if not self._dirty or self._dirty[-1] is not last:
            self._dirty.append(last)
        return last

    # -- making durable -----------------------------------------------------------------------------------------

    def take_dirty(self) -> Callable[[], None]:
        """Return a call, for any thread, that makes durable all that was appended until now."""
        segments, new_names = self._dirty, self._new_names
        self._dirty, self._new_names = [], False

        def datasync() -> None:
            for segment in segments:
                segment.datasync()
            if new_names:
                self._storage.sync_directory(DIRECTORY)

        return datasync

    def is_clean(self) -> bool:
        """Say whether all is durable and a sync indicator stands at the head: a flush would have nothing to do."""
        return not self._dirty and self.durable == self.head and self.is_indicated(self.head)

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

        A last segment with a gap's beginning or a mark at the tail stays: they are still of use.
        """
        count = 0
        while count + 1 < len(self.segments) and self.segments[count].next_seq - 1 <= tail:
            count += 1
        self.gaps = [gap for gap in self.gaps if gap.end is None or gap.end > tail]
        if count + 1 == len(self.segments) and self.head == tail and self._is_done(self.segments[count]):
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
            assert len(set(segment.times)) == len(segment), "times of events are distinct"
            if len(segment):
                assert segment.times[0] > last_time, "times increase from segment to segment"
                last_time = segment.times[-1]
            expected = segment.next_seq
        assert expected == self.head + 1, "the last segment ends at the head"
        self._tree.check()
        assert self.durable <= self.head
        assert last_time <= self.head_time_ns
