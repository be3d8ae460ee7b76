"""A small volume on a simulated disk, what is done to it step by step, and the claims that hold meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar
from unittest import mock
from uuid import UUID

from dmafs.core import copy, extent, sync
from dmafs.core import segment as segments
from dmafs.core.copy import initial_copy
from dmafs.core.digests import BLOCK
from dmafs.core.moments import rename
from dmafs.core.ondisk import Flag
from dmafs.core.resync import begin_after_stop, needs_resync, resync
from dmafs.core.verify import Steps
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import DmafsError
from dmafs.taps.passthrough import PassThroughTap
from dmafs.units import SECTOR
from tests.crash.claims import FOLDER, PRIMARY, Clock, CloneModel, History, named, open_disk, versions_of
from tests.crash.disk import SimulatedDisk, SimulatedStorage, Watch

SECTORS_MIN: Final = 24
SECTORS_MAX: Final = 44
BOOT: Final = UUID(int=1)
ENDLESS: Final = 1 << 60

Result = TypeVar("Result")


@contextlib.contextmanager
def small(seed: object) -> Iterator[None]:
    """Have everything that has a grain be small, and what is random be chosen by *seed*."""
    rng = random.Random(repr(seed))
    with contextlib.ExitStack() as patches:
        for module, name, value in (
            (os, "urandom", rng.randbytes),
            (copy, "CHUNK_SECTORS", 8),
            (copy, "SAVE_SECTORS", 16),
            (copy, "_HOLE_GRAIN", BLOCK),
            (segments, "BATCH_BYTES", 6 * SECTOR),
            (sync, "chop", functools.partial(extent.chop, limit=5)),
        ):
            patches.enter_context(mock.patch.object(module, name, value))
        yield


class World:
    """Made with an empty volume; each step is a method."""

    def __init__(self, seed: object, *, windowed: bool = False, watch: Callable[[World], Watch] | None = None) -> None:
        self.rng = rng = random.Random(repr(seed))
        self.clock = Clock()
        self.size = rng.randint(SECTORS_MIN, SECTORS_MAX)
        content = rng.randbytes(self.size // 2 * SECTOR) + bytes((self.size - self.size // 2) * SECTOR)
        self.history = History(content, windowed=windowed)
        self.windowed = windowed
        self.tolerant = False
        """Whether steps may fail."""
        self.failed = 0
        self.dead = False
        """Whether it couldn't be opened again."""
        self._names = 0
        self._place = 0
        self.disk = SimulatedDisk()
        whole = SimulatedStorage(self.disk)
        self.primary = whole.create(PRIMARY)
        self.primary.write([content], 0)
        self.primary.datasync()
        whole.make_directory(FOLDER)
        whole.sync_directory("")
        self.disk.operations = 0
        self.disk.watch = watch(self) if watch else None
        Volume.create(
            SimulatedStorage(self.disk, FOLDER),
            name="disk",
            size_sectors=self.size,
            source=Path(PRIMARY),
            tap="dm" if windowed else "fuse",
            created_ns=1,
        )
        self.claim(created=True)
        self.open()

    def claim(self, **changes: Any) -> None:
        self.history.claims = dataclasses.replace(self.history.claims, **changes)

    def do(self, step: str, *arguments: Any) -> None:
        """Make a step, by name; one that can't be made now does nothing."""
        if self.dead:
            return
        try:
            getattr(self, step)(*arguments)
        except DmafsError:
            if not self.tolerant:
                raise
            self.failed += 1

    # -- opening and closing ------------------------------------------------------------------------------------

    def open(self) -> None:
        self.volume = volume = open_disk(self.disk, self.clock)
        self.tap = PassThroughTap(volume, self.primary)
        self._real = volume._capture
        volume._capture = self._capture  # type: ignore[method-assign]
        volume.mark_open(BOOT)

    def restart(self) -> None:
        """Close in order, open anew; not after a failure: that comes at the end."""
        if self.failed:
            return
        self.flush()
        if self.volume.journal.durable == self.volume.journal.head:
            self.volume.mark_clean()
        self.kill()

    def kill(self) -> None:
        """The process ends, the next one goes on with what it finds in the page cache; not after a failure."""
        if self.failed:
            return
        self.volume.close()
        self.dead = True
        self.open()
        self.dead = False
        assert self.volume.journal.head == self.history.head
        run(self.tap.redo())
        self._adopt()
        for clone in self.volume.clones:  # what wasn't flushed may be gone; what is there is durable now
            if clone.failure:
                self._change(clone.name, uncertain=True)
                continue
            shown = bytes(run(clone.read(0, self.size * SECTOR)))
            found, model = versions_of(shown), self.history.claims.clones[clone.name]
            assert all(one[0] in versions for one, versions in zip(found, model.sectors, strict=True))
            self._change(clone.name, sectors=found)

    def close(self) -> None:
        self.volume.close()
        self.primary.close()

    def drive(self, work: Work[Result]) -> Result:
        """Drive work to its end; sometimes something is written meanwhile."""
        try:
            call = next(work)
            while True:
                try:
                    answer = call()
                except BaseException as error:  # noqa: BLE001 - passed on: the work decides
                    call = work.throw(error)
                else:
                    if not self.windowed and self.rng.random() < 0.1:
                        self.do("write")
                    call = work.send(answer)
        except StopIteration as stop:
            result: Result = stop.value
            return result

    # -- capture ------------------------------------------------------------------------------------------------

    def _capture(self, start: int, length: int, data: memoryview | bytes | None) -> int:
        volume, history = self.volume, self.history
        if volume.failure:
            return self._real(start, length, data)
        before = history.head
        history.add(start, bytes(length * SECTOR) if data is None else bytes(data))
        self.claim(head_most=before + 1)
        try:
            seq = self._real(start, length, data)
        except DmafsError:
            if not volume.failure:
                history.take_back(before)
                self.claim(head_most=before)
            raise
        assert seq == history.head
        history.times[seq] = volume.live.time_ns
        return seq

    def _extent(self, most: int = 9) -> tuple[int, int]:
        start = self.rng.randrange(self.size)
        return start, min(self.rng.randint(1, most), self.size - start)

    def _data(self, length: int) -> bytes:
        return bytes(length * SECTOR) if self.rng.random() < 0.1 else self.rng.randbytes(length * SECTOR)

    def write(self, most: int = 9) -> None:
        start, length = self._extent(most)
        self.tap.write(start * SECTOR, self._data(length))

    def discard(self) -> None:
        start, length = self._extent(20)
        self.volume.discard(start, length)
        with self.volume.gate(fatal=True):
            self.primary.zero(start * SECTOR, length * SECTOR)

    def flush(self, flag: Flag = Flag.FLUSH, name: str = "") -> None:
        run(self._flush(flag, name))

    def _flush(self, flag: Flag, name: str = "") -> Work[object]:
        head = self.volume.journal.head
        indicator = yield from self.volume.flush(None if self.windowed else self.primary, flag=flag, name=name)
        self.claim(durable=max(self.history.claims.durable, head))
        return indicator

    def mark(self) -> None:
        name = self._name("mark")
        if self.windowed:
            return
        head = self.history.head
        self.flush(Flag.MARK, name)
        self.claim(marks=self.history.claims.marks | {(head, name)})

    def _name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"

    # -- the initial copy, a resync -----------------------------------------------------------------------------

    def copy(self) -> None:
        self._expect_origin()
        self.drive(initial_copy(self.volume, self.primary, self._flush, lambda _: None))
        self._adopt()

    def _expect_origin(self) -> None:
        now = self.volume.pointers.now
        if not now.copied:
            self.claim(origins=range(self.history.head, self.history.head + 100))

    def _adopt(self) -> None:
        now = self.volume.pointers.now
        if now.copied:
            self.history.times[now.origin_seq] = now.origin_time_ns
            self.claim(copied=True, origins=range(now.origin_seq, now.origin_seq + 1))

    def lose(self) -> None:
        """Something is written past the tap; then what was a stop of the kernel is found out, and a gap begins."""
        start, length = self._extent()
        inode = self.disk.paths()[PRIMARY]
        content = bytearray(self.disk.files[inode])
        content[start * SECTOR : (start + length) * SECTOR] = self.rng.randbytes(length * SECTOR)
        self.disk.poke(inode, bytes(content))

    def resync(self) -> None:
        volume = self.volume
        if not volume.pointers.now.copied:
            return
        self.lose()
        begin = self.history.head
        gaps = self.history.claims.gaps
        if not needs_resync(volume):
            self.claim(gaps=(*gaps, (begin, ENDLESS)))
            self.drive(begin_after_stop(volume, UUID(int=2), self._flush))
        if self.rng.random() < 0.3:
            self.write()
        steps = Steps(settle=lambda: self._flush(Flag.TICK))
        self.drive(resync(volume, self.primary, self._flush, steps, lambda _: None))
        end = volume.journal.gaps[-1].end if volume.journal.gaps else self.history.head
        assert end is not None
        self.claim(gaps=(*gaps, (begin, end)))
        image = volume.image(end)
        assert hash(bytes(image.read(0, image.size))) == self.history.hashes[end]

    # -- syncs and snapshots ------------------------------------------------------------------------------------

    def sync(self, automatic: bool | None = None) -> None:  # noqa: FBT001
        volume, claims = self.volume, self.history.claims
        if not volume.pointers.now.copied:
            return
        opens = self.rng.random() < 0.7 if automatic is None else automatic
        target = sync.sync_target(volume) or 0
        now = volume.pointers.now
        low, high = claims.floors
        most = claims.most | (
            {(seq, "") for seq in (now.mirror_seq, now.origin_seq, now.sync_target)} if opens else set()
        )
        self.claim(floors=(low, max(high, target)), most=most)
        self.drive(sync.sync(volume, target=target, open_snapshot=opens))
        floor = volume.floor
        assert max(target, low) <= floor <= self.history.claims.floors[1]
        found = frozenset(map(named, volume.snapshots))
        assert claims.least <= found <= self.history.claims.most
        self.claim(floors=(floor, floor), least=found, most=found if not self.failed else self.history.claims.most)

    def snapshot(self) -> None:
        volume, name = self.volume, self._name("snap")
        if not volume.pointers.now.copied:
            return
        head = self.history.head
        self.flush()
        self.claim(most=self.history.claims.most | {(head, name)})
        snapshot = self.drive(volume.snapshot_at(head, name))
        self.claim(least=self.history.claims.least | {named(snapshot)})

    def warm(self) -> None:
        """Have all layers made, and written where history is finished."""
        self.drive(self.volume.warm())

    def _some(self, *, pinned: bool) -> Any:
        shown = [one for one in self.volume.snapshots if one.pinned == pinned]
        return self.rng.choice(shown) if shown else None

    def drop(self) -> None:
        snapshot = self._some(pinned=False)
        if snapshot is not None:
            self._drop(snapshot)

    def _drop(self, snapshot: Any) -> None:
        one, claims = named(snapshot), self.history.claims
        either = frozenset(names for names in claims.either if one not in names)
        self.claim(least=claims.least - {one}, either=either)
        self.drive(self.volume.drop_snapshot(snapshot))
        for segment in self.volume.take_garbage():
            segment.close()
        self.claim(most=self.history.claims.most - {one})

    def thin(self) -> None:
        """Drop all but the newest and what is pinned, oldest first."""
        for snapshot in list(self.volume.snapshots)[:-1]:
            if not snapshot.pinned and not snapshot.hidden:
                self._drop(snapshot)

    def pin(self) -> None:
        snapshot = self._some(pinned=False)
        if snapshot is not None:
            one = frozenset({named(snapshot)})
            self.claim(pins_most=self.history.claims.pins_most | one)
            self.drive(self.volume.pin(snapshot))
            self.claim(pins_least=self.history.claims.pins_least | one)

    def unpin(self) -> None:
        snapshot = self._some(pinned=True)
        if snapshot is not None:
            one = frozenset({named(snapshot)})
            self.claim(pins_least=self.history.claims.pins_least - one)
            self.drive(self.volume.unpin(snapshot))
            self.claim(pins_most=self.history.claims.pins_most - one)

    def rename(self) -> None:
        """A snapshot gets another name; one that is pinned stays so."""
        shown = list(self.volume.snapshots)
        if not shown:
            return
        snapshot, claims = self.rng.choice(shown), self.history.claims
        old, new = named(snapshot), (snapshot.seq, self._name("named"))
        pinned = frozenset({new} if snapshot.pinned else ())
        self.claim(least=claims.least - {old}, most=claims.most | {new}, either=claims.either | {(old, new)})
        self.claim(pins_least=claims.pins_least - {old}, pins_most=claims.pins_most | pinned)
        self.claim(former=claims.former | {old})
        try:
            self.drive(rename(self.volume, snapshot, new[1]))
        except DmafsError:
            if not self.volume.failure:  # it has its old name again
                self.claim(**{name: getattr(claims, name) for name in ("least", "most", "either")})
                self.claim(pins_least=claims.pins_least, pins_most=claims.pins_most)
            raise
        claims = self.history.claims
        self.claim(least=claims.least | {new}, most=claims.most - {old}, either=claims.either - {(old, new)})
        self.claim(pins_least=claims.pins_least | pinned, pins_most=claims.pins_most - {old})

    # -- clones -------------------------------------------------------------------------------------------------

    def clone(self) -> None:
        volume, name = self.volume, self._name("clone")
        now = volume.pointers.now
        if not now.copied:
            return
        self.flush()
        first = max(volume.floor, now.origin_seq)
        points = [seq for seq in range(first, volume.journal.durable + 1) if volume.recoverable(seq)]
        seq = self.rng.choice([*points[-3:], *(one.seq for one in volume.snapshots if one.seq >= now.origin_seq)])
        model = CloneModel(seq, versions_of(self.history.images[seq]))
        self.claim(clones={**self.history.claims.clones, name: model})
        self.drive(volume.clones.create(volume.image(seq), name))
        self.claim(clones_least=self.history.claims.clones_least | {name})

    def _change(self, name: str, **changes: Any) -> None:
        clones = self.history.claims.clones
        self.claim(clones={**clones, name: dataclasses.replace(clones[name], **changes)})

    def _clone(self) -> Any:
        clones = [clone for clone in self.volume.clones if not clone.failure]
        return self.rng.choice(clones) if clones else None

    def clone_write(self) -> None:
        clone = self._clone()
        if clone is None:
            return
        start, length = self._extent()
        data = self.rng.randbytes(length * SECTOR)
        sectors = list(self.history.claims.clones[clone.name].sectors)
        for sector in range(start, start + length):
            sectors[sector] = *sectors[sector], data[(sector - start) * SECTOR :][:SECTOR]
        self._change(clone.name, sectors=tuple(sectors))
        try:
            run(clone.write(start * SECTOR, data))
        except DmafsError:
            self._change(clone.name, uncertain=True)
            raise

    def clone_flush(self) -> None:
        clone = self._clone()
        if clone is not None:
            run(clone.flush())
            model = self.history.claims.clones[clone.name]
            if not model.uncertain:
                self._change(clone.name, sectors=tuple(versions[-1:] for versions in model.sectors))

    def clone_drop(self) -> None:
        clone = self._clone()
        if clone is not None:
            self.claim(clones_least=self.history.claims.clones_least - {clone.name})
            self.drive(self.volume.clones.drop(clone))
            clones = self.history.claims.clones
            self.claim(clones={name: model for name, model in clones.items() if name != clone.name})
            run(self.volume.drop_unheld())

    # -- windows ------------------------------------------------------------------------------------------------

    def window(self, *, name: str = "", empty: bool = False) -> None:
        """A window of some events comes into the journal."""
        volume, history = self.volume, self.history
        before = history.head
        window = volume.begin_window()
        self._place += self.rng.randint(1, 50)
        extents = [] if empty else [self._logged() for _ in range(self.rng.randint(1, 6))]
        assert history.ends is not None
        history.ends.add(history.head)
        history.positions.setdefault(history.head, set()).add(self._place)
        published = False
        try:
            with volume.gate():
                middle = self.rng.randint(0, len(extents))
                for part in (extents[:middle], extents[middle:]):
                    window.write(part)
                window.close(Flag.FLUSH, position=self._place, retained=max(self._place - 60, 1), name=name)
            published = True
            volume.publish(window)
        finally:
            if not published:
                self._abandon(window, before)
        for seq in range(before + 1, history.head + 1):
            history.times[seq] = window.time_ns

    def _logged(self) -> tuple[int, int, bytes | None]:
        start, length = self._extent()
        data = None if self.rng.random() < 0.15 else self._data(length)
        self.history.add(start, data or bytes(length * SECTOR))
        self.claim(head_most=self.history.head)
        return start, length, data

    def _abandon(self, window: Any, before: int) -> None:
        """Take a window back as capture does."""
        try:
            self.volume.abandon(window)
        finally:
            if not self.volume.failure:
                self.history.ends = {seq for seq in self.history.ends or () if seq <= before}
                self.history.take_back(before)
                self.claim(head_most=before)

    def abandoned(self) -> None:
        """A window is begun and given up, since the log isn't to be trusted any more."""
        before = self.history.head
        window = self.volume.begin_window()
        try:
            with self.volume.gate():
                for _ in range(self.rng.randint(1, 3)):
                    window.write([self._logged() for _ in range(self.rng.randint(1, 5))])
        finally:
            self._abandon(window, before)

    def named_window(self) -> None:
        """A mark is read from the log, sometimes without any event before it."""
        name = self._name("mark")
        self.window(name=name, empty=self.rng.random() < 0.5)
        head = self.history.head
        self.settle()
        self.claim(marks=self.history.claims.marks | {(head, name)})

    def settle(self) -> None:
        """What was captured becomes durable."""
        head = self.volume.journal.head
        run(self.volume.settle())
        self.claim(durable=max(self.history.claims.durable, head))
