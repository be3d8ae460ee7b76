"""Diffs of a volume under random histories, measured against an oracle that keeps every moment's full image.

Claims, for many pairs of recoverable moments after every step of a history of writes, discards, syncs, snapshots,
drops, holds and restarts:

1. Every sector whose bytes differ is listed.
2. Every sector that is listed was written between the two.
3. The list is disjoint, joined and ascending, the same in both directions, and empty from a moment to itself.

``DMAFS_TEST_SEED`` chooses the histories. How a sync that is given up weakens claim 2 is in tests/unit/test_diff.py;
claim 1 while syncs and drops are under way is in test_volume_machine.py.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmafs.core.diff import diff
from dmafs.core.image import Image
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from tests.model.counting import SEED, report
from tests.model.oracle import SECTOR, Oracle
from tests.unit.tools import TINY, Ticking, copied_volume

HISTORIES = 20
STEPS = 40
PAIRS = 40
SIZE = 40
SHM = Path("/dev/shm")  # noqa: S108 - a private directory is made in it


class History:
    """A volume, its oracle, and who holds what."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        content = rng.randbytes(SIZE * SECTOR)
        self.path = path
        self.rng = rng
        self.volume: Volume = copied_volume(path, content)
        self.oracle = Oracle(content)
        self.held: list[Image] = []
        self.over_snapshots = 0

    def step(self) -> None:
        """Do one of several things, writes most often."""
        steps = [self.write] * 5 + [
            self.discard,
            self.sync,
            self.sync,
            self.snapshot,
            self.drop,
            self.hold,
            self.let_go,
        ]
        self.rng.choice([*steps, self.reopen])()
        self.volume.check()

    def write(self) -> None:
        start = self.rng.randrange(SIZE)
        length = self.rng.randint(1, min(8, SIZE - start))
        now = self.oracle.image_at(self.oracle.head)[start * SECTOR : (start + length) * SECTOR]
        data = now if self.rng.random() < 0.2 else self.rng.randbytes(length * SECTOR)
        self.volume.write(start, data)
        self.oracle.write(start, data, 0)

    def discard(self) -> None:
        start = self.rng.randrange(SIZE)
        length = self.rng.randint(1, SIZE - start)
        self.volume.discard(start, length)
        self.oracle.write(start, bytes(length * SECTOR), 0)

    def sync(self) -> None:
        run(self.volume.flush())
        run(sync(self.volume, open_snapshot=self.rng.random() < 0.7))
        self._sweep()

    def snapshot(self) -> None:
        run(self.volume.take_snapshot())

    def drop(self) -> None:
        shown = list(self.volume.snapshots)
        if shown:
            run(self.volume.drop_snapshot(self.rng.choice(shown)))
            self._sweep()

    def hold(self) -> None:
        self.held.append(self.volume.image(self.rng.choice(self.points())))
        self.held[-1].pins += 1

    def let_go(self) -> None:
        if self.held:
            self.held.pop(self.rng.randrange(len(self.held))).pins -= 1
            run(self.volume.drop_unheld())
            self._sweep()

    def reopen(self) -> None:
        run(self.volume.flush())
        self.volume.mark_clean()
        self.volume.close()
        self.held = []
        clock = Ticking(self.volume.journal.head_time_ns)
        self.volume = open_volume(self.path, limits=TINY, clock=clock)

    def _sweep(self) -> None:
        for segment in self.volume.take_garbage():
            segment.close()

    def points(self) -> list[int]:
        return [seq for seq in range(self.oracle.head + 1) if self.volume.recoverable(seq)]

    def check(self) -> None:
        """Assert the claims for some pairs of moments."""
        points = self.points()
        pairs = list(itertools.combinations_with_replacement(points, 2))
        for a, b in self.rng.sample(pairs, min(len(pairs), PAIRS)):
            starts, stops = run(diff(self.volume, a, b))
            assert all(
                column.tolist() == other.tolist()
                for column, other in zip((starts, stops), run(diff(self.volume, b, a)), strict=True)
            )
            listed = assert_disjoint_joined(starts.tolist(), stops.tolist())
            assert self.oracle.differing(a, b) <= listed <= self.oracle.written(a, b), f"diff from {a} to {b}"
            self.over_snapshots += b < self.volume.floor


def assert_disjoint_joined(starts: list[int], stops: list[int]) -> set[int]:
    """Return all sectors of a list of extents."""
    bounds = [bound for extent in zip(starts, stops, strict=True) for bound in extent]
    assert bounds == sorted(set(bounds)), "disjoint, joined, not empty, ascending"
    return {sector for start, stop in zip(starts, stops, strict=True) for sector in range(start, stop)}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory, where there is such a thing."""
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as name:
        yield Path(name)


def test_a_diff_is_what_was_written_between(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claims 1 to 3 hold in every step of all histories; enough pairs lie before the mirror."""
    over_snapshots = 0
    with capsys.disabled():
        print(f"\nDMAFS_TEST_SEED={SEED}")
    for number in range(HISTORIES):
        history = History(scratch / str(number), random.Random(f"{SEED} {number}"))
        try:
            for _ in range(STEPS):
                history.step()
                history.check()
        finally:
            history.volume.close()
        over_snapshots += history.over_snapshots
    with capsys.disabled():
        report("DiffHistories", HISTORIES * STEPS, {"over snapshots": over_snapshots})
    assert over_snapshots > HISTORIES * STEPS
