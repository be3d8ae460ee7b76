"""Forecast: what dropping snapshots will copy and free, from descriptors alone (``snapshots`` says what a drop does).

A drop merges into the next older snapshot what that lacks, and with none older it frees all. So what one frees depends
on what is dropped before it: a run of snapshots that have nothing in common with the one below them, but much with each
other, frees nothing at first and much at its end.
"""

from __future__ import annotations

import numpy as np

from dmafs.core.extent import Ints, lacking
from dmafs.core.ondisk import RECORD_SIZE
from dmafs.core.snapshot import Key, Snapshot
from dmafs.core.snapshots import Snapshots
from dmafs.units import SECTOR


class Forecast:
    """What a run of drops will copy and free, oldest first, without doing it."""

    def __init__(self, snapshots: Snapshots) -> None:
        """Begin with nothing dropped."""
        self._snapshots = snapshots
        self._dropped: set[Key] = set()
        self._target: tuple[Ints, Ints] | None = None  # what the snapshot that is merged into will hold; None: none is

    def drop(self, snapshot: Snapshot) -> tuple[int, int]:
        """Return how many bytes dropping a snapshot copies to the next older one left, and how many it frees."""
        held = self._snapshots.held_bytes(snapshot)
        older = self._snapshots.older(snapshot)
        if older is None or older.key not in self._dropped:
            self._target = None if older is None else self._snapshots.segment(older).extents()
        self._dropped.add(snapshot.key)
        if self._target is None:
            return 0, held
        source = self._snapshots.segment(snapshot)
        change = lacking(*source.extents(), *self._target)
        starts, stops = self._target
        self._target = np.concatenate([starts, change.starts]), np.concatenate([stops, change.stops])
        data = np.array([not source.is_zero(entry) for entry in change.winner.tolist()], bool)
        records = len(data) + (len(data) > 0)  # one seals them
        copied = records * RECORD_SIZE + int((change.stops - change.starts)[data].sum()) * SECTOR
        return copied, held - copied

    def keep(self, snapshot: Snapshot) -> None:
        """Take back the last drops down to this one."""
        self._dropped.discard(snapshot.key)
