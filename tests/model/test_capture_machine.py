"""Capture from a log under random histories of a device, its log and the daemon, measured against what was written.

Claims, after every step, whenever the process ends, also in the middle of a window:

1. The image at the end of a window holds everything that a flush or FUA had made safe before it, and of each sector a
   write that a power cut could have left then; where it doesn't, arbitration has reported a doubt.
2. When all is complete and captured, the newest image is the primary, byte for byte.
3. Windows follow each other without a hole and without one twice, over ends of the process, new logs, full stores.
4. A moment that could be had shows the same bytes for ever.
5. Nothing is called lost but what the target didn't log; after that loss there is a gap, and then all is exact again.

``DMAFS_TEST_SEED`` chooses the histories and ``DMAFS_TEST_EXAMPLES`` how many there are.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dmafs.units import SECTOR
from tests.model.capture_world import How, World
from tests.model.counting import run_machine
from tests.model.logwrites import Discards, Kind

EXAMPLES = 150
STEPS = 50
KINDS: list[Kind] = ["plain", "plain", "plain", "fua", "fua", "discard", "flush"]


class CaptureMachine(RuleBasedStateMachine):
    """A world, and the order in which things happen in it."""

    steps = 0
    counts: dict[str, int] = {}  # noqa: RUF012 - of all runs together

    @initialize(
        seed=st.integers(0, 1 << 32),
        sector_bytes=st.sampled_from([SECTOR, SECTOR, 4096]),
        discards=st.sampled_from(["zero", "zero", "kept", "unknown"]),
        window_rows=st.sampled_from([3, 1 << 20, 1 << 20]),
        sectors=st.integers(8, 48),
    )
    def create(self, seed: int, sector_bytes: int, discards: Discards, window_rows: int, sectors: int) -> None:
        self.rng = random.Random(seed)
        self.world = World(
            self.rng, sectors=sectors, sector_bytes=sector_bytes, discards=discards, window_rows=window_rows
        )

    @property
    def attached(self) -> bool:
        return self.world.device.target is not None

    @precondition(lambda self: self.attached)
    @rule(count=st.integers(1, 12))
    def live(self, count: int) -> None:
        """Have bios come, get to the disk, complete, and be logged."""
        world, rng = self.world, self.rng
        for _ in range(count):
            act = rng.random()
            if act < 0.35:
                kind = rng.choice(KINDS)
                length = rng.randint(1, 5) if kind != "flush" or rng.random() < 0.3 else 0
                world.device.submit(kind, rng.randrange(400), length)
            elif act < 0.5:
                world.device.reach(rng.randrange(100), rng.randint(1, 4))
            elif act < 0.8:
                world.complete(rng.randrange(100))
            else:
                assert world.device.target is not None
                world.device.target.write(rng.randint(1, 5))

    @precondition(lambda self: self.attached)
    @rule(script=st.integers(10, 60))
    def interleave(self, script: int) -> None:
        """Have the device and the daemon go on by turns."""
        for _ in range(script):
            if self.rng.random() < 0.6:
                self.live(1)
            elif self.rng.random() < 0.1:
                self.world.begin_barrier()
            else:
                self.world.step()

    @precondition(lambda self: self.attached)
    @rule(
        second=st.sampled_from(["plain", "fua", "fua", "discard"]),
        flush=st.sampled_from(["before", "between", "behind"]),
        then=st.sampled_from(["", "kill", "kill", "rotate", "barriers"]),
    )
    def overwrite(self, second: Kind, flush: str, then: str) -> None:
        """Write something twice, with a flush somewhere, and something else before it all is in the log."""
        world, device, start = self.world, self.world.device, self.rng.randrange(400)
        self._do("plain", start)
        if flush != "behind":
            device.submit("flush")
        if flush == "before":
            world.complete(len(device.under_way) - 1)
        self._do(second, start)
        self._mark_and_capture()
        if then == "kill":
            world.kill(0, how="now")
        elif then == "rotate":
            world.rotate()
        elif then == "barriers":
            world.begin_barrier()
        world.capture()

    def _do(self, kind: Kind, start: int) -> None:
        device = self.world.device
        if device.submit(kind, start, 2) is not None:
            self.world.complete(len(device.under_way) - 1)

    def _mark_and_capture(self) -> None:
        target = self.world.device.target
        if self.rng.random() < 0.7 and target is not None:
            target.mark("overwritten")
            target.drain()
            self.world.capture()

    @precondition(lambda self: self.attached)
    @rule(kind=st.sampled_from(["fua", "flush"]))
    def peep(self, kind: Kind) -> None:
        """Look at the log after each piece of it that becomes visible."""
        self._do(kind, self.rng.randrange(400))
        target = self.world.device.target
        while target is not None and (target.pieces or target.logging):
            target.write(1)
            self.world.capture()
            target = self.world.device.target

    @precondition(lambda self: self.attached)
    @rule(changes=st.integers(0, 5))
    def night(self, changes: int) -> None:
        """Have everything be synced, and the process end in the middle of the next window."""
        self.quiesce()
        self.world.sync(open_snapshot=True)
        self.live(12)
        self.world.begin_barrier()
        while self.world.device.under_way:
            self.world.complete(0)
        if self.attached and self.world.device.target is not None:
            self.world.device.target.drain()
        self.world.kill(changes, how="cut")

    @rule()
    def step(self) -> None:
        self.world.step()

    @rule()
    def capture(self) -> None:
        while self.world.capture():
            pass

    @precondition(lambda self: self.attached)
    @rule(name=st.sampled_from(["", "", "noon", "ä/b c"]))
    def barrier(self, name: str) -> None:
        self.world.begin_barrier(name)

    @precondition(lambda self: self.attached)
    @rule(text=st.sampled_from(["mkfs", "dmafs-like", "-"]))
    def mark(self, text: str) -> None:
        """Have somebody else set a mark."""
        assert self.world.device.target is not None
        self.world.device.target.mark(text)

    @rule(changes=st.integers(0, 6), how=st.sampled_from(["now", "cut", "late"]))
    def kill(self, changes: int, how: How) -> None:
        if how == "late" and self.world.device.target is not None:  # so that there is a window
            self._do("fua", self.rng.randrange(400))
            self.world.device.target.mark("late")
            self.world.device.target.drain()
        self.world.kill(changes, how=how)

    @rule(changes=st.integers(0, 4))
    def run_full(self, changes: int) -> None:
        """Have the store be full for one change of a file."""
        self.world.fuse.set(changes, "full")
        self.world.capture()
        self.world.fuse.set(-1, "")

    @rule()
    def settle(self) -> None:
        self.world.settle()

    @rule(open_snapshot=st.booleans())
    def sync(self, open_snapshot: bool) -> None:  # noqa: FBT001
        self.world.sync(open_snapshot=open_snapshot)

    @rule()
    def snapshot(self) -> None:
        self.world.snapshot()

    @rule(attach=st.sampled_from([True, True, False]))
    def rotate(self, attach: bool) -> None:  # noqa: FBT001
        self.world.rotate(attach=attach)

    @precondition(lambda self: self.attached and self.rng.random() < 0.3)
    @rule()
    def fail(self) -> None:
        """Have the log's disk fail with the next write's data."""
        assert self.world.device.target is not None
        self.world.device.target.failing = True

    @rule()
    def tick(self) -> None:
        self.world.tick()

    @rule()
    def quiesce(self) -> None:
        self.world.quiesce()
        if self.world.gap:
            self.world.end_gap()

    @invariant()
    def history_stays(self) -> None:
        if hasattr(self, "world"):
            CaptureMachine.steps += 1
            self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if not self.world.wrong:
                self.quiesce()
                self.world.check(every=True)
            for what, count in self.world.counts.items():
                self.counts[what] = self.counts.get(what, 0) + count
        finally:
            self.world.close()


def test_what_is_captured_is_what_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Claims 1 to 5 hold in every step of all histories, of which there are enough."""
    with capsys.disabled():
        run_machine(CaptureMachine, examples=EXAMPLES, steps=STEPS)
    seen = {"corrected", "doubted", "full", "killed", "killed behind a window", "lost", "quiet", "rotated", "detached"}
    assert seen | {"synced", "windows"} <= set(CaptureMachine.counts)
