"""What is in memory of the forward journal, and what is asked of it: descriptors of some segments, layers of all.

Of a sealed segment only what its seal says is always in memory. Its layer is in a file beside it (``index``). Its
descriptors are loaded when somebody needs them, and forgotten, those used least recently first, when there are too
many; who goes through many segments reads each without keeping it. The last segment, and others that aren't sealed yet,
stay in memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Final
from uuid import UUID

import numpy as np

from dmafs.core.columns import Columns, Indicator
from dmafs.core.extent import Ints
from dmafs.core.index import Owner, keep_index, read_index
from dmafs.core.layers import Growing, Layer, LayerTree, Selectable, entries, net_layer, stacked
from dmafs.core.limits import IndexLimits
from dmafs.core.ondisk import Flag
from dmafs.core.part import Part
from dmafs.core.seal import Seal
from dmafs.core.segment import Segment
from dmafs.core.storage import Storage
from dmafs.core.work import Work, run
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR

UNREAD_MAX: Final = 2
"""Sealed segments whose descriptors stay in memory although nobody has read them since they were written."""


class ForwardMaps:
    """The segments of a journal in order, and what is in memory of them. Called on one thread, unless said so."""

    def __init__(self, storage: Storage, uuid: UUID, index: IndexLimits, *, windowed: bool) -> None:
        """Begin without segments, at seq 0; *windowed* if events come from a log."""
        self._storage = storage
        self._uuid = uuid
        self._index = index
        self.windowed = windowed
        self.parts: list[Part] = []
        self.head = 0
        self.tail = 0
        """Events up to it are in the mirror: their data is needed by nobody, and may be gone."""
        self._loaded: OrderedDict[int, Part] = OrderedDict()  # sealed ones by first seq, least recently used first
        self._filled: list[Part] = []  # those that are full, and weren't sealed when they were looked at last
        self._unread: list[int] = []  # first seqs of sealed ones that nobody has asked for since they were written
        self._slot = 0  # of the first segment; all but the last segment are slots of the tree
        self.sealed = 0
        """How many segments were sealed since the volume was opened."""
        self._tree = LayerTree(self._leaf, later_wins=True, limit_bytes=index.bytes)

    # -- descriptors in memory ----------------------------------------------------------------------------------

    @property
    def newest(self) -> Segment | None:
        """Return the last segment, which is in memory."""
        return self.parts[-1].segment if self.parts else None

    def _number_of(self, seq: int) -> int:
        """Return the number of the last part that begins at or before *seq*, or -1. O(log segments)."""
        return bisect_right(self.parts, seq, key=lambda part: part.first) - 1

    def part_of(self, seq: int) -> Part | None:
        """Return the part that holds event *seq*, or None. O(log segments)."""
        number = self._number_of(seq)
        return self.parts[number] if number >= 0 and seq < self.parts[number].next_seq else None

    def segment_of(self, seq: int) -> Segment:
        """Return the segment that holds event *seq*, loaded if need be; blocks then."""
        part = self.part_of(seq)
        assert part is not None, f"seq {seq} isn't in the forward journal"
        return run(self._load(part))

    def descriptor_nowait(self, seq: int) -> tuple[Segment | None, int]:
        """Return the segment of event *seq* (None if it isn't in memory) and the event's number in it."""
        part = self.part_of(seq)
        assert part is not None, f"seq {seq} isn't in the forward journal"
        return part.segment, seq - part.first

    def load_of(self, seq: int) -> Work[None]:
        """Bring the segment of event *seq* into memory, unless it has been released."""
        part = self.part_of(seq)
        try:
            if part is not None:
                yield from self._load(part)
        except (CorruptionError, OSError):
            if part is not None and self._is_here(part):
                raise

    def _is_here(self, part: Part) -> bool:
        """Say whether a part hasn't been released."""
        number = self._number_of(part.first)
        return number >= 0 and self.parts[number] is part

    def _load(self, part: Part) -> Work[Segment]:
        """Return a part's segment, once it is in memory. If it is released meanwhile, that is what was in it."""
        found = part.segment
        if found is None:
            opened: Segment = yield partial(part.open, self._storage, self._uuid)
            found = part.segment
            if found is None and self._is_here(part):
                part.segment = opened
                self._loaded[part.first] = part
            else:
                opened.close()
            found = found or opened
        if part.first in self._loaded:
            self._loaded.move_to_end(part.first)
        if part.first in self._unread:
            self._unread.remove(part.first)
        return found

    def _columns(self, part: Part) -> Columns:
        """Return the descriptors of a part without keeping them. Of a sealed one it may run in a thread."""
        segment = part.segment
        if segment is None:
            segment = part.open(self._storage, self._uuid)
            segment.close()
        return segment

    def _read(self, part: Part) -> Work[Columns]:
        """Return the same, read where others aren't kept waiting."""
        if part.segment is not None:
            return part.segment
        columns: Columns = yield partial(self._columns, part)
        return columns

    def reader(self) -> Reader:
        """Return what looks at one segment after the other in a thread, for who closes it in the end."""
        return Reader(self, self._storage, self._uuid)

    def excess(self) -> bool:
        """Say whether more sealed segments are in memory than the limits allow. O(segments in memory)."""
        self._note_sealed()
        too_many = len(self._loaded) > self._index.journals or self._records() > self._index.records
        return too_many or len(self._unread) > UNREAD_MAX

    def _note_sealed(self) -> None:
        """Have the segments that a thread has sealed be forgotten like others."""
        for part in [part for part in self._filled if part.seal is not None]:
            self._filled.remove(part)
            self._loaded[part.first] = part
            self._unread.append(part.first)
            self._tree.again(self._slot + self._number_of(part.first))
            self.sealed += 1

    def _records(self) -> int:
        return sum(part.records for part in self._loaded.values())

    def unload(self) -> list[Segment]:
        """Forget sealed segments down to the limits, for the caller to close.

        Those that nobody has read since they were written go first, then those used least recently.
        """
        self._note_sealed()
        unread = self._unread[: max(0, len(self._unread) - UNREAD_MAX)]
        released, records = [], self._records()
        for first in [*unread, *(first for first in self._loaded if first not in unread)]:
            within = len(self._loaded) <= self._index.journals and records <= self._index.records
            if within and first not in unread:
                break
            part = self._loaded.pop(first)
            if part.segment is not None:
                released.append(part.segment)
            records -= part.records
            part.segment = None
        self._unread = [first for first in self._unread if first in self._loaded]
        return released

    # -- looking up ---------------------------------------------------------------------------------------------

    def time_of(self, seq: int) -> int:
        """Return the time_ns of event *seq*."""
        part = self.part_of(seq)
        if part is not None and not part.damage and seq == part.first:
            return part.first_time_ns
        return self.segment_of(seq).times[seq - (part.first if part else 0)]

    def splits_window(self, seq: int) -> bool:
        """Say whether *seq* isn't the last event of its window: no point then."""
        if not self.windowed or seq >= self.head or not self.parts or seq < self.parts[0].first:
            return False
        return self.time_of(seq) == self.time_of(seq + 1)

    def seq_at(self, time_ns: int, *, default: int) -> int:
        """Return the seq of the last event with a time not after *time_ns*, or *default*. O(segments)."""
        for part in reversed(self.parts):
            if len(part) and part.first_time_ns <= time_ns:
                if part.last_time_ns <= time_ns:
                    return part.next_seq - 1
                return part.first + bisect_right(run(self._load(part)).times, time_ns) - 1
        return default

    def last_indicator(self, seq: int) -> Indicator | None:
        """Return the last sync indicator at or before *seq*; what a damaged segment may have begun with is left out."""
        for part in reversed(self.parts):
            if part.first - 1 + bool(part.damage) > seq or (found := part.last_indicator) is None:
                continue
            if found.seq <= seq:
                return found
            if part.first_indicator <= seq:
                segment = run(self._load(part))
                return segment.indicator(bisect_right(segment.indicator_seqs, seq) - 1)
        return None

    def is_indicated(self, seq: int) -> bool:
        """Say whether a sync indicator stands right after event *seq*."""
        found = self.last_indicator(seq)
        return found is not None and found.seq == seq

    def marks(self) -> Iterator[Indicator]:
        """Yield the named marks in order.

        A power cut may bring back a segment that was released, but not its data, and so not the names of its marks:
        that is no damage.
        """
        for part in self.parts:
            try:
                yield from part.landmarks(Flag.MARK)
            except CorruptionError:
                if part.next_seq - 1 > self.tail:
                    raise

    def indicators(self, after: int, upto: int) -> tuple[Ints, Ints, Ints]:
        """Return the sync indicators with *after* < seq <= *upto*: seqs, times, bytes of data behind each. O(n)."""
        found = [(np.empty(0, np.int64),) * 3]
        behind = self.data_bytes() // SECTOR
        for part in self.parts:
            behind -= part.data_sectors  # of the segments after this one
            if part.next_seq - 1 <= after or part.first - 1 > upto:
                continue
            columns = self._columns(part)
            begin = bisect_right(columns.indicator_seqs, after)
            end = bisect_right(columns.indicator_seqs, upto)
            if begin < end:
                seqs = np.array(columns.indicator_seqs[begin:end], np.int64)
                first = int(seqs[0]) + 1 - part.first
                physicals = np.append(np.array(columns.physicals[first:], np.int64), columns.data_sectors)
                left = behind + columns.data_sectors - physicals[seqs - seqs[0]]
                found.append((seqs, np.array(columns.indicator_times[begin:end], np.int64), left * SECTOR))
        seqs, times, left = (np.concatenate(column) for column in zip(*found, strict=True))
        return seqs, times, left

    def data_after(self, seq: int) -> int:
        """Return the bytes of data of the events after *seq*. O(segments)."""
        sectors = 0
        for part in self.parts:
            if part.first > seq:
                sectors += part.data_sectors
            elif part.next_seq > seq + 1:
                sectors += part.data_sectors - run(self._load(part)).physicals[seq + 1 - part.first]
        return sectors * SECTOR

    def data_bytes(self) -> int:
        """Return the bytes of data in all segments."""
        return sum(part.data_sectors for part in self.parts) * SECTOR

    def extents(self, after: int, upto: int) -> tuple[Ints, Ints]:
        """Return copies of starts and stops of the events *after*+1 .. *upto*; index 0 is event *after*+1. Blocks."""
        return run(self.gather(after, upto))

    def gather(self, after: int, upto: int) -> Work[tuple[Ints, Ints]]:
        """Return the same, but have sealed segments read where others aren't kept waiting."""
        found = [(np.empty(0, np.int64),) * 2]
        for part in list(self.parts):
            begin, end = max(after + 1 - part.first, 0), min(upto + 1 - part.first, len(part))
            if begin < end:
                columns = yield from self._read(part)
                found.append(columns.extents(begin, end))
        starts, stops = (np.concatenate(column) for column in zip(*found, strict=True))
        return starts, stops

    # -- layers -------------------------------------------------------------------------------------------------

    def layers_nowait(self, upto: int) -> list[Selectable] | None:
        """Return layers that hold all events up to *upto*, later ones winning; None if one isn't in memory yet.

        What they hold of events behind the tail is on the mirror.
        """
        slot, rest = self._slots(upto)
        layers = self._tree.layers_nowait(0, slot)
        if layers is None:
            return None
        if not rest:
            return [*layers]
        part = self.parts[slot - self._slot]
        return None if part.segment is None else [*layers, Growing(part.segment, base=part.first, end=rest)]

    def prepare(self, upto: int, *, most: int | None = None) -> Work[None]:
        """Bring into memory what ``layers_nowait`` returns; *most* is how many layers these should be."""
        slot, rest = self._slots(upto)
        yield from self._tree.prepare(0, slot, most=most)
        if rest:
            yield from self.load_of(upto)

    def _slots(self, upto: int) -> tuple[int, int]:
        """Return the slot of the segment that event *upto* is in, and how many of its events count.

        A segment of which all count, and that isn't the last one, is left out: then it is the slot behind, and none.
        """
        number = self._number_of(upto)
        if number < 0:
            return self._slot, 0
        part = self.parts[number]
        rest = min(upto + 1 - part.first, len(part))
        if number < len(self.parts) - 1 and rest == len(part):
            return self._slot + number + 1, 0
        return self._slot + number, rest

    def _leaf(self, slot: int) -> Work[Layer]:
        """Make the layer of a whole segment; it isn't kept in memory for that, since many may be asked."""
        if slot < self._slot:  # released meanwhile
            return net_layer(*stacked([]))
        part = self.parts[slot - self._slot]
        try:
            part.require_known()
            layer: Layer = yield partial(self._layer, part, part.seal)
        except (CorruptionError, OSError):
            if self._is_here(part):
                raise
            return net_layer(*stacked([]))
        return layer

    def _layer(self, part: Part, seal: Seal | None) -> Layer:
        """Return the layer of a whole segment, of its index if it is sealed. Runs in a thread."""
        few = seal is None or seal.summary.records < self._index.indexed
        owner = None if seal is None or few else Owner(self._uuid, seal.summary.records, seal.digest)
        found = read_index(self._storage, part.stem, owner, base=part.first) if owner else None
        if found is not None:
            return found
        columns = self._columns(part)
        layer = net_layer(*entries(columns, part.first, 0, len(columns)))
        if owner is None:
            return layer
        return keep_index(self._storage, part.stem, owner, layer, self._index, base=part.first, beside=(".ext",))

    def rebuilt(self, upto: int) -> list[Selectable]:
        """Return layers that hold all events up to *upto*, from their descriptors alone."""
        return [
            Growing(self._columns(part), base=part.first, end=min(upto + 1 - part.first, len(part)))
            for part in self.parts
            if part.first <= upto
        ]


class Reader:
    """Segments of a journal, one at a time: those that aren't in memory are opened for it alone. In one thread.

    Nobody may close what is in memory meanwhile.
    """

    def __init__(self, maps: ForwardMaps, storage: Storage, uuid: UUID) -> None:
        """Look at nothing yet."""
        self._maps = maps
        self._storage = storage
        self._uuid = uuid
        self._own: Segment | None = None

    def segment_of(self, seq: int) -> Segment:
        """Return the segment that holds event *seq*, until another one is asked for."""
        part = self._maps.part_of(seq)
        assert part is not None, f"seq {seq} isn't in the forward journal"
        if part.segment is not None:
            return part.segment
        if self._own is None or self._own.header.first != part.first:
            self.close()
            self._own = part.open(self._storage, self._uuid)
        return self._own

    def close(self) -> None:
        """Close what was opened."""
        if self._own is not None:
            self._own.close()
            self._own = None
