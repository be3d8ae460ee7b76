"""Layers: what the maps of all moments are made from, so that opening one doesn't grow with history.

A *layer* is the net change of a run of history: entries (start, stop, reference) of a disjoint list, packed, ascending.
The image at a moment is a stack of layers over the mirror: of the forward journal's segments up to its seq, the later
one winning, or of the snapshots from its own to the open one, the earlier one winning (fig. 16).

``LayerTree`` keeps the stacks short. Each finished part of history, a segment or a closed snapshot, has a *slot*,
ascending with time, and a layer of its own, a *leaf*, which most often is a file that is mapped (``index``): so leaves
are there at once, and take no memory. A page of a map is made as fast from some ten layers as from one; where there are
more than ``STACK_MAX``, ``FAN_OUT`` neighbouring blocks of slots are merged into one block of the next level, as a log-
structured merge tree does, small ones first. Any run of slots is then covered by few blocks, as far as the limit of
bytes allows. Blocks are made when first needed, and can be thrown away at any time (promise 9).

What is still growing is no slot: ``select`` finds its entries in the columns themselves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
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
"""Blocks merged into one."""

STACK_MAX: Final = 128
"""Layers that a moment may be made from: each takes some 5 us of what a page takes to be made."""
STACK_WARM: Final = 32
"""The same for moments that nobody waits for yet."""

_ENTRY_BYTES: Final = 24  # in memory
_STACKS_KEPT: Final = 64
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

    __slots__ = ("_base", "_references", "bytes", "starts", "stops")

    def __init__(self, starts: Ints, stops: Ints, references: Ints, *, base: int = 0, mapped: bool = False) -> None:
        """Take a disjoint ascending list, and references counted from *base*; *mapped* if that is no memory."""
        self.starts, self.stops, self._references = starts, stops, references
        self._base = base
        self.bytes = 0 if mapped else starts.nbytes + stops.nbytes + references.nbytes
        """The memory that the entries take."""

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.starts)

    @property
    def references(self) -> Ints:
        """Return what the entries refer to."""
        return self._references + self._base if self._base else self._references

    def select(self, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """See ``Selectable``. O(log n) and what it returns."""
        low = int(self.stops.searchsorted(start, "right"))
        high = int(self.starts.searchsorted(stop, "left"))
        found = self.starts[low:high], self.stops[low:high], self._references[low:high]
        return (*found[:2], found[2] + self._base) if self._base and low < high else found


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
        self._stacks: dict[tuple[int, int], list[Key]] = {}  # what covers runs of slots, until something changes

    # -- slots --------------------------------------------------------------------------------------------------

    def add(self, slot: int) -> None:
        """Add a slot behind all others, finished."""
        assert not self._slots or slot > self._slots[-1]
        self._slots.append(slot)
        self._stacks.clear()

    def remove(self, slot: int) -> None:
        """Remove a slot."""
        del self._slots[bisect_left(self._slots, slot)]
        self.changed(slot)

    def changed(self, slot: int) -> None:
        """Forget the blocks that a slot is in, also those that are just being made."""
        for level in range(_LEVELS):
            self._blocks.pop((level, slot // FAN_OUT**level), None)
        self._stacks.clear()
        self._abandon(lambda level, block: slot // FAN_OUT**level == block)

    def again(self, slot: int) -> None:
        """Forget the leaf of a slot: it is the same when it is made again, but may be mapped then."""
        self._blocks.pop((0, slot), None)
        self._stacks.clear()
        self._abandon(lambda level, block: (level, block) == (0, slot))

    def release(self, slot: int) -> None:
        """Remove the slots up to *slot*; blocks that reach beyond it stay: who asks for them leaves out the rest."""

        def is_released(level: int, block: int) -> bool:
            width: int = FAN_OUT**level
            return (block + 1) * width <= slot + 1

        del self._slots[: bisect_left(self._slots, slot + 1)]
        for key in [key for key in self._blocks if is_released(*key)]:
            del self._blocks[key]
        self._stacks.clear()
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

    def _children(self, level: int, block: int) -> list[Key]:
        """Return the blocks of the next lower level that a block is made of; no empty ones."""
        width: int = FAN_OUT ** (level - 1)
        children = range(block * FAN_OUT, (block + 1) * FAN_OUT)
        return [(level - 1, child) for child in children if self._has_slots(child * width, (child + 1) * width)]

    def _parts(self, key: Key) -> list[Key]:
        """Return the fewest blocks that together are a block, and are made or leaves, ascending."""
        if key in self._blocks or not key[0]:
            return [key]
        return [part for child in self._children(*key) for part in self._parts(child)]

    def _stack(self, low: int, high: int) -> list[Key]:
        """Return the same for the slots ``[low, high)``. O(1) as long as nothing changes, else O(blocks)."""
        found = self._stacks.get((low, high))
        if found is None:
            found = [part for key in self._cover(low, high) for part in self._parts(key)]
            if len(self._stacks) >= _STACKS_KEPT:
                self._stacks.clear()
            self._stacks[low, high] = found
        return found

    def layers_nowait(self, low: int, high: int) -> list[Layer] | None:
        """Return layers that together are the slots ``[low, high)``, later ones winning; None if one isn't made yet."""
        found = []
        for key in self._stack(low, high):
            layer = self._blocks.get(key)
            if layer is None:
                return None
            self._blocks.move_to_end(key)
            found.append(layer)
        return found if self._later_wins else found[::-1]

    def prepare(self, low: int, high: int, *, most: int | None = None) -> Work[None]:
        """Make the layers of the slots ``[low, high)``, STACK_MAX or *most*; what changes meanwhile is made again."""
        most = STACK_MAX if most is None else most
        wanted = low, high
        self._wanted.append(wanted)
        try:
            while missing := [key for key in self._stack(low, high) if key not in self._blocks]:
                for key in missing:
                    if self._has_slots(key[1], key[1] + 1):
                        yield from self._make(*key)
            while (yield from self._merge(low, high, most)):
                pass
            self._evict()
        finally:
            self._wanted.remove(wanted)

    def _has_slots(self, low: int, high: int) -> bool:
        """Say whether there is a slot in ``[low, high)``."""
        index = bisect_left(self._slots, low)
        return index < len(self._slots) and self._slots[index] < high

    def _merge(self, low: int, high: int, most: int) -> Work[bool]:
        """Merge blocks of the slots ``[low, high)`` into larger ones, of one level; return whether that may go on.

        It ends with *most* layers.
        """
        length = len(self._stack(low, high))
        if length <= most:
            return False
        needed = self._needed()
        room = self._limit_bytes - sum(layer.bytes for key, layer in self._blocks.items() if key in needed)
        merged = False
        for key in self._mergeable(low, high):
            parts = self._parts(key)
            layers = [self._blocks[part] for part in parts if part in self._blocks]
            room -= sum(_ENTRY_BYTES * len(layer) - layer.bytes for layer in layers)
            if length <= most or room < 0:
                return False
            if len(parts) > 1:
                yield from self._make(*key)
                length -= len(parts) - 1
                merged = True
        return merged

    def _mergeable(self, low: int, high: int) -> list[Key]:
        """Return the blocks of the lowest level at which there are some that aren't merged, ascending."""
        found: dict[int, list[Key]] = {}
        queue = self._cover(low, high)
        while queue:
            key = queue.pop()
            if key[0] and key not in self._blocks:
                found.setdefault(key[0], []).append(key)
                queue += self._children(*key)
        for level in sorted(found):
            keys = sorted(key for key in found[level] if len(self._parts(key)) > 1)
            if keys:
                return keys
        return []

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
                self._stacks.clear()
        finally:
            self._builds.pop(number, None)
        return layer

    def _merged(self, level: int, block: int) -> Work[Layer]:
        """Return what the slots in a block amount to."""
        if level == 0:
            return (yield from self._leaf(block))
        parts = []
        for key in self._parts((level, block)):
            layer = yield from self._make(*key)
            parts.append(layer)
        merged: Layer = yield partial(merge, parts if self._later_wins else parts[::-1])
        return merged

    def _needed(self) -> set[Key]:
        """Return the blocks that somebody waits for."""
        return {key for wanted in self._wanted for key in self._stack(*wanted)}

    def _evict(self) -> None:
        """Forget the blocks used least recently, down to the limit, but none that somebody waits for."""
        needed = self._needed()
        total = sum(layer.bytes for layer in self._blocks.values())
        for key, layer in list(self._blocks.items()):
            if total <= self._limit_bytes:
                return
            if key not in needed and layer.bytes:
                del self._blocks[key]
                self._stacks.clear()
                total -= layer.bytes

    def check(self) -> None:
        """Assert that slots ascend, and that each block is a disjoint list with a slot in it."""
        assert self._slots == sorted(set(self._slots))
        for layer in self._blocks.values():
            assert np.all(layer.starts < layer.stops)
            assert np.all(layer.starts[1:] >= layer.stops[:-1])
