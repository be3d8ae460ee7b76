"""Virtual recovery mapping objects: where the bytes of one moment are (fig. 5).

A VRMO maps logical extents to *references*. It is a multi-way tree of two levels (fig. 19): the address space is cut
into some ``PAGES`` *pages* of one size, each a Vbmm or a Vbmj with packed PELs (``vbm.py``). A page is made at the
first look into it, from the stack of layers that the moment is (``layers.py``): so opening an image costs the same
whatever history it has, and what nobody looks at costs nothing. From then on the page is kept right as the mirror
moves:

- an image older than the mirror absorbs what each sync saves (fig. 16, 18), and a Vbmm becomes a Vbmj when that pays;
- the live image takes each write over;
- when the places themselves change (the mirror has passed, a snapshot was merged), the pages are made again.

A reference is one integer:

=====================================  =========================================================================
``MIRROR`` (-1)                        the mirror, at the logical address itself
1 .. 2**61 - 1                         event of that seq in the forward journal
``2**62 + (serial << 32) + index``     entry number *index* of the backward journal of the snapshot with that serial
``ZERO`` (2**61) added                 likewise, and there is no data: zeros
=====================================  =========================================================================

A reference names a descriptor, not an address, so splitting an entry leaves it as it is; the physical address is the
descriptor's plus the distance from its start.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from dmafs.core.extent import Ints, net_change, united
from dmafs.core.layers import Selectable, stacked
from dmafs.core.vbm import MIRROR, PAGE_SECTORS_MAX, ZERO, BlockMap, Pieces, Vbmm, block_map, pays

BACKWARD: Final = 1 << 62
PAGES: Final = 4096
"""About so many pages has a map: with 1,000,000 extents some 250 in each, which take 0.3 ms to make."""
PAGE_SECTORS_MIN: Final = 2048
"""The shortest page: 1 MiB can't hold more than 2048 entries."""


def backward_reference(serial: int, index: int) -> int:
    """Return the reference to an entry of a snapshot's backward journal."""
    assert 0 <= serial < 1 << 29
    assert 0 <= index < 1 << 32
    return BACKWARD | serial << 32 | index


def split_reference(reference: int) -> tuple[int, int]:
    """Return serial and index of a backward reference."""
    return reference >> 32 & (1 << 29) - 1, reference & (1 << 32) - 1


class Stack(NamedTuple):
    """What a moment is: layers over the mirror, later ones winning. The mirror holds all events up to *mirror_seq*."""

    layers: list[Selectable]
    mirror_seq: int

    def select(self, start: int, stop: int) -> list[tuple[Ints, Ints, Ints]]:
        """Return what each layer has in a range, clipped to it: starts, stops, references; later ones win.

        None of it changes any more, so other threads may work with it.
        """
        found = [layer.select(start, stop) for layer in self.layers]
        return [
            (np.maximum(starts, start), np.minimum(stops, stop), refs) for starts, stops, refs in found if len(refs)
        ]

    def entries(self, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """Return the moment's entries within a range as a disjoint list: starts, stops, references."""
        return settled(self.select(start, stop), self.mirror_seq)


def settled(parts: list[tuple[Ints, Ints, Ints]], mirror_seq: int) -> tuple[Ints, Ints, Ints]:
    """Return what parts of layers, later ones winning, amount to off the mirror, as a disjoint list."""
    starts, stops, references = stacked(parts)
    change = net_change(starts, stops)
    references = references[change.winner]
    off_mirror = (references & ~ZERO) > mirror_seq
    return change.starts[off_mirror], change.stops[off_mirror], references[off_mirror]


class Vrmo:
    """One moment's map. Not thread-safe."""

    def __init__(self, size_sectors: int) -> None:
        """Begin without pages."""
        self.size = size_sectors
        width = max(PAGE_SECTORS_MIN, -(-size_sectors // PAGES))
        self.page_sectors = min(1 << (width - 1).bit_length(), PAGE_SECTORS_MAX)
        self._pages: dict[int, BlockMap] = {}

    def __len__(self) -> int:
        """Return the number of entries in the pages made so far."""
        return sum(len(page) for page in self._pages.values())

    def _numbers(self, start: int, stop: int) -> range:
        return range(start // self.page_sectors, -(-stop // self.page_sectors))

    # -- looking up ---------------------------------------------------------------------------------------------

    def resolve_nowait(self, start: int, stop: int) -> Pieces | None:
        """Return (start, stop, reference) pieces that together are a range, ascending; None if a page isn't made yet.

        O(log n + pieces).
        """
        width = self.page_sectors
        pieces: Pieces = []  # not Pieces(), which takes longer than all the rest
        for number in range(start // width, -(-stop // width)):
            page = self._pages.get(number)
            if page is None:
                return None
            page.resolve(max(start, page.first), min(stop, page.first + page.size), pieces)
        return pieces

    def has_pages(self, start: int, stop: int) -> bool:
        """Say whether all pages of a range are made."""
        return all(number in self._pages for number in self._numbers(start, stop))

    def make_pages(self, start: int, stop: int, stack: Stack) -> None:
        """Make the pages of a range that aren't there. O(log n) and the entries in them, for each."""
        for number in self._numbers(start, stop):
            if number not in self._pages:
                first = number * self.page_sectors
                size = min(self.page_sectors, self.size - first)
                self._pages[number] = block_map(first, size, *stack.entries(first, first + size))

    # -- changing -----------------------------------------------------------------------------------------------

    def absorb(self, start: int, stop: int, reference: int) -> None:
        """Take in a move that the mirror is about to lose, where a page is made: what is on the mirror is mapped."""
        for number in self._numbers(start, stop) if self._pages else ():
            page = self._pages.get(number)
            if page is not None:
                page.absorb(max(start, page.first), min(stop, page.first + page.size), reference)
                if isinstance(page, Vbmm) and pays(page.size, page.on_mirror):
                    self._pages[number] = page.converted()

    def overwrite(self, start: int, stop: int, reference: int) -> None:
        """Take in a move that is newer than all before, where a page is made."""
        for number in self._numbers(start, stop) if self._pages else ():
            page = self._pages.get(number)
            if page is not None:
                page.overwrite(max(start, page.first), min(stop, page.first + page.size), reference)
                if isinstance(page, Vbmm) and pays(page.size, page.on_mirror):
                    self._pages[number] = page.converted()

    def forget(self, starts: Ints, stops: Ints) -> None:
        """Forget the pages that extents touch: cheaper than overwriting them when the extents are many."""
        if not self._pages or not len(starts):
            return
        begins, ends = united(starts // self.page_sectors, -(-stops // self.page_sectors))
        numbers = np.fromiter(self._pages, np.int64, len(self._pages))
        index = np.searchsorted(begins, numbers, "right") - 1
        for number in numbers[(index >= 0) & (numbers < ends[index])].tolist():
            del self._pages[number]

    def reset(self) -> None:
        """Forget all pages."""
        self._pages.clear()

    # -- checking -----------------------------------------------------------------------------------------------

    def pages(self) -> list[BlockMap]:
        """Return the pages made so far, ascending."""
        return [self._pages[number] for number in sorted(self._pages)]

    def check(self) -> None:
        """Assert the invariants of all pages, and that each is of the kind that pays."""
        for number, page in self._pages.items():
            assert page.first == number * self.page_sectors
            assert page.size == min(self.page_sectors, self.size - page.first)
            page.check()
            assert not (isinstance(page, Vbmm) and pays(page.size, page.on_mirror))


__all__ = ["BACKWARD", "MIRROR", "ZERO", "Stack", "Vrmo", "backward_reference", "split_reference"]
