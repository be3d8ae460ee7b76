"""Claims about dmafs.service.keeper, the appliance's part in it, and alarms: pins, thinning, a store that runs full."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
import trio

from dmafs.core.limits import VolumeLimits
from dmafs.core.retention import KeepRules
from dmafs.core.storage import RealStorage, open_source
from dmafs.core.store import Store, create_volume
from dmafs.errors import NoSuchSnapshotError, PinnedError, ReadOnlyError, StoreFullError
from dmafs.service import appliance as appliances
from dmafs.service import keeper as keeping
from dmafs.service.alarms import Alarms
from dmafs.service.appliance import Appliance
from dmafs.service.keeper import Keeper
from dmafs.service.passing import PassThroughEngine
from dmafs.service.report import points_of
from dmafs.taps.passthrough import PassThroughTap
from dmafs.tree.backend import Space
from tests.unit.tools import Clock

SECTORS = 256
KIB = 1024
RESERVE = 64 * KIB
RULES = KeepRules(within_s=0, hourly=0, daily=0, weekly=0, monthly=0, yearly=0, minimum=1, named=False)


class Bench:
    """An appliance of two volumes whose store has as much space as a test says."""

    def __init__(self, store: Store, engines: dict[str, PassThroughEngine]) -> None:
        self.store = store
        self.engines = engines
        self.appliance = Appliance(store, engines, rules=RULES)
        self.capacity = 1 << 40

    def free(self) -> int:
        used = 0
        for path in self.store.path.glob("*/backward/*"):
            with contextlib.suppress(FileNotFoundError):  # dropped just now
                used += path.stat().st_size
        return max(0, self.capacity - used)

    def ids(self) -> list[str]:
        return self.appliance.snapshot_ids()

    async def snapshot(self, name: str, sectors: int = 64) -> None:
        """Take a snapshot and have a sync save that much to it, in both volumes."""
        await self.appliance.take_snapshot(name)
        for volume in ("a", "b"):
            await self.appliance.write_tap(volume, 0, name.encode().ljust(512, b".") * sectors)
        for engine in self.engines.values():
            await engine.flush()
        await self.appliance.sync()

    def alarms(self) -> dict[str, str]:
        return {alarm["kind"]: alarm["message"] for alarm in self.appliance.status()["alarms"]}


@pytest.fixture
async def bench(tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    for name in ("a", "b"):
        source = tmp_path / f"{name}.img"
        source.write_bytes(b"begin".ljust(512) * SECTORS)
        create_volume(tmp_path / "store", name, source=source, tap="fuse")
    store = Store(tmp_path / "store", limits=VolumeLimits(reserve_bytes=RESERVE))
    engines = {}
    for name, volume in store.volumes.items():
        tap = PassThroughTap(volume, open_source(Path(volume.info.source), writable=True))
        engines[name] = PassThroughEngine(volume, tap, tick_s=10, limiter=trio.CapacityLimiter(4))
    for engine in engines.values():
        await engine.recover(UUID(int=1))
        await nursery.start(engine.run)
    with trio.fail_after(10):
        for volume in store.volumes.values():
            while not volume.pointers.now.copied:  # noqa: ASYNC110 - what is waited for has no event
                await trio.sleep(0.005)
    made = Bench(store, engines)
    monkeypatch.setattr(made.appliance, "space", lambda: Space(made.capacity, made.free(), made.free()))
    monkeypatch.setattr(RealStorage, "free_bytes", lambda _: made.free())
    yield made
    nursery.cancel_scope.cancel()
    for engine in engines.values():
        await engine.close()
    store.close()


# -- pins and thinning ----------------------------------------------------------------------------------------------


async def test_a_pin_is_of_all_volumes(bench: Bench) -> None:
    """A pinned snapshot is dropped in no volume; unpinned it goes in all; there is no pin for what isn't there."""
    await bench.snapshot("one")
    await bench.appliance.pin("one")
    points = points_of(bench.appliance.volumes)
    assert [one["pinned"] for one in points["snapshots"] if one["id"] == "one"] == [True]
    assert {one["volume"] for one in points["points"] if one["pinned"]} == {"a", "b"}
    with pytest.raises(PinnedError, match="one is pinned"):
        await bench.appliance.drop_snapshot("one")
    assert bench.appliance.snapshot_seqs("one").keys() == {"a", "b"}
    await bench.appliance.unpin("one")
    await bench.appliance.drop_snapshot("one")
    assert "one" not in bench.ids()
    for action in (bench.appliance.pin, bench.appliance.unpin):
        with pytest.raises(NoSuchSnapshotError):
            await action("one")


async def test_a_pin_that_one_volume_refuses_is_in_none(bench: Bench) -> None:
    """What can't be pinned everywhere is pinned nowhere."""
    await bench.snapshot("one")
    bench.store.volumes["b"].gate.failure = "its disk is gone"
    with pytest.raises(ReadOnlyError):
        await bench.appliance.pin("one")
    bench.store.volumes["b"].gate.failure = ""
    assert not [one for one in points_of(bench.appliance.volumes)["snapshots"] if one["pinned"]]
    assert not list(bench.store.path.glob("*/backward/*.pin"))


async def test_a_snapshot_pinned_in_one_volume_only_is_dropped_in_none(bench: Bench) -> None:
    """A group is kept or dropped as a whole."""
    await bench.snapshot("one")
    pinned = bench.store.volumes["b"].snapshots.find("one")
    assert pinned is not None
    await bench.engines["b"].do(bench.store.volumes["b"].pin(pinned))
    with pytest.raises(PinnedError):
        await bench.appliance.drop_snapshot("one")
    assert bench.appliance.snapshot_seqs("one").keys() == {"a", "b"}
    await bench.snapshot("two")
    await bench.appliance.thin()
    assert bench.ids()[0] == "one"


async def test_thinning_drops_what_no_rule_keeps(bench: Bench) -> None:
    """A dry run changes nothing and says the same; images of what stays are the same afterwards, one held, too."""
    for name in ("one", "two", "three", "four"):
        await bench.snapshot(name)
    await bench.appliance.pin("two")
    held = bench.appliance.image("a", bench.appliance.snapshot_seqs("three")["a"])
    bench.appliance.hold(held)
    before = bench.ids()
    plan = await bench.appliance.thin(dry_run=True)
    assert bench.ids() == before
    done = await bench.appliance.thin()
    assert [(one["id"], one["kept"], one["reasons"]) for one in done["snapshots"]] == [
        (one["id"], one["kept"], one["reasons"]) for one in plan["snapshots"]
    ]
    assert (plan["dry_run"], done["dry_run"]) == (True, False)
    assert bench.ids() == ["two", before[-1]]
    assert [one["reasons"] for one in done["snapshots"] if one["kept"]] == [["pinned"], ["minimum"]]
    assert bytes(await bench.appliance.read(held, 0, 512)) == b"two".ljust(512, b".")
    two = bench.appliance.image("a", bench.appliance.snapshot_seqs("two")["a"])
    assert bytes(await bench.appliance.read(two, 0, 512)) == b"one".ljust(512, b".")
    bench.appliance.release(held)


async def test_a_volume_that_cannot_drop_does_not_stop_the_others(bench: Bench) -> None:
    """Thinning goes on elsewhere and then says what went wrong; the keeper has an alarm on until it goes again."""
    await bench.snapshot("one")
    await bench.snapshot("two")
    bench.store.volumes["a"].gate.failure = "its disk is gone"
    with pytest.raises(ReadOnlyError):
        await bench.appliance.thin()
    assert bench.appliance.snapshot_seqs("one").keys() == {"a"}
    keeper = Keeper(bench.appliance)
    await keeper.check()
    assert bench.alarms() == {"retention": "snapshots can't be thinned: volume a is read-only: its disk is gone"}
    bench.store.volumes["a"].gate.failure = ""
    await keeper.check()
    assert bench.alarms() == {}
    assert "one" not in bench.ids()


async def test_a_damaged_snapshot_does_not_stop_the_others(bench: Bench) -> None:
    """It stays, since older images may need what it holds; all others go, and an alarm tells."""
    for name in ("one", "two", "three"):
        await bench.snapshot(name)
    two = bench.store.volumes["a"].snapshots.find("two")
    assert two is not None
    for segment in bench.store.volumes["a"].snapshots.unload(keep=None, everything=True):
        segment.close()
    (bench.store.path / "a" / f"{two.stem}.dat").write_bytes(b"")
    await Keeper(bench.appliance).check()
    assert "two" in bench.ids()
    assert not {"one", "three"} & set(bench.ids()[:-1])
    assert "snapshots can't be thinned" in bench.alarms()["retention"]


async def test_the_keeper_checks_again_and_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes later is thinned, too."""
    monkeypatch.setattr(keeping, "CHECK_S", 0.01)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Keeper(bench.appliance).run)
        for name in ("one", "two", "three"):
            await bench.snapshot(name)
        with trio.fail_after(10):
            while len(bench.ids()) > 1:  # noqa: ASYNC110 - what is waited for has no event
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()


# -- a store that runs full -----------------------------------------------------------------------------------------


async def fill_with(bench: Bench, *names: str) -> None:
    for name in names:
        await bench.snapshot(name)


async def test_room_is_made_from_the_oldest(bench: Bench) -> None:
    """With room enough nothing is done; else as many of the oldest go as it takes to have half a reserve more."""
    await fill_with(bench, "one", "two", "three", "four", "five")
    ids = bench.ids()
    await bench.appliance.make_room(4096)
    assert bench.ids() == ids
    bench.capacity -= bench.free() - RESERVE - 4096
    await bench.appliance.make_room(4096)
    assert bench.ids() == ids
    await bench.appliance.make_room(4097)
    assert bench.ids() == ids[1:], "one holds 64 KiB and some"
    assert bench.free() >= RESERVE + 4097 + RESERVE // 2
    await bench.appliance.make_room(160 * KIB)
    assert bench.ids() == ids[3:]
    assert bench.free() >= RESERVE + 160 * KIB
    [message] = bench.alarms().values()
    assert "runs full" in message
    assert "dropped the 2 oldest snapshots; history begins at 2" in message


async def test_the_floor_is_kept_and_the_alarm_says_so(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Pinned snapshots and the newest few stay, whatever is needed; that is told, and not tried too often."""
    await fill_with(bench, "one", "two")
    await bench.appliance.pin("one")
    await bench.appliance.thin()
    ids = bench.ids()
    assert ids[0] == "one"
    bench.capacity = 0
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            await bench.appliance.make_room(4096)
    assert bench.ids() == ids
    [record] = caplog.records
    assert "no snapshot can be dropped; history begins at" in record.message
    assert bench.alarms() == {"space": record.message}
    with pytest.raises(StoreFullError):
        await bench.appliance.write_tap("a", 0, bytes(64 * 512))  # more than the allowance from before


async def test_the_alarm_is_logged_once_until_it_has_cleared(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays on for a time and until there is twice the reserve; it is logged when it begins and gets worse."""
    monkeypatch.setattr(appliances, "FRUITLESS_S", 0.0)
    keeper = Keeper(bench.appliance)
    bench.appliance.rules = KeepRules(named=False, minimum=1)
    await fill_with(bench, "one", "two", "three", "four", "five")

    def logged() -> list[str]:
        return [record.message for record in caplog.records if record.levelno == logging.ERROR]

    async def run_full() -> None:
        bench.capacity -= bench.free() - RESERVE
        await keeper.check()

    await run_full()
    assert len(logged()) == 1
    first = bench.alarms()["space"]
    assert "dropped the oldest snapshot;" in first
    await run_full()
    assert len(logged()) == 1
    assert bench.alarms()["space"] != first
    while len(bench.ids()) > 1:
        await run_full()
    await run_full()
    assert len(logged()) == 2
    assert "no snapshot can be dropped" in logged()[1]
    bench.capacity += RESERVE
    await keeper.check()
    assert "space" in bench.alarms()
    monkeypatch.setattr(keeping, "ALARM_S", 0.0)
    bench.capacity -= 1
    await keeper.check()
    assert "space" in bench.alarms()
    bench.capacity += 1
    await keeper.check()
    assert bench.alarms() == {}
    monkeypatch.setattr(keeping, "ALARM_S", 3600.0)
    await fill_with(bench, "six")
    await run_full()
    assert len(logged()) == 3


async def test_many_who_need_room_drop_no_more_than_one_would(bench: Bench) -> None:
    """Writers that find the store full at the same time share the room that the first one gets."""
    await fill_with(bench, "one", "two", "three", "four")
    ids = bench.ids()
    bench.capacity -= bench.free() - RESERVE
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(bench.appliance.make_room, 4096)
    assert bench.ids() == ids[1:]


async def test_trouble_while_making_room_is_an_alarm(bench: Bench) -> None:
    """Nothing is raised to who needs the room: the write itself says that the store is full."""
    await fill_with(bench, "one", "two")
    bench.capacity -= bench.free()
    bench.store.volumes["a"].gate.failure = "its disk is gone"
    await bench.appliance.make_room(4096)
    assert "no snapshot can be dropped; volume a is read-only: its disk is gone; history" in bench.alarms()["space"]
    bench.store.volumes["a"].gate.failure = ""


# -- alarms ---------------------------------------------------------------------------------------------------------


def test_alarms(caplog: pytest.LogCaptureFixture) -> None:
    """Each kind is on at most once, since it began, with its newest message; logged when it begins or gets worse."""
    clock = Clock(10**9)
    alarms = Alarms(clock)
    alarms.clear("x")
    alarms.set("x", "first")
    clock.now = 2 * 10**9
    alarms.set("x", "second")
    alarms.set("y", "other")
    alarms.set("x", "third", worse=True)
    alarms.set("x", "fourth", worse=True)
    assert [record.message for record in caplog.records] == ["first", "other", "third"]
    assert alarms.report() == [
        {"kind": "x", "volume": "", "since": "1970-01-01T00:00:01.000000000Z", "message": "fourth"},
        {"kind": "y", "volume": "", "since": "1970-01-01T00:00:02.000000000Z", "message": "other"},
    ]
    alarms.clear("x")
    alarms.set("x", "again")
    assert [record.message for record in caplog.records][-1] == "again"
    assert [alarm["kind"] for alarm in alarms.report()] == ["y", "x"]
