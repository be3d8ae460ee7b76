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

from functools import partial

import numpy as np

from dmafs.core.extent import Ints, united
from dmafs.core.volume import Volume
from dmafs.core.work import Work


def diff(volume: Volume, a: int, b: int) -> Work[tuple[Ints, Ints]]:
    """Return the sectors that were written between seqs *a* and *b*, in either order, as a disjoint joined list.

    NoSuchPointError if one of them isn't recoverable. O(n log n) of the events since the mirror, and of what the
    snapshots between have in their merged layers.
    """
    first, last = min(a, b), max(a, b)
    while True:
        for seq in (first, last):
            volume.require_point(seq)
        mirror_seq = volume.pointers.now.mirror_seq
        before = min(last, mirror_seq)
        layers = volume.snapshots.layers_nowait(first, mirror_seq, before=before)
        if layers is not None:
            break
        yield from volume.snapshots.prepare(first, mirror_seq, before=before)
    parts = [layer.select(0, volume.info.size_sectors)[:2] for layer in layers]
    parts.append(volume.journal.extents(max(first, mirror_seq), max(last, mirror_seq)))
    starts, stops = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
    found: tuple[Ints, Ints] = yield partial(united, starts, stops)
    return found
