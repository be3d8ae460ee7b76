"""Layers: what the maps of all moments are made from, so that opening one doesn't grow with history.

A *layer* is the net change of a run of history: entries (start, stop, reference) of a disjoint list, packed, ascending.
The image at a moment is a stack of layers over the mirror: of the forward journal's segments up to its seq, the later
one winning, or of the snapshots from its own to the open one, the earlier one winning (fig. 16).

``LayerTree`` keeps the stacks short. Each finished part of history, a segment or a closed snapshot, has a *slot*,
ascending with time; ``FAN_OUT`` neighbouring blocks of slots are merged into one block of the next level, as a log-
structured merge tree does. Any run of slots is then covered by O(log slots) blocks. Blocks are made when first needed,
kept up to a limit of bytes, and can be thrown away at any time (promise 9).

What is still growing is no slot: ``select`` finds its entries in the columns themselves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import numpy as np

from dmafs.core.columns import Columns
from dmafs.core.extent import Ints, net_change
from dmafs.core.ondisk import Flag
from dmafs.core.vbm import ZERO
from dmafs.core.work import Work

FAN_OUT: Final = 8
"""Blocks merged into one: a run of 10,000 slots takes at most 2 * 7 * 5 layers, about half of it on average, and each
entry is kept in five levels."""

_LEVELS: Final = 22  # FAN_OUT ** 21 is 2**63
GROWN_ENTRIES: Final = 1 << 17
"""Entries of a growing part that are searched one by one, at some 2 ns each; with more they are sorted once."""

Key = tuple[int, int]


class Selectable(Protocol):
    """Something that entries can be taken from."""

    def select(self, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """Return the entries that overlap a range: starts, stops, references; later ones win."""

    def __len__(self) -> int:
        """Return the number of entries."""


class Layer:
    """The net change of a run of history. Immutable."""

    __slots__ = ("references", "starts", "stops")

    def __init__(self, starts: Ints, stops: Ints, references: Ints) -> None:
        """Take a disjoint ascending list."""
        self.starts, self.stops, self.references = starts, stops, references

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.starts)

    @property
    def bytes(self) -> int:
        """Return the memory that the entries take."""
        return self.starts.nbytes + self.stops.nbytes + self.references.nbytes

    def select(self, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """See ``Selectable``. O(log n) and what it returns."""
        low = int(self.stops.searchsorted(start, "right"))
        high = int(self.starts.searchsorted(stop, "left"))
        return self.starts[low:high], self.stops[low:high], self.references[low:high]


class Growing:
    """Entries of columns that are still appended to, or of which only the first *end* count.

    Asked on the thread that appends: an array can't grow while another thread looks into it.
    """

    def __init__(self, columns: Columns, *, base: int, end: int | None = None) -> None:
        """Take entries whose reference is *base* plus their number."""
        self._columns, self._base, self._end = columns, base, end
        self._sorted, self._count = net_layer(*stacked([])), 0

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._columns) if self._end is None else self._end

    def select(self, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """See ``Selectable``. O(GROWN_ENTRIES)."""
        count = len(self)
        if count - self._count > GROWN_ENTRIES:
            self._sorted, self._count = net_layer(*entries(self._columns, self._base, 0, count)), count
        starts, stops, index = self._columns.select(start, stop, self._count, count)
        return stacked([self._sorted.select(start, stop), (starts, stops, self._references(index))])

    def _references(self, index: Ints) -> Ints:
        return references(self._columns, self._base, index)


def references(columns: Columns, base: int, index: Ints) -> Ints:
    """Return the references of some entries of columns."""
    zero: Ints = (np.frombuffer(columns.flags, np.uint8)[index] == int(Flag.ZERO)).astype(np.int64)
    return base + index + ZERO * zero


def entries(columns: Columns, base: int, begin: int, end: int) -> tuple[Ints, Ints, Ints]:
    """Return the entries ``[begin, end)`` of columns: starts, stops, references."""
    starts, stops = columns.extents(begin, end)
    return starts, stops, references(columns, base, np.arange(begin, end, dtype=np.int64))


def net_layer(starts: Ints, stops: Ints, referred: Ints) -> Layer:
    """Return what entries in array order amount to, the last one winning. O(n log n)."""
    change = net_change(starts, stops)
    return Layer(change.starts, change.stops, referred[change.winner])


def merge(layers: list[Layer]) -> Layer:
    """Return layers as one, later ones winning. O(n log n)."""
    return net_layer(*stacked([(layer.starts, layer.stops, layer.references) for layer in layers]))


def stacked(parts: list[tuple[Ints, Ints, Ints]]) -> tuple[Ints, Ints, Ints]:
    """Put lists of entries behind each other."""
    if not parts:
        nothing = np.empty(0, np.int64)
        return nothing, nothing, nothing
    starts, stops, referred = (np.concatenate(column) for column in zip(*parts, strict=True))
    return starts, stops, referred


class LayerTree:
    """Merged layers of a row of slots. Not thread-safe; what its work yields may run in threads."""

    def __init__(self, leaf: Callable[[int], Work[Layer]], *, later_wins: bool, limit_bytes: int) -> None:
        """Begin empty; *leaf* makes the layer of one slot."""
        self._leaf = leaf
        self._later_wins = later_wins
        self._limit_bytes = limit_bytes
        self._slots: list[int] = []
        self._blocks: OrderedDict[Key, Layer] = OrderedDict()  # least recently used first
        self._owned: dict[Key, int] = {}  # bytes of the blocks that are no other block's
        self._changes = 0

    # -- slots --------------------------------------------------------------------------------------------------

    def add(self, slot: int) -> None:
        """Add a slot behind all others, finished."""
        assert not self._slots or slot > self._slots[-1]
        self._slots.append(slot)

    def remove(self, slot: int) -> None:
        """Remove a slot."""
        del self._slots[bisect_left(self._slots, slot)]
        self.changed(slot)

    def changed(self, slot: int) -> None:
        """Forget the blocks that a slot is in."""
        self._changes += 1
        for level in range(_LEVELS):
            self._forget((level, slot // FAN_OUT**level))

    def release(self, slot: int) -> None:
        """Remove the slots up to *slot*; blocks that reach beyond it stay: who asks for them leaves out the rest."""
        del self._slots[: bisect_left(self._slots, slot + 1)]
        for level, block in list(self._blocks):
            if (block + 1) * FAN_OUT**level <= slot + 1:
                self._forget((level, block))

    def _forget(self, key: Key) -> None:
        self._blocks.pop(key, None)
        self._owned.pop(key, None)

    # -- blocks -------------------------------------------------------------------------------------------------

    def _cover(self, low: int, high: int) -> list[Key]:
        """Return the fewest blocks that together are the slots ``[low, high)``, ascending; no empty ones. O(log n)."""
        found = []
        while low < high:
            index = bisect_left(self._slots, low)
            if index == len(self._slots) or self._slots[index] >= high:
                break
            level, width = 0, FAN_OUT
            while low % width == 0 and low + width <= high:
                level, width = level + 1, width * FAN_OUT
            width //= FAN_OUT
            if self._slots[index] < low + width:
                found.append((level, low // width))
            low += width
        return found

    def layers_nowait(self, low: int, high: int) -> list[Layer] | None:
        """Return layers that together are the slots ``[low, high)``, later ones winning; None if one isn't made yet."""
        found = []
        for key in self._cover(low, high):
            layer = self._blocks.get(key)
            if layer is None:
                return None
            self._blocks.move_to_end(key)
            found.append(layer)
        return found if self._later_wins else found[::-1]

    def prepare(self, low: int, high: int) -> Work[None]:
        """Make the layers of the slots ``[low, high)``; what changes meanwhile is made again."""
        done = False
        while not done:
            changes = self._changes
            for key in self._cover(low, high):
                yield from self._make(*key)
            done = changes == self._changes
        self._evict(set(self._cover(low, high)))

    def _make(self, level: int, block: int) -> Work[Layer]:
        """Make a block, from the smaller ones in it."""
        key = level, block
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        changes = self._changes
        parts: list[Layer] = []
        if level == 0:
            layer = yield from self._leaf(block)
        else:
            width = FAN_OUT ** (level - 1)
            for child in range(block * FAN_OUT, (block + 1) * FAN_OUT):
                index = bisect_left(self._slots, child * width)
                if index < len(self._slots) and self._slots[index] < (child + 1) * width:
                    parts.append((yield from self._make(level - 1, child)))
            parts = parts if self._later_wins else parts[::-1]
            layer = (yield partial(merge, parts)) if len(parts) != 1 else parts[0]
        if changes == self._changes:
            self._blocks[key] = layer
            self._owned[key] = 0 if layer in parts else layer.bytes
        return layer

    def _evict(self, needed: set[Key]) -> None:
        """Forget the blocks used least recently, down to the limit, but not those *needed* just now."""
        total = sum(self._owned.values())
        for key in list(self._blocks):
            if total <= self._limit_bytes:
                return
            if key not in needed:
                total -= self._owned[key]
                self._forget(key)

    def check(self) -> None:
        """Assert that slots ascend, and that each block is a disjoint list with a slot in it."""
        assert self._slots == sorted(set(self._slots))
        assert self._owned.keys() == self._blocks.keys()
        for layer in self._blocks.values():
            assert np.all(layer.starts < layer.stops)
            assert np.all(layer.starts[1:] >= layer.stops[:-1])
