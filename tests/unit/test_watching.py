"""Claims about dmafs.service.watching: what raises an alarm, and how far things must get better before it is over."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
import trio

from dmafs.core.limits import VolumeLimits
from dmafs.core.ondisk import Flag
from dmafs.core.scrub import Scrubbed
from dmafs.core.storage import open_source
from dmafs.core.store import Store, create_volume
from dmafs.errors import CorruptionError, LogLostError
from dmafs.service.appliance import Appliance
from dmafs.service.configuration import AlarmsTable
from dmafs.service.passing import PassThroughEngine
from dmafs.service.watching import Watch
from dmafs.taps.passthrough import PassThroughTap
from dmafs.tree.backend import Space
from tests.unit.test_engine import until
from tests.unit.tools import Clock, flip

HOUR = 3600
NS = 10**9


class Bench:
    """An appliance whose clock and free space a test sets."""

    def __init__(self, store: Store, engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.volume = engine, engine.volume
        self.appliance = Appliance(store, {"disk": engine})
        self.free = 1000
        monkeypatch.setattr(self.appliance, "space", lambda: Space(1000, self.free, self.free))
        self.clock = Clock(self.volume.info.created_ns)
        self.volume.clock = self.clock
        self.watched()

    def watched(self, **table: object) -> None:
        self.watch = Watch(self.appliance, {"disk": self.engine}, AlarmsTable(**table), {})  # type: ignore[arg-type]

    def alarms(self) -> dict[tuple[str, str], str]:
        """Look, and return what is on."""
        self.watch.look()
        return {(one["kind"], one["volume"]): one["message"] for one in self.appliance.alarms.report()}


@pytest.fixture
async def bench(tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    source = tmp_path / "disk.img"
    source.write_bytes(b"begin".ljust(512) * 256)
    create_volume(tmp_path / "store", "disk", source=source, tap="fuse")
    store = Store(tmp_path / "store", limits=VolumeLimits(reserve_bytes=0))
    volume = store.volumes["disk"]
    engine = PassThroughEngine(
        volume, PassThroughTap(volume, open_source(source, writable=True)), tick_s=10, limiter=trio.CapacityLimiter(4)
    )
    await engine.recover(UUID(int=1))
    await nursery.start(engine.run)
    await until(lambda: volume.pointers.now.copied)
    yield Bench(store, engine, monkeypatch)
    nursery.cancel_scope.cancel()
    await engine.close()
    store.close()


async def test_free_space_has_two_thresholds(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Raised below the one, over at a quarter more; both are logged once, however often it is looked at."""
    caplog.set_level(logging.WARNING)
    bench.watched(free=0.1)
    for free, is_on in ((100, False), (99, True), (50, True), (124, True), (125, False), (100, False), (99, True)):
        bench.free = free
        assert (("free", "") in bench.alarms()) == is_on, free
        bench.alarms()
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING, logging.ERROR]
    assert "nearly full: 99 B of 1000 B are free, 9.9%" in caplog.records[0].message
    assert "alarm free is over" in caplog.records[1].message
    bench.watched(free=0.0)
    bench.appliance.alarms.clear("free")
    bench.free = 0
    assert bench.alarms() == {}


async def test_history_is_as_long_as_promised(bench: Bench) -> None:
    """Not before the volume is so old; raised when less can be had, over when a tenth more can."""
    bench.watched(history=HOUR)
    created = bench.volume.info.created_ns
    origin = bench.volume.pointers.now.origin_time_ns
    assert bench.alarms() == {}
    bench.clock.now = created + HOUR * NS - 1
    assert bench.alarms() == {}, "it can't be longer yet"
    bench.clock.now = created + HOUR * NS
    assert origin > created
    text = bench.alarms()["history", "disk"]
    assert "that is shorter than the 3600 s promised" in text
    bench.clock.now = origin + int(HOUR * 1.1) * NS - 1
    assert ("history", "disk") in bench.alarms()
    bench.clock.now = origin + int(HOUR * 1.1) * NS
    assert bench.alarms() == {}
    bench.watched()
    bench.clock.now = origin + 1
    assert bench.alarms() == {}, "nothing is promised"


async def test_a_read_that_finds_a_wrong_checksum_is_an_alarm_until_a_scrub(bench: Bench) -> None:
    """Only one that began after it, and has left nothing, ends it."""
    path = Path(bench.volume.storage.path("mirror.img"))
    flip(path, 100)
    bench.clock.now += NS
    with pytest.raises(CorruptionError):
        await bench.engine.read(bench.volume.live, 0, 512)
    assert bench.volume.statistics.damaged_reads == 1
    assert "find what is damaged with: dmafs scrub" in bench.alarms()["damage", "disk"]
    now = bench.clock.now
    for begun, ended, count, repaired, is_on in (
        (now - 1, now + 1, 0, 0, True),
        (now + 1, 0, 0, 0, True),
        (now + 1, now + 2, 3, 2, True),
        (now + 1, now + 2, 3, 3, False),
        (now + 1, now + 2, 2, 1, True),
        (now + 3, now + 4, 0, 0, False),
    ):
        found = Scrubbed(begun, ended_ns=ended, count=count, repaired=repaired)
        bench.engine.checking.last_scrub = found
        assert (("damage", "disk") in bench.alarms()) == is_on, found


async def test_a_gap_is_an_alarm_while_it_lasts(bench: Bench) -> None:
    """What the engine has told stays; one that another daemon has begun is told, too."""
    bench.volume.indicate(Flag.GAP)
    assert bench.alarms()["gap", "disk"].startswith("volume disk: a gap is open, it has begun at ")
    bench.volume.indicate(Flag.RESYNCED)
    assert bench.alarms() == {}
    assert bench.volume.journal.gaps_begun == 1
    bench.engine._loss = LogLostError("no space")
    bench.engine.alarm("volume disk: a gap has begun: no space")
    assert bench.alarms() == {("gap", "disk"): "volume disk: a gap has begun: no space"}, "it is just beginning"
    bench.volume.indicate(Flag.GAP)
    assert bench.alarms() == {("gap", "disk"): "volume disk: a gap has begun: no space"}
    bench.engine._loss = None
    bench.volume.indicate(Flag.RESYNCED)
    assert bench.alarms() == {}
