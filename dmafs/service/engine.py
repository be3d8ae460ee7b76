"""The engine of one volume: the synchronous core under trio.

What runs where: capture, resolving and all in-memory changes on trio's thread, without an ``await`` in between; bulk
copies, fsyncs and reads that have to wait in threads. Work of the core is driven by ``driver.py``.

Rules:

1. Flushes are group commits: one at a time, and each covers everybody who asked before it began.
2. Syncs, snapshots and drops exclude each other (``_maintenance``), not capture and not reads.
3. Work isn't cancelled, but for syncs, drops, copies, verifies and resyncs: these may stop between two steps when the
   daemon ends. Opening the store again finishes or forgets what they began.
4. Writes, flushes and the drop of a clone exclude each other, with a lock for each clone.
5. While a window of a log is being journaled (following.py) nothing else is: whoever journals something, or sets a sync
   indicator, holds ``appending``.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import UUID

import trio

from dmafs import answers
from dmafs.core.clone import Clone
from dmafs.core.copy import initial_copy
from dmafs.core.gate import FAILED_HINT
from dmafs.core.image import Image
from dmafs.core.ondisk import Flag
from dmafs.core.policy import VolumeFacts, facts_of, has_past
from dmafs.core.resync import distrust
from dmafs.core.scrub import Rest
from dmafs.core.snapshot import Snapshot
from dmafs.core.storage import File
from dmafs.core.sync import stops_of, sync
from dmafs.core.throttle import Throttle
from dmafs.core.verify import Steps
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import CorruptionError
from dmafs.service.checking import Checking
from dmafs.service.driver import Await, Result
from dmafs.service.reading import Reading
from dmafs.service.tasks import RETRY_S, TROUBLE, Progress, Tap
from dmafs.service.turns import Turns
from dmafs.units import SECTOR, format_bytes

log = logging.getLogger(__name__)


class Engine(Reading):
    """One volume in a daemon."""

    def __init__(
        self, volume: Volume, tap: Tap, *, tick_s: float, limiter: trio.CapacityLimiter, resync_rate: int = 0
    ) -> None:
        """Drive *volume*; threads are taken from *limiter*. Checks read *resync_rate* bytes a second; 0 is no limit."""
        super().__init__(volume, limiter)
        self.tap = tap
        self.tick_s = tick_s
        self.appending = Turns()
        self.synced: File | None = None
        """What a flush makes durable beside the journal; a tap that writes the primary itself sets it."""
        self._commit = Turns()
        self.flushes = self._committed = 0
        self.commits = 0
        self._maintenance = trio.Lock()
        self._clone_locks: defaultdict[int, trio.Lock] = defaultdict(trio.Lock)  # by serial
        self.progress = Progress(volume.info.size_sectors)
        self.checking = Checking(self, bytes_per_s=resync_rate)
        self.syncing = False
        self.copying = trio.Lock()
        self.copy_scope = trio.CancelScope()

    # -- tasks --------------------------------------------------------------------------------------------------

    async def recover(self, boot_id: UUID) -> int:
        """Bring journal and primary together after an unclean stop; return how many events were written again.

        *boot_id* is the running kernel's: if it stopped itself meanwhile, a gap may begin.
        """
        await self.call(partial(self.volume.mark_open, boot_id))
        return 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the volume's tasks until cancelled."""
        async with trio.open_nursery() as nursery:
            for task in self.tasks():
                nursery.start_soon(task)
            task_status.started()

    def tasks(self) -> list[Callable[[], Awaitable[None]]]:
        """Return what runs as long as the engine does."""
        return [self._tick, self._drop_unheld, self._copy, self.checking.run, self._warm, self._mind_failure]

    async def _tick(self) -> None:
        """Set a sync indicator when there were writes and nobody flushed."""
        while True:
            await trio.sleep(self.tick_s)
            if self.volume.journal.durable < self.volume.journal.head and not self.volume.failure:
                try:
                    await self.flush(Flag.TICK)
                except TROUBLE as error:
                    log.error("volume %s: tick failed: %s", self.volume.info.name, error)

    async def _mind_failure(self) -> None:
        """When the volume has become read-only, tell it once, and have the next start compare its source."""
        while not self.volume.failure:  # noqa: ASYNC110 - the core knows no events, and a tick is soon enough
            await trio.sleep(self.tick_s)
        log.error("volume %s is read-only from now on: %s; %s", self.volume.info.name, self.volume.failure, FAILED_HINT)
        try:
            await self.call(partial(distrust, self.volume))
        except OSError as error:
            log.error("volume %s: the next start can't be told to compare the source: %s", self.volume.info.name, error)

    async def _drop_unheld(self) -> None:
        """Finish drops when the last holder of an image is gone."""
        while True:
            await self.drop_wanted.wait()
            self.drop_wanted = trio.Event()
            async with self._maintenance:
                try:
                    await self.drive(self.volume.drop_unheld(), drain=True, stoppable=True)
                    await self._sweep()
                except TROUBLE as error:
                    log.error("volume %s: drop failed: %s", self.volume.info.name, error)

    async def _copy(self) -> None:
        """Make the initial copy, or go on with it."""
        self.progress.begin(self.volume.pointers.now.copied_sectors)
        while not self.volume.pointers.now.copied:
            work = initial_copy(self.volume, self.tap.primary, self.flush_step, self.progress.update)
            try:
                with trio.CancelScope() as self.copy_scope:
                    async with self.copying:  # within the scope: who cancels that, and then waits for this, is next
                        await self.drive(work, stoppable=True)
            except TROUBLE as error:
                if not self.copy_scope.cancel_called:
                    log.error("volume %s: initial copy failed: %s; trying again", self.volume.info.name, error)
                    await trio.sleep(RETRY_S)
                    continue
            if self.copy_scope.cancel_called:
                self.progress.begin(0)
                continue
            log.info(
                "volume %s: initial copy complete, %s at %s/s",
                self.volume.info.name,
                format_bytes(self.progress.total * SECTOR),
                format_bytes(int(self.progress.bytes_per_s)),
            )
        self.progress.update(self.progress.total)

    async def _warm(self) -> None:
        """Make what opening images needs, so that none waits for it: at first, and when more of history is finished."""
        told = ""
        while True:
            finished = self._finished()
            try:
                await self.drive(self.volume.warm(), stoppable=True)
            except TROUBLE as error:  # who opens an image that needs it gets the error
                if told != str(error):
                    log.error("volume %s: the index can't be made: %s", self.volume.info.name, error)
                told = str(error)
            self.mind_excess()
            while self._finished() == finished:  # noqa: ASYNC110 - the core knows no events, and a tick is soon enough
                await trio.sleep(self.tick_s)

    def _finished(self) -> tuple[int, int]:
        """Return what changes when a segment is sealed or a snapshot may be closed."""
        return self.volume.journal.sealed, self.volume.pointers.now.mirror_seq

    def flush_step(self, flag: Flag) -> Work[object]:
        """Flush, as steps of work. To wait for the tap can be cancelled: nobody may read what it waits for."""
        yield Await(self.exhaust if flag == Flag.COPIED else self.settle, stoppable=True)
        return (yield Await(partial(self.secure, flag)))

    def steps(self, throttle: Throttle) -> Steps:
        """Return what a comparison needs; but for the lock its steps can be cancelled."""

        def settle() -> Work[object]:
            return (yield Await(self.exhaust, stoppable=True))

        def pause(seconds: float) -> Work[object]:
            return (yield Await(partial(trio.sleep, seconds), stoppable=True))

        def append(change: Callable[[], None]) -> Work[object]:
            yield Await(self.appending.acquire)
            try:
                change()
            finally:
                self.appending.release()
            return None

        return Steps(settle, pause, throttle, append)

    def rest(self, throttle: Throttle) -> Rest:
        """Return what a scrub needs; all of its steps can be cancelled."""

        def at_rest(work: Work[Any]) -> Work[Any]:
            yield Await(self._maintenance.acquire, stoppable=True)
            try:
                return (yield from work)
            finally:
                self._maintenance.release()

        def pause(seconds: float) -> Work[object]:
            return (yield Await(partial(trio.sleep, seconds), stoppable=True))

        return Rest(at_rest, pause, throttle)

    async def examine(self, work: Work[Result]) -> Result:
        """Do work whose calls read images, and that may be ended between two of them."""
        return await self.drive(work, reads=True, stoppable=True)

    # -- capture ------------------------------------------------------------------------------------------------

    async def flush(self, flag: Flag = Flag.FLUSH) -> None:
        """Make all writes until now durable in journal and primary; somebody else's commit may cover this one."""
        await self.settle()
        await self.secure(flag)

    async def secure(self, flag: Flag = Flag.FLUSH) -> None:
        """Make durable what is in the journal now, without waiting for the tap: that may be waiting for space."""
        self.flushes += 1
        mine = self.flushes
        async with self._commit:
            if self._committed >= mine and flag in (Flag.FLUSH, Flag.TICK):
                return
            upto = self.flushes
            await self.commit(flag)
            self._committed = upto

    async def end_gap(self, is_over: Callable[[], bool]) -> None:
        """End a gap, if it *is_over* when everything in the journal is made durable; the caller has settled."""
        async with self._commit:
            await self.commit(Flag.RESYNCED, only_if=is_over)

    async def commit(self, flag: Flag, *, only_if: Callable[[], bool] = lambda: True) -> None:
        """Make durable what is in the journal; only one at a time. *only_if* false makes the indicator a tick's."""
        async with self.appending:
            self.commits += not self.volume.journal.is_clean()
            self.volume.indicate(flag if only_if() else Flag.TICK)
        await self.drive(self.volume.settle(self.synced))
        self.mind_excess()

    async def settle(self, *, mark: str = "") -> None:
        """Have all writes that are complete on the primary be in the journal: with a pass-through they are."""

    async def exhaust(self) -> None:
        """Settle; where that can't be had, wait at least for what has been flushed."""
        await self.settle()

    def mark(self, name: str) -> None:
        """Set a named mark now; the caller holds ``appending``, and ``settle`` was told the name."""
        self.volume.indicate(Flag.MARK, name)

    @property
    def loss(self) -> str:
        """Return why writes aren't captured, empty as long as they are."""
        return ""

    @property
    def lag_s(self) -> float:
        """Return the age of the oldest write that isn't durable in the journal, in seconds; 0 if there is none."""
        return self.volume.journal.pending_ns() / 1e9

    # -- clones -------------------------------------------------------------------------------------------------

    async def create_clone(self, base: Image, name: str) -> Clone:
        """Make *base*, which the caller holds, durable, and a clone of it."""
        if base.seq > self.volume.journal.durable:
            await self.flush()
        return await self.drive(self.volume.clones.create(base, name))

    async def drop_clone(self, clone: Clone) -> None:
        """Drop a clone that nobody has open; what was kept only for it is dropped in the background."""
        self.volume.clones.require_idle(clone)
        async with self._clone_locks[clone.serial]:
            await self.drive(self.volume.clones.drop(clone))
        self._clone_locks.pop(clone.serial, None)
        self.drop_wanted.set()

    async def read_clone(self, clone: Clone, offset: int, length: int) -> memoryview:
        """Return bytes of a clone, fewer at its end."""
        try:
            return await self.drive(clone.read(offset, length), reads=True)
        except CorruptionError:
            self.volume.statistics.damaged_reads += 1
            raise

    async def write_clone(self, clone: Clone, offset: int, data: bytes) -> None:
        """Write within a clone."""
        async with self._clone_locks[clone.serial]:
            await self.drive(clone.write(offset, data), reads=True)

    async def flush_clone(self, clone: Clone) -> None:
        """Make all writes to a clone durable."""
        async with self._clone_locks[clone.serial]:
            await self.drive(clone.flush())

    # -- maintenance --------------------------------------------------------------------------------------------

    async def sync(self) -> int:
        """Flush, then move the mirror to that moment, and keep the mirror's old one; return the mirror's new seq."""
        await self.settle()
        async with self._maintenance:  # not while the tap settles: for that it may need a sync that makes space
            await self.secure()
            return await self._sync(sync(self.volume))

    async def sync_to(self, target: int) -> int:
        """Move the mirror to a sync indicator as a policy wants it: which moments stay, snapshots alone decide.

        But where there is no snapshot yet, the mirror's moment becomes one: history doesn't vanish as a whole.
        """
        async with self._maintenance:
            return await self._sync(sync(self.volume, target=target, open_snapshot=not has_past(self.volume)))

    async def sync_early(self) -> None:
        """Sync all that is in the journal, since space is short; nothing where that would free nothing."""
        if self.volume.failure or self.volume.journal.head == self.volume.pointers.now.mirror_seq:
            return
        await self.secure()
        stops = stops_of(self.volume).seqs
        if len(stops):
            await self.sync_to(int(stops[-1]))

    async def _sync(self, work: Work[int]) -> int:
        self.syncing = True
        begun = trio.current_time()
        try:
            seq: int = await self.drive(work, drain=True, stoppable=True)
        finally:
            self.syncing = False
        self.volume.statistics.sync_durations.add(trio.current_time() - begun)
        await self._sweep()
        return seq

    def facts(self) -> VolumeFacts:
        """Return what a sync policy has to know."""
        storage = self.volume.storage
        short = storage.free_bytes() < self.volume.limits.reserve_bytes
        return facts_of(
            self.volume, free=storage.free_share(), starved=short and not self.volume.failure, busy=self.syncing
        )

    async def take_snapshot(self, name: str) -> Snapshot:
        """Flush, and make that moment a snapshot. Doesn't wait for a sync that is under way."""
        self.volume.require_snapshot(name)
        await self.settle()
        with contextlib.ExitStack() as kept:
            async with self.appending:
                seq = kept.enter_context(self.marked())
            return await self.snapshot_at(seq, name)

    @contextmanager
    def marked(self) -> Iterator[int]:
        """Set a sync indicator now, and have syncs not pass it; yields it. The caller holds ``appending``."""
        seq = self.volume.indicate().seq
        with self.volume.reserved(seq):
            yield seq

    async def snapshot_at(
        self, seq: int, name: str, *, instant_ns: int | None = None, frozen: bool = False
    ) -> Snapshot:
        """Make a marked moment durable and a snapshot."""
        await self.flush()
        return await self.drive(self.volume.snapshot_at(seq, name, instant_ns=instant_ns, frozen=frozen))

    async def drop_snapshot(self, snapshot: Snapshot) -> None:
        """Drop a snapshot, or hide it until its image is closed or a sync that is under way has ended.

        What is left to do then, or when the caller gives up, is done in the background.
        """
        try:
            if self._maintenance.locked():
                return await self.drive(self.volume.hide_snapshot(snapshot))
            async with self._maintenance:
                await self.drive(self.volume.drop_snapshot(snapshot), drain=True, stoppable=True)
                await self._sweep()
        finally:
            if snapshot.hidden:
                self.drop_wanted.set()

    async def drop_snapshots(self, snapshots: list[Snapshot]) -> None:
        """Drop several snapshots, given oldest first, but those that are pinned, dropped or still being taken.

        In this order each entry is copied once: youngest first, one would go through every snapshot of a run. The space
        of each is free before the next is merged. One that is damaged is passed over, and raised at the end.
        """
        damage = None
        for snapshot in snapshots:
            async with self._maintenance:
                if snapshot.hidden or snapshot.pinned or snapshot.busy:
                    continue
                try:
                    await self.drive(self.volume.drop_snapshot(snapshot), drain=True, stoppable=True)
                except CorruptionError as error:
                    damage = damage or error
                await self._sweep()
        if damage is not None:
            raise damage

    async def do(self, work: Work[Result]) -> Result:
        """Drive work that touches nothing that is read."""
        return await self.drive(work)

    async def _sweep(self) -> None:
        """Close the journals that nobody can be reading or syncing any more."""
        garbage = self.volume.take_garbage()
        await self.drain()
        async with self._commit:
            for segment in garbage:
                segment.close()

    async def close(self) -> None:
        """Make everything durable and mark the volume clean; the tasks have ended, and nobody writes any more."""
        with trio.CancelScope(shield=True):
            await self._flush_clones()
            try:
                await self.finish()
            except TROUBLE as error:
                log.error("volume %s: not closed in order: %s", self.volume.info.name, error)
            self.volume.close()
            self.tap.close()

    def device_report(self) -> answers.Device | None:
        """Return what there is to say about the volume's mapped device; None for taps without one."""
        return None

    async def finish(self) -> None:
        """Make everything durable, and record that journal and primary agree."""
        await self.flush()
        await self.call(self.volume.mark_clean)

    async def _flush_clones(self) -> None:
        for clone in self.volume.clones:
            if clone.failure:
                continue
            try:
                await self.flush_clone(clone)
            except TROUBLE as error:
                log.error("volume %s: clone %s not flushed: %s", self.volume.info.name, clone.name, error)
