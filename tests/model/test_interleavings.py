"""Pieces of work on one volume in any interleaving: each yields, and anything else comes before it goes on.

Claims:

1. What a read resolves is, when it is read at once, what the oracle says: of the live image as it is then, of a held
   one for ever, through syncs, drops, snapshots, sweeps and calls that fail for lack of space.
2. All work ends, and what it leaves passes every check.

``DMAFS_TEST_SEED`` chooses the histories. As in the daemon, syncs and drops exclude each other, flushes too;
a drop may begin at any time.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmafs.core import layers
from dmafs.core.diff import diff
from dmafs.core.image import Image, Piece
from dmafs.core.limits import IndexLimits, SegmentLimits, VolumeLimits
from dmafs.core.sync import sync
from dmafs.core.work import Work, run
from dmafs.errors import CorruptionError, NoSuchPointError, NoSuchSnapshotError, StoreFullError
from dmafs.units import SECTOR
from tests.unit.tools import copied_volume, fill

SEED = int(os.environ.get("DMAFS_TEST_SEED", "1"))
SECTORS = 48
STEPS = 600
TAKES_SPACE = {"write", "move", "_overwrite", "rename"}
"""Calls that may fail, of a save, a merge, an overwriting and a drop."""
GIVEN_UP = (StoreFullError, NoSuchPointError, NoSuchSnapshotError)


class Job:
    """A piece of work under way: its next call, or what that returned."""

    def __init__(self, room: str, work: Work[Any], done: Callable[[Any], None] = lambda _: None) -> None:
        self.room = room  # work of one room excludes each other
        self.work, self.done = work, done
        self.call: Callable[[], Any] | None = None
        self.answer: tuple[Any, Exception | None] | None = None


def _answer(call: Callable[[], Any], *, fails: bool) -> tuple[Any, Exception | None]:
    """Make a call as every driver of work does: what it raises is the work's to handle, what it needs may be gone."""
    try:
        if fails:
            raise OSError(errno.ENOSPC, "no space")
        return call(), None
    except (CorruptionError, OSError) as error:
        return None, error


class History:
    """A volume, all its moments with a byte for each sector, and the work under way."""

    def __init__(self, path: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        segments = SegmentLimits(data_sectors=8, records=self.rng.choice([3, 6, 20]))
        index = IndexLimits(bytes=self.rng.choice([0, 500, 1 << 20]), journals=self.rng.choice([1, 3, 100]), indexed=1)
        limits = VolumeLimits(segments=segments, index=index, reserve_bytes=0, images=self.rng.choice([1, 8]))
        self.volume = copied_volume(path / "disk", fill(0, SECTORS), limits=limits)
        self.moments = {self.volume.journal.head: bytes(SECTORS)}
        self.held: list[Image] = []
        self.jobs: list[Job] = []
        self.failing = self.rng.choice([0, 0.05, 0.2])

    # -- what there is to do --------------------------------------------------------------------------------------

    def write(self) -> None:
        start, value = self.rng.randrange(SECTORS), self.rng.choice([0, self.rng.randrange(1, 256)])
        length = min(self.rng.randint(1, 6), SECTORS - start)
        before = self.moments[self.volume.journal.head]
        seq = self.volume.write(start, fill(value, length)) if value else self.volume.discard(start, length)
        self.moments[seq] = before[:start] + bytes([value]) * length + before[start + length :]

    def read(self) -> None:
        image = self.rng.choice([self.volume.live, *self.held])
        start = self.rng.randrange(SECTORS)
        length = self.rng.randint(1, SECTORS - start)
        image.pins += 1

        def done(pieces: list[Piece]) -> None:
            found = bytes(image.read_pieces(pieces, start * SECTOR, length * SECTOR)[::SECTOR])
            assert found == self.moments[image.seq][start : start + length], f"image at {image.seq}"
            image.pins -= 1

        self.jobs.append(Job("", image.locate(start * SECTOR, length * SECTOR), done))

    def compare(self) -> None:
        a, b = sorted(self.rng.choices([seq for seq in self.moments if self.volume.recoverable(seq)], k=2))

        def done(found: Any) -> None:
            extents = zip(*(part.tolist() for part in found), strict=True)
            listed = {at for start, stop in extents for at in range(start, stop)}
            assert listed >= {at for at in range(SECTORS) if self.moments[a][at] != self.moments[b][at]}

        self.jobs.append(Job("", diff(self.volume, a, b), done))

    def hold(self) -> None:
        self.held.append(self.volume.image(self.rng.choice([s for s in self.moments if self.volume.recoverable(s)])))
        self.held[-1].pins += 1

    def let_go(self) -> None:
        if self.held:
            self.held.pop(self.rng.randrange(len(self.held))).pins -= 1

    def begin(self, room: str, make: Callable[[], Work[Any]]) -> None:
        if not any(job.room == room for job in self.jobs):
            self.jobs.append(Job(room, make()))

    def snapshot(self) -> Work[None]:
        seq = self.volume.indicate().seq
        with self.volume.reserved(seq):
            yield from self.volume.flush()
            yield from self.volume.snapshot_at(seq, "")

    def drop(self) -> None:
        if snapshots := list(self.volume.snapshots):
            victim = self.rng.choice(snapshots)
            self.begin("maintenance", lambda: self.volume.drop_snapshot(victim))

    def hide(self) -> None:
        """Begin a drop while anything else goes on, as the daemon does during a sync."""
        if snapshots := [found for found in self.volume.snapshots if not found.busy]:
            self.jobs.append(Job("", self.volume.hide_snapshot(self.rng.choice(snapshots))))

    def sweep(self) -> None:
        if not any(job.room for job in self.jobs):
            for segment in self.volume.take_garbage():
                segment.close()

    def choose(self) -> None:
        volume, opens = self.volume, self.rng.random() < 0.7
        maintenance: list[Callable[[], Work[Any]]] = [lambda: sync(volume, open_snapshot=opens)] * 2 + [
            volume.drop_unheld
        ]
        acts: list[Callable[[], None]] = [self.write] * 8 + [self.read] * 6 + [self.hold, self.let_go, self.sweep] * 2
        acts += [lambda: self.begin("maintenance", self.rng.choice(maintenance))] * 3
        acts += [self.drop, self.hide, self.hide, self.compare]
        flushes: list[Callable[[], Work[Any]]] = [volume.flush, self.snapshot]
        acts += [lambda: self.begin("flush", self.rng.choice(flushes))] * 4
        acts += [lambda: self.jobs.append(Job("", self.rng.choice([volume.live, *self.held]).measure()))]
        acts += [lambda: self.jobs.append(Job("", volume.warm()))]
        self.rng.choice(acts)()

    # -- how it goes on -------------------------------------------------------------------------------------------

    def go_on(self, job: Job) -> None:
        """Have a call made, or the work take what it returned."""
        if (call := job.call) is not None:
            name = getattr(getattr(call, "func", call), "__name__", "")
            fails = job.room == "maintenance" and name in TAKES_SPACE and self.rng.random() < self.failing
            job.call, job.answer = None, _answer(call, fails=fails)
            return
        answer, error = job.answer or (None, None)
        try:
            job.call = job.work.throw(error) if error else job.work.send(answer)
        except StopIteration as stop:
            self.jobs.remove(job)
            job.done(stop.value)
        except GIVEN_UP:
            self.jobs.remove(job)

    def live(self) -> None:
        for _ in range(STEPS):
            if self.jobs and self.rng.random() < 0.6:
                self.go_on(self.rng.choice(self.jobs))
            elif len(self.jobs) < 8:
                self.choose()

    def end(self) -> None:
        """Finish everything, and compare everything."""
        for _ in range(20_000):
            if self.jobs:
                self.go_on(self.rng.choice(self.jobs))
        assert not self.jobs, "all work ends"
        for image in [*self.held, self.volume.live]:
            assert bytes(image.read(0, image.size)[::SECTOR]) == self.moments[image.seq]
        run(self.volume.drop_unheld())
        self.volume.check()


@pytest.mark.parametrize("number", range(40))
def test_any_interleaving_shows_history_as_it_was(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims 1 and 2."""
    monkeypatch.setattr(layers, "FAN_OUT", 2)
    monkeypatch.setattr(layers, "STACK_MAX", 1 + number % 3)
    monkeypatch.setattr(layers, "GROWN_ENTRIES", 2)
    print(f"\nDMAFS_TEST_SEED={SEED}")
    history = History(tmp_path, SEED * 1000 + number)
    history.live()
    history.end()
    history.volume.close()
