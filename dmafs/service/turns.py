"""A lock that is taken at once while it is free: with trio's own all other tasks run first, which each commit pays."""

from __future__ import annotations

from types import TracebackType

import trio


class Turns:
    """First come, first served; like ``trio.Lock``, but to take it is no checkpoint unless somebody else has it."""

    def __init__(self) -> None:
        """Begin free."""
        self._lock = trio.Lock()

    async def acquire(self) -> None:
        """Take it, once it is this task's turn."""
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    def release(self) -> None:
        """Give it to whoever has waited longest."""
        self._lock.release()

    def locked(self) -> bool:
        """Say whether somebody has it."""
        return self._lock.locked()

    async def __aenter__(self) -> None:
        """Take it."""
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give it up."""
        self._lock.release()
