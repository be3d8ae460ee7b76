"""Images: one volume at one seq, and how their bytes are read.

Reading has two steps. ``locate`` asks the VRMO, on the volume's thread; it returns pieces that name open files. Most
often that is at once (``resolve_nowait``); what isn't in memory yet is brought there by work whose slow parts run in
threads. ``read_pieces`` reads the pieces, on any thread. A piece stays readable until its reader is done, since a sync
waits for earlier readers before it overwrites the mirror or closes a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from dmafs.core.extent import Ints, united
from dmafs.core.layers import stacked
from dmafs.core.segment import Segment
from dmafs.core.vrmo import MIRROR, ZERO, Vrmo, settled
from dmafs.core.work import Work, run
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR

if TYPE_CHECKING:
    from dmafs.core.volume import Volume

ZEROS: Final = -2


class Piece(NamedTuple):
    """A run of sectors at one place.

    That is entry number *entry* of *segment* from sector *skip* on; without a segment the mirror (entry MIRROR) or
    nothing at all (ZEROS).
    """

    start: int
    stop: int
    segment: Segment | None
    entry: int
    skip: int


class Image:
    """One moment of a volume. Made by ``Volume.image``; whoever reads it over time holds it with ``pins``."""

    def __init__(self, volume: Volume, seq: int, time_ns: int, *, exact: bool = False) -> None:
        """Show *volume* at *seq*."""
        self.volume = volume
        self.seq = seq
        self.time_ns = time_ns
        self.vrmo = Vrmo(volume.info.size_sectors)
        self.pins = 0
        self.exact = exact  # whether it ends at a sync indicator; set when it is made, since syncs forget indicators
        self._allocated: int | None = None

    @property
    def size(self) -> int:
        """Return the size in bytes."""
        return self.volume.info.size_sectors * SECTOR

    # -- where it is --------------------------------------------------------------------------------------------

    def resolve_nowait(self, offset: int, length: int) -> list[Piece] | None:
        """Return where ``[offset, offset + length)`` is, in bytes widened to whole sectors; within the image.

        None if something that this needs isn't in memory yet, or the volume has let go of the image, which nobody
        holds: then its map isn't kept up to date any more.
        """
        assert offset >= 0
        assert offset + length <= self.size
        return self._pieces(*_sectors(offset, length)) if self.volume.keeps(self) else None

    def _pieces(self, start: int, stop: int) -> list[Piece] | None:
        found = self.vrmo.resolve_nowait(start, stop)
        if found is None:
            return None
        pieces = []
        for begin, end, reference in found:
            if reference == MIRROR:
                pieces.append(Piece(begin, end, None, MIRROR, 0))
            elif reference & ZERO:
                pieces.append(Piece(begin, end, None, ZEROS, 0))
            else:
                segment, index = self.volume.descriptor_nowait(reference)
                if segment is None:
                    return None
                pieces.append(Piece(begin, end, segment, index, begin - segment.starts[index]))
        return pieces

    def locate(self, offset: int, length: int) -> Work[list[Piece]]:
        """Return where ``[offset, offset + length)`` is, once all that this needs is in memory.

        At each yield a sync or a drop may change the map, so nothing taken from it is used behind one. Of an image that
        the volume has let go of it is made anew each time. NoSuchPointError if nobody holds the image and a sync has
        passed it meanwhile.
        """
        start, stop = _sectors(offset, length)
        while True:
            if not self.volume.keeps(self):
                self.vrmo.reset()
            if not self.vrmo.has_pages(start, stop):
                stack = yield from self.volume.stack(self)
                if not self.volume.keeps(self):
                    self.vrmo.reset()
                self.vrmo.make_pages(start, stop, stack)
            pieces = self._pieces(start, stop)
            if pieces is not None:
                return pieces
            yield from self.volume.load(self._missing(start, stop))

    def _missing(self, start: int, stop: int) -> int:
        """Return the first reference of a range to a journal that isn't in memory; there is one."""
        for _, _, reference in self.vrmo.resolve_nowait(start, stop) or ():
            is_data = reference != MIRROR and not reference & ZERO
            if is_data and self.volume.descriptor_nowait(reference)[0] is None:
                return reference
        raise AssertionError("all of the range is in memory")

    def resolve(self, offset: int, length: int) -> list[Piece]:
        """Return where ``[offset, offset + length)`` is; blocks."""
        return run(self.locate(offset, length))

    # -- what is there ------------------------------------------------------------------------------------------

    def read_pieces(self, pieces: list[Piece], offset: int, length: int, *, nowait: bool = False) -> memoryview:
        """Return the bytes ``[offset, offset + length)``, which *pieces* resolve.

        CorruptionError where data doesn't match its checksum; with *nowait* BlockingIOError when something isn't in
        the page cache.
        """
        if not pieces:
            return memoryview(b"")
        first = pieces[0].start
        buffer = memoryview(bytearray((pieces[-1].stop - first) * SECTOR))
        self._fill(buffer, pieces, nowait=nowait)
        begin = offset - first * SECTOR
        return buffer[begin : begin + length]

    def read_nowait(self, offset: int, length: int, scratch: memoryview) -> memoryview | None:
        """Return the bytes ``[offset, offset + length)``, which are in *scratch* until it is used again.

        None if they aren't whole sectors within the image, or something isn't in memory or in the page cache: then
        ``locate`` and ``read_pieces`` are the way. CorruptionError where data doesn't match its checksum.
        """
        if (offset | length) % SECTOR or offset + length > self.size or length > len(scratch):
            return None
        pieces = self.resolve_nowait(offset, length)
        if not pieces:
            return None
        view = scratch[:length]
        try:
            self._fill(view, pieces, nowait=True)
        except BlockingIOError:
            return None
        return view

    def _fill(self, buffer: memoryview, pieces: list[Piece], *, nowait: bool) -> None:
        """Read pieces, all of them whole, into *buffer*."""
        first = pieces[0].start
        mirror_read = nowait and len(pieces) > 1 and self._read_across(buffer, pieces)
        for start, stop, segment, entry, skip in pieces:
            part = buffer[(start - first) * SECTOR : (stop - first) * SECTOR]
            if segment is not None:
                segment.read_into(entry, skip, part, nowait=nowait)
            elif entry == ZEROS:
                part[:] = bytes(len(part))
            elif not mirror_read:
                self.volume.mirror.read_into(part, start, nowait=nowait)

    def _read_across(self, buffer: memoryview, pieces: list[Piece]) -> bool:
        """Read what is on the mirror at once, along with what is between, unless that is more; say whether it was."""
        on_mirror = [piece for piece in pieces if piece.entry == MIRROR]
        if len(on_mirror) < 2:  # noqa: PLR2004
            return False
        first, low, high = pieces[0].start, on_mirror[0].start, on_mirror[-1].stop
        if 2 * sum(piece.stop - piece.start for piece in on_mirror) < high - low:
            return False
        try:
            self.volume.mirror.read_into(buffer[(low - first) * SECTOR : (high - first) * SECTOR], low, nowait=True)
        except CorruptionError:  # maybe between
            return False
        return True

    def prefetch(self, pieces: Iterable[Piece]) -> None:
        """Have the system begin to read pieces, so that it has all of them to do at once."""
        for start, stop, segment, entry, _ in pieces:
            if segment is not None:
                segment.prefetch(entry)
            elif entry == MIRROR:
                self.volume.mirror.prefetch(start, stop)

    def read(self, offset: int, length: int) -> memoryview:
        """Return the bytes ``[offset, offset + length)``, clipped to the image; blocks."""
        length = max(0, min(length, self.size - offset))
        return self.read_pieces(self.resolve(offset, length) if length else [], offset, length)

    # -- how much is there --------------------------------------------------------------------------------------

    def measure(self) -> Work[int]:
        """Return how many sectors hold data: the mirror's that aren't holes, changed by what the journals hold.

        Counted once for an image of the past.
        """
        if self._allocated is None or self is self.volume.live:
            stack = yield from self.volume.stack(self)
            parts = stack.select(0, self.vrmo.size)  # copies of what is still appended to: a thread may have them
            allocated = self.volume.mirror.allocated()
            self._allocated = yield partial(_allocated_sectors, parts, stack.mirror_seq, allocated)
        return self._allocated

    def allocated_sectors(self) -> int:
        """Return how many sectors hold data; blocks."""
        return run(self.measure())

    def check(self) -> None:
        """Assert that the map equals one built anew from the descriptors (promise 9)."""
        self.vrmo.check()
        fresh = self.volume.rebuilt(self.seq)
        for page in self.vrmo.pages():
            columns = fresh.entries(page.first, page.first + page.size)
            for mine, other in zip(_joined(*page.arrays()), _joined(*columns), strict=True):
                assert np.array_equal(mine, other), f"map of the image at {self.seq} differs from its descriptors"


def _sectors(offset: int, length: int) -> tuple[int, int]:
    """Widen a range of bytes to whole sectors."""
    return offset // SECTOR, -(-(offset + length) // SECTOR)


def _allocated_sectors(parts: list[tuple[Ints, Ints, Ints]], mirror_seq: int, allocated: tuple[Ints, Ints]) -> int:
    """Return how many sectors hold data over a mirror of which *allocated* do. O(n log n) of all entries."""
    begins, ends = allocated
    starts, stops, references = stacked(parts)
    if (references & ZERO).any():  # which entry wins matters only with zeros among them
        starts, stops, references = settled(parts, mirror_seq)
        held = (stops - starts)[(references & ZERO) == 0]
    else:
        kept = references > mirror_seq
        starts, stops = united(starts[kept], stops[kept])
        held = stops - starts
    covered = _allocated_before(begins, ends, stops) - _allocated_before(begins, ends, starts)
    return int((ends - begins).sum() - covered.sum() + held.sum())


def _allocated_before(begins: Ints, ends: Ints, addresses: Ints) -> Ints:
    """Return for each address how many allocated sectors lie before it."""
    if not len(begins):
        return np.zeros_like(addresses)
    total = np.concatenate([[0], np.cumsum(ends - begins)])
    index = np.searchsorted(begins, addresses, "right") - 1
    inside = np.minimum(addresses, ends[index]) - begins[index]
    return np.where(index < 0, 0, total[index] + np.where(index < 0, 0, inside))


def _joined(starts: Ints, stops: Ints, references: Ints) -> tuple[Ints, ...]:
    """Return entries with neighbours of one reference joined: how an entry was cut doesn't matter."""
    if not len(starts):
        return starts, stops, references
    new = np.append(True, (starts[1:] != stops[:-1]) | (references[1:] != references[:-1]))
    begin = np.flatnonzero(new)
    return starts[begin], stops[np.append(begin[1:], len(starts)) - 1], references[begin]
