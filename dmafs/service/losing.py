"""What an engine does when writes are lost: a gap begins, capture goes on where it can, and a resync ends the gap.

The gap begins at the journal's head. How capture goes on is the tap's: in a new log, without what the log has
(following.py), or, after writes to the primary alone, with the journal again (passing.py). An initial copy that is
under way starts again from nothing.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from dmafs.core.ondisk import Flag
from dmafs.core.resync import needs_resync, start_again
from dmafs.core.volume import Volume
from dmafs.errors import DmafsError, LogLostError, TapError
from dmafs.service.engine import Engine
from dmafs.service.tasks import Tap

log = logging.getLogger(__name__)

SPACE_PAUSE_S_MAX = 1.0
"""How long to wait at most before free space is looked at again."""


class LosingEngine(Engine):
    """See the module."""

    def __init__(
        self, volume: Volume, tap: Tap, *, tick_s: float, limiter: trio.CapacityLimiter, resync_rate: int = 0
    ) -> None:
        """See ``Engine``."""
        super().__init__(volume, tap, tick_s=tick_s, limiter=limiter, resync_rate=resync_rate)
        self._name = volume.info.name
        self._loss: LogLostError | None = None
        """Why capture is lost, until it goes on."""
        self._told = False
        self._restarts = 0
        """How often it has gone on."""
        self.make_room: Callable[[int], Awaitable[None]] | None = None
        """Drops what may go when the store is full; set by who can."""
        self.alarm: Callable[[str], None] = partial(log.error, "%s")
        """Tells the administrator; set by who can."""

    @property
    def loss(self) -> str:
        """See ``Engine``."""
        return self._loss.message if self._loss is not None else ""

    @asynccontextmanager
    async def _losing(self, error: DmafsError) -> AsyncGenerator[None]:
        """Have a gap begin, or the initial copy anew; what is done within has capture go on.

        Until that is done nothing settles, and nothing is copied: a copy could end without what was lost. It is put
        back first, so that a daemon that is killed meanwhile doesn't go on with it. After an error all of this is to be
        done once more.
        """
        self._loss = LogLostError(error.message, hint=error.hint)
        if not self._told:
            self._told = True
            self.alarm(f"volume {self._name}: a gap has begun: {error.message}")
        self.checking.lost()
        self.copy_scope.cancel()
        async with self.copying:
            if not self.volume.pointers.now.copied:
                async with self._commit:
                    await self.commit(Flag.TICK)
                await self.drive(start_again(self.volume))
            elif not needs_resync(self.volume):
                async with self.appending:
                    self.volume.indicate(Flag.GAP)
            yield
            async with self._commit:
                await self.commit(Flag.TICK)
        self._loss, self._told = None, False
        self._restarts += 1
        self.checking.gap_begun()

    def _gap_error(self, error: DmafsError) -> TapError:
        return TapError(f"volume {self._name}: a gap has begun: {error.message}", hint="try again after the resync")

    async def _has_space_again(self) -> bool:
        """Say whether the store has space beyond the reserve; else have room made, and pause."""
        reserve = self.volume.limits.reserve_bytes
        if self.volume.storage.free_bytes() >= 2 * reserve:
            return True
        if self.make_room is not None:
            await self.make_room(reserve)
        await trio.sleep(min(self.tick_s, SPACE_PAUSE_S_MAX))
        return False
