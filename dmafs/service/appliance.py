"""The appliance: all volumes of a store in one daemon; what the tree and the control interface work on."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from dmafs import answers
from dmafs.core.clone import Clone
from dmafs.core.image import Image
from dmafs.core.moments import (
    clone_group,
    clone_groups,
    group_to_drop,
    instant,
    instant_of,
    landmark_times,
    pin_group,
    rename_group,
    require_clone,
    require_mark,
    resolve,
    seqs_at,
    seqs_to_clone,
    snapshot_group,
    snapshot_groups,
    unpin_group,
)
from dmafs.core.points import consistency, oldest_point
from dmafs.core.resync import needs_resync
from dmafs.core.retention import KeepRules
from dmafs.core.snapshot import Snapshot
from dmafs.core.statistics import Statistics
from dmafs.core.store import Store
from dmafs.core.volume import Volume
from dmafs.errors import NoSuchPointError, NoSuchVolumeError
from dmafs.service.alarms import GAP_ALARM, SPACE_ALARM, Alarms
from dmafs.service.checking import Check
from dmafs.service.engine import Engine
from dmafs.service.losing import LosingEngine
from dmafs.service.passing import through
from dmafs.service.report import (
    READ_CHUNK,
    diff_of,
    state_of,
    status_of,
)
from dmafs.service.tapping import tap_reports
from dmafs.service.tasks import TROUBLE, together
from dmafs.service.thinning import Drops, Shrinking, Thinning
from dmafs.tree.backend import Space
from dmafs.units import SECTOR, TimeNs, check_name, format_bytes, format_rfc3339, format_time

ROOM_WAIT_S: Final = 2.0
"""How long freed space may take to be free: some file systems free it in the background."""
FRUITLESS_S: Final = 1.0
"""How long nothing is tried again after nothing could be dropped; many writes may ask."""


class Appliance:
    """Engines by volume; implements ``tree.backend.Backend``."""

    def __init__(self, store: Store, engines: Mapping[str, Engine], *, rules: KeepRules | None = None) -> None:
        """Serve *store* through *engines*, one for each of its volumes; keep snapshots by *rules*."""
        self._store = store
        self._engines = engines
        self._first = next(iter(engines.values()))
        self._volumes: dict[str, Volume] = store.volumes
        self.rules = rules or KeepRules()
        self._cloning, self._pinning, self._retaining = trio.Lock(), trio.Lock(), trio.Lock()
        self._fruitless_until = self.short_at = -math.inf
        self.schedule: Callable[[], answers.Schedule | None] = lambda: None
        """Says what is planned; set by who plans, as what is configured by who has loaded that."""
        self.configured: Callable[[], answers.Settings | None] = lambda: None
        first = next(iter(self._volumes.values()))
        self.started_ns = first.clock()
        self.look: Callable[[], None] = self.clear_gaps  # brings the alarms up to date; set by who watches
        self.alarms = Alarms(first.clock)
        for name, engine in engines.items():
            if isinstance(engine, LosingEngine):
                engine.make_room, engine.alarm = self.make_room, partial(self.alarms.set, GAP_ALARM, volume=name)

    def _engine(self, volume: str) -> Engine:
        try:
            return self._engines[volume]
        except KeyError:
            known = ", ".join(self._engines)
            raise NoSuchVolumeError(f"there is no volume {volume}", hint=f"there are: {known}") from None

    # -- the tree ------------------------------------------------------------------------------------------------

    def volume_names(self) -> list[str]:
        """See ``Backend``."""
        return list(self._engines)

    def size(self, volume: str) -> int:
        """See ``Backend``."""
        return self._engine(volume).volume.info.size_sectors * SECTOR

    def resolve(self, text: str) -> TimeNs:
        """See ``Backend``."""
        return resolve(self._volumes, text)

    def seqs_at(self, time_ns: int) -> dict[str, int]:
        """See ``Backend``."""
        return seqs_at(self._volumes, time_ns)

    def landmarks(self) -> tuple[list[TimeNs], dict[str, TimeNs]]:
        """See ``Backend``."""
        return landmark_times(self._volumes)

    def snapshot_ids(self) -> list[str]:
        """See ``Backend``."""
        return list(snapshot_groups(self._volumes))

    def snapshot_seqs(self, identifier: str) -> dict[str, int]:
        """See ``Backend``."""
        return {name: snapshot.seq for name, snapshot in snapshot_group(self._volumes, identifier).items()}

    def snapshot_time(self, identifier: str) -> TimeNs:
        """See ``Backend``."""
        group = snapshot_group(self._volumes, identifier)
        return instant(group)

    async def take_snapshot(self, name: str) -> None:
        """See ``Backend``. All volumes at one instant; none is taken if any volume can't take it."""
        check_name(name, "snapshot")
        for engine in self._engines.values():
            engine.volume.require_snapshot(name)
        await self._take_group(self._engines, name)

    def has_news(self) -> bool:
        """Say whether anything was written since the newest snapshot, on any volume that can take one."""
        return any(not engine.volume.snapshots.covers(engine.volume.journal.head) for engine in self._able().values())

    async def take_scheduled(self, *, frozen: bool) -> str:
        """Take a snapshot without a name of all volumes that can take one, at one instant; return its id."""
        able = self._able()
        if not able:
            raise NoSuchPointError("no volume can take a snapshot now", hint="see dmafs status")
        return await self._take_group(able, "", frozen=frozen)

    def _able(self) -> dict[str, Engine]:
        """Return the volumes that can take a snapshot: those that are protected."""
        return {
            name: engine
            for name, engine in self._engines.items()
            if state_of(engine.volume) in {"protected", "imported"}
        }

    async def _take_group(self, engines: Mapping[str, Engine], name: str, *, frozen: bool = False) -> str:
        taken: list[tuple[Engine, Snapshot]] = []
        with contextlib.ExitStack() as marks:
            async with self._still(engines):
                seqs = {volume: marks.enter_context(engine.marked()) for volume, engine in engines.items()}
                instant_ns = instant_of(self._volumes, seqs)
            try:
                for volume, seq in seqs.items():
                    engine = engines[volume]
                    there = None if name else engine.volume.snapshots.taken_at(instant_ns)
                    snapshot = await engine.snapshot_at(seq, name, instant_ns=instant_ns, frozen=frozen)
                    if snapshot is not there:
                        taken.append((engine, snapshot))
            except BaseException:
                with trio.CancelScope(shield=True):
                    for engine, snapshot in taken:
                        await engine.drop_snapshot(snapshot)
                raise
        return name or format_time(instant_ns)

    async def mark(self, name: str) -> None:
        """Set a mark on all volumes at one instant; it is durable when this returns."""
        check_name(name, "mark")
        for engine in self._engines.values():
            require_mark(engine.volume, name)
        async with self._still(self._engines, mark=name):
            for engine in self._engines.values():
                engine.mark(name)
        for engine in self._engines.values():
            await engine.flush()

    @asynccontextmanager
    async def _still(self, engines: Mapping[str, Engine], *, mark: str = "") -> AsyncGenerator[None]:
        """Have nothing be journaled, of several volumes at once, and everything be that was complete before.

        With *mark* those that can do so mark that moment in their logs.
        """
        await together(partial(engine.settle, mark=mark) for engine in engines.values())
        async with contextlib.AsyncExitStack() as stack:
            for engine in engines.values():
                await stack.enter_async_context(engine.appending)
            yield

    async def drop_snapshot(self, identifier: str) -> None:
        """See ``Backend``. Of no volume if it is pinned in any."""
        for name, snapshot in group_to_drop(self._volumes, identifier).items():
            await self._engine(name).drop_snapshot(snapshot)

    async def rename_snapshot(self, identifier: str, name: str) -> None:
        """See ``Backend``. In no volume if it can't be in any. Nothing drops it meanwhile."""
        check_name(name, "snapshot")
        async with self._pinning, self._retaining:
            await self._first.do(rename_group(self._volumes, identifier, name))

    def clone_names(self) -> list[str]:
        """See ``Backend``."""
        return list(clone_groups(self._volumes))

    def clones(self, name: str) -> dict[str, Clone]:
        """See ``Backend``."""
        return clone_group(self._volumes, name)

    async def create_clone(self, name: str, at: str | None) -> None:
        """See ``Backend``. All volumes at one instant; none is cloned if any volume can't be."""
        check_name(name, "clone")
        async with self._cloning:
            require_clone(self._volumes, name)
            made: list[tuple[Engine, Clone]] = []
            with contextlib.ExitStack() as held:
                bases = []
                async with self._still(self._engines if at is None else {}):
                    for volume, seq in seqs_to_clone(self._volumes, at).items():
                        engine = self._engine(volume)
                        engine.hold(base := engine.volume.image(seq))
                        held.callback(engine.release, base)
                        bases.append((engine, base))
                try:
                    for engine, base in bases:
                        made.append((engine, await engine.create_clone(base, name)))
                except BaseException:
                    with trio.CancelScope(shield=True):
                        for engine, clone in made:
                            await engine.drop_clone(clone)
                    raise

    async def drop_clone(self, name: str) -> None:
        """See ``Backend``."""
        group = clone_group(self._volumes, name)
        for volume, clone in group.items():
            self._engine(volume).volume.clones.require_idle(clone)
        for volume, clone in group.items():
            await self._engine(volume).drop_clone(clone)

    async def read_clone(self, clone: Clone, offset: int, length: int) -> memoryview:
        """See ``Backend``."""
        return await self._engine(clone.volume).read_clone(clone, offset, length)

    async def write_clone(self, clone: Clone, offset: int, data: bytes) -> None:
        """See ``Backend``."""
        await self._engine(clone.volume).write_clone(clone, offset, data)

    async def flush_clone(self, clone: Clone) -> None:
        """See ``Backend``."""
        await self._engine(clone.volume).flush_clone(clone)

    def image(self, volume: str, seq: int) -> Image:
        """See ``Backend``."""
        return self._engine(volume).volume.image(seq)

    def live(self, volume: str) -> Image:
        """See ``Backend``."""
        found = self._engine(volume).volume
        if not found.pointers.now.copied:
            raise NoSuchPointError(
                f"volume {volume} has no recoverable point yet", hint="wait until dmafs status says protected"
            )
        return found.live

    def consistency(self, image: Image) -> str:
        """See ``Backend``."""
        known = consistency(image.volume, image.seq)
        return "exact" if known == "crash" and image.exact else known  # a sync may have forgotten the indicator

    async def measure(self, image: Image) -> None:
        """See ``Backend``."""
        await self._engine(image.volume.info.name).answer(image.measure())

    def allocated(self, image: Image) -> int:
        """See ``Backend``. The live image's is the primary's: it changes all the time, and that is cheap to ask."""
        if image is image.volume.live:
            return self.tap_allocated(image.volume.info.name)
        return image.allocated_sectors() * SECTOR

    def hold(self, image: Image) -> None:
        """See ``Backend``."""
        self._engine(image.volume.info.name).hold(image)

    def release(self, image: Image) -> None:
        """See ``Backend``."""
        self._engine(image.volume.info.name).release(image)

    async def read(self, image: Image, offset: int, length: int, *, ahead: int = 0) -> memoryview:
        """See ``Backend``."""
        return await self._engine(image.volume.info.name).read(image, offset, length, ahead=ahead)

    async def digest(self, image: Image) -> str:
        """See ``Backend``."""
        return await self._engine(image.volume.info.name).digest(image)

    def has_tap(self, volume: str) -> bool:
        """See ``Backend``."""
        return self._engine(volume).volume.info.tap == "fuse"

    def tap_allocated(self, volume: str) -> int:
        """See ``Backend``."""
        return self._engine(volume).tap.primary.allocated()

    def tap_time(self, volume: str) -> TimeNs:
        """See ``Backend``."""
        return TimeNs(self._engine(volume).volume.journal.head_time_ns)

    async def read_tap(self, volume: str, offset: int, length: int) -> bytearray:
        """See ``Backend``."""
        return await through(self._engine(volume)).read_tap(offset, length)

    async def write_tap(self, volume: str, offset: int, data: bytes) -> None:
        """See ``Backend``."""
        await through(self._engine(volume)).write_tap(offset, data)

    async def flush_tap(self, volume: str) -> None:
        """See ``Backend``."""
        await self._engine(volume).flush()

    def statistics(self, volume: str) -> Statistics:
        """See ``Backend``."""
        return self._volumes[volume].statistics

    def space(self) -> Space:
        """See ``Backend``."""
        info = os.statvfs(self._store.path)
        return Space(info.f_blocks * info.f_frsize, info.f_bfree * info.f_frsize, info.f_bavail * info.f_frsize)

    # -- the control interface ------------------------------------------------------------------------------------

    def status(self) -> answers.Status:
        """Return the state of the daemon and of all volumes."""
        volumes = []
        self.look()
        for engine in self._engines.values():
            report = status_of(engine.volume)
            if report["state"] == "copying":
                report["copy_fraction"] = engine.progress.fraction
                report["copy_bytes_per_s"] = int(engine.progress.bytes_per_s)
            report["device"], report["loss"], report["syncing"] = engine.device_report(), engine.loss, engine.syncing
            report["commits"] = engine.commits
            engine.checking.tell(report)
            volumes.append(report)
        daemon: answers.DaemonStatus = {
            "pid": os.getpid(),
            "schedule": self.schedule(),
            "configuration": self.configured(),
        }
        return {"daemon": daemon, "alarms": self.alarms.report(), "volumes": volumes}

    async def sync(self) -> answers.Syncs:
        """Sync all volumes, one after the other."""
        return {
            "volumes": [{"name": name, "mirror_seq": await engine.sync()} for name, engine in self._engines.items()]
        }

    def begin_check(self, kind: str, volume: str, bytes_per_s: int | None) -> Check:
        """Begin a check of a volume; without a rate by that of the configuration."""
        return self._engine(volume).checking.begin(kind, bytes_per_s)

    async def pin(self, identifier: str) -> None:
        """Have a snapshot not be dropped."""
        async with self._pinning:
            await self._first.do(pin_group(self._volumes, identifier))

    async def unpin(self, identifier: str) -> None:
        """Let a snapshot be dropped again."""
        async with self._pinning:
            await self._first.do(unpin_group(self._volumes, identifier))

    async def read_at(self, image: Image, offset: int, length: int) -> AsyncGenerator[bytes]:
        """Yield bytes of an image in parts; it is held from the first to the last."""
        self.hold(image)
        try:
            for begin in range(offset, offset + length, READ_CHUNK):
                yield bytes(await self.read(image, begin, min(READ_CHUNK, offset + length - begin)))
        finally:
            self.release(image)

    async def diff(self, volume: str, a: str, b: str) -> bytes:
        """Return what was written to a volume between the moments of two spellings, as JSON: it may be long."""
        engine = self._engine(volume)
        report = await engine.answer(diff_of(self._volumes, volume, a, b))
        return await trio.to_thread.run_sync(lambda: json.dumps(report).encode(), limiter=engine.limiter)

    @property
    def volumes(self) -> Mapping[str, Volume]:
        """The volumes by name, for reports."""
        return self._volumes

    async def tap(self, action: str, volume: str | None) -> answers.Taps:
        """Attach or detach mapped devices, or only report them."""
        return await tap_reports(self._engines, action, volume)

    # -- retention ------------------------------------------------------------------------------------------------

    def clear_gaps(self) -> None:
        """Clear the alarms of the gaps that have ended."""
        for name, volume in self._volumes.items():
            if not needs_resync(volume) and volume.pointers.now.copied and not self._engines[name].loss:
                self.alarms.clear(GAP_ALARM, name)

    @property
    def reserve(self) -> int:
        """Return the bytes of the store's filesystem that capture leaves for syncs."""
        return max(volume.limits.reserve_bytes for volume in self._volumes.values())

    async def thin(self, *, dry_run: bool = False, measured: bool = True) -> answers.Thinned:
        """Drop the snapshots that no rule keeps; with *dry_run* only say which, *measured* with what they hold."""
        async with self._retaining:
            thinning = Thinning(self._volumes, self.rules, measured=measured)
            if not dry_run:
                for drops in thinning.rounds():
                    await self._drop(drops)
            return thinning.report(dry_run=dry_run)

    async def _drop(self, drops: Drops) -> None:
        """Drop snapshots, also of the other volumes if one can't; then raise why it can't."""
        problem = None
        for name, snapshots in drops.items():
            try:
                await self._engine(name).drop_snapshots(snapshots)
            except TROUBLE as error:
                problem = problem or error
        if problem is not None:
            raise problem

    async def make_room(self, needed: int) -> None:
        """Syncs, then drops the oldest snapshots that may go, some more than is needed now.

        Sets the alarm if it has to drop. Does nothing while there is *needed* beside the reserve; raises nothing if it
        can't be had.
        """
        async with self._retaining:
            if self._missing(needed) <= 0 or trio.current_time() < self._fruitless_until:
                return
            problem = await self._sync_early()
            missing = self._missing(needed)
            if missing <= 0:
                return
            shrinking = Shrinking(self._volumes, self.rules, missing + self.reserve // 2)
            try:
                for drops in shrinking.steps(spare=self.space().available * 7 // 8):
                    await self._drop(drops)
            except TROUBLE as error:
                problem = f"; {error}"
            if shrinking.dropped and shrinking.missing <= self.reserve // 2:  # enough for what is needed
                await self._wait_for_space(self.reserve + needed)
            if not shrinking.dropped or problem:
                self._fruitless_until = trio.current_time() + FRUITLESS_S
            self._tell_of_shrinking(shrinking.dropped, problem)

    def _missing(self, needed: int) -> int:
        return self.reserve + needed - self.space().available

    async def _sync_early(self) -> str:
        """Sync all volumes as far as that goes; return what went wrong."""
        problem = ""
        for engine in self._engines.values():
            try:
                await engine.sync_early()
            except TROUBLE as error:
                problem = f"; {error}"
        return problem

    async def _wait_for_space(self, wanted: int) -> None:
        with trio.move_on_after(ROOM_WAIT_S):
            while self.space().available < wanted:  # noqa: ASYNC110 - file systems have no event for that
                await trio.sleep(0.02)

    def _tell_of_shrinking(self, dropped: int, problem: str) -> None:
        self.short_at = trio.current_time()
        done = {0: "no snapshot can be dropped", 1: "dropped the oldest snapshot"}
        oldest = [oldest_point(volume).time_ns for volume in self._volumes.values() if volume.pointers.now.copied]
        history = f"history begins at {format_rfc3339(min(oldest))}" if oldest else "there is no history yet"
        self.alarms.set(
            SPACE_ALARM,
            f"store {self._store.path} runs full, {format_bytes(self.space().available)} free: "
            f"{done.get(dropped, f'dropped the {dropped} oldest snapshots')}{problem}; {history}",
            worse=not dropped or bool(problem),
        )
