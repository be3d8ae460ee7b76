"""The scheduler: syncs each volume by policy, takes snapshots by schedule; what happens without a command.

Both are loops that look at the wall clock once a second: so a clock that is set, a change to summer time, and a machine
that was asleep need no care. What came while no daemon ran isn't caught up with.

1. A run that fails is logged and tried again, later each time up to a limit; it never ends the daemon. A time of day is
   given up after some attempts, a condition that lasts isn't.
2. While the reserve is touched, all that can be is synced; a write that finds no space has it made itself
   (``Appliance.make_room``). For the sake of free space a volume is synced once a minute at most: otherwise nothing
   would stay exact to the write on a disk that is simply rather full.
3. The hook ``after`` is run whenever a snapshot was begun, also if ``before`` or the snapshot failed, and when the
   daemon ends meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import trio

from dmafs import answers
from dmafs.core.calendar import Offset, next_time_of_day
from dmafs.core.policy import NS, SnapshotSchedule, SyncPolicy, Target, VolumeFacts, next_by_age, plan
from dmafs.service.hooks import run_hook
from dmafs.service.tasks import TROUBLE
from dmafs.units import format_rfc3339, local_offset_s

log = logging.getLogger(__name__)

CHECK_S: Final = 1.0
SPACE_PAUSE_S: Final = 60.0
RETRY_S: Final = 10.0
"""Until the second attempt; each further one takes twice as long."""
RETRY_S_MAX: Final = 600.0
ATTEMPTS_MAX: Final = 5
"""Attempts at what a time of day has begun."""


class Syncable(Protocol):
    """What the scheduler asks of a volume's engine."""

    def facts(self) -> VolumeFacts:
        """Return what a sync policy has to know."""

    async def flush(self) -> None:
        """Make all writes durable, with a sync indicator."""

    async def sync_to(self, target: int) -> int:
        """Move the mirror to a sync indicator; return the mirror's new seq."""


class SnapshotTaker(Protocol):
    """What the scheduler asks of the appliance."""

    def has_news(self) -> bool:
        """Say whether anything was written since the newest snapshot."""

    async def take_scheduled(self, *, frozen: bool) -> str:
        """Take a snapshot of all volumes that can take one; return its id."""


HookRunner = Callable[[Sequence[str]], Awaitable[bool]]


@dataclass(slots=True)
class Agenda:
    """What is known of one kind of run: when it was looked at last, how the last one ended, and attempts since."""

    since_ns: int
    failures: int = 0
    last: answers.Run | None = field(default=None)

    def note(self, now_ns: int, reason: str, result: str) -> None:
        """Remember a run for ``status``."""
        self.last = {"time": format_rfc3339(now_ns), "reason": reason, "result": result}

    def retry_s(self) -> float:
        """Count a failure; return how long to wait before the next attempt."""
        self.failures += 1
        return float(min(RETRY_S * 2 ** (self.failures - 1), RETRY_S_MAX))


class Scheduler:
    """The tasks of one daemon. Made once, then ``run``."""

    def __init__(
        self,
        engines: Mapping[str, Syncable],
        taker: SnapshotTaker,
        policy: SyncPolicy,
        schedule: SnapshotSchedule,
        *,
        environment: Mapping[str, str],
        clock: Callable[[], int] = time.time_ns,
        offset: Offset = local_offset_s,
        hook: HookRunner | None = None,
    ) -> None:
        """Begin now. *clock* returns UTC nanoseconds, *environment* is what hooks get besides the daemon's own."""
        self._engines = engines
        self._taker = taker
        self._policy = policy
        self._schedule = schedule
        self._environment = environment
        self._clock = clock
        self._offset = offset
        self._hook = hook or self._run_hook
        now = clock()
        offset(now // NS)  # a local time zone that doesn't exist is an error before anything is begun
        self._syncs = {name: Agenda(now) for name in engines}
        self._snapshots = Agenda(now)

    async def run(self) -> None:
        """Sync and take snapshots until cancelled."""
        async with trio.open_nursery() as nursery:
            for name in self._engines:
                nursery.start_soon(self._watch, name)
            nursery.start_soon(self._take_snapshots)

    def adjust(self, policy: SyncPolicy, schedule: SnapshotSchedule) -> None:
        """Go by these from now on. What is past isn't caught up with; a snapshot under way ends as it began."""
        now = self._clock()
        if (schedule.every_s, schedule.times) != (self._schedule.every_s, self._schedule.times):
            self._snapshots.since_ns = max(self._snapshots.since_ns, now)
        if policy.times != self._policy.times:
            for agenda in self._syncs.values():
                agenda.since_ns = max(agenda.since_ns, now)
        self._policy, self._schedule = policy, schedule

    # -- syncs ----------------------------------------------------------------------------------------------------

    async def _watch(self, name: str) -> None:
        engine, agenda = self._engines[name], self._syncs[name]
        space_synced = -SPACE_PAUSE_S
        while True:
            await trio.sleep(CHECK_S)
            target = None
            now = self._clock()
            agenda.since_ns = min(agenda.since_ns, now)  # the clock was set back
            try:
                facts = await self._facts(engine, rested=trio.current_time() - space_synced >= SPACE_PAUSE_S)
                target = plan(facts, self._policy, now, time_came=self._time_of_sync(agenda) <= now)
                if target is not None:
                    await self._sync(name, target)
                    if target.reason == "free space":
                        space_synced = trio.current_time()
            except TROUBLE as error:
                reason = target.reason if target else "check"
                agenda.note(now, reason, f"failed: {error}")
                log.error("volume %s: sync by policy (%s) failed: %s; trying again later", name, reason, error)
                await trio.sleep(agenda.retry_s())
                if agenda.failures < ATTEMPTS_MAX:
                    continue
            else:
                agenda.failures = 0
            agenda.since_ns = max(agenda.since_ns, now)

    async def _facts(self, engine: Syncable, *, rested: bool) -> VolumeFacts:
        """Return the facts of a volume; if the reserve is touched, after a flush, so that all of it can be synced."""
        facts = engine.facts()
        if facts.starved:
            await engine.flush()
            facts = replace(engine.facts(), starved=True)
        return facts if rested else replace(facts, free=1.0)

    async def _sync(self, name: str, target: Target) -> None:
        log.info("volume %s: sync to seq %d by policy: %s", name, target.seq, target.reason)
        seq = await self._engines[name].sync_to(target.seq)
        self._syncs[name].note(self._clock(), target.reason, f"mirror at seq {seq}")

    def _time_of_sync(self, agenda: Agenda) -> float:
        """Return the time_ns of the next time of day for syncs."""
        when = next_time_of_day(self._policy.times, agenda.since_ns // NS, self._offset)
        return float("inf") if when is None else when * NS

    # -- snapshots ------------------------------------------------------------------------------------------------

    async def _take_snapshots(self) -> None:
        agenda = self._snapshots
        while True:
            await trio.sleep(CHECK_S)
            now = self._clock()
            agenda.since_ns = min(agenda.since_ns, now)  # the clock was set back
            due = self._schedule.next_after(agenda.since_ns, self._offset)
            if due is None or due > now:
                continue
            try:
                if self._taker.has_news():
                    await self._take(agenda)
                else:
                    agenda.note(now, "schedule", "nothing new")
            except TROUBLE as error:
                agenda.note(now, "schedule", f"failed: {error}")
                log.error("snapshot by schedule failed: %s", error)
                await trio.sleep(agenda.retry_s())
                if agenda.failures < ATTEMPTS_MAX:
                    continue
            agenda.failures = 0
            agenda.since_ns = max(agenda.since_ns, now)

    async def _take(self, agenda: Agenda) -> None:
        """Take a snapshot between the hooks, those of the schedule that has begun it."""
        schedule, frozen = self._schedule, False
        try:
            if schedule.before:
                frozen = await self._hook(schedule.before)
                if not frozen:
                    log.warning("the snapshot is taken all the same, but isn't frozen")
            identifier = await self._taker.take_scheduled(frozen=frozen)
        finally:
            if schedule.after:
                with trio.CancelScope(shield=True):  # bounded by its time limit
                    await self._hook(schedule.after)
        log.info("snapshot %s taken by schedule", identifier)
        agenda.note(self._clock(), "schedule", f"{'frozen ' if frozen else ''}snapshot {identifier}")

    async def _run_hook(self, command: Sequence[str]) -> bool:
        return await run_hook(command, timeout_s=self._schedule.hook_timeout_s, environment=self._environment)

    # -- what is planned --------------------------------------------------------------------------------------------

    def report(self) -> answers.Schedule:
        """Return what is planned next, and how the last runs ended."""
        upcoming = self._schedule.next_after(self._clock(), self._offset)
        return {
            "snapshots": {"next": _shown(upcoming), "last": self._snapshots.last},
            "syncs": {
                name: {"next": _shown(self._next_sync(name)), "last": agenda.last}
                for name, agenda in self._syncs.items()
            },
        }

    def _next_sync(self, name: str) -> int | None:
        """Return the next time_ns that is known; size, space and marks have none."""
        facts = self._engines[name].facts()
        by_age = next_by_age(facts, self._policy)
        of_day = next_time_of_day(self._policy.times, self._clock() // NS, self._offset)
        times = [by_age, of_day * NS if of_day is not None and facts.oldest_ns else None]
        return min((when for when in times if when is not None), default=None)


def _shown(time_ns: int | None) -> str | None:
    return None if time_ns is None else format_rfc3339(time_ns)
