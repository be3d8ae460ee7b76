"""Benchmarks of a sync: against a bare loop over files of the same sizes, and with more and more snapshots.

A sync here overwrites blocks of 4 KiB that all have data in the mirror and aren't in the open snapshot yet: each is
copied from the mirror to the backward journal, and from the forward journal to the mirror. The bare loop does the same
to three files with ``os.pread`` and ``os.pwrite``, one call each per block, in the sync's order (ascending addresses),
with an fdatasync of the backward file for each 8 MiB and at its end, and one of the mirror at the end; the sync has the
same ones, and those of the descriptors and pointers. It has no checksums, no descriptors and no commit. All files were
written before, are on disk, and are read once before the time is taken.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from dmafs.core.extent import Ints
from dmafs.core.segment import BATCH_BYTES
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.units import SECTOR
from tests.bench.cache import settle
from tests.bench.report import Result, at_least, at_most, progress, spread, timed, told
from tests.bench.stores import (
    BLOCK,
    addresses,
    advance,
    capture,
    close,
    forget,
    new_volume,
    reopened,
    size_for,
    undurable,
)

SPEED_GOAL: Final = 0.6
SPREAD_GOAL: Final = 1.1


class Syncing:
    """A store with so many snapshots, whose mirror has data at all addresses that its syncs overwrite."""

    def __init__(self, path: Path, starts: Ints, snapshots: int) -> None:
        """Make it."""
        self._path = path
        self._starts = starts
        self._rng = np.random.default_rng(7)
        with undurable():
            volume = new_volume(path, size_for(len(starts)))
            capture(volume, starts, data_every=1)
            advance(volume)
            for _ in range(snapshots - 1):
                capture(volume, starts[:1], data_every=1)
                advance(volume)
            assert len(volume.snapshots) == snapshots
            close(volume)
        self._volume: Volume = reopened(path)

    def round_s(self) -> float:
        """Capture one event for each address in random order, and time the sync of them."""
        capture(self._volume, self._rng.permutation(self._starts), data_every=1)
        run(self._volume.flush())
        settle([self._path / "mirror.img", *(self._path / "forward").glob("*.dat")])
        gc.collect()
        before = self._volume.statistics.saved_sectors
        taken, seq = timed(lambda: run(sync(self._volume)))
        assert seq == self._volume.journal.head
        assert self._volume.statistics.saved_sectors - before == len(self._starts) * BLOCK // SECTOR
        forget(self._volume)
        return taken

    def close(self) -> None:
        close(self._volume)


class Bare:
    """Three files, and what a sync does to its own."""

    def __init__(self, path: Path, starts: Ints) -> None:
        """Make files of the same sizes, with data where a sync's have it."""
        path.mkdir()
        self._files = [path / name for name in ("mirror", "forward", "backward")]
        order = np.argsort(starts)
        self._moves = list(zip((starts[order] * SECTOR).tolist(), (order * BLOCK).tolist(), strict=True))
        content = np.random.default_rng(8).bytes(BLOCK)
        with self._open() as (mirror, forward, _):
            os.ftruncate(mirror, size_for(len(starts)) * SECTOR)
            for offset, place in self._moves:
                os.pwrite(mirror, content, offset)
                os.pwrite(forward, content, place)

    @contextlib.contextmanager
    def _open(self) -> Iterator[list[int]]:
        files = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for path in self._files]
        try:
            yield files
        finally:
            for file in files:
                os.close(file)

    def round_s(self) -> float:
        """Time the loop; the backward file is a new one each time."""
        self._files[2].unlink(missing_ok=True)
        settle(self._files[:2])
        gc.collect()
        with self._open() as (mirror, forward, backward):
            return timed(lambda: self._loop(mirror, forward, backward))[0]

    def _loop(self, mirror: int, forward: int, backward: int) -> None:
        at = 0
        for offset, _ in self._moves:
            os.pwrite(backward, os.pread(mirror, BLOCK, offset), at)
            at += BLOCK
            if at % BATCH_BYTES == 0:
                os.fdatasync(backward)
        os.fdatasync(backward)
        for offset, place in self._moves:
            os.pwrite(mirror, os.pread(forward, BLOCK, place), offset)
        os.fdatasync(mirror)


def syncs(scratch: Path, events: int, snapshots: tuple[int, ...], rounds: int) -> Iterator[Result]:
    """Take turns: the bare loop, then the same sync in a store with each number of snapshots."""
    starts = addresses(events, seed=9)
    progress("making files for the bare loop")
    bare = Bare(scratch / "bare", starts)
    stores = {}
    for number in snapshots:
        progress(f"making a store with {number} snapshots")
        stores[number] = Syncing(scratch / f"sync.{number}", starts, number)
    contenders: list[Bare | Syncing] = [bare, *stores.values()]
    taken_s: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds):
        progress(f"syncing {events} events, round {turn + 1} of {rounds}")
        for number in range(len(contenders)):  # each comes first, second ... in turn
            place = (number + turn) % len(contenders)
            taken_s[place].append(contenders[place].round_s())
    for store in stores.values():
        store.close()
    yield from _judged(events, snapshots, taken_s[0], taken_s[1:])


def _judged(events: int, snapshots: tuple[int, ...], bare: list[float], syncs: list[list[float]]) -> Iterator[Result]:
    """Compare medians; the fastest rounds, which have the least of what else the disk had to do, are told too."""
    name = f"sync of {events} events: speed, to the bare loop's"
    details = {"sync_s": spread(syncs[0]), "bare_s": spread(bare)}
    yield at_least(name, median(bare) / median(syncs[0]), "ratio", SPEED_GOAL, **details)
    yield told(f"{name}, fastest rounds", min(bare) / min(syncs[0]), "ratio")
    name = "sync with " + ", ".join(map(str, snapshots)) + " snapshots: slowest to fastest"
    by_snapshots = {str(number): spread(times) for number, times in zip(snapshots, syncs, strict=True)}
    medians, least = [median(times) for times in syncs], [min(times) for times in syncs]
    yield at_most(name, max(medians) / min(medians), "ratio", SPREAD_GOAL, by_snapshots_s=by_snapshots)
    yield told(f"{name}, fastest rounds", max(least) / min(least), "ratio")
