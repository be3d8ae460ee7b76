"""A volume under random histories, measured against an oracle that keeps every moment's full image.

Claims, after every step, also while a sync, a snapshot, a drop, a flush or the initial copy is under way:

1. The live image is the newest moment, and every recoverable seq shows its moment bit for bit.
2. Recoverable is exactly: from floor or origin to the head, the visible snapshots, and what is held.
3. A held image is one object and never changes, whatever syncs and drops do.
4. A stop at any file operation loses nothing but the unflushed end; what is left is a prefix of history.
5. All structures agree with their descriptors, and no file in the store is unreferenced.
6. A diff of two moments lists each sector whose bytes differ, and none that wasn't written since the older one.

``DMAFS_TEST_SEED`` chooses the histories and ``DMAFS_TEST_EXAMPLES`` how many there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID

import hypothesis
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dmafs.core import copy, extent, layers, points, sync, vrmo
from dmafs.core import segment as segments
from dmafs.core.diff import diff
from dmafs.core.image import ZEROS, Image
from dmafs.core.journal import SegmentLimits
from dmafs.core.ondisk import Flag
from dmafs.core.snapshot import IndexLimits
from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.vbm import MIRROR
from dmafs.core.volume import Volume, VolumeLimits
from dmafs.core.work import Work, run
from dmafs.errors import ExistsError, NoSuchPointError
from tests.model.cuts import Disk
from tests.model.oracle import SECTOR, Oracle, nonzero_sectors

SEED = int(os.environ.get("DMAFS_TEST_SEED", "1"))
EXAMPLES = int(os.environ.get("DMAFS_TEST_EXAMPLES", "300"))
STEPS = 60
LIMITS = VolumeLimits(segments=SegmentLimits(data_sectors=32, records=8), images=2, reserve_bytes=1)
BEGIN_NS = 1_700_000_000_000_000_000
SHM = Path("/dev/shm")  # noqa: S108 - a private directory is made in it

Named = tuple[int, str]


class Running:
    """Work under way: which kind, the call that it waits for, and whether that call is done already."""

    def __init__(self, kind: str, work: Work[Any], done: Callable[[Any], None]) -> None:
        self.kind = kind
        self.work = work
        self.done = done
        self.executed = False
        self.answer: Any = None
        self.call = next(work)

    def execute(self) -> None:
        if not self.executed:
            self.answer = self.call()
            self.executed = True

    def advance(self) -> bool:
        """Do one call and let the work go on; return whether that was its end."""
        self.execute()
        try:
            self.call = self.work.send(self.answer)
        except StopIteration as stop:
            self.done(stop.value)
            return True
        self.executed = False
        return False


class VolumeMachine(RuleBasedStateMachine):
    """One volume, one primary, one oracle."""

    steps = 0
    counts: dict[str, int] = {}  # noqa: RUF012 - of all runs together

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(dir=SHM if SHM.is_dir() else None))
        self.disk = Disk()
        self.patches = contextlib.ExitStack()
        self.patches.callback(shutil.rmtree, self.path)
        self.now = BEGIN_NS
        self.rng = random.Random(0)
        self.running: Running | None = None
        self.flushing: Running | None = None
        self.held: dict[int, tuple[Image, int]] = {}
        self.late: list[tuple[int, bytes]] = []
        self.least: list[Named] = []  # the visible snapshots that there have to be
        self.most: list[Named] = []  # and that there may be
        self.floors = (0, 0)
        self.indicated: set[int] = set()
        self.marks: set[Named] = set()
        self.durable = 0
        self.origin = -1
        self.unhold_later = False

    @initialize(
        size=st.integers(24, 64),
        content=st.sampled_from(["zeros", "random", "half"]),
        page_sectors=st.sampled_from([4, 8, 2048]),
        fan_out=st.sampled_from([2, 8]),
        index_bytes=st.sampled_from([0, 200, 1 << 20]),
        stepwise=st.sampled_from([False, False, False, True]),
        nosy=st.booleans(),
        room=st.sampled_from([0, 4, 16, 1 << 20]),
    )
    def create(  # noqa: PLR0917 - drawn by name
        self,
        size: int,
        content: str,
        page_sectors: int,
        fan_out: int,
        index_bytes: int,
        stepwise: bool,  # noqa: FBT001
        nosy: bool,  # noqa: FBT001
        room: int,
    ) -> None:
        self.limits = dataclasses.replace(LIMITS, index=IndexLimits(bytes=index_bytes, journals=2))
        self.nosy = nosy
        for module, name, value in (
            (vrmo, "PAGE_SECTORS_MIN", page_sectors),
            (vrmo, "PAGES", 64),
            (layers, "FAN_OUT", fan_out),
            (layers, "GROWN_ENTRIES", 3),
            (copy, "CHUNK_SECTORS", 7),
            (copy, "SAVE_SECTORS", 14),
            (copy, "_HOLE_GRAIN", 2 * SECTOR),
            (segments, "BATCH_BYTES", 6 * SECTOR),
            (sync, "chop", functools.partial(extent.chop, limit=5)),
            (sync, "room", lambda _: room * SECTOR),
        ):
            self.patches.enter_context(mock.patch.object(module, name, value))
        self.disk.enter()
        self.patches.callback(self.disk.leave)
        data = bytes(size * SECTOR) if content == "zeros" else self.rng.randbytes(size * SECTOR)
        if content == "half":
            data = data[: size // 2 * SECTOR] + bytes((size - size // 2) * SECTOR)
        self.oracle = Oracle(data)
        source = self.path / "primary"
        source.write_bytes(data)
        self.primary: RealFile = open_source(source, writable=True)
        self.patches.callback(self.primary.close)
        self.store = self.path / "disk"
        self.store.mkdir()
        Volume.create(
            RealStorage(self.store), name="disk", size_sectors=size, source=source, tap="fuse", created_ns=BEGIN_NS
        )
        self.volume = self._open()
        self._copy()
        if not stepwise:
            self.advance(calls=10**6)

    def _open(self) -> Volume:
        volume = open_volume(self.store, limits=self.limits, clock=lambda: self.now)
        self.was_clean = volume.pointers.now.clean
        volume.mark_open(UUID(int=1))
        return volume

    def _copy(self) -> None:
        """Begin the initial copy, or go on with it."""

        def flush(flag: Flag) -> Work[object]:
            self.indicated.add(self.oracle.head)
            return self.volume.flush(self.primary, flag=flag)

        def done(_: None) -> None:
            self._adopt_origin()
            assert self.origin in self.indicated
            self.durable = self.volume.journal.durable

        self._begin("copy", copy.initial_copy(self.volume, self.primary, flush, lambda _: None), done)

    def _adopt_origin(self) -> None:
        now = self.volume.pointers.now
        if now.copied and not self.copied:
            self.origin = now.origin_seq
            self.oracle.times[self.origin] = now.origin_time_ns

    def _begin(self, kind: str, work: Work[Any], done: Callable[[Any], None]) -> None:
        assert self.running is None
        self.counts[kind] = self.counts.get(kind, 0) + 1
        try:
            self.running = Running(kind, work, done)
        except StopIteration as stop:
            done(stop.value)
            self._settle()

    def _settle(self) -> None:
        """Do what the daemon does once no work is under way."""
        self.running = None
        if self.unhold_later:
            self.unhold_later = False
            run(self.volume.drop_unheld())
        for segment in self.volume.take_garbage():
            segment.close()

    # -- what the model knows -----------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return self.running is None

    @property
    def copied(self) -> bool:
        return self.origin >= 0

    @property
    def floor(self) -> int:
        low, high = self.floors
        assert low <= self.volume.floor <= high
        return self.volume.floor

    def visible(self) -> list[Named]:
        found = sorted((snapshot.seq, snapshot.name) for snapshot in self.volume.snapshots)
        rest = list(found)
        for named in self.least:
            assert named in rest, f"snapshot {named} was lost"
            rest.remove(named)
        allowed = list(self.most)
        for named in found:
            assert named in allowed, f"snapshot {named} appeared"
            allowed.remove(named)
        return found

    def recoverable(self) -> list[int]:
        """Return all seqs that have to be recoverable, ascending."""
        if not self.copied:
            return []
        first = max(self.floor, self.origin)
        below = {seq for seq, _ in self.visible()} | {seq for seq, (_, pins) in self.held.items() if pins}
        return sorted({*range(first, self.oracle.head + 1), *(seq for seq in below if seq >= self.origin)})

    def sample(self) -> list[int]:
        seqs = self.recoverable()
        if len(seqs) <= 8:
            return seqs
        return sorted({seqs[0], seqs[-1], *self.rng.sample(seqs, 4)})

    # -- capture ------------------------------------------------------------------------------------------------

    @rule(
        extents=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 20)), min_size=1, max_size=5),
        zeros=st.integers(0, 5),
        jump=st.sampled_from([0, 0, 1, 7, 10**9, 10**11, -(10**9)]),
        late=st.booleans(),
        then=st.sampled_from(["", "flush", "sync", "snapshot"]),
    )
    def write(self, extents: list[tuple[int, int]], zeros: int, jump: int, late: bool, then: str) -> None:  # noqa: FBT001
        """Write a few extents; often go on to what a day of a volume is made of, so that histories get deep."""
        for start, length in extents:
            self.now += jump
            begin = start % self.oracle.size_sectors
            size = min(length, self.oracle.size_sectors - begin) * SECTOR
            data = self.rng.randbytes(size) if zeros else bytes(size)
            self._captured(self.volume.write(begin, data), begin, data, late=late)
        if then and self._may_flush():
            self.flush(Flag.FLUSH, "", wait=False)
        if then in {"sync", "snapshot"} and self.idle and self.copied and self.flushing is None:
            if then == "sync":
                self.sync(open_snapshot=True, calls=10**6)
            else:
                self.take_snapshot("", calls=10**6)

    @rule(start=st.integers(0, 63), length=st.integers(1, 64))
    def discard(self, start: int, length: int) -> None:
        start %= self.oracle.size_sectors
        length = min(length, self.oracle.size_sectors - start)
        seq = self.volume.discard(start, length)
        self._captured(seq, start, bytes(length * SECTOR), late=False)

    def _captured(self, seq: int, start: int, data: bytes, *, late: bool) -> None:
        self.oracle.write(start, data, self.volume.live.time_ns)
        assert seq == self.oracle.head
        assert self.oracle.times[-1] > max(self.oracle.times[:-1]), "canonical times of events differ"
        self.late.append((start, data))
        if not late or self.copied:
            self._primary_catches_up()

    def _primary_catches_up(self) -> None:
        for start, data in self.late:
            self.primary.write([data], start * SECTOR)
        self.late = []

    def _may_flush(self) -> bool:
        return self.flushing is None and (self.running is None or self.running.kind not in {"copy", "snapshot"})

    @precondition(_may_flush)
    @rule(kind=st.sampled_from([Flag.FLUSH, Flag.TICK, Flag.MARK]), name=st.sampled_from("abc"), wait=st.booleans())
    def flush(self, kind: Flag, name: str, wait: bool) -> None:  # noqa: FBT001
        self._primary_catches_up()
        name = name if kind == Flag.MARK else ""
        head = self.oracle.head

        def done(indicator: Any) -> None:
            assert indicator.seq == head
            self.durable = max(self.durable, head)
            if name:
                self.marks.add((head, name))

        self.indicated.add(head)
        try:
            self.flushing = Running("flush", self.volume.flush(self.primary, flag=kind, name=name), done)
        except StopIteration as stop:  # nothing to do
            done(stop.value)
        if self.flushing and not wait:
            self.finish_flush()

    @precondition(lambda self: self.flushing is not None)
    @rule()
    def finish_flush(self) -> None:
        assert self.flushing is not None
        assert self.flushing.advance()
        self.flushing = None

    # -- work ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.idle and self.copied)
    @rule(open_snapshot=st.booleans(), calls=st.sampled_from([0, 1, 2, 3, 5, 8, 10**6]), back=st.integers(0, 3))
    def sync(self, open_snapshot: bool, calls: int, back: int = 0) -> None:  # noqa: FBT001
        """Sync to the newest durable indicator, or to one before it."""
        base = max(self.floor, self.origin)
        durable = sorted(seq for seq in self.indicated if self.origin <= seq <= self.durable)
        chosen = durable[-1 - back] if 0 < back < len(durable) else None
        target = max([self.floor, *durable]) if chosen is None else max(self.floor, chosen)
        if open_snapshot and base < target and all(seq != base for seq, _ in self.most):
            self.most = [*self.most, (base, "")]
        self.floors = self.floor, target

        def done(mirror_seq: int) -> None:
            assert mirror_seq == target
            self.floors = target, target
            self.least = self.most

        self._begin("sync", sync.sync(self.volume, target=chosen, open_snapshot=open_snapshot), done)
        self.advance(calls=calls)

    @precondition(lambda self: self.idle and self.copied and self.flushing is None)
    @rule(name=st.sampled_from(["", "", "one", "two"]), calls=st.integers(0, 3))
    def take_snapshot(self, name: str, calls: int) -> None:
        head = self.oracle.head
        work = self.volume.take_snapshot(self.primary, name)
        if name and name in {taken for _, taken in self.least}:
            with pytest.raises(ExistsError):
                run(work)
            return
        if name or (head, "") not in self.least:  # without a name there is one of an instant
            self.most = [*self.most, (head, name)]
        self.indicated.add(head)

        def done(snapshot: Any) -> None:
            assert (snapshot.seq, snapshot.name, snapshot.instant_ns) == (head, name, snapshot.time_ns)
            self.durable = max(self.durable, head)
            self.least = self.most

        self._begin("snapshot", work, done)
        self.advance(calls=calls)

    @precondition(lambda self: self.idle and self.least)
    @rule(number=st.integers(0, 100), calls=st.integers(0, 8))
    def drop_snapshot(self, number: int, calls: int) -> None:
        shown = list(self.volume.snapshots)
        snapshot = shown[number % len(shown)]
        self.least = [*self.least]
        self.least.remove((snapshot.seq, snapshot.name))

        def done(_: None) -> None:
            self.most = self.least

        self._begin("drop", self.volume.drop_snapshot(snapshot), done)
        self.advance(calls=calls)

    @precondition(lambda self: not self.idle)
    @rule(calls=st.sampled_from([1, 1, 2, 3, 10**6]))
    def advance(self, calls: int) -> None:
        for _ in range(calls):
            if self.running is None:
                return
            if self.running.advance():
                self._settle()
            elif not self.copied:
                self._primary_catches_up()

    @precondition(lambda self: self.running is not None and not self.running.executed)
    @rule()
    def execute(self) -> None:
        """The thread is done, but the work hasn't heard of it."""
        assert self.running is not None
        self.running.execute()
        self._adopt_origin()

    # -- reading ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.copied)
    @rule(number=st.integers(0, 1000), from_end=st.booleans())
    def hold(self, number: int, from_end: bool) -> None:  # noqa: FBT001
        seqs = self.recoverable()
        seq = seqs[-1 - number % min(len(seqs), 3)] if from_end else seqs[number % len(seqs)]
        self._hold(seq)

    @precondition(lambda self: self.copied and self.volume.recoverable(max(self.volume.pointers.now.mirror_seq, 0)))
    @rule()
    def hold_mirror(self) -> None:
        """The mirror's own moment is the one that a sync takes away first."""
        self._hold(self.volume.pointers.now.mirror_seq)

    def _hold(self, seq: int) -> None:
        image = self.volume.image(seq)
        known, pins = self.held.get(seq, (image, 0))
        assert image is known or not pins, "one object for one moment"
        image.pins += 1
        self.held[seq] = image, pins + 1

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 100))
    def unhold(self, number: int) -> None:
        seq = sorted(self.held)[number % len(self.held)]
        image, pins = self.held.pop(seq)
        image.pins -= 1
        assert image.pins == pins - 1
        if pins > 1:
            self.held[seq] = image, pins - 1
        elif self.running is None:
            run(self.volume.drop_unheld())
            self._settle()
        else:
            self.unhold_later = True

    @precondition(lambda self: self.copied)
    @rule(number=st.integers(0, 1000), offset=st.integers(0, 64 * SECTOR), length=st.integers(0, 30 * SECTOR))
    def read(self, number: int, offset: int, length: int) -> None:
        seqs = self.recoverable()
        seq = seqs[number % len(seqs)]
        offset %= self.oracle.size_sectors * SECTOR
        expected = self.oracle.image_at(seq)[offset : offset + length]
        assert self.volume.image(seq).read(offset, length) == expected

    @precondition(lambda self: self.copied)
    @rule()
    def look_at_everything(self) -> None:
        for seq in self.recoverable():
            self._compare(self.volume.image(seq), seq)

    def _compare(self, image: Image, seq: int) -> None:
        assert image.seq == seq
        assert image.read(0, image.size) == self.oracle.image_at(seq), f"the image at {seq} isn't history's"
        image.vrmo.check()

    # -- stops --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.idle and self.copied)
    @rule()
    def reopen(self) -> None:
        if self.flushing:
            self.finish_flush()
        self.flush(Flag.FLUSH, "", wait=False)
        self.volume.mark_clean()
        self._restart()
        assert self.was_clean is True
        assert self.volume.journal.durable == self.durable == self.oracle.head

    @rule(changes=st.integers(0, 12), flushed=st.booleans(), torn=st.booleans())
    def crash(self, changes: int, flushed: bool, torn: bool) -> None:  # noqa: FBT001
        """Stop at a file operation; with *torn* what isn't durable is lost or damaged in part."""
        durable, head = self.volume.journal.durable, self.oracle.head
        assert durable == self.durable if self.idle else durable >= self.durable
        running, flushing, self.running, self.flushing = self.running, self.flushing, None, None
        if flushing and flushed:
            flushing.execute()
        if running:
            with self.disk.fused(changes):
                running.execute()
        self._primary_catches_up()
        self._restart(torn=torn)
        now = self.volume.journal
        assert self.was_clean is False
        assert durable <= now.head <= head if torn else now.head == head, "what was flushed is there"
        assert now.durable <= max(durable, self.volume.pointers.now.durable)
        self.durable = now.durable
        self.oracle.cut(now.head)
        if now.head < head:
            self.primary.write([self.oracle.image_at(now.head)], 0)
        kept = {seq for segment in now.segments for seq in segment.indicator_seqs}
        assert {mark for mark in self.marks if mark[0] > self.volume.floor} <= {(m.seq, m.name) for m in now.marks()}
        self.indicated = {seq for seq in self.indicated if seq in kept}
        self._adopt_origin()
        if not self.copied:
            self._copy()

    def _restart(self, *, torn: bool = False) -> None:
        """Close and open; adopt which of the allowed states an interrupted work has left."""
        self.volume.close()
        self.held = {}
        self.unhold_later = False
        if torn:
            for path in sorted((self.store / "forward").iterdir()) + sorted((self.store / "backward").iterdir()):
                if self.rng.random() < 0.6 and self.disk.tear(path, self.rng):
                    self.counts["torn"] = self.counts.get("torn", 0) + 1
        self.volume = self._open()
        self.least = self.most = self.visible()
        self.floors = self.floor, self.floor
        assert not [snapshot for snapshot in self.volume.snapshots.all() if snapshot.hidden]
        assert self.volume.pointers.now.sync_target == 0
        self._settle()

    # -- what holds after every step ----------------------------------------------------------------------------

    @invariant()
    def live_is_the_newest(self) -> None:
        VolumeMachine.steps += 1
        assert self.volume.live.seq == self.oracle.head == self.volume.journal.head
        if self.copied:
            self._compare(self.volume.live, self.oracle.head)

    @invariant()
    def held_images_never_change(self) -> None:
        for seq, (image, pins) in self.held.items():
            assert image.pins == pins
            self._compare(image, seq)

    @invariant()
    def recoverable_is_exact(self) -> None:
        expected = set(self.recoverable())
        for seq in range(-1, self.oracle.head + 3):
            assert self.volume.recoverable(seq) is (seq in expected), f"recoverable({seq})"

    @precondition(lambda self: self.nosy)
    @invariant()
    def past_images_are_history(self) -> None:
        for seq in self.sample():
            image = self.volume.image(seq)
            self._compare(image, seq)
            assert nonzero_sectors(self.oracle.image_at(seq)) <= image.allocated_sectors() <= self.oracle.size_sectors

    @precondition(lambda self: self.copied)
    @invariant()
    def diffs_miss_nothing(self) -> None:
        """Listed may be what a sync that was given up has saved; that was written later."""
        seqs = self.sample()
        for a, b in zip(seqs, self.rng.sample(seqs, len(seqs)), strict=True):
            starts, stops = run(diff(self.volume, a, b))
            listed = {sector for start, stop in zip(starts, stops, strict=True) for sector in range(start, stop)}
            assert self.oracle.differing(a, b) <= listed <= self.oracle.written(min(a, b), self.oracle.head)

    @precondition(lambda self: self.copied)
    @invariant()
    def nothing_else_can_be_had(self) -> None:
        recoverable = set(self.recoverable())
        for seq in {0, self.oracle.head + 1, self.rng.randrange(self.oracle.head + 1)} - recoverable:
            with pytest.raises(NoSuchPointError):
                self.volume.image(seq)

    @precondition(lambda self: self.copied)
    @invariant()
    def times_lead_to_their_moments(self) -> None:
        volume, times = self.volume, self.oracle.times
        first = max(self.floor, self.origin)
        shown = sorted({seq for seq, _ in self.visible() if seq < first})
        for seq in self.sample():
            assert volume.time_of(seq) == times[seq], f"time of {seq}"
            if seq >= first or seq in shown:
                assert points.seq_at(volume, times[seq]) == seq
            if seq > first:
                assert points.seq_at(volume, times[seq] - 1) == seq - 1
        before = [seq for seq in shown if times[seq] < times[first]]
        if before:
            assert points.seq_at(volume, times[first] - 1) == before[-1]
        else:
            with pytest.raises(NoSuchPointError):
                points.seq_at(volume, times[first] - 1)
        with pytest.raises(NoSuchPointError):
            points.seq_at(volume, max(self.now, volume.journal.head_time_ns) + 1)

    @precondition(lambda self: self.copied)
    @invariant()
    def landmarks_can_be_had(self) -> None:
        found = points.landmarks(self.volume)
        recoverable = set(self.recoverable())
        assert {point.seq for point in found} <= recoverable
        assert all(point.time_ns == self.oracle.times[point.seq] for point in found)
        assert {(point.seq, point.name) for point in found if point.kind == "mark"} >= {
            mark for mark in self.marks if mark[0] > self.floor
        }
        assert points.oldest_point(self.volume).seq == min(
            {seq for seq, _ in self.visible()} | {max(self.floor, self.origin)}
        )

    @precondition(lambda self: self.idle)
    @invariant()
    def structures_agree(self) -> None:
        assert self.floors[0] == self.floors[1] == self.volume.pointers.now.mirror_seq
        assert self.volume.journal.durable == self.durable
        self.volume.check()
        for image in [self.volume.live, *(image for image, _ in self.held.values())]:
            image._allocated = None  # counted once, and the file system rounds what syncs write up to its blocks
            assert image.allocated_sectors() == self._count_allocated(image)

    def _count_allocated(self, image: Image) -> int:
        """Count sector by sector what ``allocated_sectors`` counts by arithmetic."""
        data = {
            sector
            for start, stop in self.volume.mirror.file.data_ranges(0, image.size)
            for sector in range(start // SECTOR, -(-stop // SECTOR))
        }
        count = 0
        for piece in image.resolve(0, image.size):
            if piece.entry == MIRROR:
                count += len(data & set(range(piece.start, piece.stop)))
            elif piece.entry != ZEROS:
                count += piece.stop - piece.start
        return count

    @precondition(lambda self: self.idle)
    @invariant()
    def no_file_is_unreferenced(self) -> None:
        forward = {f"{segment.stem}{suffix}" for segment in self.volume.journal.segments for suffix in (".ext", ".dat")}
        backward = {
            f"{snapshot.stem}{suffix}"
            for snapshot in self.volume.snapshots.all()
            for suffix in (".gone" if snapshot.gone else ".ext", ".dat")
        }
        there = {f"{path.parent.name}/{path.name}" for path in self.store.glob("*ward/*")}
        assert there == forward | backward
        if not self.held:
            assert not [snapshot for snapshot in self.volume.snapshots.all() if snapshot.hidden]

    def teardown(self) -> None:
        try:
            if hasattr(self, "volume"):
                self.volume.close()
        finally:
            self.patches.close()


def test_every_moment_of_a_volume_is_history(capsys: pytest.CaptureFixture[str]) -> None:
    """Claims 1 to 6 hold in every step of all histories, of which there are enough."""
    VolumeMachine.steps = 0
    VolumeMachine.counts.clear()
    profile = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    with capsys.disabled():
        print(f"\nDMAFS_TEST_SEED={SEED} DMAFS_TEST_EXAMPLES={EXAMPLES}")  # noqa: T201
        run_state_machine_as_test(hypothesis.seed(SEED)(VolumeMachine), settings=profile)
        print(f"{VolumeMachine.steps} steps, {dict(sorted(VolumeMachine.counts.items()))}")  # noqa: T201
    assert VolumeMachine.steps >= EXAMPLES * STEPS // 2
    assert {"copy", "drop", "snapshot", "sync", "torn"} <= set(VolumeMachine.counts)


@pytest.fixture
def machine() -> Iterator[VolumeMachine]:
    made = VolumeMachine()
    made.create(
        size=24,
        content="random",
        page_sectors=4,
        fan_out=2,
        index_bytes=200,
        stepwise=False,
        nosy=True,
        room=1 << 20,
    )
    yield made
    made.teardown()


def write(machine: VolumeMachine, start: int, then: str) -> None:
    machine.write([(start, 4)], zeros=1, jump=1, late=False, then=then)


def test_an_image_of_the_mirror_opened_during_a_sync_never_changes(machine: VolumeMachine) -> None:
    """A sync that feeds an older snapshot stops for an image of the mirror's own moment, opened after its plan."""
    write(machine, 0, "sync")
    write(machine, 2, "flush")
    machine.sync(open_snapshot=False, calls=0)
    machine.hold_mirror()
    machine.advance(calls=10**6)
    assert machine.idle
    assert list(machine.held) == [1]
    machine.held_images_never_change()
    machine.structures_agree()


def test_reading_while_a_snapshot_is_merged_loses_nothing(machine: VolumeMachine) -> None:
    """The journals that a drop works on stay open, even when no image needs them and the others are let go."""
    for start in (0, 8, 16):
        write(machine, start, "sync")
    machine.drop_snapshot(number=1, calls=1)
    for segment in machine.volume.take_garbage():
        segment.close()
    machine.volume.image(0)
    machine.advance(calls=10**6)
    assert machine.idle
    assert [seq for seq, _ in machine.least] == [0, 2]
    machine.structures_agree()
    machine.look_at_everything()
    machine.reopen()
    machine.look_at_everything()
