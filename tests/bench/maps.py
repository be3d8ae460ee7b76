"""Benchmarks of the maps: net change, opening a past image, finding an extent, and the memory of a map."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Final, TypeVar

import numpy as np

from dmafs.core.extent import Ints, net_change
from dmafs.core.vbm import MIRROR
from dmafs.core.volume import Volume
from dmafs.units import SECTOR
from tests.bench.report import Result, at_most, progress, spread, timed, told
from tests.bench.stores import (
    BLOCK,
    BLOCK_SECTORS,
    DATA_EVERY,
    close,
    forget,
    reopened,
)

Value = TypeVar("Value")

NET_CHANGE_GOAL: Final = 3.0
NET_CHANGE_BYTES_GOAL: Final = 150.0
OPEN_GOAL_MS: Final = 150.0
RESOLVE_GOAL_US: Final = 20.0
EXTENT_BYTES_GOAL: Final = 64.0

NET_CHANGE_SECTORS: Final = (16 << 30) // SECTOR
EVENT_BLOCKS: Final = 32
AGES: Final = 10


# -- net change ---------------------------------------------------------------------------------------------------


def _events(count: int, *, skewed: bool) -> tuple[Ints, Ints]:
    """Return events of 1 to 32 blocks of 4 KiB; with *skewed* most of them are where the addresses are low."""
    rng = np.random.default_rng(3)
    blocks = rng.integers(1, EVENT_BLOCKS + 1, count)
    places = NET_CHANGE_SECTORS // BLOCK_SECTORS - EVENT_BLOCKS
    where = rng.random(count) ** 8 if skewed else rng.random(count)
    starts = (where * places).astype(np.int64) * BLOCK_SECTORS
    return starts, starts + blocks * BLOCK_SECTORS


def net_changes(count: int, rounds: int) -> Iterator[Result]:
    """Compare with a stable sort of a random key for each touched block, in turns; then the peak of memory."""
    for name, skewed in (("uniform", False), ("skewed", True)):
        progress(f"net change of {count} events, {name}")
        starts, stops = _events(count, skewed=skewed)
        touched = int((stops - starts).sum()) // BLOCK_SECTORS
        keys = np.random.default_rng(4).integers(-(2**62), 2**62, touched)
        ours, theirs = [], []
        for _ in range(rounds):
            theirs.append(timed(partial(np.argsort, keys, kind="stable"))[0])
            ours.append(timed(partial(net_change, starts, stops))[0])
        del keys
        yield at_most(
            f"net change, {name}: time, to argsort of the touched blocks",
            median(ours) / median(theirs),
            "ratio",
            NET_CHANGE_GOAL,
            net_change_s=spread(ours),
            argsort_s=spread(theirs),
            touched_blocks=touched,
        )
        peak, change = _peak(partial(net_change, starts, stops))
        yield at_most(
            f"net change, {name}: peak memory past the input",
            peak / count,
            "B/event",
            NET_CHANGE_BYTES_GOAL,
            moves=len(change.starts),
        )


def _peak(call: Callable[[], Value]) -> tuple[int, Value]:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = call()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


# -- opening images -------------------------------------------------------------------------------------------------


class Opened:
    """Opens past images of a store, each with a read of 4 KiB that has data; takes times in milliseconds."""

    def __init__(self, path: Path, starts: Ints) -> None:
        """Open the store; *starts* are the addresses of its events, in order."""
        self._starts = starts
        startup_s, self.volume = timed(lambda: reopened(path))
        self.startup_ms = startup_s * 1000
        self._rng = np.random.default_rng(5)

    def open_ms(self, seq: int, events: range) -> float:
        """Time the first read of the image at *seq*, at the address of one of the events with these numbers."""
        forget(self.volume)
        number = int(self._rng.integers(-(-events.start // DATA_EVERY), -(-events.stop // DATA_EVERY))) * DATA_EVERY
        offset = int(self._starts[number]) * SECTOR
        taken, data = timed(lambda: self.volume.image(seq).read(offset, BLOCK))
        assert any(data), "a block with data"
        return taken * 1000

    def ages(self, kind: str, places: list[tuple[int, range]], rounds: int) -> Iterator[Result]:
        """Measure all *places*, given for each round and from the oldest on, round by round in random order."""
        taken: list[list[float]] = [[] for _ in range(AGES)]
        for turn in range(rounds):
            for age in self._rng.permutation(AGES).tolist():
                taken[age].append(self.open_ms(*places[turn * AGES + age]))
        medians = [median(times) for times in taken]
        yield at_most(
            f"open an image, {kind}: slowest of {AGES} ages",
            max(medians),
            "ms",
            OPEN_GOAL_MS,
            by_age_oldest_first_ms=medians,
            rounds=rounds,
        )
        yield told(f"open an image, {kind}: slowest age to the median one", max(medians) / median(medians), "ratio")


def openings_in_journal(path: Path, starts: Ints, rounds: int) -> Iterator[Result]:
    """Open images between the mirror and the present."""
    kind = f"{len(starts)} events in the journal"
    progress(f"opening images, {kind}")
    opened = Opened(path, starts)
    head = opened.volume.journal.head
    first_ms = opened.open_ms(head, range(head))
    # Each moment is opened once: nothing in memory can be of that image.
    seqs = [head * (age + 1) // AGES - 1 - turn for turn in range(rounds) for age in range(AGES)]
    yield from opened.ages(kind, [(seq, range(seq)) for seq in seqs], rounds)
    yield told(f"open an image, {kind}: the first after start-up", first_ms, "ms", age="newest")
    yield told(f"start-up, {kind}", opened.startup_ms, "ms")
    opened.volume.close()


def openings_of_snapshots(path: Path, starts: Ints, rounds: int) -> Iterator[Result]:
    """Open images before the mirror."""
    opened = Opened(path, starts)
    seqs = [snapshot.seq for snapshot in opened.volume.snapshots]
    kind = f"{len(seqs)} snapshots"
    progress(f"opening images, {kind}")
    each = len(starts) // len(seqs)
    first_ms = opened.open_ms(seqs[0], range(len(starts)))
    numbers = [len(seqs) * age // AGES + turn + 1 for turn in range(rounds) for age in range(AGES)]
    places = [(seqs[number], range(number * each, len(starts))) for number in numbers]
    yield from opened.ages(kind, places, rounds)
    yield told(f"open an image, {kind}: the first after start-up", first_ms, "ms", age="oldest")
    yield told(f"start-up, {kind}", opened.startup_ms, "ms")
    yield from _memory(opened.volume, seqs[0], "of snapshots")
    opened.volume.close()


# -- using one ------------------------------------------------------------------------------------------------------


def lookups(path: Path, count: int) -> Iterator[Result]:
    """Find random blocks of 4 KiB in a map: a first pass right after opening, and a second one over the same blocks."""
    volume = reopened(path)
    image = volume.image(volume.journal.head)
    image.pins += 1  # open, as the tree has it
    blocks = np.random.default_rng(6).integers(0, image.size // BLOCK, count) * BLOCK
    extents = f"an image of {volume.journal.head} extents"
    progress(f"resolving {count} blocks in {extents}")
    for turn in ("cold", "warm"):
        taken = []
        for offset in blocks.tolist():
            begun = perf_counter_ns()
            image.resolve(offset, BLOCK)
            taken.append(perf_counter_ns() - begun)
        name = f"resolve 4 KiB in {extents}, {turn}"
        yield at_most(f"{name}: median", median(taken) / 1000, "us", RESOLVE_GOAL_US, lookups=count)
        yield told(f"{name}: p99", float(np.percentile(taken, 99)) / 1000, "us")
    image.pins -= 1
    del image
    yield from _memory(volume, volume.journal.head, "of the journal")
    close(volume)


def _memory(volume: Volume, seq: int, kind: str) -> Iterator[Result]:
    """Measure the map that finding all extents of an image leaves in memory; the journals loaded for it are told."""
    progress(f"memory of an open image {kind}")
    volume.image(seq).vrmo.reset()  # it may have been opened before
    forget(volume)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        image = volume.image(seq)
        image.pins += 1
        extents = 0
        for offset in range(0, image.size, 1 << 20):
            length = min(1 << 20, image.size - offset)
            extents += sum(piece.entry != MIRROR for piece in image.resolve(offset, length))
        gc.collect()
        loaded = tracemalloc.get_traced_memory()[0] - before
        for segment in volume.snapshots.unload(keep=None, everything=True):
            segment.close()
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] - before
        image.pins -= 1
    finally:
        tracemalloc.stop()
    yield at_most(f"memory of an open image {kind}", kept / extents, "B/extent", EXTENT_BYTES_GOAL, extents=extents)
    yield told(f"memory of an open image {kind}, with the journals loaded for it", loaded / extents, "B/extent")
