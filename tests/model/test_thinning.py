"""Thinning of a real volume against an oracle: what is left is history, what is dropped frees space, whatever is cut.

Claims:

1. After a thinning the snapshots are exactly those that the plan keeps, and every image is bit for bit what it was.
2. Each entry of a run of dropped snapshots is copied at most once, and nothing that isn't needed stays.
3. Cut at any file operation of a pin, an unpin or a thinning, the store opens with the snapshot pinned or not, dropped
   or not, nothing else changed, and no file left over.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from dmafs.core.limits import SegmentLimits, VolumeLimits
from dmafs.core.moments import pin_group, snapshot_groups, unpin_group
from dmafs.core.retention import KeepRules
from dmafs.core.segment import Segment
from dmafs.core.snapshot import Snapshot
from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import PinnedError
from dmafs.service.configuration import Configuration
from dmafs.service.local import LocalSession
from dmafs.units import SECTOR
from tests.model.cuts import Disk
from tests.model.oracle import Oracle
from tests.unit.tools import copy_all

LIMITS = VolumeLimits(segments=SegmentLimits(data_sectors=64, records=32), reserve_bytes=0)
SECTORS = 64
HOUR_NS = 3600 * 10**9
BEGIN_NS = 1_700_000_000_000_000_000 // HOUR_NS * HOUR_NS
NONE = KeepRules(within_s=0, hourly=0, daily=0, weekly=0, monthly=0, yearly=0, minimum=0)


class History:
    """A volume with a snapshot an hour, each synced, and its oracle."""

    def __init__(self, path: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.path = path / "disk"
        self.path.mkdir(parents=True)
        self.now = BEGIN_NS
        content = self.rng.randbytes(SECTORS * SECTOR)
        self.oracle = Oracle(content)
        source = path / "primary"
        source.write_bytes(content)
        Volume.create(
            RealStorage(self.path), name="disk", size_sectors=SECTORS, source=source, tap="fuse", created_ns=BEGIN_NS
        )
        self.volume = self.open()
        copy_all(self.volume, source)
        self.primary: RealFile = open_source(source, writable=True)
        self.pinned: set[int] = set()

    def open(self) -> Volume:
        self.volume = open_volume(self.path, limits=LIMITS, clock=lambda: self.now)
        return self.volume

    def close(self) -> None:
        self.volume.close()
        self.primary.close()

    def write(self, start: int, length: int) -> None:
        data = self.rng.randbytes(length * SECTOR) if self.rng.random() < 0.8 else bytes(length * SECTOR)
        self.volume.write(start, data)
        self.oracle.write(start, data, self.volume.live.time_ns)
        self.primary.write([data], start * SECTOR)

    def grow(self, snapshots: int, *, name: Callable[[int], str] = lambda _: "") -> None:
        """Go on: write, take a snapshot, sync, an hour each."""
        for number in range(snapshots):
            for _ in range(self.rng.randrange(1, 6)):
                start = self.rng.randrange(SECTORS)
                self.write(start, self.rng.randrange(1, min(20, SECTORS - start) + 1))
            run(self.volume.take_snapshot(self.primary, name(number)))
            self.now += HOUR_NS
            run(sync(self.volume, open_snapshot=self.rng.random() < 0.5))
            self.sweep()

    def sweep(self) -> None:
        for segment in self.volume.take_garbage():
            segment.close()

    def session(self, rules: KeepRules) -> LocalSession:
        return LocalSession({"disk": self.volume}, rules, path=Path(), configuration=Configuration())

    def shown(self) -> list[Snapshot]:
        return list(self.volume.snapshots)

    def at(self, seq: int) -> Snapshot:
        found = self.volume.snapshots.visible_at(seq)
        assert found is not None
        return found

    def allocated(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in (self.path / "backward").iterdir())

    def held(self) -> int:
        return sum(map(self.volume.snapshots.held_bytes, self.shown()))

    def check(self) -> None:
        """Assert that everything there is, is history, and that no file is unreferenced."""
        self.volume.check()
        for seq in [*(one.seq for one in self.shown()), self.volume.pointers.now.mirror_seq, self.oracle.head]:
            image = self.volume.image(seq)
            assert image.read(0, image.size) == self.oracle.image_at(seq), f"the image at {seq} isn't history's"
        expected = {f"{one.stem}{suffix}" for one in self.volume.snapshots.all() for suffix in (".ext", ".dat")}
        expected |= {one.pin for one in self.shown() if one.pinned}
        there = {f"backward/{path.name}" for path in (self.path / "backward").iterdir()}
        assert there - {f"{one.stem}.idx" for one in self.volume.snapshots.all()} == expected
        assert not [one for one in self.volume.snapshots.all() if one.hidden]


@pytest.fixture
def histories(tmp_path: Path) -> Iterator[Callable[[int], History]]:
    """Make histories by their seeds."""
    made: list[History] = []

    def make(seed: int) -> History:
        made.append(History(tmp_path / f"{len(made)}", seed))
        return made[-1]

    yield make
    for history in made:
        with contextlib.suppress(OSError):
            history.close()


@pytest.mark.parametrize("seed", range(25))
def test_what_thinning_leaves_is_history(histories: Callable[[int], History], seed: int) -> None:
    """Claim 1 for random histories, rules and pins; a dry run says the same before, and changes nothing."""
    history = histories(seed)
    rng = history.rng
    history.grow(rng.randrange(4, 14), name=lambda number: f"n{number}" if rng.random() < 0.2 else "")
    for one in rng.sample(history.shown(), 2):
        run(history.volume.pin(one))
    quota = rng.choice([0, 0, history.held() // 2])
    rules = KeepRules(0, rng.randrange(6), rng.randrange(2), 0, 0, 0, rng.randrange(3), rng.random() < 0.8, quota)
    session = history.session(rules)
    before = {one.seq: (one.name, one.pinned) for one in history.shown()}
    files = sorted(path.name for path in (history.path / "backward").iterdir())
    plan = session.thin(dry_run=True)
    assert sorted(path.name for path in (history.path / "backward").iterdir()) == files
    allocated, held = history.allocated(), history.held()
    done = session.thin(dry_run=False)
    assert [one["id"] for one in done["snapshots"]] == [one["id"] for one in plan["snapshots"]]
    if not quota:
        fates = [[(one["id"], one["kept"], one["reasons"]) for one in report["snapshots"]] for report in (plan, done)]
        assert fates[0] == fates[1]
    kept = [one["id"] for one in done["snapshots"] if one["kept"]]
    assert kept == list(snapshot_groups({"disk": history.volume}))
    assert {one.seq: (one.name, one.pinned) for one in history.shown()}.items() <= before.items()
    assert [seq for seq, (_, pinned) in before.items() if pinned and not history.volume.snapshots.visible_at(seq)] == []
    assert history.held() <= held
    if not done["snapshots"][0]["kept"]:  # with none older all that it held is free
        assert history.held() <= held - done["snapshots"][0]["held_bytes"]
        assert history.allocated() < allocated
    history.check()
    assert session.thin(dry_run=False)["snapshots"] == [
        {**one, "held_bytes": now["held_bytes"], "reasons": now["reasons"]}
        for one, now in zip(
            [one for one in done["snapshots"] if one["kept"]], session.thin(dry_run=True)["snapshots"], strict=True
        )
    ]
    history.volume.close()
    history.open()
    history.check()


def copied_sectors(action: Callable[[], object]) -> int:
    """Return how many sectors of snapshots' data an action writes."""
    total = 0
    write_batch = Segment.write_batch

    def counting(segment: Segment, extents: list[tuple[int, int, bytes | None]], time_ns: int) -> object:
        nonlocal total
        total += sum(length for _, length, data in extents if data is not None)
        return write_batch(segment, extents, time_ns)

    with mock.patch.object(Segment, "write_batch", counting):
        action()
    return total


def test_each_entry_of_a_run_is_copied_once(histories: Callable[[int], History]) -> None:
    """Claim 2: a run of eight is merged oldest first. One by one, youngest first, the same costs several times that."""
    costs = {}
    for order in ("thinned", "youngest first"):
        history = histories(1)
        run(history.volume.take_snapshot(history.primary, "first"))
        for number in range(9):  # disjoint places, so that nothing is held twice
            history.now += HOUR_NS
            history.write(4 + 6 * number, 6)
            run(history.volume.take_snapshot(history.primary, "last" if number == 8 else ""))
            run(sync(history.volume, open_snapshot=True))
            history.sweep()
        assert history.volume.snapshots.held_bytes(history.shown()[0]) > 0
        data = sum(history.volume.snapshots.segment(one).data_sectors for one in history.shown()[1:-1])
        if order == "thinned":
            costs[order] = copied_sectors(lambda: history.session(NONE).thin(dry_run=False))  # noqa: B023 - called now
        else:
            costs[order] = copied_sectors(
                lambda: [run(history.volume.drop_snapshot(one)) for one in history.shown()[-2:0:-1]]  # noqa: B023
            )
        history.sweep()
        assert [one.name for one in history.shown()] == ["first", "last"]
        assert data == 48
        history.check()
    assert costs == {"thinned": 48, "youngest first": 6 * sum(range(1, 9))}


def test_a_run_without_an_older_snapshot_is_freed_without_a_copy(histories: Callable[[int], History]) -> None:
    """What nobody needs isn't copied at all."""
    history = histories(2)
    history.grow(8)
    rules = KeepRules(0, 1, 0, 0, 0, 0, 0)
    allocated, last = history.allocated(), history.shown()[-1]
    assert copied_sectors(lambda: history.session(rules).thin(dry_run=False)) == 0
    assert history.shown() == [last]
    assert history.held() == history.volume.snapshots.held_bytes(last)
    assert history.allocated() <= allocated // 4
    history.check()


def test_a_held_image_keeps_its_bytes_until_it_is_let_go(histories: Callable[[int], History]) -> None:
    """Thinning hides a snapshot whose image is open; its files go when it is closed."""
    history = histories(3)
    history.grow(6)
    held = history.volume.image(history.shown()[1].seq)
    held.pins += 1
    history.session(NONE).thin(dry_run=False)
    assert history.shown() == []
    assert [one.seq for one in history.volume.snapshots.all()] == [held.seq]
    assert held.read(0, held.size) == history.oracle.image_at(held.seq)
    held.pins -= 1
    run(history.volume.drop_unheld())
    assert history.volume.snapshots.all() == []


def actions(history: History) -> dict[str, Callable[[], object]]:
    """Return what is cut; the oldest snapshot is pinned."""
    volumes = {"disk": history.volume}
    names = list(snapshot_groups(volumes))
    return {
        "pin": lambda: run(pin_group(volumes, names[2])),
        "unpin": lambda: run(unpin_group(volumes, names[0])),
        "thin": lambda: history.session(KeepRules(0, 2, 0, 0, 0, 0, 0)).thin(dry_run=False),
    }


@pytest.mark.parametrize("name", ["pin", "unpin", "thin"])
def test_cut_at_any_operation(histories: Callable[[int], History], name: str) -> None:
    """Claim 3, for a cut before each change of a file, and for none."""
    disk = Disk()
    changes, finished, seen = 0, False, set()
    while not finished:
        history = histories(4)
        history.grow(6)
        run(history.volume.pin(history.shown()[0]))
        seqs = [one.seq for one in history.shown()]
        action = actions(history)[name]
        done: list[object] = []
        disk.enter()
        try:
            with disk.fused(changes):
                done.append(action())
        finally:
            disk.leave()
        finished = bool(done)
        history.volume.close()
        for _ in range(2):  # recovering twice changes nothing
            history.open()
            history.check()
            left = [one.seq for one in history.shown()]
            pinned = [one.seq for one in history.shown() if one.pinned]
            seen.add((tuple(left), tuple(pinned)))
            if name == "thin":
                assert set(left) >= {seqs[0], *seqs[-2:]}
                assert pinned == [seqs[0]]
                assert not finished or left == [seqs[0], *seqs[-2:]]
            else:
                before, after = ([seqs[0]], [seqs[0], seqs[2]]) if name == "pin" else ([seqs[0]], [])
                assert left == seqs
                assert pinned in (before, after)
                assert not finished or pinned == after
            history.volume.close()
        history.open()
        changes += 1
    assert len(seen) > 1, "some cuts come before the change, some after"
    assert changes > (10 if name == "thin" else 1)


def test_a_pinned_snapshot_is_not_dropped(histories: Callable[[int], History]) -> None:
    """Dropping it is refused, and nothing is changed."""
    history = histories(5)
    history.grow(4)
    snapshots = history.shown()
    run(history.volume.pin(snapshots[1]))
    with pytest.raises(PinnedError):
        run(history.volume.drop_snapshot(snapshots[1]))
    assert history.shown() == snapshots
    history.check()
