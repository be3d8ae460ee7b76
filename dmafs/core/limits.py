"""The bounds of a volume's memory and files (promise 7)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dmafs.units import SECTOR


@dataclass(frozen=True, slots=True)
class SegmentLimits:
    """When a new segment begins."""

    data_sectors: int = (64 << 20) // SECTOR
    records: int = 65536

    def is_full(self, records: int, sectors: int) -> bool:
        """Say whether a segment with so many records takes no more, or would have too much data."""
        return sectors > self.data_sectors or records >= self.records


@dataclass(frozen=True, slots=True)
class IndexLimits:
    """The bounds of what is kept in memory of journals that are closed: of the forward and of the backward one each."""

    bytes: int = 128 << 20
    """Merged layers."""
    journals: int = 1024
    """Snapshots, or sealed segments, whose descriptors are in memory, and their two files open."""
    records: int = 1 << 21
    """Descriptors of all these together, at some 50 bytes."""
    indexed: int = 256
    """Entries from which on a layer is kept in a file: with fewer the descriptors are read as soon."""
    reserve_bytes: int = 0
    """Space of the store's filesystem that these files leave."""


@dataclass(frozen=True, slots=True)
class VolumeLimits:
    """All of them."""

    segments: SegmentLimits = field(default_factory=SegmentLimits)
    index: IndexLimits = field(default_factory=IndexLimits)
    images: int = 8
    """Maps kept for images that nobody holds."""
    reserve_bytes: int = 64 << 20
    """Space of the store's filesystem that capture leaves for syncs."""
    clone_bytes: int = 10 << 30
    """What one clone of the volume may take."""

    @property
    def indexes(self) -> IndexLimits:
        """Return the bounds of indexes, which leave twice the space that capture leaves."""
        return replace(self.index, reserve_bytes=2 * self.reserve_bytes)
