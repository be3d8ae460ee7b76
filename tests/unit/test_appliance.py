"""All volumes of a store in one daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
import trio

from dmafs.core.limits import VolumeLimits
from dmafs.core.storage import RealStorage, open_source
from dmafs.core.store import Store, create_volume
from dmafs.errors import (
    CloneBusyError,
    ExistsError,
    NoSuchCloneError,
    NoSuchPointError,
    ReadOnlyError,
    StoreError,
)
from dmafs.service.appliance import Appliance
from dmafs.service.passing import PassThroughEngine
from dmafs.service.report import clones_of, image_at
from dmafs.taps.passthrough import PassThroughTap

SECTORS = 64


@pytest.fixture
async def appliance(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Appliance]:
    """Two volumes a and b, protected."""
    for name in ("a", "b"):
        source = tmp_path / f"{name}.img"
        source.write_bytes(bytes(SECTORS * 512))
        create_volume(tmp_path / "store", name, source=source, tap="fuse")
    store = Store(tmp_path / "store", limits=VolumeLimits(reserve_bytes=0))
    engines = {}
    for name, volume in store.volumes.items():
        tap = PassThroughTap(volume, open_source(Path(volume.info.source), writable=True))
        engines[name] = PassThroughEngine(volume, tap, tick_s=0.02, limiter=trio.CapacityLimiter(4))
    for engine in engines.values():
        await engine.recover(UUID(int=1))
        await nursery.start(engine.run)
    with trio.fail_after(10):
        for volume in store.volumes.values():
            while not volume.pointers.now.copied:  # noqa: ASYNC110 - what is waited for has no event
                await trio.sleep(0.005)
    yield Appliance(store, engines)
    nursery.cancel_scope.cancel()
    for engine in engines.values():
        await engine.close()
    store.close()


def number_at(data: memoryview) -> int:
    return int.from_bytes(bytes(data[:8]), "little")


async def test_a_snapshot_is_one_instant_of_all_volumes(appliance: Appliance) -> None:
    """A writer that goes from a to b and back is never caught with b ahead of a or more than one write behind."""
    counter = 0
    done = False

    async def write() -> None:
        nonlocal counter
        while not done:
            counter += 1
            for name in ("a", "b"):
                await appliance.write_tap(name, 0, counter.to_bytes(8, "little").ljust(512, b"."))
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as writers:
        writers.start_soon(write)
        for number in range(8):
            await appliance.take_snapshot(f"s{number}")
        done = True
    for number in range(8):
        seqs = appliance.snapshot_seqs(f"s{number}")
        a, b = [number_at(appliance.image(name, seqs[name]).read(0, 512)) for name in ("a", "b")]
        assert a - 1 <= b <= a
        at = appliance.seqs_at(appliance.resolve(f"s{number}"))
        assert at == seqs, "at/<name> and snapshots/<name> are the same moment"


async def test_a_name_that_one_volume_has_is_taken_nowhere(appliance: Appliance) -> None:
    """All volumes take a snapshot, or none does."""
    await appliance._engines["b"].take_snapshot("mine")
    with pytest.raises(ExistsError):
        await appliance.take_snapshot("mine")
    assert appliance.snapshot_seqs("mine").keys() == {"b"}


async def test_a_long_read_is_of_one_moment(appliance: Appliance) -> None:
    """What is read in parts is of one moment, also when a sync passes it meanwhile."""
    await appliance.write_tap("a", 0, b"old".ljust(512) * SECTORS)
    await appliance.flush_tap("a")
    image = image_at(appliance.volumes, "a", "0s ago")
    parts = appliance.read_at(image, 0, 512)
    first = await anext(parts)
    await appliance.write_tap("a", 0, b"new".ljust(512) * SECTORS)
    await appliance.sync()
    assert bytes(await appliance.read(image, 512, 512)) == first == b"old".ljust(512)
    await parts.aclose()
    assert image.pins == 0


async def shown(appliance: Appliance, name: str, volume: str) -> int:
    return number_at(await appliance.read_clone(appliance.clones(name)[volume], 0, 512))


async def test_a_clone_is_one_instant_of_all_volumes(appliance: Appliance) -> None:
    """Of a moment or of now: each volume is as it was then, while a writer goes on."""
    counter = 0
    done = False

    async def write() -> None:
        nonlocal counter
        while not done:
            counter += 1
            for name in ("a", "b"):
                await appliance.write_tap(name, 0, counter.to_bytes(8, "little").ljust(512, b"."))
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as writers:
        writers.start_soon(write)
        for number in range(4):
            await appliance.create_clone(f"now{number}", None)
            await appliance.create_clone(f"then{number}", "0s ago")
        done = True
    for name in appliance.clone_names():
        a, b = await shown(appliance, name, "a"), await shown(appliance, name, "b")
        assert a - 1 <= b <= a
        seqs = {volume: clone.seq for volume, clone in appliance.clones(name).items()}
        assert all(appliance.image(volume, seq).pins for volume, seq in seqs.items())
    assert len(clones_of(appliance.volumes)["clones"]) == 8


async def test_no_volume_is_cloned_when_one_cannot_be(appliance: Appliance, monkeypatch: pytest.MonkeyPatch) -> None:
    """All volumes have the clone or none has: a name that is taken, an error on the way, a moment that isn't there."""
    await appliance.create_clone("mine", None)
    with pytest.raises(ExistsError):
        await appliance.create_clone("mine", None)
    with pytest.raises(NoSuchPointError):
        await appliance.create_clone("other", "seq:1")
    make = RealStorage.make_directory

    def fail(storage: RealStorage, name: str) -> None:
        if storage._root.name == "b":
            raise OSError(5, "broken")
        make(storage, name)

    with monkeypatch.context() as patch:
        patch.setattr(RealStorage, "make_directory", fail)
        with pytest.raises(StoreError, match="clone other of volume b: broken"):
            await appliance.create_clone("other", None)
    assert appliance.clone_names() == ["mine"]
    seq = appliance.clones("mine")["a"].seq
    assert appliance.image("a", seq).pins == 1
    await appliance.create_clone("other", None)


async def test_a_clone_is_dropped_as_a_whole(appliance: Appliance) -> None:
    """While one volume's image is open, none is dropped; afterwards all are, and what was kept for them."""
    await appliance.create_clone("mine", None)
    clones = appliance.clones("mine")
    clones["b"].opens += 1
    with pytest.raises(CloneBusyError):
        await appliance.drop_clone("mine")
    assert appliance.clones("mine") == clones
    clones["b"].opens -= 1
    await appliance.write_tap("a", 0, b"x".ljust(512))
    await appliance.sync()
    await appliance.drop_clone("mine")
    with pytest.raises(NoSuchCloneError):
        await appliance.drop_clone("mine")
    with trio.fail_after(10):
        while any(s.hidden for e in appliance._engines.values() for s in e.volume.snapshots.all()):  # noqa: ASYNC110
            await trio.sleep(0.005)


async def test_writers_of_one_clone_do_not_mix(appliance: Appliance) -> None:
    """Parts of one block, written by many at once with flushes in between, are all there."""
    await appliance.create_clone("mine", None)
    clone = appliance.clones("mine")["a"]

    async def write(number: int) -> None:
        await appliance.write_clone(clone, number * 100, bytes([number + 1]) * 100)
        if number % 5 == 0:
            await appliance.flush_clone(clone)

    async with trio.open_nursery() as writers:
        for number in range(60):
            writers.start_soon(write, number)
    found = await appliance.read_clone(clone, 0, 6000)
    assert found == b"".join(bytes([number + 1]) * 100 for number in range(60))


async def test_snapshots_without_a_name_are_a_group(appliance: Appliance) -> None:
    """Of one instant, found by its canonical time, also where one volume has written nothing since the last one."""
    await appliance.write_tap("a", 0, b"first".ljust(512))
    await appliance.write_tap("b", 0, b"first".ljust(512))
    first = await appliance.take_scheduled(frozen=False)
    assert not appliance.has_news()
    await appliance.write_tap("b", 0, b"second".ljust(512))
    assert appliance.has_news()
    second = await appliance.take_scheduled(frozen=True)
    assert appliance.snapshot_ids() == [first, second]
    seqs = [appliance.snapshot_seqs(identifier) for identifier in (first, second)]
    assert seqs[0]["a"] == seqs[1]["a"]
    assert seqs[0]["b"] < seqs[1]["b"]
    for _ in range(2):
        for identifier, expected in zip((first, second), seqs, strict=True):
            assert appliance.snapshot_seqs(identifier) == expected
            assert appliance.seqs_at(appliance.resolve(identifier)) == expected
            assert appliance.snapshot_time(identifier) == appliance.resolve(identifier)
        await appliance.write_tap("a", 0, b"third".ljust(512))
        await appliance.write_tap("b", 0, b"third".ljust(512))
        await appliance.sync()
    assert appliance.consistency(appliance.image("b", seqs[0]["b"])) == "exact"
    assert appliance.consistency(appliance.image("b", seqs[1]["b"])) == "frozen"
    await appliance.drop_snapshot(second)
    assert second not in appliance.snapshot_ids()
    assert appliance.snapshot_seqs(first) == seqs[0]


async def test_the_same_instant_is_one_snapshot(appliance: Appliance) -> None:
    """Taken twice without a write between, it is there once; and a failure doesn't drop the one that was there."""
    await appliance.write_tap("a", 0, b"x".ljust(512))
    identifier = await appliance.take_scheduled(frozen=False)
    assert await appliance.take_scheduled(frozen=False) == identifier
    assert [len(list(volume.snapshots)) for volume in appliance._volumes.values()] == [1, 1]
    broken = appliance._engines["b"]

    async def fail(*_args: object, **_keywords: object) -> None:
        await trio.lowlevel.checkpoint()
        raise ExistsError("no")

    broken.snapshot_at = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(ExistsError):
        await appliance.take_scheduled(frozen=False)
    assert appliance.snapshot_ids() == [identifier]


async def test_volumes_that_cannot_are_left_out(appliance: Appliance) -> None:
    """A schedule goes on with the volumes that are protected; with none it is an error, not a crash."""
    for name in ("a", "b"):
        await appliance.write_tap(name, 0, b"x".ljust(512))
    await appliance.flush_tap("a")
    appliance._volumes["b"].gate.failure = "broken"
    identifier = await appliance.take_scheduled(frozen=False)
    assert appliance.snapshot_seqs(identifier).keys() == {"a"}
    appliance._volumes["a"].gate.failure = "broken"
    assert not appliance.has_news()
    with pytest.raises(NoSuchPointError):
        await appliance.take_scheduled(frozen=False)
    with pytest.raises(ReadOnlyError):
        await appliance.mark("m")
    for volume in appliance._volumes.values():
        volume.gate.failure = ""


async def test_a_mark_is_listed_once(appliance: Appliance) -> None:
    """It has one moment, that of the volume that was written to last, and no other one beside it."""
    for name in ("a", "b"):
        await appliance.write_tap(name, 0, b"x".ljust(512))
    await appliance.mark("m")
    times, names = appliance.landmarks()
    assert names == {"m": appliance.live("b").time_ns}
    assert appliance.image("a", appliance.seqs_at(names["m"])["a"]).time_ns not in times
    assert times[-1] == names["m"]


async def test_a_mark_is_one_instant_of_all_volumes(appliance: Appliance) -> None:
    """A name set again means the newest; a snapshot's name can't be one."""
    for value in (b"first", b"second"):
        await appliance.write_tap("a", 0, value.ljust(512))
        await appliance.write_tap("b", 0, value.ljust(512))
        await appliance.write_tap("a", 0, (value + b" again").ljust(512))
        await appliance.mark("m")
        marked = appliance.seqs_at(appliance.resolve("m"))
        assert marked == {name: volume.journal.durable for name, volume in appliance._volumes.items()}
        assert appliance.landmarks()[1]["m"] == appliance.resolve("m")
    await appliance.take_snapshot("taken")
    with pytest.raises(ExistsError):
        await appliance.mark("taken")


async def test_a_sync_by_policy_opens_no_snapshot_but_the_first(appliance: Appliance) -> None:
    """It feeds the open snapshot; where there is none, the mirror's moment stays."""
    engine = appliance._engines["a"]
    for value in (b"one", b"two", b"three"):
        await appliance.write_tap("a", 0, value.ljust(512))
        await engine.flush()
        before = engine.volume.pointers.now.mirror_seq
        assert await engine.sync_to(engine.volume.journal.durable) == before + 1
    assert [snapshot.seq for snapshot in engine.volume.snapshots] == [0]
    assert bytes(appliance.image("a", 0).read(0, 5)) == bytes(5)
