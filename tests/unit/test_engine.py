"""The engine: the core under trio."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio

from dmafs.core.limits import IndexLimits, SegmentLimits, VolumeLimits
from dmafs.core.ondisk import Flag
from dmafs.core.segment import Segment
from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.volume import Volume
from dmafs.errors import ExistsError, NoSuchPointError, StoreError
from dmafs.service.passing import PassThroughEngine
from dmafs.taps.passthrough import PassThroughTap

SECTORS = 256
BOOT = UUID(int=1)


def make_engine(folder: Path, *, threads: int = 4, segments: SegmentLimits | None = None) -> PassThroughEngine:
    """Open the volume in *folder*, made if need be."""
    source = folder / "primary.img"
    disk = folder / "disk"
    if not disk.exists():
        source.write_bytes(bytes(SECTORS * 512))
        disk.mkdir()
        Volume.create(RealStorage(disk), name="disk", size_sectors=SECTORS, source=source, tap="fuse", created_ns=1)
    limits = VolumeLimits(segments=segments or SegmentLimits(), index=IndexLimits(indexed=1), reserve_bytes=0)
    volume = open_volume(disk, limits=limits)
    tap = PassThroughTap(volume, open_source(source, writable=True))
    return PassThroughEngine(volume, tap, tick_s=0.02, limiter=trio.CapacityLimiter(threads))


async def until(condition: object) -> None:
    """Wait until a condition holds."""
    assert callable(condition)
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.005)


@pytest.fixture
async def engine(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[PassThroughEngine]:
    engine = make_engine(tmp_path)
    await engine.recover(BOOT)
    await nursery.start(engine.run)
    await until(lambda: engine.volume.pointers.now.copied)
    yield engine
    nursery.cancel_scope.cancel()
    await engine.close()


def sector(text: str) -> bytes:
    return text.encode().ljust(512, b".")


async def test_group_commit(engine: PassThroughEngine) -> None:
    """Thirty-two writers that flush at the same time cost two commits: the first one's and that of all others."""
    before = engine.commits

    async def write_and_flush(number: int) -> None:
        engine.through.write(number * 512, sector(str(number)))
        seq = engine.volume.journal.head
        await engine.flush()
        assert engine.volume.journal.durable >= seq

    async with trio.open_nursery() as writers:
        for number in range(32):
            writers.start_soon(write_and_flush, number)
    assert 1 <= engine.commits - before <= 2


async def test_a_flush_with_nothing_to_do_costs_nothing(engine: PassThroughEngine) -> None:
    """Flushing twice syncs the files once."""
    engine.through.write(0, sector("once"))
    await engine.flush()
    records = engine.volume.journal.parts[-1].records
    await engine.flush()
    assert engine.volume.journal.parts[-1].records == records


async def test_ticks(engine: PassThroughEngine) -> None:
    """Writes that nobody flushes get a sync indicator and become durable."""
    engine.through.write(0, sector("lazy"))
    seq = engine.volume.journal.head
    await until(lambda: engine.volume.journal.durable >= seq)
    assert engine.volume.journal.is_indicated(seq)


def held_up(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Have batches of a backward journal wait: return the events that one has begun, and that they may go on."""
    begun, go_on = threading.Event(), threading.Event()
    plain_write = Segment.write_batch

    def slow_write(*arguments: Any) -> Any:
        begun.set()
        go_on.wait(10)
        return plain_write(*arguments)

    monkeypatch.setattr(Segment, "write_batch", slow_write)
    return begun, go_on


async def test_a_drop_stops_between_steps(engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the daemon doesn't wait for a long merge; while it runs, what was begun is finished."""
    for value in ("one", "two"):
        await engine.take_snapshot(value)
        engine.through.write(512 * (1 + (value == "two")), sector(value))
        engine.through.write(0, sector(value))
        await engine.sync()
    unlinked: list[str] = []
    plain_unlink = RealStorage.unlink

    def unlink(storage: RealStorage, name: str) -> None:
        if not name.endswith(".idx"):  # an index may be made anew meanwhile, by another task
            unlinked.append(name)
        plain_unlink(storage, name)

    monkeypatch.setattr(RealStorage, "unlink", unlink)
    begun, go_on = held_up(monkeypatch)
    two = engine.volume.snapshots.find("two")
    assert two is not None
    async with trio.open_nursery() as dropping:
        dropping.start_soon(engine.drop_snapshot, two)
        await until(begun.is_set)
        dropping.cancel_scope.cancel()
        go_on.set()
    assert unlinked == []
    await until(lambda: not engine.volume.snapshots.hidden())
    assert unlinked
    engine.volume.check()


async def test_a_drop_does_not_wait_for_a_sync(engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is hidden at once, also the one that the sync feeds, and gone for good once the sync has ended."""
    engine.through.write(0, sector("one"))
    await engine.take_snapshot("one")
    await engine.sync()
    engine.through.write(0, sector("two"))
    begun, go_on = held_up(monkeypatch)
    one = engine.volume.snapshots.find("one")
    assert one is not None
    async with trio.open_nursery() as syncing:
        syncing.start_soon(engine.sync)
        await until(begun.is_set)
        with trio.fail_after(5):
            await engine.drop_snapshot(one)
        assert engine.syncing
        assert engine.volume.snapshots.find("one") is None
        go_on.set()
    await until(lambda: not engine.volume.snapshots.hidden())
    engine.volume.check()
    assert bytes(engine.volume.live.read(0, 3)) == b"two"


async def test_a_reader_is_waited_for(engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync doesn't overwrite the mirror under a reader that resolved before: the reader gets the old bytes."""
    engine.through.write(0, sector("old"))
    await engine.sync()
    snapshot = await engine.take_snapshot("old")
    image = engine.volume.image(snapshot.seq)
    engine.hold(image)
    engine.through.write(0, sector("new"))
    mirror = engine.volume.mirror
    resolved, go_on = threading.Event(), threading.Event()
    plain_read = mirror.read_into

    def slow_read(buffer: memoryview | bytearray, start: int, *, nowait: bool = False) -> None:
        if nowait:
            raise BlockingIOError
        if threading.current_thread() is not threading.main_thread() and not resolved.is_set():
            resolved.set()
            assert go_on.wait(10)
        plain_read(buffer, start)

    monkeypatch.setattr(mirror, "read_into", slow_read)
    answers: list[bytes] = []

    async def read() -> None:
        answers.append(bytes(await engine.read(image, 0, 512)))

    async with trio.open_nursery() as tasks:
        tasks.start_soon(read)
        await until(resolved.is_set)
        tasks.start_soon(engine.sync)
        await trio.sleep(0.1)
        assert engine.volume.pointers.now.mirror_seq == snapshot.seq, "the sync waits"
        go_on.set()
    assert answers == [sector("old")]
    assert engine.volume.pointers.now.mirror_seq > snapshot.seq
    monkeypatch.undo()
    assert bytes(await engine.read(image, 0, 512)) == sector("old")
    engine.release(image)


async def test_what_a_held_image_kept_is_dropped(engine: PassThroughEngine) -> None:
    """A held moment outlives syncs as a hidden snapshot, and goes when it is released."""
    engine.through.write(0, sector("first"))
    await engine.flush()
    engine.through.write(0, sector("held"))
    await engine.flush()
    image = engine.volume.image(engine.volume.journal.head)
    engine.hold(image)
    engine.through.write(0, sector("later"))
    await engine.sync()
    hidden = [snapshot for snapshot in engine.volume.snapshots.all() if snapshot.hidden]
    assert [snapshot.seq for snapshot in hidden] == [image.seq]
    assert bytes(await engine.read(image, 0, 512)) == sector("held")
    engine.release(image)
    await until(lambda: not any(snapshot.hidden for snapshot in engine.volume.snapshots.all()))
    with pytest.raises(NoSuchPointError):
        engine.volume.image(image.seq)
    engine.volume.check()


async def test_snapshot_names_are_unique(engine: PassThroughEngine) -> None:
    """A second snapshot of the same name is refused; two names at one moment are two snapshots."""
    await engine.take_snapshot("a")
    with pytest.raises(ExistsError):
        await engine.take_snapshot("a")
    await engine.take_snapshot("b")
    assert [snapshot.name for snapshot in engine.volume.snapshots] == ["a", "b"]


async def test_a_failed_fsync_ends_all_writing(engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the volume is read-only, and says why; reading goes on."""
    engine.through.write(0, sector("before"))

    def fail() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(engine.tap.primary, "datasync", fail)
    with pytest.raises(StoreError, match="input/output error"):
        await engine.flush()
    monkeypatch.undo()
    with pytest.raises(StoreError, match="read-only"):
        engine.through.write(0, sector("after"))
    with pytest.raises(StoreError, match="read-only"):
        await engine.flush(Flag.TICK)
    assert bytes(await engine.read(engine.volume.live, 0, 512)) == sector("before")


async def test_a_cancelled_flush_forgets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gives up waiting for a flush doesn't take the journal's files from the next one."""
    engine = make_engine(tmp_path, threads=1)
    await engine.recover(BOOT)
    synced = []
    monkeypatch.setattr(RealFile, "datasync", lambda file: synced.append(file.name))
    engine.through.write(0, sector("x"))
    await engine.limiter.acquire_on_behalf_of("somebody")
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            with trio.move_on_after(0.05):
                await engine.flush()

        nursery.start_soon(give_up)
        await trio.sleep(0.1)
        assert not synced
        engine.limiter.release_on_behalf_of("somebody")
    await engine.flush()
    assert len(synced) == 3
    assert engine.volume.journal.durable == engine.volume.journal.head
    monkeypatch.undo()
    await engine.close()


async def test_a_sync_waits_for_the_readers_of_a_resync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of a resync reads through journals that a sync lets go: they stay open until it is done."""
    engine = make_engine(tmp_path, segments=SegmentLimits(data_sectors=4, records=4))
    await engine.recover(BOOT)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await until(lambda: engine.volume.pointers.now.copied)
        for number in range(40):
            engine.through.write(number * 512, sector(str(number)))
        await engine.flush()
        nursery.cancel_scope.cancel()
    engine.volume.close()
    engine.tap.primary.close()
    engine = make_engine(tmp_path)
    await engine.recover(UUID(int=2))
    begun, go_on = threading.Event(), threading.Event()
    plain_read = engine.tap.primary.read_into

    def slow_read(buffer: bytearray | memoryview, offset: int) -> None:
        begun.set()
        assert go_on.wait(10)
        plain_read(buffer, offset)

    monkeypatch.setattr(engine.tap.primary, "read_into", slow_read)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await until(begun.is_set)
        nursery.start_soon(engine.sync)
        await trio.sleep(0.1)
        assert engine.volume.pointers.now.mirror_seq == 0, "the sync waits"
        go_on.set()
        await until(lambda: not engine.volume.journal.gaps and engine.volume.pointers.now.mirror_seq >= 40)
        await engine.sync()
        assert bytes(await engine.read(engine.volume.live, 39 * 512, 512)) == sector("39")
        nursery.cancel_scope.cancel()
    monkeypatch.undo()
    await engine.close()


async def test_what_is_finished_has_an_index_soon(tmp_path: Path, nursery: trio.Nursery) -> None:
    """Also if nobody opens an image: else the next start would have to make all of them."""
    engine = make_engine(tmp_path, segments=SegmentLimits(records=4))
    await engine.recover(BOOT)
    await nursery.start(engine.run)
    await until(lambda: engine.volume.pointers.now.copied)

    def indexes(directory: str) -> set[str]:
        return {path.stem for path in (tmp_path / "disk" / directory).glob("*.idx")}

    for number in range(10):
        engine.through.write(number * 512, sector(str(number)))
        await engine.flush()
    sealed = [Path(part.stem).name for part in engine.volume.journal.parts if part.seal is not None]
    assert len(sealed) >= 2
    await until(lambda: indexes("forward") >= set(sealed))
    for number in range(2):
        engine.through.write(number * 512, sector("again"))
        await engine.sync()
    closed = [Path(one.stem).name for one in engine.volume.snapshots][:-1]
    assert closed
    await until(lambda: indexes("backward") >= set(closed))
    nursery.cancel_scope.cancel()
    await engine.close()


async def test_digest(engine: PassThroughEngine) -> None:
    """The digest is that of all bytes of the image."""
    import xxhash  # noqa: PLC0415

    engine.through.write(512, sector("some"))
    expected = xxhash.xxh3_128_hexdigest(bytes(512) + sector("some") + bytes((SECTORS - 2) * 512))
    await engine.flush()
    assert await engine.digest(engine.volume.image(engine.volume.journal.head)) == expected


async def test_close_leaves_journal_and_primary_equal(tmp_path: Path) -> None:
    """After an orderly stop nothing is written again; after a kill everything since the last flush is."""
    engine = make_engine(tmp_path)
    await engine.recover(BOOT)
    engine.through.write(0, sector("flushed"))
    await engine.close()
    engine = make_engine(tmp_path)
    assert engine.volume.pointers.now.clean
    assert await engine.recover(BOOT) == 0
    engine.through.write(512, sector("not flushed"))
    engine.volume.close()
    engine.tap.primary.close()
    (tmp_path / "primary.img").write_bytes(bytes(SECTORS * 512))  # the primary lost what wasn't flushed, and more
    engine = make_engine(tmp_path)
    assert await engine.recover(BOOT) == 1
    assert (tmp_path / "primary.img").read_bytes()[512:1024] == sector("not flushed")
    await engine.close()
