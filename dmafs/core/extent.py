"""Extents and net change: pure arithmetic on packed arrays of half-open sector ranges.

An *extent* is ``[start, stop)`` in sectors of 512 bytes. Many extents are a pair of int64 arrays ``starts, stops`` of
equal length; a *disjoint list* is such a pair in ascending order without overlaps. Everything here is vectorised: no
Python object is made per extent.

``net_change`` (fig. 4) answers what a run of write events amounts to. The breakpoints of all extents cut the address
space into cells; each extent covers a run of cells, and the *last* extent that covers a cell wins it. To paint n
extents without visiting each covered cell (one long write over many short ones would make that quadratic), an extent
that covers k cells is entered only at its two overlapping blocks of ``2**floor(log2(k))`` cells, and blocks are then
pushed down level by level to single cells. That takes O(n log n) time and O(n) memory whatever the overlaps are.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

MAX_EXTENT_SECTORS: Final = 2048
"""Longest extent that carries data, 1 MiB: what has to be read to verify one sector of it. A record of 64 bytes for it
is 0.006 % of the data."""

MAX_ZERO_SECTORS: Final = 2**32 - 1
"""Longest extent without data (discards, holes): what the 32-bit length of a record holds, just below 2 TiB."""


class NetChange(NamedTuple):
    """Non-overlapping moves in ascending order; *winner* is the index of the input extent that each came from."""

    starts: Ints
    stops: Ints
    winner: Ints


def net_change(starts: Ints, stops: Ints) -> NetChange:
    """Return what the extents, taken as writes in array order, amount to: the last writer of each sector wins (fig. 4).

    A move is one unbroken part of one input extent, so a write that survives whole is one move.
    Raises AssertionError when an extent is empty or reversed. O(n log n) time, O(n) memory.

    >>> net_change(np.array([0, 1]), np.array([5, 4]))  # ABCDE at 0, then ZXC at 1: A ZXC E
    NetChange(starts=array([0, 1, 4]), stops=array([1, 4, 5]), winner=array([0, 1, 0]))
    """
    assert np.all(starts < stops), "an extent is empty or reversed"
    if not len(starts):
        return NetChange(starts.astype(np.int64), stops.astype(np.int64), np.empty(0, np.int64))
    bounds, where = np.unique(np.concatenate([starts, stops]), return_inverse=True)
    first, last = where[: len(starts)], where[len(starts) :]
    owner = _paint(first, last, len(bounds) - 1)
    edge = np.flatnonzero(np.diff(owner, prepend=-2))
    end = np.append(edge[1:], len(owner))
    won = owner[edge]
    kept = won >= 0
    return NetChange(bounds[edge[kept]], bounds[end[kept]], won[kept])


def _paint(first: Ints, last: Ints, cells: int) -> Ints:
    """Return for each cell the greatest index i with first[i] <= cell < last[i], or -1."""
    level = np.frexp((last - first).astype(np.float64))[1] - 1
    owner = np.full(cells, -1, np.int64)
    for power in range(int(level.max()), -1, -1):
        width = 1 << power
        if width < cells:  # push the blocks of twice the width down into their two halves
            upper = owner.copy()
            np.maximum(upper[width:], owner[:-width], out=upper[width:])
            owner = upper
        index = np.flatnonzero(level == power)
        for begin in (first[index], last[index] - width):
            block = np.full(cells, -1, np.int64)
            block[begin] = index  # of repeated positions the last, which is the greatest, is kept
            np.maximum(owner, block, out=owner)
    return owner


def join(starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
    """Combine the neighbours of a disjoint list that touch (fig. 12: sorted, then contiguous entries joined)."""
    if not len(starts):
        return starts, stops
    begins = np.flatnonzero(np.append(True, starts[1:] != stops[:-1]))
    ends = np.append(begins[1:], len(starts)) - 1
    return starts[begins], stops[ends]


def united(starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
    """Return the union of extents in any order as a disjoint joined list. O(n log n), less of a few sorted runs."""
    if not len(starts):
        return starts, stops
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(stops[order])
    first = np.flatnonzero(np.append(True, starts[1:] > reach[:-1]))
    return starts[first], reach[np.append(first[1:], len(reach)) - 1]


def subtract(starts: Ints, stops: Ints, held_starts: Ints, held_stops: Ints) -> tuple[Ints, Ints]:
    """Return the parts of the extents that no held extent covers, as a disjoint joined list."""
    change = lacking(starts, stops, held_starts, held_stops)
    return join(change.starts, change.stops)


def lacking(starts: Ints, stops: Ints, held_starts: Ints, held_stops: Ints) -> NetChange:
    """Return the pieces of extents that no held extent covers; *winner* is the extent's index."""
    change = net_change(np.concatenate([starts, held_starts]), np.concatenate([stops, held_stops]))
    mine = change.winner < len(starts)
    return NetChange(*(column[mine] for column in change))


def chop(starts: Ints, stops: Ints, limit: int = MAX_EXTENT_SECTORS) -> tuple[Ints, Ints]:
    """Cut a disjoint list so that no extent is longer than *limit* sectors."""
    pieces = -(-(stops - starts) // limit)
    index = np.repeat(np.arange(len(starts)), pieces)
    nth = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = starts[index] + nth * limit
    return begin, np.minimum(begin + limit, stops[index])
