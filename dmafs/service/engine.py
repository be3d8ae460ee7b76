"""The engine of one volume: the synchronous core under trio.

What runs where: capture, resolving and all in-memory changes on trio's thread, without an ``await`` in between; bulk
copies, fsyncs and reads that have to wait in threads. Work of the core is driven by ``_drive``.

Rules:

1. Flushes are group commits: one at a time, and each covers everybody who asked before it began.
2. Syncs, snapshots and drops exclude each other (``_maintenance``), not capture and not reads.
3. Before each step of a sync or a drop, readers that resolved before are waited for: nothing is overwritten or closed
   under a reader.
4. Work isn't cancelled, but for syncs, drops, copies, verifies and resyncs: these may stop between two steps when the
   daemon ends. Opening the store again finishes or forgets what they began.
5. Writes, flushes and the drop of a clone exclude each other, with a lock for each clone.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar
from uuid import UUID

import trio
import xxhash

from dmafs.core.clone import Clone
from dmafs.core.copy import initial_copy
from dmafs.core.image import Image
from dmafs.core.ondisk import Flag
from dmafs.core.policy import VolumeFacts, facts_of, has_past
from dmafs.core.resync import begin_after_stop
from dmafs.core.snapshot import Snapshot
from dmafs.core.sync import stops_of, sync
from dmafs.core.throttle import Throttle
from dmafs.core.verify import Steps
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import CorruptionError
from dmafs.service.checking import Checking
from dmafs.service.tasks import RETRY_S, TROUBLE, Progress
from dmafs.taps.passthrough import PassThroughTap
from dmafs.units import SECTOR, format_bytes

log = logging.getLogger(__name__)

Result = TypeVar("Result")

DIGEST_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class _Await:
    """A step of work that is asynchronous itself, and not a reader; a *stoppable* one can be cancelled meanwhile."""

    function: Callable[[], Any]
    stoppable: bool = False

    def __call__(self) -> None:
        raise AssertionError("only an engine can drive this step")


class Engine:
    """One volume in a daemon."""

    def __init__(
        self,
        volume: Volume,
        tap: PassThroughTap,
        *,
        tick_s: float,
        limiter: trio.CapacityLimiter,
        resync_rate: int = 0,
    ) -> None:
        """Drive *volume*; threads are taken from *limiter*. Checks read *resync_rate* bytes a second; 0 is no limit."""
        self.volume = volume
        self.tap = tap
        self._tick_s = tick_s
        self.limiter = limiter
        self._commit = trio.Lock()
        self._requested = self._committed = 0
        self.commits = 0
        self._maintenance = trio.Lock()
        self._epoch = 0
        self._readers: Counter[int] = Counter()
        self._reader_left = trio.lowlevel.ParkingLot()
        self._drop_wanted = trio.Event()
        self._clone_locks: defaultdict[int, trio.Lock] = defaultdict(trio.Lock)  # by serial
        self.progress = Progress(volume.info.size_sectors)
        self.checking = Checking(self, bytes_per_s=resync_rate)
        self.syncing = False

    # -- tasks --------------------------------------------------------------------------------------------------

    async def recover(self, boot_id: UUID) -> int:
        """Bring the primary up to the journal after an unclean stop; return how many events were written again.

        *boot_id* is the running kernel's: if it stopped itself meanwhile, a gap begins.
        """
        redone: int = await self._drive(self.tap.redo())
        await self._drive(begin_after_stop(self.volume, boot_id, self.flush_step))
        await self._call(partial(self.volume.mark_open, boot_id))
        return redone

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the volume's tasks until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick)
            nursery.start_soon(self._drop_unheld)
            nursery.start_soon(self._copy)
            nursery.start_soon(self.checking.run)
            nursery.start_soon(self._warm)
            task_status.started()

    async def _tick(self) -> None:
        """Set a sync indicator when there were writes and nobody flushed."""
        while True:
            await trio.sleep(self._tick_s)
            if self.volume.journal.durable < self.volume.journal.head and not self.volume.failure:
                try:
                    await self.flush(Flag.TICK)
                except TROUBLE as error:
                    log.error("volume %s: tick failed: %s", self.volume.info.name, error)

    async def _drop_unheld(self) -> None:
        """Finish drops when the last holder of an image is gone."""
        while True:
            await self._drop_wanted.wait()
            self._drop_wanted = trio.Event()
            async with self._maintenance:
                try:
                    await self._drive(self.volume.drop_unheld(), drain=True, stoppable=True)
                    await self._sweep()
                except TROUBLE as error:
                    log.error("volume %s: drop failed: %s", self.volume.info.name, error)

    async def _copy(self) -> None:
        """Make the initial copy, or go on with it."""
        self.progress.begin(self.volume.pointers.now.copied_sectors)
        while not self.volume.pointers.now.copied:
            work = initial_copy(self.volume, self.tap.primary, self.flush_step, self.progress.update)
            try:
                await self._drive(work, stoppable=True)
            except TROUBLE as error:
                log.error("volume %s: initial copy failed: %s; trying again", self.volume.info.name, error)
                await trio.sleep(RETRY_S)
                continue
            log.info(
                "volume %s: initial copy complete, %s at %s/s",
                self.volume.info.name,
                format_bytes(self.progress.total * SECTOR),
                format_bytes(int(self.progress.bytes_per_s)),
            )
        self.progress.update(self.progress.total)

    async def _warm(self) -> None:
        """Make what opening images needs, so that the first one doesn't wait for it."""
        try:
            await self._drive(self.volume.warm(), stoppable=True)
        except TROUBLE as error:  # who opens an image that needs it gets the error
            log.error("volume %s: the index can't be made: %s", self.volume.info.name, error)
        self._mind_excess()

    def flush_step(self, flag: Flag) -> Work[object]:
        """Flush, as a step of work."""
        return (yield _Await(partial(self.flush, flag)))

    def steps(self, throttle: Throttle) -> Steps:
        """Return what a comparison needs; both steps can be cancelled."""

        def settle() -> Work[object]:
            return (yield _Await(self.settle, stoppable=True))

        def pause(seconds: float) -> Work[object]:
            return (yield _Await(partial(trio.sleep, seconds), stoppable=True))

        return Steps(settle, pause, throttle)

    async def settle(self) -> None:
        """Return when all writes that are complete on the primary now are events: with this tap they always are."""
        await trio.lowlevel.checkpoint()

    async def examine(self, work: Work[Result]) -> Result:
        """Do work whose calls read images, and that may be ended between two of them."""
        return await self._drive(work, reads=True, stoppable=True)

    async def _drive(
        self, work: Work[Result], *, drain: bool = False, reads: bool = False, stoppable: bool = False
    ) -> Result:
        """Drive work of the core: each call it yields in a thread, this thread free for everything else meanwhile.

        With *drain* readers are waited for before each call; with *reads* each call in a thread is a reader itself.
        Only *stoppable* work can be cancelled, and that between two calls.
        """
        with trio.CancelScope(shield=not stoppable):
            result = await self._drive_calls(work, drain=drain, reads=reads)
        return result  # noqa: RET504 - not inside: for all mypy knows a scope swallows exceptions

    async def _drive_calls(self, work: Work[Result], *, drain: bool, reads: bool) -> Result:
        try:
            call = next(work)
            while True:
                try:
                    with self._reading() if reads and not isinstance(call, _Await) else contextlib.nullcontext():
                        if drain:
                            await self._drain()
                        answer = await self._call(call)
                except Exception as error:  # noqa: BLE001 - passed on: the work decides
                    call = work.throw(error)
                else:
                    call = work.send(answer)
        except StopIteration as stop:
            result: Result = stop.value
            return result
        finally:
            work.close()

    async def _call(self, call: Callable[[], Any]) -> object:
        """Run a call in a thread; once begun it is waited for, unless it is a step that says otherwise."""
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=not (isinstance(call, _Await) and call.stoppable)):
            if isinstance(call, _Await):
                answer = await call.function()
            else:
                answer = await trio.to_thread.run_sync(call, limiter=self.limiter)
        return answer

    # -- capture ------------------------------------------------------------------------------------------------

    async def flush(self, flag: Flag = Flag.FLUSH) -> None:
        """Make all writes until now durable in journal and primary; somebody else's commit may cover this one."""
        self._requested += 1
        mine = self._requested
        async with self._commit:
            if self._committed >= mine and flag in (Flag.FLUSH, Flag.TICK):
                return
            upto = self._requested
            self.commits += not self.volume.journal.is_clean()
            await self._drive(self.volume.flush(self.tap.primary, flag=flag))
            self._committed = upto

    # -- reading ------------------------------------------------------------------------------------------------

    async def read(self, image: Image, offset: int, length: int) -> memoryview:
        """Return bytes of an image, fewer at its end: at once from the page cache, else from a thread."""
        length = max(0, min(length, image.size - offset))
        if not length:
            return memoryview(b"")
        pieces = image.resolve_nowait(offset, length)
        if pieces is None:
            pieces = await self.answer(image.locate(offset, length))
        try:
            return image.read_pieces(pieces, offset, length, nowait=True)
        except BlockingIOError:
            with self._reading():
                return await trio.to_thread.run_sync(image.read_pieces, pieces, offset, length, limiter=self.limiter)

    async def answer(self, work: Work[Result]) -> Result:
        """Do work that changes nothing; who waits for it may give up."""
        found = await self._drive(work, stoppable=True)
        self._mind_excess()
        return found

    def _mind_excess(self) -> None:
        """Have journals closed in the background when too many are in memory."""
        if self.volume.snapshots.excess():
            self._drop_wanted.set()

    async def read_tap(self, offset: int, length: int) -> bytearray:
        """Return bytes of the primary, fewer at its end."""
        try:
            return self.tap.read(offset, length, nowait=True)
        except BlockingIOError:
            return await trio.to_thread.run_sync(self.tap.read, offset, length, limiter=self.limiter)

    async def digest(self, image: Image) -> str:
        """Return the xxh3-128 digest of a whole image."""
        digest = xxhash.xxh3_128()
        for offset in range(0, image.size, DIGEST_CHUNK):
            digest.update(await self.read(image, offset, DIGEST_CHUNK))
            await trio.lowlevel.checkpoint()
        return digest.hexdigest()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Be a reader of the present epoch."""
        epoch = self._epoch
        self._readers[epoch] += 1
        try:
            yield
        finally:
            self._readers[epoch] -= 1
            if not self._readers[epoch]:
                del self._readers[epoch]
            self._reader_left.unpark_all()

    async def _drain(self) -> None:
        """Wait for all readers that began before this call."""
        epoch = self._epoch
        self._epoch += 1
        while any(number <= epoch for number in self._readers):
            await self._reader_left.park()

    def hold(self, image: Image) -> None:
        """Keep an image readable and unchanged (promise 4)."""
        image.pins += 1

    def release(self, image: Image) -> None:
        """Undo one hold; what was kept only for it is dropped in the background."""
        image.pins -= 1
        assert image.pins >= 0
        if not image.pins:
            self._drop_wanted.set()

    # -- clones -------------------------------------------------------------------------------------------------

    async def create_clone(self, base: Image, name: str) -> Clone:
        """Make *base*, which the caller holds, durable, and a clone of it."""
        if base.seq > self.volume.journal.durable:
            await self.flush()
        return await self._drive(self.volume.clones.create(base, name))

    async def drop_clone(self, clone: Clone) -> None:
        """Drop a clone that nobody has open; what was kept only for it is dropped in the background."""
        self.volume.clones.require_idle(clone)
        async with self._clone_locks[clone.serial]:
            await self._drive(self.volume.clones.drop(clone))
        self._clone_locks.pop(clone.serial, None)
        self._drop_wanted.set()

    async def read_clone(self, clone: Clone, offset: int, length: int) -> memoryview:
        """Return bytes of a clone, fewer at its end."""
        return await self._drive(clone.read(offset, length), reads=True)

    async def write_clone(self, clone: Clone, offset: int, data: bytes) -> None:
        """Write within a clone."""
        async with self._clone_locks[clone.serial]:
            await self._drive(clone.write(offset, data), reads=True)

    async def flush_clone(self, clone: Clone) -> None:
        """Make all writes to a clone durable."""
        async with self._clone_locks[clone.serial]:
            await self._drive(clone.flush())

    # -- maintenance --------------------------------------------------------------------------------------------

    async def sync(self) -> int:
        """Flush, then move the mirror to that moment, and keep the mirror's old one; return the mirror's new seq."""
        async with self._maintenance:
            await self.flush()
            return await self._sync(sync(self.volume))

    async def sync_to(self, target: int) -> int:
        """Move the mirror to a sync indicator as a policy wants it: which moments stay, snapshots alone decide.

        But where there is no snapshot yet, the mirror's moment becomes one: history doesn't vanish as a whole.
        """
        async with self._maintenance:
            return await self._sync(sync(self.volume, target=target, open_snapshot=not has_past(self.volume)))

    async def sync_early(self) -> None:
        """Flush, then sync all that can be, since space is short; nothing where that would free nothing."""
        if self.volume.failure or self.volume.journal.head == self.volume.pointers.now.mirror_seq:
            return
        await self.flush()
        stops = stops_of(self.volume).seqs
        if len(stops):
            await self.sync_to(int(stops[-1]))

    async def _sync(self, work: Work[int]) -> int:
        self.syncing = True
        try:
            seq: int = await self._drive(work, drain=True, stoppable=True)
        finally:
            self.syncing = False
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
        with self.marked() as seq:
            return await self.snapshot_at(seq, name)

    @contextmanager
    def marked(self) -> Iterator[int]:
        """Set a sync indicator now, and have syncs not pass it; yields its seq."""
        seq = self.volume.indicate().seq
        with self.volume.reserved(seq):
            yield seq

    async def snapshot_at(
        self, seq: int, name: str, *, instant_ns: int | None = None, frozen: bool = False
    ) -> Snapshot:
        """Make a marked moment durable and a snapshot."""
        await self.flush()
        return await self._drive(self.volume.snapshot_at(seq, name, instant_ns=instant_ns, frozen=frozen))

    async def drop_snapshot(self, snapshot: Snapshot) -> None:
        """Drop a snapshot, or hide it until its image is closed or a sync that is under way has ended.

        What is left to do then, or when the caller gives up, is done in the background.
        """
        try:
            if self._maintenance.locked():
                return await self._drive(self.volume.hide_snapshot(snapshot))
            async with self._maintenance:
                await self._drive(self.volume.drop_snapshot(snapshot), drain=True, stoppable=True)
                await self._sweep()
        finally:
            if snapshot.hidden:
                self._drop_wanted.set()

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
                    await self._drive(self.volume.drop_snapshot(snapshot), drain=True, stoppable=True)
                except CorruptionError as error:
                    damage = damage or error
                await self._sweep()
        if damage is not None:
            raise damage

    async def do(self, work: Work[Result]) -> Result:
        """Drive work that touches nothing that is read."""
        return await self._drive(work)

    async def _sweep(self) -> None:
        """Close the journals that nobody can be reading or syncing any more."""
        garbage = self.volume.take_garbage()
        await self._drain()
        async with self._commit:
            for segment in garbage:
                segment.close()

    async def close(self) -> None:
        """Make everything durable and mark the volume clean; the tasks have ended, and nobody writes any more."""
        with trio.CancelScope(shield=True):
            await self._flush_clones()
            try:
                await self.flush()
                await self._call(self.volume.mark_clean)
            except TROUBLE as error:
                log.error("volume %s: not closed in order: %s", self.volume.info.name, error)
            self.volume.close()
            self.tap.primary.close()

    async def _flush_clones(self) -> None:
        for clone in self.volume.clones:
            if clone.failure:
                continue
            try:
                await self.flush_clone(clone)
            except TROUBLE as error:
                log.error("volume %s: clone %s not flushed: %s", self.volume.info.name, clone.name, error)
