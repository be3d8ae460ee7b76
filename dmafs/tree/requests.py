"""How requests are waited for.

pyfuse3 takes a lock, waits for the session's descriptor with trio, and takes one request. By trio's own lock and
``wait_readable`` that is two rounds of the scheduler and three system calls a request, longer than most answers take.
What stands here in their place asks the kernel first whether there is another request already, and goes to the
scheduler if there is none, or when others haven't had their turn for ``TURN_NS``. Measured on plain reads of 4 KiB:
twice the rate.

pyfuse3 looks all of it up in its global ``trio``, which is also how it is switched to asyncio.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Final

import pyfuse3
import trio

TURN_NS: Final = 1_000_000
"""Longest that requests are answered one after the other, before all other tasks have their turn."""


class UnfairLock:
    """A lock, taken without a checkpoint when it is free, also by who has just given it up while others wait.

    That is what saves the rounds of the scheduler: a fair one would go to another task with each request.
    """

    __slots__ = ("_held", "_waiting")

    def __init__(self) -> None:
        """Be free."""
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        """Take it."""
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(self, *_error: object) -> None:
        """Give it up."""
        self._held = False
        self._waiting.unpark()


class Readiness:
    """Waits until a descriptor can be read from; a checkpoint only when it can't, or after ``TURN_NS``."""

    def __init__(self, between: Callable[[], bool]) -> None:
        """Do what is to be done *between* requests, when none waits, and after ``TURN_NS``; it says if it did any."""
        self._between = between
        self._poll = select.poll()
        self._known = -1
        self._turn_ns = 0

    async def wait_readable(self, fd: int) -> None:
        """See ``trio.lowlevel.wait_readable``."""
        if fd != self._known:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
            self._known = fd
        while perf_counter_ns() - self._turn_ns < TURN_NS:
            if self._poll.poll(0):
                return
            if not self._between():
                break
        else:
            self._between()
        await trio.lowlevel.wait_readable(fd)
        self._turn_ns = perf_counter_ns()


def install(between: Callable[[], bool]) -> None:
    """Have pyfuse3 wait this way, from its next ``main`` on; see ``Readiness``."""
    lowlevel = SimpleNamespace(
        current_task=trio.lowlevel.current_task,
        current_trio_token=trio.lowlevel.current_trio_token,
        notify_closing=trio.lowlevel.notify_closing,
        wait_readable=Readiness(between).wait_readable,
    )
    waiting = SimpleNamespace(
        ClosedResourceError=trio.ClosedResourceError, Lock=UnfairLock, lowlevel=lowlevel, open_nursery=trio.open_nursery
    )
    pyfuse3.trio = waiting  # type: ignore[attr-defined]
