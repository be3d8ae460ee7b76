"""Claims about dmafs.service.tapping: the tap of a volume says what engine it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
import trio

from dmafs.core.policy import plan
from dmafs.core.store import create_volume, open_volume
from dmafs.core.volume import Volume
from dmafs.service.configuration import Configuration
from dmafs.service.engine import Engine
from dmafs.service.following import FollowingEngine
from dmafs.service.passing import PassThroughEngine
from dmafs.service.report import state_of
from dmafs.service.tapping import PastEngine, open_engine
from dmafs.taps.recorded import import_volume
from dmafs.taps.timeline import TimesInMarks
from dmafs.units import SECTOR
from tests.logs import FLUSH, log_of, mark, write
from tests.unit.tools import fill, image_bytes

BOOT = UUID(int=7)
NOW = 1785249005_000000000


@pytest.fixture
def opened() -> Iterator[list[Volume]]:
    """Volumes that no engine closes."""
    volumes: list[Volume] = []
    yield volumes
    for volume in volumes:
        volume.close()


def imported(path: Path) -> Volume:
    """Return an imported volume whose history is years old."""
    (path / "a.log").write_bytes(log_of([write(1, fill(1)), mark("@1000"), write(1, fill(2)), FLUSH, mark("@2000")]))
    import_volume(
        path / "store",
        "disk",
        log=path / "a.log",
        base=None,
        size_bytes=64 * SECTOR,
        marks=TimesInMarks(),
        now=NOW,
        progress=lambda _what, _done, _total: None,
    )
    return open_volume(path / "store" / "disk")


@pytest.mark.parametrize(("tap", "kind"), [("fuse", PassThroughEngine), ("log", FollowingEngine)])
async def test_each_tap_has_its_engine(tmp_path: Path, tap: str, kind: type[Engine], opened: list[Volume]) -> None:
    """A pass-through writes the source, a log is followed."""
    source, log = tmp_path / "primary", tmp_path / "a.log"
    source.write_bytes(bytes(64 * SECTOR))
    log.touch()
    create_volume(tmp_path / "store", "disk", source=source, tap=tap, log_path=log if tap == "log" else None)
    opened.append(open_volume(tmp_path / "store" / "disk"))
    engine = open_engine(opened[0], tmp_path / "store" / "disk", Configuration(), trio.CapacityLimiter(1))
    assert type(engine) is kind
    engine.tap.close()


async def test_an_imported_volume_has_no_gap_after_a_stop(tmp_path: Path) -> None:
    """Killed in use, under another kernel: nothing can be missing, since nothing is captured."""
    volume = imported(tmp_path)
    engine = open_engine(volume, tmp_path / "store" / "disk", Configuration(), trio.CapacityLimiter(1))
    assert isinstance(engine, PastEngine)
    assert await engine.recover(BOOT) == 0
    volume.close()
    volume = open_volume(tmp_path / "store" / "disk")
    engine = open_engine(volume, tmp_path / "store" / "disk", Configuration(), trio.CapacityLimiter(1))
    assert await engine.recover(UUID(int=8)) == 0
    assert volume.journal.gaps == []
    assert state_of(volume) == "imported"
    await engine.flush()
    await engine.close()


async def test_no_sync_takes_moments_from_an_imported_volume(tmp_path: Path) -> None:
    """However old they are, and however full the disk is; one that is asked for does."""
    volume = imported(tmp_path)
    engine = open_engine(volume, tmp_path / "store" / "disk", Configuration(), trio.CapacityLimiter(1))
    policy = Configuration().sync.policy()
    assert plan(engine.facts(), policy, NOW * 2, time_came=True) is None
    assert image_bytes(volume, 1)[SECTOR : 2 * SECTOR] == fill(1)
    assert await engine.sync() == 2
    await engine.close()
