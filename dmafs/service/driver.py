"""The driver: work of the synchronous core under trio.

What work does between its calls happens on trio's thread, without an ``await``; each call it yields runs in a thread,
and this thread is free for everything else meanwhile; files are made durable by the kernel (``datasyncs.py``). Before
each step of a sync or a drop, readers that resolved before are waited for: nothing is overwritten or closed under a
reader.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from dmafs.core.work import Datasync, Work
from dmafs.service.datasyncs import Datasyncs

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Await:
    """A step of work that is asynchronous itself, and not a reader; a *stoppable* one can be cancelled meanwhile."""

    function: Callable[[], Any]
    stoppable: bool = False

    def __call__(self) -> None:
        """Never called."""
        raise AssertionError("only a driver can do this step")


class Driver:
    """See the module."""

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        """Take threads from *limiter*."""
        self.limiter = limiter
        self.datasyncs: Datasyncs | None = None
        """Makes files durable without threads; set by who closes it."""
        self._epoch = 0
        self._readers: Counter[int] = Counter()
        self._reader_left = trio.lowlevel.ParkingLot()

    async def drive(
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
                    with self.reading() if reads and not isinstance(call, Await) else contextlib.nullcontext():
                        if drain:
                            await self.drain()
                        answer = await self.call(call)
                except Exception as error:  # noqa: BLE001 - passed on: the work decides
                    call = work.throw(error)
                else:
                    call = work.send(answer)
        except StopIteration as stop:
            result: Result = stop.value
            return result
        finally:
            work.close()

    async def call(self, call: Callable[[], Any]) -> object:
        """Run a call in a thread; once begun it is waited for, unless it is a step that says otherwise."""
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=not (isinstance(call, Await) and call.stoppable)):
            if isinstance(call, Await):
                answer = await call.function()
            elif isinstance(call, Datasync) and self.datasyncs is not None:
                answer = None
                rest = await self.datasyncs(call.files)
                if rest or call.then:
                    await trio.to_thread.run_sync(Datasync(rest, call.then), limiter=self.limiter)
            else:
                answer = await trio.to_thread.run_sync(call, limiter=self.limiter)
        return answer

    @contextmanager
    def reading(self) -> Iterator[None]:
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

    async def drain(self) -> None:
        """Wait for all readers that began before this call."""
        epoch = self._epoch
        self._epoch += 1
        while any(number <= epoch for number in self._readers):
            await self._reader_left.park()
