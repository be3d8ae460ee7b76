"""The engine of a volume whose primary is written through the tree (``taps/passthrough.py``).

When the store has no space for a write, and none can be made, it is refused: nothing of it reaches the primary. Or, if
the configuration says so (``when_full``), a *loss* begins, in this order, while writes wait:

1. a gap begins (losing.py);
2. all that is journaled is made durable, and the pointers say so: else the next daemon, after a kill, would write it to
   the primary again, over what the journal lacks;
3. writes go to the primary alone.

Once there is space beyond the reserve they are journaled again, and a resync ends the gap. If the gap itself can't be
recorded, writes are refused all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from uuid import UUID

import trio

from dmafs.core.ondisk import Flag
from dmafs.core.resync import begin_after_stop, needs_resync
from dmafs.core.volume import Volume
from dmafs.errors import DmafsError, StoreFullError
from dmafs.service.engine import Engine
from dmafs.service.losing import LosingEngine
from dmafs.service.tasks import TROUBLE
from dmafs.taps.passthrough import PassThroughTap

log = logging.getLogger(__name__)


class Switch:
    """Writers wait until they may go past the journal, or for the error why they may not."""

    def __init__(self, reason: StoreFullError) -> None:
        """Begin to wait."""
        self.reason = reason
        self.done = trio.Event()
        self.error: DmafsError | None = None


class PassThroughEngine(LosingEngine):
    """See the module."""

    def __init__(
        self,
        volume: Volume,
        tap: PassThroughTap,
        *,
        tick_s: float,
        limiter: trio.CapacityLimiter,
        resync_rate: int = 0,
        goes_on: bool = False,
    ) -> None:
        """See ``Engine``; *goes_on* if writes go on without the journal when the store is full."""
        super().__init__(volume, tap, tick_s=tick_s, limiter=limiter, resync_rate=resync_rate)
        self.through = tap
        self.synced = tap.primary
        self.goes_on = goes_on
        self._switch: Switch | None = None
        self._lost = trio.Event()

    async def recover(self, boot_id: UUID) -> int:
        """See ``Engine``. The primary is brought up to the journal; after a stop of the kernel a gap begins."""
        redone = await self.drive(self.through.redo())
        await self.drive(begin_after_stop(self.volume, boot_id, self.flush_step))
        await super().recover(boot_id)
        return redone

    def tasks(self) -> list[Callable[[], Awaitable[None]]]:
        """See ``Engine``."""
        return [*super().tasks(), self._stand_by]

    # -- the tap ------------------------------------------------------------------------------------------------

    async def read_tap(self, offset: int, length: int) -> bytearray:
        """Return bytes of the primary, fewer at its end."""
        try:
            return self.through.read(offset, length, nowait=True)
        except BlockingIOError:
            return await trio.to_thread.run_sync(self.through.read, offset, length, limiter=self.limiter)

    async def write_tap(self, offset: int, data: bytes) -> None:
        """Write within the primary, captured. In a full store, wait for what can be dropped.

        If that isn't enough: StoreFullError, or the write is done without being captured, in a gap.
        """
        try:
            return await self._write(offset, data)
        except StoreFullError:
            if self.make_room is not None:
                await self.make_room(len(data))
        while True:
            try:
                return await self._write(offset, data)
            except StoreFullError as error:
                if not self.goes_on:
                    raise
                await self._lose(error)

    async def _write(self, offset: int, data: bytes) -> None:
        """Write now, or once a switch is over: what is journaled during one would be redone over later writes."""
        while self._switch is not None:
            await self._switch.done.wait()
        self.through.write(offset, data)

    async def flush(self, flag: Flag = Flag.FLUSH) -> None:
        """See ``Engine``. What only the primary has is made durable there."""
        if self._loss is not None:
            with self.volume.gate(fatal=True):
                await self.call(self.through.primary.datasync)
        if self.through.captures:
            await super().flush(flag)

    async def settle(self, *, mark: str = "") -> None:
        """See ``Engine``. TapError while writes go past the journal: no moment of then can be had."""
        del mark
        if not self.through.captures:
            assert self._loss is not None
            raise self._gap_error(self._loss)

    # -- losses -------------------------------------------------------------------------------------------------

    async def _lose(self, error: StoreFullError) -> None:
        """Wait until writes go past the journal; raise why they can't."""
        if self.through.captures and self._switch is None:
            self._switch = Switch(error)
            self._lost.set()
        if (switch := self._switch) is not None:
            await switch.done.wait()
            if switch.error is not None:
                raise switch.error

    async def _stand_by(self) -> None:
        """Do what a writer that found the store full waits for, and what follows until capture goes on."""
        while True:
            await self._lost.wait()
            self._lost = trio.Event()
            switch = self._switch
            assert switch is not None
            try:
                await self._pass_by(switch)
            except TROUBLE as error:
                log.error("volume %s: a gap can't be begun or ended in order: %s", self._name, error)
                self._give_up(switch, error)

    async def _pass_by(self, switch: Switch) -> None:
        """Have writes go to the primary alone until the store has space again."""
        async with self._losing(switch.reason):
            async with self._commit:
                await self.commit(Flag.TICK)
            await self.call(self.volume.note_durable)
            self.through.captures = False
            self._release(switch)
            while not await self._has_space_again():
                pass
            self.through.captures = True
            with self.volume.gate(fatal=True):
                await self.call(self.through.primary.datasync)

    def _release(self, switch: Switch) -> None:
        self._switch = None
        switch.done.set()

    def _give_up(self, switch: Switch, error: DmafsError | OSError) -> None:
        """Go on as before, with writes captured or refused; a gap that has begun is ended nevertheless."""
        self._loss, self._told = None, False
        self.through.captures = True
        if not switch.done.is_set():
            switch.error = error if isinstance(error, DmafsError) else switch.reason
            self._release(switch)
        if needs_resync(self.volume):
            self.checking.gap_begun()


def through(engine: Engine) -> PassThroughEngine:
    """Return the engine of a volume that has a file under ``tap/``: only of such a one it is asked for."""
    assert isinstance(engine, PassThroughEngine)
    return engine
