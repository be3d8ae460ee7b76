"""Verifies, resyncs and scrubs of one volume: one at a time, as a task of its engine.

A gap that is open is ended at once, and again after a failure until it is. Otherwise checks are begun on demand. Who
has begun one may give it up: that ends a verify or a scrub, and a resync unless that has found something already, since
the gap that begins then has to end.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from dmafs import answers
from dmafs.core.ondisk import Flag
from dmafs.core.resync import mend, needs_resync, resync
from dmafs.core.scrub import Scrubbed, last_scrub, scope_sectors, scrub
from dmafs.core.storage import File
from dmafs.core.throttle import Throttle
from dmafs.core.verify import Differences, verify
from dmafs.core.volume import Volume
from dmafs.core.work import Result, Work
from dmafs.errors import CheckBusyError, DmafsError, StoreError
from dmafs.service.driver import Await
from dmafs.service.report import differences_of, require_copied, require_source, scrub_told
from dmafs.service.tasks import RETRY_S, TROUBLE, Progress
from dmafs.units import SECTOR, format_bytes, format_rfc3339

if TYPE_CHECKING:
    from dmafs.service.engine import Engine

log = logging.getLogger(__name__)

VERIFY: Final = "verify"
RESYNC: Final = "resync"
SCRUB: Final = "scrub"


def primary_of(volume: Volume, tap_primary: File) -> File | None:
    """Return what a scrub may repair from: an imported volume has no primary any more."""
    return None if volume.info.tap == "none" else tap_primary


class Check:
    """One verify, resync or scrub: under way until *done*; then *found* or *scrubbed*, or *failure* says why not."""

    def __init__(self, kind: str, volume: str, size_sectors: int, bytes_per_s: int) -> None:
        """Prepare a check of so many sectors, with a limit to its rate."""
        self.kind = kind
        self.volume = volume
        self.progress = Progress(size_sectors)
        self.bytes_per_s = bytes_per_s
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.found: Differences | None = None
        self.scrubbed: Scrubbed | None = None
        self.failure: DmafsError | None = None

    def abandon(self) -> None:
        """Give it up: nobody waits for it any more. Nothing if it is done, or has begun a gap."""
        self.scope.cancel()

    def report(self) -> answers.Progress:
        """Return how far it is."""
        return {
            "kind": self.kind,
            "fraction": self.progress.fraction,
            "done_bytes": self.progress.done * SECTOR,
            "total_bytes": self.progress.total * SECTOR,
            "bytes_per_s": int(self.progress.bytes_per_s),
        }


class Checking:
    """The checks of one volume."""

    def __init__(self, engine: Engine, *, bytes_per_s: int) -> None:
        """Check through *engine*, unless a check says otherwise not faster than that; 0 is no limit."""
        self._engine = engine
        self._volume = engine.volume
        self._name = engine.volume.info.name
        self.bytes_per_s = bytes_per_s
        self._wanted = trio.Event()
        self._losses = 0
        self.current: Check | None = None
        self.last: answers.LastCheck | None = None
        """What the last comparison that came to an end has found; forgotten with the daemon."""
        self.last_scrub: Scrubbed | None = None

    def tell(self, status: answers.VolumeStatus) -> None:
        """Say what is under way, and what was found last."""
        status["check"] = self.current.report() if self.current else None
        status["last_check"], status["last_scrub"] = self.last, scrub_told(self.last_scrub)

    def lost(self) -> None:
        """Have no resync that is under way end a gap: capture is being lost."""
        self._losses += 1

    def gap_begun(self) -> None:
        """Have a gap ended that has begun while the engine runs; one that is open already goes on, compared anew."""
        self.lost()
        self._wanted.set()

    def _flush(self) -> Callable[[Flag], Work[object]]:
        """Return what makes events durable for a resync: a gap that has begun meanwhile isn't ended by it."""
        losses = self._losses

        def flush(flag: Flag) -> Work[object]:
            if flag != Flag.RESYNCED:
                return (yield from self._engine.flush_step(flag))
            return (yield Await(partial(self._engine.end_gap, lambda: self._losses == losses)))

        return flush

    def begin(self, kind: str, bytes_per_s: int | None = None) -> Check:
        """Begin a check; CheckBusyError if there is one, TapError if there is nothing to compare with.

        NoSuchPointError if there is nothing to scrub.
        """
        if kind == SCRUB:
            require_copied(self._volume)
        else:
            require_source(self._volume)
        if self.current is not None or needs_resync(self._volume):
            raise CheckBusyError(
                f"volume {self._name}: a {self.current.kind if self.current else RESYNC} is under way already",
                hint="see dmafs status, and try again when it is done",
            )
        self.current = self._new(kind, self.bytes_per_s if bytes_per_s is None else bytes_per_s)
        self._wanted.set()
        return self.current

    def _new(self, kind: str, bytes_per_s: int) -> Check:
        sectors = scope_sectors(self._volume) if kind == SCRUB else self._volume.info.size_sectors
        return Check(kind, self._name, sectors, bytes_per_s)

    async def run(self) -> None:
        """Do what is wanted until cancelled."""
        self.last_scrub = await self._engine.do(_called(partial(last_scrub, self._volume)))
        while True:
            if self.current is not None:
                await (self._scrub if self.current.kind == SCRUB else self._compare)(self.current)
            elif needs_resync(self._volume):
                await self._end_gap()
            else:
                await self._wanted.wait()
                self._wanted = trio.Event()

    async def _end_gap(self) -> None:
        """Resync once; after a failure wait, for the next attempt."""
        self.current = check = self._new(RESYNC, self.bytes_per_s)
        try:
            steps = self._engine.steps(Throttle(check.bytes_per_s))
            primary = self._engine.tap.primary
            work = resync(self._volume, primary, self._flush(), steps, check.progress.update)
            found = await self._engine.examine(work)
        except TROUBLE as error:
            log.error("volume %s: resync failed: %s; trying again", self._name, error)
            await trio.sleep(RETRY_S)
        else:
            self._note(check, found)
            size = format_bytes(found.sectors * SECTOR)
            what = "capture was lost again" if needs_resync(self._volume) else "gap ended"
            log.warning("volume %s: %s, %s of the source differed", self._name, what, size)
        finally:
            self.current = None

    async def _scrub(self, check: Check) -> None:
        """Do a scrub that somebody has begun."""
        async with self._told(check):
            try:
                with check.scope:
                    primary = primary_of(self._volume, self._engine.tap.primary)
                    rest = self._engine.rest(Throttle(check.bytes_per_s))
                    work = scrub(self._volume, primary, rest, check.progress.update)
                    check.scrubbed = await self._engine.examine(work)
            finally:
                with trio.CancelScope(shield=True):
                    self.last_scrub = await self._engine.do(_called(partial(last_scrub, self._volume)))

    @asynccontextmanager
    async def _told(self, check: Check) -> AsyncIterator[None]:
        """Tell who waits for a check that it is done, or why it isn't."""
        try:
            yield
        except DmafsError as error:
            check.failure = error
        except OSError as error:
            check.failure = StoreError(f"volume {self._name}: {error}".lower(), hint="look at the disks")
        finally:
            self.current = None
            check.done.set()

    async def _compare(self, check: Check) -> None:
        """Do a verify or resync that somebody has begun."""
        async with self._told(check):
            with check.scope:
                steps = self._engine.steps(Throttle(check.bytes_per_s))
                work = verify(self._volume, self._engine.tap.primary, steps, check.progress.update)
                found = await self._engine.examine(work)
            if check.scope.cancelled_caught:
                return
            if check.kind == RESYNC and found.sectors and not needs_resync(self._volume):
                found = await self._engine.examine(self._mend(check, found))
                size = format_bytes(found.sectors * SECTOR)
                log.warning("volume %s: resynced, %s of the source differed", self._name, size)
            self._note(check, found)

    def _mend(self, check: Check, found: Differences) -> Work[Differences]:
        steps = self._engine.steps(Throttle(check.bytes_per_s))
        check.progress = progress = Progress(self._volume.info.size_sectors if found.cut else found.sectors)
        return mend(self._volume, self._engine.tap.primary, self._flush(), steps, progress.update, found=found)

    def _note(self, check: Check, found: Differences) -> None:
        check.found = found
        report = differences_of(self._name, found)
        self.last = {
            "kind": check.kind,
            "time": format_rfc3339(self._volume.clock()),
            "bytes": report["bytes"],
            "count": report["count"],
            "busy_bytes": report["busy_bytes"],
        }


def _called(call: Callable[[], Result]) -> Work[Result]:
    """Make a call where nobody else is kept waiting."""
    result: Result = yield call
    return result
