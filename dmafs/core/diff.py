"""Diff: which sectors differ between two moments of a volume, from the maps alone.

Where the history between two recoverable seqs a < b is, with the mirror at seq m:

===============  ====================================================================================================
from m on        events ``max(a, m)+1 .. b`` of the forward journal
before m         the entries of every snapshot s with ``a <= s < min(b, m)``, hidden ones too: what syncs overwrote in
                 the mirror between s and the next snapshot
===============  ====================================================================================================

1. No differing sector is missed. An address that no snapshot in ``[a, b)`` holds is found at one and the same place by
   both images: in a snapshot from b on, or in the mirror.
2. What is listed was written between a and b, even if it holds the same bytes again: no data is read or compared.
3. One exception to 2, which the maps can't tell: a sync that was given up or cut off before its commit leaves entries
   in the open snapshot. If a snapshot then comes to stand on its way, the older one keeps what was written only behind
   it, so a diff up to there may list that too. A snapshot at the mirror's own seq is left out above, since all of its
   entries are of that kind or are told exactly by the events.
"""

from __future__ import annotations

import numpy as np

from dmafs.core.extent import Ints, join, net_change
from dmafs.core.snapshots import Snapshot
from dmafs.core.volume import Volume
from dmafs.errors import NoSuchPointError


def diff(volume: Volume, a: int, b: int) -> tuple[Ints, Ints]:
    """Return the sectors that were written between seqs *a* and *b*, in either order, as a disjoint joined list.

    NoSuchPointError if one of them isn't recoverable. O(n log n) of the events and entries between them.
    """
    return united(*written(volume, a, b))


def united(starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
    """Return the union of extents in any order as a disjoint joined list; pure. O(n log n)."""
    change = net_change(starts, stops)
    return join(change.starts, change.stops)


def written(volume: Volume, a: int, b: int) -> tuple[Ints, Ints]:
    """Return copies of all extents that were written between seqs *a* and *b*, in no order and with repetitions.

    For ``united``, which may run in another thread. Opens the journals of snapshots that aren't open, one at a time.
    """
    first, last = min(a, b), max(a, b)
    for seq in (first, last):
        if not volume.recoverable(seq):
            raise NoSuchPointError(
                f"volume {volume.info.name} has no recoverable point at seq {seq}",
                hint="list the points with: dmafs ls STORE",
            )
    mirror_seq = volume.pointers.now.mirror_seq
    parts = [volume.journal.extents(max(first, mirror_seq), last)]
    between = range(first, min(last, mirror_seq))
    parts += [_entries(volume, snapshot) for snapshot in volume.snapshots.all() if snapshot.seq in between]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _entries(volume: Volume, snapshot: Snapshot) -> tuple[Ints, Ints]:
    """Return copies of a snapshot's extents; a journal that was closed is closed again, for there may be thousands."""
    was_open = snapshot.segment is not None
    segment = volume.snapshots.segment(snapshot)
    try:
        return segment.extents()
    finally:
        if not was_open:
            snapshot.segment = None
            segment.close()
