"""All volumes of a store in one daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
import trio

from dmafs.core.storage import open_source
from dmafs.core.store import Store, create_volume
from dmafs.core.volume import VolumeLimits
from dmafs.errors import ExistsError
from dmafs.service.appliance import Appliance
from dmafs.service.engine import Engine
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
        engines[name] = Engine(volume, tap, tick_s=0.02, limiter=trio.CapacityLimiter(4))
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
                appliance.write_tap(name, 0, counter.to_bytes(8, "little").ljust(512, b"."))
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
    appliance.write_tap("a", 0, b"old".ljust(512) * SECTORS)
    await appliance.flush_tap("a")
    image = appliance.image_at("a", "0s ago")
    parts = appliance.read_at(image, 0, 512)
    first = await anext(parts)
    appliance.write_tap("a", 0, b"new".ljust(512) * SECTORS)
    await appliance.sync()
    assert bytes(await appliance.read(image, 512, 512)) == first == b"old".ljust(512)
    await parts.aclose()
    assert image.pins == 0
