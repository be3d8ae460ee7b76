"""Clones under random histories: each against two byte strings, what it has to show and what is durable of it.

Claims, after every step, also while a sync or a drop of the volume underneath is under way:

1. A clone shows its moment, changed by exactly the writes to it.
2. Its moment itself never changes, whatever is written to the clone, synced and dropped, over restarts too.
3. After a stop at any file operation each sector of it is as at the last flush or as last written; so flushed bytes
   stay. A clone being made or dropped is there wholly or not at all.
4. What nobody needs any more is gone: no file and no hidden snapshot without a clone.

``DMAFS_TEST_SEED`` chooses the histories and ``DMAFS_TEST_EXAMPLES`` how many there are.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dmafs.core import overlay
from dmafs.core import segment as segments
from dmafs.core.clone import DIRECTORY, Clone
from dmafs.core.copy import initial_copy
from dmafs.core.limits import SegmentLimits, VolumeLimits
from dmafs.core.overlay import BLOCK, DAT, EXT
from dmafs.core.storage import RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import StoreFullError
from tests.model.counting import run_machine
from tests.model.cuts import Disk
from tests.model.oracle import SECTOR, Expected, Oracle, expected_clone

EXAMPLES = 200
STEPS = 50
SHM = Path("/dev/shm")  # noqa: S108 - a private directory is made in it
NAMES = ("one", "two", "three")


class CloneMachine(RuleBasedStateMachine):
    """One volume, some clones of it."""

    steps = 0
    counts: dict[str, int] = {}  # noqa: RUF012 - of all runs together

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(dir=SHM if SHM.is_dir() else None))
        self.disk = Disk()
        self.patches = contextlib.ExitStack()
        self.patches.callback(shutil.rmtree, self.path)
        self.now = 10**18
        self.rng = random.Random(0)
        self.expected: dict[str, Expected] = {}
        self.running: Work[Any] | None = None
        self.call: Any = None

    @initialize(sectors=st.integers(17, 50), quota=st.sampled_from([3, 5, 100]), pending=st.sampled_from([2, 1000]))
    def create(self, sectors: int, quota: int, pending: int) -> None:
        for module, name, value in (
            (segments, "BATCH_BYTES", 6 * SECTOR),
            (overlay, "PENDING_RUNS", pending),
            (overlay, "SCAN_BYTES", 128),
        ):
            self.patches.enter_context(mock.patch.object(module, name, value))
        self.disk.enter()
        self.patches.callback(self.disk.leave)
        self.size = sectors * SECTOR
        self.quota = quota * BLOCK
        self.limits = VolumeLimits(SegmentLimits(32, 8), images=1, reserve_bytes=1, clone_bytes=self.quota)
        self.oracle = Oracle(self.rng.randbytes(self.size))
        source, self.store = self.path / "primary", self.path / "disk"
        source.write_bytes(self.oracle.image_at(0))
        self.store.mkdir()
        Volume.create(
            RealStorage(self.store), name="disk", size_sectors=sectors, source=source, tap="fuse", created_ns=1
        )
        self._open()
        primary = open_source(source, writable=False)
        run(initial_copy(self.volume, primary, lambda flag: self.volume.flush(flag=flag), lambda _: None))
        primary.close()

    def _open(self) -> None:
        self.volume = open_volume(self.store, limits=self.limits, clock=self._clock)

    def _clock(self) -> int:
        self.now += 1
        return self.now

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # -- the volume underneath ------------------------------------------------------------------------------------

    @rule(start=st.integers(0, 49), length=st.integers(1, 20), then=st.sampled_from(["", "flush", "flush", "sync"]))
    def write(self, start: int, length: int, then: str) -> None:
        start %= self.oracle.size_sectors
        data = self.rng.randbytes(min(length, self.oracle.size_sectors - start) * SECTOR)
        self.volume.write(start, data)
        self.oracle.write(start, data, self.volume.live.time_ns)
        if then:
            run(self.volume.flush())
        if then == "sync":
            self.sync(open_snapshot=True, calls=10**6)

    @rule(open_snapshot=st.booleans(), calls=st.sampled_from([0, 1, 2, 3, 5, 10**6]))
    def sync(self, open_snapshot: bool, calls: int) -> None:  # noqa: FBT001
        if self.running is None:
            self._begin("sync", sync(self.volume, open_snapshot=open_snapshot), calls)

    @precondition(lambda self: self.running is None)
    @rule()
    def take_snapshot(self) -> None:
        run(self.volume.take_snapshot())

    @precondition(lambda self: self.running is None and len(self.volume.snapshots) > 0)
    @rule(number=st.integers(0, 100), calls=st.sampled_from([0, 1, 2, 10**6]))
    def drop_snapshot(self, number: int, calls: int) -> None:
        shown = list(self.volume.snapshots)
        self._begin("drop of a snapshot", self.volume.drop_snapshot(shown[number % len(shown)]), calls)

    def _begin(self, what: str, work: Work[Any], calls: int) -> None:
        self._count(what)
        try:
            self.call = next(work)
        except StopIteration:
            self._settle()
            return
        self.running = work
        self.advance(calls)

    @precondition(lambda self: self.running is not None)
    @rule(calls=st.sampled_from([1, 2, 10**6]))
    def advance(self, calls: int) -> None:
        for _ in range(calls):
            if self.running is None:
                return
            try:
                self.call = self.running.send(self.call())
            except StopIteration:
                self._settle()

    def _settle(self) -> None:
        self.running = None
        run(self.volume.drop_unheld())
        for segment in self.volume.take_garbage():
            segment.close()

    # -- clones ---------------------------------------------------------------------------------------------------

    def _clone(self, number: int) -> tuple[Clone, Expected]:
        name = sorted(self.expected)[number % len(self.expected)]
        clone = self.volume.clones.find(name)
        assert clone is not None
        return clone, self.expected[name]

    def _seq(self, number: int) -> int:
        seqs = [seq for seq in range(self.oracle.head + 1) if self.volume.recoverable(seq)]
        return seqs[number % len(seqs)]

    @precondition(lambda self: len(self.expected) < len(NAMES))
    @rule(number=st.integers(0, 1000))
    def make(self, number: int) -> None:
        name = next(name for name in NAMES if name not in self.expected)
        self._count("make")
        base = self.volume.image(self._seq(number))
        run(self.volume.flush())
        clone = run(self.volume.clones.create(base, name))
        self._adopt(clone)

    def _adopt(self, clone: Clone) -> None:
        self.expected[clone.name] = expected_clone(clone.seq, self.oracle.image_at(clone.seq))

    @rule(
        number=st.integers(0, 2),
        extents=st.lists(
            st.tuples(
                st.one_of(st.integers(0, 50 * SECTOR), st.integers(0, 50).map(lambda sector: sector * SECTOR)),
                st.one_of(st.integers(1, 3 * BLOCK), st.integers(1, 3).map(lambda count: count * BLOCK)),
            ),
            min_size=1,
            max_size=4,
        ),
        then=st.sampled_from(["", "", "flush", "cut", "torn"]),
        changes=st.integers(0, 4),
    )
    def use_clone(self, number: int, extents: list[tuple[int, int]], then: str, changes: int) -> None:
        """Write to a clone, made if there is none; often go on to a flush, which may be cut off."""
        if not self.expected:
            self.make(number)
        for offset, length in extents:
            self._write_clone(number, offset % self.size, length)
        if then == "flush":
            self.flush_clone(number)
        elif then:
            self.crash("flush", changes, number, torn=then == "torn")

    def _write_clone(self, number: int, offset: int, length: int) -> None:
        clone, expected = self._clone(number)
        data = self.rng.randbytes(min(length, self.size - offset))
        self._count("write")
        crowded = clone.stored_bytes
        try:
            run(clone.write(offset, data))
        except StoreFullError:
            assert clone.stored_bytes == crowded
            assert crowded + (len(data) // BLOCK + 2) * BLOCK > self.quota
            self._count("full")
            return
        assert clone.stored_bytes <= self.quota
        expected.shown[offset : offset + len(data)] = data
        if not clone.parts()[0].dirty:  # it was flushed on the way
            expected.durable[:] = expected.shown

    @precondition(lambda self: self.expected)
    @rule(number=st.integers(0, 2))
    def flush_clone(self, number: int) -> None:
        clone, expected = self._clone(number)
        self._count("flush")
        run(clone.flush())
        expected.durable[:] = expected.shown

    @precondition(lambda self: self.expected)
    @rule(number=st.integers(0, 2), offset=st.integers(0, 50 * SECTOR), length=st.integers(0, 20 * SECTOR))
    def read_clone(self, number: int, offset: int, length: int) -> None:
        clone, expected = self._clone(number)
        offset %= self.size
        assert run(clone.read(offset, length)) == expected.shown[offset : offset + length]

    @precondition(lambda self: self.expected)
    @rule(number=st.integers(0, 2))
    def drop(self, number: int) -> None:
        clone, _ = self._clone(number)
        self._count("drop")
        run(self.volume.clones.drop(clone))
        del self.expected[clone.name]
        if self.running is None:
            self._settle()

    # -- stops ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.running is None)
    @rule()
    def reopen(self) -> None:
        run(self.volume.flush())
        for clone in self.volume.clones:
            run(clone.flush())
            self.expected[clone.name].durable[:] = self.expected[clone.name].shown
        self.volume.close()
        self._open()

    @rule(
        during=st.sampled_from(["", "flush", "make", "drop", "work"]),
        changes=st.integers(0, 12),
        number=st.integers(0, 1000),
        torn=st.booleans(),
    )
    def crash(self, during: str, changes: int, number: int, torn: bool) -> None:  # noqa: FBT001
        """Stop at a file operation; with *torn* what isn't durable is lost in part."""
        before = set(self.expected)
        allowed = {frozenset(before)}
        work: Work[Any] | None = None
        if during == "make" and len(before) < len(NAMES):
            name = next(name for name in NAMES if name not in before)
            base = self.volume.image(self._seq(number))
            run(self.volume.flush())
            allowed.add(frozenset(before | {name}))
            work = self.volume.clones.create(base, name)
        elif during in {"flush", "drop"} and before:
            clone, _ = self._clone(number)
            work = clone.flush() if during == "flush" else self.volume.clones.drop(clone)
            allowed |= {frozenset(before - {clone.name})} if during == "drop" else set()
        elif during == "work":
            if self.running is None:
                run(self.volume.flush())
                self.sync(open_snapshot=number % 2 == 0, calls=number % 5)
            self._count("cut of work")
            with self.disk.fused(changes):
                self.advance(10**6)
        if work is not None:
            self._count(f"cut of {during}")
            with self.disk.fused(changes):
                run(work)
        self._restart(torn=torn)
        found = {clone.name for clone in self.volume.clones}
        assert frozenset(found) in allowed, "a clone is there wholly or not at all"
        for name in before - found:
            del self.expected[name]
        for clone in self.volume.clones:
            assert not clone.failure, clone.failure
            if clone.name not in before:
                self._adopt(clone)
            self.expected[clone.name].settle(bytes(run(clone.read(0, self.size))))

    def _die(self) -> None:
        if self.running is not None:
            self.disk.die(self.running)
            self.running = None

    def _restart(self, *, torn: bool) -> None:
        self._die()
        self.volume.close()
        if torn:
            self._count("torn")
            for path in sorted([*(self.store / "forward").iterdir(), *(self.store / "backward").iterdir()]):
                if self.rng.random() < 0.6:
                    self.disk.tear(path, self.rng)
            for path in sorted((self.store / DIRECTORY).rglob("*")):
                if path.name == EXT:
                    self.disk.tear(path, self.rng)
                    self.disk.synced[path.stat().st_ino] = path.stat().st_size
                elif path.name == DAT:
                    self.disk.tear_overlay(path, self.rng)
        self._open()
        self.oracle.cut(self.volume.journal.head)

    # -- what holds after every step --------------------------------------------------------------------------------

    @invariant()
    def clones_show_what_was_written(self) -> None:
        CloneMachine.steps += 1
        assert [clone.name for clone in self.volume.clones] == sorted(self.expected)
        for clone in self.volume.clones:
            expected = self.expected[clone.name]
            assert run(clone.read(0, self.size)) == expected.shown
            base = clone.parts()[1]
            assert clone.seq == base.seq == expected.seq
            assert base.read(0, self.size) == expected.base
            assert self.volume.recoverable(clone.seq)
            assert clone.allocated_sectors() <= self.oracle.size_sectors

    @invariant()
    def the_volume_is_well(self) -> None:
        assert self.volume.live.read(0, self.size) == self.oracle.image_at(self.oracle.head)
        if self.running is None:
            self.volume.check()

    @precondition(lambda self: self.running is None)
    @invariant()
    def nothing_is_kept_for_nobody(self) -> None:
        needed = {expected.seq for expected in self.expected.values()}
        assert {snapshot.seq for snapshot in self.volume.snapshots.all() if snapshot.hidden} <= needed
        there = {str(path.relative_to(self.store / DIRECTORY)) for path in (self.store / DIRECTORY).rglob("*")}
        files = {f"{name}/{file}" for name in self.expected for file in (DAT, EXT)}
        assert there == files | set(self.expected)

    def teardown(self) -> None:
        self._die()
        try:
            if hasattr(self, "volume"):
                self.volume.close()
        finally:
            self.patches.close()


def test_clones_show_what_was_written_to_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Claims 1 to 4 hold in every step of all histories, of which there are enough."""
    with capsys.disabled():
        run_machine(CloneMachine, examples=EXAMPLES, steps=STEPS)
    cuts = {"cut of flush", "cut of make", "cut of drop", "cut of work", "torn"}
    assert {"make", "write", "flush", "drop", "full", "sync", "drop of a snapshot", *cuts} <= set(CloneMachine.counts)
