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
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import count
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
        self._builds: dict[int, Key] = {}  # blocks that are being made, of slots that haven't changed since
        self._numbers = count()
        self._wanted: list[tuple[int, int]] = []  # runs of slots that are being prepared

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
        """Forget the blocks that a slot is in, also those that are just being made."""
        for level in range(_LEVELS):
            self._blocks.pop((level, slot // FAN_OUT**level), None)
        self._abandon(lambda level, block: slot // FAN_OUT**level == block)

    def release(self, slot: int) -> None:
        """Remove the slots up to *slot*; blocks that reach beyond it stay: who asks for them leaves out the rest."""

        def is_released(level: int, block: int) -> bool:
            width: int = FAN_OUT**level
            return (block + 1) * width <= slot + 1

        del self._slots[: bisect_left(self._slots, slot + 1)]
        for key in [key for key in self._blocks if is_released(*key)]:
            del self._blocks[key]
        self._abandon(is_released)

    def _abandon(self, concerns: Callable[[int, int], bool]) -> None:
        """Have some of the blocks that are being made not be kept."""
        self._builds = {number: key for number, key in self._builds.items() if not concerns(*key)}

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
        wanted = low, high
        self._wanted.append(wanted)
        try:
            while missing := [key for key in self._cover(low, high) if key not in self._blocks]:
                yield from self._make(*missing[0])
            self._evict()
        finally:
            self._wanted.remove(wanted)

    def _make(self, level: int, block: int) -> Work[Layer]:
        """Make a block, from the smaller ones in it."""
        key = level, block
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        number = next(self._numbers)
        self._builds[number] = key
        try:
            layer = yield from self._merged(level, block)
            if number in self._builds:
                self._blocks[key] = layer
        finally:
            self._builds.pop(number, None)
        return layer

    def _merged(self, level: int, block: int) -> Work[Layer]:
        """Return what the slots in a block amount to."""
        if level == 0:
            return (yield from self._leaf(block))
        width = FAN_OUT ** (level - 1)
        parts: list[Layer] = []
        for child in range(block * FAN_OUT, (block + 1) * FAN_OUT):
            index = bisect_left(self._slots, child * width)
            if index < len(self._slots) and self._slots[index] < (child + 1) * width:
                parts.append((yield from self._make(level - 1, child)))
        if len(parts) == 1:
            return parts[0]
        layer: Layer = yield partial(merge, parts if self._later_wins else parts[::-1])
        return layer

    def _evict(self) -> None:
        """Forget the blocks used least recently, down to the limit, but none that somebody waits for.

        A layer that several blocks are, since the others in them have no slots, counts once.
        """
        users = Counter(id(layer) for layer in self._blocks.values())
        total = sum({id(layer): layer.bytes for layer in self._blocks.values()}.values())
        needed = {key for wanted in self._wanted for key in self._cover(*wanted)}
        for key, layer in list(self._blocks.items()):
            if total <= self._limit_bytes:
                return
            if key not in needed:
                del self._blocks[key]
                users[id(layer)] -= 1
                total -= 0 if users[id(layer)] else layer.bytes

    def check(self) -> None:
        """Assert that slots ascend, and that each block is a disjoint list with a slot in it."""
        assert self._slots == sorted(set(self._slots))
        for layer in self._blocks.values():
            assert np.all(layer.starts < layer.stops)
            assert np.all(layer.starts[1:] >= layer.stops[:-1])
