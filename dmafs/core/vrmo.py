"""Virtual recovery mapping objects: where the bytes of one moment are (fig. 5 and 6).

A VRMO maps logical extents to *references*. The kind here is journal-centric (VBMJ, fig. 6): it holds what is in a
journal, and an address that it doesn't hold is in the mirror at the same address. It is a multi-way tree of two levels
(fig. 19): ordered nodes, each with a physical extent list (PEL) of up to ``NODE_LIMIT`` entries in packed arrays, 24
bytes an extent.

A reference is one integer:

=====================================  =========================================================================
``MIRROR`` (-1)                        the mirror, at the logical address itself
1 .. 2**62 - 1                         event of that seq in the forward journal
``2**62 + (serial << 32) + index``     entry number *index* of the backward journal of the snapshot with that serial
=====================================  =========================================================================

A reference names a descriptor, not an address, so splitting an entry leaves it as it is; the physical address is the
descriptor's plus the distance from its start.

Invariants (``check``): entries are disjoint, not empty and ascending; nodes are not empty, and not longer than the
limit.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final

import numpy as np

from dmafs.core.extent import Ints, net_change

MIRROR: Final = -1
BACKWARD: Final = 1 << 62
NODE_LIMIT: Final = 512
"""Entries in a node. An insertion moves at most 4 KiB in each of three arrays, about 0.2 us."""


def backward_reference(serial: int, index: int) -> int:
    """Return the reference to an entry of a snapshot's backward journal."""
    assert 0 <= serial < 1 << 30
    assert 0 <= index < 1 << 32
    return BACKWARD | serial << 32 | index


def split_reference(reference: int) -> tuple[int, int]:
    """Return serial and index of a backward reference."""
    return reference >> 32 & (1 << 30) - 1, reference & (1 << 32) - 1


class Vrmo:
    """One moment's map. Not thread-safe."""

    def __init__(self) -> None:
        """Begin with everything on the mirror."""
        self._firsts: list[int] = []
        self._nodes: list[tuple[array[int], array[int], array[int]]] = []

    def __len__(self) -> int:
        """Return the number of entries."""
        return sum(len(node[0]) for node in self._nodes)

    @classmethod
    def build(cls, starts: Ints, stops: Ints, references: Ints) -> Vrmo:
        """Return the map of extents taken in array order, the last one winning. O(n log n), vectorised."""
        vrmo = cls()
        change = net_change(starts, stops)
        vrmo._load(change.starts, change.stops, references[change.winner])
        return vrmo

    def _load(self, starts: Ints, stops: Ints, references: Ints) -> None:
        """Replace the contents by a disjoint list."""
        columns = [np.ascontiguousarray(column, np.int64) for column in (starts, stops, references)]
        self._nodes = []
        for begin in range(0, len(starts), NODE_LIMIT // 2):
            parts = [array("q", column[begin : begin + NODE_LIMIT // 2].tobytes()) for column in columns]
            self._nodes.append((parts[0], parts[1], parts[2]))
        self._firsts = [node[0][0] for node in self._nodes]

    def arrays(self) -> tuple[Ints, Ints, Ints]:
        """Return all entries as starts, stops and references, ascending."""
        columns = []
        for number in range(3):
            joined = b"".join(node[number].tobytes() for node in self._nodes)
            columns.append(np.frombuffer(joined, np.int64))
        return columns[0], columns[1], columns[2]

    # -- changing -----------------------------------------------------------------------------------------------

    def absorb(self, start: int, stop: int, reference: int) -> None:
        """Take in a move that is newer than all before: it wins. O(log n) and the entries it covers."""
        number = self._punch(start, stop)
        if number < 0:
            self._nodes.append((array("q", [start]), array("q", [stop]), array("q", [reference])))
            self._firsts.append(start)
            return
        starts, stops, references = self._nodes[number]
        at = bisect_left(starts, start)
        starts.insert(at, start)
        stops.insert(at, stop)
        references.insert(at, reference)
        self._firsts[number] = starts[0]
        if len(starts) > NODE_LIMIT:
            self._split(number)

    def _split(self, number: int) -> None:
        node = self._nodes[number]
        half = len(node[0]) // 2
        self._nodes[number + 1 : number + 1] = [(node[0][half:], node[1][half:], node[2][half:])]
        for column in node:
            del column[half:]
        self._firsts.insert(number + 1, self._nodes[number + 1][0][0])

    def _punch(self, start: int, stop: int) -> int:
        """Remove what is in a range; return the number of the node that an entry at *start* belongs into, or -1."""
        first = max(bisect_right(self._firsts, start) - 1, 0)
        last = max(bisect_left(self._firsts, stop) - 1, first)
        if last - first > 1:  # nodes wholly inside
            del self._nodes[first + 1 : last]
            del self._firsts[first + 1 : last]
            last = first + 1
        for number in range(min(last, len(self._nodes) - 1), first - 1, -1):
            starts, stops, references = self._nodes[number]
            low, high = bisect_right(stops, start), bisect_left(starts, stop)
            if low < high:
                left = start if starts[low] < start else None
                right = stops[high - 1] if stops[high - 1] > stop else None
                kept = ([(starts[low], start, references[low])] if left is not None else []) + (
                    [(stop, right, references[high - 1])] if right is not None else []
                )
                starts[low:high] = array("q", [entry[0] for entry in kept])
                stops[low:high] = array("q", [entry[1] for entry in kept])
                references[low:high] = array("q", [entry[2] for entry in kept])
                if not starts:
                    del self._nodes[number]
                    del self._firsts[number]
                else:
                    self._firsts[number] = starts[0]
        return max(bisect_right(self._firsts, start) - 1, 0) if self._nodes else -1

    def fill(self, starts: Ints, stops: Ints, references: Ints) -> None:
        """Take in moves that are older than the mirror: only what is still on the mirror is mapped (fig. 16, 18)."""
        mine = self.arrays()
        change = net_change(np.concatenate([starts, mine[0]]), np.concatenate([stops, mine[1]]))
        self._load(change.starts, change.stops, np.concatenate([references, mine[2]])[change.winner])

    def forget(self, seq: int) -> None:
        """Drop references to forward events up to *seq*: the mirror holds them now."""
        starts, stops, references = self.arrays()
        keep = references > seq
        self._load(starts[keep], stops[keep], references[keep])

    # -- looking up ---------------------------------------------------------------------------------------------

    def resolve(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield ``(start, stop, reference)`` pieces that together are the given range, ascending. O(log n + pieces)."""
        number = max(bisect_right(self._firsts, start) - 1, 0)
        at = start
        while number < len(self._nodes) and at < stop:
            starts, stops, references = self._nodes[number]
            for index in range(bisect_right(stops, at), len(starts)):
                begin, end = starts[index], stops[index]
                if begin >= stop:
                    break
                if begin > at:
                    yield at, begin, MIRROR
                    at = begin
                end = min(end, stop)
                yield at, end, references[index]
                at = end
                if at >= stop:
                    return
            else:
                number += 1
                continue
            break
        if at < stop:
            yield at, stop, MIRROR

    def check(self) -> None:
        """Assert the invariants."""
        assert len(self._firsts) == len(self._nodes)
        last = 0
        for first, (starts, stops, references) in zip(self._firsts, self._nodes, strict=True):
            assert 0 < len(starts) <= NODE_LIMIT
            assert len(starts) == len(stops) == len(references)
            assert first == starts[0]
            for start, stop, reference in zip(starts, stops, references, strict=True):
                assert last <= start < stop, "entries are disjoint and ascending"
                assert reference > 0
                last = stop
