"""Claims about dmafs.service.passing: what becomes of writes when the store is full."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from dmafs.core import copy
from dmafs.core.digests import BLOCK_SECTORS
from dmafs.core.limits import VolumeLimits
from dmafs.core.ondisk import Flag
from dmafs.core.resync import needs_resync
from dmafs.core.storage import File, RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.volume import Volume
from dmafs.errors import StoreError, StoreFullError, TapError
from dmafs.service.checking import VERIFY
from dmafs.service.passing import PassThroughEngine
from dmafs.taps.passthrough import PassThroughTap
from tests.unit.test_engine import BOOT, SECTORS, until
from tests.unit.tools import fill

RESERVE = 4096


class Bench:
    """A volume in a store that is full when that is said, its primary, and its engine, which can be killed."""

    def __init__(self, folder: Path, nursery: trio.Nursery, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.nursery, self.patch = folder, nursery, patch
        self.primary = folder / "primary.img"
        self.primary.write_bytes(bytes(SECTORS * 512))
        self.expected = bytearray(SECTORS * 512)
        self.full = False
        self.alarms: list[str] = []
        (folder / "disk").mkdir()
        Volume.create(
            RealStorage(folder / "disk"),
            name="disk",
            size_sectors=SECTORS,
            source=self.primary,
            tap="fuse",
            created_ns=1,
        )

    async def start(self, *, goes_on: bool = True, copied: bool = True) -> PassThroughEngine:
        volume = open_volume(self.folder / "disk", limits=VolumeLimits(reserve_bytes=RESERVE))
        tap = PassThroughTap(volume, open_source(self.primary, writable=True))
        self.engine = PassThroughEngine(volume, tap, tick_s=0.02, limiter=trio.CapacityLimiter(4), goes_on=goes_on)
        self.engine.alarm = self.alarms.append
        self.patch.setattr(volume.storage, "free_bytes", lambda: 0 if self.full else 1 << 30)
        await self.engine.recover(BOOT)
        self.tasks = trio.CancelScope()
        await self.nursery.start(self._run)
        if copied:
            await until(lambda: volume.pointers.now.copied)
        return self.engine

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        self.ended = trio.Event()
        with self.tasks:
            await self.engine.run(task_status=task_status)
        self.ended.set()

    def fill(self) -> None:
        """Have the store be full from now on."""
        self.full = True
        self.engine.volume._allowance = 0

    async def write(self, at: int, value: int) -> None:
        await self.engine.write_tap(at * 512, fill(value))
        self.expected[at * 512 : at * 512 + 512] = fill(value)

    async def kill(self) -> None:
        self.tasks.cancel()
        await self.ended.wait()
        self.engine.volume.close()
        self.engine.tap.close()

    async def newest(self) -> bytes:
        return bytes(await self.engine.read(self.engine.volume.live, 0, SECTORS * 512))

    async def assert_whole(self) -> None:
        """Wait for the end of the gap; then primary and newest image are what was written, and a verify says so."""
        await until(lambda: not needs_resync(self.engine.volume) and not self.engine.loss)
        await until(lambda: self.engine.checking.current is None)
        assert self.primary.read_bytes() == self.expected
        assert await self.newest() == self.expected
        check = self.engine.checking.begin(VERIFY)
        with trio.fail_after(10):
            await check.done.wait()
        assert check.found is not None
        assert check.found.sectors == 0
        self.engine.volume.check()


@pytest.fixture
async def bench(tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    made = Bench(tmp_path, nursery, monkeypatch)
    yield made
    made.tasks.cancel()
    await made.ended.wait()
    await made.engine.close()


async def test_a_full_store_refuses(bench: Bench) -> None:
    """Nothing of a refused write is anywhere; as soon as there is space writes go on."""
    engine = await bench.start(goes_on=False)
    await bench.write(1, 1)
    bench.fill()
    with pytest.raises(StoreFullError):
        await engine.write_tap(512, fill(2))
    await engine.flush()
    assert bench.primary.read_bytes() == await bench.newest() == bench.expected
    assert engine.loss == ""
    bench.full = False
    await bench.write(2, 2)
    await bench.assert_whole()
    assert engine.volume.journal.gaps == []
    assert bench.alarms == []


async def test_writes_go_on_in_a_gap(bench: Bench) -> None:
    """Many writers at once see no error; the gap is told once, has no moments inside, and ends by itself."""
    engine = await bench.start()
    await bench.write(1, 1)
    bench.fill()
    async with trio.open_nursery() as writers:
        for number in range(2, 12):
            writers.start_soon(bench.write, number, number)
    await engine.flush()
    assert bench.primary.read_bytes() == bench.expected
    assert engine.loss.startswith("store of volume disk is full")
    assert engine.volume.journal.head == 1
    with pytest.raises(TapError, match="a gap has begun"):
        await engine.take_snapshot("later")
    assert len(bench.alarms) == 1
    bench.full = False
    await bench.assert_whole()
    (gap,) = engine.volume.journal.gaps
    assert (gap.begin, gap.end) == (1, engine.volume.journal.head)
    bench.fill()
    await bench.write(1, 99)
    bench.full = False
    await bench.assert_whole()
    assert len(engine.volume.journal.gaps) == len(bench.alarms) == 2


async def test_no_write_is_journaled_while_it_is_made_sure_that_none_is_redone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one for which there is space: after a kill it would be written over one that came after it."""
    engine = await bench.start()
    begun, go_on = threading.Event(), threading.Event()
    plain = engine.volume.note_durable

    def slow() -> None:
        begun.set()
        assert go_on.wait(10)
        plain()

    monkeypatch.setattr(engine.volume, "note_durable", slow)
    bench.fill()
    async with trio.open_nursery() as writers:
        writers.start_soon(bench.write, 1, 1)
        await until(begun.is_set)
        bench.full = False
        writers.start_soon(bench.write, 2, 2)
        for _ in range(10):
            await trio.lowlevel.checkpoint()  # a write that doesn't wait is done by then
        assert bench.primary.read_bytes() == bytes(SECTORS * 512)
        assert engine.volume.journal.head == 0
        go_on.set()
    await bench.assert_whole()


async def test_what_only_the_primary_has_is_flushed_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush in a gap makes the primary durable, though the journal has nothing to make durable."""
    engine = await bench.start()
    bench.fill()
    await bench.write(1, 1)
    flushed: list[bytes] = []
    plain = engine.through.primary.datasync

    def datasync() -> None:
        flushed.append(bench.primary.read_bytes())
        plain()

    monkeypatch.setattr(engine.through.primary, "datasync", datasync)
    await engine.flush()
    assert flushed == [bench.expected]


async def test_a_gap_that_cannot_be_recorded_is_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing would say that history lacks something: the write is refused, and capture goes on."""
    engine = await bench.start()
    await bench.write(1, 1)
    indicate = engine.volume.indicate

    def full(flag: Flag = Flag.FLUSH, name: str = "") -> Any:
        if flag == Flag.GAP:
            raise StoreFullError("not even that")
        return indicate(flag, name)

    monkeypatch.setattr(engine.volume, "indicate", full)
    bench.fill()
    for _ in range(2):
        with pytest.raises(StoreFullError, match="not even that"):
            await engine.write_tap(512, fill(2))
    bench.full = False
    await bench.write(2, 2)
    await bench.assert_whole()
    assert engine.volume.journal.gaps == []


async def test_a_primary_that_fails_in_a_gap_ends_all_writing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only, and nobody waits for ever."""
    engine = await bench.start()
    bench.fill()
    await bench.write(1, 1)

    def fail(*_arguments: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(engine.through.primary, "write", fail)
        with pytest.raises(StoreError, match="input/output error"):
            await engine.write_tap(0, fill(2))
    bench.full = False
    await until(lambda: not engine.loss)
    with trio.fail_after(5), pytest.raises(StoreError, match="read-only"):
        await engine.write_tap(0, fill(2))


async def test_a_kill_in_a_gap_redoes_nothing(bench: Bench) -> None:
    """What was journaled before the gap isn't written over what came in it; the next daemon ends the gap."""
    engine = await bench.start()
    await bench.write(1, 1)
    bench.fill()
    await bench.write(1, 2)
    await bench.kill()
    bench.full = False
    engine = await bench.start(copied=False)
    assert bench.primary.read_bytes() == bench.expected
    await bench.assert_whole()
    (gap,) = engine.volume.journal.gaps
    assert gap.begin == 1


@pytest.mark.parametrize("killed", [False, True])
async def test_a_loss_during_the_initial_copy(bench: Bench, monkeypatch: pytest.MonkeyPatch, *, killed: bool) -> None:
    """The copy begins anew, also if the daemon is killed before capture goes on: else it would end without the loss."""
    begun, go_on = threading.Event(), threading.Event()
    plain = copy._copy_chunk

    def slow(volume: Volume, primary: File, start: int, stop: int) -> None:
        plain(volume, primary, start, stop)
        if start:
            begun.set()
            assert go_on.wait(10)

    monkeypatch.setattr(copy, "_copy_chunk", slow)
    monkeypatch.setattr(copy, "CHUNK_SECTORS", BLOCK_SECTORS)
    monkeypatch.setattr(copy, "SAVE_SECTORS", BLOCK_SECTORS)
    engine = await bench.start(copied=False)
    await until(begun.is_set)
    assert engine.volume.pointers.now.copied_sectors == BLOCK_SECTORS
    bench.fill()
    async with trio.open_nursery() as writing:
        writing.start_soon(bench.write, 1, 1)
        await until(lambda: engine.loss)
        go_on.set()
    assert engine.volume.pointers.now.copied_sectors == 0
    if killed:
        await bench.kill()
        bench.full = False
        engine = await bench.start()
    bench.full = False
    await bench.write(2, 2)
    await until(lambda: engine.volume.pointers.now.copied)
    await bench.assert_whole()
    assert engine.volume.journal.gaps == []
