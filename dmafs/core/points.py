"""Points: which moments of a volume can be had, and what a time or a name means.

A time T means: after every event with a time not after T. From the mirror on every write is a point; before it T
resolves down to the newest snapshot at or before it. Before the first recoverable point and in the future there is
nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from dmafs.core.snapshot import Snapshot
from dmafs.core.volume import Volume
from dmafs.errors import CorruptionError, NoSuchPointError
from dmafs.units import format_rfc3339

GRID_POINTS: Final = 60
"""At most so many points of the coarse grid are listed."""
_GRID_STEPS_S: Final = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 86400, 7 * 86400, 28 * 86400, 364 * 86400)


@dataclass(frozen=True, slots=True)
class Point:
    """One recoverable moment; *kind* is origin, mirror, snapshot, mark, grid or newest.

    *instant_ns* means that moment in all volumes: for a snapshot the canonical time it was taken at with others.
    """

    seq: int
    time_ns: int
    instant_ns: int
    kind: str
    name: str = ""
    pinned: bool = False


def seq_at(volume: Volume, time_ns: int) -> int:
    """Return the seq that *time_ns* means; NoSuchPointError before the beginning and in the future. O(log n)."""
    now = volume.pointers.now
    name, text = volume.info.name, _shown(time_ns)
    if not now.copied:
        raise NoSuchPointError(
            f"volume {name} has no recoverable point yet: the initial copy isn't complete",
            hint="wait until dmafs status says protected",
        )
    if time_ns > max(volume.clock(), volume.journal.head_time_ns):
        raise NoSuchPointError(f"time {text} is in the future", hint="the newest state is in live/")
    first = max(volume.floor, now.origin_seq)
    if time_ns >= volume.time_of(first):
        found = max(volume.journal.seq_at(time_ns, default=first), first)
        gap = volume.journal.gap_around(found)
        return gap.begin if gap else found
    snapshot = volume.snapshots.newest_before(time_ns, volume.floor)
    if snapshot is None:
        oldest = oldest_point(volume)
        raise NoSuchPointError(
            f"time {text} is before the first recoverable point of volume {name}",
            hint=f"history begins at {_shown(oldest.time_ns)}",
        )
    return snapshot.seq


def oldest_point(volume: Volume) -> Point:
    """Return the first recoverable point."""
    seq = max(volume.floor, volume.pointers.now.origin_seq)
    for snapshot in volume.snapshots:
        if snapshot.seq <= seq and volume.recoverable(snapshot.seq):
            return _snapshot_point(snapshot)
    return _plain_point(volume, seq, "origin")


def point_named(volume: Volume, name: str) -> Point | None:
    """Return the snapshot or the newest recoverable mark called *name*, or None."""
    snapshot = volume.snapshots.find(name)
    if snapshot is not None:
        return _snapshot_point(snapshot)
    for mark in reversed(list(volume.journal.marks())):
        if mark.name == name and _is_found_by_time(volume, mark.seq):
            return _plain_point(volume, mark.seq, "mark", name)
    return None


def _is_found_by_time(volume: Volume, seq: int) -> bool:
    """Say whether the time of *seq* means it. Not if only a held image keeps it: then it means an older snapshot."""
    is_kept = seq >= volume.floor or volume.snapshots.visible_at(seq) is not None
    return is_kept and volume.recoverable(seq)


def consistency(volume: Volume, seq: int) -> str:
    """Return what the image at a recoverable *seq* is like, by what is known now.

    ``frozen`` a snapshot that a hook brought what uses the disk to rest for; ``exact`` where a sync indicator stands,
    as a power cut at a flush would have left it; ``crash`` between two of them.
    """
    if volume.snapshots.is_frozen(seq):
        return "frozen"
    return "exact" if volume.is_exact(seq) else "crash"


def _snapshot_point(snapshot: Snapshot) -> Point:
    return Point(snapshot.seq, snapshot.time_ns, snapshot.instant_ns, "snapshot", snapshot.name, snapshot.pinned)


def _plain_point(volume: Volume, seq: int, kind: str, name: str = "") -> Point:
    time_ns = volume.time_of(seq)
    return Point(seq, time_ns, time_ns, kind, name)


def landmarks(volume: Volume) -> list[Point]:
    """Return the points worth listing, oldest first: snapshots, marks, a coarse grid, the newest point."""
    if not volume.pointers.now.copied:
        return []
    found = [_snapshot_point(snapshot) for snapshot in volume.snapshots]
    found += [
        _plain_point(volume, mark.seq, "mark", mark.name)
        for mark in volume.journal.marks()
        if _is_found_by_time(volume, mark.seq)
    ]
    taken = {point.seq for point in found}
    first = max(volume.floor, volume.pointers.now.origin_seq)
    ends = [(first, "origin" if first == volume.pointers.now.origin_seq else "mirror"), (_newest(volume), "newest")]
    for seq, kind in [*ends, *((seq, "grid") for seq in _grid(volume, first))]:
        if seq not in taken:
            taken.add(seq)
            found.append(_plain_point(volume, seq, kind))
    return sorted(found, key=lambda point: (point.seq, point.name))


def _newest(volume: Volume) -> int:
    """Return the seq of the newest point: the head, or where a gap that lasts began."""
    gap = volume.journal.gap_around(volume.journal.head)
    return gap.begin if gap else volume.journal.head


def _grid(volume: Volume, first: int) -> Iterator[int]:
    """Yield the last flushed seqs before round times since the mirror, at most GRID_POINTS of them."""
    begin, end = volume.time_of(first), volume.journal.head_time_ns
    step = next((s for s in _GRID_STEPS_S if (end - begin) // (s * 10**9) < GRID_POINTS), _GRID_STEPS_S[-1]) * 10**9
    for time_ns in range((begin // step + 1) * step, end, step):
        with contextlib.suppress(CorruptionError):  # what is damaged is no landmark; who looks it up gets the error
            indicator = volume.journal.last_indicator(volume.journal.seq_at(time_ns, default=first))
            if indicator is not None and volume.recoverable(indicator.seq):
                yield indicator.seq


def _shown(time_ns: int) -> str:
    try:
        return format_rfc3339(time_ns)
    except (AssertionError, ValueError, OverflowError):
        return f"{time_ns} ns"
