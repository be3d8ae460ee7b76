"""A volume over the simulated target, and its engine."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import trio

from dmafs.core.limits import VolumeLimits
from dmafs.core.resync import needs_resync
from dmafs.core.storage import RealStorage
from dmafs.core.store import open_volume
from dmafs.core.volume import Volume
from dmafs.service.checking import VERIFY
from dmafs.service.following import FollowingEngine
from dmafs.taps.dm import DmTap
from dmafs.units import SECTOR
from tests.unit.target import Kernel, Target
from tests.unit.test_engine import until

SIZE = 64
BOOT = UUID(int=1)
TICK_S = 0.02
LOG = 4 << 20


class Rig:
    """A volume over the simulated target, and its engine, which can be killed and started again."""

    def __init__(self, path: Path, kernel: Kernel, nursery: trio.Nursery) -> None:
        self.path, self.kernel, self.nursery = path, kernel, nursery
        self.tick_s, self.log_bytes, self.reserve = TICK_S, LOG, 0
        self.alarms: list[str] = []
        self.moments: list[bytes] = []
        path.mkdir()
        Volume.create(RealStorage(path), name="disk", size_sectors=SIZE, source=kernel.source, tap="dm", created_ns=1)

    def open(self) -> FollowingEngine:
        """Open volume and tap anew."""
        volume = open_volume(self.path, limits=VolumeLimits(reserve_bytes=self.reserve))
        tap = DmTap(volume, self.path, log_bytes=self.log_bytes)
        self.engine = FollowingEngine(volume, tap, tick_s=self.tick_s, limiter=trio.CapacityLimiter(8))
        self.engine.alarm = self.alarms.append
        return self.engine

    async def start(self, *, copied: bool = True) -> FollowingEngine:
        """Open, recover and run."""
        self.open()
        await self.engine.recover(BOOT)
        self.tasks = trio.CancelScope()
        await self.nursery.start(self._run)
        if copied:
            await until(lambda: self.engine.volume.pointers.now.copied)
        return self.engine

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        self.ended = trio.Event()
        with self.tasks:
            await self.engine.run(task_status=task_status)
        self.ended.set()

    async def kill(self) -> None:
        """End the tasks wherever they are, and close the files; nothing is flushed."""
        self.tasks.cancel()
        await self.ended.wait()
        self.engine.volume.close()
        self.engine.tap.close()

    async def stop(self) -> None:
        """End in order."""
        self.tasks.cancel()
        await self.ended.wait()
        await self.engine.close()

    @property
    def device(self) -> Target:
        assert self.kernel.device is not None
        return self.kernel.device

    @property
    def volume(self) -> Volume:
        return self.engine.volume

    def is_clean(self) -> bool:
        """Say whether the volume was closed in order."""
        return self.volume.pointers.now.clean

    def flush(self) -> None:
        """Have a moment that is to be a point."""
        self.kernel.flush()
        self.moments.append(bytes(self.kernel.disk))

    async def newest(self) -> bytes:
        """Return the newest image, once everything is in it."""
        await self.engine.settle()
        return bytes(await self.engine.read(self.volume.live, 0, SIZE * SECTOR))

    async def points(self) -> list[bytes]:
        """Return all images that can be had, oldest first."""
        head = self.volume.journal.head
        images = [self.volume.image(seq) for seq in range(head + 1) if self.volume.recoverable(seq)]
        return [bytes(await self.engine.read(image, 0, SIZE * SECTOR)) for image in images]

    async def whole(self) -> None:
        """Wait for the end of the gap; then image and primary are equal, and a verify says so."""
        await until(lambda: self.kernel.device is None or not self.device.disabled)  # a loss has been noticed
        await until(lambda: not needs_resync(self.volume) and self.engine._loss is None)
        await until(lambda: self.engine.checking.current is None)
        assert await self.newest() == self.kernel.disk
        check = self.engine.checking.begin(VERIFY)
        with trio.fail_after(10):
            await check.done.wait()
        assert check.failure is None
        assert check.found is not None
        assert check.found.sectors == 0
        self.volume.check()
