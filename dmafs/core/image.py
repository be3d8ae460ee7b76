"""Images: one volume at one seq, and how their bytes are read.

Reading has two steps. ``resolve`` asks the VRMO, on the volume's thread; it returns pieces that name open files.
``read_pieces`` reads them, on any thread. A piece stays readable until its reader is done, since a sync waits for
earlier readers before it overwrites the mirror or closes a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dmafs.core.extent import Ints
from dmafs.core.segment import Segment
from dmafs.core.vrmo import MIRROR, Vrmo
from dmafs.units import SECTOR

if TYPE_CHECKING:
    from dmafs.core.volume import Volume


class Piece(NamedTuple):
    """A run of sectors at one place: entry number *entry* of *segment* from sector *skip* on, or the mirror."""

    start: int
    stop: int
    segment: Segment | None
    entry: int
    skip: int


class Image:
    """One moment of a volume. Made by ``Volume.image``; whoever reads it over time holds it with ``pins``."""

    def __init__(self, volume: Volume, seq: int, time_ns: int, vrmo: Vrmo) -> None:
        """Show *volume* at *seq* through *vrmo*."""
        self.volume = volume
        self.seq = seq
        self.time_ns = time_ns
        self.vrmo = vrmo
        self.pins = 0
        self.exact = False  # whether it ends at a sync indicator; set when it is made, since syncs forget indicators

    @property
    def size(self) -> int:
        """Return the size in bytes."""
        return self.volume.info.size_sectors * SECTOR

    def resolve(self, offset: int, length: int) -> list[Piece]:
        """Return where ``[offset, offset + length)`` is, in bytes widened to whole sectors; within the image."""
        assert offset >= 0
        assert offset + length <= self.size
        pieces = []
        for start, stop, reference in self.vrmo.resolve(offset // SECTOR, -(-(offset + length) // SECTOR)):
            if reference == MIRROR:
                pieces.append(Piece(start, stop, None, 0, 0))
                continue
            segment, index = self.volume.descriptor(reference)
            pieces.append(Piece(start, stop, segment, index, start - segment.starts[index]))
        return pieces

    def read_pieces(self, pieces: list[Piece], offset: int, length: int, *, nowait: bool = False) -> memoryview:
        """Return the bytes ``[offset, offset + length)``, which *pieces* resolve.

        CorruptionError where data doesn't match its checksum; with *nowait* BlockingIOError when something isn't in
        the page cache.
        """
        if not pieces:
            return memoryview(b"")
        first = pieces[0].start
        buffer = memoryview(bytearray((pieces[-1].stop - first) * SECTOR))
        for start, stop, segment, index, skip in pieces:
            part = buffer[(start - first) * SECTOR : (stop - first) * SECTOR]
            if segment is None:
                self.volume.mirror.read_into(part, start, nowait=nowait)
            else:
                segment.read_into(index, skip, part, nowait=nowait)
        begin = offset - first * SECTOR
        return buffer[begin : begin + length]

    def read(self, offset: int, length: int) -> memoryview:
        """Return the bytes ``[offset, offset + length)``, clipped to the image; blocks."""
        length = max(0, min(length, self.size - offset))
        return self.read_pieces(self.resolve(offset, length) if length else [], offset, length)

    def allocated_sectors(self) -> int:
        """Return how many sectors hold data: the mirror's that aren't holes, changed by what the journals hold."""
        begins, ends = self.volume.mirror.allocated()
        starts, stops, references = self.vrmo.arrays()
        covered = _allocated_before(begins, ends, stops) - _allocated_before(begins, ends, starts)
        zeros = [not self._is_zero(reference) for reference in references.tolist()]
        held = (stops - starts)[np.array(zeros, bool)]
        return int((ends - begins).sum() - covered.sum() + held.sum())

    def _is_zero(self, reference: int) -> bool:
        segment, index = self.volume.descriptor(reference)
        return segment.is_zero(index)

    def check(self) -> None:
        """Assert that the map equals one built anew from the descriptors (promise 9)."""
        self.vrmo.check()
        fresh = self.volume.build_vrmo(self.seq)
        for mine, other in zip(_joined(self.vrmo), _joined(fresh), strict=True):
            assert np.array_equal(mine, other), f"map of the image at {self.seq} differs from its descriptors"


def _allocated_before(begins: Ints, ends: Ints, addresses: Ints) -> Ints:
    """Return for each address how many allocated sectors lie before it."""
    if not len(begins):
        return np.zeros_like(addresses)
    total = np.concatenate([[0], np.cumsum(ends - begins)])
    index = np.searchsorted(begins, addresses, "right") - 1
    inside = np.minimum(addresses, ends[index]) - begins[index]
    return np.where(index < 0, 0, total[index] + np.where(index < 0, 0, inside))


def _joined(vrmo: Vrmo) -> tuple[Ints, ...]:
    """Return a map's entries with neighbours of one reference joined: how an entry was cut doesn't matter."""
    starts, stops, references = vrmo.arrays()
    if not len(starts):
        return starts, stops, references
    new = np.append(True, (starts[1:] != stops[:-1]) | (references[1:] != references[:-1]))
    begin = np.flatnonzero(new)
    return starts[begin], stops[np.append(begin[1:], len(starts)) - 1], references[begin]
