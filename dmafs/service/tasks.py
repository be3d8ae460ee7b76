"""What the daemon's long tasks share: the tap, what they survive, and how far they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol

import trio

from dmafs.core.storage import File
from dmafs.errors import DmafsError
from dmafs.units import SECTOR

RETRY_S: Final = 10.0
TROUBLE: Final = (DmafsError, OSError)
"""What a task survives: it is logged, and the task goes on."""


class Tap(Protocol):
    """What every tap has."""

    primary: File

    def close(self) -> None:
        """Close all files."""


class Progress:
    """How far an initial copy, a verify or a resync is."""

    def __init__(self, total_sectors: int) -> None:
        """Begin now."""
        self.total = total_sectors
        self.first = self.done = 0
        self._began = self._latest = trio.current_time()

    def begin(self, sectors: int) -> None:
        """Go on from a saved position."""
        self.first = self.done = sectors

    def update(self, sectors: int) -> None:
        """Take in that so many sectors are done."""
        self.done = sectors
        self._latest = trio.current_time()

    @property
    def fraction(self) -> float:
        """Return the part that is done."""
        return self.done / self.total

    @property
    def bytes_per_s(self) -> float:
        """Return the mean rate since the work began or resumed."""
        elapsed = self._latest - self._began
        return (self.done - self.first) * SECTOR / elapsed if elapsed > 0 else 0.0


async def together(calls: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Do several things at once; the first error of the tree ends the others, and is raised as it is."""
    problems: list[DmafsError] = []
    async with trio.open_nursery() as nursery:

        async def do(call: Callable[[], Awaitable[None]]) -> None:
            try:
                await call()
            except DmafsError as error:
                problems.append(error)
                nursery.cancel_scope.cancel()

        for call in calls:
            nursery.start_soon(do, call)
    if problems:
        raise problems[0]
