"""Cuts of the power at every operation of a workload, and what is done with what they leave."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from dmafs.core.copy import initial_copy
from dmafs.core.ondisk import Flag
from dmafs.core.resync import begin_after_stop, needs_resync, resync
from dmafs.core.sync import sync
from dmafs.core.verify import Steps
from dmafs.core.work import Work, run
from dmafs.taps.passthrough import PassThroughTap
from dmafs.units import SECTOR
from tests.crash.claims import (
    PRIMARY,
    Claims,
    Clock,
    Found,
    History,
    judge,
    look,
    observe,
    open_disk,
    unequal_files,
)
from tests.crash.cutting import cut, killed
from tests.crash.disk import Moment, Operation, SimulatedDisk, SimulatedStorage
from tests.crash.workloads import WORKLOADS, Workload
from tests.crash.world import World, small

CHOICES: Final = 6
"""Cuts at each operation: with everything lost, with everything kept, and by chance."""
AGAIN: Final = 2
"""One state in so many is opened once more."""
BEHIND: Final = 3
CHOICES_BEHIND: Final = 60
"""So many cuts at each of so many operations, where one is what matters; what is lost then is left to chance."""
LIVES: Final = 20
"""One state in so many is gone on with after its recovery."""


@dataclass
class Counts:
    """What was done."""

    operations: int = 0
    cuts: int = 0
    states: int = 0
    """Different ones that were opened."""
    kills: int = 0
    recoveries_cut: int = 0
    lives: int = 0
    """States that were gone on with."""

    def add(self, other: Counts) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Recorder:
    """Takes a moment before each operation."""

    disk: SimulatedDisk | None = None
    history: History | None = None
    moments: list[tuple[Moment, Claims, Operation]] = field(default_factory=list)

    def of(self, world: World) -> Recorder:
        self.disk, self.history = world.disk, world.history
        return self

    def __call__(self, operation: Operation) -> None:
        assert self.disk is not None
        claims = self.history.claims if self.history is not None else Claims()
        self.moments.append((self.disk.moment(), claims, operation))


class Crashes:
    """All cuts of one run of a workload."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self.counts = Counts()
        self._rng = random.Random(f"cuts {workload.name} {seed}")
        self._known: dict[int, Found] = {}
        self._seed = f"{workload.name} {seed}"
        recorder = Recorder()
        with small(self._seed):
            self._world = world = World(self._seed, windowed=workload.windowed, watch=recorder.of)
            workload.run(world)
            recorder(Operation("end", "", 0))
            world.close()
        self._moments = recorder.moments
        self.counts.operations = len(self._moments)

    def run(self) -> Counts:
        for number, (moment, claims, operation) in enumerate(self._moments):
            for choice in range(CHOICES):
                keep = choice == 1 if choice < 2 else None
                try:
                    if choice == CHOICES - 1:
                        self._kill(moment, claims)
                    else:
                        self._cut(moment, claims, keep=keep)
                except BaseException as error:
                    error.add_note(f"{self._seed}: cut {choice} before operation {number}, {operation}; {claims}")
                    raise
        return self.counts

    def run_behind(self, kind: str, folder: str) -> Counts:
        """Cut many times soon after each operation of a kind in a folder."""
        for number, (_, _, operation) in enumerate(self._moments):
            if operation.kind != kind or folder not in operation.path:
                continue
            for moment, claims, later in self._moments[number + 1 : number + 1 + BEHIND]:
                for _ in range(CHOICES_BEHIND):
                    try:
                        self._cut(moment, claims, keep=None)
                    except BaseException as error:
                        error.add_note(f"{self._seed}: cut before {later}, behind {operation} ({number}); {claims}")
                        raise
        return self.counts

    def _cut(self, moment: Moment, claims: Claims, *, keep: bool | None, depth: int = 0) -> None:
        disk = cut(moment, self._rng, keep=keep)
        self.counts.cuts += 1
        key = hash(tuple(sorted((path, hash(content)) for path, content in disk.contents().items() if path != PRIMARY)))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._recover(disk, claims, depth)
        judge(found, claims, self._world.history)

    def _kill(self, moment: Moment, claims: Claims) -> None:
        """The process ends, and while the next one opens the volume the power is cut, or right after it."""
        disk = killed(moment)
        recorder = Recorder(disk)
        disk.watch = recorder
        with small(self._seed):
            found = observe(disk, Clock())
        recorder(Operation("opened", "", 0))
        judge(found, claims, self._world.history)
        self.counts.kills += 1
        for at, _, operation in {
            id(one): one for one in (self._rng.choice(recorder.moments), recorder.moments[-1])
        }.values():
            try:
                self._cut(at, claims, keep=None)
            except BaseException as error:
                error.add_note(f"cut after a kill, before {operation}")
                raise

    def _recover(self, disk: SimulatedDisk, claims: Claims, depth: int) -> Found:
        """Open a disk, open it again, cut it while it is opened; sometimes go on with it."""
        self.counts.states += 1
        recorder = Recorder(disk)
        disk.watch = recorder
        with small(self._seed):
            found = observe(disk, Clock())
        disk.watch = None
        judge(found, claims, self._world.history)
        if found.error is not None:
            return found
        if self.counts.states % AGAIN == 0:
            before = disk.contents()
            with small(self._seed):
                open_disk(disk, Clock()).close()
            changed = unequal_files(before, disk.contents())
            assert not changed, f"recovering twice changed {changed}"
        if recorder.moments and depth < 2:
            at, _, operation = self._rng.choice(recorder.moments)
            self.counts.recoveries_cut += 1
            try:
                self._cut(at, claims, keep=None, depth=depth + 1)
            except BaseException as error:
                error.add_note(f"cut again while that was opened, before {operation}")
                raise
        if self.counts.states % LIVES == 0:
            self.counts.lives += 1
            with small(self._seed):
                self._live(disk, found)
        found.disk = None
        return found

    def _live(self, disk: SimulatedDisk, found: Found) -> None:
        """Go on as the daemon does after a stop of the kernel: in the end the newest image is the primary."""
        clock = Clock()
        clock.now += 10**12
        volume = open_disk(disk, clock)
        primary = SimulatedStorage(disk).open(PRIMARY)
        size = volume.info.size_sectors * SECTOR

        def flush(flag: Flag) -> Work[object]:
            return volume.flush(primary, flag=flag)

        if volume.info.tap == "fuse":
            run(PassThroughTap(volume, primary).redo())
            run(begin_after_stop(volume, UUID(int=3), flush))
            volume.mark_open(UUID(int=3))
            run(initial_copy(volume, primary, flush, lambda _: None))
            if needs_resync(volume):
                run(resync(volume, primary, flush, Steps(settle=lambda: flush(Flag.TICK)), lambda _: None))
            content = bytearray(size)
            primary.read_into(content, 0)
            assert bytes(volume.image(volume.journal.head).read(0, size)) == content
            volume.write(1, b"x" * SECTOR)
            run(volume.flush(primary))
        elif volume.pointers.now.copied:
            window = volume.begin_window()
            window.write([(1, 1, b"x" * SECTOR)])
            window.close(Flag.FLUSH, position=volume.journal.position + 10, retained=1)
            volume.publish(window)
            run(volume.settle())
        if volume.pointers.now.copied:
            images = look(volume, disk).images
            run(sync(volume))
            for seq, digest in look(volume, disk).images.items():
                assert images.get(seq, digest) == digest, f"a sync has changed the image at {seq}"
            volume.check()
        volume.close()
        primary.close()
        after = observe(disk, clock)
        assert after.snapshots >= found.snapshots
        for seq in after.images.keys() & found.images.keys():
            assert after.images[seq] == found.images[seq]


def crash(name: str, seed: int) -> dict[str, int]:
    """Cut one run of the workload of that name everywhere; return how much was tried."""
    return dataclasses.asdict(_crashes(name, seed).run())


def crash_behind_releases(name: str, seed: int) -> dict[str, int]:
    """Cut one run of a workload many times when segments of the forward journal have been released."""
    return dataclasses.asdict(_crashes(name, seed).run_behind("truncate", "forward/"))


def _crashes(name: str, seed: int) -> Crashes:
    return Crashes(next(one for one in WORKLOADS if one.name == name), seed)
