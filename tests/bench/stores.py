"""Stores to measure, made quickly: by the core's own writers, sparse, and not durable until they are done.

Events are blocks of 4 KiB at addresses that don't touch, in random order, so that a map has as many extents as there
were events. Where only maps matter, one event in ``DATA_EVERY`` has data and the others are discards: the store of a
million events then takes some ten MiB per hundred thousand instead of some hundred.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from unittest import mock

import numpy as np

from dmafs.core.copy import initial_copy
from dmafs.core.extent import Ints
from dmafs.core.limits import VolumeLimits
from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.units import SECTOR

BLOCK: Final = 4096
BLOCK_SECTORS: Final = BLOCK // SECTOR
SPACING: Final = 2 * BLOCK_SECTORS
DATA_EVERY: Final = 64
LIMITS: Final = VolumeLimits(images=1, reserve_bytes=0)
"""One image is kept that nobody holds, the least there can be: the next one that is opened takes its place."""
BEGIN_NS: Final = 1_700_000_000_000_000_000


class Clock:
    """A clock that goes on by a microsecond at each look."""

    def __init__(self) -> None:
        self.now = BEGIN_NS

    def __call__(self) -> int:
        self.now += 1000
        return self.now


@contextlib.contextmanager
def undurable() -> Iterator[None]:
    """Leave out all syncs of files and directories: a benchmark's store needs to survive nothing."""
    with (
        mock.patch.object(RealFile, "datasync", return_value=None),
        mock.patch.object(RealStorage, "sync_directory", return_value=None),
    ):
        yield


def allow_open_files() -> None:
    """Raise the limit of open files as far as it goes: an open image of many snapshots may need two for each."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def new_volume(path: Path, size_sectors: int) -> Volume:
    """Make a volume whose primary is one hole, with a complete initial copy."""
    primary = path.with_name(path.name + ".primary")
    with primary.open("wb") as file:
        file.truncate(size_sectors * SECTOR)
    path.mkdir()
    storage = RealStorage(path)
    Volume.create(storage, name="disk", size_sectors=size_sectors, source=primary, tap="fuse", created_ns=BEGIN_NS)
    volume = reopened(path)
    source = open_source(primary, writable=False)
    try:
        run(initial_copy(volume, source, lambda flag: volume.flush(source, flag=flag), lambda _: None))
    finally:
        source.close()
    return volume


def reopened(path: Path) -> Volume:
    """Open a volume as a daemon does when it starts."""
    return open_volume(path, limits=LIMITS, clock=Clock())


def addresses(count: int, *, seed: int) -> Ints:
    """Return *count* different addresses of blocks that don't touch, in random order."""
    return np.random.default_rng(seed).permutation(2 * count).astype(np.int64)[:count] * SPACING


def size_for(count: int) -> int:
    """Return the sectors of a volume that has *count* such blocks, and as much again besides."""
    return 2 * count * SPACING


def capture(volume: Volume, starts: Ints, *, data_every: int = DATA_EVERY, first: int = 0) -> None:
    """Capture one event for each address; number *first*, counted from it, and every so many after it have data."""
    content = np.random.default_rng(first).bytes(BLOCK)
    for number, start in enumerate(starts.tolist(), first):
        if number % data_every:
            volume.discard(start, BLOCK_SECTORS)
        else:
            volume.write(start, content)


def with_events(path: Path, count: int) -> Ints:
    """Make a store with *count* events in the forward journal; return their addresses in order."""
    starts = addresses(count, seed=1)
    with undurable():
        volume = new_volume(path, size_for(count))
        capture(volume, starts)
        close(volume)
    return starts


def with_snapshots(path: Path, snapshots: int, count: int) -> Ints:
    """Make a store with so many snapshots that hold *count* extents in all; return their addresses, oldest first.

    One extent in ``DATA_EVERY`` has data, as the mirror had data there before.
    """
    starts = addresses(count, seed=2)
    with undurable():
        volume = new_volume(path, size_for(count))
        capture(volume, starts[::DATA_EVERY], data_every=1)
        advance(volume)
        for snapshot in list(volume.snapshots):
            run(volume.drop_snapshot(snapshot))
        for number, part in enumerate(np.split(starts, snapshots)):
            capture(volume, part, first=number * len(part))
            advance(volume)
        close(volume)
    return starts


def advance(volume: Volume) -> int:
    """Flush and sync: the mirror's moment becomes a snapshot. Return the mirror's new seq."""
    run(volume.flush())
    seq = run(sync(volume))
    forget(volume)
    return seq


def forget(volume: Volume) -> None:
    """Let go of what is kept in memory of images that nobody holds, as the daemon does after a release."""
    for segment in volume.take_garbage():
        segment.close()


def close(volume: Volume) -> None:
    """Close in order, so that opening has nothing to recover; a daemon would have made the indexes meanwhile."""
    run(volume.flush())
    run(volume.warm())
    volume.mark_clean()
    volume.close()
