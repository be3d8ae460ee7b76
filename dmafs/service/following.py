"""The engine of a volume whose tap keeps a log: it follows the log.

Tasks beside those of every engine:

- ``_follow`` brings windows from the log into the journal, one at a time, holding ``appending``;
- ``_tick`` has a *barrier* each tick while there are writes: everything that is complete on the primary comes into the
  log, then into the journal, and is made durable there; then the log is let go of as far as nobody needs it, and given
  up for a new one before it is full;
- ``_recheck`` compares with the primary what is in doubt (``taps/arbiter.py``), and what a failed write may have left.

When writes are lost (the log is full, can't be read, or was made anew), a gap begins (losing.py), and capture goes on
in a new log. When the store has no space for what was captured, the same happens, and the log is thrown away until
there is space again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final
from uuid import UUID

import numpy as np
import trio

from dmafs import answers
from dmafs.core.extent import Ints, united
from dmafs.core.ondisk import Flag
from dmafs.core.resync import begin_after_stop, journal_found, needs_resync
from dmafs.core.storage import boot_id as this_boot
from dmafs.core.throttle import Throttle
from dmafs.core.verify import Found, compare
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import DmafsError, LogLostError, StoreFullError, TapError
from dmafs.service.driver import Await
from dmafs.service.failures import watch_failures
from dmafs.service.losing import LosingEngine
from dmafs.service.operations import ATTACH, DETACH
from dmafs.service.tasks import RETRY_S, TROUBLE
from dmafs.taps.capture import Captured, LoggedTap, barrier_text, capture
from dmafs.taps.dm import DmTap, attach
from dmafs.taps.kernellog import SUPPRESSED_S
from dmafs.units import SECTOR, format_bytes

log = logging.getLogger(__name__)

POLL_SHARE: Final = 0.1
"""The log is looked at so often in a tick: loop devices tell nobody that they have written."""
POLL_MAX_S: Final = 0.1
BARRIER_SHARE: Final = 0.5
"""So often in a tick there is a barrier: what it brings has to be captured too before the tick is over."""
TICKS_MAX: Final = 4
"""How many barriers of ticks may be under way."""
SPACE_TRIES: Final = 5
"""How often space is asked for before the log is thrown away."""
CLOSE_S: Final = 10.0
"""How long the last barrier may take when the daemon ends; what isn't captured then is in the log still."""

_NOTHING: Final = (np.empty(0, np.int64), np.empty(0, np.int64))


class Barrier:
    """Somebody waits for a mark to be read back."""

    def __init__(self, covers: int) -> None:
        """Begin to wait; it is for all who have asked, up to number *covers*."""
        self.covers = covers
        self.begun_s = trio.current_time()
        self.done = trio.Event()
        self.error: DmafsError | None = None


class FollowingEngine(LosingEngine):
    """See the module."""

    def __init__(
        self,
        volume: Volume,
        tap: LoggedTap,
        *,
        tick_s: float,
        limiter: trio.CapacityLimiter,
        resync_rate: int = 0,
    ) -> None:
        """See ``Engine``; *tap* is this engine's to close."""
        super().__init__(volume, tap, tick_s=tick_s, limiter=limiter, resync_rate=resync_rate)
        self.log = tap
        self._wake = trio.Event()
        self._barriers: dict[str, Barrier] = {}
        self._numbers = itertools.count(1)
        self._token = f"{os.getpid()}-{os.urandom(4).hex()}"
        self._settling = trio.Lock()
        self._asked = 0
        self._newest: Barrier | None = None
        self._tries = 0  # how often space was asked for in a row
        self._switching = trio.Lock()
        self._doubts: tuple[Ints, Ints] = _NOTHING
        self._doubted = trio.Event()
        self._ended = trio.Event()
        self._heads: deque[int] = deque([volume.journal.head], maxlen=3)
        """The journal's head at the last ticks."""
        self.windows = 0
        """How many windows were captured."""

    # -- tasks --------------------------------------------------------------------------------------------------

    async def recover(self, boot_id: UUID) -> int:
        """Find the place in the log where the journal ends; a gap begins if it can't be had. Returns 0."""
        journal = self.volume.journal
        if isinstance(self.log, DmTap) and self.log.mapped is None:
            await self.drive(attach(self.volume, self.log, boot_id))
            return 0
        await self.drive(begin_after_stop(self.volume, boot_id, self._commit_step))
        try:
            await self.call(partial(self.log.begin, journal.position, journal.retained))
        except LogLostError as error:
            await self._begin_gap(error)
        await self.call(partial(self.volume.mark_open, boot_id))
        return 0

    def tasks(self) -> list[Callable[[], Awaitable[None]]]:
        """See ``Engine``."""
        return [*super().tasks(), self._follow, self._recheck, self._watch]

    async def _tick(self) -> None:
        """Have a barrier each tick, whether the one before was read back already or not: the lag stays short so."""
        slots = trio.Semaphore(TICKS_MAX)
        due = trio.current_time()
        async with trio.open_nursery() as nursery:
            while True:
                due = max(due + self.tick_s * BARRIER_SHARE, trio.current_time())
                await trio.sleep_until(due)
                self._heads.append(self.volume.journal.head)
                with contextlib.suppress(trio.WouldBlock):
                    slots.acquire_nowait()
                    nursery.start_soon(self._tick_once, slots)

    async def _tick_once(self, slots: trio.Semaphore) -> None:
        restarts = self._restarts
        try:
            if self.volume.failure or self._loss is not None:
                return
            await self.call(self.log.check)
            if await self.ask(self.log.has_written) or not self.volume.journal.is_clean():
                await self.flush(Flag.TICK)
            await self._keep_log()
        except LogLostError as error:
            if restarts == self._restarts:  # else it is about a log that was given up meanwhile
                self._lose(error)
        except TapError as error:
            log.info("volume %s: %s", self._name, error.message)  # it has a gap, which was told
        except TROUBLE as error:
            log.error("volume %s: tick failed: %s", self._name, error)
        finally:
            slots.release()

    async def _keep_log(self) -> None:
        """Let go of what is durable in the journal, and give the device a new log before the present one is full.

        Not while a window is read: a scan would see the new log before the old one has its end.
        """
        async with self.appending:
            await self.call(partial(self.log.release, self.volume.journal.durable_retained))
            await self.call(self.log.keep)

    async def _follow(self) -> None:
        while True:
            try:
                await self._go_on()
            except TROUBLE as error:
                if self.volume.failure and isinstance(error, DmafsError):
                    self._fail_barriers(error)
                log.error("volume %s: capture failed: %s; trying again", self._name, error)
                await trio.sleep(RETRY_S)

    async def _go_on(self) -> None:
        """Capture a window if there is one, or do what has to be done before the next one can be."""
        try:
            if self._loss is not None:
                raise self._loss
            captured = await self._capture()
        except LogLostError as error:
            await self._begin_gap(error)
        except StoreFullError as error:
            await self._lack_space(error)
        else:
            self._tries = 0
            if captured is None:
                await self._idle()

    async def _lack_space(self, error: StoreFullError) -> None:
        """Have room made for what was scanned, or give up the log."""
        self._tries += 1
        if self._tries > SPACE_TRIES:
            await self._discard_log(error)
            self._tries = 0
            return
        if self._tries > 1:
            await trio.sleep(min(self.tick_s, 1.0))
        if self.make_room is not None:
            await self.make_room(self._pending_bytes())

    def _pending_bytes(self) -> int:
        scanned = self.log.pending
        return 0 if scanned is None else int(scanned.window.data_bytes().sum())

    async def _capture(self) -> Captured | None:
        """Bring the next window into the journal, if there is one."""
        async with self.appending:
            captured = await self.drive(capture(self.volume, self.log))
        if captured is not None:
            self.windows += 1
            self._doubt(*captured.doubts)
            barrier = self._barriers.pop(captured.window.mark, None)
            if barrier is not None:
                barrier.done.set()
        elif self.log.ended and not self._ended.is_set():
            self._ended.set()
            log.warning("volume %s: its device was removed; writes to its source are not captured any more", self._name)
        return captured

    async def _idle(self) -> None:
        """Wait until there may be more in the log; look whether it still goes on if somebody waits for that."""
        with trio.move_on_after(min(self.tick_s * POLL_SHARE, POLL_MAX_S)):
            await self._wake.wait()
        self._wake = trio.Event()
        if self._barriers and self._loss is None:
            try:
                await self.call(self.log.check)
            except LogLostError as error:
                self._lose(error)
            except TROUBLE as error:
                log.error("volume %s: %s", self._name, error)

    def _lose(self, error: LogLostError) -> None:
        """Have the follower begin a gap."""
        self._loss = error
        self._wake.set()

    # -- barriers -----------------------------------------------------------------------------------------------

    async def settle(self, *, mark: str = "") -> None:
        """Have all writes that are complete on the primary be in the journal; *mark* names the moment.

        One barrier may serve all who asked before it began. TapError when a gap begins meanwhile.
        """
        if not self.log.can_settle or self._ended.is_set():
            return
        with self.volume.gate():  # a volume that takes nothing any more never settles
            pass
        self._asked += 1
        mine = self._asked
        async with self._settling:
            barrier = self._newest
            if barrier is None or barrier.covers < mine or mark:
                barrier = await self._request(mark)
        await barrier.done.wait()
        if barrier.error is not None:
            raise barrier.error

    async def exhaust(self) -> None:
        """See ``Engine``. Looks twice, since a flush that is under way may not be counted yet."""
        await self.settle()
        for _ in range(0 if self.log.can_settle else 2):
            count: int = await self.ask(self.log.counted)
            while True:
                async with self.appending:
                    if await self.ask(partial(self.log.is_through, count)):
                        break
                await trio.sleep(min(self.tick_s * POLL_SHARE, POLL_MAX_S))

    async def _request(self, mark: str) -> Barrier:
        """Begin a barrier; it covers everybody who has asked until now. While capture is lost nobody would end it."""
        if self._loss is not None:
            raise self._gap_error(self._loss)
        text = barrier_text(f"{self._token}-{next(self._numbers)}", mark)
        barrier = self._barriers[text] = self._newest = Barrier(self._asked)
        try:
            await self.call(partial(self.log.request, text))
        except BaseException:
            self._barriers.pop(text, None)  # a gap may have begun
            self._newest = None
            raise
        self._wake.set()
        return barrier

    def mark(self, name: str) -> None:
        """See ``Engine``: a mark in the log has become one of the journal when it was read back."""
        if not self.log.can_settle or self._ended.is_set():
            super().mark(name)

    def _fail_barriers(self, error: DmafsError) -> None:
        for barrier in self._barriers.values():
            barrier.error = error
            barrier.done.set()
        self._barriers.clear()
        self._newest = None

    @property
    def lag_s(self) -> float:
        """See ``Engine``. What was written before the oldest barrier that isn't read back may be in the log only."""
        now = trio.current_time()
        waiting = min((barrier.begun_s for barrier in self._barriers.values()), default=now)
        return max(super().lag_s, now - waiting)

    # -- losses -------------------------------------------------------------------------------------------------

    async def _begin_gap(self, error: DmafsError) -> None:
        """Begin a gap at the journal's head, and have capture go on in a new log; a resync ends the gap."""
        async with self._losing(error), self.appending:
            place: int = await self.ask(self.log.restart)
            self.volume.journal.note_position(place, place)

    async def _discard_log(self, error: DmafsError) -> None:
        """Begin a gap, and throw away what comes into the log until the store has space again."""
        async with self._losing(error):
            while True:
                async with self.appending:
                    await self.call(self.log.discard)
                    self.volume.journal.note_position(self.log.captured_place, self.log.captured_place)
                async with self._commit:
                    await self.commit(Flag.TICK)
                async with self.appending:
                    await self.call(partial(self.log.release, self.volume.journal.durable_retained))
                if await self._has_space_again():
                    break

    @asynccontextmanager
    async def _losing(self, error: DmafsError) -> AsyncGenerator[None]:
        """See ``LosingEngine``. Who waits for a barrier is told; what was in doubt will be compared anyhow."""
        self._fail_barriers(self._gap_error(error))
        async with super()._losing(error):
            yield
            self._doubts = _NOTHING

    def _commit_step(self, flag: Flag) -> Work[object]:
        """Make durable what is in the journal, as a step of work: before the log is followed nothing settles."""
        return (yield Await(partial(self.commit, flag)))

    # -- doubts -------------------------------------------------------------------------------------------------

    def _doubt(self, starts: Ints, stops: Ints) -> None:
        """Have extents compared with the primary."""
        if len(starts):
            columns = [np.concatenate(pair) for pair in zip(self._doubts, (starts, stops), strict=True)]
            self._doubts = united(*columns)
            self._doubted.set()

    async def _recheck(self) -> None:
        while True:
            await self._doubted.wait()
            self._doubted = trio.Event()
            if needs_resync(self.volume) or not self.volume.pointers.now.copied:
                await trio.sleep(self.tick_s)  # what is compared or copied before a doubt arises doesn't dispel it
                self._doubted.set()
                continue
            doubts, self._doubts = self._doubts, _NOTHING
            restarts = self._restarts
            try:
                steps = self.steps(Throttle())
                found = await self.examine(compare(self.volume, self.log.primary, doubts, steps, take=self._correct))
            except TROUBLE as error:
                log.error("volume %s: comparing what is in doubt failed: %s", self._name, error)
                await trio.sleep(RETRY_S)
                if restarts == self._restarts:
                    self._doubt(*doubts)
                continue
            if found.sectors:
                size = format_bytes(found.sectors * SECTOR)
                log.warning("volume %s: %s were corrected after the source", self._name, size)
            if found.busy_sectors:
                await trio.sleep(self.tick_s)
                self._doubt(*doubts)

    async def _watch(self) -> None:
        """When the kernel tells of a failed write, have everything compared that was captured around that time."""
        await watch_failures(self._name, await self.ask(self.log.devices), self._doubt_recent)

    async def _doubt_recent(self) -> None:
        first = self._heads[0]
        await trio.sleep(SUPPRESSED_S + 2 * self.tick_s)
        self._doubt(*self.volume.journal.extents(first, self.volume.journal.head))

    def _correct(self, part: Found) -> Work[object]:
        """Journal a difference, unless a sync has meanwhile passed what would say that it is one still."""

        def change() -> None:
            if self.volume.pointers.now.mirror_seq <= part.head:
                journal_found(self.volume, part)
            else:
                self._doubt(*(np.array([edge], np.int64) for edge in (part.start, part.start + len(part.differs))))

        return self.steps(Throttle()).append(change)

    # -- the end ------------------------------------------------------------------------------------------------

    async def attach(self, boot_id: UUID) -> None:
        """Make the device again; nothing if it is there. *boot_id* is the running kernel's."""
        assert isinstance(self.log, DmTap)
        async with self._switching, self._settling, self._commit, self.appending:
            if self.log.mapped is None:
                await self.drive(attach(self.volume, self.log, boot_id))
                self._ended = trio.Event()
                self._wake.set()

    async def detach(self) -> None:
        """Remove the device, and take in all that it has logged; TapBusyError if somebody uses it."""
        assert isinstance(self.log, DmTap)
        async with self._switching:
            async with self._settling, self.appending:
                if self.log.mapped is None:
                    return
                await self.call(self.log.detach)
            self._wake.set()
            while not self._ended.is_set():
                with self.volume.gate(), trio.move_on_after(POLL_MAX_S):  # not for ever if it takes nothing any more
                    await self._ended.wait()
            async with self._commit, self.appending:
                self.volume.indicate()
                await self.drive(self.volume.settle())
                await self.call(self.volume.mark_clean)

    def device_report(self) -> answers.Device | None:
        """See ``Engine``."""
        return self.log.report() if isinstance(self.log, DmTap) else None

    async def tap_report(self, action: str) -> answers.Device:
        """Do what is wanted with the device, and return what there is to say about it."""
        assert isinstance(self.log, DmTap)
        if action == ATTACH:
            await self.attach(this_boot())
        elif action == DETACH:
            await self.detach()
        report: answers.Device = await self.ask(self.log.report)
        return report

    async def finish(self) -> None:
        """Take in what was written until now. The device stays, and what it logs then waits for the next start.

        Only without a device the volume is closed in order: until then a stop of the machine loses what is in the log.
        """
        try:
            with trio.move_on_after(CLOSE_S):
                await self._drain_log()
        finally:
            await self.commit(Flag.FLUSH)
        if self._ended.is_set():
            await self.call(self.volume.mark_clean)

    async def _drain_log(self) -> None:
        """Have a last barrier, without the tasks, which have ended."""
        if not self.log.can_settle or self._ended.is_set() or self.volume.failure:
            return
        text = barrier_text(f"{self._token}-{next(self._numbers)}")
        await self.call(partial(self.log.request, text))
        captured: Captured | None = None
        while captured is None or captured.window.mark != text:
            captured = await self._capture()
            if captured is None:
                await self.call(self.log.check)
                await trio.sleep(POLL_MAX_S)

    async def ask(self, question: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever it answers
        """Run a call in a thread, and return its answer."""
        return await self.call(question)
