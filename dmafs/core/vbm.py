"""Virtual block maps: which parts of one stretch of addresses are on the mirror, and where the others are (fig. 6).

Two kinds of one interface, for one *page* of the logical address space:

- ``Vbmm`` (MIM-centric): nodes are what is on the mirror. It begins as one node over the whole page; moves take parts
  out of nodes (Table I).
- ``Vbmj`` (journal-centric): nodes are what is in a journal; moves make them grow together (Table II).

Both have physical extent lists (PELs): entries (start, stop, reference) ascending, never joined, since neighbours in
the address space needn't be neighbours in a journal (fig. 16). The PELs of a page are one set of packed arrays (fig.
19); a node's PEL, or the PEL between two nodes, is a slice of them. Addresses inside are relative to the page, 32 bits
each: 16 bytes an entry and 8 a node.

The original description walks binary trees by recursion: a part of the move goes to the left child, another to the
right one. In a sorted array the nodes that a move meets are neighbours, so the recursion is a loop over a slice, and
"left" and "right" are what the neighbours get. Its ranges are closed, those here half-open: its VBE + 1 is our stop.

Where its text slips, the image decides (promise 2): R(C) ends at the greatest *ending* address of C, not at the
greatest starting one. Table II puts a node that merely touches the move into C also when the rest of the move is in a
journal already; that can't be, since nodes that touch each other are one node.

Invariants (``check``): entries are disjoint, not empty, ascending; nodes too, and no two touch; a Vbmm's nodes and
entries together are the page without overlap; a Vbmj's nodes are the unbroken runs of its entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left, bisect_right
from typing import Final

import numpy as np

from dmafs.core.extent import Ints, join

MIRROR: Final = -1
"""The reference of what is on the mirror, at the logical address itself."""
ZERO: Final = 1 << 61
"""Set in the reference of an entry without data: a discard, or zeros that a sync saved."""

PAGE_SECTORS_MAX: Final = 1 << 31
"""The longest page: relative addresses have 32 bits."""

Pieces = list[tuple[int, int, int]]
Extents = list[tuple[int, int]]


class BlockMap(ABC):
    """What both kinds share: the PELs. Not thread-safe."""

    __slots__ = ("first", "node_starts", "node_stops", "on_mirror", "references", "size", "starts", "stops")

    def __init__(self, first: int, size: int, starts: Ints, stops: Ints, references: Ints) -> None:
        """Map *size* sectors from *first* on by a disjoint list within them; what it doesn't hold is on the mirror."""
        assert 0 < size <= PAGE_SECTORS_MAX
        self.first = first
        self.size = size
        self.starts, self.stops = _packed(starts - first), _packed(stops - first)
        self.references = array("q", references.astype(np.int64).tobytes())
        self.on_mirror = size - int((stops - starts).sum())
        self.node_starts, self.node_stops = self._nodes()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.starts)

    @abstractmethod
    def _nodes(self) -> tuple[array[int], array[int]]:
        """Return the nodes that belong to the entries."""

    @abstractmethod
    def _take(self, start: int, stop: int) -> Extents:
        """Take a range off the mirror: change the nodes, and return the parts that were there (relative)."""

    @abstractmethod
    def resolve(self, start: int, stop: int, pieces: Pieces) -> None:
        """Append (start, stop, reference) pieces that together are the range, ascending. O(log n + pieces)."""

    # -- changing -----------------------------------------------------------------------------------------------

    def absorb(self, start: int, stop: int, reference: int) -> Extents:
        """Take in a move whose data the mirror is about to lose: only what is still on the mirror is mapped.

        Returns what was (Table I's physical extent list entries, Table II's set BJMC). O(log n) and the nodes it meets.
        """
        emitted = self._take(start - self.first, stop - self.first)
        for begin, end in emitted:
            at = bisect_left(self.starts, begin)
            self.starts.insert(at, begin)
            self.stops.insert(at, end)
            self.references.insert(at, reference)
        return [(begin + self.first, end + self.first) for begin, end in emitted]

    def overwrite(self, start: int, stop: int, reference: int) -> None:
        """Take in a move that is newer than all before: all of it is mapped."""
        start, stop = start - self.first, stop - self.first
        self._take(start, stop)
        low, high = bisect_right(self.stops, start), bisect_left(self.starts, stop)
        entries = [(start, stop, reference)]
        if low < high:
            if self.starts[low] < start:
                entries.insert(0, (self.starts[low], start, self.references[low]))
            if self.stops[high - 1] > stop:
                entries.append((stop, self.stops[high - 1], self.references[high - 1]))
        self.starts[low:high] = array("I", [entry[0] for entry in entries])
        self.stops[low:high] = array("I", [entry[1] for entry in entries])
        self.references[low:high] = array("q", [entry[2] for entry in entries])

    # -- looking up ---------------------------------------------------------------------------------------------

    def arrays(self) -> tuple[Ints, Ints, Ints]:
        """Return all entries as starts, stops and references, ascending."""
        starts, stops = (np.array(column, np.int64) + self.first for column in (self.starts, self.stops))
        return starts, stops, np.array(self.references, np.int64)

    def nodes(self) -> Extents:
        """Return the nodes' ranges, ascending."""
        pairs = zip(self.node_starts, self.node_stops, strict=True)
        return [(start + self.first, stop + self.first) for start, stop in pairs]

    def _walk(self, at: int, stop: int, pieces: Pieces) -> None:
        """Append the pieces of a range that isn't all on the mirror."""
        first, starts, stops, references = self.first, self.starts, self.stops, self.references
        for index in range(bisect_right(stops, at), len(starts)):
            begin, end = starts[index], stops[index]
            if begin >= stop:
                break
            if begin > at:
                pieces.append((first + at, first + begin, MIRROR))
                at = begin
            if end >= stop:
                pieces.append((first + at, first + stop, references[index]))
                return
            pieces.append((first + at, first + end, references[index]))
            at = end
        pieces.append((first + at, first + stop, MIRROR))

    def check(self) -> None:
        """Assert the invariants."""
        assert len(self.starts) == len(self.stops) == len(self.references)
        last = 0
        for start, stop in zip(self.starts, self.stops, strict=True):
            assert last <= start < stop <= self.size, "entries are disjoint and ascending"
            last = stop
        assert self._nodes() == (self.node_starts, self.node_stops), "nodes belong to the entries"
        assert self.on_mirror == self.size - sum(self.stops) + sum(self.starts)


class Vbmm(BlockMap):
    """The MIM-centric kind: nodes are on the mirror, PELs between them."""

    __slots__ = ()

    def _nodes(self) -> tuple[array[int], array[int]]:
        starts, stops = join(_unpacked(self.starts), _unpacked(self.stops))
        begins, ends = np.append(0, stops), np.append(starts, self.size)
        kept = begins < ends
        return _packed(begins[kept]), _packed(ends[kept])

    def _take(self, start: int, stop: int) -> Extents:
        """Apply Table I: at each node that the move meets one of these rows (M the move, V the node).

        ======  ===========  ===========  =============  ==============  =========================  ================
        row     start        end          left           right           node                       entry
        ======  ===========  ===========  =============  ==============  =========================  ================
        I.1     any          Me <= Vs     M              -               -                          -
        I.2     Ms >= Ve     any          -              M               -                          -
        I.3     Ms == Vs     Me == Ve     -              -               deleted                    [Ms, Me)
        I.4     Ms == Vs     Me > Ve      -              [Ve, Me)        deleted                    [Ms, Ve)
        I.5     Ms == Vs     Me < Ve      -              -               [Me, Ve)                   [Ms, Me)
        I.6     Ms > Vs      Me == Ve     -              -               [Vs, Ms)                   [Ms, Me)
        I.7     Ms > Vs      Me > Ve      -              [Ve, Me)        [Vs, Ms)                   [Ms, Ve)
        I.8     Ms > Vs      Me < Ve      -              -               [Vs, Ms) and [Me, Ve)      [Ms, Me)
        I.9     Ms < Vs      Me == Ve     [Ms, Vs)       -               deleted                    [Vs, Me)
        I.10    Ms < Vs      Me > Ve      [Ms, Vs)       [Ve, Me)        deleted                    [Vs, Ve)
        I.11    Ms < Vs      Me < Ve      [Ms, Vs)       -               [Me, Ve)                   [Vs, Me)
        ======  ===========  ===========  =============  ==============  =========================  ================

        In all of I.3 to I.11 the entry is the part in common and the node keeps what is before and behind the move.
        """
        starts, stops = self.node_starts, self.node_stops
        low, high = bisect_right(stops, start), bisect_left(starts, stop)  # the others are rows I.1 and I.2
        if low >= high:
            return []
        emitted = [(max(start, starts[index]), min(stop, stops[index])) for index in range(low, high)]
        kept = []
        if starts[low] < start:  # I.6, I.7, I.8
            kept.append((starts[low], start))
        if stops[high - 1] > stop:  # I.5, I.8, I.11
            kept.append((stop, stops[high - 1]))
        starts[low:high] = array("I", [node[0] for node in kept])
        stops[low:high] = array("I", [node[1] for node in kept])
        self.on_mirror -= sum(end - begin for begin, end in emitted)
        return emitted

    def resolve(self, start: int, stop: int, pieces: Pieces) -> None:
        """See ``BlockMap``: the nodes first, the PELs next to them where that fails."""
        at, end = start - self.first, stop - self.first
        index = bisect_right(self.node_stops, at)
        if index < len(self.node_stops) and self.node_starts[index] <= at and end <= self.node_stops[index]:
            pieces.append((start, stop, MIRROR))
        else:
            self._walk(at, end, pieces)

    def converted(self) -> Vbmj:
        """Return the same map as the other kind: each unbroken run of entries becomes a node (fig. 6)."""
        return Vbmj(self.first, self.size, *self.arrays())


class Vbmj(BlockMap):
    """The journal-centric kind: nodes are in a journal, each with its PEL."""

    __slots__ = ()

    def _nodes(self) -> tuple[array[int], array[int]]:
        starts, stops = join(_unpacked(self.starts), _unpacked(self.stops))
        return _packed(starts), _packed(stops)

    def _take(self, start: int, stop: int) -> Extents:
        """Apply Table II: at each node that the move meets or touches one of these rows; C is the collapse set.

        ======  ================  =================  ==============================================
        row     start             end                outcome
        ======  ================  =================  ==============================================
        II.1    any               Me < Vs            left with M
        II.2    any               Me == Vs           node into C; left with M
        II.3    Ms > Ve           any                right with M
        II.4    Ms == Ve          any                node into C; right with M
        II.5    Ms >= Vs          Me <= Ve           end: all of it is in a journal already
        II.6    Vs <= Ms < Ve     Me > Ve            node into C; right with [Ve, Me)
        II.7    Ms < Vs           Vs < Me <= Ve      node into C; left with [Ms, Vs)
        II.8    Ms < Vs           Me > Ve            node into C; left with [Ms, Vs), right with [Ve, Me)
        ======  ================  =================  ==============================================

        What comes to no child (II.9) is on the mirror: into C, CP (our PEL) and BJMC. One node over R(C) then takes the
        place of those in C.
        """
        starts, stops = self.node_starts, self.node_stops
        low, high = bisect_left(stops, start), bisect_right(starts, stop)  # C; the others are rows II.1 and II.3
        emitted, at = [], start
        for index in range(low, high):
            if starts[index] > at:  # left of it: II.2, II.7, II.8
                emitted.append((at, starts[index]))
            at = max(at, stops[index])  # right of it: II.4, II.6, II.8
        if at < stop:
            emitted.append((at, stop))
        if emitted:  # not II.5
            begin = min(start, starts[low]) if low < high else start
            end = max(stop, stops[high - 1]) if low < high else stop
            starts[low:high] = array("I", [begin])
            stops[low:high] = array("I", [end])
            self.on_mirror -= sum(end - begin for begin, end in emitted)
        return emitted

    def resolve(self, start: int, stop: int, pieces: Pieces) -> None:
        """See ``BlockMap``: what no node holds is on the mirror."""
        at, end = start - self.first, stop - self.first
        index = bisect_right(self.node_stops, at)
        if index == len(self.node_stops) or self.node_starts[index] >= end:
            pieces.append((start, stop, MIRROR))
        else:
            self._walk(at, end, pieces)


def block_map(first: int, size: int, starts: Ints, stops: Ints, references: Ints) -> BlockMap:
    """Return the kind of map that pays: by nodes on the mirror as long as most of the page is there."""
    kind = Vbmj if pays(size, size - int((stops - starts).sum())) else Vbmm
    return kind(first, size, starts, stops, references)


def pays(size: int, on_mirror: int) -> bool:
    """Say whether the journal-centric kind pays: more has left the mirror than stayed."""
    return 2 * on_mirror < size


def _packed(column: Ints) -> array[int]:
    return array("I", column.astype(np.uint32).tobytes())


def _unpacked(column: array[int]) -> Ints:
    return np.array(column, np.int64)
