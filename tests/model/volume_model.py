"""A volume, a primary, an oracle, and what changes the volume: capture, syncs, snapshots, drops, step by step.

``Model`` knows which moments there have to be. What else is done to a volume is in ``volume_keeping`` (pins, thinning,
journals let go of), ``volume_readers`` and ``volume_clones``; what holds after every step is in ``volume_claims``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dmafs.core import copy, extent, layers, sync, vrmo
from dmafs.core import segment as segments
from dmafs.core import volume as volumes
from dmafs.core.digests import BLOCK
from dmafs.core.extent import Ints
from dmafs.core.image import Image
from dmafs.core.limits import IndexLimits, SegmentLimits, VolumeLimits
from dmafs.core.ondisk import Flag
from dmafs.core.snapshot import Snapshot
from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import ExistsError, PinnedError
from tests.model.cuts import Disk
from tests.model.oracle import SECTOR, Expected, Oracle
from tests.model.stepping import Reader, Running

LIMITS = VolumeLimits(segments=SegmentLimits(data_sectors=32, records=8), images=2, reserve_bytes=1)
HOUR_NS = 3600 * 10**9
BEGIN_NS = 1_700_000_000_000_000_000
SHM = Path("/dev/shm")  # noqa: S108 - a private directory is made in it
ALL = 10**6
"""Calls enough for any work to end."""
READ_BY = {"sync", "drop", "thinning"}
"""Work before whose calls readers are waited for."""

Named = tuple[int, str]


def named(snapshot: Snapshot) -> Named:
    return snapshot.seq, snapshot.name


class Model(RuleBasedStateMachine):
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
        self.readers: list[Reader] = []
        self.dead: list[Running | Reader] = []  # work of processes that have ended
        self.clones: dict[str, Expected] = {}
        self.cloning: Running | None = None  # one clone is being made or dropped
        self.clone_at = -1  # whose base that holds
        self.late: list[tuple[int, bytes]] = []
        self.least: list[Named] = []  # the visible snapshots that there have to be
        self.most: list[Named] = []  # and that there may be
        self.floors = (0, 0)
        self.indicated: set[int] = set()
        self.marks: set[Named] = set()  # that there have to be, past the floor
        self.tried_marks: set[Named] = set()
        self.pinned: set[Named] = set()
        self.pinning: Running | None = None
        self.thinned: list[Named] = []  # by the thinning under way, in this order
        self.spared: set[Named] = set()  # of these, what was pinned meanwhile
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
        room: int = 1 << 20,
    ) -> None:
        indexed, stack_max = (1, 3, 256)[size % 3], 1 + size % 4
        self.limits = dataclasses.replace(LIMITS, index=IndexLimits(bytes=index_bytes, journals=2, indexed=indexed))
        self.nosy = nosy
        for module, name, value in (
            (vrmo, "PAGE_SECTORS_MIN", page_sectors),
            (vrmo, "PAGES", 64),
            (layers, "FAN_OUT", fan_out),
            (layers, "STACK_MAX", stack_max),
            (volumes, "STACK_WARM", 1),
            (layers, "GROWN_ENTRIES", 3),
            (copy, "CHUNK_SECTORS", 8),
            (copy, "SAVE_SECTORS", 16),
            (copy, "_HOLE_GRAIN", BLOCK),
            (segments, "BATCH_BYTES", 6 * SECTOR),
            (sync, "chop", functools.partial(extent.chop, limit=5)),
            (sync, "room", lambda _: room * SECTOR),
        ):
            self.patches.enter_context(mock.patch.object(module, name, value))
        self.patches.enter_context(mock.patch.object(RealFile, "read_into_nowait", self._read_into_nowait))
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
            self.advance(calls=ALL)

    @property
    def _read_into_nowait(self) -> Callable[..., None]:
        def read(file: RealFile, buffer: bytearray | memoryview, offset: int) -> None:
            if self.rng.random() < 0.3:
                raise BlockingIOError
            file.read_into(buffer, offset)

        return read

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
            self.running = Running(kind, work, done, self.drain if kind in READ_BY else lambda: None)
        except StopIteration as stop:
            done(stop.value)
            self._settle()

    def _settle(self) -> None:
        """Do what the daemon does once no work is under way."""
        self.drain()
        self.running = None
        if self.unhold_later:
            self.unhold_later = False
            run(self.volume.drop_unheld())
        self.sweep()

    def sweep(self) -> None:
        """Close what nobody can be reading."""
        garbage = self.volume.take_garbage()
        self.drain()
        for segment in garbage:
            segment.close()

    def drain(self) -> None:
        """Wait for the readers that have resolved."""
        for reader in list(self.readers):
            if reader in self.readers:
                reader.drain()
                self.end_reader(reader)

    def end_reader(self, reader: Reader) -> None:
        """Let go of what a reader held, if it is done."""
        if reader.over and reader in self.readers:
            self.readers.remove(reader)
            if reader.held is not None:
                self.let_go(reader.seq)

    def let_go(self, seq: int) -> None:
        """Hold an image once less; what was kept only for that goes as soon as no work is under way."""
        image, pins = self.held.pop(seq)
        image.pins -= 1
        if pins > 1:
            self.held[seq] = image, pins - 1
        else:
            self.drop_unheld()

    def drop_unheld(self) -> None:
        if self.running is None:
            self.drain()
            run(self.volume.drop_unheld())
            self._settle()
        else:
            self.unhold_later = True

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
        found = sorted(map(named, self.volume.snapshots))
        rest = list(found)
        for one in self.least:
            assert one in rest, f"snapshot {one} was lost"
            rest.remove(one)
        allowed = list(self.most)
        for one in found:
            assert one in allowed, f"snapshot {one} appeared"
            allowed.remove(one)
        left = [one in found for one in self.thinned if one not in self.spared]
        assert left == sorted(left), "thinned oldest first"
        return found

    def recoverable(self) -> list[int]:
        """Return all seqs that have to be recoverable, ascending."""
        if not self.copied:
            return []
        first = max(self.floor, self.origin)
        below = {seq for seq, _ in self.visible()} | set(self.held) | set(self.clone_seqs())
        return sorted({*range(first, self.oracle.head + 1), *(seq for seq in below if seq >= self.origin)})

    def clone_seqs(self) -> list[int]:
        """Return the moment of each clone, also of one that is being made or dropped."""
        return [clone.seq for clone in self.clones.values()] + [self.clone_at] * (self.clone_at >= 0)

    def sample(self) -> list[int]:
        seqs = self.recoverable()
        if len(seqs) <= 8:
            return seqs
        return sorted({seqs[0], seqs[-1], *self.rng.sample(seqs, 4)})

    # -- capture ------------------------------------------------------------------------------------------------

    @rule(
        extents=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 20)), min_size=1, max_size=5),
        zeros=st.integers(0, 5),
        jump=st.sampled_from([0, 0, 1, 7, 10**9, 10**11, HOUR_NS, -(10**9)]),
        late=st.booleans(),
        then=st.sampled_from(["", "flush", "mark", "sync", "sync", "snapshot"]),
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
            self.flush(Flag.MARK if then == "mark" else Flag.FLUSH, "abc"[len(extents) % 3], wait=False)
        if then in {"sync", "snapshot"} and self.idle and self.copied and self.flushing is None:
            if then == "sync":
                self.sync(open_snapshot=True, calls=ALL)
            else:
                self.take_snapshot("", calls=ALL)

    @precondition(lambda self: self.idle and self.copied and self.flushing is None)
    @rule(
        days=st.lists(
            st.tuples(st.integers(0, 63), st.integers(1, 20), st.sampled_from(["sync", "sync", "snapshot", "mark"])),
            min_size=2,
            max_size=5,
        ),
        jump=st.sampled_from([1, 10**11, HOUR_NS]),
    )
    def grow(self, days: list[tuple[int, int, str]], jump: int) -> None:
        """Get a past of some snapshots."""
        for start, length, then in days:
            self.write([(start, length), (start + 31, 2)], 1, jump, late=False, then=then)

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
        if name:
            self.tried_marks.add((head, name))
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
    @rule(open_snapshot=st.booleans(), calls=st.sampled_from([0, 1, 2, 3, 5, 8, ALL]), back=st.integers(0, 3))
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
    @rule(number=st.integers(0, 100), calls=st.sampled_from([0, 1, 2, 3, 5, 8, ALL, ALL]))
    def drop_snapshot(self, number: int, calls: int) -> None:
        shown = list(self.volume.snapshots)
        snapshot = shown[number % len(shown)]
        if snapshot.pinned:
            with pytest.raises(PinnedError):
                run(self.volume.drop_snapshot(snapshot))
            return
        self.least = [*self.least]
        self.least.remove(named(snapshot))

        def done(_: None) -> None:
            self.most = self.least

        self._begin("drop", self.volume.drop_snapshot(snapshot), done)
        self.advance(calls=calls)

    @precondition(lambda self: not self.idle)
    @rule(calls=st.sampled_from([1, 1, 2, 3, ALL]))
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

    # -- comparing ----------------------------------------------------------------------------------------------

    def compare(self, image: Image, seq: int) -> None:
        assert image.seq == seq
        assert image.read(0, image.size) == self.oracle.image_at(seq), f"the image at {seq} isn't history's"
        image.vrmo.check()

    def check_diff(self, a: int, b: int, found: tuple[Ints, Ints]) -> None:
        """Listed may be what a sync that was given up has saved; that was written later."""
        listed = {sector for start, stop in zip(*found, strict=True) for sector in range(start, stop)}
        assert self.oracle.differing(a, b) <= listed <= self.oracle.written(min(a, b), self.oracle.head)
