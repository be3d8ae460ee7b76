"""The appliance: all volumes of a store in one daemon; what the tree and the control interface work on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, Mapping

import trio

from dmafs.core.clone import Clone
from dmafs.core.image import Image
from dmafs.core.moments import (
    canonical,
    clone_group,
    clone_groups,
    landmark_times,
    require_clone,
    resolve,
    seqs_at,
    snapshot_group,
    snapshot_groups,
)
from dmafs.core.snapshots import Snapshot
from dmafs.core.store import Store
from dmafs.core.volume import Volume
from dmafs.errors import NoSuchPointError, NoSuchVolumeError
from dmafs.service.engine import Engine
from dmafs.service.report import READ_CHUNK, Report, clones_of, image_at, points_of, status_of
from dmafs.tree.backend import Space
from dmafs.units import SECTOR, TimeNs, check_name


class Appliance:
    """Engines by volume; implements ``tree.backend.Backend``."""

    def __init__(self, store: Store, engines: Mapping[str, Engine]) -> None:
        """Serve *store* through *engines*, one for each of its volumes."""
        self._store = store
        self._engines = engines
        self._volumes: dict[str, Volume] = store.volumes
        self._cloning = trio.Lock()
        self.started_ns = next(iter(self._volumes.values())).clock()

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
        return canonical(self._volumes, max(snapshot.time_ns for snapshot in group.values()))

    async def take_snapshot(self, name: str) -> None:
        """See ``Backend``. All volumes at one instant; none is taken if any volume can't take it."""
        check_name(name, "snapshot")
        for engine in self._engines.values():
            engine.volume.require_snapshot(name)
        taken: list[tuple[Engine, Snapshot]] = []
        with contextlib.ExitStack() as marks:
            marked = [(engine, marks.enter_context(engine.marked())) for engine in self._engines.values()]
            try:
                for engine, seq in marked:
                    taken.append((engine, await engine.snapshot_at(seq, name)))
            except BaseException:
                with trio.CancelScope(shield=True):
                    for engine, snapshot in taken:
                        await engine.drop_snapshot(snapshot)
                raise

    async def drop_snapshot(self, identifier: str) -> None:
        """See ``Backend``."""
        for name, snapshot in snapshot_group(self._volumes, identifier).items():
            await self._engine(name).drop_snapshot(snapshot)

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
                for volume, seq in self._seqs_to_clone(at).items():
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

    def _seqs_to_clone(self, at: str | None) -> dict[str, int]:
        """Return the seq of each volume at the moment that a spelling means; without one, the newest."""
        if at is not None:
            return seqs_at(self._volumes, resolve(self._volumes, at))
        return {name: volume.indicate().seq for name, volume in self._volumes.items()}

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
        exact = image.volume.is_exact(image.seq) if image is image.volume.live else image.exact
        return "exact" if exact else "crash"

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

    async def read(self, image: Image, offset: int, length: int) -> memoryview:
        """See ``Backend``."""
        return await self._engine(image.volume.info.name).read(image, offset, length)

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
        return await self._engine(volume).read_tap(offset, length)

    def write_tap(self, volume: str, offset: int, data: bytes) -> None:
        """See ``Backend``."""
        self._engine(volume).tap.write(offset, data)

    async def flush_tap(self, volume: str) -> None:
        """See ``Backend``."""
        await self._engine(volume).flush()

    def space(self) -> Space:
        """See ``Backend``."""
        info = os.statvfs(self._store.path)
        return Space(info.f_blocks * info.f_frsize, info.f_bfree * info.f_frsize, info.f_bavail * info.f_frsize)

    # -- the control interface ------------------------------------------------------------------------------------

    def status(self) -> Report:
        """Return the state of the daemon and of all volumes."""
        volumes = []
        for engine in self._engines.values():
            report = status_of(engine.volume)
            if report["state"] == "copying":
                report["copy_fraction"] = engine.progress.done / engine.progress.total
                report["copy_bytes_per_s"] = int(engine.progress.bytes_per_s)
            report["syncing"] = engine.syncing
            report["commits"] = engine.commits
            volumes.append(report)
        return {"daemon": {"pid": os.getpid()}, "volumes": volumes}

    def points(self) -> Report:
        """Return the recoverable points."""
        return points_of(self._volumes)

    def list_clones(self) -> Report:
        """Return all clones."""
        return clones_of(self._volumes)

    async def sync(self) -> Report:
        """Sync all volumes, one after the other."""
        return {
            "volumes": [{"name": name, "mirror_seq": await engine.sync()} for name, engine in self._engines.items()]
        }

    async def read_at(self, image: Image, offset: int, length: int) -> AsyncGenerator[bytes]:
        """Yield bytes of an image in parts; it is held from the first to the last."""
        self.hold(image)
        try:
            for begin in range(offset, offset + length, READ_CHUNK):
                yield bytes(await self.read(image, begin, min(READ_CHUNK, offset + length - begin)))
        finally:
            self.release(image)

    def image_at(self, volume: str, at: str) -> Image:
        """Return a volume's image at the moment that a spelling means."""
        return image_at(self._volumes, volume, at)
