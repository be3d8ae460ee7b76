"""A comparison of primary and newest image says what really differs, while writes go on that the tap sees late."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmafs.core.limits import VolumeLimits
from dmafs.core.ondisk import Flag
from dmafs.core.resync import needs_resync, resync
from dmafs.core.storage import RealFile, open_source
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.throttle import Throttle
from dmafs.core.verify import (
    EXTENTS_MAX,
    GRAIN_SECTORS,
    PART_SECTORS,
    ROUNDS,
    Differences,
    Found,
    Steps,
    at_once,
    compare,
    everything,
    verify,
)
from dmafs.core.work import Work, run
from dmafs.errors import NoSuchPointError, SourceError
from dmafs.units import SECTOR
from tests.unit.tools import copied_volume, fill, flip, new_volume

SEED = int(os.environ.get("DMAFS_TEST_SEED", "1"))
SECTORS = 64


@dataclass
class Write:
    """A write that somebody has begun."""

    start: int
    data: bytes
    complete: bool = False


class LateTap:
    """A primary whose writes are on it at once, complete some time later, and become events when the tap settles."""

    def __init__(self, folder: Path, sectors: int = SECTORS, *, limits: VolumeLimits | None = None) -> None:
        self.volume = copied_volume(folder / "disk", fill(0, sectors), limits=limits or VolumeLimits(reserve_bytes=0))
        self.path = folder / "disk.primary"
        self.primary: RealFile = open_source(self.path, writable=True)
        self.writes: list[Write] = []
        self.settled = 0

    def close(self) -> None:
        self.volume.close()
        self.primary.close()

    def begin(self, start: int, data: bytes) -> Write:
        self.writes.append(write := Write(start, data))
        self.primary.write([data], start * 512)
        return write

    def write(self, start: int, data: bytes) -> None:
        self.begin(start, data).complete = True

    def damage(self, start: int, data: bytes) -> None:
        """Change the primary behind the tap's back."""
        self.primary.write([data], start * 512)

    def see(self, count: int) -> None:
        """Have the first *count* writes that are complete be events."""
        for write in [write for write in self.writes if write.complete][:count]:
            self.volume.write(write.start, write.data)
            self.writes.remove(write)

    def settle(self) -> Work[object]:
        """Have all writes that are complete now be events; those that come meanwhile need not be."""
        complete = sum(write.complete for write in self.writes)
        self.settled += 1
        yield lambda: None
        self.see(complete)
        return None

    def verify(self) -> Work[Differences]:
        return verify(self.volume, self.primary, Steps(self.settle), lambda _done: None)

    def differing(self) -> set[int]:
        """Return the sectors that differ now."""
        mine, theirs = bytes(self.volume.live.read(0, self.volume.live.size)), self.path.read_bytes()
        return {at for at in range(len(mine) // 512) if mine[at * 512 :][:512] != theirs[at * 512 :][:512]}


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[LateTap]:
    tap = LateTap(tmp_path)
    yield tap
    tap.close()


def test_equal_sides_cost_one_look(tap: LateTap) -> None:
    """Where nothing differs the tap isn't asked to settle."""
    found = run(tap.verify())
    assert (found.extents, found.sectors, found.compared_sectors, tap.settled) == ([], 0, SECTORS, 0)


def test_a_write_that_is_not_seen_yet_is_no_difference(tap: LateTap) -> None:
    """What the tap sees when it settles is not different."""
    tap.write(3, fill(1))
    tap.write(3, fill(2, 4))
    assert run(tap.verify()).extents == []
    assert tap.volume.journal.head == 2


def test_what_differs_is_named_in_blocks(tap: LateTap) -> None:
    """Extents of whole 4 KiB, ascending, neighbours joined; the image isn't changed."""
    for at in (0, 17, 30, 39):
        tap.damage(at, fill(7))
    found = run(tap.verify())
    assert found.extents == [(0, 8), (16, 40)]
    assert (found.count, found.sectors, found.busy_sectors) == (2, 32, 0)
    assert tap.volume.journal.head == 0


def test_what_is_damaged_differs(tap: LateTap) -> None:
    """A block that the image can't show is a difference, and its neighbours are none; a resync takes it over."""
    mirror = tap.path.with_name("disk") / "mirror.img"
    flip(mirror, 17 * SECTOR)
    tap.write(30, fill(5))
    tap.see(1)
    flip(tap.path.with_name("disk") / "forward" / f"{1:020d}.dat", 3)
    found = run(tap.verify())
    assert found.extents == [(16, 32)]


def test_a_write_under_way_is_no_difference(tap: LateTap) -> None:
    """A write that was on the primary already and not complete when the tap settled is told from a difference."""
    write = tap.begin(3, fill(1))
    work = tap.verify()
    call = next(work)
    while tap.settled < 1:
        call = work.send(call())
    call = work.send(call())  # the tap has settled and knows nothing of it
    write.complete = True
    assert finish(work, call).extents == []
    assert tap.settled >= 2


def test_another_write_under_way_each_time_is_no_difference(tap: LateTap) -> None:
    """Two rounds that find different bytes on the primary prove nothing."""
    work = tap.verify()
    tap.begin(3, fill(1))
    call = next(work)
    settled = 0
    for value in range(2, ROUNDS + 1):
        while tap.settled == settled:
            call = work.send(call())
        settled = tap.settled
        tap.writes[0].complete = True  # too late for this settling,
        call = work.send(call())
        tap.see(1)  # in time not to be an event behind the next head
        tap.begin(3, fill(value))
    found = finish(work, call)
    assert (found.extents, found.busy_sectors) == ([], 1)


def test_what_is_written_all_the_time_is_busy(tap: LateTap) -> None:
    """After ROUNDS rounds it is given up, and counted; everything else is told."""
    tap.damage(20, fill(9))
    work = tap.verify()
    call = next(work)
    value = 0
    while True:
        value = value % 200 + 1
        tap.write(1, fill(value))
        answer = call()
        try:
            call = work.send(answer)
        except StopIteration as stop:
            found = stop.value
            break
    assert found.extents == [(16, 24)]
    assert found.busy_sectors == 1
    assert tap.settled == ROUNDS


def test_what_differs_beside_what_is_written_all_the_time_is_told(tap: LateTap) -> None:
    """A block of which one sector is written in each round is told for another one; what is sure of it is taken."""
    tap.damage(2, fill(9))
    taken: list[tuple[int, int]] = []
    steps = Steps(tap.settle)
    everywhere = everything(tap.volume)

    def take(part: Found) -> Work[object]:
        return at_once(lambda: taken.extend(part.still(tap.volume)))

    work = compare(tap.volume, tap.primary, everywhere, steps, take=take)
    call = next(work)
    for value in range(1, 1000):
        tap.write(5, fill(value % 200 + 1))
        answer = call()
        try:
            call = work.send(answer)
        except StopIteration as stop:
            found: Differences = stop.value
            break
    assert found.extents == [(0, 8)]
    assert taken == [(0, 5), (6, 8)]


def test_a_write_under_way_beside_a_difference_is_not_taken(tap: LateTap) -> None:
    """Of a block that differs, a sector that another write is changing just then is left to that write's event."""
    tap.damage(2, fill(9))
    taken: list[tuple[int, int]] = []

    def settle() -> Work[object]:
        yield from tap.settle()
        if tap.settled == 1:
            tap.begin(5, fill(3))
        return None

    run(
        compare(
            tap.volume,
            tap.primary,
            everything(tap.volume),
            Steps(settle),
            take=lambda part: at_once(lambda: taken.extend(part.still(tap.volume))),
        )
    )
    assert taken == [(0, 5), (6, 8)]


def test_a_sync_while_differences_are_read_is_another_round(tap: LateTap) -> None:
    """Whoever takes a part can tell what newer events cover: no sync has passed the part's head then."""
    tap.damage(2, fill(9))
    taken: list[tuple[int, int]] = []

    def take(part: Found) -> Work[object]:
        return at_once(lambda: taken.extend(part.still(tap.volume)))

    work = compare(tap.volume, tap.primary, everything(tap.volume), Steps(tap.settle), take=take)
    call, syncs = next(work), 0
    try:
        while True:
            answer = call()
            if isinstance(answer, np.ndarray) and tap.settled > syncs and syncs < 4:  # just compared
                syncs += 1
                tap.volume.write(60, tap.path.read_bytes()[60 * 512 : 61 * 512])
                run(tap.volume.flush(tap.primary))
                run(sync(tap.volume))
            call = work.send(answer)
    except StopIteration as stop:
        found = stop.value
    assert syncs == 4
    assert found.extents == taken == [(0, 8)]


def test_a_sync_meanwhile_is_no_difference(tap: LateTap) -> None:
    """When a sync has folded the events away that would tell, another round is made."""
    tap.damage(40, fill(3))
    tap.write(3, fill(1))
    syncs = 0

    def settle() -> Work[object]:
        nonlocal syncs
        yield from tap.settle()
        if syncs < 2:
            syncs += 1
            tap.volume.write(60, tap.path.read_bytes()[60 * 512 : 61 * 512])
            yield from tap.volume.flush(tap.primary)
            yield from sync(tap.volume)
        return None

    found = run(verify(tap.volume, tap.primary, Steps(settle), lambda _done: None))
    assert syncs == 2
    assert found.extents == [(40, 48)]


def test_extents_are_compared_and_nothing_else(tap: LateTap) -> None:
    """What is told and taken stays within the extents that were given."""
    tap.damage(0, fill(5, SECTORS))
    taken: list[Found] = []
    extents = np.array([3, 20]), np.array([5, 21])

    def take(part: Found) -> Work[object]:
        return at_once(lambda: taken.append(part))

    found = run(compare(tap.volume, tap.primary, extents, Steps(tap.settle), take=take))
    assert found.extents == [(3, 5), (20, 21)]
    assert (found.compared_sectors, found.sectors) == (3, 3)
    assert [part.still(tap.volume) for part in taken] == [[(3, 5)], [(20, 21)]]
    assert bytes(taken[0].bytes_of(4, 5)) == fill(5)
    tap.volume.write(4, fill(6))
    assert taken[0].still(tap.volume) == [(3, 4)], "what a newer event covers is left out"


def test_discarded_sectors_may_hold_anything(tap: LateTap) -> None:
    """A primary that keeps what was discarded is no difference, if that is asked for."""
    tap.damage(8, fill(5, 16))
    tap.volume.discard(8, 8)
    steps = Steps(tap.settle)
    [strict, lax] = [
        run(compare(tap.volume, tap.primary, everything(tap.volume), steps, ignore_discarded=flag))
        for flag in (False, True)
    ]
    assert strict.extents == [(8, 24)]
    assert lax.extents == [(16, 24)]


def test_extents_are_bounded_and_all_are_counted() -> None:
    """Beyond the limit extents are only counted, one that goes on beyond it too."""
    found = Differences()
    for number in range(EXTENTS_MAX + 2):
        found.add(4 * number, 4 * number + 1)
        found.add(4 * number + 1, 4 * number + 2)
    assert len(found.extents) == EXTENTS_MAX
    assert found.extents[-1] == (4 * EXTENTS_MAX - 4, 4 * EXTENTS_MAX - 2)
    assert (found.count, found.sectors) == (EXTENTS_MAX + 2, 2 * (EXTENTS_MAX + 2))
    starts, stops = found.columns
    assert (len(starts), int((stops - starts).sum())) == (EXTENTS_MAX, 2 * EXTENTS_MAX)
    assert [len(column) for column in Differences().columns] == [0, 0]


def test_parts_join_and_progress_is_told(tmp_path: Path) -> None:
    """A difference over the border of two parts is one extent; a size that isn't whole blocks is compared whole."""
    tap = LateTap(tmp_path, PART_SECTORS + 13)
    tap.damage(PART_SECTORS - 1, fill(1, 2))
    tap.damage(PART_SECTORS + 12, fill(1))
    done: list[int] = []
    found = run(verify(tap.volume, tap.primary, Steps(tap.settle), done.append))
    assert found.extents == [(PART_SECTORS - 8, PART_SECTORS + 13)]
    assert done == [PART_SECTORS, PART_SECTORS + 13]
    tap.close()


def test_the_rate_is_kept_by_pauses(tmp_path: Path) -> None:
    """After each part the work pauses as long as the rate wants, if it does; it never waits itself."""
    tap = LateTap(tmp_path, 4 * PART_SECTORS)
    now = 0.0
    pauses: list[float] = []

    def pause(seconds: float) -> Work[object]:
        nonlocal now
        pauses.append(seconds)
        now += seconds
        return (yield lambda: None)

    tap.damage(3 * PART_SECTORS, fill(1))  # read three times
    steps = Steps(tap.settle, pause, Throttle(1 << 20, lambda: now))
    run(verify(tap.volume, tap.primary, steps, lambda _done: None))
    assert pauses == [0.75, 1, 1, 3]
    tap.close()


def test_throttle() -> None:
    """A full bucket is a burst; then what is taken has to be waited for; a rest fills it no farther."""
    now = 0.0
    throttle = Throttle(1000, lambda: now)
    assert throttle.take(250) == 0
    assert throttle.take(500) == 0.5
    now = 0.5
    assert throttle.take(100) == pytest.approx(0.1)
    now = 100.0
    assert throttle.take(350) == pytest.approx(0.1)
    assert Throttle(0, lambda: now).take(1 << 40) == 0


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    """Before the initial copy is complete there is no newest image; a source of another size is refused."""
    primary = new_volume(tmp_path / "disk", fill(0, 8))
    volume = open_volume(tmp_path / "disk")
    source = open_source(primary, writable=True)
    steps = Steps(lambda: iter(()))  # type: ignore[arg-type,return-value]
    with pytest.raises(NoSuchPointError, match="the initial copy isn't complete"):
        run(verify(volume, source, steps, lambda _done: None))
    source.truncate(512)
    with pytest.raises(SourceError, match="has 512 bytes instead of 4096"):
        run(compare(volume, source, everything(volume), steps))
    source.close()
    volume.close()


def finish(work: Work[Differences], call: Callable[[], Any]) -> Differences:
    """Drive work that is under way to its end."""
    try:
        while True:
            call = work.send(call())
    except StopIteration as stop:
        found: Differences = stop.value
        return found


# -- any interleaving -------------------------------------------------------------------------------------------------


class History:
    """A late tap, a comparison under way, and writes, sights, flushes and syncs in between."""

    def __init__(self, folder: Path, seed: int, *, mends: bool) -> None:
        self.rng = random.Random(seed)
        self.tap = LateTap(folder, self.rng.choice([40, 64, 3 * 8 + 5]))
        self.size = self.tap.volume.info.size_sectors
        self.written: set[int] = set()
        for _ in range(self.rng.randrange(4)):
            self.write()
        self.complete_all()
        self.damaged: set[int] = set()
        for _ in range(self.rng.randrange(1, 4)):
            at = self.rng.randrange(self.size)
            self.tap.damage(at, fill(255))
            self.damaged.add(at)
        if mends:
            run(self.tap.volume.flush(self.tap.primary, flag=Flag.GAP))
        self.written.clear()
        self.calm = self.rng.random() < 0.2

    def write(self) -> None:
        start = self.rng.randrange(self.size)
        data = fill(self.rng.randrange(255), self.rng.randint(1, min(9, self.size - start)))
        under_way = {at for each in self.tap.writes if not each.complete for at in self.reach(each)}
        write = Write(start, data)
        if not under_way & set(self.reach(write)):  # nobody writes a sector twice at once
            self.written.update(self.reach(write))
            self.tap.begin(start, data).complete = self.rng.random() < 0.5

    def complete_all(self) -> None:
        for write in self.tap.writes:
            write.complete = True
        self.tap.see(len(self.tap.writes))

    def reach(self, write: Write) -> range:
        return range(write.start, write.start + len(write.data) // 512)

    def anything(self, *, syncs: bool) -> None:
        """Let happen what may happen at a yield; a sync waits for readers, so none is there before a call is done."""
        for _ in range(0 if self.calm else self.rng.randrange(3)):
            act = self.rng.randrange(10)
            if act < 4:
                self.write()
            elif act < 6:
                self.tap.see(self.rng.randrange(3))
            elif act < 8:
                for write in self.tap.writes:
                    write.complete = write.complete or self.rng.random() < 0.7
            elif act == 8:
                run(self.tap.volume.flush(self.tap.primary))
            elif syncs and self.tap.volume.pointers.now.mirror_seq < self.tap.volume.journal.durable:
                run(sync(self.tap.volume))

    def drive(self, work: Work[Differences]) -> Differences:
        """Drive work; no write is under way for two settlings."""
        try:
            call, settled = next(work), 0
            while True:
                self.anything(syncs=False)
                answer = call()
                if self.tap.settled > settled:
                    settled = self.tap.settled
                    for write in self.tap.writes:
                        write.complete = True
                self.anything(syncs=True)
                call = work.send(answer)
        except StopIteration as stop:
            found: Differences = stop.value
            return found

    def check(self, found: Differences) -> None:
        """Claims 1 and 2 of the test below."""
        told = {at for start, stop in found.extents for at in range(start, stop)}
        blocks = {at // GRAIN_SECTORS for at in self.damaged}
        assert {at // GRAIN_SECTORS for at in told} <= blocks, "nothing is told that doesn't differ"
        if self.calm:
            assert {at // GRAIN_SECTORS for at in told} == blocks
        left = self.damaged - self.written - told
        assert len(left) <= found.busy_sectors


@pytest.mark.parametrize("number", range(60))
@pytest.mark.parametrize("mends", [False, True])
def test_any_interleaving(tmp_path: Path, number: int, mends: bool) -> None:  # noqa: FBT001 - a parameter
    """Only damage is told, all that nobody wrote over is told or busy, and a resync leaves nothing that differs."""
    history = History(tmp_path, SEED * 1000 + number, mends=mends)
    tap = history.tap

    def flush(flag: Flag) -> Work[object]:
        return (yield from tap.volume.flush(tap.primary, flag=flag))

    steps = Steps(tap.settle)
    work = resync(tap.volume, tap.primary, flush, steps, lambda _done: None) if mends else tap.verify()
    history.check(history.drive(work))
    history.complete_all()
    if mends:
        assert not needs_resync(tap.volume)
        assert tap.differing() == set()
    tap.volume.check()
    tap.close()
