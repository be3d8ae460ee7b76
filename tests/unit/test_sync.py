"""Claims about dmafs.core.sync: each sector is copied once, and a cut anywhere loses and changes nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from dmafs.core.mirror import Mirror
from dmafs.core.ondisk import HEADER_SIZE, Flag
from dmafs.core.segment import Segment
from dmafs.core.snapshot import Snapshot
from dmafs.core.storage import RealStorage
from dmafs.core.store import open_volume
from dmafs.core.sync import finish, next_stop, plan_leg, sync, sync_target
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import CorruptionError, NoSuchPointError, ReadOnlyError, StoreError, StoreFullError
from dmafs.units import SECTOR
from tests.unit.tools import TINY, Ticking, all_images, copied_volume, fill, flip, image_bytes, new_volume, tree

SIZE = 64
BASE = bytes(range(SIZE))  # what each sector of the primary is filled with at first


class Bench:
    """A volume and beside it its whole history: one byte stands for a sector."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.volume = copied_volume(path, b"".join(fill(value) for value in BASE))
        self.history = {self.volume.journal.head: BASE}

    def write(self, start: int, values: bytes) -> None:
        self._record(self.volume.write(start, b"".join(fill(value) for value in values)), start, values)

    def discard(self, start: int, length: int) -> None:
        self._record(self.volume.discard(start, length), start, bytes(length))

    def _record(self, seq: int, start: int, values: bytes) -> None:
        before = self.history[seq - 1]
        self.history[seq] = before[:start] + values + before[start + len(values) :]

    def flush(self) -> int:
        return run(self.volume.flush()).seq

    def sync(self, *, open_snapshot: bool = True) -> int:
        seq = run(sync(self.volume, open_snapshot=open_snapshot))
        self.volume.check()
        return seq

    def check(self) -> list[int]:
        """Assert that every recoverable image is what history says; return their seqs."""
        return check_images(self.volume, self.history)

    def counts(self) -> tuple[int, int]:
        """Return the sectors saved and applied so far."""
        return self.volume.statistics.saved_sectors, self.volume.statistics.applied_sectors

    def entries(self, seq: int) -> list[tuple[int, int, bool]]:
        """Return start, length and whether it is without data, of each entry of the snapshot at *seq*."""
        snapshot = self.volume.snapshots.at(seq)
        assert snapshot is not None
        segment = self.volume.snapshots.segment(snapshot)
        zeros = [segment.is_zero(index) for index in range(len(segment))]
        return sorted(zip(segment.starts, segment.lengths, zeros, strict=True))


def check_images(volume: Volume, history: dict[int, bytes]) -> list[int]:
    volume.check()
    images = all_images(volume)
    for seq, content in images.items():
        assert content[::SECTOR] == history[seq], f"image at {seq}"
    assert bytes(volume.live.read(0, SIZE * SECTOR))[::SECTOR] == history[volume.journal.head]
    return sorted(images)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "v")
    yield bench
    bench.volume.close()


# --- planning


def test_where_space_is_short_a_sync_goes_in_steps(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leg has a quarter of the free space at most, or goes to the next indicator; only the first is a snapshot."""
    for index in range(8):
        bench.write(index * 4, bytes([100 + index] * 4))
        bench.flush()
    bench.write(0, b"more than there is room for")
    bench.flush()
    monkeypatch.setattr(RealStorage, "free_bytes", lambda _: 4 * 8 * SECTOR)
    assert next_stop(bench.volume, 9) == 2
    assert next_stop(bench.volume, 1) == 1
    monkeypatch.setattr(RealStorage, "free_bytes", lambda _: 0)
    assert next_stop(bench.volume, 9) == 1
    monkeypatch.setattr(RealStorage, "free_bytes", lambda _: 4 * 8 * SECTOR)
    assert bench.sync() == 9
    assert bench.volume.statistics.syncs == 5
    assert [snapshot.seq for snapshot in bench.volume.snapshots] == [0]
    assert bench.check() == [0, 9]


def test_planning_changes_nothing(bench: Bench) -> None:
    """A plan can be made any number of times: no file, map or pointer is changed, and it is the same."""
    bench.write(3, b"abc")
    bench.flush()
    bench.sync()
    bench.write(4, b"xyz")
    bench.discard(20, 4)
    bench.flush()
    files, pointers = tree(bench.path), bench.volume.pointers.now
    one, two = (run(plan_leg(bench.volume, 3)) for _ in range(2))
    assert tree(bench.path) == files
    assert bench.volume.pointers.now == pointers
    assert (one.base, one.target, one.snapshot) == (two.base, two.target, two.snapshot) == (1, 3, one.snapshot)
    for mine, other in zip(
        (one.save_starts, one.save_stops, *one.moves), (two.save_starts, two.save_stops, *two.moves), strict=True
    ):
        assert np.array_equal(mine, other)
    bench.check()


def test_plan_is_the_net_change(bench: Bench) -> None:
    """Of events that overwrite each other only what is left at the target is moved, and saved is what it overwrites."""
    bench.write(10, b"ABCDE")
    bench.write(11, b"ZXC")
    bench.write(40, b"q")
    bench.discard(40, 2)
    bench.flush()
    run(bench.volume.snapshots.create(0, bench.volume.time_of(0)))
    plan = run(plan_leg(bench.volume, 4))
    assert [column.tolist() for column in plan.moves] == [[10, 14, 11, 40], [11, 15, 14, 42], [1, 1, 2, 4]]
    assert (plan.save_starts.tolist(), plan.save_stops.tolist()) == ([10, 40], [15, 42])


def test_plan_without_a_snapshot_saves_nothing(bench: Bench) -> None:
    """Without an open snapshot nothing of the mirror is kept."""
    bench.write(10, b"ABCDE")
    bench.flush()
    assert run(plan_leg(bench.volume, 1)).save_starts.tolist() == []


def test_target_is_a_durable_indicator(bench: Bench) -> None:
    """The mirror moves only to where a flush that is done stands, never to the newest event."""
    assert sync_target(bench.volume) == 0
    bench.write(1, b"a")
    assert sync_target(bench.volume) == 0
    flush = bench.volume.flush()
    call = next(flush)
    assert sync_target(bench.volume) == 0
    bench.write(2, b"b")
    with pytest.raises(StopIteration):
        flush.send(call())
    assert sync_target(bench.volume) == 1
    assert bench.sync() == 1
    assert bench.check() == [0, 1, 2]


def test_legs_stop_at_snapshots_and_held_images(bench: Bench) -> None:
    """The next leg ends at the first snapshot or held image before the target."""
    for value in range(1, 7):
        bench.write(value, b"x")
        bench.flush()
    assert next_stop(bench.volume, 6) == 6
    bench.volume.image(4).pins += 1
    assert next_stop(bench.volume, 6) == 4
    run(bench.volume.snapshots.create(2, bench.volume.time_of(2)))
    assert [next_stop(bench.volume, target) for target in (1, 2, 6)] == [1, 2, 2]


def test_no_sync_before_the_copy_is_complete(tmp_path: Path) -> None:
    """A mirror that isn't complete can't be moved."""
    new_volume(tmp_path / "v", bytes(SIZE * SECTOR))
    volume = open_volume(tmp_path / "v", limits=TINY, clock=Ticking())
    assert sync_target(volume) is None
    with pytest.raises(NoSuchPointError, match="initial copy isn't complete"):
        run(sync(volume))
    volume.close()


# --- what is copied


def test_each_sector_is_copied_once(bench: Bench) -> None:
    """A sync saves each overwritten sector once and applies each changed sector once, however often it was written."""
    for _ in range(5):
        bench.write(8, b"abcd")
        bench.write(10, b"efgh")
    bench.flush()
    assert bench.sync() == 10
    assert bench.counts() == (6, 6)
    assert bench.entries(0) == [(8, 6, False)]
    assert bench.check() == [0, 10]


def test_second_sync_into_the_same_snapshot_saves_only_what_is_new(bench: Bench) -> None:
    """The open snapshot already holds what was overwritten before; the moments in between are given up."""
    bench.write(8, b"abcd")
    bench.flush()
    bench.sync()
    bench.write(10, b"efgh")
    bench.flush()
    bench.sync(open_snapshot=False)
    assert bench.counts() == (4 + 2, 4 + 4)
    assert bench.entries(0) == [(8, 4, False), (12, 2, False)]
    assert bench.check() == [0, 2]


def test_new_snapshot_saves_all_it_needs(bench: Bench) -> None:
    """What an older snapshot holds is saved again for a newer one."""
    bench.write(8, b"abcd")
    bench.flush()
    bench.sync()
    bench.write(10, b"efgh")
    bench.flush()
    bench.sync()
    assert bench.counts() == (4 + 4, 4 + 4)
    assert bench.entries(1) == [(10, 4, False)]
    assert bench.check() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(12))
def test_counts_equal_those_of_an_oracle(bench: Bench, seed: int) -> None:
    """Over random histories the copied sectors are as many as sets of changed sectors say, and all images are right."""
    rng = Random(seed)
    saved = applied = 0
    held: set[int] = set()
    for _ in range(6):
        changed = set()
        for _ in range(rng.randrange(1, 8)):
            start = rng.randrange(SIZE)
            length = rng.randrange(1, min(8, SIZE - start) + 1)
            changed |= set(range(start, start + length))
            if rng.random() < 0.3:
                bench.discard(start, length)
            else:
                bench.write(start, rng.randbytes(length))
        bench.flush()
        opens = rng.random() < 0.5 or not len(bench.volume.snapshots)
        if opens:
            held = set()
        saved, applied = saved + len(changed - held), applied + len(changed)
        held |= changed
        bench.sync(open_snapshot=opens)
        assert bench.counts() == (saved, applied)
        bench.check()
    assert bench.volume.statistics.syncs == 6


def test_zeros_take_no_data(bench: Bench) -> None:
    """Overwritten zeros are saved, and discards applied, without data."""
    bench.discard(8, 16)
    bench.flush()
    bench.sync()
    bench.write(10, b"abcd")
    bench.flush()
    bench.sync()
    snapshot = bench.volume.snapshots.at(1)
    assert snapshot is not None
    assert bench.entries(1) == [(10, 4, True)]
    assert bench.volume.snapshots.segment(snapshot).dat.size() == 0
    assert bench.check() == [0, 1, 2]


def test_sync_with_nothing_to_do_does_nothing(bench: Bench) -> None:
    """When the mirror is at the target already no file changes and no snapshot is made."""
    bench.write(1, b"a")
    bench.flush()
    bench.sync()
    before = tree(bench.path)
    assert bench.sync() == 1
    assert tree(bench.path) == before


def test_journal_behind_the_mirror_is_released(bench: Bench) -> None:
    """After a sync to the head no segment is left of what the mirror holds now."""
    for number in range(30):
        bench.write(number, b"x")
    bench.flush()
    assert len(list((bench.path / "forward").iterdir())) > 2
    bench.sync()
    assert len(list((bench.path / "forward").iterdir())) == 0
    assert bench.check() == [0, 30]


def test_damaged_snapshot_is_an_error_and_not_the_mirror(bench: Bench) -> None:
    """A descriptor that a sync has written and that is damaged now doesn't let the mirror's newer data through."""
    bench.write(8, b"abcd")
    bench.flush()
    bench.sync()
    bench.volume.close()
    flip(bench.path / "backward" / f"{0:020d}.ext", HEADER_SIZE + 16)
    volume = open_volume(bench.path, limits=TINY, clock=Ticking())
    with pytest.raises(CorruptionError, match=f"{0:020d}.ext"):
        volume.image(0).read(0, SECTOR)
    volume.close()


@pytest.mark.parametrize("step", ["save", "overwrite"])
def test_sync_that_ran_out_of_space_is_taken_up_again(bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """When the store is full in the middle of a sync all images stay right, and the next sync finishes it."""
    scene(bench)
    before = set(bench.check())

    def fail(*_: Any, **_named: Any) -> None:
        raise OSError(28, "No space left on device")

    target = bench.volume.mirror if step == "overwrite" else Segment
    with monkeypatch.context() as patch:
        patch.setattr(target, "write" if step == "overwrite" else "write_batch", fail)
        with pytest.raises(StoreFullError):
            run(sync(bench.volume))
    assert (bench.volume.pointers.now.sync_target == 0) == (step == "save")
    assert {0, 9} <= set(bench.check()) <= before
    bench.write(33, b"on")
    head = bench.flush()
    assert bench.sync() == head
    assert {0, 9, head} <= set(bench.check())


# --- cuts


def cuts(work: Work[Any], path: Path, target: Path) -> Iterator[Path]:
    """Drive *work*; yield a copy of the directory before and after each call that it makes, and at its end."""
    number, answer, started = 0, None, False
    while True:
        try:
            call = work.send(answer) if started else next(work)
        except StopIteration:
            break
        started = True
        for act in (lambda: None, call):
            answer = act()
            number += 1
            place = target / str(number)
            shutil.copytree(path, place)
            yield place
    place = target / "end"
    shutil.copytree(path, place)
    yield place


def scene(bench: Bench) -> None:
    """Make a history with two snapshots, the second ahead of the mirror, and much behind and before each."""
    bench.write(8, b"abcd")
    bench.discard(20, 10)
    bench.flush()
    bench.sync()
    for number in range(6):
        bench.write(6 + 3 * number, bytes([100 + number]) * 4)
    bench.discard(40, 5)
    bench.flush()
    run(bench.volume.take_snapshot(name="ahead"))
    for number in range(6):
        bench.write(50 - 4 * number, bytes([200 + number]) * 6)
    bench.flush()
    bench.write(0, b"!")
    run(bench.volume.flush(flag=Flag.MARK, name="end"))


@pytest.mark.parametrize("opens", [True, False])
def test_cut_at_each_position_of_a_sync(bench: Bench, tmp_path: Path, *, opens: bool) -> None:
    """Wherever a sync is cut off, opening the volume finishes or forgets it; opening it twice changes nothing."""
    scene(bench)
    head = bench.volume.journal.head
    before = set(bench.check())
    kept, outcomes, positions = set[int](), set[int](), 0
    for place in cuts(sync(bench.volume, open_snapshot=opens), bench.path, tmp_path / "cuts"):
        positions += 1
        volume = open_volume(place, limits=TINY, clock=Ticking())
        seqs = set(check_images(volume, bench.history))
        assert seqs <= before
        assert volume.pointers.now.sync_target == 0
        assert {0, volume.pointers.now.mirror_seq, *range(volume.pointers.now.mirror_seq, head + 1)} <= seqs
        assert volume.snapshots.find("ahead") is not None
        outcomes.add(volume.pointers.now.mirror_seq)
        kept |= seqs
        volume.close()

        once = tree(place)
        again = open_volume(place, limits=TINY, clock=Ticking())
        assert set(check_images(again, bench.history)) == seqs
        again.close()
        assert tree(place) == once

        run_on = open_volume(place, limits=TINY, clock=Ticking())
        run(run_on.flush())  # who opens it can't know that the primary is durable up to the head
        assert run(sync(run_on, open_snapshot=opens)) == head
        final = set(check_images(run_on, bench.history))
        run_on.close()
        assert {0, 9, head} <= final
    assert kept == before
    assert outcomes == {2, 9, head}, "cuts in both legs are among them"
    assert positions >= 16
    bench.check()


def test_cut_while_a_committed_sync_is_finished(bench: Bench, tmp_path: Path) -> None:
    """A cut in the middle of doing a sync again loses nothing either."""
    scene(bench)
    committed = None
    for place in cuts(sync(bench.volume), bench.path, tmp_path / "first"):
        volume = Volume(RealStorage(place), limits=TINY, clock=Ticking())
        if volume.pointers.now.sync_target:
            committed = place
        volume.close()
    assert committed is not None
    volume = Volume(RealStorage(committed), limits=TINY, clock=Ticking())
    for place in cuts(finish(volume), committed, tmp_path / "second"):
        again = open_volume(place, limits=TINY, clock=Ticking())
        assert {0, 9} <= set(check_images(again, bench.history))
        again.close()
    volume.close()


# --- held images


def test_held_image_never_changes(bench: Bench) -> None:
    """An image that is held on the way of a sync, at its beginning and before it stays readable and the same."""
    scene(bench)
    held = [bench.volume.image(seq) for seq in (0, 2, 4, 9, 12)]
    for image in held:
        image.pins += 1
    bench.sync(open_snapshot=False)
    for image in held:
        assert bytes(image.read(0, image.size))[::SECTOR] == bench.history[image.seq]
        assert bench.volume.recoverable(image.seq)
    assert len(bench.volume.snapshots) == 2, "what is kept for a held image isn't listed"
    for image in held:
        image.pins -= 1
    run(bench.volume.drop_unheld())
    assert bench.check() == [0, 9, bench.volume.journal.head]
    hidden = [snapshot for snapshot in bench.volume.snapshots.all() if snapshot.hidden]
    assert hidden == list[Snapshot]()


def test_a_drop_that_begins_meanwhile_is_left_to_who_begins_it(bench: Bench) -> None:
    """What is being hidden when a sync finishes drops hasn't got its new name yet."""
    scene(bench)
    bench.sync()
    volume = bench.volume
    victim = next(iter(volume.snapshots))
    hiding = volume.hide_snapshot(victim)
    rename = next(hiding)
    bench.sync()
    assert victim in volume.snapshots.all()
    with pytest.raises(StopIteration):
        hiding.send(rename())
    run(volume.drop_unheld())
    assert victim not in volume.snapshots.all()
    bench.check()


# --- trouble in the middle


def fail_with(number: int) -> Callable[..., None]:
    def fail(*_args: object, **_named: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_store_stays_usable(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A committed sync that finds no space is finished later: meanwhile all images are right, after reopening too."""
    for number in range(12):
        bench.write(number, bytes([number + 100]))
    bench.flush()
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "write", fail_with(errno.ENOSPC))
        with pytest.raises(StoreFullError):
            bench.sync()
        assert bench.volume.pointers.now.sync_target
        assert bench.check()
        bench.volume.close()
        bench.volume = open_volume(bench.path, limits=TINY, clock=Ticking(10**6))
        assert bench.check()
    bench.write(3, b"z")
    bench.flush()
    assert bench.sync() == bench.volume.journal.head
    assert bench.check()


def test_a_source_or_mirror_that_can_not_be_read_is_no_end_of_writing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read error ends the sync, not the capture."""
    bench.write(1, b"x")
    bench.flush()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail_with(errno.EIO))
        with pytest.raises(StoreError, match="can't be read"):
            bench.sync()
    assert not bench.volume.failure
    bench.write(2, b"y")
    bench.flush()
    bench.sync()
    assert bench.check()


def test_damage_in_a_dropped_snapshot_does_not_close_the_store(bench: Bench) -> None:
    """What can't be merged stays hidden; syncs go on, and the store can be opened."""
    for value in b"abc":
        bench.write(5, bytes([value]))
        run(bench.volume.take_snapshot(name=f"s{value}"))
    bench.write(5, b"d")
    bench.flush()
    bench.sync()
    snapshot = bench.volume.snapshots.find("s98")
    assert snapshot is not None
    flip(bench.path / f"{snapshot.stem}.dat", 0)
    run(bench.volume.drop_snapshot(snapshot))
    assert bench.volume.snapshots.find("s98") is None
    bench.write(6, b"e")
    bench.flush()
    bench.sync()
    bench.volume.close()
    bench.volume = open_volume(bench.path, limits=TINY, clock=Ticking(10**6))
    assert image_bytes(bench.volume, bench.volume.journal.head)


def driven_on(work: Work[int], answer: object) -> object:
    """Drive work that is under way to its end; return its result."""
    try:
        while True:
            answer = work.send(answer)()
    except StopIteration as stop:
        return stop.value


def test_a_sync_stops_at_a_reserved_seq(bench: Bench) -> None:
    """While somebody takes a snapshot no sync passes its moment, also one that had been planned further."""
    bench.write(1, b"x")
    seq = bench.volume.indicate().seq
    bench.write(2, b"y")
    bench.flush()
    with bench.volume.reserved(seq):
        assert bench.sync() == seq
    work = sync(bench.volume)
    answer = next(work)()
    with bench.volume.reserved(seq):
        assert driven_on(work, answer) == seq
    bench.sync()
    assert bench.check()


def test_a_sync_goes_to_its_target(bench: Bench) -> None:
    """Told where to go, it stops at that indicator: what is behind stays exact to the write."""
    seqs = []
    for value in b"abc":
        bench.write(3, bytes([value]))
        seqs.append(bench.flush())
    assert run(sync(bench.volume, target=seqs[1])) == seqs[1]
    assert bench.check() == [0, *seqs[1:]]
    assert run(sync(bench.volume, target=seqs[0])) == seqs[1], "the mirror never goes back"
    assert run(sync(bench.volume, target=seqs[2], open_snapshot=False)) == seqs[2]
    assert bench.check() == [0, seqs[2]]


def test_a_target_that_is_no_indicator_is_a_bug(bench: Bench) -> None:
    """Between two indicators, past the durable ones, and inside a gap there is no target."""
    bench.write(3, b"a")
    bench.write(3, b"b")
    bench.flush()
    bench.write(3, b"c")
    bench.volume.indicate()
    for target in (1, 3):
        with pytest.raises(AssertionError):
            run(sync(bench.volume, target=target))
    run(bench.volume.flush(flag=Flag.GAP))
    bench.write(3, b"d")
    seq = bench.flush()
    with pytest.raises(AssertionError):
        run(sync(bench.volume, target=seq))
    assert bench.volume.pointers.now.mirror_seq == 0


def test_a_sync_that_may_not_commit_gives_up_no_moment(bench: Bench) -> None:
    """Nothing was done, so what was on the way can still be opened."""
    bench.write(5, b"a")
    bench.flush()
    bench.sync()
    for value in (b"b", b"c"):
        bench.write(5, value)
    bench.flush()
    points = bench.check()
    bench.volume.gate.failure = "a test"
    with pytest.raises(ReadOnlyError):
        run(sync(bench.volume, open_snapshot=False))
    assert bench.check() == points


def test_no_snapshot_is_taken_of_what_a_sync_has_passed(bench: Bench) -> None:
    """Also where one stands already: a twin of it would lack what it holds, and show it when the first is dropped."""
    bench.write(5, b"a")
    first = run(bench.volume.take_snapshot())
    bench.write(5, b"b")
    bench.flush()
    bench.sync()
    with pytest.raises(NoSuchPointError, match="a sync has passed"):
        run(bench.volume.snapshot_at(first.seq, "twin"))
    bench.check()
