"""Failing operations, flipped bits, writes that land elsewhere; and what a volume makes of them."""

from __future__ import annotations

import contextlib
import errno
import random
import re
from collections import Counter
from typing import Final

from dmafs.errors import CorruptionError
from dmafs.units import SECTOR
from tests.crash.claims import Clock, judge, look, observe
from tests.crash.cutting import cut, killed
from tests.crash.disk import Elsewhere, Failure, Moment, Operation
from tests.crash.workloads import Workload, workload_named
from tests.crash.world import World, small

GRAIN: Final = 64
"""One bit is flipped in each so many bytes of every file: the length of a record."""
FOREVER: Final = 1 << 30
_ON_ITSELF: Final = re.compile(r"write disk/backward/([^.]*)\.\w+ to disk/backward/\1\.\w+$")


class Fault:
    """Has operation *number* and some after it fail, or write *number* land elsewhere."""

    def __init__(self, number: int, rng: random.Random, *, failure: int = 0) -> None:
        self.number, self.failure = number, failure
        self.count = 0
        self.struck: list[str] = []
        self._rng = rng
        self._length = rng.choice((1, 1, 4, FOREVER)) if failure else 1
        self._world: World | None = None

    def arm(self, world: World) -> None:
        self._world = world
        world.disk.watch = self

    def __call__(self, operation: Operation) -> Failure | Elsewhere | None:
        self.count += 1
        if not self.number <= self.count - 1 < self.number + self._length:
            return None
        if self.failure == errno.ENOSPC and operation.kind in {"unlink", "rmdir"}:
            return None
        self.struck.append(f"{operation.kind} {operation.path}")
        if self.failure:
            done = self._rng.choice((0.0, 0.0, 0.5, 1.0) if self.failure == errno.EIO else (0.0, 0.0, 0.5))
            if operation.kind != "write" and self.failure == errno.ENOSPC:
                done = 0.0
            return Failure(self.failure, done)
        return self._elsewhere(operation)

    def _elsewhere(self, operation: Operation) -> Elsewhere | None:
        assert self._world is not None
        if operation.kind != "write":
            return None
        disk = self._world.disk
        files = sorted(inode for path, inode in disk.paths().items() if not path.endswith("/") and "/" in path)
        inode = self._rng.choice([operation.inode, *files])
        sectors = len(disk.files[inode]) // SECTOR + 1
        self.struck.append(f"to {next((path for path, one in disk.paths().items() if one == inode), 'no name')}")
        return Elsewhere(inode, self._rng.randrange(sectors) * SECTOR)


def count_operations(workload: Workload, seed: str) -> int:
    fault = Fault(FOREVER, random.Random(0))
    with small(seed):
        world = World(seed, windowed=workload.windowed)
        fault.arm(world)
        workload.run(world)
        world.close()
    return fault.count


def faults(name: str, seed: int) -> dict[str, int]:
    """Have each operation of a workload fail, in two ways; return how many did."""
    workload, text = workload_named(name), f"{name} {seed}"
    counts: Counter[str] = Counter()
    for number in range(count_operations(workload, text)):
        for failure in (errno.EIO, errno.ENOSPC):
            fault = Fault(number, random.Random(f"fault {text} {number} {failure}"), failure=failure)
            try:
                counts.update(_fail(workload, text, fault))
            except BaseException as error:
                error.add_note(f"{text}: {errno.errorcode[failure]} at operation {number}: {fault.struck[:3]}")
                raise
    return counts


def _fail(workload: Workload, seed: str, fault: Fault) -> dict[str, int]:
    """Run a workload in which something fails; then look at what is open, and at what a kill and cuts leave."""
    rng = random.Random(f"cut {seed} {fault.number} {fault.failure}")
    with small(seed):
        world = World(seed, windowed=workload.windowed)
        world.tolerant = True
        fault.arm(world)
        workload.run(world)
        world.disk.watch = None
        claims, history, volume = world.history.claims, world.history, world.volume
        if not world.dead:
            judge(look(volume, world.disk), claims, history, failing=True)
        if not volume.failure and not world.dead:
            assert volume.journal.head == history.head
            if volume.pointers.now.copied:
                volume.check()
        moment = world.disk.moment()
        world.close()
        assert world.disk.opened == 0
        for disk in (killed(moment), cut(moment, rng)):
            judge(observe(disk, Clock()), claims, history)
    return {"faults": 1, "gates shut": bool(volume.failure), "cuts": 1, "kills": 1}


def misdirections(name: str, seed: int) -> dict[str, int]:
    """Have each write of a workload land elsewhere, and start again after its end; return how many did."""
    workload, text = workload_named(name), f"{name} {seed}"
    counts: Counter[str] = Counter()
    for number in range(count_operations(workload, text)):
        fault = Fault(number, random.Random(f"elsewhere {text} {number}"))
        with small(text):
            world = World(text, windowed=workload.windowed)
            fault.arm(world)
            with contextlib.suppress(CorruptionError):  # what went astray may be read back at once
                workload.run(world)
            moment = world.disk.moment()
            world.close()
            if len(fault.struck) < 2:
                continue
            try:
                counts.update(_judge_damage(moment, world, " ".join(fault.struck), whole_sectors=True))
            except BaseException as error:
                error.add_note(f"{text}: operation {number} went astray: {fault.struck}")
                raise
        counts["misdirected"] += 1
    return counts


def _judge_damage(moment: Moment, world: World, where: str, *, whole_sectors: bool = False) -> dict[str, int]:
    """Judge what is found where one file was damaged.

    What is written to a clone has no checksums, so clones aren't looked at where it was one of theirs. Nor are images
    where what should have been the end of a sync has damaged the mirror: the sync is done again, and blocks in flux get
    new digests. Nor where a snapshot's seal has landed on the entries that it is of: they look like a torn end then.
    """
    found = observe(cut(moment, random.Random(0), keep=True), Clock(), damaged=True)
    if "clones/" in where:
        found.clones = {}
    if whole_sectors and (where.endswith("pointers to disk/mirror.img") or _ON_ITSELF.search(where)):
        found.images, found.clones = {}, {}
    judge(found, world.history.claims, world.history, damaged=True)
    detected = found.error is not None or bool(found.damaged) or None in [shown for _, shown in found.clones.values()]
    return {"detected": int(detected)}


def flips(name: str, seed: int) -> dict[str, int]:
    """Flip bits everywhere in every file that a workload leaves; return how many, and how many were detected."""
    workload, text = workload_named(name), f"{name} {seed}"
    counts: Counter[str] = Counter()
    with small(text):
        world = World(text, windowed=workload.windowed)
        workload.run(world)
        moment = world.disk.moment()
        world.close()
        rng = random.Random(f"flips {text}")
        whole = cut(moment, rng, keep=True)
        for path, inode in sorted(whole.paths().items()):
            content = whole.files.get(inode, b"") if path.startswith("disk/") else b""
            for begin in range(0, len(content), GRAIN):
                at, bit = rng.randrange(begin, min(begin + GRAIN, len(content))), rng.randrange(8)
                flipped = bytearray(content)
                flipped[at] ^= 1 << bit
                files = {**whole.files, inode: bytes(flipped)}
                damaged = Moment(files, {}, whole.names, ())
                try:
                    counts.update(_judge_damage(damaged, world, path))
                except BaseException as error:
                    error.add_note(f"{text}: bit {bit} of byte {at} of {path} flipped")
                    raise
                counts["flips"] += 1
    return counts
