"""What a power cut leaves of a simulated disk, and what a kill does.

- Of a file that wasn't synced each sector has one of the versions it had since, and so has the size. That is what a
  page cache does that writes back when and what it likes: a write is kept, lost or torn, a later one before an earlier.
- Names change in order, as in a file system's log: what is left is a prefix of the changes of all directories
  together, or of each directory for itself. ``sync_directory`` makes those of its directory durable, no others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from dmafs.units import SECTOR
from tests.crash.disk import ROOT, Change, Moment, Naming, SimulatedDisk, changed, rename_all


def cut(moment: Moment, rng: random.Random, *, keep: bool | None = None) -> SimulatedDisk:
    """Return what a power cut may have left at a moment: all with *keep*, nothing without, else as chance decides."""
    files = moment.files.copy()
    for inode, changes in moment.changes.items():
        files[inode] = _left(files[inode], changes, rng, keep=keep)
    names = {inode: entries.copy() for inode, entries in moment.names.items()}
    for naming in _kept(moment.naming, rng, keep=keep):
        rename_all(names, naming)
    reached, queue = {ROOT}, [ROOT]
    while queue:
        for inode in names[queue.pop()].values():
            reached.add(inode)
            if inode in names:
                queue.append(inode)
    return SimulatedDisk(
        {inode: content for inode, content in files.items() if inode in reached},
        {inode: entries for inode, entries in names.items() if inode in reached},
    )


def killed(moment: Moment) -> SimulatedDisk:
    """Return the disk as the next process finds it while the kernel goes on: what isn't durable is there still."""
    names = {inode: entries.copy() for inode, entries in moment.names.items()}
    disk = SimulatedDisk(moment.files.copy(), names)
    for inode, changes in moment.changes.items():
        for change in changes:
            disk.change(inode, change)
    for naming in moment.naming:
        disk.name(naming)
    return disk


def _kept(naming: Sequence[Naming], rng: random.Random, *, keep: bool | None) -> Sequence[Naming]:
    if keep is not None:
        return naming if keep else ()
    if rng.random() < 0.5:
        return naming[: rng.randint(0, len(naming))]
    counts: dict[int, int] = {}
    for one in naming:
        counts[one[0][0]] = counts.get(one[0][0], 0) + 1
    left = {directory: rng.randint(0, count) for directory, count in sorted(counts.items())}
    kept = []
    for one in naming:
        left[one[0][0]] -= 1
        if left[one[0][0]] >= 0:
            kept.append(one)
    return kept


def _left(content: bytes, changes: Sequence[Change], rng: random.Random, *, keep: bool | None) -> bytes:
    """Return what is left of changes: a prefix of them, or of each sector a version of its own."""
    if keep is not None:
        count = len(changes) if keep else 0
    elif rng.random() < 0.5:
        return _torn(content, changes, rng)
    else:
        count = rng.choice((0, len(changes), rng.randint(0, len(changes))))
    for change in changes[:count]:
        content = changed(content, change)
    return content


def _torn(content: bytes, changes: Sequence[Change], rng: random.Random) -> bytes:
    sizes = [len(content)]
    for change in changes:
        sizes.append(change.offset if change.resizes else max(sizes[-1], _written_end(change)))
    left = bytearray(max(sizes))
    left[: len(content)] = content
    versions: dict[int, int] = {}
    for number, change in enumerate(changes):
        begin, end = change.offset, sizes[number] if change.resizes else change.offset + change.length
        while begin < end:
            sector = begin // SECTOR
            stop = min(end, (sector + 1) * SECTOR)
            if sector not in versions:
                versions[sector] = rng.choice((0, len(changes), rng.randint(0, len(changes))))
            if number < versions[sector]:
                at = begin - change.offset
                left[begin:stop] = bytes(stop - begin) if change.data is None else change.data[at : at + stop - begin]
            begin = stop
    return bytes(left[: rng.choice(sizes)])


def _written_end(change: Change) -> int:
    """Return how far a change extends a file; holes don't."""
    return 0 if change.data is None else change.offset + change.length
