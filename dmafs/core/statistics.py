"""What a volume has done since it was opened, for whoever measures: plain integers, added to where it happens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from dmafs.core.ondisk import Flag, Records

READ_BOUNDS_S: Final = (25e-6, 50e-6, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
"""Upper bounds of the classes that reads are counted in."""
SYNC_BOUNDS_S: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class Durations:
    """How long something took, counted in classes."""

    __slots__ = ("bounds_s", "counts", "total_s")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        """Begin with none; *bounds_s* are the upper bounds, included, of all classes but the last."""
        self.bounds_s = bounds_s
        self.counts = [0] * (len(bounds_s) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.total_s += seconds


@dataclass(slots=True)
class Captured:
    """Events of one kind that were journaled."""

    events: int = 0
    sectors: int = 0


@dataclass(slots=True)
class Reads:
    """Reads that were answered in one way."""

    count: int = 0
    bytes: int = 0

    def add(self, length: int) -> None:
        """Count one of *length* bytes."""
        self.count += 1
        self.bytes += length


@dataclass(slots=True)
class Statistics:
    """See the module."""

    syncs: int = 0
    saved_sectors: int = 0
    applied_sectors: int = 0
    sync_durations: Durations = field(default_factory=lambda: Durations(SYNC_BOUNDS_S))
    data: Captured = field(default_factory=Captured)
    zeros: Captured = field(default_factory=Captured)
    at_once: Reads = field(default_factory=Reads)
    """Reads of images that were answered from memory and the page cache."""
    by_thread: Reads = field(default_factory=Reads)
    """Those that had to wait for the disk, in a thread."""
    read_durations: Durations = field(default_factory=lambda: Durations(READ_BOUNDS_S))
    """Reads of files of the tree: images, clones and the tap."""
    damaged_reads: int = 0
    """Reads that failed since a checksum was wrong."""

    def note_events(self, records: Records) -> None:
        """Count the events among descriptors that were captured together."""
        for flag, kind in ((Flag.DATA, self.data), (Flag.ZERO, self.zeros)):
            lengths = records["length"][records["flags"] == int(flag)]
            kind.events += len(lengths)
            kind.sectors += int(lengths.sum(dtype=np.int64))
